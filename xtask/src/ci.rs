//! The gate: cheap checks first, so that a slip is told in seconds and not after the tests.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{codegen, layers, tidy};

/// Runs every check that a change must pass.
pub(crate) fn run(root: &Path) -> Result<()> {
    step("format", || cargo(root, &["fmt", "--all", "--check"], &[]))?;
    step("tidy", || tidy::run(root))?;
    step("generated code", || codegen::run(root, true))?;
    step("layers, declared", || layers::run(root, true))?;
    step("tests", || test(root))?;
    step("clippy", || {
        cargo(root, &["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])
    })?;
    step("cores without their services", || layers::run(root, false))?;
    step("documentation", || {
        cargo(root, &["doc", "--release", "--workspace", "--no-deps"], &[("RUSTDOCFLAGS", "-D warnings")])
    })
}

/// The README's test command.
pub(crate) fn test(root: &Path) -> Result<()> {
    cargo(root, &["test", "--release", "--workspace"], &[])
}

fn step(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    let start = Instant::now();
    println!("== {name}");
    work().with_context(|| format!("the step '{name}' did not pass"))?;
    println!("== {name}: passed in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// Runs cargo in the workspace and fails when it fails.
pub(crate) fn cargo(root: &Path, args: &[&str], env: &[(&str, &str)]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .args(args)
        .envs(env.iter().copied())
        .current_dir(root)
        .status()
        .context("starting cargo")?;
    ensure!(status.success(), "cargo {} failed", args.join(" "));
    Ok(())
}

/// The workspace as `cargo metadata` tells it.
pub(crate) fn metadata(root: &Path) -> Result<Value> {
    let metadata = output(root, "cargo", &["metadata", "--format-version", "1", "--no-deps"])?;
    serde_json::from_str(&metadata).context("reading cargo metadata")
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir(root: &Path) -> Result<PathBuf> {
    let metadata = metadata(root)?;
    let target = metadata["target_directory"].as_str();
    Ok(target.context("cargo metadata without a target directory")?.into())
}

/// Builds a binary of one of our packages for release; where it lies.
pub(crate) fn release_binary(root: &Path, package: &str, binary: &str) -> Result<PathBuf> {
    cargo(root, &["build", "--release", "--package", package, "--bin", binary], &[])?;
    Ok(target_dir(root)?.join("release").join(format!("{binary}{}", std::env::consts::EXE_SUFFIX)))
}

/// The commit that reports name.
pub(crate) fn commit(root: &Path) -> String {
    let hash = output(root, "git", &["rev-parse", "--short", "HEAD"]);
    hash.map_or_else(|_| "unknown".to_owned(), |hash| hash.trim().to_owned())
}

/// What a command prints; an error when it fails.
pub(crate) fn output(root: &Path, program: &str, args: &[&str]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .current_dir(root)
        .output()
        .with_context(|| format!("starting {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {} failed: {said}", args.join(" "));
    String::from_utf8(output.stdout).with_context(|| format!("what {program} prints, in UTF-8"))
}
