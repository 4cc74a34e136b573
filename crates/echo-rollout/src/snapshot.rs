//! Policy snapshots: which weights a version is, said and signed by the trainer.
//!
//! A worker reports a version only after the payload's hash matched the manifest, so that a version tag never lies.

use bytes::Bytes;
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::prost::Message;
use swarm_wire::signed::{Signer, verify};
use swarm_wire::{Cid, DecodeError, PeerId, PolicyVersion, RunId};

use crate::wire;

/// Domain of signed snapshot manifests.
pub const SNAPSHOT_DOMAIN: &str = "echo/v1/snapshot";

/// Which weights a policy version is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotManifest {
    /// The run.
    pub run: RunId,
    /// The version.
    pub version: PolicyVersion,
    /// The version that the update was computed from.
    pub parent: Option<PolicyVersion>,
    /// What is to be installed.
    pub payload: Payload,
    /// Names the base checkpoint.
    pub base_model_id: String,
    /// The trainer.
    pub created_by: PeerId,
}

/// What a worker installs over the base checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Nothing: the base checkpoint is the policy.
    Base,
    /// A LoRA adapter, as safetensors.
    Lora(Artefact),
    /// All weights, as safetensors.
    Full(Artefact),
}

impl Payload {
    /// The artefact to fetch, if any.
    pub fn artefact(&self) -> Option<&Artefact> {
        match self {
            Self::Base => None,
            Self::Lora(artefact) | Self::Full(artefact) => Some(artefact),
        }
    }

    /// What is installed, of the artefact's bytes.
    pub fn weights(&self, bytes: Bytes) -> Weights {
        match self {
            Self::Base => Weights::Base,
            Self::Lora(_) => Weights::Lora(bytes),
            Self::Full(_) => Weights::Full(bytes),
        }
    }
}

/// The weights of a version: a [`Payload`] whose bytes are here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Weights {
    /// The base checkpoint.
    Base,
    /// A LoRA adapter over it, as safetensors.
    Lora(Bytes),
    /// All weights, as safetensors with the base checkpoint's names.
    Full(Bytes),
}

impl Weights {
    /// What is sent; nothing for the base checkpoint.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Base => &[],
            Self::Lora(bytes) | Self::Full(bytes) => bytes,
        }
    }

    /// What files of them are called: `adapter` or `model`. The base checkpoint is an adapter that changes nothing.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Base | Self::Lora(_) => "adapter",
            Self::Full(_) => "model",
        }
    }
}

/// Bytes to fetch, and how to know that they are the right ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artefact {
    /// Content id of the artefact's block manifest.
    pub root: Cid,
    /// BLAKE3 of the assembled bytes.
    pub hash: [u8; 32],
    /// Their number.
    pub bytes: u64,
    /// The trainer spreads it: workers get most of it from each other.
    pub spread: bool,
}

/// Fetched bytes that are not what the trainer signed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "payload of {version} is {got_bytes} bytes that do not match the signed hash; fetch it again from another peer"
)]
pub struct PayloadMismatch {
    /// The version.
    pub version: PolicyVersion,
    /// How many bytes came.
    pub got_bytes: usize,
}

impl SnapshotManifest {
    /// Whether `payload` is what this manifest names; nothing must be given for [`Payload::Base`].
    ///
    /// # Errors
    /// When length or hash differ.
    pub fn check_payload(&self, payload: &[u8]) -> Result<(), PayloadMismatch> {
        let matches = match self.payload.artefact() {
            None => payload.is_empty(),
            Some(a) => a.bytes == payload.len() as u64 && *blake3::hash(payload).as_bytes() == a.hash,
        };
        if matches {
            Ok(())
        } else {
            Err(PayloadMismatch { version: self.version, got_bytes: payload.len() })
        }
    }

    /// Signs it with the trainer's node key.
    pub fn sign(self, trainer: &impl Signer) -> SignedSnapshot {
        let signed = trainer.signed(SNAPSHOT_DOMAIN, &wire::snapshot_to_proto(&self).encode_to_vec());
        SignedSnapshot { manifest: self, signed }
    }
}

/// A manifest whose signature was checked (or made here).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedSnapshot {
    manifest: SnapshotManifest,
    signed: Signed,
}

impl SignedSnapshot {
    /// Takes a manifest from the wire if `trainer` signed it, and says in it that it did.
    ///
    /// # Errors
    /// When the domain, the key, the signature or a field is wrong.
    pub fn verify(signed: Signed, trainer: &PeerId) -> Result<Self, DecodeError> {
        if verify(&signed, SNAPSHOT_DOMAIN)? != *trainer {
            return Err(DecodeError::invalid("snapshot signer", "not the trainer"));
        }
        let manifest = wire::decode_snapshot(&signed.payload)?;
        if manifest.created_by != *trainer {
            return Err(DecodeError::invalid("snapshot creator", manifest.created_by));
        }
        Ok(Self { manifest, signed })
    }

    /// What was signed.
    pub fn manifest(&self) -> &SnapshotManifest {
        &self.manifest
    }

    /// As it travels.
    pub fn signed(&self) -> &Signed {
        &self.signed
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use ed25519_dalek::SigningKey;

    use super::*;

    pub(crate) fn manifest(key: &SigningKey, version: u64, payload: &[u8]) -> SnapshotManifest {
        let hash = *blake3::hash(payload).as_bytes();
        let root = swarm_wire::cid::raw(swarm_wire::cid::HASH_BLAKE3, &hash);
        SnapshotManifest {
            run: RunId(4),
            version: PolicyVersion(version),
            parent: version.checked_sub(1).map(PolicyVersion),
            payload: Payload::Lora(Artefact {
                root,
                hash,
                bytes: payload.len() as u64,
                spread: version % 2 == 1,
            }),
            base_model_id: "tiny".to_owned(),
            created_by: PeerId::from_ed25519(&key.verifying_key().to_bytes()),
        }
    }

    #[test]
    fn only_the_trainers_signature_counts() {
        let key = SigningKey::from_bytes(&[3; 32]);
        let trainer = PeerId::from_ed25519(&key.verifying_key().to_bytes());
        let signed = manifest(&key, 7, b"adapter").sign(&key);
        let wire = signed.signed().clone();
        assert_eq!(SignedSnapshot::verify(wire.clone(), &trainer).unwrap(), signed);

        let stranger = SigningKey::from_bytes(&[4; 32]);
        let forged = manifest(&key, 7, b"adapter").sign(&stranger).signed().clone();
        assert!(SignedSnapshot::verify(forged, &trainer).is_err());
        let mut tampered = wire.clone();
        tampered.payload = manifest_bytes(&key, 8).into();
        assert!(SignedSnapshot::verify(tampered, &trainer).is_err());
        let mut moved = wire.clone();
        moved.domain = "echo/v1/verdict".to_owned();
        assert!(SignedSnapshot::verify(moved, &trainer).is_err());
        let mut short = wire;
        short.signature = short.signature.slice(..63);
        assert!(SignedSnapshot::verify(short, &trainer).is_err());
    }

    fn manifest_bytes(key: &SigningKey, version: u64) -> Vec<u8> {
        wire::snapshot_to_proto(&manifest(key, version, b"adapter")).encode_to_vec()
    }

    #[test]
    fn only_the_signed_bytes_are_installed() {
        let key = SigningKey::from_bytes(&[3; 32]);
        let lora = manifest(&key, 1, b"adapter");
        assert!(lora.check_payload(b"adapter").is_ok());
        assert!(lora.check_payload(b"adaptex").is_err() && lora.check_payload(b"").is_err());
        let base = SnapshotManifest { payload: Payload::Base, ..lora };
        assert!(base.check_payload(b"").is_ok() && base.check_payload(b"x").is_err());
    }
}
