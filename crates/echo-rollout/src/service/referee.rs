//! Environments at arm's length: each episode runs on a thread of its own, so that reward code that hangs or panics
//! costs one lease and not the worker.
//!
//! A thread that hangs cannot be ended from outside; it is left behind and counted, and a worker with too many of them
//! takes no further episodes. External programs are killed instead ([`super::external`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;

use crate::environment::{Environment, Reward, RewardError, Task, Turn};

/// Most threads that are left behind before no further episodes are started.
pub const MAX_HUNG: usize = 16;

static HUNG: AtomicUsize = AtomicUsize::new(0);

/// Why an episode gave no answer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RefereeError {
    /// The environment could not judge.
    #[error(transparent)]
    Verifier(#[from] RewardError),
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
    #[error("no episode of {environment} can be started: {hung} hang already; restart this worker")]
    Exhausted {
        /// Its name.
        environment: String,
        /// Threads that were left behind.
        hung: usize,
    },
}

enum Word {
    Said(String),
    Cut,
}

/// One episode on its own thread. Dropping it ends the episode.
#[derive(Debug)]
pub struct Referee {
    environment: String,
    limit: Duration,
    words: mpsc::UnboundedSender<Word>,
    turns: mpsc::UnboundedReceiver<Result<Turn, RewardError>>,
}

impl Referee {
    /// Starts an episode of `task`; each answer may take `limit`.
    ///
    /// # Errors
    /// When too many episodes hang already.
    pub fn start(
        environment: Arc<dyn Environment>,
        task: Task,
        limit: Duration,
    ) -> Result<Self, RefereeError> {
        let name = environment.name().to_owned();
        let exhausted = |hung| RefereeError::Exhausted { environment: name.clone(), hung };
        let hung = HUNG.load(Ordering::Relaxed);
        if hung >= MAX_HUNG {
            return Err(exhausted(hung));
        }
        let (words, mut hear) = mpsc::unbounded_channel();
        let (answer, turns) = mpsc::unbounded_channel();
        let play = move || {
            let mut episode = environment.episode(&task);
            while let Some(word) = hear.blocking_recv() {
                let turn = match word {
                    Word::Said(said) => episode.step(&said),
                    Word::Cut => episode.cut().map(Turn::Done),
                };
                if answer.send(turn).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("episode".to_owned()).spawn(play);
        thread.map_err(|_| exhausted(hung))?;
        Ok(Self { environment: name, limit, words, turns })
    }

    async fn ask(&mut self, word: Word) -> Result<Turn, RefereeError> {
        // A closed channel is noticed below.
        _ = self.words.send(word);
        match tokio::time::timeout(self.limit, self.turns.recv()).await {
            Ok(Some(turn)) => Ok(turn?),
            Ok(None) => Err(RefereeError::Crashed { environment: self.environment.clone() }),
            Err(_) => {
                HUNG.fetch_add(1, Ordering::Relaxed);
                let limit_ms = u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX);
                Err(RefereeError::TimedOut { environment: self.environment.clone(), limit_ms })
            }
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
            Turn::Continue { .. } => Err(RefereeError::Crashed { environment: self.environment.clone() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::{Arithmetic, Calculator, Episode, one_turn};

    /// Hangs on "hang" and panics on "panic".
    struct Wild;

    impl Environment for Wild {
        fn name(&self) -> &str {
            "wild"
        }

        fn task(&self, seed: u64) -> Task {
            Task { seed, prompt: "?".to_owned(), answer: String::new() }
        }

        fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
            one_turn(self, task)
        }

        fn verify(&self, _: &Task, completion: &str) -> Result<Reward, RewardError> {
            match completion {
                "hang" => loop {
                    std::thread::park();
                },
                "panic" => panic!("reward code broke"),
                _ => Reward::new(1.0, vec![], &self.reward_range()),
            }
        }
    }

    fn start(environment: impl Environment + 'static, limit: Duration) -> (Task, Referee) {
        let task = environment.task(3);
        let referee = Referee::start(Arc::new(environment), task.clone(), limit).unwrap();
        (task, referee)
    }

    #[tokio::test]
    async fn hanging_reward_code_costs_its_time_limit_and_no_more() {
        let (_, mut hangs) = start(Wild, Duration::from_millis(40));
        let error = hangs.step("hang".to_owned()).await.unwrap_err();
        assert!(matches!(error, RefereeError::TimedOut { limit_ms: 40, .. }), "{error}");
    }

    #[tokio::test]
    async fn a_panic_is_a_crash_and_the_next_episode_is_fine() {
        let limit = Duration::from_secs(60);
        let (_, mut crashes) = start(Wild, limit);
        assert!(matches!(crashes.step("panic".to_owned()).await, Err(RefereeError::Crashed { .. })));
        let (_, mut fine) = start(Wild, limit);
        assert!(matches!(fine.step("x".to_owned()).await, Ok(Turn::Done(r)) if r.value() == 1.0));
        let (task, mut sums) = start(Arithmetic::default(), limit);
        assert!(matches!(sums.step(task.answer).await, Ok(Turn::Done(r)) if r.value() == 1.0));
    }

    #[tokio::test]
    async fn several_turns_are_one_episode() {
        let (task, mut referee) = start(Calculator::default(), Duration::from_secs(60));
        let tool = referee.step("<calc>2+3</calc>".to_owned()).await.unwrap();
        assert_eq!(tool, Turn::Continue { observation: "5".to_owned() });
        assert!(matches!(referee.step(task.answer).await, Ok(Turn::Done(r)) if r.value() == 1.0));
        let (_, mut cut) = start(Calculator::default(), Duration::from_secs(60));
        assert_eq!(cut.cut().await.unwrap().value(), 0.0);
    }
}
