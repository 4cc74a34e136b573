//! What a worker signs: the job, the answer, and the Merkle root over the hidden rows behind it.

use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::prost::Message;
use swarm_wire::signed::{Signer, verify};
use swarm_wire::{DecodeError, PeerId};

use crate::merkle::Hash;

/// Domain of the signature.
pub const DOMAIN: &str = "veri/v1/commitment";

/// A claim about one computation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commitment {
    /// Hash of the job.
    pub job_id: Hash,
    /// Hash of the answer.
    pub output_hash: Hash,
    /// Decoder layers below the rows.
    pub boundary: u32,
    /// Values per row.
    pub width: u32,
    /// Rows, one per output token.
    pub n_rows: u32,
    /// Merkle root over the rows.
    pub root: Hash,
}

/// A commitment with its signer and the hash that challenges name.
#[derive(Debug, Clone, PartialEq)]
pub struct SignedCommitment {
    commitment: Commitment,
    signer: PeerId,
    signed: Signed,
}

impl SignedCommitment {
    /// Signs `commitment`.
    pub fn sign(commitment: Commitment, worker: &impl Signer) -> Self {
        let signed = worker.signed(DOMAIN, &crate::wire::encode_commitment(&commitment));
        Self { commitment, signer: PeerId::from_ed25519(&worker.public_key()), signed }
    }

    /// Checks a signed statement that a peer sent.
    ///
    /// # Errors
    /// When domain, key, signature or contents are not those of a commitment.
    pub fn verify(signed: Signed) -> Result<Self, DecodeError> {
        let signer = verify(&signed, DOMAIN)?;
        let commitment = crate::wire::decode_commitment(&signed.payload)?;
        Ok(Self { commitment, signer, signed })
    }

    /// What is claimed.
    pub fn commitment(&self) -> &Commitment {
        &self.commitment
    }

    /// Who claims it.
    pub fn signer(&self) -> &PeerId {
        &self.signer
    }

    /// The statement as it travels.
    pub fn encode(&self) -> Vec<u8> {
        self.signed.encode_to_vec()
    }

    /// Hash over payload, key and signature: what a challenge names.
    pub fn hash(&self) -> Hash {
        let mut hash = blake3::Hasher::new_derive_key("veri/v1/commitment-hash");
        hash.update(&(self.signed.payload.len() as u64).to_le_bytes());
        hash.update(&self.signed.payload);
        hash.update(&self.signed.public_key);
        hash.update(&self.signed.signature);
        *hash.finalize().as_bytes()
    }
}
