//! Assistants in virtual time: who answers, who is late, who goes and comes again. Whatever happens, every share is computed, none is
//! asked of one that is busy or out, and the step ends.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use swarm_wire::PeerId;

use super::wire::{Frame, decode_frame, decode_share, encode_frame, encode_reply, encode_share};
use super::*;
use crate::loss::LossConfig;
use crate::loss::plan::RowPlan;
use crate::packing::{Sample, pack};
use crate::shares::Part;
use crate::step::tests::{Bigram, sample};

const CONFIG: LeaderConfig = LeaderConfig { patience_ms: 100, late_at_most: 3 };

fn peer(i: u8) -> PeerId {
    PeerId::from_ed25519(&[i + 1; 32])
}

/// What becomes of one question to an assistant.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// It answers after so many milliseconds.
    Answers(u64),
    /// It is gone after so many, and comes again after as many more.
    Goes(u64),
    /// It says something wrong after so many.
    Lies(u64),
}

fn fate() -> impl Strategy<Value = Fate> {
    prop_oneof![
        6 => (0_u64..90).prop_map(Fate::Answers),
        2 => (90_u64..400).prop_map(Fate::Answers),
        1 => (0_u64..150).prop_map(Fate::Goes),
        1 => (0_u64..150).prop_map(Fate::Lies),
    ]
}

proptest! {
    #[test]
    fn every_share_is_computed_whatever_becomes_of_assistants(
        n_assistants in 0_u8..5, n_shares in 1_usize..8, own in 1_usize..3,
        fates in proptest::collection::vec(fate(), 1..40),
    ) {
        let mut leader = Leader::new(CONFIG);
        let mut fates = fates.into_iter().cycle();
        let (mut now, mut events) = (0_u64, BTreeMap::<(u64, u64), (PeerId, Option<Attempt>, Fate)>::new());
        let (mut n_events, mut busy, mut out) = (0, BTreeSet::new(), BTreeSet::new());
        (0..n_assistants).for_each(|i| leader.join(&peer(i)).unwrap());
        // Two rounds a step. Whose answers of the first were taken, and whether one of them lied since.
        let (mut step, mut round, mut believed, mut doubted) = (0, 0, BTreeSet::new(), false);
        let mut n_again = 0;
        while step < 6 {
            leader.begin(step, n_shares);
            let (mut done, mut by) = (vec![false; n_shares], vec![None; n_shares]);
            let mut turns = 0;
            loop {
                turns += 1;
                prop_assert!(turns < 500, "the step does not end");
                // What came in the meantime.
                while let Some(event) = events.first_entry().filter(|e| e.key().0 <= now) {
                    let (peer, attempt, fate) = event.remove();
                    match (attempt, fate) {
                        (None, _) => {
                            if leader.join(&peer).is_ok() {
                                busy.remove(&peer);
                            }
                        }
                        (Some(attempt), Fate::Answers(_)) => {
                            if leader.handle_answer(&peer, attempt) {
                                prop_assert!(attempt.step == step && !done[attempt.share]);
                                done[attempt.share] = true;
                                by[attempt.share] = Some(peer.clone());
                            }
                            busy.remove(&peer);
                        }
                        (Some(_), Fate::Goes(ms)) => {
                            leader.exclude(&peer, Exclusion::Gone { reason: String::new() });
                            n_events += 1;
                            events.insert((now + ms, n_events), (peer, None, fate));
                        }
                        (Some(_), Fate::Lies(_)) => {
                            leader.exclude(&peer, Exclusion::NotFinite);
                            doubted |= believed.contains(&peer);
                            // Nothing that it said in this round counts.
                            for (done, by) in done.iter_mut().zip(&mut by) {
                                *done &= by.take_if(|by| *by == peer).is_none();
                            }
                        }
                    }
                }
                let next = leader.next(now, own);
                for (peer, why) in leader.take_news() {
                    if why.is_final() {
                        out.insert(peer);
                    }
                }
                prop_assert_eq!(next == Next::Again, doubted);
                match next {
                    Next::Ask { peer, attempt } => {
                        prop_assert!(!done[attempt.share] && attempt.step == step);
                        prop_assert!(attempt.share > 0, "an only share does not travel");
                        prop_assert!(busy.insert(peer.clone()) && !out.contains(&peer), "busy, or out");
                        let fate = fates.next().unwrap();
                        let (Fate::Answers(ms) | Fate::Goes(ms) | Fate::Lies(ms)) = fate;
                        n_events += 1;
                        events.insert((now + ms, n_events), (peer, Some(attempt), fate));
                    }
                    Next::Own(mine) => {
                        prop_assert!(!mine.is_empty() && mine.len() <= own);
                        now += 50;
                        for share in mine {
                            prop_assert!(!done[share]);
                            done[share] = true;
                            leader.handle_own(share);
                        }
                    }
                    Next::Wait { until_ms } => {
                        prop_assert!(until_ms > now && until_ms <= now + CONFIG.patience_ms);
                        let event = events.first_key_value().map_or(until_ms, |((at, _), _)| *at);
                        now = until_ms.min(event.max(now));
                    }
                    Next::Done => {
                        prop_assert!(done.iter().all(|d| *d), "{done:?}");
                        leader.end();
                        believed.extend(by.into_iter().flatten());
                        (step, round) = if round == 0 { (step, 1) } else { (step + 1, 0) };
                        if round == 0 {
                            believed.clear();
                        }
                        break;
                    }
                    Next::Again => {
                        (round, doubted) = (0, false);
                        believed.clear();
                        n_again += 1;
                        break;
                    }
                }
            }
        }
        prop_assert!(n_again <= n_assistants, "more than once for one");
        // Liars stay out.
        for peer in &out {
            prop_assert!(leader.join(peer).is_err() && leader.dismissed(peer).is_some());
        }
    }
}

#[test]
fn who_is_late_three_times_in_a_row_is_out_and_who_answers_in_between_is_not() {
    let (mut leader, p) = (Leader::new(CONFIG), peer(0));
    leader.join(&p).unwrap();
    let mut now = 0;
    // Two shares, of which it is asked for the last one; late or not.
    let mut step = |leader: &mut Leader, late: bool| {
        leader.begin(0, 2);
        let Next::Ask { attempt, .. } = leader.next(now, 1) else { panic!("it is not asked") };
        assert_eq!((attempt.share, leader.next(now, 1)), (1, Next::Own(vec![0])));
        leader.handle_own(0);
        if late {
            now += CONFIG.patience_ms;
            assert_eq!(leader.next(now, 1), Next::Own(vec![1]), "somebody else computes it");
            leader.handle_own(1);
        }
        assert_eq!(leader.handle_answer(&p, attempt), !late);
        assert_eq!(leader.next(now, 1), Next::Done);
    };
    for late in [true, true, false, true, true] {
        step(&mut leader, late);
    }
    assert_eq!((leader.assistants(), leader.take_news().len()), (1, 4));
    step(&mut leader, true);
    let late = Exclusion::Late { patience_ms: 100 };
    assert_eq!(leader.take_news(), [(p.clone(), late), (p.clone(), Exclusion::Slow { times: 3 })]);
    assert_eq!((leader.assistants(), leader.join(&p)), (0, Err(Exclusion::Slow { times: 3 })));
}

#[test]
fn of_who_was_wrong_about_one_share_no_other_of_the_round_counts() {
    for (why, believed) in [
        (Exclusion::NotFinite, false),
        (Exclusion::Wrong, false),
        (Exclusion::Gone { reason: String::new() }, true),
    ] {
        let (mut leader, p) = (Leader::new(CONFIG), peer(0));
        leader.join(&p).unwrap();
        leader.begin(0, 4);
        let ask = |leader: &mut Leader| {
            let Next::Ask { attempt, .. } = leader.next(0, 1) else { panic!("it is not asked") };
            attempt
        };
        for share in [3, 2] {
            let attempt = ask(&mut leader);
            assert!(attempt.share == share && leader.handle_answer(&p, attempt));
        }
        assert_eq!(ask(&mut leader).share, 1);
        leader.exclude(&p, why);
        let mut own = Vec::new();
        while let Next::Own(mine) = leader.next(0, 1) {
            mine.iter().for_each(|share| leader.handle_own(*share));
            own.extend(mine);
        }
        assert_eq!(own, if believed { vec![0, 1] } else { vec![0, 1, 2, 3] });
        assert_eq!(leader.next(0, 1), Next::Done);
    }
}

#[test]
fn who_is_wrong_makes_a_step_begin_again_where_it_was_believed_in_it() {
    let gone = Exclusion::Gone { reason: String::new() };
    for (believed_in, why, again) in [
        (7, Exclusion::Wrong, true),
        (7, Exclusion::NotFinite, true),
        (7, gone, false),
        (6, Exclusion::Wrong, false),
    ] {
        for between in [true, false] {
            let (mut leader, p) = (Leader::new(CONFIG), peer(0));
            leader.join(&p).unwrap();
            leader.begin(believed_in, 2);
            let Next::Ask { attempt, .. } = leader.next(0, 1) else { panic!("it is not asked") };
            assert!(leader.handle_answer(&p, attempt));
            assert_eq!(leader.next(0, 1), Next::Own(vec![0]));
            leader.handle_own(0);
            assert_eq!(leader.next(0, 1), Next::Done);
            leader.end();
            // Before the next round, or in it.
            if between {
                leader.exclude(&p, why.clone());
            }
            leader.begin(7, 2);
            if !between {
                assert!(matches!(leader.next(0, 1), Next::Ask { .. }));
                leader.exclude(&p, why.clone());
            }
            if again {
                assert_eq!(leader.next(0, 1), Next::Again, "{why}");
                leader.begin(7, 2);
            }
            for share in [0, 1] {
                assert_eq!(leader.next(0, 1), Next::Own(vec![share]), "{why}");
                leader.handle_own(share);
            }
            assert_eq!(leader.next(0, 1), Next::Done);
        }
    }
}

#[test]
fn once_the_answers_are_taken_none_counts_although_one_that_was_is_found_wrong() {
    let mut leader = Leader::new(CONFIG);
    [peer(0), peer(1)].iter().for_each(|p| leader.join(p).unwrap());
    leader.begin(0, 2);
    let ask = |leader: &mut Leader, now_ms| {
        let Next::Ask { peer, attempt } = leader.next(now_ms, 1) else { panic!("nobody is asked") };
        (peer, attempt)
    };
    let (slow, late) = ask(&mut leader, 0);
    let (quick, attempt) = ask(&mut leader, CONFIG.patience_ms);
    assert!(late == attempt && leader.handle_answer(&quick, attempt));
    assert_eq!(leader.next(CONFIG.patience_ms, 1), Next::Own(vec![0]));
    leader.handle_own(0);
    assert_eq!(leader.next(CONFIG.patience_ms, 1), Next::Done);
    leader.end();
    leader.exclude(&quick, Exclusion::OtherWeights);
    assert!(!leader.handle_answer(&slow, late), "it is of a round that is over");
    assert_eq!(leader.asked(&slow), None, "and can be asked again");
}

#[test]
fn who_joins_again_is_as_late_as_it_was() {
    let (mut leader, p) = (Leader::new(CONFIG), peer(0));
    for step in 0..3 {
        leader.join(&p).unwrap();
        leader.begin(step, 2);
        let now = 1000 * step;
        assert!(matches!(leader.next(now, 1), Next::Ask { .. }));
        assert_eq!(leader.next(now, 1), Next::Own(vec![0]));
        leader.handle_own(0);
        assert_eq!(leader.next(now + CONFIG.patience_ms, 1), Next::Own(vec![1]), "it is late");
        leader.handle_own(1);
        leader.exclude(&p, Exclusion::Gone { reason: "it hung up".to_owned() });
    }
    assert_eq!(leader.join(&p), Err(Exclusion::Slow { times: 3 }));
}

/// A share of gradients of two parts and the right reply to it.
fn share() -> (Share, Reply) {
    let batches = [
        [sample(&[0, 1, 2, 3], 2, 0.7), sample(&[3, 1], 1, -0.4)],
        [sample(&[2, 2, 0, 1, 3], 1, 0.2), sample(&[1, 0], 1, 0.3)],
    ];
    let part = |samples: &[Sample; 2]| {
        let batch = pack(samples).unwrap();
        let plan = RowPlan::new(&[], &batch.targets, &LossConfig::grpo()).unwrap();
        Part { batch, plan: Some(plan) }
    };
    let share = Share { task: Task::Gradients, parts: batches.iter().map(part).collect(), total_tokens: 8 };
    let answer = share.compute(&Bigram::new(4), &LossConfig::grpo()).unwrap();
    (share, Reply::new(Attempt { step: 3, round: 9, share: 1 }, [7; 32], answer))
}

#[test]
fn what_is_no_answer_is_named() {
    let (share, right) = share();
    let asked = right.attempt;
    let judge = |reply: Reply| check(reply, asked, &share, [7; 32], &[16]);
    assert_eq!(judge(right.clone()), Ok(share.compute(&Bigram::new(4), &LossConfig::grpo()).unwrap()));
    let wrong = |change: &dyn Fn(&mut Reply)| {
        let mut reply = right.clone();
        change(&mut reply);
        judge(reply).unwrap_err()
    };
    let other = |got| Exclusion::OtherShare { asked, got };
    for attempt in
        [Attempt { step: 2, ..asked }, Attempt { round: 8, ..asked }, Attempt { share: 0, ..asked }]
    {
        assert_eq!(wrong(&|r| r.attempt = attempt), other(attempt));
    }
    assert_eq!(wrong(&|r| r.weights[0] = 0), Exclusion::OtherWeights);
    assert_eq!(wrong(&|r| r.values.truncate(15)), Exclusion::Size { got: 60, needed: 64 });
    assert_eq!(wrong(&|r| r.values[3] = f32::NAN), Exclusion::NotFinite);
    assert_eq!(wrong(&|r| r.values[3] = f32::INFINITY), Exclusion::NotFinite);
    assert_eq!(wrong(&|r| r.figures.loss = f64::NAN), Exclusion::NotFinite);
    assert_eq!(wrong(&|r| r.figures.correction.weight_max = f64::INFINITY), Exclusion::NotFinite);
    assert_eq!(wrong(&|r| r.figures.tokens = usize::MAX), Exclusion::OtherTokens);
}

#[test]
fn shares_and_answers_travel_to_the_bit() {
    let (share, reply) = share();
    let mut full = share.clone();
    full.parts.iter_mut().for_each(|part| {
        part.batch.targets.proximal = part.batch.targets.sampled.clone();
        part.batch.targets.reference = Some(part.batch.targets.advantages.clone());
    });
    for share in [&share, &full] {
        assert_eq!(decode_share(&encode_share(share).unwrap()).unwrap(), *share);
    }
    let whole = Share { parts: vec![Part { plan: None, ..share.parts[0].clone() }], ..share.clone() };
    encode_share(&whole).unwrap_err();
    // Of log-probabilities only the tokens travel, and they are enough.
    let logprobs = Share { task: Task::Logprobs, ..share.clone() };
    let there = decode_share(&encode_share(&logprobs).unwrap()).unwrap();
    let of = |share: &Share| share.compute(&Bigram::new(4), &LossConfig::grpo()).unwrap();
    assert_eq!((of(&there), there.rows()), (of(&logprobs), logprobs.rows()));
    assert!(there.parts.iter().all(|part| part.batch.targets.mask.is_empty()));

    let (frame, payload) = encode_reply(&reply);
    let (back, n_bytes) = decode_frame(&encode_frame(&frame, payload.len())).unwrap();
    let Frame::Answer(answered) = back else { panic!("{back:?}") };
    assert_eq!((answered.with(&payload).unwrap(), n_bytes), (reply, payload.len() as u64));
    let mut damaged = payload.clone();
    damaged[5] ^= 1;
    assert_eq!(answered.with(&damaged), Err(Exclusion::Damaged));
}

#[test]
fn lists_that_do_not_fit_are_no_share() {
    use swarm_wire::generated::echo::v1::ShareWork;
    use swarm_wire::prost::Message as _;
    let right = ShareWork::decode(&encode_share(&share().0).unwrap()[..]).unwrap();
    let refused = |change: &dyn Fn(&mut ShareWork)| {
        let mut m = right.clone();
        change(&mut m);
        decode_share(&m.encode_to_vec()).unwrap_err()
    };
    refused(&|m| m.task = 0);
    refused(&|m| m.tokens.push(1));
    refused(&|m| m.sequence_tokens[0] = u32::MAX);
    refused(&|m| (m.sequence_tokens[0], m.sequence_tokens[1]) = (5, 1));
    refused(&|m| m.part_sequences[0] = 3);
    refused(&|m| m.part_sequences.push(0));
    refused(&|m| m.trainable = vec![2_u8; m.trainable.len()].into());
    refused(&|m| m.trainable.clear());
    refused(&|m| _ = m.sampled_logprobs.pop());
    refused(&|m| m.reference_logprobs.push(0.0));
    refused(&|m| m.advantages.clear());
    refused(&|m| m.divergence_weights.clear());
    refused(&|m| m.policy_weights.clear());
    refused(&|m| (m.policy_weights, m.divergence_weights) = (Vec::new(), Vec::new()));
    refused(&|m| {
        m.part_sequences = vec![4];
        (m.policy_weights, m.divergence_weights) = (Vec::new(), Vec::new());
    });
    refused(&|m| *m = ShareWork { task: 1, ..ShareWork::default() });
}

proptest! {
    #[test]
    fn any_bytes_are_a_share_or_refused(mut bytes in proptest::collection::vec(any::<u8>(), 0..80), at in 0_usize..300, with in any::<u8>()) {
        let _ = decode_share(&bytes).map(|share| share.rows());
        let _ = decode_frame(&bytes);
        bytes = encode_share(&share().0).unwrap();
        let n = bytes.len();
        bytes[at % n] = with;
        let _ = decode_share(&bytes).map(|share| share.rows());
    }
}

#[test]
fn weights_are_other_ones_with_another_name_shape_or_value() {
    let parameter = |name: &str, shape, values: [f32; 4]| Parameter {
        name: name.to_owned(),
        shape,
        values: values.to_vec(),
    };
    let weights = |name, shape, last| weights_hash(&[parameter(name, shape, [1.0, 2.0, 3.0, last])]);
    let one = weights("q", [2, 2], 4.0);
    assert_eq!(one, weights("q", [2, 2], 4.0));
    for other in [weights("k", [2, 2], 4.0), weights("q", [1, 4], 4.0), weights("q", [2, 2], -4.0)] {
        assert_ne!(one, other);
    }
}
