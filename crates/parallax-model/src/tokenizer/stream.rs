//! Tokens to text while they arrive, never half a character.

use super::Tokenizer;
use crate::error::TokenizerError;

/// Decodes a growing sequence. The text of [`Self::push`] and [`Self::finish`] together equals the decoding of
/// all tokens at once.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    /// Tokens whose text is not all given out, after some that are: some decoders join words by looking back.
    window: Vec<u32>,
    /// How many of them only give context.
    context: usize,
    /// Bytes of the window's text that were given out.
    given_bytes: usize,
}

/// Past this many tokens that never became a character, the bytes are none.
const MAX_PENDING_TOKENS: usize = 64;

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer) -> Self {
        Self { tokenizer, window: Vec::new(), context: 0, given_bytes: 0 }
    }

    /// Takes one token; returns the text that became complete, possibly empty.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window)?;
        let pending = self.window.len() - self.context;
        // A character that is not complete yet decodes to replacement characters at the end: one, or one for each byte.
        let complete = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        if complete.len() < text.len() && pending < MAX_PENDING_TOKENS {
            let new = complete.get(self.given_bytes..).unwrap_or_default().to_owned();
            self.given_bytes += new.len();
            return Ok(new);
        }
        let new = text.get(self.given_bytes..).unwrap_or_default().to_owned();
        self.window.drain(..self.context);
        self.context = self.window.len();
        self.given_bytes = self.tokenizer.decode(&self.window)?.len();
        Ok(new)
    }

    /// The rest, with replacement characters for bytes that never became a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let text = self.tokenizer.decode(&self.window)?;
        let rest = text.get(self.given_bytes..).unwrap_or_default().to_owned();
        *self = Self::new(self.tokenizer.clone());
        Ok(rest)
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
