//! GGUF tensor names to HF names, and llama.cpp's row order to HF's.

use crate::config::Family;

/// Divisors of the rotary frequencies, where a GGUF file carries them.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The HF name of a GGUF tensor, or `None` for tensors that are not weights of the forward pass.
pub(crate) fn canonical(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        // No HF name: HF keeps the formula in config.json. Part of the index because opening reads it.
        ROPE_FACTORS => return Some(ROPE_FACTORS.to_owned()),
        _ => {}
    }
    let (block, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let block: usize = block.parse().ok()?;
    let module = match rest.strip_suffix(".weight")? {
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
        _ => return None,
    };
    Some(format!("model.layers.{block}.{module}.weight"))
}

/// Heads by which the rows of an HF tensor are interleaved in a GGUF file: only llama's queries and keys.
pub(crate) fn interleaved_heads(
    family: Family,
    name: &str,
    n_heads: usize,
    n_kv_heads: usize,
) -> Option<usize> {
    match family {
        Family::Llama if name.ends_with("self_attn.q_proj.weight") => Some(n_heads),
        Family::Llama if name.ends_with("self_attn.k_proj.weight") => Some(n_kv_heads),
        _ => None,
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
        assert_eq!(
            canonical("blk.12.ffn_gate.weight").as_deref(),
            Some("model.layers.12.mlp.gate_proj.weight")
        );
        assert_eq!(canonical("blk.0.attn_rot_embd"), None);
        assert_eq!(canonical("blk.x.ffn_gate.weight"), None);
    }
}
