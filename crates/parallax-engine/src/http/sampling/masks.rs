//! vLLM's `allowed_token_ids` and `bad_words`: tokens that an answer must not have, wherever it is.
//!
//! They are a constraint and no part of the sampler because a word of several tokens is known by those before its last,
//! which nothing but constraints sees in their order.

use std::sync::Arc;

use crate::constraint::{Constraint, ConstraintState};

/// Which tokens are left.
#[derive(Debug)]
pub(in crate::http) struct Masks {
    /// These alone, ascending; `None`: all of the vocabulary.
    allowed: Option<Vec<u32>>,
    /// Of each of these words its last token does not follow the others.
    bad_words: Vec<Vec<u32>>,
}

impl Masks {
    /// The tokens that alone may be chosen, in any order, and the words that must not come about.
    pub(in crate::http) fn new(mut allowed: Option<Vec<u32>>, bad_words: Vec<Vec<u32>>) -> Self {
        if let Some(ids) = &mut allowed {
            ids.sort_unstable();
            ids.dedup();
        }
        Self { allowed, bad_words }
    }
}

/// Masks, and what else the answer must follow.
#[derive(Debug)]
pub(in crate::http) struct Masked {
    pub masks: Arc<Masks>,
    pub then: Option<Arc<dyn Constraint>>,
}

impl Constraint for Masked {
    fn start(&self) -> Box<dyn ConstraintState> {
        let longest = self.masks.bad_words.iter().map(Vec::len).max().unwrap_or(0);
        Box::new(Masking {
            masks: Arc::clone(&self.masks),
            then: self.then.as_ref().map(|then| then.start()),
            said: Vec::new(),
            remembered: longest.saturating_sub(1),
        })
    }
}

/// One answer.
#[derive(Debug)]
struct Masking {
    masks: Arc<Masks>,
    then: Option<Box<dyn ConstraintState>>,
    /// The last tokens: perhaps the beginning of a word.
    said: Vec<u32>,
    /// How many of them.
    remembered: usize,
}

impl Masking {
    /// Tokens that would complete a word.
    fn completing(&self) -> impl Iterator<Item = u32> {
        let words = self.masks.bad_words.iter().filter_map(|word| word.split_last());
        words.filter(move |(_, before)| self.said.ends_with(before)).map(|(last, _)| *last)
    }
}

impl ConstraintState for Masking {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if let Some(then) = self.then.as_mut().filter(|then| !then.is_free()) {
            then.mask(logits)?;
        }
        if let Some(allowed) = &self.masks.allowed {
            let (mut begin, end) = (0, logits.len());
            for id in allowed.iter().map(|id| *id as usize).take_while(|id| *id < end) {
                logits[begin..id].fill(f32::NEG_INFINITY);
                begin = id + 1;
            }
            logits[begin..].fill(f32::NEG_INFINITY);
        }
        for id in self.completing() {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(())
    }

    fn is_free(&self) -> bool {
        self.masks.allowed.is_none()
            && self.completing().next().is_none()
            && self.then.as_ref().is_none_or(|then| then.is_free())
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        if let Some(then) = &mut self.then {
            then.accept(id)?;
        }
        self.said.push(id);
        self.said.drain(..self.said.len().saturating_sub(self.remembered));
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.then.as_ref().is_some_and(|then| then.is_complete())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [u32; 6] = [0, 1, 2, 3, 4, 5];

    /// What may follow these tokens.
    fn left(masked: &Masked, said: &[u32]) -> Vec<u32> {
        let mut state = masked.start();
        said.iter().for_each(|id| state.accept(*id).unwrap());
        let mut logits = [0.5; ALL.len()];
        state.mask(&mut logits).unwrap();
        assert_eq!(state.is_free(), logits.iter().all(|logit| logit.is_finite()));
        assert!(!state.is_complete());
        ALL.into_iter().filter(|id| logits[*id as usize].is_finite()).collect()
    }

    fn masked(
        allowed: Option<Vec<u32>>,
        bad_words: Vec<Vec<u32>>,
        then: Option<Arc<dyn Constraint>>,
    ) -> Masked {
        Masked { masks: Arc::new(Masks::new(allowed, bad_words)), then }
    }

    #[test]
    fn a_word_of_several_tokens_is_never_completed() {
        let masked = masked(None, vec![vec![1], vec![2, 3, 4], vec![3, 5], vec![99], vec![]], None);
        assert_eq!(left(&masked, &[]), [0, 2, 3, 4, 5]);
        assert_eq!(left(&masked, &[2]), [0, 2, 3, 4, 5]);
        assert_eq!(left(&masked, &[0, 2, 3]), [0, 2, 3]);
        assert_eq!(left(&masked, &[2, 0, 3]), [0, 2, 3, 4]);
        assert_eq!(left(&masked, &[2, 3, 0]), [0, 2, 3, 4, 5], "it was left");
    }

    #[test]
    fn masks_leave_what_another_constraint_leaves_too() {
        let only = masked(Some(vec![5, 1, 1, 99]), Vec::new(), None);
        assert_eq!(left(&only, &[0, 0, 0]), [1, 5]);
        assert_eq!(left(&masked(None, vec![vec![5]], Some(Arc::new(only))), &[1]), [1]);
        assert_eq!(left(&masked(None, vec![vec![2, 3]], None), &[0]), ALL);
    }
}
