//! The protobuf messages of Tinker's public interface that this server reads or writes: package `tinker_public` of the PyPI
//! package `tinker` 0.38. Arrays travel as little-endian bytes in their fields.

use std::collections::HashMap;

use prost::Message;

/// What a tensor holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(super) enum DType {
    Unspecified = 0,
    Float32 = 1,
    Int64 = 2,
    Int32 = 3,
    Bfloat16 = 4,
}

/// Compressed rows; not served.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SparseCsr {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Tensor {
    #[prost(bytes = "bytes", optional, tag = "1")]
    pub(super) dense: Option<bytes::Bytes>,
    #[prost(message, optional, tag = "2")]
    pub(super) sparse_csr: Option<SparseCsr>,
    #[prost(enumeration = "DType", tag = "3")]
    pub(super) dtype: i32,
    #[prost(int64, repeated, tag = "4")]
    pub(super) shape: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct EncodedTextChunk {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) tokens: bytes::Bytes,
}

/// A part of a model's input; images and sound are other fields, which are not served.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Chunk {
    #[prost(message, optional, tag = "1")]
    pub(super) encoded_text: Option<EncodedTextChunk>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Datum {
    #[prost(message, repeated, tag = "1")]
    pub(super) model_input: Vec<Chunk>,
    #[prost(map = "string, message", tag = "2")]
    pub(super) loss_fn_inputs: HashMap<String, Tensor>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct LossConfigValue {
    #[prost(double, optional, tag = "1")]
    pub(super) number: Option<f64>,
    #[prost(string, optional, tag = "2")]
    pub(super) text: Option<String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ForwardBackwardRequest {
    #[prost(string, tag = "1")]
    pub(super) model_id: String,
    #[prost(int32, tag = "2")]
    pub(super) seq_id: i32,
    #[prost(message, repeated, tag = "3")]
    pub(super) data: Vec<Datum>,
    #[prost(string, tag = "4")]
    pub(super) loss_fn: String,
    /// Of clients before `loss_fn_config_v2`.
    #[prost(map = "string, double", tag = "5")]
    pub(super) loss_fn_config: HashMap<String, f64>,
    #[prost(bool, tag = "6")]
    pub(super) forward_only: bool,
    #[prost(map = "string, message", tag = "7")]
    pub(super) loss_fn_config_v2: HashMap<String, LossConfigValue>,
}

/// Arrays of several datums, one after the other; `offsets` are i64 bytes into `data`, one more than there are datums.
#[derive(Clone, PartialEq, Message)]
pub(super) struct BatchedTensor {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) data: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) offsets: Vec<u8>,
    #[prost(enumeration = "DType", tag = "3")]
    pub(super) dtype: i32,
    #[prost(int64, repeated, tag = "4")]
    pub(super) trailing_shape: Vec<i64>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ArrayRecord {
    #[prost(string, tag = "1")]
    pub(super) type_tag: String,
    #[prost(map = "string, message", tag = "2")]
    pub(super) fields: HashMap<String, BatchedTensor>,
    #[prost(int64, tag = "3")]
    pub(super) num_datums: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ForwardBackwardOutput {
    #[prost(string, tag = "1")]
    pub(super) loss_fn_output_type: String,
    #[prost(message, repeated, tag = "2")]
    pub(super) loss_fn_outputs: Vec<ArrayRecord>,
    /// The part of a name behind its colon says how the figures of several requests are joined.
    #[prost(map = "string, double", tag = "3")]
    pub(super) metrics: HashMap<String, f64>,
}

/// `[length, k]` each, row by row.
#[derive(Clone, PartialEq, Message)]
pub(super) struct TopkLogprobs {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) token_ids: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) logprobs: Vec<u8>,
    #[prost(uint32, tag = "3")]
    pub(super) k: u32,
    #[prost(uint32, tag = "4")]
    pub(super) length: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SampledSequence {
    /// 0: a stop token; 1: the limit.
    #[prost(int32, tag = "1")]
    pub(super) stop_reason: i32,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) tokens: Vec<u8>,
    #[prost(bytes = "vec", optional, tag = "3")]
    pub(super) logprobs: Option<Vec<u8>>,
    #[prost(message, optional, tag = "4")]
    pub(super) topk_sampled_logprobs: Option<TopkLogprobs>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct SampleResponse {
    #[prost(message, repeated, tag = "1")]
    pub(super) sequences: Vec<SampledSequence>,
    /// f32, NaN where there is none.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub(super) prompt_logprobs: Option<Vec<u8>>,
    #[prost(int32, tag = "4")]
    pub(super) prompt_cache_hit_tokens: i32,
}

/// i32 or f32 or i64 values as their bytes.
pub(super) fn bytes_of<const N: usize, T: Copy>(
    values: impl IntoIterator<Item = T>,
    bytes: impl Fn(T) -> [u8; N],
) -> Vec<u8> {
    values.into_iter().flat_map(bytes).collect()
}
