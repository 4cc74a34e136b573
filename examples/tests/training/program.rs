//! A program as a child process.

use std::io::{BufRead as _, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};

use serde_json::Value;

/// A program whose stdout is read line by line; it does not outlive the test.
pub(super) struct Program {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Program {
    pub(super) fn start(binary: &str, args: &[&str]) -> Self {
        let mut command = Command::new(binary);
        let mut process = command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    /// The next line; `None` at the end.
    pub(super) fn next(&mut self) -> Option<Value> {
        self.lines.next().map(|line| serde_json::from_str(&line.unwrap()).unwrap())
    }

    /// The next line of this kind, and those before it are over.
    pub(super) fn until(&mut self, event: &str) -> Value {
        std::iter::from_fn(|| self.next()).find(|line| line["event"] == event).expect("it says so")
    }

    /// All lines that are left, and whether it had done what it was to do.
    pub(super) fn end(&mut self) -> (Vec<Value>, bool) {
        let lines = std::iter::from_fn(|| self.next()).collect();
        (lines, self.process.wait().unwrap().success())
    }
}

impl Drop for Program {
    /// SIGKILL: it can neither finish nor tidy up.
    fn drop(&mut self) {
        // One that has ended needs neither.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
