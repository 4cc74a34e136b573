//! A bound on thoughts: behind so many tokens of them nothing may follow but their end, then the answer goes on.
//!
//! Where thoughts begin and end is read off the bytes of the tokens, as the reader of the answer does it: some
//! vocabularies have a token for a marker, others spell it.

use std::{fmt, sync::Arc};

use parallax_model::TokenBytes;

use super::{Constraint, ConstraintState};

/// How a model marks its thoughts, and what the bound makes it say.
#[derive(Clone)]
pub struct ThoughtBudget {
    /// Most tokens of thoughts.
    pub tokens: usize,
    /// What opens them, at the beginning of an answer.
    pub opening: &'static str,
    /// What ends them.
    pub end: &'static str,
    /// The tokens that are said when the budget is spent: they contain `end`.
    pub closing: Vec<u32>,
    /// The prompt has opened them already.
    pub is_open: bool,
    /// Bytes of every token.
    pub vocabulary: Arc<[TokenBytes]>,
    /// What else the answer must follow. Where the prompt has opened the thoughts it sees every token, and knows itself where they
    /// end. Of thoughts that the model opens it sees none: a call that is only thought of, for instance, binds nobody.
    pub then: Option<Arc<dyn Constraint>>,
}

impl fmt::Debug for ThoughtBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("ThoughtBudget");
        shown.field("tokens", &self.tokens).field("then", &self.then).finish_non_exhaustive()
    }
}

impl Constraint for ThoughtBudget {
    fn start(&self) -> Box<dyn ConstraintState> {
        let phase = if self.is_open { Phase::Thinking { tokens: 0 } } else { Phase::Before };
        let then = self.then.as_ref().map(|then| then.start());
        Box::new(Counting { budget: self.clone(), then, phase, seen: Vec::new() })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nothing but white space, or the beginning of the opening.
    Before,
    Thinking {
        tokens: usize,
    },
    /// So many tokens of the closing were said.
    Closing {
        said: usize,
    },
    Answering,
}

/// One answer.
#[derive(Debug)]
struct Counting {
    budget: ThoughtBudget,
    then: Option<Box<dyn ConstraintState>>,
    phase: Phase,
    /// The last bytes: perhaps the beginning of a marker.
    seen: Vec<u8>,
}

impl Counting {
    fn opens(&mut self) -> Phase {
        let (opening, begun) = (self.budget.opening.as_bytes(), self.seen.trim_ascii_start());
        if let Some(rest) = begun.strip_prefix(opening) {
            self.seen = rest.to_vec();
            return self.thinks(0);
        }
        if opening.starts_with(begun) { Phase::Before } else { Phase::Answering }
    }

    fn thinks(&mut self, tokens: usize) -> Phase {
        let end = self.budget.end.as_bytes();
        if self.seen.windows(end.len().max(1)).any(|window| window == end) {
            return Phase::Answering;
        }
        let decided = self.seen.len().saturating_sub(end.len().saturating_sub(1));
        self.seen.drain(..decided);
        match tokens >= self.budget.tokens {
            true => Phase::Closing { said: 0 },
            false => Phase::Thinking { tokens },
        }
    }
}

impl Counting {
    /// The next token is none of the other constraint's business.
    fn is_aside(&self) -> bool {
        !self.budget.is_open && matches!(self.phase, Phase::Thinking { .. } | Phase::Closing { .. })
    }
}

impl ConstraintState for Counting {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let next = match self.phase {
            Phase::Closing { said } => self.budget.closing.get(said),
            _ => None,
        };
        let Some(next) = next.map(|id| *id as usize) else {
            let aside = self.is_aside();
            return self.then.as_mut().filter(|_| !aside).map_or(Ok(()), |then| then.mask(logits));
        };
        let kept = logits.get(next).filter(|logit| logit.is_finite()).copied().unwrap_or(0.0);
        logits.fill(f32::NEG_INFINITY);
        let logit = logits
            .get_mut(next)
            .ok_or_else(|| format!("token {next} ends thoughts, the model has it not"))?;
        *logit = kept;
        Ok(())
    }

    fn is_free(&self) -> bool {
        match self.phase {
            Phase::Closing { .. } => false,
            _ => self.is_aside() || self.then.as_ref().is_none_or(|then| then.is_free()),
        }
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        let aside = self.is_aside();
        if let Some(then) = self.then.as_mut().filter(|_| !aside) {
            then.accept(id)?;
        }
        let bytes = self.budget.vocabulary.get(id as usize).map_or(&[][..], |token| token.bytes.as_slice());
        self.phase = match self.phase {
            Phase::Answering => Phase::Answering,
            Phase::Closing { said } if said + 1 < self.budget.closing.len() => {
                Phase::Closing { said: said + 1 }
            }
            Phase::Closing { .. } => Phase::Answering,
            Phase::Before => {
                self.seen.extend_from_slice(bytes);
                self.opens()
            }
            Phase::Thinking { tokens } => {
                self.seen.extend_from_slice(bytes);
                self.thinks(tokens + 1)
            }
        };
        Ok(())
    }

    fn is_complete(&self) -> bool {
        !matches!(self.phase, Phase::Closing { .. })
            && self.then.as_ref().is_some_and(|then| then.is_complete())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The markers as one token, and in pieces.
    const TOKENS: [&str; 8] = ["a", "b", " ", "<think>", "</think>", "<", "/", "think>"];

    fn budget(tokens: usize, is_open: bool, then: Option<Arc<dyn Constraint>>) -> ThoughtBudget {
        let token = |text: &&str| TokenBytes { bytes: text.as_bytes().to_vec(), special: false };
        ThoughtBudget {
            tokens,
            opening: "<think>",
            end: "</think>",
            closing: vec![5, 6, 7],
            is_open,
            vocabulary: TOKENS.iter().map(token).collect(),
            then,
        }
    }

    /// What may follow these tokens.
    fn allowed(budget: &ThoughtBudget, said: &[u32]) -> Vec<u32> {
        let mut state = budget.start();
        said.iter().for_each(|id| state.accept(*id).unwrap());
        let mut logits = vec![0.5; TOKENS.len()];
        state.mask(&mut logits).unwrap();
        assert_eq!(state.is_free(), logits.iter().all(|logit| logit.is_finite()));
        (0..TOKENS.len() as u32).filter(|id| logits[*id as usize].is_finite()).collect()
    }

    #[test]
    fn spent_thoughts_are_ended_and_the_answer_is_free() {
        let all: Vec<u32> = (0..TOKENS.len() as u32).collect();
        let open = budget(2, true, None);
        assert_eq!(allowed(&open, &[0]), all);
        assert_eq!(allowed(&open, &[0, 1]), [5]);
        assert_eq!(allowed(&open, &[0, 1, 5]), [6]);
        assert_eq!(allowed(&open, &[0, 1, 5, 6]), [7]);
        assert_eq!(allowed(&open, &[0, 1, 5, 6, 7]), all);
        assert_eq!(allowed(&open, &[0, 1, 5, 6, 7, 3, 0, 0, 0]), all, "thoughts begin once");
        // Ended in time, in one token or spelt over several.
        assert_eq!(allowed(&open, &[4, 0, 0, 0]), all);
        assert_eq!(allowed(&budget(4, true, None), &[0, 5, 6, 7, 0, 0]), all);
    }

    #[test]
    fn thoughts_that_the_model_opens_count_from_there() {
        let all: Vec<u32> = (0..TOKENS.len() as u32).collect();
        let closed = budget(1, false, None);
        assert_eq!(allowed(&closed, &[2, 5, 7, 0]), [5], "spelt");
        assert_eq!(allowed(&closed, &[3, 0]), [5]);
        assert_eq!(allowed(&closed, &[3]), all);
        assert_eq!(allowed(&closed, &[0, 3, 0, 0]), all, "not at the beginning");
    }

    #[test]
    fn another_constraint_sees_all_but_thoughts_that_the_model_opens_and_rules_the_rest() {
        #[derive(Debug)]
        struct OnlyA;
        #[derive(Debug)]
        struct State(usize);
        impl Constraint for OnlyA {
            fn start(&self) -> Box<dyn ConstraintState> {
                Box::new(State(0))
            }
        }
        impl ConstraintState for State {
            fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
                logits[1..].fill(f32::NEG_INFINITY);
                Ok(())
            }
            fn accept(&mut self, _: u32) -> Result<(), String> {
                self.0 += 1;
                Ok(())
            }
            fn is_complete(&self) -> bool {
                self.0 >= 4
            }
        }
        let held = budget(1, true, Some(Arc::new(OnlyA)));
        assert_eq!(allowed(&held, &[]), [0]);
        assert_eq!(allowed(&held, &[0]), [5]);
        assert_eq!(allowed(&held, &[0, 5, 6, 7]), [0]);
        // Thoughts that the model opens itself are no business of it.
        let held = budget(2, false, Some(Arc::new(OnlyA)));
        let all: Vec<u32> = (0..TOKENS.len() as u32).collect();
        assert_eq!(allowed(&held, &[3]), all);
        assert_eq!(allowed(&held, &[3, 1, 1]), [5]);
        assert_eq!(allowed(&held, &[3, 1, 4]), [0]);
        let mut state = held.start();
        [3, 1, 1, 5, 6, 7].iter().for_each(|id| state.accept(*id).unwrap());
        assert!(!state.is_complete(), "it has seen one token");
        let held = budget(1, true, Some(Arc::new(OnlyA)));
        let mut state = held.start();
        [0, 5, 6].iter().for_each(|id| state.accept(*id).unwrap());
        assert!(!state.is_complete());
        state.accept(7).unwrap();
        assert!(state.is_complete());
    }
}
