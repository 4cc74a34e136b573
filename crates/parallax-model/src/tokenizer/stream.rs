//! Tokens to text while they arrive, never half a character.

use super::Tokenizer;
use crate::error::TokenizerError;

/// Decodes a growing sequence. The text of [`Self::push`] and [`Self::finish`] together equals the decoding of
/// all tokens at once.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// Tokens from the start of the last text given out.
    window: Vec<u32>,
    /// How many of them were already given out.
    given: usize,
}

/// A character has at most 4 bytes, each at worst one token; past this many the bytes are no character.
const MAX_PENDING_TOKENS: usize = 8;

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), given: 0 }
    }

    /// Takes one token; returns the text that became complete, possibly empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.window.push(id);
        let (before, now) = self.texts()?;
        let pending = self.window.len() - self.given;
        if now.ends_with(char::REPLACEMENT_CHARACTER) && pending < MAX_PENDING_TOKENS {
            return Ok(String::new());
        }
        // The tokens just given out stay as context: some decoders join words by looking back.
        self.window.drain(..self.given);
        self.given = self.window.len();
        Ok(now.strip_prefix(before.as_str()).unwrap_or_default().to_owned())
    }

    /// The rest, with replacement characters for bytes that never became a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let (before, now) = self.texts()?;
        self.window.clear();
        self.given = 0;
        Ok(now.strip_prefix(before.as_str()).unwrap_or_default().to_owned())
    }

    fn texts(&self) -> Result<(String, String), TokenizerError> {
        Ok((self.tokenizer.decode(&self.window[..self.given])?, self.tokenizer.decode(&self.window)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::gguf::byte_tokenizer;

    #[test]
    fn half_characters_wait() {
        let mut stream = byte_tokenizer().stream();
        let ids = byte_tokenizer().encode("é!", false).unwrap();
        assert_eq!(ids.len(), 3);
        assert_eq!(stream.push(ids[0]).unwrap(), "");
        assert_eq!(stream.push(ids[1]).unwrap(), "é");
        assert_eq!(stream.push(ids[2]).unwrap(), "!");
        assert_eq!(stream.push(ids[0]).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    proptest! {
        #[test]
        fn stream_equals_whole(text in "\\PC{0,30}") {
            let t = byte_tokenizer();
            let ids = t.encode(&text, false).unwrap();
            let mut stream = t.stream();
            let mut out = String::new();
            for id in &ids {
                out += &stream.push(*id).unwrap();
            }
            out += &stream.finish().unwrap();
            prop_assert_eq!(out, t.decode(&ids).unwrap());
        }
    }
}
