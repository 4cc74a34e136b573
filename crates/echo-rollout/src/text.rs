//! Between tasks and tokens. The tokenizer and chat template belong to the model; whoever wires a worker or an
//! admission check hands them in through this trait.

use crate::environment::Task;

/// A tokenizer with a chat template.
pub trait Text: Send + Sync {
    /// The tokens that a policy continues: the task's prompt as one user message, up to where the assistant speaks.
    ///
    /// # Errors
    /// When the prompt cannot be rendered or tokenised.
    fn prompt(&self, task: &Task) -> Result<Vec<u32>, TextError>;

    /// The tokens that follow the policy's end-of-sequence token when the environment says `said`: up to where the
    /// assistant speaks again. A text without a notion of turns refuses.
    ///
    /// # Errors
    /// When the observation cannot be rendered or tokenised, or turns are unknown.
    fn observation(&self, task: &Task, said: &str) -> Result<Vec<u32>, TextError> {
        _ = said;
        Err(TextError { seed: task.seed, reason: "this text has no turns".to_owned() })
    }

    /// The tokens with which a policy says `said` and ends its turn. A text without a notion of turns refuses.
    ///
    /// # Errors
    /// When the words cannot be tokenised, or turns are unknown.
    fn answer(&self, task: &Task, said: &str) -> Result<Vec<u32>, TextError> {
        _ = said;
        Err(TextError { seed: task.seed, reason: "this text has no turns".to_owned() })
    }

    /// The text of sampled tokens, end-of-sequence tokens left out.
    fn completion(&self, tokens: &[u32]) -> String;

    /// Tokens that end a sequence.
    fn stop_ids(&self) -> &[u32];
}

/// A prompt that could not be made into tokens.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the prompt of task {seed} cannot be tokenised: {reason}")]
pub struct TextError {
    /// Names the task.
    pub seed: u64,
    /// What the tokenizer or template said.
    pub reason: String,
}

/// The sampled tokens before the first of `stop_ids`; what [`Text::completion`] decodes.
pub fn until_stop<'a>(tokens: &'a [u32], stop_ids: &[u32]) -> &'a [u32] {
    let end = tokens.iter().position(|t| stop_ids.contains(t)).unwrap_or(tokens.len());
    &tokens[..end]
}
