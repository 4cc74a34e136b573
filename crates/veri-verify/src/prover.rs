//! The worker's side: record rows while tokens are made, commit, and open what is asked.

use swarm_wire::signed::Signer;

use crate::challenge::Challenge;
use crate::commitment::{Commitment, SignedCommitment};
use crate::error::ProveError;
use crate::job::{Answer, Job};
use crate::merkle::{Hash, LeafContext, Tree, leaf};

/// One opened row.
#[derive(Debug, Clone, PartialEq)]
pub struct OpenedRow {
    /// Index among the sampled tokens.
    pub position: u32,
    /// The row, `[H]`.
    pub values: Vec<f32>,
    /// Sibling hashes from the leaf upwards.
    pub path: Vec<Hash>,
}

/// Rows of a commitment, with their proofs.
#[derive(Debug, Clone, PartialEq)]
pub struct Opening {
    /// Hash of the signed commitment.
    pub commitment_hash: Hash,
    /// The rows.
    pub rows: Vec<OpenedRow>,
}

/// Records the hidden rows of one answer; keep it until the answer can no longer be challenged. Memory: 4 H bytes per
/// output token.
#[derive(Debug, Clone)]
pub struct Prover {
    job_id: Hash,
    boundary: u32,
    width: usize,
    rows: Vec<f32>,
    committed: Option<(Tree, Hash)>,
}

impl Prover {
    /// A prover for `job` whose rows of `width` values lie above `boundary` decoder layers.
    pub fn new(job: &Job, boundary: u32, width: usize) -> Self {
        Self { job_id: job.id(), boundary, width, rows: Vec::new(), committed: None }
    }

    /// Adds the row `[H]` that produced the next sampled token.
    ///
    /// # Panics
    /// When the row has another width: our own stage made it.
    pub fn record(&mut self, row: &[f32]) {
        assert_eq!(row.len(), self.width, "row width");
        self.rows.extend_from_slice(row);
    }

    /// Bytes that it keeps in memory: rows, and two hashes for each.
    pub fn memory(&self) -> usize {
        size_of_val(&self.rows[..]) + self.n_rows() * 2 * size_of::<Hash>()
    }

    fn row(&self, position: usize) -> &[f32] {
        &self.rows[position * self.width..(position + 1) * self.width]
    }

    fn n_rows(&self) -> usize {
        self.rows.len() / self.width.max(1)
    }

    /// Commits to all recorded rows and the answer.
    ///
    /// # Errors
    /// When there is not exactly one finite row per sampled token and one log-probability per token.
    pub fn commit(&mut self, answer: &Answer, worker: &impl Signer) -> Result<SignedCommitment, ProveError> {
        let n_rows = self.n_rows();
        if n_rows == 0 {
            return Err(ProveError::NoRows);
        }
        let n_tokens = answer.sampled().len();
        if n_rows != n_tokens || answer.tokens.len() != answer.logprobs.len() {
            let n_logprobs = answer.logprobs.len();
            return Err(ProveError::RowsAndTokensDiffer { n_rows, n_tokens, n_logprobs });
        }
        if let Some(i) = self.rows.iter().position(|v| !v.is_finite()) {
            return Err(ProveError::NotFinite { position: i / self.width, column: i % self.width });
        }
        let index = |i: usize| u32::try_from(i).expect("completions are far below 2^32 tokens");
        let leaves = (0..n_rows)
            .map(|i| {
                let context =
                    LeafContext { job_id: self.job_id, boundary: self.boundary, position: index(i) };
                leaf(&context, self.row(i))
            })
            .collect();
        let tree = Tree::new(leaves).ok_or(ProveError::NoRows)?;
        let commitment = Commitment {
            job_id: self.job_id,
            output_hash: answer.hash(),
            boundary: self.boundary,
            width: index(self.width),
            n_rows: index(n_rows),
            root: tree.root(),
        };
        let signed = SignedCommitment::sign(commitment, worker);
        self.committed = Some((tree, signed.hash()));
        Ok(signed)
    }

    /// Opens the rows that `challenge` draws.
    ///
    /// # Errors
    /// When nothing was committed, or the challenge names another commitment.
    pub fn open(&self, challenge: &Challenge) -> Result<Opening, ProveError> {
        let (tree, commitment_hash) = self.committed.as_ref().ok_or(ProveError::NotCommitted)?;
        if *commitment_hash != challenge.commitment_hash {
            return Err(ProveError::OtherCommitment);
        }
        let n_rows = u32::try_from(self.n_rows()).expect("checked when committing");
        let rows = challenge
            .positions(n_rows)
            .into_iter()
            .map(|position| {
                let i = position as usize;
                OpenedRow { position, values: self.row(i).to_vec(), path: tree.path(i) }
            })
            .collect();
        Ok(Opening { commitment_hash: *commitment_hash, rows })
    }
}
