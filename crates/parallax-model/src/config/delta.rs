//! The gated delta net as data (Qwen3-Next, Qwen3.5): a mixer that remembers a state of fixed size instead of every token.

pub use parallax_kernels::delta::DeltaShape;

use super::{MAX_DIM, Norm, fields::invalid};
use crate::error::ConfigError;

/// A gated delta net. Its tensors are `linear_attn.{conv1d, A_log, dt_bias, norm, out_proj}` and the projections.
#[derive(Clone, Debug, PartialEq)]
pub struct DeltaNet {
    /// Heads and their sizes.
    pub shape: DeltaShape,
    /// Taps of the convolution.
    pub taps: usize,
    /// Norm of the heads of the result.
    pub norm: Norm,
    /// What the Hugging Face checkpoint calls the input projections.
    pub projections: DeltaProjections,
}

/// How the input projections are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeltaProjections {
    /// `in_proj_qkvz` and `in_proj_ba`, rows sorted by key head (Qwen3-Next).
    ByHead,
    /// `in_proj_qkv`, `in_proj_z`, `in_proj_b` and `in_proj_a` (Qwen3.5).
    ByKind,
}

impl DeltaNet {
    /// Width of all queries, and of all keys.
    pub fn key_width(&self) -> usize {
        self.shape.n_key_heads * self.shape.key_dim
    }

    /// Width of all values.
    pub fn value_width(&self) -> usize {
        self.shape.n_heads * self.shape.value_dim
    }

    /// Value heads that each key head serves.
    pub fn heads_per_key(&self) -> usize {
        self.shape.n_heads / self.shape.n_key_heads
    }

    /// Hugging Face's number of each element of the value heads, `dim` to a head, in the order in which they lie here.
    pub(crate) fn value_order(&self, dim: usize) -> impl Iterator<Item = usize> {
        let (keys, share, tiled) = (self.shape.n_key_heads, self.heads_per_key(), self.shape.tiled);
        let head = move |i: usize| if tiled { i % keys * share + i / keys } else { i };
        (0..self.shape.n_heads * dim).map(move |i| head(i / dim) * dim + i % dim)
    }

    /// Rows that are stored by key head, each having these parts one after the other, sorted by part: all heads' rows of
    /// the first part, then those of the second and so on.
    pub(crate) fn rows_by_kind(&self, parts: &[usize]) -> Vec<usize> {
        let stride: usize = parts.iter().sum();
        let mut offset = 0;
        let mut rows = Vec::new();
        for part in parts {
            let head = |h: usize| h * stride + offset..h * stride + offset + part;
            rows.extend((0..self.shape.n_key_heads).flat_map(head));
            offset += part;
        }
        rows
    }

    /// Channels of the convolution: queries, keys and values.
    pub fn channels(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    /// Bytes of the state that one layer keeps per sequence.
    pub fn state_bytes(&self) -> u64 {
        4 * ((self.taps - 1) * self.channels() + self.shape.state_len()) as u64
    }

    /// Weights of the linear layers, given H.
    pub(crate) fn matrix_parameters(&self, hidden: usize) -> u64 {
        let inputs = self.channels() + self.value_width() + 2 * self.shape.n_heads;
        (hidden * (inputs + self.value_width())) as u64
    }

    /// The other weights.
    pub(crate) fn vector_parameters(&self) -> u64 {
        (self.taps * self.channels() + 2 * self.shape.n_heads + self.shape.value_dim) as u64
    }

    /// The first number that cannot be right.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        let DeltaShape { n_key_heads, n_heads, key_dim, value_dim, .. } = self.shape;
        for (name, value, max) in [
            ("linear_num_key_heads", n_key_heads, MAX_DIM),
            ("linear_num_value_heads", n_heads, MAX_DIM),
            ("linear_key_head_dim", key_dim, 1 << 12),
            ("linear_value_head_dim", value_dim, 1 << 12),
            ("linear_conv_kernel_dim", self.taps, 64),
            ("linear attention width", n_key_heads.saturating_mul(key_dim), MAX_DIM),
            ("linear attention width", n_heads.saturating_mul(value_dim), MAX_DIM),
        ] {
            if value == 0 || value > max {
                return Err(invalid(name, value, &format!("it must be within 1..={max}")));
            }
        }
        if !n_heads.is_multiple_of(n_key_heads) {
            return Err(invalid("linear_num_value_heads", n_heads, "it must be a multiple of the key heads"));
        }
        Ok(())
    }
}
