//! From what a user types after `--model` to a checkpoint.

use std::path::Path;

use super::Checkpoint;
use crate::error::OpenError;
use crate::hub::{self, HubName};

pub(super) fn resolve(model: &str) -> Result<Checkpoint, OpenError> {
    if model == "tiny" {
        return Checkpoint::tiny();
    }
    let path = Path::new(model);
    if path.exists() {
        return Checkpoint::open(path);
    }
    let cache = hub::cache_dir();
    let fetched =
        model.parse::<HubName>().ok().zip(cache.as_deref()).and_then(|(name, cache)| name.cached(cache));
    if let Some(found) = fetched {
        return Checkpoint::open(&found);
    }
    Err(OpenError::NotFound {
        model: model.to_owned(),
        cache: cache.map_or_else(|| "none".to_owned(), |c| c.display().to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_model_lists_the_alternatives() {
        let text = resolve("nobody/nothing-of-this-name").unwrap_err().to_string();
        assert!(text.contains("nobody/nothing-of-this-name") && text.contains("GGUF"), "{text}");
    }
}
