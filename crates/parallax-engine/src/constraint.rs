//! The seam to structured output: which tokens a grammar allows next. The engine only asks and reports; grammars are
//! compiled in `structured` (feature `structured`).

#[cfg(feature = "local")]
mod thoughts;

use std::fmt::Debug;

#[cfg(feature = "local")]
pub use thoughts::ThoughtBudget;

/// A compiled grammar that any number of answers may follow at the same time.
pub trait Constraint: Send + Sync + Debug {
    /// The state before the first token of an answer.
    fn start(&self) -> Box<dyn ConstraintState>;
}

/// How far one answer has come in its grammar.
///
/// The engine calls `mask` before it chooses a token, unless the state is free, and `accept` with the token it chose, in turn. The
/// state belongs to the tokens, not to the cache: it survives preemption, and tokens that speculation proposed are shown to it
/// only when they were chosen.
pub trait ConstraintState: Send + Debug {
    /// Sets the logits `[V]` of tokens that may not come next to minus infinity. A stop token stays allowed where the
    /// grammar may end.
    ///
    /// # Errors
    /// What went wrong; the request ends with this text.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// `mask` would change nothing: it need not be called for the next token.
    fn is_free(&self) -> bool {
        false
    }

    /// Takes the chosen token.
    ///
    /// # Errors
    /// What went wrong; the request ends with this text.
    fn accept(&mut self, id: u32) -> Result<(), String>;

    /// Nothing may follow what was accepted: the answer ends with [`crate::FinishReason::Stop`] at once, without a stop
    /// token. Asked after `accept`.
    fn is_complete(&self) -> bool {
        false
    }
}
