//! Who a node is: an Ed25519 key, kept in a file that only its owner can read, and statements signed with it.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::path::Path;

use libp2p::identity::{Keypair, ed25519};
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::limits::{MESSAGE_MAX_BYTES, NAME_MAX_BYTES};
use swarm_wire::signed::signed_bytes;
use swarm_wire::{DecodeError, PeerId};

use super::private_file::{self, Opened};
use crate::error::IdentityError;

/// A node's key pair. Cloning shares the key.
#[derive(Clone)]
pub struct Identity {
    keypair: ed25519::Keypair,
}

impl fmt::Debug for Identity {
    /// Names the peer; the secret never reaches a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.peer_id())
    }
}

impl Identity {
    /// A fresh key from the operating system's randomness.
    pub fn generate() -> Self {
        Self { keypair: ed25519::Keypair::generate() }
    }

    /// The key that grows from `seed`. For tests and for keys that are kept elsewhere.
    pub fn from_seed(mut seed: [u8; 32]) -> Self {
        let secret = ed25519::SecretKey::try_from_bytes(&mut seed).expect("any 32 bytes are an Ed25519 seed");
        Self { keypair: ed25519::Keypair::from(secret) }
    }

    /// Reads the key file at `path`, or makes a key and writes it there with mode 0600. The file is the 32 seed bytes.
    ///
    /// # Errors
    /// When the file is not a key, can be read by others, or cannot be read or written.
    pub fn load_or_create(path: &Path) -> Result<Self, IdentityError> {
        let io = |source| IdentityError::Io { path: path.display().to_string(), source };
        match private_file::open(path) {
            Ok(Opened::TooOpen(mode)) => {
                Err(IdentityError::TooOpen { path: path.display().to_string(), mode })
            }
            Ok(Opened::Private(mut file)) => {
                let got_bytes = file.metadata().map_err(io)?.len();
                if got_bytes != 32 {
                    return Err(IdentityError::Malformed { path: path.display().to_string(), got_bytes });
                }
                let mut seed = [0; 32];
                file.read_exact(&mut seed).map_err(io)?;
                Ok(Self::from_seed(seed))
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                let identity = Self::generate();
                match private_file::create(path, &identity.secret_seed()) {
                    Ok(()) => Ok(identity),
                    // Another process made it between our two looks: its key counts.
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => Self::load_or_create(path),
                    Err(error) => Err(io(error)),
                }
            }
            Err(error) => Err(io(error)),
        }
    }

    /// The peer id of the public key.
    pub fn peer_id(&self) -> PeerId {
        PeerId::from_ed25519(&self.public_key())
    }

    /// The public key.
    pub fn public_key(&self) -> [u8; 32] {
        self.keypair.public().to_bytes()
    }

    /// The 32 secret bytes from which the key grows, for other Ed25519 libraries. Keep them secret.
    pub fn secret_seed(&self) -> [u8; 32] {
        self.keypair.secret().as_ref().try_into().expect("an Ed25519 secret is 32 bytes")
    }

    /// Signs `payload` for `domain`.
    pub fn sign(&self, domain: &str, payload: &[u8]) -> [u8; 64] {
        let signature = self.keypair.sign(&signed_bytes(domain, payload));
        signature.try_into().expect("an Ed25519 signature is 64 bytes")
    }

    /// A statement ready to be sent.
    pub fn signed(&self, domain: &str, payload: &[u8]) -> Signed {
        Signed {
            domain: domain.to_owned(),
            payload: payload.to_vec().into(),
            public_key: self.public_key().to_vec().into(),
            signature: self.sign(domain, payload).to_vec().into(),
        }
    }

    pub(crate) fn libp2p_keypair(&self) -> Keypair {
        Keypair::from(self.keypair.clone())
    }
}

/// Checks a statement's signature and returns who signed it. The caller still compares the domain with the one it wants.
///
/// # Errors
/// When key or signature have the wrong length, sizes are out of bounds, or the signature does not match.
pub fn verify(statement: &Signed) -> Result<PeerId, DecodeError> {
    if statement.domain.len() > NAME_MAX_BYTES {
        return Err(DecodeError::TooLarge {
            what: "signature domain",
            limit_bytes: NAME_MAX_BYTES,
            got_bytes: statement.domain.len(),
        });
    }
    if statement.payload.len() > MESSAGE_MAX_BYTES {
        return Err(DecodeError::TooLarge {
            what: "signed payload",
            limit_bytes: MESSAGE_MAX_BYTES,
            got_bytes: statement.payload.len(),
        });
    }
    let public_key: [u8; 32] = statement.public_key.as_ref().try_into().map_err(|_| {
        DecodeError::invalid("public key", format!("{} bytes instead of 32", statement.public_key.len()))
    })?;
    let key = ed25519::PublicKey::try_from_bytes(&public_key)
        .map_err(|error| DecodeError::invalid("public key", error))?;
    if !key.verify(&signed_bytes(&statement.domain, &statement.payload), &statement.signature) {
        return Err(DecodeError::BadSignature { domain: statement.domain.clone() });
    }
    Ok(PeerId::from_ed25519(&public_key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_verify_and_any_change_is_noticed() {
        let identity = Identity::from_seed([7; 32]);
        let statement = identity.signed("test/v1", b"payload");
        assert_eq!(verify(&statement), Ok(identity.peer_id()));
        let mut other_domain = statement.clone();
        other_domain.domain = "test/v2".to_owned();
        let mut other_payload = statement.clone();
        other_payload.payload = b"Payload".to_vec().into();
        let mut other_signer = statement.clone();
        other_signer.public_key = Identity::from_seed([8; 32]).public_key().to_vec().into();
        for changed in [other_domain, other_payload, other_signer] {
            assert!(matches!(verify(&changed), Err(DecodeError::BadSignature { .. })));
        }
        let mut short_key = statement;
        short_key.public_key = vec![1; 31].into();
        assert!(matches!(verify(&short_key), Err(DecodeError::Invalid { .. })));
    }

    #[test]
    fn peer_ids_agree_with_libp2p() {
        let identity = Identity::from_seed([9; 32]);
        let theirs = identity.libp2p_keypair().public().to_peer_id();
        assert_eq!(theirs.to_string(), identity.peer_id().to_string());
    }

    #[test]
    fn the_key_file_keeps_the_key_and_bad_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/key");
        let made = Identity::load_or_create(&path).unwrap();
        assert_eq!(Identity::load_or_create(&path).unwrap().peer_id(), made.peer_id());
        std::fs::write(&path, b"short").unwrap();
        assert!(matches!(
            Identity::load_or_create(&path),
            Err(IdentityError::Malformed { got_bytes: 5, .. })
        ));
    }

    #[cfg(unix)]
    #[test]
    fn a_key_file_that_others_can_read_is_refused() {
        use std::os::unix::fs::PermissionsExt;

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        Identity::load_or_create(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Identity::load_or_create(&path), Err(IdentityError::TooOpen { mode: 0o644, .. })));
    }
}
