//! What a worker signs: the job, the answer, and the Merkle root over the hidden rows behind it.

use ed25519_dalek::{Signer, SigningKey, VerifyingKey};
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::prost::Message;
use swarm_wire::signed::signed_bytes;
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
    pub fn sign(commitment: Commitment, key: &SigningKey) -> Self {
        let payload = crate::wire::encode_commitment(&commitment);
        let public_key = key.verifying_key().to_bytes();
        let signature = key.sign(&signed_bytes(DOMAIN, &payload)).to_bytes();
        let signed = Signed {
            domain: DOMAIN.to_owned(),
            payload: payload.into(),
            public_key: public_key.to_vec().into(),
            signature: signature.to_vec().into(),
        };
        Self { commitment, signer: PeerId::from_ed25519(&public_key), signed }
    }

    /// Checks a signed statement that a peer sent.
    ///
    /// # Errors
    /// When domain, key, signature or contents are not those of a commitment.
    pub fn verify(signed: Signed) -> Result<Self, DecodeError> {
        let bad = || DecodeError::BadSignature { domain: signed.domain.chars().take(64).collect() };
        if signed.domain != DOMAIN {
            return Err(bad());
        }
        let public_key: [u8; 32] = signed.public_key.as_ref().try_into().map_err(|_| bad())?;
        let signature: [u8; 64] = signed.signature.as_ref().try_into().map_err(|_| bad())?;
        let key = VerifyingKey::from_bytes(&public_key).map_err(|_| bad())?;
        key.verify_strict(&signed_bytes(DOMAIN, &signed.payload), &signature.into()).map_err(|_| bad())?;
        let commitment = crate::wire::decode_commitment(&signed.payload)?;
        Ok(Self { commitment, signer: PeerId::from_ed25519(&public_key), signed })
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
