//! The house rules that no compiler knows (docs/STYLE.md). Every complaint names file, line and remedy.

use std::fs;
use std::path::Path;

use anyhow::{Result, bail};

use crate::ci::output;

/// Files may have this many lines before tidy asks whether they are two things; tests at the end do not count.
const MAX_LINES: usize = 600;
/// The same for files of tests, which are lists.
const MAX_TEST_LINES: usize = 700;
/// Tracked files may have this many bytes, the embedded model and golden numbers excepted.
const MAX_BYTES: u64 = 1_500_000;

/// Words that must not stay in the tree.
const UNFINISHED: &[&str] =
    &["TO\u{44}O", "FIX\u{4d}E", "todo\u{21}(", "unimplemented\u{21}(", "#[ign\u{6f}re"];
/// Module names that say nothing.
const EMPTY_NAMES: &[&str] = &["utils", "util", "common", "helpers", "base", "manager", "misc", "mod"];

/// Whose public async functions say whether they are cancel safe.
const CANCEL_SAFETY: &[&str] = &["crates/lattica-net/src/", "crates/lattica-bitswap/src/"];

/// Checks every tracked file; fails with all complaints at once.
pub(crate) fn run(root: &Path) -> Result<()> {
    let listed = output(root, "git", &["ls-files", "--cached", "--others", "--exclude-standard"])?;
    let mut faults = Vec::new();
    for name in listed.lines() {
        let path = root.join(name);
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.len() > MAX_BYTES && !name.starts_with("assets/") && !name.starts_with("tests/golden/") {
            faults.push(format!("{name}: {} bytes, more than {MAX_BYTES}", metadata.len()));
        }
        let Ok(text) = fs::read_to_string(&path) else { continue };
        if name.ends_with(".rs") && !name.contains("/generated") {
            rust(name, &text, &mut faults);
        }
        if [".rs", ".md", ".toml", ".proto", ".html"].iter().any(|e| name.ends_with(e)) {
            lines(name, &text, &mut faults);
        }
    }
    if !faults.is_empty() {
        bail!("{} complaints:\n{}", faults.len(), faults.join("\n"));
    }
    Ok(())
}

fn rust(name: &str, text: &str, faults: &mut Vec<String>) {
    if !text.starts_with("//!") {
        faults.push(format!("{name}:1: open with `//!`: what is this file for?"));
    }
    let stem = Path::new(name).file_stem().and_then(|s| s.to_str()).unwrap_or_default();
    if EMPTY_NAMES.contains(&stem) {
        faults.push(format!("{name}: '{stem}' says nothing; name the file by what it holds"));
    }
    let code_lines = code_lines(text);
    let max = if name.contains("tests/") { MAX_TEST_LINES } else { MAX_LINES };
    if code_lines > max {
        faults.push(format!("{name}: {code_lines} lines, more than {max}: is it two things?"));
    }
    // This file names the words that it looks for.
    let may_be_unsafe = name.starts_with("crates/parallax-kernels/") || name == "xtask/src/tidy.rs";
    let is_core = name.starts_with("crates/") && name.contains("/src/") && !name.contains("/service");
    let says_cancel_safety = CANCEL_SAFETY.iter().any(|folder| name.starts_with(folder));
    for (i, line) in text.lines().enumerate().take(code_lines) {
        let code = line.split("//").next().unwrap_or_default();
        let mut fault = |what: &str| faults.push(format!("{name}:{}: {what}", i + 1));
        if !may_be_unsafe && ["{", "fn", "impl"].iter().any(|k| code.contains(&format!("unsafe {k}"))) {
            fault("unsafe belongs into parallax-kernels");
        }
        if is_core
            && !name.contains("/http")
            && (code.contains("Instant::now") || code.contains("SystemTime::now"))
        {
            fault("cores get time as an argument; only service/ reads a clock");
        }
        if says_cancel_safety && code.trim_start().starts_with("pub async fn ") && !is_cancel_noted(text, i) {
            fault("say whether dropping the future is safe: \"Cancel safe: ..\" or \"Not cancel safe: ..\"");
        }
        if is_core && (code.contains("rand::rng(") || code.contains("from_os_rng") || code.contains("OsRng"))
        {
            fault("cores get seeds as arguments");
        }
    }
}

/// Whether the documentation above a line says "cancel safe", or that it is not.
fn is_cancel_noted(text: &str, line: usize) -> bool {
    let above: Vec<&str> = text.lines().take(line).map(str::trim_start).collect();
    let mut attached =
        above.iter().rev().take_while(|line| line.starts_with("///") || line.starts_with("#["));
    attached.any(|line| line.to_lowercase().contains("cancel safe"))
}

/// Lines before the tests at the end. `mod tests;` at the top names another file and ends nothing.
fn code_lines(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    let tests = |i: &usize| {
        let item = lines[i + 1..].iter().find(|l| !l.starts_with("#["));
        lines[*i] == "#[cfg(test)]" && item.is_some_and(|l| l.ends_with('{'))
    };
    (0..lines.len()).find(tests).unwrap_or(lines.len())
}

fn lines(name: &str, text: &str, faults: &mut Vec<String>) {
    for (i, line) in text.lines().enumerate() {
        if let Some(word) = UNFINISHED.iter().find(|w| line.contains(**w)) {
            faults.push(format!("{name}:{}: unfinished work ({word})", i + 1));
        }
        if line.trim_end() != line {
            faults.push(format!("{name}:{}: trailing space", i + 1));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        faults.push(format!("{name}: no newline at the end"));
    }
}

#[cfg(test)]
mod tests {
    use super::{code_lines, is_cancel_noted};

    #[test]
    fn cancel_safety_is_looked_for_in_the_documentation_of_the_function_itself() {
        let text = "/// Cancel safe.\npub async fn a() {}\n\n/// B.\n#[must_use]\npub async fn b() {}\n\n/// Not cancel safe: c.\n#[x]\n";
        assert_eq!([1, 5, 9].map(|line| is_cancel_noted(text, line)), [true, false, true]);
    }

    #[test]
    fn only_tests_with_a_body_end_the_code() {
        assert_eq!(
            code_lines("a\n#[cfg(test)]\nmod tests;\nb\n#[cfg(test)]\n#[path = \"x\"]\nmod tests {\n}\n"),
            4
        );
        assert_eq!(code_lines("a\n#[cfg(test)]\nmod tests;\nb\n"), 4);
    }
}
