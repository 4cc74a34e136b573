//! Builds `parallax` for NVIDIA GPUs where LLVM cannot be downloaded. cubecl-cuda depends on cubecl-llvm, whose build script
//! fetches an archive of LLVM; a crate of the same name takes its place, and kernels go to the GPU as CUDA C, by way of NVRTC,
//! instead of PTX. Neither CUDA nor a GPU is needed to build; the driver and NVRTC are, to run.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};

use crate::ci::{cargo, target_dir};

/// The lock file as it was, put back when the build is over: the stand-in is in nobody's lock.
struct Lock {
    path: PathBuf,
    text: String,
}

impl Lock {
    fn keep(root: &Path) -> Result<Self> {
        let path = root.join("Cargo.lock");
        let text = fs::read_to_string(&path).context("reading Cargo.lock")?;
        Ok(Self { path, text })
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(e) = fs::write(&self.path, &self.text) {
            eprintln!("Cargo.lock names the stand-in for cubecl-llvm and could not be put back: {e}");
        }
    }
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
    let lock = Lock::keep(root)?;
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
