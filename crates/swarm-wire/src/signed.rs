//! Signed statements: the exact bytes that an Ed25519 signature covers, and the one check of them. Keys stay where they
//! are: who owns one is a [`Signer`].

use ed25519_dalek::{Signature, Signer as _, SigningKey, VerifyingKey};

use crate::error::DecodeError;
use crate::generated::swarm::v1::Signed;
use crate::id::PeerId;
use crate::limits::MESSAGE_MAX_BYTES;

/// The bytes that a signature in `domain` over `payload` covers: a fixed tag, the domain with its length, the payload.
pub fn signed_bytes(domain: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"swarm-signed-v1".to_vec();
    bytes.extend_from_slice(&(domain.len() as u64).to_le_bytes());
    bytes.extend_from_slice(domain.as_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// Owns an Ed25519 key.
pub trait Signer {
    /// The public key.
    fn public_key(&self) -> [u8; 32];

    /// The signature over `bytes`.
    fn signature(&self, bytes: &[u8]) -> [u8; 64];

    /// A statement in `domain`, ready to be sent.
    fn signed(&self, domain: &str, payload: &[u8]) -> Signed {
        Signed {
            domain: domain.to_owned(),
            payload: payload.to_vec().into(),
            public_key: self.public_key().to_vec().into(),
            signature: self.signature(&signed_bytes(domain, payload)).to_vec().into(),
        }
    }
}

impl Signer for SigningKey {
    fn public_key(&self) -> [u8; 32] {
        self.verifying_key().to_bytes()
    }

    fn signature(&self, bytes: &[u8]) -> [u8; 64] {
        self.sign(bytes).to_bytes()
    }
}

/// The key that a statement of `domain` says it is signed with, before anybody has looked at the signature.
///
/// # Errors
/// When it is no key of 32 bytes.
pub fn claimed_key(statement: &Signed, domain: &str) -> Result<[u8; 32], DecodeError> {
    let bad = |_| DecodeError::BadSignature { domain: domain.to_owned() };
    statement.public_key.as_ref().try_into().map_err(bad)
}

/// Who signed a statement of `domain`.
///
/// # Errors
/// When the domain is another one, the payload is too large, or key or signature are no good.
pub fn verify(statement: &Signed, domain: &str) -> Result<PeerId, DecodeError> {
    if statement.domain != domain {
        let got: String = statement.domain.chars().take(64).collect();
        return Err(DecodeError::invalid("signature domain", got));
    }
    let got_bytes = statement.payload.len();
    if got_bytes > MESSAGE_MAX_BYTES {
        return Err(DecodeError::TooLarge {
            what: "signed payload",
            limit_bytes: MESSAGE_MAX_BYTES,
            got_bytes,
        });
    }
    let bad = || DecodeError::BadSignature { domain: domain.to_owned() };
    let public_key = claimed_key(statement, domain)?;
    let signature = Signature::from_slice(&statement.signature).map_err(|_| bad())?;
    let key = VerifyingKey::from_bytes(&public_key).map_err(|_| bad())?;
    key.verify_strict(&signed_bytes(domain, &statement.payload), &signature).map_err(|_| bad())?;
    Ok(PeerId::from_ed25519(&public_key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domain_and_payload_cannot_be_shifted_into_each_other() {
        assert_ne!(signed_bytes("ab", b"c"), signed_bytes("a", b"bc"));
    }

    #[test]
    fn statements_verify_and_any_change_is_noticed() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let statement = key.signed("test/v1", b"payload");
        assert_eq!(verify(&statement, "test/v1"), Ok(PeerId::from_ed25519(&key.public_key())));
        assert!(matches!(verify(&statement, "test/v2"), Err(DecodeError::Invalid { .. })));
        let changed = |change: &dyn Fn(&mut Signed)| {
            let mut changed = statement.clone();
            change(&mut changed);
            verify(&changed, "test/v1")
        };
        let other = SigningKey::from_bytes(&[8; 32]).public_key();
        for refused in [
            changed(&|s| s.payload = b"Payload".to_vec().into()),
            changed(&|s| s.public_key = other.to_vec().into()),
            changed(&|s| s.public_key = vec![1; 31].into()),
            changed(&|s| s.signature = s.signature.slice(..63)),
        ] {
            assert!(matches!(refused, Err(DecodeError::BadSignature { .. })), "{refused:?}");
        }
        let long = changed(&|s| s.payload = vec![0; MESSAGE_MAX_BYTES + 1].into());
        assert!(matches!(long, Err(DecodeError::TooLarge { .. })));
    }
}
