//! Multi-head latent attention as data (DeepSeek-V2, arXiv:2405.04434, section 2.1).

use super::{MAX_DIM, Norm, Projection, Rope, fields::invalid};
use crate::error::ConfigError;

/// Attention whose keys and values are stored as one compressed row per token.
#[derive(Clone, Debug, PartialEq)]
pub struct Latent {
    /// Q.
    pub n_heads: usize,
    /// Elements of a query that meet the compressed row.
    pub nope_dim: usize,
    /// Rotated elements of a query, and of the one key that all heads share.
    pub rope_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Elements of a compressed row.
    pub kv_rank: usize,
    /// Queries are compressed to so many elements on their way; straight without.
    pub q_rank: Option<usize>,
    /// Queries: into the compressed ones, or straight.
    pub q_in: Projection,
    /// Norm of compressed queries, and the way out of them.
    pub q_out: Option<(Norm, Projection)>,
    /// Compressed row and shared key.
    pub kv_in: Projection,
    /// Norm of compressed rows.
    pub kv_norm: Norm,
    /// Keys and values of every head, of compressed rows; without `.weight`.
    pub kv_out: &'static str,
    /// The way back to the hidden width.
    pub o: Projection,
    /// Rotation.
    pub rope: Rope,
    /// Factor of the scores.
    pub scale: f32,
}

impl Latent {
    /// Width of the queries.
    pub fn q_width(&self) -> usize {
        self.n_heads * (self.nope_dim + self.rope_dim)
    }

    /// Values that a token stores.
    pub fn stored(&self) -> usize {
        self.kv_rank + self.rope_dim
    }

    /// Weights of the linear layers, given H.
    pub(crate) fn matrix_parameters(&self, hidden: usize) -> u64 {
        let q = match self.q_rank {
            Some(rank) => rank * (hidden + self.q_width()),
            None => hidden * self.q_width(),
        };
        let kv = hidden * self.stored() + self.kv_rank * self.n_heads * (self.nope_dim + self.value_dim);
        (q + kv + self.n_heads * self.value_dim * hidden) as u64
    }

    /// Norm weights and biases, given H.
    pub(crate) fn vector_parameters(&self, hidden: usize) -> u64 {
        let bias = |p: &Projection, n: usize| if p.bias { n } else { 0 };
        let q = match self.q_rank {
            Some(rank) => rank + bias(&self.q_in, rank),
            None => bias(&self.q_in, self.q_width()),
        };
        (q + self.kv_rank + bias(&self.kv_in, self.stored()) + bias(&self.o, hidden)) as u64
    }

    /// The first number that cannot be right.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        for (name, value) in [
            ("num_attention_heads", self.n_heads),
            ("qk_nope_head_dim", self.nope_dim),
            ("qk_rope_head_dim", self.rope_dim),
            ("v_head_dim", self.value_dim),
            ("kv_lora_rank", self.kv_rank),
            ("q_lora_rank", self.q_rank.unwrap_or(1)),
            ("query width", self.n_heads.saturating_mul(self.nope_dim.saturating_add(self.rope_dim))),
            ("value width", self.n_heads.saturating_mul(self.value_dim)),
        ] {
            if value == 0 || value > MAX_DIM {
                return Err(invalid(name, value, &format!("it must be within 1..={MAX_DIM}")));
            }
        }
        if !(self.scale.is_finite() && self.scale > 0.0) {
            return Err(invalid("attention scale", self.scale, "it must be positive"));
        }
        Ok(())
    }
}
