//! GGUF tensor names to HF names, and llama.cpp's row order to HF's.

use crate::{
    arch::Architecture,
    config::{Mixer, ModelConfig},
};

/// Divisors of the rotary frequencies, where a GGUF file carries them.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";
/// The same for LongRoPE: beyond the original context, and within it.
pub(crate) const LONG_ROPE_FACTORS: [&str; 2] = ["rope_factors_long.weight", "rope_factors_short.weight"];

/// What GGUF files hold of a delta net instead of `A_log`, within a layer: −exp(A_log). `[Hv]`
pub(crate) const NEGATED_RATES: &str = "linear_attn.A_negated";
/// What GGUF files hold of latent attention instead of one matrix out of compressed rows, within a layer and without
/// `.weight`: for keys, transposed, [Q, R, D], and for values [Q, V, R].
pub(crate) const LATENT_PARTS: [&str; 2] = ["self_attn.k_b_proj", "self_attn.v_b_proj"];

/// Whether opening a checkpoint reads this tensor.
pub(crate) fn is_rope_factors(name: &str) -> bool {
    name == ROPE_FACTORS || LONG_ROPE_FACTORS.contains(&name)
}

/// The HF name of a GGUF tensor, or `None` for tensors that are not weights of the forward pass.
pub(crate) fn canonical(name: &str, architecture: &Architecture) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        // No HF name: HF keeps the formula in config.json. Part of the index because opening reads it.
        name if is_rope_factors(name) => return Some(name.to_owned()),
        _ => {}
    }
    let (block, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let block: usize = block.parse().ok()?;
    let special =
        |name: &str| architecture.gguf_names.iter().find(|(gguf, _)| *gguf == name).map(|(_, hf)| *hf);
    // A few are no module's weight or bias and have a name to themselves.
    if let Some(whole) = special(rest) {
        return Some(format!("model.layers.{block}.{whole}"));
    }
    let (stored, kind) = rest.rsplit_once('.').filter(|(_, kind)| matches!(*kind, "weight" | "bias"))?;
    let module = special(stored).or_else(|| module(stored))?;
    Some(format!("model.layers.{block}.{module}.{kind}"))
}

/// The rule: Llama's names, and those that most mixtures of experts share.
fn module(stored: &str) -> Option<&'static str> {
    Some(match stored {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        "ffn_gate_inp" => "mlp.gate",
        "ffn_gate_exps" => "mlp.experts.gate_proj",
        "ffn_up_exps" => "mlp.experts.up_proj",
        "ffn_down_exps" => "mlp.experts.down_proj",
        // An option of the converter, instead of the first two.
        "ffn_gate_up_exps" => "mlp.experts.gate_up_proj",
        "ffn_gate_shexp" => "mlp.shared_experts.gate_proj",
        "ffn_up_shexp" => "mlp.shared_experts.up_proj",
        "ffn_down_shexp" => "mlp.shared_experts.down_proj",
        _ => return None,
    })
}

/// Heads by which the rows of a tensor are interleaved in a GGUF file, and their number of rows: the queries and
/// keys of Llama and its kin.
pub(crate) fn interleaved_heads(
    architecture: &Architecture,
    config: &ModelConfig,
    name: &str,
) -> Option<(usize, usize)> {
    let (layer, module) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let layer = config.layers.get(layer.parse::<usize>().ok()?)?;
    match &layer.mixer {
        Mixer::Attention(a) if architecture.gguf_pairs => match module.rsplit_once('.')?.0 {
            "self_attn.q_proj" => Some((a.n_heads, a.q_width())),
            "self_attn.k_proj" => Some((a.n_kv_heads, a.kv_width())),
            _ => None,
        },
        Mixer::Attention(_) | Mixer::Latent(_) | Mixer::Delta(_) => None,
    }
}

/// Reorders rows from pairs (0, D/2, 1, D/2+1, ..) to halves (0, 1, .., D-1), head by head. Works on rows of
/// any format, since quantised blocks never cross a row. Sizes were checked at opening.
pub(crate) fn half_split_rows(bytes: &[u8], n_rows: usize, heads: usize) -> Vec<u8> {
    let row = bytes.len() / n_rows;
    let head_dim = n_rows / heads;
    let half = head_dim / 2;
    let mut out = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for i in 0..head_dim {
            let stored = head * head_dim + (i % half) * 2 + i / half;
            out.extend_from_slice(&bytes[stored * row..(stored + 1) * row]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_become_halves_per_head() {
        // Two heads of four rows, one byte each; stored 0 2 1 3 is the order of llama.cpp.
        assert_eq!(half_split_rows(&[0, 2, 1, 3, 4, 6, 5, 7], 8, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn names_map_or_are_left_out() {
        let llama = crate::arch::of(crate::config::Family::Llama);
        let canonical = |name: &str| canonical(name, llama);
        assert_eq!(
            canonical("blk.12.ffn_gate.weight").as_deref(),
            Some("model.layers.12.mlp.gate_proj.weight")
        );
        assert_eq!(canonical("blk.0.attn_q.bias").as_deref(), Some("model.layers.0.self_attn.q_proj.bias"));
        assert_eq!(canonical("blk.0.attn_rot_embd"), None);
        assert_eq!(canonical("blk.x.ffn_gate.weight"), None);
    }
}
