//! What the objects of one OpenAI answer have in common: constant over the answer, however many chunks it has.

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::{Server, unix_seconds};

/// Identity of an answer.
#[derive(Debug, Clone)]
pub(super) struct Envelope {
    /// Without the prefix that the kind of object has.
    pub id: String,
    prefix: &'static str,
    created: u64,
    model: String,
    fingerprint: String,
}

impl Envelope {
    /// An object of this answer.
    pub(super) fn json(&self, object: &str) -> Value {
        json!({"id": format!("{}-{}", self.prefix, self.id), "object": object, "created": self.created,
               "model": self.model, "system_fingerprint": self.fingerprint})
    }
}

impl Server {
    /// A new answer to a request; ids of its objects begin with `prefix`.
    ///
    /// # Errors
    /// 400 when `model` is no string.
    pub(super) fn envelope(&self, body: &Fields<'_>, prefix: &'static str) -> Result<Envelope, ApiError> {
        Ok(Envelope {
            id: self.answer_id(),
            prefix,
            created: unix_seconds(),
            model: body.text("model")?.unwrap_or(&self.state.model_name).to_owned(),
            fingerprint: self.fingerprint(),
        })
    }

    /// Names what seeds are repeatable under: the model and the version of its weights.
    fn fingerprint(&self) -> String {
        let version = self.state.engine.version();
        let hash = blake3::hash(format!("{} {}", self.state.model_name, version.0).as_bytes());
        format!("fp_{}", &hash.to_hex()[..10])
    }
}
