//! Instructions of the engine's hot loops, counted by callgrind: a machine that others share hides a slower kernel in its
//! noise, and does not hide the instructions that it takes.
//!
//! `benches/instructions.json` holds what the committed code takes; more than [`SLACK`] above it is a failure. Callgrind shows
//! programs a processor with AVX2 at most, so counts of x86-64 machines compare; another compiler gives other counts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ci::output;

/// Share of the committed count that may come on top: addresses and hashes differ from run to run.
const SLACK: f64 = 0.02;

/// The committed counts.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Baseline {
    rustc: String,
    instructions: BTreeMap<String, u64>,
}

/// Counts every work and compares with the committed counts, or replaces them.
pub(crate) fn run(root: &Path, write: bool) -> Result<()> {
    let path = root.join("benches/instructions.json");
    let program = build(root)?;
    let rustc = output(root, "rustc", &["--version"])?.split(' ').nth(1).unwrap_or_default().to_owned();
    let mut now = Baseline { rustc, ..Baseline::default() };
    let works = output(root, &program.to_string_lossy(), &["--list"])?;
    for work in works.lines() {
        eprintln!("counting {work}");
        now.instructions.insert(work.to_owned(), count(&program, work)?);
    }
    if write {
        let text = serde_json::to_string_pretty(&now)? + "\n";
        return fs::write(&path, text).with_context(|| format!("writing {}", path.display()));
    }
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let committed: Baseline =
        serde_json::from_str(&text).with_context(|| format!("reading {}", path.display()))?;
    let (table, slower) = compare(&committed, &now);
    print!("{table}");
    if committed.rustc != now.rustc {
        println!(
            "counted with rustc {}, committed with {}: no verdict; --write replaces them",
            now.rustc, committed.rustc
        );
        return Ok(());
    }
    ensure!(
        slower.is_empty(),
        "more instructions than committed: {}; if that is meant, `cargo xtask instructions --write`",
        slower.join(", ")
    );
    Ok(())
}

/// The bench program, built.
fn build(root: &Path) -> Result<PathBuf> {
    let arguments = ["bench", "--package", "swarm-benches", "--bench", "steady", "--no-run"];
    let messages = output(root, "cargo", &[&arguments[..], &["--message-format", "json"]].concat())?;
    let executable = |line: &str| {
        let message: Value = serde_json::from_str(line).ok()?;
        let is_it = message["target"]["name"] == "steady";
        message["executable"].as_str().filter(|_| is_it).map(PathBuf::from)
    };
    messages.lines().find_map(executable).context("cargo did not say where the bench lies")
}

/// Instructions of one work.
fn count(program: &Path, work: &str) -> Result<u64> {
    let run = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null", "--toggle-collect=steady::measured"])
        .arg(program)
        .arg(work)
        .output()
        .context("starting valgrind (Debian: apt-get install valgrind)")?;
    let said = String::from_utf8_lossy(&run.stderr);
    ensure!(run.status.success(), "{work} ended with {} under callgrind: {said}", run.status);
    match collected(&said) {
        None | Some(0) => bail!("callgrind counted nothing for {work}: {said}"),
        Some(count) => Ok(count),
    }
}

/// The number in callgrind's line `Collected : 123`.
fn collected(said: &str) -> Option<u64> {
    let line = said.lines().find(|line| line.contains("Collected :"))?;
    line.rsplit(':').next()?.trim().parse().ok()
}

/// A table, and the works that take more than they may.
fn compare(committed: &Baseline, now: &Baseline) -> (String, Vec<String>) {
    let (mut table, mut slower) = (String::new(), Vec::new());
    for (work, count) in &now.instructions {
        let before = committed.instructions.get(work);
        let change = before.map(|&before| *count as f64 / before as f64 - 1.0);
        let told = change.map_or_else(|| "new".to_owned(), |change| format!("{:+.2} %", change * 100.0));
        table += &format!("{work:12} {count:>14} instructions, {told}\n");
        if change.is_some_and(|change| change > SLACK) {
            slower.push(work.clone());
        }
    }
    (table, slower)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_found_in_what_callgrind_says() {
        assert_eq!(collected("==7== Events    : Ir\n==7== Collected : 1234567\n==7== \n"), Some(1_234_567));
        assert_eq!(collected("==7== error"), None);
    }

    #[test]
    fn only_what_takes_notably_more_is_a_failure() {
        let counts = |of: &[(&str, u64)]| Baseline {
            rustc: "1".to_owned(),
            instructions: of.iter().map(|&(work, n)| (work.to_owned(), n)).collect(),
        };
        let committed = counts(&[("a", 1000), ("b", 1000), ("c", 1000)]);
        let (table, slower) = compare(&committed, &counts(&[("a", 1019), ("b", 1021), ("c", 500), ("d", 9)]));
        assert_eq!(slower, ["b"]);
        assert!(table.contains("-50.00 %") && table.contains("new"), "{table}");
    }
}
