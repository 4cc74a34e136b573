//! Text to tokens and back, by the model's own tokenizer.
//!
//! From tokenizer.json, or rebuilt from the vocabulary and merges inside a GGUF file or from the ranks in Kimi's
//! `tiktoken.model`.

mod bytes;
pub(crate) mod gguf;
mod stream;
pub(crate) mod tiktoken;

use std::{fmt, sync::Arc};

pub use bytes::TokenBytes;
pub use stream::StreamDecoder;

use crate::error::TokenizerError;

/// Words whose tokens are remembered, by every thread for itself; each may take a kilobyte.
const CACHED_WORDS: usize = 1024;

/// A tokenizer. Clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    /// Put in front by `add_special` when the definition itself does not (GGUF's `add_bos_token`).
    bos: Option<u32>,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// From the content of a tokenizer.json.
    ///
    /// # Errors
    /// The definition is broken.
    pub fn from_json(bytes: &[u8]) -> Result<Self, TokenizerError> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|e| TokenizerError::Invalid(format!("tokenizer.json: {e}")))?;
        Ok(Self::of(inner, None))
    }

    fn of(mut inner: tokenizers::Tokenizer, bos: Option<u32>) -> Self {
        let mut model = inner.get_model().clone();
        model.resize_cache(CACHED_WORDS);
        inner.with_model(model);
        Self { inner: Arc::new(inner), bos }
    }

    /// The definition as a tokenizer.json.
    ///
    /// # Errors
    /// It cannot be serialised.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        self.inner.to_string(false).map_err(|e| TokenizerError::Invalid(e.to_string()))
    }

    /// Tokens of a text. `add_special` adds what the model expects around a text, such as a begin token; leave
    /// it off for rendered chat templates, which write their own. Special tokens in the text are recognised.
    ///
    /// # Errors
    /// The definition has no token for a piece of the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.inner.encode_fast(text, add_special).map_err(|e| TokenizerError::Run(e.to_string()))?;
        let ids = encoding.get_ids();
        match self.bos.filter(|bos| add_special && ids.first() != Some(bos)) {
            Some(bos) => Ok(std::iter::once(bos).chain(ids.iter().copied()).collect()),
            None => Ok(ids.to_vec()),
        }
    }

    /// Text of tokens, special tokens left out.
    ///
    /// # Errors
    /// The decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, true).map_err(|e| TokenizerError::Run(e.to_string()))
    }

    /// Text of tokens, special tokens written out.
    ///
    /// # Errors
    /// The decoder refuses the tokens.
    pub fn decode_with_special(&self, ids: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(ids, false).map_err(|e| TokenizerError::Run(e.to_string()))
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// A decoder for text that arrives token by token.
    pub fn stream(&self) -> StreamDecoder {
        StreamDecoder::new(self.clone())
    }
}
