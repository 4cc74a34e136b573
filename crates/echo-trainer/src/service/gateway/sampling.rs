//! Sampling requests: from JSON to a task, from its answers to protobuf.

use std::collections::VecDeque;
use std::sync::Arc;

use prost::Message as _;
use serde::Deserialize;

use super::Inner;
use super::promises::Outcome;
use super::proto::{SampleResponse, SampledSequence, TopkLogprobs, bytes_of};
use super::sampler::{SampleError, SampleTask, SampledAnswers, Stop};
use super::store::SavedPath;

/// Most likeliest tokens that are given with each token.
const MOST_TOP_LOGPROBS: usize = 64;
/// Most stop texts or tokens: each is looked for with every token of every answer.
const MOST_STOPS: usize = 64;

/// One part of a prompt.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part {
    EncodedText {
        tokens: Vec<u32>,
    },
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
struct Prompt {
    chunks: Vec<Part>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum StopField {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
}

#[derive(Debug, Deserialize)]
struct Params {
    max_tokens: Option<usize>,
    seed: Option<u64>,
    stop: Option<StopField>,
    #[serde(default = "one")]
    temperature: f32,
    #[serde(default = "unlimited")]
    top_k: i64,
    #[serde(default = "one")]
    top_p: f32,
}

fn one() -> f32 {
    1.0
}

fn unlimited() -> i64 {
    -1
}

fn one_sample() -> usize {
    1
}

/// The body of `asample`.
#[derive(Debug, Deserialize)]
pub(super) struct SampleBody {
    #[serde(default = "one_sample")]
    num_samples: usize,
    prompt: Prompt,
    sampling_params: Params,
    pub(super) base_model: Option<String>,
    pub(super) model_path: Option<String>,
    pub(super) sampling_session_id: Option<String>,
    pub(super) seq_id: Option<u64>,
    prompt_logprobs: Option<bool>,
    #[serde(default)]
    topk_prompt_logprobs: u32,
    #[serde(default)]
    topk_sample_logprobs: usize,
    target_prompt_logprobs: Option<serde_json::Value>,
    #[serde(default)]
    prompt_alt_tokens_k: u32,
    prompt_logprobs_last_n: Option<usize>,
    record_stability_info: Option<bool>,
}

/// Why a sampling request was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum SampleFault {
    #[error("{field} is not served")]
    NotServed { field: &'static str },
    #[error("num_samples is {got}, 1 to {limit} are allowed")]
    Samples { got: usize, limit: usize },
    #[error("the prompt has parts that are not text; only text is served")]
    NotText,
    #[error("the prompt has {got} tokens, the context holds {limit}; shorten it")]
    TooLong { got: usize, limit: usize },
    #[error("topk_sample_logprobs is {got}, at most {limit} are given")]
    TopLogprobs { got: usize, limit: usize },
    #[error("stop has {got} texts or tokens, at most {limit} are looked for")]
    Stops { got: usize, limit: usize },
    #[error(
        "prompt_logprobs_last_n is {got}, 1 to {limit} are allowed with this prompt, and prompt_logprobs must be set"
    )]
    LastN { got: usize, limit: usize },
}

/// What a sampling request may ask for.
#[derive(Debug, Clone, Copy)]
pub(super) struct SampleLimits {
    pub(super) samples: usize,
    /// Tokens of a prompt.
    pub(super) context_tokens: usize,
}

/// A task, and what of its answers the client wants to read.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) task: SampleTask,
    wanted: Wanted,
}

/// What of the answers the client wants to read.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Wanted {
    prompt_tokens: usize,
    prompt_logprobs: bool,
    last_n: Option<usize>,
    top_logprobs: usize,
}

impl SampleBody {
    /// The task, for an adapter that is still to be named. `seed` counts when the client gives none.
    pub(super) fn into_task(self, seed: u64, limits: &SampleLimits) -> Result<Asked, SampleFault> {
        let not_served = [
            ("topk_prompt_logprobs", self.topk_prompt_logprobs > 0),
            ("target_prompt_logprobs", self.target_prompt_logprobs.is_some_and(|v| !v.is_null())),
            ("prompt_alt_tokens_k", self.prompt_alt_tokens_k > 0),
            ("record_stability_info", self.record_stability_info == Some(true)),
        ];
        if let Some((field, _)) = not_served.into_iter().find(|(_, asked)| *asked) {
            return Err(SampleFault::NotServed { field });
        }
        if self.num_samples == 0 || self.num_samples > limits.samples {
            return Err(SampleFault::Samples { got: self.num_samples, limit: limits.samples });
        }
        if self.topk_sample_logprobs > MOST_TOP_LOGPROBS {
            return Err(SampleFault::TopLogprobs {
                got: self.topk_sample_logprobs,
                limit: MOST_TOP_LOGPROBS,
            });
        }
        let params = self.sampling_params;
        let n_stops = match &params.stop {
            Some(StopField::Texts(texts)) => texts.len(),
            Some(StopField::Tokens(tokens)) => tokens.len(),
            None | Some(StopField::Text(_)) => 1,
        };
        if n_stops > MOST_STOPS {
            return Err(SampleFault::Stops { got: n_stops, limit: MOST_STOPS });
        }
        let mut prompt = Vec::new();
        for part in self.prompt.chunks {
            let Part::EncodedText { tokens } = part else { return Err(SampleFault::NotText) };
            prompt.extend(tokens);
        }
        if prompt.len() > limits.context_tokens {
            return Err(SampleFault::TooLong { got: prompt.len(), limit: limits.context_tokens });
        }
        let prompt_logprobs = self.prompt_logprobs == Some(true);
        if let Some(got) = self.prompt_logprobs_last_n {
            let limit = prompt.len().saturating_sub(1);
            if !prompt_logprobs || got == 0 || got > limit {
                return Err(SampleFault::LastN { got, limit });
            }
        }
        let wanted = Wanted {
            prompt_tokens: prompt.len(),
            prompt_logprobs,
            last_n: self.prompt_logprobs_last_n,
            top_logprobs: self.topk_sample_logprobs,
        };
        let task = SampleTask {
            adapter: None,
            prompt,
            samples: self.num_samples,
            max_tokens: params.max_tokens,
            temperature: params.temperature,
            top_k: usize::try_from(params.top_k).unwrap_or(0),
            top_p: params.top_p,
            seed: params.seed.unwrap_or(seed),
            stop: match params.stop {
                None => Stop::Model,
                Some(StopField::Text(text)) => Stop::Texts(vec![text]),
                Some(StopField::Texts(texts)) if texts.is_empty() => Stop::Tokens(Vec::new()),
                Some(StopField::Texts(texts)) => Stop::Texts(texts),
                Some(StopField::Tokens(tokens)) => Stop::Tokens(tokens),
            },
            prompt_logprobs,
            top_logprobs: self.topk_sample_logprobs,
        };
        Ok(Asked { task, wanted })
    }
}

impl Wanted {
    /// The answers as the client reads them.
    fn encode(self, answers: &SampledAnswers) -> Vec<u8> {
        let k = self.top_logprobs;
        let sequences = answers.answers.iter().map(|answer| SampledSequence {
            stop_reason: i32::from(!answer.stopped),
            tokens: bytes_of(answer.tokens.iter().map(|t| *t as i32), i32::to_le_bytes),
            logprobs: Some(bytes_of(answer.logprobs.iter().copied(), f32::to_le_bytes)),
            topk_sampled_logprobs: (k > 0).then(|| {
                // A vocabulary may have fewer tokens than were asked for.
                let cells: Vec<(u32, f32)> = answer
                    .top
                    .iter()
                    .flat_map(|row| row.iter().copied().chain(std::iter::repeat((0, -99999.0))).take(k))
                    .collect();
                TopkLogprobs {
                    token_ids: bytes_of(cells.iter().map(|(id, _)| *id as i32), i32::to_le_bytes),
                    logprobs: bytes_of(cells.iter().map(|(_, logprob)| *logprob), f32::to_le_bytes),
                    k: k as u32,
                    length: answer.top.len() as u32,
                }
            }),
        });
        let prompt_logprobs = self.prompt_logprobs.then(|| {
            // The first token has no log-probability.
            let all = std::iter::once(f32::NAN).chain(answers.prompt_logprobs.iter().copied());
            let skipped = self.last_n.map_or(0, |n| self.prompt_tokens.saturating_sub(n));
            let wanted = all.enumerate().map(|(i, l)| if i < skipped { f32::NAN } else { l });
            bytes_of(wanted, f32::to_le_bytes)
        });
        SampleResponse {
            sequences: sequences.collect(),
            prompt_logprobs,
            prompt_cache_hit_tokens: i32::try_from(answers.cached_tokens).unwrap_or(i32::MAX),
        }
        .encode_to_vec()
    }
}

/// Samples with the weights of `path`, and keeps the promise. Answers beyond those that the sampler takes at a time wait.
pub(super) async fn sample(inner: Arc<Inner>, promise: String, path: Option<SavedPath>, asked: Asked) {
    let Asked { mut task, wanted } = asked;
    let answers = async {
        let samples = u32::try_from(task.samples).unwrap_or(u32::MAX);
        let _places = inner.samples.acquire_many(samples).await.expect("nobody closes it");
        let answers = match path {
            None => inner.sampler.sample(task),
            Some(path) => {
                // Held until the request has its adapter.
                let mut resident = inner.resident.lock().await;
                task.adapter = Some(make_resident(&inner, &mut resident, path).await?);
                inner.sampler.sample(task)
            }
        };
        answers.await
    };
    let outcome = match answers.await {
        Ok(answers) => Outcome::Proto(wanted.encode(&answers).into()),
        Err(error) => {
            let user = matches!(error, SampleError::Invalid { .. });
            Outcome::Failed { message: error.to_string(), user }
        }
    };
    inner.promises.keep(&promise, outcome);
}

/// The sampler forgets an adapter that is saved anew, or deleted.
pub(super) fn forget(inner: &Inner, resident: &mut VecDeque<String>, path: &SavedPath) {
    let name = path.to_string();
    if let Some(at) = resident.iter().position(|known| *known == name) {
        resident.remove(at);
        inner.sampler.remove(&name);
    }
}

/// Sees to it that the sampler has the adapter; its name.
async fn make_resident(
    inner: &Arc<Inner>,
    resident: &mut VecDeque<String>,
    path: SavedPath,
) -> Result<String, SampleError> {
    let name = path.to_string();
    if let Some(at) = resident.iter().position(|known| *known == name) {
        resident.remove(at);
    } else {
        let adapter = inner.on_disk(move |store| store.load_adapter(&path)).await;
        let adapter = adapter.map_err(|e| SampleError::Invalid {
            reason: format!("{e}; weights saved without a name are dropped when newer ones are saved"),
        })?;
        let added = inner.sampler.add(&name, adapter).await;
        added.map_err(|reason| SampleError::Failed { reason })?;
    }
    resident.push_back(name.clone());
    while resident.len() > inner.config.resident_adapters.max(1) {
        let oldest = resident.pop_front().expect("more than one");
        inner.sampler.remove(&oldest);
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::sampler::SampledAnswer;
    use super::*;

    fn asked(change: &Value) -> Result<Asked, SampleFault> {
        let mut body = json!({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]},
            {"type": "encoded_text", "tokens": [3]}]}, "sampling_params": {}});
        for (key, value) in change.as_object().unwrap() {
            body[key] = value.clone();
        }
        let limits = SampleLimits { samples: 4, context_tokens: 3 };
        serde_json::from_value::<SampleBody>(body).unwrap().into_task(9, &limits)
    }

    #[test]
    fn requests_become_tasks() {
        let plain = asked(&json!({})).unwrap().task;
        assert_eq!((&plain.prompt[..], plain.samples, plain.seed, plain.top_k), (&[1, 2, 3][..], 1, 9, 0));
        assert_eq!((plain.temperature, plain.top_p, plain.stop), (1.0, 1.0, Stop::Model));
        let stop =
            |stop: Value| asked(&json!({"sampling_params": {"stop": stop, "seed": 5}})).unwrap().task.stop;
        assert_eq!(stop(json!([])), Stop::Tokens(vec![]), "nothing ends it but the limit");
        assert_eq!(stop(json!([7])), Stop::Tokens(vec![7]));
        assert_eq!(stop(json!("\n")), Stop::Texts(vec!["\n".to_owned()]));
        assert_eq!(stop(json!(["a", "b"])), Stop::Texts(vec!["a".to_owned(), "b".to_owned()]));
        assert!(serde_json::from_value::<SampleBody>(json!({"prompt": "text"})).is_err());
    }

    #[test]
    fn what_is_not_served_is_named() {
        for (change, words) in [
            (json!({"topk_prompt_logprobs": 2}), "topk_prompt_logprobs is not served"),
            (json!({"prompt_alt_tokens_k": 1}), "prompt_alt_tokens_k"),
            (json!({"num_samples": 5}), "num_samples is 5, 1 to 4"),
            (json!({"num_samples": 0}), "num_samples is 0"),
            (json!({"prompt": {"chunks": [{"type": "image", "data": "x"}]}}), "not text"),
            (
                json!({"prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3, 4]}]}}),
                "4 tokens, the context holds 3",
            ),
            (json!({"topk_sample_logprobs": 65}), "is 65, at most 64"),
            (json!({"sampling_params": {"stop": vec!["a"; 65]}}), "stop has 65"),
            (json!({"sampling_params": {"stop": vec![1; 65]}}), "at most 64 are looked for"),
            (json!({"prompt_logprobs_last_n": 1}), "prompt_logprobs must be set"),
            (json!({"prompt_logprobs_last_n": 3, "prompt_logprobs": true}), "is 3, 1 to 2"),
        ] {
            let fault = asked(&change).unwrap_err().to_string();
            assert!(fault.contains(words), "{fault}");
        }
    }

    #[test]
    fn answers_are_arrays_of_bytes() {
        let asked =
            asked(&json!({"prompt_logprobs": true, "prompt_logprobs_last_n": 1, "topk_sample_logprobs": 2}))
                .unwrap();
        let answer = SampledAnswer {
            tokens: vec![4, 5],
            logprobs: vec![-0.5, -0.25],
            stopped: true,
            top: vec![vec![(4, -0.5), (1, -2.0)], vec![(5, -0.25)]],
        };
        let answers =
            SampledAnswers { answers: vec![answer], prompt_logprobs: vec![-1.0, -2.0], cached_tokens: 2 };
        let got = SampleResponse::decode(&asked.wanted.encode(&answers)[..]).unwrap();
        let floats = |bytes: &[u8]| -> Vec<f32> {
            bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
        };
        let prompt = floats(got.prompt_logprobs.as_deref().unwrap());
        assert!(prompt[0].is_nan() && prompt[1].is_nan() && prompt[2] == -2.0, "{prompt:?}");
        let sequence = &got.sequences[0];
        assert_eq!((sequence.stop_reason, got.prompt_cache_hit_tokens), (0, 2));
        assert_eq!(sequence.tokens, [4, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(floats(sequence.logprobs.as_deref().unwrap()), [-0.5, -0.25]);
        let top = sequence.topk_sampled_logprobs.as_ref().unwrap();
        assert_eq!((top.k, top.length, floats(&top.logprobs)[3]), (2, 2, -99999.0));
    }
}
