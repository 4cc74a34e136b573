//! The linear modules that an adapter may name: all of a layer but its router and its routed experts; their shapes, and
//! where their outputs are among the layer's packed weights.
//!
//! What Hugging Face has as one module may lie here in several layers (queries and their gates) or in another order of
//! rows (delta nets), so a module's factors are cut and sorted on their way in.

use crate::config::{
    Attention, DeltaNet, DeltaProjections, DenseMlp, Latent, Mixer, Mlp, ModelConfig, Projection,
};

/// By name within their parent.
const SELF_ATTN: [&str; 9] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "o_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
];
const MLP: [&str; 11] = [
    "gate_proj",
    "up_proj",
    "gate_up_proj",
    "down_proj",
    "shared_experts.gate_proj",
    "shared_experts.up_proj",
    "shared_experts.down_proj",
    "shared_expert.gate_proj",
    "shared_expert.up_proj",
    "shared_expert.down_proj",
    "shared_expert_gate",
];
const LINEAR_ATTN: [&str; 7] =
    ["in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"];
const PARENTS: [(&str, &[&str]); 3] =
    [("self_attn", &SELF_ATTN), ("mlp", &MLP), ("linear_attn", &LINEAR_ATTN)];

/// All names.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    PARENTS.into_iter().flat_map(|(_, names)| names.iter().copied())
}

/// "layers.3.q_proj" as the full module path of an HF model.
pub(crate) fn hf_module(module: &str) -> Option<String> {
    let (layer, name) = split(module)?;
    let (parent, _) = PARENTS.iter().find(|(_, names)| names.contains(&name))?;
    Some(format!("model.layers.{layer}.{parent}.{name}"))
}

/// Layer index and module of "layers.3.q_proj".
pub(crate) fn split(module: &str) -> Option<(usize, &str)> {
    let (layer, name) = module.strip_prefix("layers.")?.split_once('.')?;
    Some((layer.parse().ok()?, name))
}

/// "q_proj" of "self_attn.q_proj".
fn short(full: &str) -> &str {
    full.split_once('.').map_or(full, |(_, name)| name)
}

/// One of a layer's packed linear layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Queries, keys and values.
    Qkv,
    /// Gates of what was attended to.
    Gate,
    /// The mixer's way back to the hidden width.
    Out,
    /// Into the compressed queries, or straight to them.
    LatentIn,
    /// Out of compressed queries.
    LatentOut,
    /// Into the compressed rows.
    KvIn,
    /// Out of the compressed rows: the matrices of all heads.
    KvOut,
    /// Queries, keys, values and output gates of a delta net.
    Qkvz,
    /// Its strengths and decays.
    Ba,
    /// Gate and up of the dense part, or of the shared expert.
    GateUp,
    /// Its way back.
    Down,
    /// What weighs the shared expert.
    SharedGate,
}

/// Some of a module's outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) place: Place,
    /// First column there.
    pub(crate) offset: usize,
    /// Which of the module's outputs, in the order of the columns; all of them without.
    pub(crate) rows: Option<Vec<usize>>,
}

/// A linear module of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// Width in.
    pub(crate) inputs: usize,
    /// Width out.
    pub(crate) outputs: usize,
    pub(crate) parts: Vec<Part>,
    /// Which of its inputs, in the order in which they come here; all of them without.
    pub(crate) columns: Option<Vec<usize>>,
}

impl Module {
    fn plain(inputs: usize, outputs: usize, place: Place, offset: usize) -> Self {
        Self { inputs, outputs, parts: vec![Part { place, offset, rows: None }], columns: None }
    }

    fn sorted(inputs: usize, rows: Vec<usize>, place: Place, offset: usize) -> Self {
        let outputs = rows.len();
        Self { inputs, outputs, parts: vec![Part { place, offset, rows: Some(rows) }], columns: None }
    }
}

/// A module of a layer; `None` where the layer stores no such module.
pub(crate) fn module_of(config: &ModelConfig, layer: usize, name: &str) -> Option<Module> {
    let (hidden, layer) = (config.hidden, config.layers.get(layer)?);
    let mixer = match &layer.mixer {
        Mixer::Attention(a) => attention(hidden, a, name),
        Mixer::Latent(a) => latent(hidden, a, name),
        Mixer::Delta(d) => delta(hidden, d, name),
    };
    mixer.or_else(|| match &layer.mlp {
        Mlp::Dense(m) => dense(hidden, m, name),
        Mlp::Experts(e) => match (e.shared_gate, &e.shared) {
            (Some(gate), _) if short(gate) == name => Some(Module::plain(hidden, 1, Place::SharedGate, 0)),
            (_, shared) => shared.as_ref().and_then(|m| dense(hidden, m, name)),
        },
    })
}

/// Width in and width out of a module of a layer.
pub(crate) fn module_shape(config: &ModelConfig, layer: usize, name: &str) -> Option<(usize, usize)> {
    module_of(config, layer, name).map(|m| (m.inputs, m.outputs))
}

/// A module of a projection that stacks so many rows of each.
fn within(p: &Projection, rows: &[usize], place: Place, inputs: usize, name: &str) -> Option<Module> {
    let at = p.names.iter().position(|full| short(full) == name)?;
    Some(match p.names.len() == rows.len() {
        true => Module::plain(inputs, rows[at], place, rows[..at].iter().sum()),
        false => Module::plain(inputs, rows.iter().sum(), place, 0),
    })
}

fn dense(hidden: usize, m: &DenseMlp, name: &str) -> Option<Module> {
    within(&m.gate_up, &[m.ffn; 2], Place::GateUp, hidden, name)
        .or_else(|| within(&m.down, &[hidden], Place::Down, m.ffn, name))
}

fn attention(hidden: usize, a: &Attention, name: &str) -> Option<Module> {
    if a.gated && name == "q_proj" {
        let d = a.head_dim;
        let half = |which: usize| (0..a.q_width()).map(|i| (2 * (i / d) + which) * d + i % d).collect();
        let part = |place, which| Part { place, offset: 0, rows: Some(half(which)) };
        let parts = vec![part(Place::Qkv, 0), part(Place::Gate, 1)];
        return Some(Module { inputs: hidden, outputs: 2 * a.q_width(), parts, columns: None });
    }
    within(&a.qkv, &[a.q_width(), a.kv_width(), a.kv_width()], Place::Qkv, hidden, name)
        .or_else(|| within(&a.o, &[hidden], Place::Out, a.q_width(), name))
}

fn latent(hidden: usize, a: &Latent, name: &str) -> Option<Module> {
    let heads = a.n_heads * (a.nope_dim + a.value_dim);
    if name == short(a.kv_out) {
        return Some(Module::plain(a.kv_rank, heads, Place::KvOut, 0));
    }
    let first = a.q_rank.unwrap_or_else(|| a.q_width());
    let second = || {
        let ((_, out), rank) = a.q_out.as_ref().zip(a.q_rank)?;
        within(out, &[a.q_width()], Place::LatentOut, rank, name)
    };
    within(&a.q_in, &[first], Place::LatentIn, hidden, name)
        .or_else(second)
        .or_else(|| within(&a.kv_in, &[a.stored()], Place::KvIn, hidden, name))
        .or_else(|| within(&a.o, &[hidden], Place::Out, a.n_heads * a.value_dim, name))
}

fn delta(hidden: usize, d: &DeltaNet, name: &str) -> Option<Module> {
    let (keys, values, n) = (d.key_width(), d.value_width(), d.shape.n_heads);
    let (key, share) = (d.shape.key_dim, d.heads_per_key() * d.shape.value_dim);
    if name == "out_proj" {
        let columns = d.shape.tiled.then(|| d.value_order(d.shape.value_dim).collect());
        return Some(Module { columns, ..Module::plain(values, hidden, Place::Out, 0) });
    }
    let by_kind = d.projections == DeltaProjections::ByKind;
    let (rows, place, offset): (Vec<usize>, Place, usize) = match name {
        "in_proj_qkvz" if !by_kind => (d.rows_by_kind(&[key, key, share, share]), Place::Qkvz, 0),
        "in_proj_ba" if !by_kind => (d.rows_by_kind(&[d.heads_per_key(); 2]), Place::Ba, 0),
        "in_proj_qkv" if by_kind => {
            let first = (0..2 * keys).chain(d.value_order(d.shape.value_dim).map(|row| 2 * keys + row));
            (first.collect(), Place::Qkvz, 0)
        }
        "in_proj_z" if by_kind => (d.value_order(d.shape.value_dim).collect(), Place::Qkvz, d.channels()),
        "in_proj_b" if by_kind => (d.value_order(1).collect(), Place::Ba, 0),
        "in_proj_a" if by_kind => (d.value_order(1).collect(), Place::Ba, n),
        _ => return None,
    };
    Some(Module::sorted(hidden, rows, place, offset))
}
