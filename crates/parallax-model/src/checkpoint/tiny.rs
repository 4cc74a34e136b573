//! The embedded tiny model: trained by this workspace's own trainer, see `assets/tiny/`.

use super::Checkpoint;
use crate::error::OpenError;

pub(super) fn open() -> Result<Checkpoint, OpenError> {
    Checkpoint::embedded(
        include_bytes!("../../../../assets/tiny/config.json"),
        include_bytes!("../../../../assets/tiny/generation_config.json"),
        include_bytes!("../../../../assets/tiny/tokenizer.json"),
        include_bytes!("../../../../assets/tiny/tokenizer_config.json"),
        include_bytes!("../../../../assets/tiny/model.safetensors"),
    )
}
