//! A program that is asked over its standard input and output, one JSON line each way.
//!
//! One that is late, exits or answers nonsense is killed and started again with the next question. A stray line (a debug
//! print, say) has the wrong number or none and ends the program, so that no answer is ever taken for another question's.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use serde_json::{Value, json};

use super::{Asked, ExternalConfig, ExternalError, MAX_ANSWER_BYTES, numbered};

/// The running program; killed when dropped. Its pipes belong to a thread, which ends with it, so that neither a program
/// that does not read nor one that does not write holds anybody up for longer than the time limit.
struct Running {
    child: Child,
    questions: SyncSender<String>,
    answers: Receiver<Vec<u8>>,
    /// Questions so far.
    asked: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// A program, running or about to.
pub(super) struct Program {
    config: ExternalConfig,
    running: Mutex<Option<Running>>,
}

impl Program {
    pub(super) fn new(config: ExternalConfig) -> Self {
        Self { config, running: Mutex::new(None) }
    }
}

impl Asked for Program {
    fn who(&self) -> &str {
        &self.config.program
    }

    fn ask(&self, mut question: Value) -> Result<Value, ExternalError> {
        let config = &self.config;
        let program = || config.program.clone();
        let mut slot = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken out: whatever fails below drops it, which kills the program.
        let mut process = match slot.take() {
            Some(process) => process,
            None => start(config)?,
        };
        process.asked += 1;
        question["id"] = json!(process.asked);
        process
            .questions
            .send(question.to_string())
            .map_err(|_| ExternalError::Ended { program: program() })?;
        let line = process.answers.recv_timeout(config.time_limit).map_err(|error| match error {
            RecvTimeoutError::Disconnected => ExternalError::Ended { program: program() },
            RecvTimeoutError::Timeout => {
                let limit_ms = u64::try_from(config.time_limit.as_millis()).unwrap_or(u64::MAX);
                ExternalError::TimedOut { program: program(), limit_ms }
            }
        })?;
        let answer = numbered(self.who(), &line, process.asked)?;
        *slot = Some(process);
        Ok(answer)
    }
}

fn start(config: &ExternalConfig) -> Result<Running, ExternalError> {
    let failed = |source| ExternalError::Start { program: config.program.clone(), source };
    let mut command = Command::new(&config.program);
    command.args(&config.arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(failed)?;
    let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
        return Err(failed(std::io::Error::other("no pipes")));
    };
    let (questions, next) = sync_channel(1);
    let (send, answers) = sync_channel(1);
    let talk = move || converse(input, output, &next, &send);
    std::thread::Builder::new().name("external".to_owned()).spawn(talk).map_err(failed)?;
    Ok(Running { child, questions, answers, asked: 0 })
}

/// One line out, one line in, until either side ends.
fn converse(mut input: ChildStdin, output: ChildStdout, next: &Receiver<String>, send: &SyncSender<Vec<u8>>) {
    let mut output = BufReader::new(output);
    for question in next {
        match writeln!(input, "{question}").and_then(|()| input.flush()) {
            // A program may end after its last words; they are still read.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => return,
            _ => {}
        }
        let mut line = Vec::new();
        let read = output.by_ref().take(MAX_ANSWER_BYTES as u64).read_until(b'\n', &mut line);
        let whole = read.is_ok() && line.ends_with(b"\n");
        if !whole || send.send(line).is_err() {
            return;
        }
    }
}
