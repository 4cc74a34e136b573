//! Who a node is: an Ed25519 key, kept in a file that only its owner can read, and statements signed with it.

use std::fmt;
use std::io::{ErrorKind, Read};
use std::path::Path;

use libp2p::identity::{Keypair, ed25519};
use swarm_wire::PeerId;
use swarm_wire::signed::Signer;

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

    fn secret_seed(&self) -> [u8; 32] {
        self.keypair.secret().as_ref().try_into().expect("an Ed25519 secret is 32 bytes")
    }

    pub(crate) fn libp2p_keypair(&self) -> Keypair {
        Keypair::from(self.keypair.clone())
    }
}

impl Signer for Identity {
    fn public_key(&self) -> [u8; 32] {
        self.keypair.public().to_bytes()
    }

    fn signature(&self, bytes: &[u8]) -> [u8; 64] {
        self.keypair.sign(bytes).try_into().expect("an Ed25519 signature is 64 bytes")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_verify() {
        let identity = Identity::from_seed([7; 32]);
        let statement = identity.signed("test/v1", b"payload");
        assert_eq!(swarm_wire::signed::verify(&statement, "test/v1"), Ok(identity.peer_id()));
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
