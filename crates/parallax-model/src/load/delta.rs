//! Weights of a gated delta net, whichever way its projections are stored.

use std::sync::Arc;

use parallax_kernels::delta::decay_rates;

use super::{Loader, layer_name};
use crate::{
    config::{DeltaNet, DeltaProjections, Projection},
    error::LoadError,
    layer::{DeltaMixerWeights, Linear, LinearWeight},
    ops::{delta::DeltaWeights, linear::FrozenLinear},
    weights::{NEGATED_RATES, Rows},
};

impl Loader<'_> {
    pub(super) fn delta(&self, layer: usize, d: &DeltaNet) -> Result<DeltaMixerWeights, LoadError> {
        let hidden = self.config.hidden;
        let named = |name: &str| layer_name(layer, &format!("linear_attn.{name}"));
        let (channels, values, n_heads) = (d.channels(), d.value_width(), d.shape.n_heads);
        // GGUF files of Qwen3-Next have the larger projection by kind (older ones do not), the smaller one by head.
        let by_head = d.projections == DeltaProjections::ByHead;
        let qkvz = if by_head && !self.index.contains(&named("in_proj_qkv.weight")) {
            let (keys, share) = (d.shape.key_dim, d.heads_per_key() * d.shape.value_dim);
            self.by_head(&named("in_proj_qkvz.weight"), d, &[keys, keys, share, share])?
        } else {
            let qkvz = Projection::plain(&["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"]);
            self.projection(layer, &qkvz, &[channels, values], hidden)?
        };
        let ba = if by_head {
            self.by_head(&named("in_proj_ba.weight"), d, &[d.heads_per_key(); 2])?
        } else {
            let ba = Projection::plain(&["linear_attn.in_proj_b", "linear_attn.in_proj_a"]);
            self.projection(layer, &ba, &[n_heads; 2], hidden)?
        };
        let stored = self.index.read_shaped(&named("conv1d.weight"), &[channels, 1, d.taps])?;
        // One tap of all channels after the other.
        let conv = (0..d.taps).flat_map(|tap| stored.iter().skip(tap).step_by(d.taps).copied()).collect();
        let norm = self.index.read_shaped(&named("norm.weight"), &[d.shape.value_dim])?;
        let inner = DeltaWeights {
            shape: d.shape,
            conv,
            rates: self.decay_rates(&named("A_log"), &layer_name(layer, NEGATED_RATES), n_heads)?,
            dt_bias: self.index.read_shaped(&named("dt_bias"), &[n_heads])?,
            norm,
            eps: d.norm.eps,
        };
        let out = self.projection(layer, &Projection::plain(&["linear_attn.out_proj"]), &[hidden], values)?;
        Ok(DeltaMixerWeights { inner: Arc::new(inner), qkvz, ba, out })
    }

    /// The rates out of their logarithms, or out of what a GGUF file holds instead: themselves, negated.
    fn decay_rates(&self, logarithms: &str, negated: &str, n: usize) -> Result<Vec<f64>, LoadError> {
        if !self.index.contains(negated) {
            return Ok(decay_rates(&self.index.read_shaped(logarithms, &[n])?));
        }
        let stored = self.index.read_shaped(negated, &[n])?;
        if let Some(bad) = stored.iter().find(|v| !(v.is_finite() && **v <= 0.0)) {
            let reason = format!("{bad} is no negated rate of decay");
            return Err(LoadError::Pack { name: negated.to_owned(), reason });
        }
        Ok(stored.iter().map(|v| -f64::from(*v)).collect())
    }

    /// A tensor whose rows are sorted by key head, each head having one of these parts after the other: as a linear
    /// layer with all heads of the first part, then those of the second and so on.
    fn by_head(&self, name: &str, d: &DeltaNet, parts: &[usize]) -> Result<Linear, LoadError> {
        let (hidden, n, stride) = (self.config.hidden, d.shape.n_key_heads, parts.iter().sum::<usize>());
        self.index.check_shape(name, &[n * stride, hidden])?;
        let all = Rows { name: name.to_owned(), first: 0, n: n * stride };
        let order = d.rows_by_kind(parts).into_iter();
        let packed = self.index.pack_ordered(&all, order, hidden, self.dtype)?;
        Ok(Linear::bare(LinearWeight::Packed(Arc::new(FrozenLinear {
            parts: vec![packed],
            transposed: None,
        }))))
    }
}
