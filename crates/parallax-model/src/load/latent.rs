//! Weights of latent attention: the matrix out of compressed rows, cut into heads, its keys' half transposed so that it
//! goes into the queries.

use std::sync::Arc;

use super::{Loader, Rotations, layer_name};
use crate::{config::Latent, error::LoadError, layer::LatentMixerWeights, ops::latent::LatentWeights};

impl Loader<'_> {
    pub(super) fn latent(
        &self,
        layer: usize,
        a: &Latent,
        rotations: &mut Rotations,
    ) -> Result<LatentMixerWeights, LoadError> {
        let (hidden, rank) = (self.config.hidden, a.kv_rank);
        let name = layer_name(layer, &format!("{}.weight", a.kv_out));
        let head = a.nope_dim + a.value_dim;
        self.index.check_shape(&name, &[a.n_heads * head, rank])?;
        let (mut into_latent, mut to_value) = (Vec::new(), Vec::new());
        for h in 0..a.n_heads {
            let keys = self.index.read_rows_f32(&name, h * head..h * head + a.nope_dim)?;
            let transposed: Vec<f32> =
                (0..rank).flat_map(|r| keys.iter().skip(r).step_by(rank).copied()).collect();
            into_latent.push(self.values(&name, &transposed, rank, a.nope_dim)?);
            let first = h * head + a.nope_dim;
            to_value.push(
                self.rows(&[crate::weights::Rows { name: name.clone(), first, n: a.value_dim }], rank)?,
            );
        }
        let norm = layer_name(layer, &format!("{}.weight", a.kv_norm.name));
        let q_in = self.projection(layer, &a.q_in, &[a.q_rank.unwrap_or_else(|| a.q_width())], hidden)?;
        let q_out = match (&a.q_out, a.q_rank) {
            (Some((norm, out)), Some(rank)) => Some((
                self.norm(&layer_name(layer, norm.name), norm, rank)?,
                self.projection(layer, out, &[a.q_width()], rank)?,
            )),
            _ => None,
        };
        let inner = LatentWeights {
            n_heads: a.n_heads,
            nope_dim: a.nope_dim,
            rope_dim: a.rope_dim,
            value_dim: a.value_dim,
            rank,
            norm: self.index.read_shaped(&norm, &[rank])?,
            eps: a.kv_norm.eps,
            rope: rotations.get(&a.rope, a.rope_dim)?,
            scale: a.scale,
            into_latent,
            to_value,
        };
        Ok(LatentMixerWeights {
            inner: Arc::new(inner),
            q_in,
            q_out,
            kv_in: self.projection(layer, &a.kv_in, &[a.stored()], hidden)?,
            o: self.projection(layer, &a.o, &[hidden], a.n_heads * a.value_dim)?,
        })
    }
}
