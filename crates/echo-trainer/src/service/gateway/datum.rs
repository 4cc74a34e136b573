//! Training requests as sequences and a loss. Pure.
//!
//! A datum is an input of T tokens with T targets: row t predicts target t from the input up to and with its token t. What is
//! served are targets that are the input shifted by one, so that input and last target are one sequence of T + 1 tokens. A row
//! without weight or advantage may have any target, as clients fill up prompts with zeros; its log-probability is not a number.
//! Losses are sums over tokens, as Tinker's documentation gives them, with `l` the log-probability of a target, `q` the one
//! it was sampled with, `r = exp(l - q)` and `A` its advantage:
//!
//! | `loss_fn` | loss | inputs besides `target_tokens` |
//! |---|---|---|
//! | `cross_entropy` | `-w l` | `weights` w |
//! | `importance_sampling` | `-r A` | `logprobs` q, `advantages` A |
//! | `ppo` | `-min(r A, clip(r, low, high) A)` | the same |
//! | `cispo` | `-sg(clip(r, low, high)) A l` | the same |
//!
//! `loss_fn_config` may give `clip_low_threshold` (0.8) and `clip_high_threshold` (1.2).

use bytes::Bytes;
use prost::Message as _;

use super::proto::{DType, Datum, ForwardBackwardRequest, Tensor};
use crate::loss::config::{Normaliser, Surrogate};
use crate::loss::{LossConfig, PolicyTargets};

/// What a request must keep to.
#[derive(Debug, Clone, Copy)]
pub(super) struct DatumLimits {
    /// Tokens of the vocabulary.
    pub(super) vocabulary: u32,
    /// Tokens of one sequence, its last target included.
    pub(super) context_tokens: usize,
    /// Tokens of all sequences together.
    pub(super) batch_tokens: usize,
}

/// One sequence with what the loss compares its rows with: T + 1 tokens, T rows.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Sequence {
    pub(super) tokens: Vec<u32>,
    /// Log-probabilities as sampled; none for cross entropy.
    pub(super) sampled: Option<Vec<f64>>,
    /// Advantages, or weights.
    pub(super) advantages: Vec<f64>,
    /// Rows whose targets are other tokens than those that follow; they have no weight.
    pub(super) unscored: Vec<usize>,
}

/// What to compute.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Batch {
    pub(super) sequences: Vec<Sequence>,
    pub(super) loss: LossConfig,
    /// Whether gradients are left alone.
    pub(super) forward_only: bool,
}

/// Why a training request was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub(super) enum DatumError {
    #[error("the body is not a forward_backward request in protobuf: {0}")]
    Body(#[from] prost::DecodeError),
    #[error("loss_fn {name:?} is not served; use cross_entropy, importance_sampling, ppo or cispo")]
    Loss { name: String },
    #[error("loss_fn_config {name:?} does not belong to {loss}; {expected}")]
    Config { name: String, loss: String, expected: &'static str },
    #[error("clip thresholds {low} and {high} must be 0 <= low <= 1 <= high, and high above 0")]
    Thresholds { low: f64, high: f64 },
    #[error("a request needs at least one datum with at least one token")]
    Empty,
    #[error("datum {index}: only text is served, no images or sound")]
    NotText { index: usize },
    #[error("datum {index}: loss_fn_inputs has no {name:?}, which {loss} needs")]
    Missing { index: usize, name: &'static str, loss: String },
    #[error(
        "datum {index}: {name} has {got} bytes of {dtype} in shape {shape:?}; {needed} dense values are expected"
    )]
    Shape {
        index: usize,
        name: &'static str,
        got: usize,
        dtype: &'static str,
        shape: Vec<i64>,
        needed: usize,
    },
    #[error("datum {index}: {name} is sparse; send it dense")]
    Sparse { index: usize, name: &'static str },
    #[error("datum {index}: {name}[{row}] is {value}, which is no {expected}")]
    Value { index: usize, name: &'static str, row: usize, value: f64, expected: &'static str },
    #[error(
        "datum {index}: target_tokens[{row}] is {target} but the input goes on with {next}; only targets that are the input shifted by one are served, others where weight or advantage is 0"
    )]
    NotShifted { index: usize, row: usize, target: u32, next: u32 },
    #[error("datum {index}: {got} tokens, but this model's sequences have at most {limit}")]
    TooLong { index: usize, got: usize, limit: usize },
    #[error("{got} tokens in one request, at most {limit} are taken; send fewer datums at once")]
    TooMany { got: usize, limit: usize },
}

/// Reads the message alone, so that its place in the order is known whatever it holds.
pub(super) fn message(body: Bytes) -> Result<ForwardBackwardRequest, DatumError> {
    Ok(ForwardBackwardRequest::decode(body)?)
}

impl Batch {
    /// Checks everything.
    pub(super) fn read(request: &ForwardBackwardRequest, limits: &DatumLimits) -> Result<Self, DatumError> {
        let loss = loss(request)?;
        if request.data.is_empty() {
            return Err(DatumError::Empty);
        }
        let mut sequences = Vec::with_capacity(request.data.len());
        let mut tokens = 0_usize;
        for (index, datum) in request.data.iter().enumerate() {
            let sequence = Reader { index, datum, loss: &request.loss_fn, limits }.sequence()?;
            tokens += sequence.tokens.len();
            sequences.push(sequence);
        }
        if tokens > limits.batch_tokens {
            return Err(DatumError::TooMany { got: tokens, limit: limits.batch_tokens });
        }
        Ok(Self { sequences, loss, forward_only: request.forward_only })
    }
}

impl Sequence {
    /// What the loss compares this sequence's rows with, together with those of the others in its micro-batch. Rows without
    /// weight or advantage are left out, where each of the losses is 0.
    pub(super) fn targets(part: &[Self]) -> PolicyTargets {
        let rows = || part.iter().flat_map(|s| &s.advantages);
        let mut offsets = vec![0];
        offsets.extend(part.iter().scan(0, |end, s| {
            *end += s.advantages.len();
            Some(*end)
        }));
        let sampled: Option<Vec<f64>> =
            part.iter().map(|s| s.sampled.clone()).collect::<Option<Vec<_>>>().map(|lists| lists.concat());
        PolicyTargets {
            offsets,
            mask: rows().map(|a| *a != 0.0).collect(),
            sampled,
            proximal: None,
            reference: None,
            advantages: rows().copied().collect(),
        }
    }
}

fn loss(request: &ForwardBackwardRequest) -> Result<LossConfig, DatumError> {
    let name = &request.loss_fn;
    let clips = matches!(name.as_str(), "ppo" | "cispo");
    let (mut low, mut high) = (0.8, 1.2);
    let newer = request.loss_fn_config_v2.iter().map(|(key, value)| (key, value.number));
    let older = request.loss_fn_config.iter().map(|(key, value)| (key, Some(*value)));
    let given: Vec<_> = if request.loss_fn_config_v2.is_empty() { older.collect() } else { newer.collect() };
    for (key, value) in given {
        match (key.as_str(), value) {
            ("clip_low_threshold", Some(value)) if clips => low = value,
            ("clip_high_threshold", Some(value)) if clips => high = value,
            _ => {
                let expected = if clips {
                    "clip_low_threshold and clip_high_threshold are numbers"
                } else {
                    "it has no settings"
                };
                return Err(DatumError::Config { name: key.clone(), loss: name.clone(), expected });
            }
        }
    }
    if !((0.0..=1.0).contains(&low) && high >= 1.0 && high.is_finite()) {
        return Err(DatumError::Thresholds { low, high });
    }
    let surrogate = match name.as_str() {
        "cross_entropy" => Surrogate::Reinforce,
        "importance_sampling" => Surrogate::Ratio,
        // A lower threshold of 0 clips nothing, as does one that no ratio reaches.
        "ppo" => Surrogate::Clip {
            low: (1.0 - low).min(1.0 - f64::EPSILON),
            high: high - 1.0,
            dual: None,
            cap: None,
        },
        "cispo" => Surrogate::Cispo { least: Some(low), most: high },
        _ => return Err(DatumError::Loss { name: name.clone() }),
    };
    Ok(LossConfig::with(surrogate, Normaliser::TokenSum))
}

struct Reader<'a> {
    index: usize,
    datum: &'a Datum,
    loss: &'a str,
    limits: &'a DatumLimits,
}

impl Reader<'_> {
    fn sequence(&self) -> Result<Sequence, DatumError> {
        let index = self.index;
        let mut tokens = Vec::new();
        for chunk in &self.datum.model_input {
            let text = chunk.encoded_text.as_ref().ok_or(DatumError::NotText { index })?;
            let (ids, rest) = text.tokens.as_chunks::<4>();
            if !rest.is_empty() {
                let (name, shape) = ("model_input", Vec::new());
                let (got, dtype, needed) = (text.tokens.len(), "int32", ids.len() + 1);
                return Err(DatumError::Shape { index, name, got, dtype, shape, needed });
            }
            for bytes in ids {
                tokens.push(self.token(
                    "model_input",
                    tokens.len(),
                    f64::from(i32::from_le_bytes(*bytes)),
                )?);
            }
        }
        let (got, limit) = (tokens.len() + 1, self.limits.context_tokens);
        if tokens.is_empty() {
            return Err(DatumError::Empty);
        }
        if got > limit {
            return Err(DatumError::TooLong { index, got, limit });
        }
        let rows = tokens.len();
        let targets = self.values("target_tokens", rows)?;
        let (advantages, sampled) = if self.loss == "cross_entropy" {
            (self.numbers("weights", rows)?, None)
        } else {
            (self.numbers("advantages", rows)?, Some(self.numbers("logprobs", rows)?))
        };
        let mut unscored = Vec::new();
        for (row, value) in targets.into_iter().enumerate() {
            let target = self.token("target_tokens", row, value)?;
            match tokens.get(row + 1) {
                Some(&next) if next != target && advantages[row] != 0.0 => {
                    return Err(DatumError::NotShifted { index, row, target, next });
                }
                Some(&next) if next != target => unscored.push(row),
                Some(_) => {}
                None => tokens.push(target),
            }
        }
        Ok(Sequence { tokens, sampled, advantages, unscored })
    }

    fn token(&self, name: &'static str, row: usize, value: f64) -> Result<u32, DatumError> {
        if value >= 0.0 && value < f64::from(self.limits.vocabulary) && value.fract() == 0.0 {
            return Ok(value as u32);
        }
        Err(DatumError::Value { index: self.index, name, row, value, expected: "token of this model" })
    }

    fn numbers(&self, name: &'static str, rows: usize) -> Result<Vec<f64>, DatumError> {
        let values = self.values(name, rows)?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(row) => {
                let (index, value, expected) = (self.index, values[row], "finite number");
                Err(DatumError::Value { index, name, row, value, expected })
            }
        }
    }

    /// `rows` values of any type.
    fn values(&self, name: &'static str, rows: usize) -> Result<Vec<f64>, DatumError> {
        let index = self.index;
        let tensor = self.datum.loss_fn_inputs.get(name);
        let tensor = tensor.ok_or_else(|| DatumError::Missing { index, name, loss: self.loss.to_owned() })?;
        if tensor.sparse_csr.is_some() {
            return Err(DatumError::Sparse { index, name });
        }
        let values = decoded(tensor);
        if values.len() != rows {
            let got = tensor.dense.as_ref().map_or(0, Bytes::len);
            let dtype = tensor.dtype().as_name();
            return Err(DatumError::Shape {
                index,
                name,
                got,
                dtype,
                shape: tensor.shape.clone(),
                needed: rows,
            });
        }
        Ok(values)
    }
}

impl DType {
    fn as_name(self) -> &'static str {
        match self {
            Self::Unspecified => "no type",
            Self::Float32 => "float32",
            Self::Int64 => "int64",
            Self::Int32 => "int32",
            Self::Bfloat16 => "bfloat16",
        }
    }
}

/// The values of a dense tensor; none when its bytes are no whole values.
fn decoded(tensor: &Tensor) -> Vec<f64> {
    fn all<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        let (values, rest) = bytes.as_chunks::<N>();
        if rest.is_empty() { values.iter().map(|bytes| value(*bytes)).collect() } else { Vec::new() }
    }
    let bytes = tensor.dense.as_deref().unwrap_or_default();
    match tensor.dtype() {
        DType::Unspecified => Vec::new(),
        DType::Float32 => all(bytes, |b| f64::from(f32::from_le_bytes(b))),
        DType::Int64 => all(bytes, |b| i64::from_le_bytes(b) as f64),
        DType::Int32 => all(bytes, |b| f64::from(i32::from_le_bytes(b))),
        DType::Bfloat16 => all(bytes, |b| f64::from(f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::loss::reference::policy_loss;
    use crate::service::gateway::proto::{Chunk, EncodedTextChunk, LossConfigValue, SparseCsr, bytes_of};

    pub(in crate::service::gateway) const LIMITS: DatumLimits =
        DatumLimits { vocabulary: 8, context_tokens: 5, batch_tokens: 9 };

    fn floats(values: &[f32]) -> Tensor {
        let dense = Some(bytes_of(values.iter().copied(), f32::to_le_bytes).into());
        Tensor { dense, dtype: DType::Float32.into(), shape: vec![values.len() as i64], sparse_csr: None }
    }

    fn ints(values: &[i64]) -> Tensor {
        let dense = Some(bytes_of(values.iter().copied(), i64::to_le_bytes).into());
        Tensor { dense, dtype: DType::Int64.into(), ..floats(&[]) }
    }

    fn chunk(tokens: &[i32]) -> Chunk {
        let tokens = bytes_of(tokens.iter().copied(), i32::to_le_bytes).into();
        Chunk { encoded_text: Some(EncodedTextChunk { tokens }) }
    }

    /// `tokens` in two chunks, with these advantages (weights for cross entropy) and log-probabilities.
    pub(in crate::service::gateway) fn datum(
        loss: &str,
        tokens: &[i32],
        advantages: &[f32],
        logprobs: &[f32],
    ) -> Datum {
        let (input, last) = tokens.split_at(tokens.len() - 1);
        let (first, rest) = input.split_at(1);
        let targets: Vec<i64> = input[1..].iter().chain(last).map(|t| i64::from(*t)).collect();
        let credit = if loss == "cross_entropy" { "weights" } else { "advantages" };
        let mut inputs = vec![("target_tokens", ints(&targets)), (credit, floats(advantages))];
        if loss != "cross_entropy" {
            inputs.push(("logprobs", floats(logprobs)));
        }
        let loss_fn_inputs = inputs.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect();
        Datum { model_input: vec![chunk(first), chunk(rest)], loss_fn_inputs }
    }

    pub(in crate::service::gateway) fn request(loss: &str, data: Vec<Datum>) -> ForwardBackwardRequest {
        ForwardBackwardRequest { loss_fn: loss.to_owned(), data, ..Default::default() }
    }

    #[test]
    fn losses_are_the_sums_that_are_documented() {
        let (advantages, sampled) = ([0.5_f32, 0.0, -2.0], [-1.0_f32, 0.0, -0.7]);
        let now = [-1.5, -0.3, -0.1];
        let ratio = |i: usize| (now[i] - f64::from(sampled[i])).exp();
        let a = |i: usize| f64::from(advantages[i]);
        let clipped = |i: usize| ratio(i).clamp(0.9, 1.5);
        type Token<'a> = &'a dyn Fn(usize) -> f64;
        let cases: [(&str, Token<'_>); 4] = [
            ("cross_entropy", &|i| -a(i) * now[i]),
            ("importance_sampling", &|i| -a(i) * ratio(i)),
            ("ppo", &|i| -(a(i) * ratio(i)).min(a(i) * clipped(i))),
            ("cispo", &|i| -clipped(i) * a(i) * now[i]),
        ];
        for (name, token) in cases {
            let mut message = request(name, vec![datum(name, &[1, 2, 3, 4], &advantages, &sampled)]);
            if matches!(name, "ppo" | "cispo") {
                for (key, number) in [("clip_low_threshold", 0.9), ("clip_high_threshold", 1.5)] {
                    let value = LossConfigValue { number: Some(number), text: None };
                    message.loss_fn_config_v2.insert(key.to_owned(), value);
                }
            }
            let batch =
                Batch::read(&super::message(message.encode_to_vec().into()).unwrap(), &LIMITS).unwrap();
            assert_eq!(batch.sequences[0].tokens, [1, 2, 3, 4]);
            let got = policy_loss(&now, &Sequence::targets(&batch.sequences), &batch.loss).unwrap();
            let expected: f64 = [0, 2].map(token).iter().sum();
            assert!((got.loss - expected).abs() < 1e-6, "{name}: {} is not {expected}", got.loss);
            assert_eq!(got.gradient[1], 0.0, "{name}");
        }
    }

    #[test]
    fn rows_without_weight_may_have_any_target() {
        let mut padded = datum("ppo", &[1, 2, 3, 4], &[0.0, 1.0, -1.0], &[0.0, -1.0, -1.0]);
        padded.loss_fn_inputs.insert("target_tokens".to_owned(), ints(&[0, 3, 4]));
        let batch = Batch::read(&request("ppo", vec![padded]), &LIMITS).unwrap();
        assert_eq!(
            (&batch.sequences[0].tokens[..], &batch.sequences[0].unscored[..]),
            (&[1, 2, 3, 4][..], &[0][..])
        );
    }

    #[test]
    fn thresholds_of_older_clients_count_when_there_are_no_newer_ones() {
        let mut message = request("ppo", vec![datum("ppo", &[1, 2], &[1.0], &[-1.0])]);
        message.loss_fn_config.insert("clip_high_threshold".to_owned(), 1.25);
        let batch = Batch::read(&message, &LIMITS).unwrap();
        assert!(matches!(batch.loss.surrogate, Surrogate::Clip { high: 0.25, .. }), "{:?}", batch.loss);
    }

    #[test]
    fn what_cannot_be_trained_on_is_named() {
        let fine = || datum("ppo", &[1, 2, 3], &[1.0, 1.0], &[-1.0, -1.0]);
        let refused = |change: &dyn Fn(&mut ForwardBackwardRequest)| {
            let mut message = request("ppo", vec![fine(), fine()]);
            change(&mut message);
            Batch::read(&message, &LIMITS).unwrap_err().to_string()
        };
        let put = |m: &mut ForwardBackwardRequest, name: &str, tensor: Tensor| {
            m.data[1].loss_fn_inputs.insert(name.to_owned(), tensor);
        };
        let cases: Vec<(String, &str)> = vec![
            (refused(&|m| m.loss_fn = "dro".to_owned()), "\"dro\" is not served; use cross_entropy"),
            (
                refused(&|m| _ = m.loss_fn_config.insert("beta".to_owned(), 1.0)),
                "\"beta\" does not belong to ppo",
            ),
            (
                refused(&|m| _ = m.loss_fn_config.insert("clip_low_threshold".to_owned(), 2.0)),
                "clip thresholds 2",
            ),
            (refused(&|m| m.data.clear()), "at least one datum"),
            (refused(&|m| m.data[1].model_input.clear()), "at least one token"),
            (refused(&|m| m.data[1].model_input.push(Chunk::default())), "datum 1: only text"),
            (refused(&|m| m.data[1].model_input.push(chunk(&[8]))), "datum 1: model_input[2] is 8"),
            (refused(&|m| m.data[1].model_input.push(chunk(&[1, 1, 1]))), "datum 1: 6 tokens"),
            (
                refused(&|m| _ = m.data[1].loss_fn_inputs.remove("logprobs")),
                "no \"logprobs\", which ppo needs",
            ),
            (refused(&|m| put(m, "target_tokens", ints(&[2, -1]))), "target_tokens[1] is -1"),
            (
                refused(&|m| put(m, "target_tokens", ints(&[4, 3]))),
                "target_tokens[0] is 4 but the input goes on with 2",
            ),
            (
                refused(&|m| put(m, "advantages", floats(&[1.0]))),
                "advantages has 4 bytes of float32 in shape [1]; 2",
            ),
            (refused(&|m| put(m, "advantages", floats(&[1.0, f32::NAN]))), "advantages[1] is NaN"),
            (
                refused(&|m| put(m, "logprobs", Tensor { sparse_csr: Some(SparseCsr {}), ..floats(&[]) })),
                "logprobs is sparse",
            ),
            (refused(&|m| m.data.extend([fine(), fine()])), "12 tokens in one request, at most 9"),
        ];
        for (got, words) in cases {
            assert!(got.contains(words), "{got} does not say {words}");
        }
        assert!(message(Bytes::from_static(b"\xff\xff")).is_err());
    }
}
