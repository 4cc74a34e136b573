//! The versions of an asynchronous run on disk: the newest, and as many before it as somebody may still ask for. After a
//! restart they are served again, so that trajectories of an older version can still be audited and trained on.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use echo_rollout::Weights;
use echo_rollout::service::Collector;
use swarm_wire::PolicyVersion;

use super::super::checkpoint_dir::{self, CheckpointDirError, io_error};
use super::super::publisher::Publisher;
use super::LearnerError;

/// Makes weights of their bytes.
type Kind = fn(Bytes) -> Weights;

/// What has files of its own.
const KINDS: [Kind; 2] = [Weights::Lora, Weights::Full];

/// Those in `dir`, oldest first.
fn versions(dir: &Path) -> Result<Vec<(PolicyVersion, PathBuf, Kind)>, CheckpointDirError> {
    let mut versions = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_error("listing", dir))?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        for weights in KINDS {
            let kind = weights(Bytes::new()).kind();
            let rest = name.strip_prefix(kind).and_then(|rest| rest.strip_prefix('-'));
            let number = rest.and_then(|rest| rest.strip_suffix(".safetensors")?.parse().ok());
            versions.extend(number.map(|number| (PolicyVersion(number), entry.path(), weights)));
        }
    }
    versions.sort_by_key(|(version, ..)| *version);
    Ok(versions)
}

/// Writes the weights of `version`, and removes those that are more than `kept` versions older.
///
/// # Errors
/// When the disk refuses.
pub(super) fn keep(
    dir: &Path,
    version: PolicyVersion,
    weights: &Weights,
    kept: u64,
) -> Result<(), CheckpointDirError> {
    let name = format!("{}-{}.safetensors", weights.kind(), version.0);
    checkpoint_dir::write(&dir.join(name), weights.bytes())?;
    for (_, path, _) in versions(dir)?.into_iter().filter(|(old, ..)| old.0.saturating_add(kept) < version.0)
    {
        fs::remove_file(&path).map_err(io_error("removing", &path))?;
    }
    Ok(())
}

/// The versions in `dir` that are not newer than `newest`, oldest first.
///
/// # Errors
/// When the disk refuses.
pub(super) fn read(
    dir: &Path,
    newest: PolicyVersion,
) -> Result<Vec<(PolicyVersion, Weights)>, CheckpointDirError> {
    let read = |(version, path, weights): (PolicyVersion, PathBuf, Kind)| {
        let bytes = fs::read(&path).map_err(io_error("reading", &path))?;
        Ok((version, weights(bytes.into())))
    };
    versions(dir)?.into_iter().filter(|(version, ..)| *version <= newest).map(read).collect()
}

/// Serves the versions in `dir` again that were out before a restart; the newest of them, if it is there.
///
/// # Errors
/// When the disk refuses, or a version there cannot be published.
pub(super) async fn again(
    collector: &Collector,
    publisher: &Publisher,
    dir: &Path,
) -> Result<Option<PolicyVersion>, LearnerError> {
    let (newest, asked_open) = collector.reached();
    // Groups are opened after the first version is out.
    let mut published = (asked_open > 0).then_some(PolicyVersion(0));
    if published.is_some() {
        collector.restore(&publisher.weights(PolicyVersion(0), &Weights::Base, &[]).await?);
    }
    for (version, weights) in read(dir, newest)? {
        collector.restore(&publisher.weights(version, &weights, &[]).await?);
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
            let weights = if version % 2 == 0 { Weights::Lora } else { Weights::Full };
            keep(dir.path(), PolicyVersion(version), &weights(vec![version as u8].into()), 3).unwrap();
        }
        let numbers = |newest| -> Vec<u64> {
            let found = read(dir.path(), PolicyVersion(newest)).unwrap();
            found
                .into_iter()
                .map(|(version, weights)| {
                    assert_eq!(matches!(weights, Weights::Full(_)), version.0 % 2 == 1);
                    (u64::from(weights.bytes()[0]) == version.0).then_some(version.0).unwrap()
                })
                .collect()
        };
        assert_eq!(numbers(99), [10, 11, 12, 13]);
        assert_eq!(numbers(11), [10, 11]);
    }
}
