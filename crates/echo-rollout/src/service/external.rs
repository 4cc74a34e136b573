//! An environment in another program, in any language: JSON lines over its standard input and output.
//!
//! One request and one answer a line; every request has a number, `"id"`, which its answer repeats. `{"op":"hello"}` is
//! answered with `{"name","version","low","high","turns"}`; `{"op":"task","seed":7}` with `{"prompt","answer"}`;
//! `{"op":"play","seed":7,"said":["...", ...]}`, which names every turn so far, with `{"observation":"..."}` or
//! `{"reward":0.5,"components":{"correct":1}}`; `{"op":"cut",...}`, as play, with a reward. The program keeps no state
//! between lines, so that it can be killed and started again at any time: one that is late, exits or answers nonsense
//! costs a lease, not the worker. A stray line (a debug print, say) has the wrong number or none and ends the program, so
//! that no answer is ever taken for another question's.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::ops::RangeInclusive;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::environment::{Environment, Episode, Reward, RewardError, Task, Turn};

/// Most bytes of one answer.
pub const MAX_ANSWER_BYTES: u64 = 1024 * 1024;

/// How the program is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalConfig {
    /// The program.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// How long one answer may take; then the program is killed and started again. Default: 10 s.
    pub time_limit: Duration,
}

impl ExternalConfig {
    /// `program` with `arguments` and the default limit.
    pub fn new(program: &str, arguments: &[&str]) -> Self {
        Self {
            program: program.to_owned(),
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            time_limit: Duration::from_secs(10),
        }
    }
}

/// Why the program gave no usable answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExternalError {
    /// It cannot be started.
    #[error("{program} cannot be started: {source}; is it installed and executable?")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: std::io::Error,
    },
    /// It ended.
    #[error("{program} ended before it answered; run it by hand with a line of its input to see why")]
    Ended {
        /// The program.
        program: String,
    },
    /// It is late and was killed.
    #[error("{program} did not answer within {limit_ms} ms and was killed")]
    TimedOut {
        /// The program.
        program: String,
        /// The limit.
        limit_ms: u64,
    },
    /// It answered something else.
    #[error("{program} answered {answer:?}: {reason}")]
    Answer {
        /// The program.
        program: String,
        /// The first characters of the answer.
        answer: String,
        /// What is wrong with it.
        reason: String,
    },
}

#[derive(Debug, Deserialize)]
struct Hello {
    name: String,
    #[serde(default = "one")]
    version: u32,
    #[serde(default)]
    low: f32,
    #[serde(default = "full")]
    high: f32,
    #[serde(default = "one")]
    turns: u32,
}

fn one() -> u32 {
    1
}

fn full() -> f32 {
    1.0
}

/// An answer with the number of its question.
#[derive(Debug, Deserialize)]
struct Numbered<A> {
    id: u64,
    #[serde(flatten)]
    answer: A,
}

#[derive(Debug, Deserialize)]
struct TaskAnswer {
    prompt: String,
    #[serde(default)]
    answer: String,
}

#[derive(Debug, Deserialize)]
struct TurnAnswer {
    observation: Option<String>,
    reward: Option<f32>,
    #[serde(default)]
    components: BTreeMap<String, f32>,
}

/// The running program; killed when dropped. Its pipes belong to a thread, which ends with it, so that neither a program
/// that does not read nor one that does not write holds anybody up for longer than the time limit.
struct Running {
    child: Child,
    questions: SyncSender<String>,
    answers: Receiver<String>,
    /// Questions so far.
    asked: u64,
}

impl Drop for Running {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// An environment in another program.
pub struct External {
    config: ExternalConfig,
    hello: Hello,
    running: Mutex<Option<Running>>,
}

impl fmt::Debug for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "External({} by {})", self.hello.name, self.config.program)
    }
}

impl External {
    /// Starts the program and asks for its name.
    ///
    /// # Errors
    /// When it cannot be started or does not introduce itself.
    pub fn start(config: ExternalConfig) -> Result<Self, ExternalError> {
        let running = Mutex::new(None);
        let hello: Hello = ask(&config, &running, json!({ "op": "hello" }))?;
        if !(hello.low <= hello.high && hello.low.is_finite() && hello.high.is_finite()) || hello.turns == 0 {
            return Err(ExternalError::Answer {
                program: config.program,
                answer: format!("{hello:?}"),
                reason: "rewards need a finite range and there must be a turn".to_owned(),
            });
        }
        Ok(Self { config, hello, running })
    }

    fn failed(&self, reason: impl fmt::Display) -> RewardError {
        RewardError::Verifier { environment: self.hello.name.clone(), reason: reason.to_string() }
    }

    fn turn(&self, op: &str, seed: u64, said: &[String]) -> Result<Turn, RewardError> {
        let question = json!({ "op": op, "seed": seed, "said": said });
        let answer: TurnAnswer = ask(&self.config, &self.running, question).map_err(|e| self.failed(e))?;
        match (answer.reward, answer.observation) {
            (Some(reward), None) => {
                let components = answer.components.into_iter().collect();
                Ok(Turn::Done(Reward::new(reward, components, &self.reward_range())?))
            }
            (None, Some(observation)) if op == "play" => Ok(Turn::Continue { observation }),
            _ => Err(self.failed("an answer needs either a reward or an observation")),
        }
    }
}

/// One question, one answer; a program that misbehaves is killed and started again at the next question.
fn ask<A: DeserializeOwned>(
    config: &ExternalConfig,
    running: &Mutex<Option<Running>>,
    mut question: Value,
) -> Result<A, ExternalError> {
    let program = || config.program.clone();
    let mut slot = running.lock().unwrap_or_else(PoisonError::into_inner);
    // Taken out: whatever fails below drops it, which kills the program.
    let mut process = match slot.take() {
        Some(process) => process,
        None => start(config)?,
    };
    process.asked += 1;
    question["id"] = json!(process.asked);
    process.questions.send(question.to_string()).map_err(|_| ExternalError::Ended { program: program() })?;
    let line = process.answers.recv_timeout(config.time_limit).map_err(|error| match error {
        RecvTimeoutError::Disconnected => ExternalError::Ended { program: program() },
        RecvTimeoutError::Timeout => {
            let limit_ms = u64::try_from(config.time_limit.as_millis()).unwrap_or(u64::MAX);
            ExternalError::TimedOut { program: program(), limit_ms }
        }
    })?;
    let wrong = |reason: String| ExternalError::Answer {
        program: program(),
        answer: line.trim_end().chars().take(80).collect(),
        reason,
    };
    let answer: Numbered<A> = serde_json::from_str(&line).map_err(|e| wrong(e.to_string()))?;
    if answer.id != process.asked {
        return Err(wrong(format!("question {} needs an answer with this \"id\"", process.asked)));
    }
    *slot = Some(process);
    Ok(answer.answer)
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
fn converse(mut input: ChildStdin, output: ChildStdout, next: &Receiver<String>, send: &SyncSender<String>) {
    let mut output = BufReader::new(output);
    for question in next {
        match writeln!(input, "{question}").and_then(|()| input.flush()) {
            // A program may end after its last words; they are still read.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => return,
            _ => {}
        }
        let mut line = Vec::new();
        let read = output.by_ref().take(MAX_ANSWER_BYTES).read_until(b'\n', &mut line);
        let whole = read.is_ok() && line.ends_with(b"\n");
        if !whole || send.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
            return;
        }
    }
}

struct Play<'a> {
    external: &'a External,
    seed: u64,
    said: Vec<String>,
}

impl Episode for Play<'_> {
    fn step(&mut self, said: &str) -> Result<Turn, RewardError> {
        self.said.push(said.to_owned());
        self.external.turn("play", self.seed, &self.said)
    }

    fn cut(&mut self) -> Result<Reward, RewardError> {
        match self.external.turn("cut", self.seed, &self.said)? {
            Turn::Done(reward) => Ok(reward),
            Turn::Continue { .. } => Err(self.external.failed("a cut episode needs a reward")),
        }
    }
}

impl Environment for External {
    fn name(&self) -> &str {
        &self.hello.name
    }

    fn version(&self) -> u32 {
        self.hello.version
    }

    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let question = json!({ "op": "task", "seed": seed });
        let answer: TaskAnswer = ask(&self.config, &self.running, question).map_err(|e| self.failed(e))?;
        Ok(Task { seed, prompt: answer.prompt, answer: answer.answer })
    }

    fn reward_range(&self) -> RangeInclusive<f32> {
        self.hello.low..=self.hello.high
    }

    fn turns(&self) -> usize {
        self.hello.turns as usize
    }

    /// One program answers one question at a time.
    fn concurrency(&self) -> usize {
        1
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        Box::new(Play { external: self, seed: task.seed, said: Vec::new() })
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    /// A shell program that answers each line by a `case`; `$id` is the question's number.
    fn program(cases: &str, limit: Duration) -> Result<External, ExternalError> {
        let hello = r#"*hello*) say '"name":"shell","turns":2,"high":2.0';;"#;
        let number = r#"id=${line#*\"id\":}; id=${id%%[,\}]*}; say() { echo "{\"id\":$id,$1}"; }"#;
        let script = format!("while read -r line; do {number}; case \"$line\" in {hello} {cases} esac; done");
        External::start(ExternalConfig { time_limit: limit, ..ExternalConfig::new("sh", &["-c", &script]) })
    }

    const PATIENT: Duration = Duration::from_secs(60);

    #[test]
    fn a_program_makes_tasks_and_judges_turns() {
        let cases = r#"*task*) say '"prompt":"Say yes.","answer":"yes"';;
            *'["no","yes"]'*) say '"reward":1.5,"components":{"late":1}';;
            *'"op":"cut"'*) say '"reward":0.5';;
            *'["no"]'*) say '"observation":"Again."';;
            *) say '"reward":7';;"#;
        let external = program(cases, PATIENT).unwrap();
        assert_eq!((external.name(), external.turns(), external.reward_range()), ("shell", 2, 0.0..=2.0));
        let task = external.task(9).unwrap();
        assert_eq!((task.prompt.as_str(), task.answer.as_str(), task.seed), ("Say yes.", "yes", 9));
        let mut episode = external.episode(&task);
        assert_eq!(episode.step("no").unwrap(), Turn::Continue { observation: "Again.".to_owned() });
        assert!(matches!(episode.step("yes").unwrap(), Turn::Done(r) if r.value() == 1.5));
        assert_eq!(external.episode(&task).cut().unwrap().value(), 0.5);
        let beyond = external.episode(&task).step("maybe").unwrap_err();
        assert!(matches!(beyond, RewardError::OutOfRange { .. }), "{beyond}");
    }

    #[test]
    fn a_program_that_crashes_hangs_or_babbles_is_started_again() {
        let cases = r#"*crash*) exit 3;; *hang*) exec sleep 1000;; *babble*) echo 'not json';; *) say '"reward":1';;"#;
        let external = program(cases, Duration::from_millis(800)).unwrap();
        let task = Task { seed: 1, prompt: "?".to_owned(), answer: String::new() };
        let say = |said: &str| external.episode(&task).step(said);
        for (said, reason) in [("crash", "ended"), ("hang", "was killed"), ("babble", "not json")] {
            let error = say(said).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
            assert!(matches!(say("fine").unwrap(), Turn::Done(r) if r.value() == 1.0), "after {said}");
        }
    }

    #[test]
    fn an_answer_too_many_is_never_taken_for_the_next_question() {
        let cases = r#"*print*) say '"reward":0'; say '"reward":1';; *) say '"reward":0.5';;"#;
        let external = program(cases, PATIENT).unwrap();
        let task = Task { seed: 1, prompt: "?".to_owned(), answer: String::new() };
        let say = |said: &str| external.episode(&task).step(said);
        assert!(matches!(say("print").unwrap(), Turn::Done(r) if r.value() == 0.0));
        let error = say("fine").unwrap_err().to_string();
        assert!(error.contains("question 3"), "{error}");
        assert!(matches!(say("fine").unwrap(), Turn::Done(r) if r.value() == 0.5), "started anew");
    }

    #[test]
    fn a_program_that_does_not_read_is_killed() {
        let cases = r#"*) exec sleep 1000;;"#;
        let external = program(cases, Duration::from_millis(300)).unwrap();
        let task = Task { seed: 1, prompt: "?".to_owned(), answer: String::new() };
        // More than a pipe holds, so that the write itself waits.
        let long = "x".repeat(4 << 20);
        let error = external.episode(&task).step(&long).unwrap_err().to_string();
        assert!(error.contains("was killed"), "{error}");
    }

    #[test]
    fn a_task_that_the_program_cannot_make_is_an_error() {
        let external = program("*task*) exit 1;;", PATIENT).unwrap();
        let error = external.task(4).unwrap_err().to_string();
        assert!(error.contains("ended before it answered"), "{error}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = External::start(ExternalConfig::new("no-such-program-here", &[])).unwrap_err();
        assert!(error.to_string().contains("no-such-program-here"), "{error}");
    }
}
