//! An environment in another program, in any language: JSON over its standard input and output, or over HTTP.
//!
//! One question and one answer at a time: a line each way, or the body of a POST and of its reply. Every question has a
//! number, `"id"`, which its answer repeats. `{"op":"hello"}` is answered with `{"name","version","low","high","turns"}`, over
//! HTTP also `"at_once"`, how many questions it answers at a time; `{"op":"task","seed":7}` with `{"prompt","answer"}`;
//! `{"op":"play","seed":7,"said":["...", ...]}`, which names every turn so far, with `{"observation":"..."}` or
//! `{"reward":0.5,"components":{"correct":1}}`; `{"op":"cut",...}`, as play, with a reward. Nothing is remembered between
//! questions, so that a program can be killed and started again, and a server be asked by many machines: one that is late,
//! gone or answers nonsense costs a lease, not the worker. More questions than it answers at a time wait for their turn before
//! their clock starts, whoever asks.

#[cfg(feature = "endpoint")]
mod address;
mod program;

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

#[cfg(feature = "endpoint")]
use super::post::HttpError;
use crate::environment::{Environment, Episode, Reward, RewardError, Task, Turn};

/// Most bytes of one answer.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;
/// How long one answer may take, unless said otherwise.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);
/// Most questions that are asked at once, whatever a server says.
const MAX_AT_ONCE: u32 = 256;

/// How the program is started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalConfig {
    /// The program.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// How long one answer may take; then the program is killed and started again. Default: [`TIME_LIMIT`].
    pub time_limit: Duration,
}

impl ExternalConfig {
    /// `program` with `arguments` and the default limit.
    pub fn new(program: &str, arguments: &[&str]) -> Self {
        Self {
            program: program.to_owned(),
            arguments: arguments.iter().map(|a| (*a).to_owned()).collect(),
            time_limit: TIME_LIMIT,
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
    /// A server that cannot be asked, is late, or refuses.
    #[cfg(feature = "endpoint")]
    #[error(transparent)]
    Http(#[from] HttpError),
    /// It answered something else.
    #[error("{who} answered {answer:?}: {reason}")]
    Answer {
        /// The program, or the address.
        who: String,
        /// The first characters of the answer.
        answer: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Who is asked.
trait Asked: Send + Sync {
    /// What errors call it.
    fn who(&self) -> &str;

    /// One question, which gets a number, and the answer with the same number.
    fn ask(&self, question: Value) -> Result<Value, ExternalError>;
}

/// How it introduces itself.
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
    /// How many questions it answers at once; a program at the other end of a pipe answers one.
    #[serde(default = "one")]
    at_once: u32,
}

fn one() -> u32 {
    1
}

fn full() -> f32 {
    1.0
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

/// Places for questions that are asked at the same time.
struct Places {
    n_places: usize,
    free: Mutex<usize>,
    freed: Condvar,
}

impl Places {
    fn new(n_places: usize) -> Self {
        Self { n_places, free: Mutex::new(n_places), freed: Condvar::new() }
    }

    /// Waits for a place, which is free again when it is dropped.
    fn take(&self) -> Place<'_> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let free = self.freed.wait_while(free, |free| *free == 0);
        *free.unwrap_or_else(PoisonError::into_inner) -= 1;
        Place(self)
    }
}

/// A place that is taken.
struct Place<'a>(&'a Places);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// An environment in another program.
pub struct External {
    asked: Box<dyn Asked>,
    hello: Hello,
    places: Places,
}

impl fmt::Debug for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "External({} by {})", self.hello.name, self.asked.who())
    }
}

impl External {
    /// Starts the program and asks for its name.
    ///
    /// # Errors
    /// When it cannot be started or does not introduce itself.
    pub fn start(config: ExternalConfig) -> Result<Self, ExternalError> {
        Self::meet(Box::new(program::Program::new(config)), 1)
    }

    /// Asks the server at `url` for its name; each answer may take `time_limit`.
    ///
    /// # Errors
    /// When `url` is no http address, or nobody introduces itself there.
    #[cfg(feature = "endpoint")]
    pub fn connect(url: &str, time_limit: Duration) -> Result<Self, ExternalError> {
        Self::meet(Box::new(address::Address::new(url, time_limit)?), MAX_AT_ONCE)
    }

    /// Asks at most `most` questions at a time, whatever it says of itself.
    fn meet(asked: Box<dyn Asked>, most: u32) -> Result<Self, ExternalError> {
        let hello: Hello = ask(&*asked, json!({ "op": "hello" }))?;
        if !(hello.low <= hello.high && hello.low.is_finite() && hello.high.is_finite()) || hello.turns == 0 {
            return Err(ExternalError::Answer {
                who: asked.who().to_owned(),
                answer: beginning(format!("{hello:?}").as_bytes()),
                reason: "rewards need a finite range and there must be a turn".to_owned(),
            });
        }
        let places = Places::new(hello.at_once.clamp(1, most) as usize);
        Ok(Self { asked, hello, places })
    }

    /// Waits for its turn, then asks.
    fn ask<A: DeserializeOwned>(&self, question: Value) -> Result<A, RewardError> {
        let _place = self.places.take();
        ask(&*self.asked, question).map_err(|e| self.failed(e))
    }

    fn failed(&self, reason: impl fmt::Display) -> RewardError {
        RewardError::Verifier { environment: self.hello.name.clone(), reason: reason.to_string() }
    }

    fn turn(&self, op: &str, seed: u64, said: &[String]) -> Result<Turn, RewardError> {
        let question = json!({ "op": op, "seed": seed, "said": said });
        let answer: TurnAnswer = self.ask(question)?;
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

/// One question and its answer, which has these fields.
fn ask<A: DeserializeOwned>(asked: &dyn Asked, question: Value) -> Result<A, ExternalError> {
    let answer = asked.ask(question)?;
    A::deserialize(&answer).map_err(|e| ExternalError::Answer {
        who: asked.who().to_owned(),
        answer: beginning(answer.to_string().as_bytes()),
        reason: e.to_string(),
    })
}

/// The JSON of `answer`, if it has the number of its question.
fn numbered(who: &str, answer: &[u8], id: u64) -> Result<Value, ExternalError> {
    let wrong = |reason| ExternalError::Answer { who: who.to_owned(), answer: beginning(answer), reason };
    let value: Value = serde_json::from_slice(answer).map_err(|e| wrong(e.to_string()))?;
    if value["id"] != id {
        return Err(wrong(format!("question {id} needs an answer with this \"id\"")));
    }
    Ok(value)
}

/// The first characters of an answer, for an error.
fn beginning(answer: &[u8]) -> String {
    String::from_utf8_lossy(answer).trim_end().chars().take(80).collect()
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
        let answer: TaskAnswer = self.ask(question)?;
        Ok(Task { seed, prompt: answer.prompt, answer: answer.answer })
    }

    fn reward_range(&self) -> RangeInclusive<f32> {
        self.hello.low..=self.hello.high
    }

    fn turns(&self) -> usize {
        self.hello.turns as usize
    }

    fn concurrency(&self) -> usize {
        self.places.n_places
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        Box::new(Play { external: self, seed: task.seed, said: Vec::new() })
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Arc, Barrier};

    use super::*;

    /// A shell program that answers each line by a `case`; `$id` is the question's number.
    fn program(cases: &str, limit: Duration) -> Result<External, ExternalError> {
        let hello = r#"*hello*) say '"name":"shell","turns":2,"high":2.0';;"#;
        let number = r#"id=${line#*\"id\":}; id=${id%%[,\}]*}; say() { echo "{\"id\":$id,$1}"; }"#;
        let script = format!("while read -r line; do {number}; case \"$line\" in {hello} {cases} esac; done");
        External::start(ExternalConfig { time_limit: limit, ..ExternalConfig::new("sh", &["-c", &script]) })
    }

    const PATIENT: Duration = Duration::from_secs(60);

    /// Answers as soon as it is asked two questions at a time, and counts them.
    struct Pairs {
        asked: AtomicUsize,
        most: Arc<AtomicUsize>,
        pair: Barrier,
    }

    impl Asked for Pairs {
        fn who(&self) -> &str {
            "pairs"
        }

        fn ask(&self, question: Value) -> Result<Value, ExternalError> {
            if question["op"] == "hello" {
                return Ok(json!({ "name": "pairs", "at_once": 2 }));
            }
            self.most.fetch_max(self.asked.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            self.pair.wait();
            self.asked.fetch_sub(1, Ordering::SeqCst);
            Ok(json!({ "prompt": "?" }))
        }
    }

    #[test]
    fn as_many_questions_as_it_answers_are_asked_at_a_time() {
        let most = Arc::<AtomicUsize>::default();
        let pairs = Pairs { asked: AtomicUsize::new(0), most: Arc::clone(&most), pair: Barrier::new(2) };
        let external = External::meet(Box::new(pairs), MAX_AT_ONCE).unwrap();
        assert_eq!(external.concurrency(), 2);
        let begin = Barrier::new(16);
        std::thread::scope(|scope| {
            for seed in 0..16 {
                let (external, begin) = (&external, &begin);
                scope.spawn(move || {
                    begin.wait();
                    external.task(seed).unwrap();
                });
            }
        });
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }

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
