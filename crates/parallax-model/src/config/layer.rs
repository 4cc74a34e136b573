//! One decoder layer as data: which norms stand where, how it mixes rows, what its feed-forward part is.
//!
//! x + scale·after(mixer(before(x))), then the same with the feed-forward part. Everything that a forward pass
//! of an architecture does differently is a field here; `layer.rs` runs the fields. Tensor names are those of the
//! Hugging Face checkpoint within its layer, without `.weight`.

pub use parallax_kernels::activation::Activation;

use super::{DeltaNet, Experts, Latent, Rope};
use crate::options::KvFormat;

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Norms around the mixer.
    pub mixer_norms: Norms,
    /// How rows see each other.
    pub mixer: Mixer,
    /// Norms around the feed-forward part.
    pub mlp_norms: Norms,
    /// The feed-forward part.
    pub mlp: Mlp,
    /// Factor of both parts where they are added to the residual stream.
    pub residual_scale: f32,
}

/// Norms around one part of a layer: before it (most), after it (OLMo 2), or both (Gemma 2, GLM-4).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Norms {
    /// Of the part's input.
    pub before: Option<Norm>,
    /// Of the part's result, before it is added.
    pub after: Option<Norm>,
}

impl Norms {
    /// Only of the input.
    pub fn before(norm: Norm) -> Self {
        Self { before: Some(norm), after: None }
    }

    /// Of the input and of the result.
    pub fn sandwich(before: Norm, after: Norm) -> Self {
        Self { before: Some(before), after: Some(after) }
    }
}

/// A norm of rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Tensor of its weight.
    pub name: &'static str,
    /// Its formula.
    pub kind: NormKind,
    /// Added to the mean square.
    pub eps: f32,
}

/// Formula of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum NormKind {
    /// x / rms(x) · w.
    Rms,
    /// x / rms(x) · (1 + w), as Gemma stores it. (GGUF files hold 1 + w.)
    RmsPlusOne,
}

/// How rows see each other.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Mixer {
    /// Causal attention with grouped keys.
    Attention(Attention),
    /// Attention over compressed rows.
    Latent(Latent),
    /// A gated delta net.
    Delta(DeltaNet),
}

/// The feed-forward part.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Mlp {
    /// activation(gate) · up, down.
    Dense(DenseMlp),
    /// A mixture of experts.
    Experts(Experts),
}

/// Tensors stacked by rows into one linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Names within the layer, in the order of the rows.
    pub names: &'static [&'static str],
    /// Whether each has a `.bias` beside its `.weight`.
    pub bias: bool,
}

impl Projection {
    /// Without bias.
    pub const fn plain(names: &'static [&'static str]) -> Self {
        Self { names, bias: false }
    }

    /// As many biases as weights, where `bias` says so.
    pub const fn biased(names: &'static [&'static str], bias: bool) -> Self {
        Self { names, bias }
    }
}

/// Causal attention with grouped keys.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Q.
    pub n_heads: usize,
    /// K.
    pub n_kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Queries, keys and values: three tensors, or one that stacks them.
    pub qkv: Projection,
    /// The way back to the hidden width.
    pub o: Projection,
    /// Norms of queries and keys before rotation.
    pub head_norms: Option<HeadNorms>,
    /// Rotation of queries and keys; none in layers without positions (SmolLM3).
    pub rope: Option<Rope>,
    /// Keys that a row sees, counted back from it, its own included; all without.
    pub window: Option<usize>,
    /// Scores become cap · tanh(score / cap).
    pub softcap: Option<f32>,
    /// Tensor of one learned score per query head that takes weight and gives no value. `[Q]`
    pub sinks: Option<&'static str>,
    /// What was attended to is multiplied by the sigmoid of a gate; the rows of the queries' tensor are then, head by
    /// head, D rows of queries and D rows of gates.
    pub gated: bool,
    /// Factor of the scores.
    pub scale: f32,
}

impl Attention {
    /// Width of the queries: Q · D.
    pub fn q_width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Width of the keys, and of the values: K · D.
    pub fn kv_width(&self) -> usize {
        self.n_kv_heads * self.head_dim
    }
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadNorms {
    /// Of the queries.
    pub q: Norm,
    /// Of the keys.
    pub k: Norm,
    /// What one norm spans.
    pub span: HeadSpan,
}

/// What a norm of queries or keys spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadSpan {
    /// Each head by itself; weight `[D]`.
    Head,
    /// All heads together; weight [Q · D] or [K · D].
    All,
}

/// activation(gate) · up, down.
#[derive(Clone, Debug, PartialEq)]
pub struct DenseMlp {
    /// F.
    pub ffn: usize,
    /// Gate and up: two tensors, or one that stacks them.
    pub gate_up: Projection,
    /// The way back to the hidden width.
    pub down: Projection,
    /// What is done to the gate.
    pub activation: Activation,
}

impl LayerConfig {
    /// Weights of the linear layers, given H.
    pub(crate) fn matrix_parameters(&self, hidden: usize) -> u64 {
        let h = hidden as u64;
        let mixer = match &self.mixer {
            Mixer::Attention(a) => {
                let gate = if a.gated { a.q_width() } else { 0 };
                h * (2 * a.q_width() + 2 * a.kv_width() + gate) as u64
            }
            Mixer::Latent(a) => a.matrix_parameters(hidden),
            Mixer::Delta(d) => d.matrix_parameters(hidden),
        };
        let mlp = match &self.mlp {
            Mlp::Dense(m) => 3 * h * m.ffn as u64,
            Mlp::Experts(e) => e.matrix_parameters(hidden),
        };
        mixer + mlp
    }

    /// Norm weights, biases and sinks, given H.
    pub(crate) fn vector_parameters(&self, hidden: usize) -> u64 {
        let norms = [&self.mixer_norms, &self.mlp_norms].into_iter().flat_map(|n| [n.before, n.after]);
        let norms = (norms.flatten().count() * hidden) as u64;
        let mixer = match &self.mixer {
            Mixer::Attention(a) => {
                let bias = |p: &Projection, n: usize| if p.bias { n } else { 0 };
                let heads = match a.head_norms.map(|n| n.span) {
                    None => 0,
                    Some(HeadSpan::Head) => 2 * a.head_dim,
                    Some(HeadSpan::All) => a.q_width() + a.kv_width(),
                };
                let sinks = if a.sinks.is_some() { a.n_heads } else { 0 };
                (bias(&a.qkv, a.q_width() + 2 * a.kv_width()) + bias(&a.o, hidden) + heads + sinks) as u64
            }
            Mixer::Latent(a) => a.vector_parameters(hidden),
            Mixer::Delta(d) => d.vector_parameters(),
        };
        let mlp = match &self.mlp {
            Mlp::Dense(m) => {
                let bias = |p: &Projection, n: usize| if p.bias { n } else { 0 };
                (bias(&m.gate_up, 2 * m.ffn) + bias(&m.down, hidden)) as u64
            }
            Mlp::Experts(e) => e.vector_parameters(hidden),
        };
        norms + mixer + mlp
    }

    /// Whether it keeps a state per sequence instead of something per token.
    pub fn is_recurrent(&self) -> bool {
        matches!(self.mixer, Mixer::Delta(_))
    }

    /// Bytes of that state.
    pub fn state_bytes(&self) -> u64 {
        match &self.mixer {
            Mixer::Delta(delta) => delta.state_bytes(),
            Mixer::Attention(_) | Mixer::Latent(_) => 0,
        }
    }

    /// Whether it has operations that exist as CPU kernels only, without gradients.
    pub(crate) fn is_kernels_only(&self) -> bool {
        let mixer = match &self.mixer {
            Mixer::Attention(a) => a.gated,
            Mixer::Latent(_) | Mixer::Delta(_) => true,
        };
        mixer || matches!(self.mlp, Mlp::Experts(_))
    }

    /// Elements of a head of grouped attention.
    #[cfg(feature = "gpu")]
    pub(crate) fn head_dim(&self) -> Option<usize> {
        match &self.mixer {
            Mixer::Attention(a) => Some(a.head_dim),
            Mixer::Latent(_) | Mixer::Delta(_) => None,
        }
    }

    /// Elements of the widest row of a pass through it, given H; of layers that exist as CPU kernels only, H.
    pub(crate) fn widest_row(&self, hidden: usize) -> usize {
        let mixer = match &self.mixer {
            Mixer::Attention(a) => a.q_width() + 2 * a.kv_width(),
            Mixer::Latent(_) | Mixer::Delta(_) => hidden,
        };
        let mlp = match &self.mlp {
            Mlp::Dense(mlp) => 2 * mlp.ffn,
            Mlp::Experts(_) => hidden,
        };
        hidden.max(mixer).max(mlp).next_multiple_of(32)
    }

    /// Bytes that the layer stores per token: keys and values.
    pub(crate) fn stored_bytes_per_token(&self, format: KvFormat) -> usize {
        match &self.mixer {
            Mixer::Attention(a) => 2 * a.n_kv_heads * format.row_bytes(a.head_dim),
            Mixer::Latent(a) => format.row_bytes(a.stored()),
            Mixer::Delta(_) => 0,
        }
    }
}
