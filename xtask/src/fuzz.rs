//! Fuzzes every decoder of the network layers (package `swarm-fuzz`) with libFuzzer, one after the other.
//!
//! The address sanitiser and the counters on edges are nightly's; where there is no such toolchain, the workspace's own one is
//! asked to behave like it (`RUSTC_BOOTSTRAP`). What breaks a decoder is kept in `fuzz/crashes/`, where the tests on the
//! stable toolchain find it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::ci::output;

/// What libFuzzer needs of the compiler: counters on edges, comparisons that it can learn from, and the sanitiser.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Zsanitizer=address -Cdebug-assertions -Ccodegen-units=1";
/// The whole fuzzer, its corpus and the sanitiser's own books included.
const MEMORY_MAX_MB: u32 = 1024;
/// Inputs that reach something new and are as short as this are kept in the repository.
const KEPT_MAX_BYTES: u64 = 256;
const KEPT_MAX: usize = 8;

/// One decoder, as `seeds` prints it.
struct Decoder {
    name: String,
    input_max_bytes: u32,
    allocation_max_mb: u32,
}

/// Fuzzes `only`, or all, for so many seconds each.
pub(crate) fn run(root: &Path, seconds: u32, only: Option<&str>, keep: bool) -> Result<()> {
    let host = host(root)?;
    let target = root.join("target/fuzz");
    // The target is named, so that the flags are not those of build scripts.
    let build =
        ["build", "--release", "-p", "swarm-fuzz", "--bins", "--features", "libfuzzer", "--target", &host];
    let status = compiler()
        .args(build)
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", FLAGS)
        .current_dir(root)
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "the fuzzer was not built");
    let programs = target.join(host).join("release");
    let corpora = target.join("corpus");
    let mut broken = Vec::new();
    for decoder in decoders(root, &programs, &corpora)? {
        if only.is_some_and(|only| only != decoder.name) {
            continue;
        }
        let (crashes, kept) =
            (root.join("fuzz/crashes").join(&decoder.name), root.join("fuzz/corpus").join(&decoder.name));
        let (corpus, found) = (corpora.join(&decoder.name), target.join("found").join(&decoder.name));
        println!("== {}", decoder.name);
        fs::create_dir_all(&found)?;
        let status = Command::new(programs.join("decode"))
            .env("DECODER", &decoder.name)
            .arg(&corpus)
            .args(kept.is_dir().then_some(&kept))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-max_len={}", decoder.input_max_bytes))
            .arg(format!("-malloc_limit_mb={}", decoder.allocation_max_mb))
            .arg(format!("-rss_limit_mb={MEMORY_MAX_MB}"))
            .arg(format!("-artifact_prefix={}/", found.display()))
            .args(["-print_final_stats=1", "-timeout=10", "-verbosity=0"])
            .status()
            .context("starting the fuzzer")?;
        if !status.success() {
            fs::create_dir_all(&crashes)?;
            for file in fs::read_dir(&found)?.flatten() {
                fs::copy(file.path(), crashes.join(file.file_name()))?;
            }
            broken.push(decoder.name.clone());
        }
        if keep {
            keep_smallest(&programs.join("decode"), &decoder.name, &corpus, &kept)?;
        }
    }
    if !broken.is_empty() {
        bail!("{} broke; the bytes are in fuzz/crashes/", broken.join(", "));
    }
    Ok(())
}

/// `cargo` of a toolchain that takes the flags.
fn compiler() -> Command {
    let nightly = Command::new("rustup").args(["run", "nightly", "rustc", "-V"]).output();
    if nightly.is_ok_and(|output| output.status.success()) {
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo"]);
        command.env_remove("RUSTC").env_remove("CARGO").env_remove("RUSTUP_TOOLCHAIN");
        return command;
    }
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.env("RUSTC_BOOTSTRAP", "1");
    command
}

/// Writes the seeds of every decoder, each into a folder of its name.
fn decoders(root: &Path, programs: &Path, corpora: &Path) -> Result<Vec<Decoder>> {
    let (program, folder) = (programs.join("seeds"), corpora.to_str());
    let program = program.to_str().context("the path of the workspace is not UTF-8")?;
    let said = output(root, program, &[folder.context("the path of the workspace is not UTF-8")?])?;
    let decoder = |line: &str| {
        let mut words = line.split(' ');
        let number = |word: Option<&str>| word.and_then(|w| w.parse().ok()).context("a line of seeds");
        let name = words.next().context("a line of seeds")?.to_owned();
        Ok(Decoder { name, input_max_bytes: number(words.next())?, allocation_max_mb: number(words.next())? })
    };
    said.lines().map(decoder).collect()
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

/// The platform that the compiler runs on.
fn host(root: &Path) -> Result<String> {
    let said = output(root, "rustc", &["-vV"])?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).context("rustc -vV names no host")
}
