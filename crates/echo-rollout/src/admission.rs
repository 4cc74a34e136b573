//! What a trajectory must pass before it may be trained on. Versions and leases are the dispatcher's business; audits
//! come later and can still take a trajectory out.

use std::collections::VecDeque;
use std::fmt;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, PoisonError};

use crate::environment::{Environment, Reward, Task, Turn};
use crate::rollout::{Finish, Step, Trajectory};
use crate::text::Text;

/// A check of one trajectory. Pure, so that the same trajectory is always judged the same.
pub trait Admission: Send + Sync {
    /// Whether `trajectory` may be trained on.
    ///
    /// # Errors
    /// Why not.
    fn admit(&self, trajectory: &Trajectory) -> Result<(), Rejection>;
}

/// Why a trajectory is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejection {
    /// Made in another environment.
    #[error("made in environment {got}, but this run is about {expected}")]
    Environment {
        /// The run's.
        expected: String,
        /// The trajectory's.
        got: String,
    },
    /// A token that the model does not have.
    #[error("token {token} is beyond the vocabulary of {vocabulary}")]
    Token {
        /// The token.
        token: u32,
        /// The vocabulary's size.
        vocabulary: u32,
    },
    /// A reward beyond the environment's range.
    #[error("reward {value} is outside of {low} to {high}")]
    Reward {
        /// The reward.
        value: f32,
        /// Smallest.
        low: f32,
        /// Largest.
        high: f32,
    },
    /// No commitment where the run asks for one.
    #[error("no commitment is attached, but this run audits its workers")]
    NoCommitment,
    /// The prompt is not the leased task's.
    #[error("the prompt is not that of task {seed}")]
    Prompt {
        /// Names the task.
        seed: u64,
    },
    /// The end of the completion contradicts the reason given for it.
    #[error("the completion does not end as it says: {reason}")]
    Ending {
        /// The contradiction.
        reason: &'static str,
    },
    /// What the environment is said to have answered is not what it answers.
    #[error("the environment's words at token {position} are not what it says")]
    Observation {
        /// Where they begin, counted from the completion's first token.
        position: usize,
    },
    /// The verifier here gives another reward.
    #[error("the reward is {claimed} but the verifier gives {graded}")]
    Grade {
        /// The worker's.
        claimed: f32,
        /// Ours.
        graded: f32,
    },
    /// The task could not be judged here.
    #[error("the trajectory cannot be judged: {reason}")]
    Unjudged {
        /// Why.
        reason: String,
    },
}

/// Shapes and ranges.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// The run's environment.
    pub environment: String,
    /// The model's vocabulary size.
    pub vocabulary: u32,
    /// The environment's rewards.
    pub rewards: RangeInclusive<f32>,
    /// Whether each trajectory must carry a commitment.
    pub commitment: bool,
}

impl Admission for Shape {
    fn admit(&self, t: &Trajectory) -> Result<(), Rejection> {
        if t.environment() != self.environment {
            let (expected, got) = (self.environment.clone(), t.environment().to_owned());
            return Err(Rejection::Environment { expected, got });
        }
        if let Some(token) = t.tokens().into_iter().find(|token| *token >= self.vocabulary) {
            return Err(Rejection::Token { token, vocabulary: self.vocabulary });
        }
        let value = t.reward().value();
        if !self.rewards.contains(&value) {
            return Err(Rejection::Reward { value, low: *self.rewards.start(), high: *self.rewards.end() });
        }
        if self.commitment && t.commitment().is_empty() {
            return Err(Rejection::NoCommitment);
        }
        Ok(())
    }
}

/// Tasks that [`Regrade`] remembers: the samples of a group come close together, and share theirs.
const REMEMBERED_TASKS: usize = 64;

/// A task with its rendered prompt.
type Rendered = Arc<(Task, Vec<u32>)>;

/// Judges again on the trainer's side: prompt, ending and reward must be what the task and the verifier say. Transcripts of
/// environments that are not repeatable are believed.
pub struct Regrade {
    environment: Arc<dyn Environment>,
    text: Arc<dyn Text>,
    /// The newest last.
    tasks: Mutex<VecDeque<Rendered>>,
}

impl fmt::Debug for Regrade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Regrade({})", self.environment.name())
    }
}

impl Admission for Regrade {
    fn admit(&self, t: &Trajectory) -> Result<(), Rejection> {
        // Who was asked once may answer otherwise the second time.
        if !self.environment.is_repeatable() {
            return Ok(());
        }
        let seed = t.lease().task_seed;
        let rendered = self.rendered(seed)?;
        let (task, prompt) = &*rendered;
        if prompt != t.prompt() {
            return Err(Rejection::Prompt { seed });
        }
        let graded = self.replay(task, t)?;
        let claimed = t.reward().value();
        if graded.value().to_bits() != claimed.to_bits() {
            return Err(Rejection::Grade { claimed, graded: graded.value() });
        }
        Ok(())
    }
}

impl Regrade {
    /// Judges by the run's environment and the model's tokenizer.
    pub fn new(environment: Arc<dyn Environment>, text: Arc<dyn Text>) -> Self {
        Self { environment, text, tasks: Mutex::default() }
    }

    fn rendered(&self, seed: u64) -> Result<Rendered, Rejection> {
        let unjudged = |e: &dyn fmt::Display| Rejection::Unjudged { reason: e.to_string() };
        let tasks = || self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tasks().iter().find(|known| known.0.seed == seed) {
            return Ok(Arc::clone(known));
        }
        let task = self.environment.task(seed).map_err(|e| unjudged(&e))?;
        let prompt = self.text.prompt(&task).map_err(|e| unjudged(&e))?;
        let rendered = Arc::new((task, prompt));
        let mut tasks = tasks();
        tasks.push_back(Arc::clone(&rendered));
        if tasks.len() > REMEMBERED_TASKS {
            tasks.pop_front();
        }
        Ok(rendered)
    }

    /// Plays the transcript again: every turn ends where it says, the environment answers what is written, and the
    /// reward is the one returned.
    fn replay(&self, task: &Task, t: &Trajectory) -> Result<Reward, Rejection> {
        let unjudged = |e: &dyn fmt::Display| Rejection::Unjudged { reason: e.to_string() };
        let ending = |reason| Rejection::Ending { reason };
        let (steps, tokens, limit) = (t.steps(), t.completion(), t.lease().sampling.max_tokens as usize);
        let is_stop = |step: &Step| self.text.stop_ids().contains(&step.token);
        let mut episode = self.environment.episode(task);
        let mut start = 0;
        for _ in 0..self.environment.turns() {
            let own = steps[start..].iter().take_while(|s| s.trainable).count();
            let stop = steps[start..start + own].iter().position(is_stop);
            let end = stop.map_or(start + own, |at| start + at + 1);
            let turn = episode.step(&self.text.completion(&tokens[start..end])).map_err(|e| unjudged(&e))?;
            let last = end == steps.len();
            match (stop, turn) {
                (None, _) if t.finish() == Finish::Stop => return Err(ending("no end-of-sequence token")),
                (None, _) if !last || end != limit => {
                    return Err(ending("shorter than the limit, or stopped"));
                }
                (None, Turn::Continue { .. }) => return episode.cut().map_err(|e| unjudged(&e)),
                (None, Turn::Done(reward)) => return Ok(reward),
                (Some(_), Turn::Done(_)) if !last => return Err(ending("tokens after the end")),
                (Some(_), Turn::Done(_)) if t.finish() == Finish::Length => {
                    return Err(ending("shorter than the limit, or stopped"));
                }
                (Some(_), Turn::Done(reward)) => return Ok(reward),
                (Some(_), Turn::Continue { observation }) => {
                    let answer = self.text.observation(task, &observation).map_err(|e| unjudged(&e))?;
                    if last {
                        let no_room = t.finish() == Finish::Length && end + answer.len() >= limit;
                        return if no_room {
                            episode.cut().map_err(|e| unjudged(&e))
                        } else {
                            Err(ending("the episode was not over"))
                        };
                    }
                    let next = end + answer.len();
                    let written = steps.get(end..next).unwrap_or_default();
                    let foreign = written.iter().all(|s| !s.trainable && s.logprob == 0.0);
                    if !foreign || !written.iter().map(|s| s.token).eq(answer) {
                        return Err(Rejection::Observation { position: end });
                    }
                    start = next;
                }
            }
        }
        Err(ending("more turns than the environment has"))
    }
}

/// Several checks, one after the other.
#[derive(Default)]
pub struct All(pub Vec<Box<dyn Admission>>);

impl fmt::Debug for All {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "All({} checks)", self.0.len())
    }
}

impl Admission for All {
    fn admit(&self, trajectory: &Trajectory) -> Result<(), Rejection> {
        self.0.iter().try_for_each(|check| check.admit(trajectory))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::environment::{Arithmetic, Calculator, Episode, RewardError, one_turn};
    use crate::lease::tests::lease;
    use crate::rollout::tests::sample;
    use crate::rollout::{Sample, Step};
    use crate::text::{TextError, until_stop};
    use swarm_wire::PeerId;

    /// Bytes are tokens, 0 ends.
    #[derive(Debug)]
    pub(crate) struct ByteText;

    impl Text for ByteText {
        fn prompt(&self, task: &Task) -> Result<Vec<u32>, TextError> {
            Ok(task.prompt.bytes().map(u32::from).collect())
        }

        fn observation(&self, _: &Task, said: &str) -> Result<Vec<u32>, TextError> {
            Ok(format!("[{said}]").bytes().map(u32::from).collect())
        }

        fn completion(&self, tokens: &[u32]) -> String {
            until_stop(tokens, self.stop_ids()).iter().filter_map(|t| char::from_u32(*t)).collect()
        }

        fn stop_ids(&self) -> &[u32] {
            &[0]
        }
    }

    fn regrade() -> Regrade {
        Regrade::new(Arc::new(Arithmetic::default()), Arc::new(ByteText))
    }

    fn answer(said: &str, reward: f32) -> Sample {
        let lease = lease(0);
        let task = Arithmetic::default().task(lease.task_seed).unwrap();
        let said = said.replace("ANSWER", &task.answer);
        let mut s = sample(lease, &PeerId::from_ed25519(&[2; 32]));
        s.prompt = ByteText.prompt(&task).unwrap();
        let step = |b: u8| Step { token: b.into(), logprob: -1.0, version: s.lease.version, trainable: true };
        s.steps = said.bytes().map(step).collect();
        s.reward = Reward::new(reward, vec![], &(0.0..=1.0)).unwrap();
        s
    }

    fn judge(sample: Sample) -> Result<(), Rejection> {
        regrade().admit(&Trajectory::new(sample).unwrap())
    }

    #[test]
    fn a_reward_is_only_believed_when_it_is_earned() {
        assert_eq!(judge(answer("ANSWER\0", 1.0)), Ok(()));
        assert_eq!(judge(answer("what\0", 0.0)), Ok(()));
        assert!(matches!(judge(answer("what\0", 1.0)), Err(Rejection::Grade { .. })));
        assert!(matches!(judge(answer("ANSWER\0", 0.0)), Err(Rejection::Grade { .. })));
    }

    /// Arithmetic that counts how often a task is made.
    struct Counted(AtomicUsize);

    impl Environment for Counted {
        fn name(&self) -> &str {
            "arithmetic"
        }

        fn task(&self, seed: u64) -> Result<Task, RewardError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            if seed == 13 {
                return Err(RewardError::NoTask { environment: "arithmetic".to_owned(), tries: 1 });
            }
            Arithmetic::default().task(seed)
        }

        fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
            one_turn(self, task)
        }

        fn verify(&self, task: &Task, completion: &str) -> Result<Reward, RewardError> {
            Arithmetic::default().verify(task, completion)
        }
    }

    #[test]
    fn the_task_of_a_group_is_made_once_and_what_cannot_be_made_is_not_judged() {
        let environment = Arc::new(Counted(AtomicUsize::new(0)));
        let regrade = Regrade::new(environment.clone(), Arc::new(ByteText));
        let judge = |sample| regrade.admit(&Trajectory::new(sample).unwrap());
        for _ in 0..8 {
            assert_eq!(judge(answer("ANSWER\0", 1.0)), Ok(()));
        }
        assert_eq!(environment.0.load(Ordering::Relaxed), 1);
        for seed in 100..100 + REMEMBERED_TASKS as u64 {
            assert!(regrade.rendered(seed).is_ok());
        }
        assert_eq!(judge(answer("ANSWER\0", 1.0)), Ok(()));
        assert_eq!(environment.0.load(Ordering::Relaxed), 2 + REMEMBERED_TASKS, "only the newest are kept");
        let mut none = answer("ANSWER\0", 1.0);
        none.lease.task_seed = 13;
        assert!(matches!(judge(none), Err(Rejection::Unjudged { .. })));
    }

    #[test]
    fn another_prompt_or_ending_is_refused() {
        let mut other = answer("ANSWER\0", 1.0);
        other.prompt.pop();
        assert!(matches!(judge(other), Err(Rejection::Prompt { .. })));
        assert!(matches!(judge(answer("ANSWER", 1.0)), Err(Rejection::Ending { .. })));
        assert!(matches!(judge(answer("ANSWER\0x\0", 1.0)), Err(Rejection::Ending { .. })));
        let mut cut = answer("ANSWER", 1.0);
        cut.finish = Finish::Length;
        assert!(matches!(judge(cut), Err(Rejection::Ending { .. })));
    }

    /// A transcript of the calculator: each turn's words, then what the tool wrote.
    fn calls(turns: &[&str]) -> (Regrade, Sample) {
        let environment = Arc::new(Calculator::default());
        let mut s = answer("x", 0.0);
        let task = environment.task(s.lease.task_seed).unwrap();
        s.lease.sampling.max_tokens = 400;
        s.environment = "calculator".to_owned();
        s.prompt = ByteText.prompt(&task).unwrap();
        s.steps.clear();
        let mut episode = environment.episode(&task);
        for said in turns {
            let said = said.replace("ANSWER", &task.answer);
            let own =
                |b: u8| Step { token: b.into(), logprob: -1.0, version: s.lease.version, trainable: true };
            s.steps.extend(said.bytes().chain([0]).map(own));
            match episode.step(&said).unwrap() {
                Turn::Done(reward) => s.reward = reward,
                Turn::Continue { observation } => {
                    let version = s.lease.version;
                    let foreign = |token| Step { token, logprob: 0.0, version, trainable: false };
                    s.steps
                        .extend(ByteText.observation(&task, &observation).unwrap().into_iter().map(foreign));
                }
            }
        }
        drop(episode);
        (Regrade::new(environment, Arc::new(ByteText)), s)
    }

    #[test]
    fn a_transcript_of_several_turns_is_played_again() {
        let judge = |regrade: &Regrade, sample| regrade.admit(&Trajectory::new(sample).unwrap());
        let turns = ["<calc>1+1</calc>", "hm <calc>(2</calc>", "ANSWER"];
        for good in [&turns[..], &["ANSWER"]] {
            let (regrade, sample) = calls(good);
            assert_eq!(judge(&regrade, sample), Ok(()));
        }
        let (regrade, good) = calls(&turns);
        let tool = good.steps.iter().position(|s| !s.trainable).unwrap();
        let changed = |change: &dyn Fn(&mut Sample)| {
            let mut sample = good.clone();
            change(&mut sample);
            judge(&regrade, sample)
        };
        let other_words = changed(&|s| s.steps[tool + 1].token = u32::from(b'9'));
        assert_eq!(other_words, Err(Rejection::Observation { position: tool }));
        let trained_on = changed(&|s| s.steps[tool + 1].trainable = true);
        assert_eq!(trained_on, Err(Rejection::Observation { position: tool }));
        assert!(matches!(changed(&|s| s.steps.truncate(tool)), Err(Rejection::Ending { .. })));
        assert!(matches!(changed(&|s| s.reward = answer("x", 0.0).reward), Err(Rejection::Grade { .. })));
    }

    #[test]
    fn shapes_are_checked() {
        let good = Shape {
            environment: "arithmetic".to_owned(),
            vocabulary: 128,
            rewards: 0.0..=1.0,
            commitment: true,
        };
        let t = Trajectory::new(answer("ANSWER\0", 1.0)).unwrap();
        assert_eq!(good.admit(&t), Ok(()));
        assert!(matches!(Shape { vocabulary: 5, ..good.clone() }.admit(&t), Err(Rejection::Token { .. })));
        assert!(matches!(
            Shape { rewards: 0.0..=0.5, ..good.clone() }.admit(&t),
            Err(Rejection::Reward { .. })
        ));
        let chess = Shape { environment: "chess".to_owned(), ..good.clone() };
        assert!(matches!(chess.admit(&t), Err(Rejection::Environment { .. })));
        let mut bare = answer("ANSWER\0", 1.0);
        bare.commitment = bytes::Bytes::new();
        let bare = Trajectory::new(bare).unwrap();
        assert!(matches!(good.admit(&bare), Err(Rejection::NoCommitment)));
        let both = All(vec![Box::new(good), Box::new(regrade())]);
        assert!(both.admit(&t).is_ok() && both.admit(&bare).is_err());
    }
}
