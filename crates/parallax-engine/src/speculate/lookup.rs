//! Guessing by looking back: when the last tokens have occurred before, what followed them then may follow now.

use super::{DraftQuery, Drafter};

/// Prompt look-up (n-gram) speculation: free of any model, good where answers quote their prompt or themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PromptLookup {
    /// Longest run of last tokens that is looked for.
    pub longest: usize,
    /// Shortest, at least 1.
    pub shortest: usize,
}

impl Default for PromptLookup {
    fn default() -> Self {
        Self { longest: 4, shortest: 2 }
    }
}

impl PromptLookup {
    /// What followed the latest earlier occurrence of the longest possible run of last tokens.
    pub fn guess(&self, tokens: &[u32], most: usize) -> Vec<u32> {
        for n in (self.shortest.max(1)..=self.longest).rev() {
            let Some(split) = tokens.len().checked_sub(n).filter(|split| *split > 0) else { continue };
            let (before, last) = (&tokens[..tokens.len() - 1], &tokens[split..]);
            if let Some(at) = before.windows(n).rposition(|window| window == last) {
                let follows = &tokens[at + n..];
                return follows[..most.min(follows.len())].to_vec();
            }
        }
        Vec::new()
    }
}

impl Drafter for PromptLookup {
    fn propose(&mut self, queries: &[DraftQuery<'_>]) -> Vec<Vec<u32>> {
        queries.iter().map(|query| self.guess(query.tokens, query.most)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_followed_then_is_guessed_now() {
        let lookup = PromptLookup { longest: 3, shortest: 1 };
        assert_eq!(lookup.guess(&[1, 2, 3, 4, 9, 2, 3], 5), [4, 9, 2, 3]);
        assert_eq!(lookup.guess(&[1, 2, 3, 4, 9, 2, 3], 1), [4]);
        assert_eq!(lookup.guess(&[7, 7], 4), [7]);
        assert_eq!(lookup.guess(&[1, 2, 3], 4), [0u32; 0]);
        assert_eq!(lookup.guess(&[], 4), [0u32; 0]);
        assert_eq!(
            PromptLookup::default().guess(&[1, 5, 1], 4),
            [0u32; 0],
            "one token is too little evidence"
        );
    }

    proptest! {
        /// A guess continues an earlier occurrence of the longest run that has one.
        #[test]
        fn guesses_continue_the_longest_match(tokens in proptest::collection::vec(0u32..4, 0..30), most in 1usize..6) {
            let lookup = PromptLookup { longest: 3, shortest: 1 };
            let guess = lookup.guess(&tokens, most);
            let matches = |n: usize| {
                (0..tokens.len().saturating_sub(n)).rev().find(|&at| n > 0 && tokens[at..at + n] == tokens[tokens.len() - n..])
            };
            let expected = (1..=3).rev().filter(|n| *n < tokens.len()).find_map(|n| Some((n, matches(n)?)));
            match expected {
                None => prop_assert!(guess.is_empty()),
                Some((n, at)) => prop_assert_eq!(&guess[..], &tokens[at + n..(at + n + most).min(tokens.len())]),
            }
        }
    }
}
