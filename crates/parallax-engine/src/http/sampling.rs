//! Sampling fields that OpenAI's endpoints share, with vLLM's extensions, as the engine's parameters.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use crate::sampling::SamplingParams;

/// Stop strings of a request. OpenAI takes 4, vLLM any number.
const MAX_STOPS: usize = 16;
/// Tokens of a request whose likelihood is changed.
const MAX_BIASES: usize = 1024;
/// Choices of a request.
pub(super) const MAX_CHOICES: i64 = 64;
/// Alternatives that are reported for each token.
pub(super) const MAX_TOP_LOGPROBS: i64 = 20;
/// More tokens than any context holds.
pub(super) const MAX_TOKENS: i64 = 1 << 30;

/// How an answer is made, before the prompt is known.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sampling {
    /// Everything but `max_tokens`, which depends on the prompt when it is not given.
    pub params: SamplingParams,
    pub max_tokens: Option<usize>,
    pub stops: Vec<String>,
    pub n: usize,
    /// Do not end at the model's own stop tokens.
    pub ignore_eos: bool,
    /// Show the stop string that ended the answer.
    pub include_stop: bool,
}

/// Reads the fields; `fresh_seed` is used when the client gives none.
///
/// # Errors
/// 400 naming the field that is out of range.
pub(super) fn read(body: &Fields<'_>, fresh_seed: u64) -> Result<Sampling, ApiError> {
    let top_k = body.integer("top_k", -1..=i64::from(i32::MAX))?.unwrap_or(0);
    let n = body.count("n", 1, MAX_CHOICES)?.unwrap_or(1);
    if let Some(best_of) = body.count("best_of", 1, MAX_CHOICES)?
        && best_of != n
    {
        return Err(body.fault("best_of", format!("must equal n ({n}): this server returns what it makes")));
    }
    body.unsupported("use_beam_search", &[json!(false)])?;
    let temperature = body.number("temperature", 0.0..=2.0)?.unwrap_or(1.0);
    let params = SamplingParams {
        temperature,
        top_p: body.number("top_p", f32::MIN_POSITIVE..=1.0)?.unwrap_or(1.0),
        top_k: usize::try_from(top_k).unwrap_or(0),
        min_p: body.number("min_p", 0.0..=0.999)?.unwrap_or(0.0),
        typical_p: body.number("typical_p", f32::MIN_POSITIVE..=1.0)?.unwrap_or(1.0),
        repetition_penalty: body.number("repetition_penalty", 0.01..=10.0)?.unwrap_or(1.0),
        presence_penalty: body.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: body.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: biases(body)?,
        seed: body.integer("seed", i64::MIN..=i64::MAX)?.map_or(fresh_seed, i64::cast_unsigned),
        min_tokens: body.count("min_tokens", 0, MAX_TOKENS)?.unwrap_or(0),
        stop_ids: ids(body, "stop_token_ids")?,
        ..SamplingParams::default()
    };
    // Both are read, so that both are checked; the newer name counts.
    let old = body.count("max_tokens", 1, MAX_TOKENS)?;
    let max_tokens = body.count("max_completion_tokens", 1, MAX_TOKENS)?.or(old);
    if max_tokens.is_some_and(|most| params.min_tokens > most) {
        return Err(body.fault("min_tokens", "must not be above max_tokens"));
    }
    Ok(Sampling {
        params,
        max_tokens,
        stops: body.texts("stop", MAX_STOPS)?,
        n,
        ignore_eos: body.flag("ignore_eos")?.unwrap_or(false),
        include_stop: body.flag("include_stop_str_in_output")?.unwrap_or(false),
    })
}

/// `{"token id": -100..100}`.
fn biases(body: &Fields<'_>) -> Result<BTreeMap<u32, f32>, ApiError> {
    let Some(value) = body.get("logit_bias") else { return Ok(BTreeMap::new()) };
    let Value::Object(map) = value else {
        return Err(wrong(&body.path("logit_bias"), "an object of token ids and numbers", value));
    };
    if map.len() > MAX_BIASES {
        return Err(body.fault("logit_bias", format!("takes up to {MAX_BIASES} tokens, not {}", map.len())));
    }
    let fields = Fields::of(value, "logit_bias")?;
    map.keys()
        .map(|key| {
            let id: u32 = key.parse().map_err(|_| {
                body.fault("logit_bias", format!("has the key {key:?}, which is no token id"))
            })?;
            let bias = fields.number(key, -100.0..=100.0)?.ok_or_else(|| fields.missing(key))?;
            Ok((id, bias))
        })
        .collect()
}

/// A list of token ids.
pub(super) fn ids(body: &Fields<'_>, name: &str) -> Result<Vec<u32>, ApiError> {
    let items = body.list(name)?.unwrap_or_default();
    items.into_iter().map(|(path, item)| token_id(&path, item)).collect()
}

/// One token id.
pub(super) fn token_id(path: &str, value: &Value) -> Result<u32, ApiError> {
    let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
    id.ok_or_else(|| ApiError::invalid(Some(path), format!("{path} must be a token id, not {value}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling(body: &Value) -> Result<Sampling, ApiError> {
        read(&Fields::of(body, "").unwrap(), 9)
    }

    #[test]
    fn defaults_are_openais_and_extensions_are_taken() {
        let plain = sampling(&json!({})).unwrap();
        assert_eq!((plain.params.temperature, plain.params.top_p, plain.params.seed), (1.0, 1.0, 9));
        assert_eq!((plain.n, plain.max_tokens), (1, None));
        let full = sampling(&json!({"top_k": -1, "min_p": 0.1, "stop": "a", "seed": -1, "max_tokens": 9,
            "max_completion_tokens": 3, "logit_bias": {"7": -100}, "n": 2, "best_of": 2, "unknown": 1}))
        .unwrap();
        assert_eq!((full.params.top_k, full.max_tokens, full.params.seed), (0, Some(3), u64::MAX));
        assert_eq!((full.stops.len(), full.n, full.params.logit_bias[&7]), (1, 2, -100.0));
    }

    #[test]
    fn fields_out_of_range_are_named() {
        for (body, name) in [
            (json!({"temperature": 3}), "temperature"),
            (json!({"top_p": 0}), "top_p"),
            (json!({"top_k": -2}), "top_k"),
            (json!({"best_of": 3}), "best_of"),
            (json!({"logit_bias": {"x": 1}}), "logit_bias"),
            (json!({"logit_bias": {"1": 101}}), "logit_bias.1"),
            (json!({"logit_bias": [1]}), "logit_bias"),
            (json!({"stop": ["", "a"]}), "stop"),
            (json!({"stop": [1]}), "stop[0]"),
            (json!({"stop_token_ids": [-1]}), "stop_token_ids[0]"),
            (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens"),
            (json!({"seed": 1.5}), "seed"),
        ] {
            let error = sampling(&body).expect_err(&body.to_string()).to_string();
            assert!(error.contains(name), "{body}: {error}");
        }
    }
}
