//! Both sides of the protocol in memory: an honest worker passes, every lie that the threat page names does not.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

use ed25519_dalek::SigningKey;
use swarm_wire::PeerId;
use veri_verify::verdict::{Evidence, FailReason, to_hex};
use veri_verify::{
    Answer, Audit, Job, Opening, Profile, Prover, Replay, Sampling, SignedCommitment, Verdict, wire,
};

const WIDTH: usize = 48;
const LAYERS: u32 = 4;

fn job(nonce: u64) -> Job {
    Job {
        model_id: "base".into(),
        policy_version: 3,
        adapter_hash: Some(*blake3::hash(b"adapter").as_bytes()),
        prompt: vec![1, 2, 3],
        sampling: Sampling::default(),
        nonce,
    }
}

/// A stand-in for a model: rows, log-probabilities and tokens follow from a seed and a relative disturbance.
fn compute(seed: u64, n: usize, disturbance: f32) -> (Vec<Vec<f32>>, Answer) {
    let mut stream = blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof();
    let mut unit = || {
        let mut b = [0; 4];
        stream.fill(&mut b);
        u32::from_le_bytes(b) as f32 / u32::MAX as f32 * 2.0 - 1.0
    };
    let rows: Vec<Vec<f32>> = (0..n).map(|_| (0..WIDTH).map(|_| unit() * 3.0).collect()).collect();
    let logprobs = (0..n).map(|_| unit() - 1.5).collect();
    let rows =
        rows.into_iter().map(|r| r.into_iter().map(|v| v * (1.0 + disturbance * unit())).collect()).collect();
    (rows, Answer::new((0..n as u32).collect(), logprobs))
}

fn key() -> SigningKey {
    SigningKey::from_bytes(&[5; 32])
}

fn prove(job: &Job, rows: &[Vec<f32>], answer: &Answer) -> (Prover, SignedCommitment) {
    let mut prover = Prover::new(job, LAYERS, WIDTH);
    rows.iter().for_each(|row| prover.record(row));
    let signed = prover.commit(answer, &key()).unwrap();
    let received = wire::decode_signed_commitment(&signed.encode()).unwrap();
    (prover, received)
}

fn replay(n: usize) -> Replay {
    let (rows, answer) = compute(1, n, 0.0);
    Replay { rows, logprobs: answer.logprobs, tokens: Some(answer.tokens) }
}

fn audit(rows: &[Vec<f32>], answer: &Answer) -> Verdict {
    let (prover, signed) = prove(&job(1), rows, answer);
    let audit = Audit::begin(&job(1), answer, &signed, Some(signed.signer()), [7; 32], 8).unwrap();
    let opening = prover.open(audit.challenge()).unwrap();
    let opening = wire::decode_opening(&wire::encode_opening(&opening)).unwrap();
    audit.judge(&opening, &replay(rows.len()), &Profile::f32())
}

#[test]
fn an_honest_answer_passes_bit_for_bit() {
    let (rows, answer) = compute(1, 20, 0.0);
    let Verdict::Pass { distance } = audit(&rows, &answer) else { panic!("not passed") };
    assert_eq!((distance.n_exact, distance.n_rows), (8, 8));
}

#[test]
fn rounding_of_another_kernel_passes_and_a_grey_zone_stays_open() {
    let (rows, answer) = compute(1, 20, 1e-5);
    assert!(audit(&rows, &answer).is_pass());
    let (rows, answer) = compute(1, 20, 8e-4);
    assert!(matches!(audit(&rows, &answer), Verdict::Inconclusive { .. }));
}

#[test]
fn other_weights_are_convicted() {
    for (seed, disturbance) in [(2, 0.0), (1, 0.01), (1, 0.3)] {
        let (rows, _) = compute(seed, 20, disturbance);
        let (_, answer) = compute(1, 20, 0.0);
        let verdict = audit(&rows, &answer);
        assert!(matches!(verdict, Verdict::Fail { reason: FailReason::HiddenStates, .. }), "{verdict:?}");
    }
}

#[test]
fn invented_logprobs_and_resampled_tokens_are_convicted() {
    let (rows, mut answer) = compute(1, 20, 0.0);
    answer.logprobs.iter_mut().for_each(|p| *p += 0.1);
    assert!(matches!(audit(&rows, &answer), Verdict::Fail { reason: FailReason::Logprobs, .. }));
    // One of many, far off: an importance ratio of e^5 that a mean over the answer would hide.
    let (rows, mut answer) = compute(1, 600, 0.0);
    answer.logprobs[77] -= 5.0;
    assert!(matches!(audit(&rows, &answer), Verdict::Fail { reason: FailReason::Logprobs, .. }));
    let (rows, mut answer) = compute(1, 20, 0.0);
    answer.tokens[3] = 999;
    assert!(matches!(audit(&rows, &answer), Verdict::Fail { reason: FailReason::Tokens, .. }));
}

#[test]
fn a_commitment_is_about_one_job_one_answer_and_one_worker() {
    let (rows, answer) = compute(1, 20, 0.0);
    let (_, signed) = prove(&job(1), &rows, &answer);
    let begin = |job: &Job, answer: &Answer, worker: Option<&PeerId>| {
        Audit::begin(job, answer, &signed, worker, [7; 32], 8)
    };
    assert!(begin(&job(1), &answer, None).is_ok());
    assert!(
        matches!(begin(&job(2), &answer, None), Err(Verdict::Malformed { .. })),
        "replayed for another lease"
    );
    let edited = Answer { tokens: vec![9; 20], ..answer.clone() };
    assert!(matches!(begin(&job(1), &edited, None), Err(Verdict::Malformed { .. })), "edited output");
    let other = PeerId::from_ed25519(&SigningKey::from_bytes(&[6; 32]).verifying_key().to_bytes());
    assert!(
        matches!(begin(&job(1), &answer, Some(&other)), Err(Verdict::Malformed { .. })),
        "another's commitment"
    );
}

#[test]
fn openings_must_be_the_drawn_rows_under_the_root() {
    let (rows, answer) = compute(1, 20, 0.0);
    let (prover, signed) = prove(&job(1), &rows, &answer);
    let audit = Audit::begin(&job(1), &answer, &signed, None, [7; 32], 8).unwrap();
    let honest = prover.open(audit.challenge()).unwrap();
    let judge = |opening: &Opening| audit.judge(opening, &replay(20), &Profile::f32());
    assert!(judge(&honest).is_pass());

    let mut changed = honest.clone();
    changed.rows[0].values[0] += 1.0;
    let mut missing = honest.clone();
    missing.rows.pop();
    let mut moved = honest.clone();
    moved.rows[0].position += 1;
    let mut forged = honest.clone();
    forged.rows[0].path[0] = [0; 32];
    let mut narrow = honest.clone();
    narrow.rows[0].values.pop();
    let other = Opening { commitment_hash: [0; 32], ..honest };
    for (what, opening) in [
        ("changed", changed),
        ("missing", missing),
        ("moved", moved),
        ("forged", forged),
        ("narrow", narrow),
        ("other", other),
    ] {
        assert!(matches!(judge(&opening), Verdict::Malformed { .. }), "{what}");
    }
}

fn evidence() -> Evidence {
    let (rows, answer) = compute(1, 20, 0.3);
    let (prover, signed) = prove(&job(1), &rows, &answer);
    let audit = Audit::begin(&job(1), &answer, &signed, None, [7; 32], 8).unwrap();
    let opening = prover.open(audit.challenge()).unwrap();
    let verdict = audit.judge(&opening, &replay(20), &Profile::f32());
    Evidence {
        job: job(1),
        answer,
        commitment: to_hex(&signed.encode()),
        randomness: to_hex(&[7; 32]),
        n_positions: 8,
        opening: Some(to_hex(&wire::encode_opening(&opening))),
        adapter: Some(to_hex(b"adapter")),
        full: false,
        verdict,
    }
}

#[test]
fn anyone_comes_to_the_same_verdict_from_the_evidence() {
    let told = serde_json::to_string(&evidence()).unwrap();
    let evidence: Evidence = serde_json::from_str(&told).unwrap();
    assert_eq!(evidence.worker(), Some(PeerId::from_ed25519(&key().verifying_key().to_bytes())));
    let opened = evidence.open().unwrap();
    assert_eq!((opened.adapter(), opened.all_weights()), (Some(&b"adapter"[..]), None));
    let verdict = opened.judge(&replay(20), &Profile::f32());
    assert!(matches!(verdict, Verdict::Fail { reason: FailReason::HiddenStates, .. }));
    assert_eq!(verdict, evidence.verdict);
}

#[test]
fn evidence_about_all_weights_names_their_file_instead_of_carrying_it() {
    let full = Evidence { full: true, adapter: None, ..evidence() };
    let told = serde_json::to_string(&full).unwrap();
    let full: Evidence = serde_json::from_str(&told).unwrap();
    let opened = full.open().unwrap();
    assert_eq!((opened.adapter(), opened.all_weights()), (None, full.job.adapter_hash));
    assert_eq!(opened.judge(&replay(20), &Profile::f32()), full.verdict);
    // Either it carries what the job names, or it says that the job names a file.
    let both = Evidence { adapter: evidence().adapter, ..full.clone() };
    let neither = Evidence { full: false, ..full };
    for told in [both, neither] {
        assert!(matches!(told.open(), Err(Verdict::Malformed { .. })));
    }
}

#[test]
fn evidence_that_was_tampered_with_convicts_nobody_of_a_wrong_computation() {
    let good = evidence();
    let changed = |change: &dyn Fn(&mut Evidence)| {
        let mut evidence = good.clone();
        change(&mut evidence);
        evidence.open().map(|opened| opened.judge(&replay(20), &Profile::f32()))
    };
    assert!(matches!(changed(&|e| e.opening = None), Err(Verdict::Withheld)));
    for (what, outcome) in [
        ("another answer", changed(&|e| e.answer.tokens[0] = 9)),
        ("another job", changed(&|e| e.job.nonce = 9)),
        ("another adapter", changed(&|e| e.adapter = Some(to_hex(b"other")))),
        ("no adapter", changed(&|e| e.adapter = None)),
        ("another draw", changed(&|e| e.randomness = to_hex(&[8; 32]))),
        ("no hexadecimal", changed(&|e| e.commitment.push('x'))),
    ] {
        let verdict = outcome.unwrap_or_else(|verdict| verdict);
        assert!(matches!(verdict, Verdict::Malformed { .. }), "{what}: {verdict:?}");
    }
}

#[test]
fn what_a_tool_said_has_no_row_and_is_bound_all_the_same() {
    let (rows, said) = compute(1, 4, 0.0);
    let said = |i: usize| (said.tokens[i], said.logprobs[i], true);
    let answer = Answer::of_turns([said(0), said(1), (50, 0.0, false), (51, 0.0, false), said(2), said(3)]);
    assert!(audit(&rows, &answer).is_pass());
    let (_, signed) = prove(&job(1), &rows, &answer);
    let mut other = answer.clone();
    other.tokens[2] = 52;
    let refused = Audit::begin(&job(1), &other, &signed, None, [7; 32], 8);
    assert!(matches!(refused, Err(Verdict::Malformed { .. })));
}

#[test]
fn signatures_cannot_be_moved_or_bent() {
    let (rows, answer) = compute(1, 20, 0.0);
    let (_, signed) = prove(&job(1), &rows, &answer);
    let bytes = signed.encode();
    let mut refused = 0;
    for i in 0..bytes.len() {
        let mut bent = bytes.clone();
        bent[i] ^= 1;
        match wire::decode_signed_commitment(&bent) {
            Err(_) => refused += 1,
            Ok(other) => assert_eq!(other.commitment(), signed.commitment(), "byte {i} changed the claim"),
        }
    }
    assert!(refused > bytes.len() * 9 / 10, "{refused} of {}", bytes.len());
}

#[test]
fn a_prover_never_makes_an_empty_or_poisoned_commitment() {
    let (rows, answer) = compute(1, 3, 0.0);
    assert!(Prover::new(&job(1), LAYERS, WIDTH).commit(&answer, &key()).is_err());
    let mut prover = Prover::new(&job(1), LAYERS, WIDTH);
    prover.record(&rows[0]);
    assert!(prover.commit(&answer, &key()).is_err(), "fewer rows than tokens");
    let mut poisoned = rows;
    poisoned[1][4] = f32::NAN;
    let mut prover = Prover::new(&job(1), LAYERS, WIDTH);
    poisoned.iter().for_each(|row| prover.record(row));
    assert!(prover.commit(&answer, &key()).is_err());
}
