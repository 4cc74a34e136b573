//! What a trajectory must pass before it may be trained on. Versions and leases are the dispatcher's business; audits
//! come later and can still take a trajectory out.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;

use crate::environment::Environment;
use crate::rollout::{Finish, Trajectory};
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

/// Judges again on the trainer's side: prompt, ending and reward must be what the task and the verifier say.
#[derive(Clone)]
pub struct Regrade {
    /// The run's environment.
    pub environment: Arc<dyn Environment>,
    /// The model's tokenizer.
    pub text: Arc<dyn Text>,
}

impl fmt::Debug for Regrade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Regrade({})", self.environment.name())
    }
}

impl Admission for Regrade {
    fn admit(&self, t: &Trajectory) -> Result<(), Rejection> {
        let unjudged = |e: &dyn fmt::Display| Rejection::Unjudged { reason: e.to_string() };
        let seed = t.lease().task_seed;
        let task = self.environment.task(seed);
        if self.text.prompt(&task).map_err(|e| unjudged(&e))? != t.prompt() {
            return Err(Rejection::Prompt { seed });
        }
        let completion = t.completion();
        let stop_at = completion.iter().position(|token| self.text.stop_ids().contains(token));
        let n = completion.len();
        match (t.finish(), stop_at) {
            (Finish::Stop, Some(at)) if at + 1 == n => {}
            (Finish::Length, None) if n == t.lease().sampling.max_tokens as usize => {}
            (_, Some(at)) if at + 1 < n => return Err(Rejection::Ending { reason: "tokens after the end" }),
            (Finish::Stop, _) => return Err(Rejection::Ending { reason: "no end-of-sequence token" }),
            (Finish::Length, _) => {
                return Err(Rejection::Ending { reason: "shorter than the limit, or stopped" });
            }
        }
        let graded =
            self.environment.verify(&task, &self.text.completion(&completion)).map_err(|e| unjudged(&e))?;
        let claimed = t.reward().value();
        if graded.value().to_bits() != claimed.to_bits() {
            return Err(Rejection::Grade { claimed, graded: graded.value() });
        }
        Ok(())
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
    use super::*;
    use crate::environment::{Arithmetic, Reward, Task};
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

        fn completion(&self, tokens: &[u32]) -> String {
            until_stop(tokens, self.stop_ids()).iter().filter_map(|t| char::from_u32(*t)).collect()
        }

        fn stop_ids(&self) -> &[u32] {
            &[0]
        }
    }

    fn regrade() -> Regrade {
        Regrade { environment: Arc::new(Arithmetic::default()), text: Arc::new(ByteText) }
    }

    fn answer(said: &str, reward: f32) -> Sample {
        let lease = lease(0);
        let task = Arithmetic::default().task(lease.task_seed);
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
