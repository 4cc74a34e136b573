//! Weights of a mixture of experts, out of any of the layouts that checkpoints use, and rows picked out of larger tensors.

use std::{ops::Range, sync::Arc};

use parallax_kernels::{PackedWeight, WeightKind};

use super::{Loader, layer_name};
use crate::{
    config::{Attention, Experts, Router},
    error::LoadError,
    layer::{ExpertsMlpWeights, Linear, LinearWeight},
    ops::{
        experts::{Expert, ExpertWeights, RouterWeights},
        linear::FrozenLinear,
    },
    weights::{RowReader, Rows, pack::target},
};

/// How one layer's expert tensors are stored.
enum Layout {
    /// `PREFIX.3.GATE.weight`
    Each,
    /// `PREFIX.GATE.weight`, [E, F, H].
    Stacked,
    /// `PREFIX.gate_up_proj.weight`, [E, 2F, H], the gate's rows first, and `PREFIX.DOWN.weight`, [E, H, F].
    Merged,
    /// `PREFIX.gate_up_proj`, [E, 2F, H], and `PREFIX.down_proj`, [E, H, F].
    Fused,
    /// The same, each matrix transposed.
    Transposed,
}

impl Loader<'_> {
    /// Rows of stored tensors, one after the other, as one frozen linear layer.
    pub(super) fn rows(&self, pieces: &[Rows], k: usize) -> Result<FrozenLinear, LoadError> {
        Ok(FrozenLinear { parts: self.index.pack(pieces, k, self.dtype)?, transposed: None })
    }

    /// Some rows of an opened weight as one frozen linear layer.
    pub(super) fn rows_of(
        &self,
        reader: &RowReader<'_>,
        rows: Range<usize>,
    ) -> Result<FrozenLinear, LoadError> {
        let (n, kind) = (rows.len(), target(self.dtype, reader.native(), reader.k()));
        let mut bytes = Vec::new();
        reader.append(rows, kind, &mut bytes)?;
        let packed = PackedWeight::from_bytes(kind, &bytes, n, reader.k())
            .map_err(|e| LoadError::Pack { name: reader.name().to_owned(), reason: e.to_string() })?;
        Ok(FrozenLinear { parts: vec![packed], transposed: None })
    }

    /// Values computed from those of a weight, as a frozen linear layer in the format that was asked for. Native means the
    /// format of the weight, but bf16 where that has blocks: they would be rounded a second time.
    pub(super) fn values(
        &self,
        of: &RowReader<'_>,
        values: &[f32],
        n: usize,
        k: usize,
    ) -> Result<FrozenLinear, LoadError> {
        let native = if of.native().block().0 > 1 { WeightKind::Bf16 } else { of.native() };
        self.values_as(target(self.dtype, native, k), of.name(), values, n, k)
    }

    fn values_as(
        &self,
        kind: WeightKind,
        name: &str,
        values: &[f32],
        n: usize,
        k: usize,
    ) -> Result<FrozenLinear, LoadError> {
        let packed = PackedWeight::pack_f32(kind, values, n, k)
            .map_err(|e| LoadError::Pack { name: name.to_owned(), reason: e.to_string() })?;
        Ok(FrozenLinear { parts: vec![packed], transposed: None })
    }

    /// Queries, keys and values of gated attention, and the gate, whose rows stand between those of the queries.
    pub(super) fn gated_queries(&self, layer: usize, a: &Attention) -> Result<(Linear, Linear), LoadError> {
        let (d, hidden) = (a.head_dim, self.config.hidden);
        let [q, k, v] =
            ["q_proj", "k_proj", "v_proj"].map(|name| layer_name(layer, &format!("self_attn.{name}.weight")));
        self.index.check_shape(&q, &[2 * a.q_width(), hidden])?;
        let head = |first: usize| Rows { name: q.clone(), first, n: d };
        let mut qkv: Vec<Rows> = (0..a.n_heads).map(|h| head(2 * h * d)).collect();
        for name in [k, v] {
            self.index.check_shape(&name, &[a.kv_width(), hidden])?;
            qkv.push(Rows { name, first: 0, n: a.kv_width() });
        }
        let gate: Vec<Rows> = (0..a.n_heads).map(|h| head((2 * h + 1) * d)).collect();
        let linear = |rows: &[Rows]| -> Result<Linear, LoadError> {
            Ok(Linear::bare(LinearWeight::Packed(Arc::new(self.rows(rows, hidden)?))))
        };
        Ok((linear(&qkv)?, linear(&gate)?))
    }

    fn router(&self, layer: usize, r: &Router, n_experts: usize) -> Result<RouterWeights, LoadError> {
        let hidden = self.config.hidden;
        let name = layer_name(layer, &format!("{}.weight", r.name));
        let weight = self.index.read_shaped(&name, &[n_experts, hidden])?;
        let vector = |name: &str| self.index.read_shaped(&layer_name(layer, name), &[n_experts]);
        Ok(RouterWeights {
            weight: self.values_as(WeightKind::F32, &name, &weight, n_experts, hidden)?,
            bias: r.bias.then(|| vector(&format!("{}.bias", r.name))).transpose()?,
            correction: r.correction.map(vector).transpose()?,
            top_k: r.top_k,
            score: r.score,
            groups: r.groups,
            normalize: r.normalize,
            scale: r.scale,
        })
    }

    /// Everything of a layer with experts.
    pub(super) fn experts(&self, layer: usize, e: &Experts) -> Result<ExpertsMlpWeights, LoadError> {
        let hidden = self.config.hidden;
        let experts = (0..e.n_experts).map(|i| self.expert(layer, e, i)).collect::<Result<_, _>>()?;
        let shared = e.shared.as_ref().map(|m| self.dense_mlp(layer, m)).transpose()?;
        let shared_gate = match e.shared_gate {
            None => None,
            Some(name) => {
                let name = layer_name(layer, &format!("{name}.weight"));
                let gate = self.index.read_shaped(&name, &[1, hidden])?;
                let gate = self.values_as(WeightKind::F32, &name, &gate, 1, hidden)?;
                Some(Linear::bare(LinearWeight::Packed(Arc::new(gate))))
            }
        };
        let experts = ExpertWeights {
            hidden,
            ffn: e.ffn,
            router: self.router(layer, &e.router, e.n_experts)?,
            experts,
            activation: e.activation,
        };
        Ok(ExpertsMlpWeights { experts: Arc::new(experts), shared, shared_gate })
    }

    fn layout(&self, layer: usize, e: &Experts) -> Result<Layout, LoadError> {
        let (t, hidden) = (&e.tensors, self.config.hidden);
        let stacked = layer_name(layer, &format!("{}.{}.weight", t.prefix, t.gate));
        if self.index.contains(&stacked) {
            self.index.check_shape(&stacked, &[e.n_experts, e.ffn, hidden])?;
            return Ok(Layout::Stacked);
        }
        let fused = layer_name(layer, &format!("{}.gate_up_proj", t.prefix));
        let merged = format!("{fused}.weight");
        if self.index.contains(&merged) {
            self.index.check_shape(&merged, &[e.n_experts, 2 * e.ffn, hidden])?;
            return Ok(Layout::Merged);
        }
        if !self.index.contains(&fused) {
            return Ok(Layout::Each);
        }
        if t.alternating && !self.index.derived.contains_key(&fused) {
            self.index.check_shape(&fused, &[e.n_experts, hidden, 2 * e.ffn])?;
            return Ok(Layout::Transposed);
        }
        self.index.check_shape(&fused, &[e.n_experts, 2 * e.ffn, hidden])?;
        Ok(Layout::Fused)
    }

    fn expert(&self, layer: usize, e: &Experts, i: usize) -> Result<Expert, LoadError> {
        let (t, ffn, hidden) = (&e.tensors, e.ffn, self.config.hidden);
        let named = |name: &str| layer_name(layer, &format!("{}.{name}", t.prefix));
        let rows = |name: String, first: usize, n: usize| Rows { name, first, n };
        let (gate_up, down) = match self.layout(layer, e)? {
            Layout::Each => {
                let each = |name: &str| named(&format!("{i}.{name}.weight"));
                for (name, shape) in [(t.gate, [ffn, hidden]), (t.up, [ffn, hidden]), (t.down, [hidden, ffn])]
                {
                    self.index.check_shape(&each(name), &shape)?;
                }
                let gate_up = [rows(each(t.gate), 0, ffn), rows(each(t.up), 0, ffn)];
                (self.rows(&gate_up, hidden)?, self.rows(&[rows(each(t.down), 0, hidden)], ffn)?)
            }
            Layout::Stacked => {
                let stacked = |name: &str| named(&format!("{name}.weight"));
                let gate_up = [rows(stacked(t.gate), i * ffn, ffn), rows(stacked(t.up), i * ffn, ffn)];
                let down = [rows(stacked(t.down), i * hidden, hidden)];
                (self.rows(&gate_up, hidden)?, self.rows(&down, ffn)?)
            }
            Layout::Merged => {
                let gate_up = [rows(named("gate_up_proj.weight"), 2 * i * ffn, 2 * ffn)];
                let down = [rows(named(&format!("{}.weight", t.down)), i * hidden, hidden)];
                (self.rows(&gate_up, hidden)?, self.rows(&down, ffn)?)
            }
            Layout::Fused => {
                let both = rows(named("gate_up_proj"), 2 * i * ffn, 2 * ffn);
                let gate_up = if t.alternating {
                    // Even rows are the gate's.
                    let order = (0..ffn).map(|j| 2 * j).chain((0..ffn).map(|j| 2 * j + 1));
                    let packed = self.index.pack_ordered(&both, order, hidden, self.dtype)?;
                    FrozenLinear { parts: vec![packed], transposed: None }
                } else {
                    self.rows(&[both], hidden)?
                };
                let down = [rows(named("down_proj"), i * hidden, hidden)];
                (gate_up, self.rows(&down, ffn)?)
            }
            Layout::Transposed => {
                let name = named("gate_up_proj");
                let reader = self.index.reader(&name)?;
                let stored = reader.rows_f32(i * hidden..(i + 1) * hidden)?;
                let column = |c: usize| stored.iter().skip(c).step_by(2 * ffn).copied();
                let order = (0..ffn).map(|j| 2 * j).chain((0..ffn).map(|j| 2 * j + 1));
                let values: Vec<f32> = order.flat_map(column).collect();
                let gate_up = self.values(&reader, &values, 2 * ffn, hidden)?;
                let name = named("down_proj");
                let reader = self.index.reader(&name)?;
                let stored = reader.rows_f32(i * ffn..(i + 1) * ffn)?;
                let values: Vec<f32> =
                    (0..hidden).flat_map(|c| stored.iter().skip(c).step_by(hidden).copied()).collect();
                (gate_up, self.values(&reader, &values, hidden, ffn)?)
            }
        };
        let [gate_up_bias, down_bias] = self.expert_biases(layer, e, i)?;
        Ok(Expert { gate_up, gate_up_bias, down, down_bias })
    }

    fn expert_biases(&self, layer: usize, e: &Experts, i: usize) -> Result<[Option<Vec<f32>>; 2], LoadError> {
        let (t, ffn, hidden) = (&e.tensors, e.ffn, self.config.hidden);
        if !t.bias {
            return Ok([None, None]);
        }
        let named = |name: &str| layer_name(layer, &format!("{}.{name}", t.prefix));
        let row = |name: &str, n: usize| -> Result<Vec<f32>, LoadError> {
            let name = named(name);
            self.index.check_shape(&name, &[e.n_experts, n])?;
            Ok(self.index.read_rows_f32(&name, i..i + 1)?)
        };
        let stacked = |name: &str| format!("{name}.bias");
        if self.index.contains(&named(&stacked("gate_up_proj"))) {
            let gate_up = row(&stacked("gate_up_proj"), 2 * ffn)?;
            return Ok([Some(gate_up), Some(row(&stacked(t.down), hidden)?)]);
        }
        if self.index.contains(&named(&stacked(t.gate))) {
            let gate_up = [row(&stacked(t.gate), ffn)?, row(&stacked(t.up), ffn)?].concat();
            return Ok([Some(gate_up), Some(row(&stacked(t.down), hidden)?)]);
        }
        let mut gate_up = row("gate_up_proj_bias", 2 * ffn)?;
        if t.alternating {
            gate_up = (0..2).flat_map(|half| gate_up.iter().skip(half).step_by(2).copied()).collect();
        }
        Ok([Some(gate_up), Some(row("down_proj_bias", hidden)?)])
    }
}
