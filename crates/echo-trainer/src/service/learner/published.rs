//! The adapters of an asynchronous run on disk: the newest, and as many before it as somebody may still ask for. After a
//! restart they are served again, so that trajectories of an older version can still be audited and trained on.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use echo_rollout::service::Collector;
use swarm_wire::PolicyVersion;

use super::super::checkpoint_dir::{self, CheckpointDirError, io_error};
use super::super::publisher::Publisher;
use super::LearnerError;

fn path(dir: &Path, version: PolicyVersion) -> PathBuf {
    dir.join(format!("adapter-{}.safetensors", version.0))
}

/// Those in `dir`, oldest first.
fn versions(dir: &Path) -> Result<Vec<PolicyVersion>, CheckpointDirError> {
    let mut versions = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error("listing", dir))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let number = name.strip_prefix("adapter-").and_then(|rest| rest.strip_suffix(".safetensors"));
        versions.extend(number.and_then(|number| number.parse().ok()).map(PolicyVersion));
    }
    versions.sort_unstable();
    Ok(versions)
}

/// Writes the adapter of `version`, and removes those that are more than `kept` versions older.
///
/// # Errors
/// When the disk refuses.
pub(super) fn keep(
    dir: &Path,
    version: PolicyVersion,
    adapter: &[u8],
    kept: u64,
) -> Result<(), CheckpointDirError> {
    checkpoint_dir::write(&path(dir, version), adapter)?;
    for old in versions(dir)?.into_iter().filter(|old| old.0.saturating_add(kept) < version.0) {
        let path = path(dir, old);
        fs::remove_file(&path).map_err(io_error("removing", &path))?;
    }
    Ok(())
}

/// The adapters in `dir` that are not newer than `newest`, oldest first.
///
/// # Errors
/// When the disk refuses.
pub(super) fn read(
    dir: &Path,
    newest: PolicyVersion,
) -> Result<Vec<(PolicyVersion, Bytes)>, CheckpointDirError> {
    let read = |version| {
        let path = path(dir, version);
        Ok((version, fs::read(&path).map_err(io_error("reading", &path))?.into()))
    };
    versions(dir)?.into_iter().filter(|version| *version <= newest).map(read).collect()
}

/// Serves the versions in `dir` again that were out before a restart; the newest of them, if it is there.
///
/// # Errors
/// When the disk refuses, or an adapter there cannot be published.
pub(super) async fn again(
    collector: &Collector,
    publisher: &Publisher,
    dir: &Path,
) -> Result<Option<PolicyVersion>, LearnerError> {
    let (newest, asked_open) = collector.reached();
    // Groups are opened after the first version is out.
    let mut published = (asked_open > 0).then_some(PolicyVersion(0));
    if published.is_some() {
        collector.restore(&publisher.base());
    }
    for (version, adapter) in read(dir, newest)? {
        collector.restore(&publisher.adapter(version, adapter, &[]).await?);
        published = Some(version);
    }
    Ok(published.filter(|version| *version == newest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_and_those_before_it_are_kept_and_read_in_order() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("adapter-.safetensors"), "not one of ours").unwrap();
        for version in 8..=13 {
            keep(dir.path(), PolicyVersion(version), &[version as u8], 3).unwrap();
        }
        let numbers = |newest| -> Vec<u64> {
            let found = read(dir.path(), PolicyVersion(newest)).unwrap();
            found
                .into_iter()
                .map(|(version, bytes)| (bytes[0] as u64 == version.0).then_some(version.0).unwrap())
                .collect()
        };
        assert_eq!(numbers(99), [10, 11, 12, 13]);
        assert_eq!(numbers(11), [10, 11]);
    }
}
