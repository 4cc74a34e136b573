//! Fuzzes every decoder of the network layers (package `swarm-fuzz`) with libFuzzer, one after the other.
//!
//! It needs a nightly toolchain, for the address sanitiser and for coverage. What breaks a decoder is kept in
//! `fuzz/crashes/`, where the tests on the stable toolchain find it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::ci::{cargo, output};

/// What libFuzzer needs of the compiler: counters on edges, comparisons that it can learn from, and the sanitiser.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address -Cdebug-assertions -Ccodegen-units=1";
/// One allocation of more than this is a fault: no decoder has to keep more than a few times what it was given.
const ALLOCATION_MAX_MB: u32 = 64;
const INPUT_MAX_BYTES: u32 = 64 * 1024;
/// Inputs that reach something new and are as long as this are kept in the repository.
const KEPT_MAX_BYTES: u64 = 256;
const KEPT_MAX: usize = 32;

/// Fuzzes `only`, or all, for so many seconds each.
pub(crate) fn run(root: &Path, seconds: u32, only: Option<&str>, keep: bool) -> Result<()> {
    let host = host(root)?;
    let target = root.join("target/fuzz");
    let status = Command::new("rustup")
        .args(["run", "nightly", "cargo", "build", "--release", "-p", "swarm-fuzz", "--bin", "decode"])
        .args(["--features", "libfuzzer", "--target", &host, "--target-dir"])
        .arg(&target)
        .env("RUSTFLAGS", FLAGS)
        .env_remove("RUSTC")
        .env_remove("CARGO")
        .env_remove("RUSTUP_TOOLCHAIN")
        .current_dir(root)
        .status()
        .context("starting rustup; fuzzing needs it, and a nightly toolchain")?;
    ensure!(
        status.success(),
        "the fuzzer was not built; `rustup toolchain install nightly` gets its compiler"
    );
    let program = target.join(host).join("release/decode");
    let mut broken = Vec::new();
    for name in names(root, &target.join("corpus"))?.iter().filter(|n| only.is_none_or(|only| *n == only)) {
        let (crashes, kept) = (root.join("fuzz/crashes").join(name), root.join("fuzz/corpus").join(name));
        let corpus = target.join("corpus").join(name);
        println!("== {name}");
        let mut fuzzer = Command::new(&program);
        let found = target.join("found").join(name);
        fs::create_dir_all(&found)?;
        fuzzer
            .env("DECODER", name)
            .arg(&corpus)
            .args(kept.is_dir().then_some(&kept))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-max_len={INPUT_MAX_BYTES}"))
            .arg(format!("-malloc_limit_mb={ALLOCATION_MAX_MB}"))
            .arg(format!("-artifact_prefix={}/", found.display()))
            .args(["-print_final_stats=1", "-timeout=10", "-verbosity=0"]);
        if !fuzzer.status().context("starting the fuzzer")?.success() {
            fs::create_dir_all(&crashes)?;
            for file in fs::read_dir(&found)?.flatten() {
                fs::copy(file.path(), crashes.join(file.file_name()))?;
            }
            broken.push(name.clone());
        }
        if keep {
            keep_smallest(&program, name, &corpus, &kept)?;
        }
    }
    if !broken.is_empty() {
        bail!("{} broke; the bytes are in fuzz/crashes/", broken.join(", "));
    }
    Ok(())
}

/// Writes the seeds of every decoder, each into a folder of its name; the names.
fn names(root: &Path, corpus: &Path) -> Result<Vec<String>> {
    let folder = corpus.to_str().context("the path of the workspace is not UTF-8")?;
    cargo(root, &["run", "--release", "-q", "-p", "swarm-fuzz", "--bin", "seeds", "--", folder], &[])?;
    let folders = fs::read_dir(corpus)?.flatten().map(|file| file.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = folders.filter(|name| !name.contains('.')).collect();
    names.sort();
    Ok(names)
}

/// Copies inputs that together reach what the whole corpus reaches into the repository, the short ones.
fn keep_smallest(program: &Path, name: &str, corpus: &Path, kept: &Path) -> Result<()> {
    let merged = corpus.with_extension("merged");
    let _ = fs::remove_dir_all(&merged);
    fs::create_dir_all(&merged)?;
    let merge = Command::new(program)
        .env("DECODER", name)
        .args([&merged, corpus])
        .args(["-merge=1", "-verbosity=0"])
        .status()
        .context("starting the fuzzer")?;
    ensure!(merge.success(), "the corpus of {name} could not be merged");
    let mut files: Vec<(u64, std::path::PathBuf)> = fs::read_dir(&merged)?
        .flatten()
        .filter_map(|file| Some((file.metadata().ok()?.len(), file.path())))
        .filter(|(n_bytes, _)| *n_bytes <= KEPT_MAX_BYTES)
        .collect();
    files.sort();
    fs::create_dir_all(kept)?;
    for (_, path) in files.iter().take(KEPT_MAX) {
        fs::copy(path, kept.join(path.file_name().expect("a file has a name")))?;
    }
    Ok(())
}

/// The platform that the compiler runs on: build scripts must not be instrumented, so it is named as the target.
fn host(root: &Path) -> Result<String> {
    let said = output(root, "rustc", &["-vV"])?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}
