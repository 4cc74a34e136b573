//! Weights of a gated delta net, whichever way its projections are stored.

use std::sync::Arc;

use super::{Loader, layer_name};
use crate::{
    config::{DeltaNet, DeltaProjections, Projection},
    error::LoadError,
    layer::{DeltaMixerWeights, Linear, LinearWeight},
    ops::delta::DeltaWeights,
    weights::Rows,
};

impl Loader<'_> {
    pub(super) fn delta(&self, layer: usize, d: &DeltaNet) -> Result<DeltaMixerWeights, LoadError> {
        let hidden = self.config.hidden;
        let named = |name: &str| layer_name(layer, &format!("linear_attn.{name}"));
        let (channels, values, n_heads) = (d.channels(), d.value_width(), d.shape.n_heads);
        let (qkvz, ba) = match d.projections {
            DeltaProjections::ByHead => self.by_head(layer, d)?,
            DeltaProjections::ByKind => {
                let qkvz = Projection::plain(&["linear_attn.in_proj_qkv", "linear_attn.in_proj_z"]);
                let ba = Projection::plain(&["linear_attn.in_proj_b", "linear_attn.in_proj_a"]);
                let qkvz = self.projection(layer, &qkvz, &[channels, values], hidden)?;
                (qkvz, self.projection(layer, &ba, &[n_heads; 2], hidden)?)
            }
        };
        let stored = self.index.read_shaped(&named("conv1d.weight"), &[channels, 1, d.taps])?;
        // One tap of all channels after the other.
        let conv = (0..d.taps).flat_map(|tap| stored.iter().skip(tap).step_by(d.taps).copied()).collect();
        let norm = self.index.read_shaped(&named("norm.weight"), &[d.shape.value_dim])?;
        let inner = DeltaWeights {
            shape: d.shape,
            conv,
            a_log: self.index.read_shaped(&named("A_log"), &[n_heads])?,
            dt_bias: self.index.read_shaped(&named("dt_bias"), &[n_heads])?,
            norm,
            eps: d.norm.eps,
        };
        let out = self.projection(layer, &Projection::plain(&["linear_attn.out_proj"]), &[hidden], values)?;
        Ok(DeltaMixerWeights { inner: Arc::new(inner), qkvz, ba, out })
    }

    /// Rows sorted by key head: q, k and the head's share of v and z; its shares of b and a.
    fn by_head(&self, layer: usize, d: &DeltaNet) -> Result<(Linear, Linear), LoadError> {
        let hidden = self.config.hidden;
        let (n, keys) = (d.shape.n_key_heads, d.shape.key_dim);
        let share = d.shape.n_heads / n;
        let values = share * d.shape.value_dim;
        let sorted = |name: &str, parts: &[usize]| -> Result<Linear, LoadError> {
            let name = layer_name(layer, &format!("linear_attn.{name}.weight"));
            let stride: usize = parts.iter().sum();
            self.index.check_shape(&name, &[n * stride, hidden])?;
            let mut rows = Vec::new();
            let mut offset = 0;
            for part in parts {
                let piece = |h: usize| Rows { name: name.clone(), first: h * stride + offset, n: *part };
                rows.extend((0..n).map(piece));
                offset += part;
            }
            Ok(Linear::bare(LinearWeight::Packed(Arc::new(self.rows(&rows, hidden)?))))
        };
        Ok((sorted("in_proj_qkvz", &[keys, keys, values, values])?, sorted("in_proj_ba", &[share, share])?))
    }
}
