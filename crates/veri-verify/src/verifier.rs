//! The auditor's side: bind, challenge, check proofs, compare with a recomputation, judge. No IO: the recomputation
//! comes in as a [`Replay`].

use swarm_wire::PeerId;

use crate::challenge::Challenge;
use crate::commitment::SignedCommitment;
use crate::compare;
use crate::config::{MAX_POSITIONS, Profile};
use crate::job::{Answer, Job};
use crate::merkle::{self, LeafContext};
use crate::prover::Opening;
use crate::verdict::{FailReason, Verdict};

/// What the auditor recomputed for one answer.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Replay {
    /// The row behind every sampled token, `[n][H]`.
    pub rows: Vec<Vec<f32>>,
    /// Log-probability of every sampled token.
    pub logprobs: Vec<f32>,
    /// What the sampler draws in place of each sampled token from the recomputed distributions, when it can be replayed.
    pub tokens: Option<Vec<u32>>,
}

/// One audit of one answer.
#[derive(Debug, Clone)]
pub struct Audit {
    job: Job,
    answer: Answer,
    signed: SignedCommitment,
    challenge: Challenge,
}

impl Audit {
    /// Checks that the commitment is about this job and this answer (and made by `worker`, when given), and draws the
    /// challenge. `randomness` must be fresh: made after the commitment was received.
    ///
    /// # Errors
    /// The verdict `Malformed`, when the commitment is about something else.
    pub fn begin(
        job: &Job,
        answer: &Answer,
        signed: &SignedCommitment,
        worker: Option<&PeerId>,
        randomness: [u8; 32],
        n_positions: u32,
    ) -> Result<Self, Verdict> {
        let malformed = |reason: &str| Err(Verdict::Malformed { reason: reason.to_owned() });
        let claim = signed.commitment();
        if worker.is_some_and(|w| w != signed.signer()) {
            return malformed("the commitment is signed by another peer");
        }
        if claim.job_id != job.id() {
            return malformed("the commitment is about another job");
        }
        if claim.output_hash != answer.hash() {
            return malformed("the commitment is about another answer");
        }
        if !answer.is_in_order() {
            return malformed("the answer's foreign tokens are not in rising ranges");
        }
        if claim.n_rows as usize != answer.sampled().len() || answer.tokens.len() != answer.logprobs.len() {
            return malformed("the commitment has not one row and one log-probability per sampled token");
        }
        let n_positions = n_positions.clamp(1, MAX_POSITIONS);
        let challenge = Challenge { commitment_hash: signed.hash(), randomness, n_positions };
        Ok(Self { job: job.clone(), answer: answer.clone(), signed: signed.clone(), challenge })
    }

    /// What to send to the worker.
    pub fn challenge(&self) -> &Challenge {
        &self.challenge
    }

    /// Judges an opening against a recomputation.
    pub fn judge(&self, opening: &Opening, replay: &Replay, profile: &Profile) -> Verdict {
        if let Err(reason) = self.check_proofs(opening) {
            return Verdict::Malformed { reason };
        }
        let nothing: &[f32] = &[];
        let distance = compare::rows(opening.rows.iter().map(|row| {
            (&row.values[..], replay.rows.get(row.position as usize).map_or(nothing, |r| &r[..]))
        }));
        let fail = |reason| Verdict::Fail { reason, distance };
        if distance.relative_l2 >= profile.fail_relative_l2 {
            return fail(FailReason::HiddenStates);
        }
        let (sampled, answer) = (self.answer.sampled(), &self.answer);
        let claimed: Vec<f32> = sampled.iter().map(|i| answer.logprobs[*i]).collect();
        let logprobs = compare::logprobs(&claimed, &replay.logprobs);
        if logprobs.mean_nats >= profile.fail_logprob_nats
            || logprobs.max_nats >= profile.fail_logprob_max_nats
        {
            return fail(FailReason::Logprobs);
        }
        let claimed: Vec<u32> = sampled.iter().map(|i| answer.tokens[*i]).collect();
        if let Some(tokens) = &replay.tokens
            && agreement(&claimed, tokens) < profile.min_token_agreement
        {
            return fail(FailReason::Tokens);
        }
        if distance.relative_l2 > profile.pass_relative_l2 {
            return Verdict::Inconclusive { distance };
        }
        Verdict::Pass { distance }
    }

    /// The proofs of an opening: exactly the rows that were drawn, each under the committed root.
    fn check_proofs(&self, opening: &Opening) -> Result<(), String> {
        let claim = self.signed.commitment();
        if opening.commitment_hash != self.challenge.commitment_hash {
            return Err("the opening is of another commitment".to_owned());
        }
        let wanted = self.challenge.positions(claim.n_rows);
        let opened: Vec<u32> = opening.rows.iter().map(|r| r.position).collect();
        if opened != wanted {
            return Err(format!("rows {opened:?} were opened instead of {wanted:?}"));
        }
        for row in &opening.rows {
            if row.values.len() != claim.width as usize {
                return Err(format!(
                    "row {} has {} values instead of {}",
                    row.position,
                    row.values.len(),
                    claim.width
                ));
            }
            let context =
                LeafContext { job_id: claim.job_id, boundary: claim.boundary, position: row.position };
            let leaf = merkle::leaf(&context, &row.values);
            if !merkle::verify(&claim.root, &leaf, row.position as usize, claim.n_rows as usize, &row.path) {
                return Err(format!("row {} is not under the committed root", row.position));
            }
        }
        Ok(())
    }

    /// The job that is audited.
    pub fn job(&self) -> &Job {
        &self.job
    }
}

fn agreement(claimed: &[u32], replayed: &[u32]) -> f64 {
    if claimed.is_empty() || claimed.len() != replayed.len() {
        return 0.0;
    }
    let equal = claimed.iter().zip(replayed).filter(|(a, b)| a == b).count();
    equal as f64 / claimed.len() as f64
}
