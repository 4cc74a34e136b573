//! Swarm keys in files that only their owner can read: one line of 64 hexadecimal digits.

use std::path::Path;

use rand::RngExt as _;

use super::private_file::{self, Opened};
use crate::access::SwarmKey;
use crate::error::SwarmKeyFileError;

/// Reads the swarm key in the file at `path`.
///
/// # Errors
/// When the file is not a key, can be read by others, or cannot be read.
pub fn load_swarm_key(path: &Path) -> Result<SwarmKey, SwarmKeyFileError> {
    let io = |source| SwarmKeyFileError::Io { path: path.display().to_string(), source };
    let file = match private_file::open(path).map_err(io)? {
        Opened::Private(file) => file,
        Opened::TooOpen(mode) => {
            return Err(SwarmKeyFileError::TooOpen { path: path.display().to_string(), mode });
        }
    };
    let mut text = String::new();
    // A key file that is longer than this is something else, whatever else it is.
    std::io::Read::read_to_string(&mut std::io::Read::take(file, 1024), &mut text).map_err(io)?;
    text.parse().map_err(|source| SwarmKeyFileError::Malformed { path: path.display().to_string(), source })
}

/// Makes a random key (from the thread's ChaCha generator, which the operating system seeds) and writes it to a new file with mode 0600.
///
/// # Errors
/// When the file exists already (a key is never overwritten) or cannot be written.
pub fn create_swarm_key(path: &Path) -> Result<SwarmKey, SwarmKeyFileError> {
    let io = |source| SwarmKeyFileError::Io { path: path.display().to_string(), source };
    let key = SwarmKey::from_bytes(rand::rng().random());
    private_file::create(path, format!("{}\n", key.to_text()).as_bytes()).map_err(io)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swarm.key");
        assert!(matches!(load_swarm_key(&path), Err(SwarmKeyFileError::Io { .. })));
        let key = create_swarm_key(&path).unwrap();
        assert_eq!(load_swarm_key(&path).unwrap(), key);
        assert!(matches!(create_swarm_key(&path), Err(SwarmKeyFileError::Io { .. })), "never overwritten");
        assert_ne!(create_swarm_key(&dir.path().join("other")).unwrap(), key);
    }

    #[cfg(unix)]
    #[test]
    fn open_files_and_other_texts_are_refused_with_the_remedy() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swarm.key");
        create_swarm_key(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        let error = load_swarm_key(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
        std::fs::write(&path, "password\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let error = load_swarm_key(&path).unwrap_err();
        assert!(error.to_string().contains("64 hexadecimal digits"), "{error}");
    }
}
