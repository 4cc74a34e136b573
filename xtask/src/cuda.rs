//! Builds `parallax` for NVIDIA GPUs where LLVM cannot be downloaded. cubecl-cuda depends on cubecl-llvm, whose build script
//! fetches an archive of LLVM; a crate of the same name takes its place, and kernels go to the GPU as CUDA C, by way of NVRTC,
//! instead of PTX. Neither CUDA nor a GPU is needed to build; the driver and NVRTC are, to run.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::ci::{cargo, target_dir};

/// The lock file as it was, put back when the build is over: the stand-in is in nobody's lock. A copy on disk outlives a build
/// that was broken off; the next one puts that back first, if the lock file still names the stand-in.
struct Lock {
    path: PathBuf,
    copy: PathBuf,
}

impl Lock {
    fn keep(root: &Path, folder: &Path) -> Result<Self> {
        let (path, copy) = (root.join("Cargo.lock"), folder.join("Cargo.lock.before"));
        let found = fs::read_to_string(&path).context("reading Cargo.lock")?;
        if copy.exists() && names_stand_in(&found) {
            put_back(&copy, &path)?;
        }
        // Whole or not at all.
        let part = folder.join("Cargo.lock.part");
        fs::copy(&path, &part).context("copying Cargo.lock")?;
        fs::rename(&part, &copy).context("naming the copy of Cargo.lock")?;
        // Only now: dropped before, it would put back what an earlier build had left.
        Ok(Self { path, copy })
    }
}

fn put_back(copy: &Path, path: &Path) -> Result<()> {
    fs::copy(copy, path).context("putting Cargo.lock back")?;
    fs::remove_file(copy).with_context(|| format!("removing {}", copy.display()))
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(e) = put_back(&self.copy, &self.path) {
            eprintln!("Cargo.lock names the stand-in for cubecl-llvm and could not be put back: {e:#}");
        }
    }
}

/// Whether cubecl-llvm comes from no registry.
fn names_stand_in(lock: &str) -> bool {
    let package = lock.split("[[package]]").find(|package| package.contains("name = \"cubecl-llvm\""));
    package.is_some_and(|package| !package.contains("source = "))
}

/// Builds the binary; with `check` only checks that it would build.
pub(crate) fn run(root: &Path, check: bool) -> Result<()> {
    let target = target_dir(root)?;
    let folder = target.join("cubecl-llvm");
    write(&folder.join("Cargo.toml"), include_str!("cuda/stand_in.toml"))?;
    write(&folder.join("src/lib.rs"), include_str!("cuda/stand_in.rs"))?;
    let patch = format!("patch.crates-io.cubecl-llvm.path={:?}", folder.to_string_lossy());
    let features = "cuda,parallax-kernels/cuda-cpp";
    let verb = if check { "check" } else { "build" };
    let args = [verb, "--release", "--package", "swarm-examples", "--bin", "parallax"];
    let args = [&args[..], &["--features", features, "--config", &patch]].concat();
    let start = Instant::now();
    let lock = Lock::keep(root, &folder)?;
    cargo(root, &args, &[])?;
    drop(lock);
    let seconds = start.elapsed().as_secs_f64();
    if check {
        println!("it would build; checked in {seconds:.0} s");
    } else {
        println!("{} in {seconds:.0} s", target.join("release/parallax").display());
    }
    Ok(())
}

/// Writes a file where it is not yet so: cargo builds again what is newer.
fn write(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::create_dir_all(path.parent().context("a path with a folder")?)?;
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_cannot_be_copied_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (path, copy) = (folder.path().join("Cargo.lock"), folder.path().join("Cargo.lock.before"));
        fs::write(&path, "newer").unwrap();
        fs::write(&copy, "as it was").unwrap();
        // In the place of what is copied to.
        fs::create_dir(folder.path().join("Cargo.lock.part")).unwrap();
        assert!(Lock::keep(folder.path(), folder.path()).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "newer");
    }

    #[test]
    fn only_a_lock_with_the_stand_in_is_replaced_by_the_copy() {
        let folder = tempfile::tempdir().unwrap();
        let (path, copy) = (folder.path().join("Cargo.lock"), folder.path().join("Cargo.lock.before"));
        let ours = "[[package]]\nname = \"a\"\nsource = \"r\"\n\n[[package]]\nname = \"cubecl-llvm\"\nversion = \"1\"\n";
        let newer = format!("{ours}source = \"r\"\n");
        for (found, kept) in [(ours, "as it was"), (&newer, &newer)] {
            fs::write(&path, found).unwrap();
            fs::write(&copy, "as it was").unwrap();
            drop(Lock::keep(folder.path(), folder.path()).unwrap());
            assert_eq!(fs::read_to_string(&path).unwrap(), kept);
            assert!(!copy.exists());
        }
    }
}
