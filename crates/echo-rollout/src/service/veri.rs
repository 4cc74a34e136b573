//! Workers' commitments and auditors' jobs in the terms of veri-verify: both sides build the same job from a lease.

use bytes::Bytes;
use lattica_net::Identity;
use veri_verify::{Answer, Job, Prover, Sampling, wire as veri_wire};

use super::worker::{CommitError, Committer, Opener, Work};
use crate::lease::Lease;

/// What a worker was asked to compute, in Veri's terms. The lease's number is the nonce.
pub fn job(model_id: &str, lease: &Lease, adapter_hash: Option<[u8; 32]>, prompt: &[u32]) -> Job {
    let s = lease.sampling;
    Job {
        model_id: model_id.to_owned(),
        policy_version: lease.version.0,
        adapter_hash,
        prompt: prompt.to_vec(),
        sampling: Sampling { temperature: s.temperature, top_k: s.top_k, top_p: s.top_p, seed: s.seed },
        nonce: lease.id.0,
    }
}

/// Commits to the final-norm rows of a worker's own engine.
pub struct VeriCommitter {
    identity: Identity,
    model_id: String,
    n_layers: u32,
}

impl std::fmt::Debug for VeriCommitter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VeriCommitter({}, {} layers)", self.model_id, self.n_layers)
    }
}

impl VeriCommitter {
    /// `identity` is the node's, so that the commitment's signer is the peer; `n_layers` is the model's depth.
    pub fn new(identity: Identity, model_id: String, n_layers: u32) -> Self {
        Self { identity, model_id, n_layers }
    }
}

impl Committer for VeriCommitter {
    fn commit(&self, work: &Work<'_>) -> Result<(Bytes, Box<dyn Opener>), CommitError> {
        let job = job(&self.model_id, work.lease, work.adapter_hash, work.prompt);
        let width = work.rows.first().map_or(0, |row| row.len());
        let mut prover = Prover::new(&job, self.n_layers, width);
        work.rows.iter().for_each(|row| prover.record(row));
        let answer = Answer::of_turns(work.steps.iter().map(|s| (s.token, s.logprob, s.trainable)));
        let signed =
            prover.commit(&answer, &self.identity).map_err(|e| CommitError { reason: e.to_string() })?;
        Ok((signed.encode().into(), Box::new(prover)))
    }
}

impl Opener for Prover {
    fn open(&self, challenge: &[u8]) -> Result<Bytes, CommitError> {
        let refused = |reason: String| CommitError { reason };
        let challenge = veri_wire::decode_challenge(challenge).map_err(|e| refused(e.to_string()))?;
        let opening = Prover::open(self, &challenge).map_err(|e| refused(e.to_string()))?;
        Ok(veri_wire::encode_opening(&opening).into())
    }

    fn bytes(&self) -> usize {
        self.memory()
    }
}
