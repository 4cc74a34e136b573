//! The embedded tiny model: trained by this workspace's own trainer, see `assets/tiny/`.

use super::Checkpoint;
use crate::error::OpenError;

pub(super) fn open() -> Result<Checkpoint, OpenError> {
    Err(OpenError::NotFound { model: "tiny".to_owned(), cache: "not embedded in this build".to_owned() })
}
