//! Weights of latent attention: the matrix out of compressed rows, cut into heads, its keys' half transposed so that it
//! goes into the queries.

use std::sync::Arc;

use super::{Loader, Rotations, layer_name};
use crate::{
    config::Latent,
    error::LoadError,
    layer::LatentMixerWeights,
    ops::{latent::LatentWeights, linear::FrozenLinear},
    weights::{LATENT_PARTS, Rows},
};

impl Loader<'_> {
    pub(super) fn latent(
        &self,
        layer: usize,
        a: &Latent,
        rotations: &mut Rotations,
    ) -> Result<LatentMixerWeights, LoadError> {
        let (hidden, rank) = (self.config.hidden, a.kv_rank);
        let (to_latent, to_value) = self.latent_heads(layer, a)?;
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
            to_latent,
            to_value,
        };
        Ok(LatentMixerWeights {
            inner: Arc::new(inner),
            adapters: Vec::new(),
            q_in,
            q_out,
            kv_in: self.projection(layer, &a.kv_in, &[a.stored()], hidden)?,
            o: self.projection(layer, &a.o, &[hidden], a.n_heads * a.value_dim)?,
        })
    }

    /// The matrices that take each head's queries into compressed rows, and compressed rows to its values. GGUF files
    /// have the two apart, the former transposed already; older ones have them as the checkpoint did.
    fn latent_heads(
        &self,
        layer: usize,
        a: &Latent,
    ) -> Result<(Vec<FrozenLinear>, Vec<FrozenLinear>), LoadError> {
        let named = |module: &str| layer_name(layer, &format!("{module}.weight"));
        let (whole, apart) = (named(a.kv_out), LATENT_PARTS.map(named));
        let (rank, nope, value) = (a.kv_rank, a.nope_dim, a.value_dim);
        let (mut to_latent, mut to_value) = (Vec::new(), Vec::new());
        let rows = |name: &String, first: usize, n: usize| [Rows { name: name.clone(), first, n }];
        if !self.index.contains(&whole) && self.index.contains(&apart[0]) {
            let [keys, values] = &apart;
            self.index.check_shape(keys, &[a.n_heads, rank, nope])?;
            self.index.check_shape(values, &[a.n_heads, value, rank])?;
            for h in 0..a.n_heads {
                to_latent.push(self.rows(&rows(keys, h * rank, rank), nope)?);
                to_value.push(self.rows(&rows(values, h * value, value), rank)?);
            }
            return Ok((to_latent, to_value));
        }
        let head = nope + value;
        self.index.check_shape(&whole, &[a.n_heads * head, rank])?;
        let reader = self.index.reader(&whole)?;
        for first in (0..a.n_heads).map(|h| h * head) {
            let keys = reader.rows_f32(first..first + nope)?;
            let transposed: Vec<f32> =
                (0..rank).flat_map(|r| keys.iter().skip(r).step_by(rank).copied()).collect();
            to_latent.push(self.values(&reader, &transposed, rank, nope)?);
            to_value.push(self.rows_of(&reader, first + nope..first + head)?);
        }
        Ok((to_latent, to_value))
    }
}
