//! Environments at arm's length: each episode, its task included, runs on a thread of its own, so that code that hangs
//! or panics costs one lease and not the worker.
//!
//! A thread that hangs cannot be ended from outside; it is left behind and counted until it ends after all. While too many
//! are left behind no further episodes are started. External programs are killed instead ([`super::external`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};

use crate::environment::{Environment, Reward, RewardError, Task, Turn};

/// Most threads that are left behind before no further episodes are started.
pub const MAX_HUNG: usize = 16;

/// Why an episode gave no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RefereeError {
    /// The environment could not make the task or judge.
    #[error(transparent)]
    Environment(#[from] RewardError),
    /// The environment did not answer in time.
    #[error("environment {environment} did not answer within {limit_ms} ms; the lease is given back")]
    TimedOut {
        /// Its name.
        environment: String,
        /// The limit.
        limit_ms: u64,
    },
    /// The environment's code panicked.
    #[error("environment {environment} crashed; the lease is given back")]
    Crashed {
        /// Its name.
        environment: String,
    },
    /// Too many hung episodes or no thread to be had.
    #[error(
        "no episode of {environment} can be started while {hung} hang; restart this worker if they do not end"
    )]
    Exhausted {
        /// Its name.
        environment: String,
        /// Threads that are left behind.
        hung: usize,
    },
}

/// Starts the episodes of one environment.
#[derive(Debug)]
pub struct Referees {
    environment: Arc<dyn Environment>,
    limit: Duration,
    /// Threads that were late and have not ended yet.
    hung: Arc<AtomicUsize>,
    /// The clock of an answer starts when the environment takes the question, not while others are before it.
    turns: Arc<Semaphore>,
}

impl Referees {
    /// Referees for `environment`; each answer may take `limit`.
    pub fn new(environment: Arc<dyn Environment>, limit: Duration) -> Self {
        let turns = environment.concurrency().clamp(1, Semaphore::MAX_PERMITS);
        Self { environment, limit, hung: Arc::default(), turns: Arc::new(Semaphore::new(turns)) }
    }

    /// The environment.
    pub fn environment(&self) -> &dyn Environment {
        &*self.environment
    }

    /// Makes the task of `seed` and starts an episode of it.
    ///
    /// # Errors
    /// When too many episodes hang already, or the task cannot be made.
    pub async fn start(&self, seed: u64) -> Result<(Task, Referee), RefereeError> {
        let environment = Arc::clone(&self.environment);
        let name = environment.name().to_owned();
        let (words, mut hear) = mpsc::channel(1);
        let (send, answers) = mpsc::channel(1);
        let thread = Arc::new(Thread { state: AtomicU8::new(RUNNING), hung: Arc::clone(&self.hung) });
        let ended = Ended(Arc::clone(&thread));
        let play = move || {
            let _ended = ended;
            let task = match environment.task(seed) {
                Ok(task) => task,
                Err(error) => {
                    _ = send.blocking_send(Err(error));
                    return;
                }
            };
            if send.blocking_send(Ok(Answer::Task(task.clone()))).is_err() {
                return;
            }
            let mut episode = environment.episode(&task);
            while let Some(word) = hear.blocking_recv() {
                let turn = match word {
                    Word::Said(said) => episode.step(&said),
                    Word::Cut => episode.cut().map(Turn::Done),
                };
                if send.blocking_send(turn.map(Answer::Turn)).is_err() {
                    return;
                }
            }
        };
        let (limit, turns) = (self.limit, Arc::clone(&self.turns));
        let mut referee = Referee { environment: name, limit, words, answers, thread, turns };
        let _turn = referee.turns.clone().acquire_owned().await;
        let hung = self.hung.load(Ordering::Relaxed);
        let exhausted = |hung| RefereeError::Exhausted { environment: referee.environment.clone(), hung };
        if hung >= MAX_HUNG {
            return Err(exhausted(hung));
        }
        let started = std::thread::Builder::new().name("episode".to_owned()).spawn(play);
        started.map_err(|_| exhausted(hung))?;
        match referee.answer().await? {
            Answer::Task(task) => Ok((task, referee)),
            Answer::Turn(_) => Err(referee.crashed()),
        }
    }
}

enum Word {
    Said(String),
    Cut,
}

enum Answer {
    Task(Task),
    Turn(Turn),
}

const RUNNING: u8 = 0;
const LATE: u8 = 1;
const ENDED: u8 = 2;

/// Whether an episode's thread runs, was late, or has ended; late ones are counted.
#[derive(Debug)]
struct Thread {
    state: AtomicU8,
    hung: Arc<AtomicUsize>,
}

impl Thread {
    fn late(&self) {
        // Counted first: a thread that ends now takes out what is in.
        self.hung.fetch_add(1, Ordering::Relaxed);
        let counted = self.state.compare_exchange(RUNNING, LATE, Ordering::AcqRel, Ordering::Relaxed);
        if counted.is_err() {
            self.hung.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Held by the thread: its end, by a panic too, takes it out of the count.
struct Ended(Arc<Thread>);

impl Drop for Ended {
    fn drop(&mut self) {
        if self.0.state.swap(ENDED, Ordering::AcqRel) == LATE {
            self.0.hung.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// One episode on its own thread. Dropping it ends the episode.
#[derive(Debug)]
pub struct Referee {
    environment: String,
    limit: Duration,
    words: mpsc::Sender<Word>,
    answers: mpsc::Receiver<Result<Answer, RewardError>>,
    thread: Arc<Thread>,
    turns: Arc<Semaphore>,
}

impl Referee {
    fn crashed(&self) -> RefereeError {
        RefereeError::Crashed { environment: self.environment.clone() }
    }

    async fn answer(&mut self) -> Result<Answer, RefereeError> {
        match tokio::time::timeout(self.limit, self.answers.recv()).await {
            Ok(Some(answer)) => Ok(answer?),
            Ok(None) => Err(self.crashed()),
            Err(_) => {
                self.thread.late();
                let limit_ms = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX);
                Err(RefereeError::TimedOut { environment: self.environment.clone(), limit_ms })
            }
        }
    }

    async fn ask(&mut self, word: Word) -> Result<Turn, RefereeError> {
        let _turn = Arc::clone(&self.turns).acquire_owned().await;
        // A full channel is one whose thread is late, a closed one is noticed below.
        _ = self.words.try_send(word);
        match self.answer().await? {
            Answer::Turn(turn) => Ok(turn),
            Answer::Task(_) => Err(self.crashed()),
        }
    }

    /// The policy says `said`.
    ///
    /// # Errors
    /// When the environment cannot judge, hangs or has crashed.
    pub async fn step(&mut self, said: String) -> Result<Turn, RefereeError> {
        self.ask(Word::Said(said)).await
    }

    /// The reward when there is no room for another turn.
    ///
    /// # Errors
    /// As [`Referee::step`].
    pub async fn cut(&mut self) -> Result<Reward, RefereeError> {
        match self.ask(Word::Cut).await? {
            Turn::Done(reward) => Ok(reward),
            Turn::Continue { .. } => Err(self.crashed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;
    use crate::environment::{Arithmetic, Calculator, Episode, one_turn};

    /// Hangs on "hang" until the gate opens and panics on "panic"; has no task for seed 9 and panics at seed 13.
    #[derive(Default)]
    struct Wild {
        gate: Arc<(Mutex<bool>, Condvar)>,
    }

    impl Environment for Wild {
        fn name(&self) -> &str {
            "wild"
        }

        fn task(&self, seed: u64) -> Result<Task, RewardError> {
            assert_ne!(seed, 13, "task code broke");
            if seed == 9 {
                return Err(RewardError::NoTask { environment: "wild".to_owned(), tries: 1 });
            }
            Ok(Task { seed, prompt: "?".to_owned(), answer: String::new() })
        }

        fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
            one_turn(self, task)
        }

        fn verify(&self, _: &Task, completion: &str) -> Result<Reward, RewardError> {
            match completion {
                "hang" => {
                    let (open, opened) = &*self.gate;
                    drop(opened.wait_while(open.lock().unwrap(), |open| !*open).unwrap());
                }
                "panic" => panic!("reward code broke"),
                _ => {}
            }
            Reward::new(1.0, vec![], &self.reward_range())
        }
    }

    fn referees(environment: impl Environment + 'static, limit: Duration) -> Referees {
        Referees::new(Arc::new(environment), limit)
    }

    const PATIENT: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn threads_that_hang_are_counted_only_while_they_hang() {
        let wild = Wild::default();
        let gate = Arc::clone(&wild.gate);
        let referees = referees(wild, Duration::from_millis(40));
        for _ in 0..MAX_HUNG {
            let (_, mut hangs) = referees.start(3).await.unwrap();
            let error = hangs.step("hang".to_owned()).await.unwrap_err();
            assert!(matches!(error, RefereeError::TimedOut { limit_ms: 40, .. }), "{error}");
        }
        let full = referees.start(3).await.unwrap_err();
        assert!(matches!(full, RefereeError::Exhausted { hung: MAX_HUNG, .. }), "{full}");
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
        while referees.hung.load(Ordering::Relaxed) > 0 {
            tokio::task::yield_now().await;
        }
        let patient = Referees { limit: PATIENT, ..referees };
        let (_, mut fine) = patient.start(3).await.unwrap();
        assert!(matches!(fine.step("x".to_owned()).await, Ok(Turn::Done(_))));
    }

    #[tokio::test]
    async fn a_panic_is_a_crash_and_the_next_episode_is_fine() {
        let wild = referees(Wild::default(), PATIENT);
        let (_, mut crashes) = wild.start(3).await.unwrap();
        assert!(matches!(crashes.step("panic".to_owned()).await, Err(RefereeError::Crashed { .. })));
        assert!(matches!(wild.start(13).await, Err(RefereeError::Crashed { .. })));
        assert!(matches!(wild.start(9).await, Err(RefereeError::Environment(RewardError::NoTask { .. }))));
        let (_, mut fine) = wild.start(3).await.unwrap();
        assert!(matches!(fine.step("x".to_owned()).await, Ok(Turn::Done(r)) if r.value() == 1.0));
        let (task, mut sums) = referees(Arithmetic::default(), PATIENT).start(3).await.unwrap();
        assert!(matches!(sums.step(task.answer).await, Ok(Turn::Done(r)) if r.value() == 1.0));
    }

    #[tokio::test]
    async fn several_turns_are_one_episode() {
        let referees = referees(Calculator::default(), PATIENT);
        let (task, mut referee) = referees.start(3).await.unwrap();
        let tool = referee.step("<calc>2+3</calc>".to_owned()).await.unwrap();
        assert_eq!(tool, Turn::Continue { observation: "5".to_owned() });
        assert!(matches!(referee.step(task.answer).await, Ok(Turn::Done(r)) if r.value() == 1.0));
        let (_, mut cut) = referees.start(3).await.unwrap();
        assert_eq!(cut.cut().await.unwrap().value(), 0.0);
    }

    /// Answers one question at a time.
    struct Serial(Wild);

    impl Environment for Serial {
        fn name(&self) -> &str {
            "serial"
        }

        fn task(&self, seed: u64) -> Result<Task, RewardError> {
            self.0.task(seed)
        }

        fn concurrency(&self) -> usize {
            1
        }

        fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
            self.0.episode(task)
        }
    }

    #[tokio::test]
    async fn who_waits_for_another_episode_is_not_late() {
        let referees = referees(Serial(Wild::default()), PATIENT);
        let (_, mut waits) = referees.start(2).await.unwrap();
        waits.limit = Duration::from_millis(1);
        let busy = Arc::clone(&referees.turns).acquire_owned().await.unwrap();
        let mut answer = tokio::spawn(async move { waits.step("x".to_owned()).await });
        let many_limits = Duration::from_millis(50);
        assert!(tokio::time::timeout(many_limits, &mut answer).await.is_err(), "the environment is busy");
        drop(busy);
        // Its turn: an answer within a millisecond, or none.
        let answer = answer.await.unwrap();
        assert!(matches!(answer, Ok(Turn::Done(_)) | Err(RefereeError::TimedOut { .. })), "{answer:?}");
    }
}
