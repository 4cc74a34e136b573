//! An adapter on its way to the runners that compute with it.

use std::any::Any;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

/// What a runner makes of an adapter's bytes before it takes the adapter up, or why it cannot. It runs on any thread, so
/// that no step waits for it.
pub type AdapterParser = fn(bytes: &[u8]) -> Result<Arc<dyn Any + Send + Sync>, String>;

/// The bytes of a PEFT safetensors file, to which it dereferences. Clones share them.
#[derive(Clone)]
pub struct AdapterFile {
    bytes: Arc<[u8]>,
    hash: [u8; 32],
    parsed: Option<Arc<dyn Any + Send + Sync>>,
}

impl AdapterFile {
    /// Bytes that runners parse themselves.
    pub fn new(bytes: impl Into<Arc<[u8]>>) -> Self {
        let bytes = bytes.into();
        Self { hash: *blake3::hash(&bytes).as_bytes(), bytes, parsed: None }
    }

    /// Bytes and what `parser`, a runner's, makes of them.
    ///
    /// # Errors
    /// What the parser says.
    pub fn parsed_by(bytes: impl Into<Arc<[u8]>>, parser: AdapterParser) -> Result<Self, String> {
        let file = Self::new(bytes);
        Ok(Self { parsed: Some(parser(&file.bytes)?), ..file })
    }

    /// The bytes alone: what was made of them need not be kept beside what the runner made of that.
    pub(crate) fn unparsed(self) -> Self {
        Self { parsed: None, ..self }
    }

    /// BLAKE3 of the bytes.
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }

    /// What a parser made of it, if that is a `T`.
    pub fn parsed<T: Any>(&self) -> Option<&T> {
        self.parsed.as_ref()?.downcast_ref()
    }
}

impl Deref for AdapterFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl fmt::Debug for AdapterFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdapterFile")
            .field("bytes", &self.bytes.len())
            .field("parsed", &self.parsed.is_some())
            .finish_non_exhaustive()
    }
}
