//! What OpenAI clients send, checked field by field. Extensions that vLLM and others share (top_k, min_p) are taken; what
//! is not supported is refused by name instead of being ignored.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::ApiError;
use crate::sampling::SamplingParams;

/// Most stop strings of one request, as OpenAI has it.
const MAX_STOPS: usize = 4;
/// Most messages of one chat.
const MAX_MESSAGES: usize = 1024;

/// One or several strings.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

/// Text, or parts of which only text is supported.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub(super) enum Content {
    /// Plain text.
    Text(String),
    /// Typed parts.
    Parts(Vec<Part>),
}

/// One part of a message.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Part {
    /// `text` is supported.
    #[serde(rename = "type")]
    pub kind: String,
    /// The text of a text part.
    pub text: Option<String>,
}

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Message {
    /// `system`, `developer`, `user` or `assistant`.
    pub role: String,
    /// What was said.
    pub content: Option<Content>,
}

/// Options of a streamed answer.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Default)]
pub(super) struct StreamOptions {
    /// Send the token counts in a last chunk.
    #[serde(default)]
    pub include_usage: bool,
}

/// Fields that chat and plain completions share.
#[derive(Debug, Clone, PartialEq, Deserialize, Default)]
pub(super) struct Common {
    /// Which model; checked against the one that is served.
    pub model: Option<String>,
    /// Send tokens as they come.
    pub stream: Option<bool>,
    /// Options of a stream.
    pub stream_options: Option<StreamOptions>,
    /// 0 to 2; 0 is greedy.
    pub temperature: Option<f32>,
    /// 0 to 1.
    pub top_p: Option<f32>,
    /// Keep the k most likely tokens; -1 or 0 keeps all.
    pub top_k: Option<i64>,
    /// Keep tokens at least this likely relative to the best.
    pub min_p: Option<f32>,
    /// Most tokens to make.
    pub max_tokens: Option<i64>,
    /// Most tokens to make, by its newer name.
    pub max_completion_tokens: Option<i64>,
    /// Texts at which to stop.
    pub stop: Option<OneOrMany>,
    /// Makes sampling repeatable.
    pub seed: Option<i64>,
    /// Number of choices; 1 is supported.
    pub n: Option<i64>,
    /// Not supported except 0.
    pub presence_penalty: Option<f32>,
    /// Not supported except 0.
    pub frequency_penalty: Option<f32>,
}

/// Body of `POST /v1/chat/completions`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct ChatBody {
    /// The conversation.
    pub messages: Vec<Message>,
    /// Report the log-probability of every token.
    pub logprobs: Option<bool>,
    /// Not supported except 0.
    pub top_logprobs: Option<i64>,
    /// Not supported: refused when not empty.
    pub tools: Option<Vec<serde_json::Value>>,
    /// Not supported except `{"type": "text"}`.
    pub response_format: Option<serde_json::Value>,
    /// The rest.
    #[serde(flatten)]
    pub common: Common,
}

/// Body of `POST /v1/completions`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(super) struct CompletionBody {
    /// The prompt.
    pub prompt: OneOrMany,
    /// Return the prompt before the completion.
    pub echo: Option<bool>,
    /// The rest.
    #[serde(flatten)]
    pub common: Common,
}

/// Reads a JSON body.
///
/// # Errors
/// 400 with serde's account of what is wrong and where.
pub(super) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body).map_err(|e| {
        let field = culprit::<T>(body).map(|f| format!(" in {f}")).unwrap_or_default();
        ApiError::invalid(None, format!("the request body is not valid{field}: {e}"))
    })
}

/// The top-level field without which the body is valid. Serde does not name the field of a wrong type when structs are
/// flattened into each other.
fn culprit<T: DeserializeOwned>(body: &[u8]) -> Option<String> {
    /// Clients send about twenty; beyond, a name is not worth the time.
    const MAX_FIELDS: usize = 64;
    let serde_json::Value::Object(fields) = serde_json::from_slice(body).ok()? else { return None };
    let is_culprit = |name: &&String| {
        let mut rest = fields.clone();
        rest.remove(*name);
        serde_json::from_value::<T>(serde_json::Value::Object(rest)).is_ok()
    };
    if fields.len() > MAX_FIELDS { None } else { fields.keys().find(is_culprit).cloned() }
}

impl Common {
    /// Sampling parameters and stop strings; `fresh_seed` is used when the client gives none.
    ///
    /// # Errors
    /// 400 naming the field that is out of range or not supported.
    pub(super) fn sampling(
        &self,
        default_max_tokens: usize,
        fresh_seed: u64,
    ) -> Result<(SamplingParams, Vec<String>), ApiError> {
        let range = |name: &'static str, value: Option<f32>, low: f32, high: f32, default: f32| match value {
            None => Ok(default),
            Some(v) if v.is_finite() && (low..=high).contains(&v) => Ok(v),
            Some(v) => {
                Err(ApiError::invalid(name, format!("{name} must be between {low} and {high}, not {v}")))
            }
        };
        let unsupported =
            |name: &'static str| ApiError::invalid(name, format!("{name} is not supported by this server"));
        if self.n.is_some_and(|n| n != 1) {
            return Err(ApiError::invalid("n", "this server makes one choice per request: n must be 1"));
        }
        if self.presence_penalty.is_some_and(|p| p != 0.0) {
            return Err(unsupported("presence_penalty"));
        }
        if self.frequency_penalty.is_some_and(|p| p != 0.0) {
            return Err(unsupported("frequency_penalty"));
        }
        if self.stream_options.is_some() && self.stream != Some(true) {
            return Err(ApiError::invalid("stream_options", "stream_options needs \"stream\": true"));
        }
        let max_tokens = match self.max_completion_tokens.or(self.max_tokens) {
            None => default_max_tokens,
            Some(n) => usize::try_from(n).ok().filter(|&n| n > 0).ok_or_else(|| {
                ApiError::invalid("max_tokens", format!("max_tokens must be positive, not {n}"))
            })?,
        };
        let top_k = match self.top_k {
            None | Some(-1) => 0,
            Some(k) => usize::try_from(k).map_err(|_| {
                ApiError::invalid("top_k", format!("top_k must be -1, 0 or positive, not {k}"))
            })?,
        };
        let stops = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(stop)) => vec![stop.clone()],
            Some(OneOrMany::Many(stops)) => stops.clone(),
        };
        if stops.len() > MAX_STOPS || stops.iter().any(String::is_empty) {
            return Err(ApiError::invalid(
                "stop",
                format!("stop takes up to {MAX_STOPS} strings, none of them empty"),
            ));
        }
        let params = SamplingParams {
            temperature: range("temperature", self.temperature, 0.0, 2.0, 1.0)?,
            top_p: range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0, 1.0)?,
            min_p: range("min_p", self.min_p, 0.0, 0.999, 0.0)?,
            top_k,
            seed: self.seed.map_or(fresh_seed, i64::cast_unsigned),
            max_tokens,
            ..SamplingParams::default()
        };
        Ok((params, stops))
    }
}

impl ChatBody {
    /// The conversation as (role, text) pairs.
    ///
    /// # Errors
    /// 400 naming the message that is wrong, or a field that is not supported.
    pub(super) fn conversation(&self) -> Result<Vec<(String, String)>, ApiError> {
        if self.tools.as_ref().is_some_and(|t| !t.is_empty()) {
            return Err(ApiError::invalid("tools", "tools are not supported by this server"));
        }
        if self.top_logprobs.is_some_and(|n| n != 0) {
            return Err(ApiError::invalid(
                "top_logprobs",
                "top_logprobs is not supported by this server: use 0",
            ));
        }
        if self.response_format.as_ref().is_some_and(|f| f["type"] != "text") {
            return Err(ApiError::invalid("response_format", "only {\"type\": \"text\"} is supported"));
        }
        if self.messages.is_empty() || self.messages.len() > MAX_MESSAGES {
            let message =
                format!("messages must hold 1 to {MAX_MESSAGES} messages, not {}", self.messages.len());
            return Err(ApiError::invalid("messages", message));
        }
        self.messages.iter().enumerate().map(|(i, m)| m.text(i)).collect()
    }
}

impl Message {
    fn text(&self, index: usize) -> Result<(String, String), ApiError> {
        let invalid = |why: String| ApiError::invalid("messages", format!("messages[{index}] {why}"));
        let role = match self.role.as_str() {
            "system" | "developer" => "system",
            role @ ("user" | "assistant") => role,
            role => return Err(invalid(format!("has the role {role:?}: use system, user or assistant"))),
        };
        let text = match &self.content {
            None => return Err(invalid("has no content".into())),
            Some(Content::Text(text)) => text.clone(),
            Some(Content::Parts(parts)) => {
                let mut text = String::new();
                for part in parts {
                    match (&*part.kind, &part.text) {
                        ("text", Some(t)) => text.push_str(t),
                        (kind, _) => {
                            return Err(invalid(format!(
                                "has a part of type {kind:?}: only text is supported"
                            )));
                        }
                    }
                }
                text
            }
        };
        Ok((role.to_owned(), text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(json: &str) -> Result<(SamplingParams, Vec<String>), String> {
        let body: ChatBody = parse(json.as_bytes()).map_err(|e| e.body().to_string())?;
        body.conversation().map_err(|e| e.body().to_string())?;
        body.common.sampling(16, 9).map_err(|e| e.body().to_string())
    }

    #[test]
    fn defaults_are_openais_and_extensions_are_taken() {
        let (params, stops) = chat(r#"{"messages":[{"role":"user","content":"hi"}]}"#).unwrap();
        assert_eq!((params.temperature, params.top_p, params.max_tokens, stops.len()), (1.0, 1.0, 16, 0));
        let (params, stops) = chat(
            r#"{"messages":[{"role":"user","content":[{"type":"text","text":"hi"}]}],
                "top_k":5,"min_p":0.1,"stop":["a","b"],"seed":-1,"max_completion_tokens":3,"unknown":1}"#,
        )
        .unwrap();
        assert_eq!((params.top_k, params.max_tokens, params.seed), (5, 3, u64::MAX));
        assert_eq!(stops, ["a", "b"]);
    }

    #[test]
    fn every_malformed_field_is_named() {
        let user = r#""messages":[{"role":"user","content":"hi"}]"#;
        for (fields, name) in [
            (r#""messages":[]"#.to_owned(), "messages"),
            (r#""messages":[{"role":"robot","content":"x"}]"#.to_owned(), "robot"),
            (r#""messages":[{"role":"user"}]"#.to_owned(), "no content"),
            (r#""messages":[{"role":"user","content":[{"type":"image_url"}]}]"#.to_owned(), "image_url"),
            (format!(r#"{user},"temperature":3"#), "temperature"),
            (format!(r#"{user},"top_p":-0.5"#), "top_p"),
            (format!(r#"{user},"top_k":-7"#), "top_k"),
            (format!(r#"{user},"max_tokens":0"#), "max_tokens"),
            (format!(r#"{user},"n":2"#), "n must be 1"),
            (format!(r#"{user},"stop":["","a"]"#), "stop"),
            (format!(r#"{user},"stop":["a","b","c","d","e"]"#), "stop"),
            (format!(r#"{user},"tools":[{{}}]"#), "tools"),
            (format!(r#"{user},"stream_options":{{"include_usage":true}}"#), "stream_options"),
            (format!(r#"{user},"response_format":{{"type":"json_object"}}"#), "response_format"),
            (format!(r#"{user},"temperature":"hot""#), "temperature"),
        ] {
            let error = chat(&format!("{{{fields}}}")).expect_err(&fields);
            assert!(error.contains(name), "{fields}: {error}");
        }
        assert!(chat("{").is_err());
    }
}
