//! Cuts a text at the first stop string, even when the string arrives in pieces: text that may be the beginning of a
//! stop string is held back until that is decided.

use crate::markup::cut;

/// Watches a growing text for stop strings.
#[derive(Debug, Clone, Default)]
pub struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Watches for `stops`; empty ones are ignored.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    /// Takes the next piece; returns the text that may be shown, and the stop string that was met, before which the text
    /// ends. Of stop strings at one place the longest counts.
    pub fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        let (shown, met) = cut(&mut self.held, &self.stops);
        let stop = met.map(|met| {
            self.held.clear();
            self.stops[met].clone()
        });
        (shown, stop)
    }

    /// The text that was still held back when the sequence ended.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_give_the_same_text_as_the_whole(text in "[abé]{0,30}", stop in "[abé]{1,4}", cuts in proptest::collection::vec(1usize..4, 0..30)) {
            let mut watch = StopStrings::new(vec![stop.clone()]);
            let (mut shown, mut stopped) = (String::new(), false);
            let mut characters = text.chars();
            for n in cuts.into_iter().chain(std::iter::repeat(1)) {
                let piece: String = characters.by_ref().take(n).collect();
                if piece.is_empty() || stopped { break; }
                let (more, met) = watch.push(&piece);
                shown.push_str(&more);
                stopped = met.is_some();
            }
            if !stopped { shown.push_str(&watch.finish()); }
            match text.find(&stop) {
                Some(at) => { prop_assert!(stopped); prop_assert_eq!(shown, &text[..at]); }
                None => { prop_assert!(!stopped); prop_assert_eq!(shown, text); }
            }
        }
    }
}
