//! Checkpoints in a directory: payloads under names of their own, and one manifest that is replaced last.
//!
//! A crash at any moment leaves the old manifest with the old payload or the new one with the new one.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::checkpoint::{CheckpointError, CheckpointManifest, TrainerCheckpoint};

/// The file that names the current payload.
pub const MANIFEST: &str = "checkpoint.json";

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointDirError {
    /// The operating system refused.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// With which file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// What was read cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

pub(crate) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointDirError {
    let path = path.to_owned();
    move |source| CheckpointDirError::Io { what, path, source }
}

fn payload_name(manifest: &CheckpointManifest) -> String {
    format!("checkpoint-{}.safetensors", manifest.version.0)
}

/// Writes `checkpoint` into `dir`: payload, then manifest, each as a temporary file that is synced and renamed; then
/// older payloads go.
///
/// # Errors
/// When the disk refuses; the previous checkpoint is still whole then.
pub fn save(dir: &Path, checkpoint: &TrainerCheckpoint) -> Result<(), CheckpointDirError> {
    create(dir)?;
    let name = payload_name(&checkpoint.manifest);
    write(&dir.join(&name), &checkpoint.payload)?;
    write(&dir.join(MANIFEST), &checkpoint.manifest_json()?)?;
    let entries = fs::read_dir(dir).map_err(io_error("listing", dir))?;
    for entry in entries.flatten() {
        let other = entry.file_name().to_string_lossy().into_owned();
        let is_payload = other.starts_with("checkpoint-") && other.ends_with(".safetensors");
        if is_payload && other != name {
            fs::remove_file(entry.path()).map_err(io_error("removing", &entry.path()))?;
        }
    }
    Ok(())
}

/// The checkpoint in `dir`, or `None` when there is none.
///
/// # Errors
/// When it cannot be read or does not match its manifest.
pub fn load(dir: &Path) -> Result<Option<TrainerCheckpoint>, CheckpointDirError> {
    let path = dir.join(MANIFEST);
    let manifest = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error("reading", &path)(e)),
    };
    let manifest: CheckpointManifest = serde_json::from_slice(&manifest).map_err(CheckpointError::from)?;
    let path = dir.join(payload_name(&manifest));
    let payload = fs::read(&path).map_err(io_error("reading", &path))?;
    Ok(Some(TrainerCheckpoint::decode(manifest, payload)?))
}

/// Makes the directory if it is not there, and finds out whether it can be written.
///
/// # Errors
/// When the disk refuses.
pub fn create(dir: &Path) -> Result<(), CheckpointDirError> {
    fs::create_dir_all(dir).map_err(io_error("creating", dir))?;
    let probe = dir.join(".writable");
    fs::write(&probe, []).and_then(|()| fs::remove_file(&probe)).map_err(io_error("writing into", dir))
}

/// Writes `bytes` to `path`: the old file or the new one is there, at every moment whole.
///
/// # Errors
/// When the disk refuses.
pub fn write(path: &Path, bytes: &[u8]) -> Result<(), CheckpointDirError> {
    let temporary = path.with_extension("tmp");
    let mut file = File::create(&temporary).map_err(io_error("creating", &temporary))?;
    file.write_all(bytes).map_err(io_error("writing", &temporary))?;
    file.sync_all().map_err(io_error("syncing", &temporary))?;
    fs::rename(&temporary, path).map_err(io_error("renaming", path))?;
    let dir = path.parent().unwrap_or_else(|| Path::new("."));
    // The rename itself is durable once the directory is.
    File::open(dir).and_then(|d| d.sync_all()).map_err(io_error("syncing", dir))
}

#[cfg(test)]
mod tests {
    use swarm_wire::RunId;

    use super::*;
    use crate::step::tests::Bigram;
    use crate::trainer::Trainer;
    use crate::trainer::tests::{config, round};

    #[test]
    fn the_newest_whole_checkpoint_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path()).unwrap().is_none());
        let mut trainer = Trainer::new(Bigram::new(4), config()).unwrap();
        for _ in 0..3 {
            round(&mut trainer);
            let checkpoint = trainer.checkpoint(RunId(1), "base").unwrap();
            save(dir.path(), &checkpoint).unwrap();
            assert_eq!(load(dir.path()).unwrap(), Some(checkpoint));
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        // A crash while the next one was being written leaves temporary files and an unnamed payload behind.
        fs::write(dir.path().join("checkpoint-4.safetensors"), b"half").unwrap();
        fs::write(dir.path().join("checkpoint.tmp"), b"half").unwrap();
        assert_eq!(load(dir.path()).unwrap().unwrap().manifest.version.0, 3);
        fs::write(dir.path().join("checkpoint-3.safetensors"), b"half").unwrap();
        assert!(load(dir.path()).is_err());
    }
}
