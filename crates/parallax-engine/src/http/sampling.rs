//! Sampling fields that OpenAI's endpoints share, with vLLM's extensions, as the engine's parameters.

mod masks;

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::{Fields, wrong};
use crate::sampling::SamplingParams;
pub(super) use masks::{Masked, Masks};

/// Stop strings of a request. OpenAI takes 4, vLLM any number.
const MAX_STOPS: usize = 16;
/// Tokens of a request that end its answer; each token that is chosen is compared with all of them.
const MAX_STOP_IDS: usize = 1024;
/// Tokens of a request whose likelihood is changed.
const MAX_BIASES: usize = 1024;
/// Tokens that alone may be chosen.
const MAX_ALLOWED: usize = 65_536;
/// Words that an answer must not have, and bytes of one.
const MAX_BAD_WORDS: usize = 256;
const MAX_BAD_WORD_BYTES: usize = 256;
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
    /// Tokens that alone may be chosen; `None`: all.
    pub allowed: Option<Vec<u32>>,
    /// Words that the answer must not have.
    pub bad_words: Vec<String>,
}

impl Sampling {
    /// One answer under these parameters, as long as it gets.
    pub(super) fn new(params: SamplingParams) -> Self {
        Self {
            params,
            max_tokens: None,
            stops: Vec::new(),
            n: 1,
            ignore_eos: false,
            include_stop: false,
            allowed: None,
            bad_words: Vec::new(),
        }
    }
}

/// Reads the fields; `defaults` and `fresh_seed` are used where the client gives none.
///
/// # Errors
/// 400 naming the field that is out of range.
pub(super) fn read(
    body: &Fields<'_>,
    defaults: &SamplingParams,
    fresh_seed: u64,
) -> Result<Sampling, ApiError> {
    let top_k = body.integer("top_k", -1..=i64::from(i32::MAX))?;
    let n = body.count("n", 1, MAX_CHOICES)?.unwrap_or(1);
    if let Some(best_of) = body.count("best_of", 1, MAX_CHOICES)?
        && best_of != n
    {
        return Err(body.fault("best_of", format!("must equal n ({n}): this server returns what it makes")));
    }
    body.unsupported("use_beam_search", &[json!(false)])?;
    body.unsupported("length_penalty", &[json!(1), json!(1.0)])?;
    body.unsupported("detokenize", &[json!(true)])?;
    body.unsupported("skip_special_tokens", &[json!(true)])?;
    body.unsupported("return_tokens_as_token_ids", &[json!(false)])?;
    let temperature = body.number("temperature", 0.0..=2.0)?.unwrap_or(defaults.temperature);
    let params = SamplingParams {
        temperature,
        top_p: body.number("top_p", f32::MIN_POSITIVE..=1.0)?.unwrap_or(defaults.top_p),
        top_k: top_k.map_or(defaults.top_k, |k| usize::try_from(k).unwrap_or(0)),
        min_p: body.number("min_p", 0.0..=0.999)?.unwrap_or(defaults.min_p),
        typical_p: body.number("typical_p", f32::MIN_POSITIVE..=1.0)?.unwrap_or(1.0),
        repetition_penalty: body
            .number("repetition_penalty", 0.01..=10.0)?
            .unwrap_or(defaults.repetition_penalty),
        presence_penalty: body.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: body.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: biases(body)?,
        seed: body.integer("seed", i64::MIN..=i64::MAX)?.map_or(fresh_seed, i64::cast_unsigned),
        min_tokens: body.count("min_tokens", 0, MAX_TOKENS)?.unwrap_or(0),
        stop_ids: stop_ids(body)?,
        ..SamplingParams::default()
    };
    // Both are read, so that both are checked; the newer name counts.
    let old = body.count("max_tokens", 1, MAX_TOKENS)?;
    let max_tokens = body.count("max_completion_tokens", 1, MAX_TOKENS)?.or(old);
    if max_tokens.is_some_and(|most| params.min_tokens > most) {
        return Err(body.fault("min_tokens", "must not be above max_tokens"));
    }
    Ok(Sampling {
        max_tokens,
        stops: body.texts("stop", MAX_STOPS)?,
        n,
        ignore_eos: body.flag("ignore_eos")?.unwrap_or(false),
        include_stop: body.flag("include_stop_str_in_output")?.unwrap_or(false),
        allowed: allowed(body)?,
        bad_words: bad_words(body)?,
        ..Sampling::new(params)
    })
}

/// vLLM's `truncate_prompt_tokens`: of each prompt that many tokens are kept, the last ones. -1 keeps what the context of
/// `context_tokens` holds beside `max_tokens`, at least half of it.
///
/// # Errors
/// 400 when it is no such number.
pub(super) fn truncate(
    body: &Fields<'_>,
    context_tokens: usize,
    max_tokens: Option<usize>,
    prompts: &mut [Vec<u32>],
) -> Result<(), ApiError> {
    let most = match body.integer("truncate_prompt_tokens", -1..=MAX_TOKENS)? {
        None => return Ok(()),
        Some(0) => return Err(body.fault("truncate_prompt_tokens", "must be -1 or at least 1, not 0")),
        Some(given) => usize::try_from(given)
            .unwrap_or_else(|_| context_tokens - max_tokens.unwrap_or(1).min(context_tokens / 2)),
    };
    for prompt in prompts {
        prompt.drain(..prompt.len().saturating_sub(most));
    }
    Ok(())
}

/// vLLM's `stop_token_ids`.
fn stop_ids(body: &Fields<'_>) -> Result<Vec<u32>, ApiError> {
    let ids = ids(body, "stop_token_ids")?;
    if ids.len() > MAX_STOP_IDS {
        let why = format!("takes up to {MAX_STOP_IDS} tokens, not {}", ids.len());
        return Err(body.fault("stop_token_ids", why));
    }
    Ok(ids)
}

/// vLLM's `allowed_token_ids`.
fn allowed(body: &Fields<'_>) -> Result<Option<Vec<u32>>, ApiError> {
    if !body.has("allowed_token_ids") {
        return Ok(None);
    }
    let ids = ids(body, "allowed_token_ids")?;
    if ids.is_empty() || ids.len() > MAX_ALLOWED {
        let why = format!("must hold 1 to {MAX_ALLOWED} tokens, not {}", ids.len());
        return Err(body.fault("allowed_token_ids", why));
    }
    Ok(Some(ids))
}

/// vLLM's `bad_words`.
fn bad_words(body: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    let words = body.texts("bad_words", MAX_BAD_WORDS)?;
    if words.iter().any(|word| word.len() > MAX_BAD_WORD_BYTES) {
        return Err(body.fault("bad_words", format!("takes words of up to {MAX_BAD_WORD_BYTES} bytes")));
    }
    Ok(words)
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

    fn of_the_model() -> SamplingParams {
        SamplingParams { temperature: 1.0, ..SamplingParams::default() }
    }

    #[test]
    fn what_a_request_does_not_say_is_the_models() {
        let defaults = SamplingParams {
            temperature: 0.6,
            top_p: 0.95,
            top_k: 20,
            repetition_penalty: 1.1,
            ..of_the_model()
        };
        let read = |body: Value| read(&Fields::of(&body, "").unwrap(), &defaults, 9).unwrap().params;
        let silent = read(json!({}));
        assert_eq!(
            (silent.temperature, silent.top_p, silent.top_k, silent.repetition_penalty),
            (0.6, 0.95, 20, 1.1)
        );
        let said = read(json!({"temperature": 1, "top_p": 1, "top_k": -1, "repetition_penalty": 1}));
        assert_eq!((said.temperature, said.top_p, said.top_k, said.repetition_penalty), (1.0, 1.0, 0, 1.0));
    }

    fn sampling(body: &Value) -> Result<Sampling, ApiError> {
        read(&Fields::of(body, "").unwrap(), &of_the_model(), 9)
    }

    #[test]
    fn defaults_are_openais_and_extensions_are_taken() {
        let plain = sampling(&json!({})).unwrap();
        assert_eq!((plain.params.temperature, plain.params.top_p, plain.params.seed), (1.0, 1.0, 9));
        assert_eq!((plain.n, plain.max_tokens), (1, None));
        let full = sampling(&json!({"top_k": -1, "min_p": 0.1, "stop": "a", "seed": -1, "max_tokens": 9,
            "max_completion_tokens": 3, "logit_bias": {"7": -100}, "n": 2, "best_of": 2, "unknown": 1,
            "allowed_token_ids": [3, 5], "bad_words": ["x"], "length_penalty": 1.0, "detokenize": true}))
        .unwrap();
        assert_eq!((full.allowed, full.bad_words), (Some(vec![3, 5]), vec!["x".to_owned()]));
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
            (json!({"stop_token_ids": vec![1; MAX_STOP_IDS + 1]}), "stop_token_ids"),
            (json!({"min_tokens": 5, "max_tokens": 4}), "min_tokens"),
            (json!({"seed": 1.5}), "seed"),
            (json!({"allowed_token_ids": []}), "allowed_token_ids"),
            (json!({"allowed_token_ids": vec![1; MAX_ALLOWED + 1]}), "allowed_token_ids"),
            (json!({"allowed_token_ids": [1, -1]}), "allowed_token_ids[1]"),
            (json!({"bad_words": ["a", ""]}), "bad_words"),
            (json!({"bad_words": ["a".repeat(MAX_BAD_WORD_BYTES + 1)]}), "bad_words"),
            (json!({"length_penalty": 0.5}), "length_penalty"),
            (json!({"detokenize": false}), "detokenize"),
            (json!({"skip_special_tokens": false}), "skip_special_tokens"),
            (json!({"return_tokens_as_token_ids": true}), "return_tokens_as_token_ids"),
        ] {
            let error = sampling(&body).expect_err(&body.to_string()).to_string();
            assert!(error.contains(name), "{body}: {error}");
        }
    }

    #[test]
    fn prompts_are_cut_to_their_last_tokens() {
        let cut = |asked: Value, max_tokens| {
            let body = json!({"truncate_prompt_tokens": asked});
            let mut prompts: Vec<Vec<u32>> = vec![(0..30).collect(), vec![7]];
            truncate(&Fields::of(&body, "").unwrap(), 20, max_tokens, &mut prompts)?;
            assert_eq!((prompts[0].last(), &prompts[1]), (Some(&29), &vec![7]));
            Ok::<_, ApiError>(prompts[0].len())
        };
        assert_eq!(cut(Value::Null, None).unwrap(), 30);
        assert_eq!((cut(json!(4), None).unwrap(), cut(json!(99), None).unwrap()), (4, 30));
        let rooms = [None, Some(5), Some(15), Some(1 << 20)].map(|most| cut(json!(-1), most).unwrap());
        assert_eq!(rooms, [19, 15, 10, 10]);
        for wrong in [json!(0), json!(-2), json!("all")] {
            assert!(cut(wrong, None).unwrap_err().to_string().contains("truncate_prompt_tokens"));
        }
    }
}
