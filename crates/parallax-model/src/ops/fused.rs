//! The parts of a layer in inference on the CPU as one operation: their kernels one after the other, on memory that the
//! thread keeps, nothing of Burn between them. These are the kernels of the operations that training runs, in the same
//! order, so the bits are the same.

use std::sync::Arc;

use parallax_kernels::{
    activation::{Activation, add_assign},
    attention::{Paging, append_kv, paged_attention},
    gates::{Gate, apply_gate},
    linear::{gated_linear, linear_multi, norm_linear},
    norm::rms_norm,
    rope::rope_apply,
};

use super::{
    BackwardArgs, CpuOp, Output, Values,
    attention::{Geometry, KvStore, PagedRows},
    linear::{FrozenLinear, LoraModule, add_bias},
    norm::columns_into,
    scratch::with_scratch,
};
use crate::layer::AdapterRows;

const SHAPES: &str = "weights were checked when they were loaded, the batch before the first layer";

/// A linear layer with its bias and its adapters.
#[derive(Debug)]
pub(crate) struct FusedLinear {
    pub(crate) weight: Arc<FrozenLinear>,
    /// [N]
    pub(crate) bias: Option<Values>,
    /// In the order in which they are added.
    pub(crate) adapters: Vec<FusedAdapter>,
}

/// An adapter's modules in a linear layer, as [`Lora`](super::linear::Lora) has them.
#[derive(Debug)]
pub(crate) struct FusedAdapter {
    pub(crate) a: Values,
    pub(crate) b: Values,
    pub(crate) modules: Arc<Vec<LoraModule>>,
    pub(crate) rows: Arc<AdapterRows>,
}

impl FusedLinear {
    fn apply(&self, x: &[f32], y: &mut [f32]) {
        linear_multi(x, &self.weight.parts, y).expect(SHAPES);
        self.add(x, y);
    }

    /// Adds to the product y what comes with the weights.
    fn add(&self, x: &[f32], y: &mut [f32]) {
        add_bias(y, self.bias.as_deref());
        for adapter in &self.adapters {
            if let Some(lora) = adapter.rows.lora(&adapter.modules) {
                lora.apply(y, self.weight.n(), x, &adapter.a, &adapter.b);
            }
        }
    }
}

/// An RMS norm of rows.
#[derive(Debug)]
pub(crate) struct FusedNorm {
    pub(crate) weight: Values,
    pub(crate) eps: f32,
}

/// What stands around a part of a layer.
#[derive(Debug)]
pub(crate) struct FusedAround {
    pub(crate) before: Option<FusedNorm>,
    pub(crate) after: Option<FusedNorm>,
    /// Factor of the result where it is added.
    pub(crate) scale: f32,
}

impl FusedAround {
    /// y = before(x) · Wᵀ with what is added to it; returns before(x), in `normed` where there is a norm.
    fn enter<'a>(
        &self,
        x: &'a [f32],
        normed: &'a mut [f32],
        linear: &FusedLinear,
        y: &mut [f32],
    ) -> &'a [f32] {
        let Some(norm) = &self.before else {
            linear.apply(x, y);
            return x;
        };
        norm_linear(x, &norm.weight, norm.eps, normed, &linear.weight.parts, y).expect(SHAPES);
        linear.add(normed, y);
        normed
    }

    /// Elements that [`Self::leave`] needs, for rows of `len` elements together.
    fn spare(&self, len: usize) -> usize {
        if self.after.is_some() { len } else { 0 }
    }

    /// x += scale · after(result).
    fn leave(&self, x: &mut [f32], result: &mut [f32], spare: &mut [f32]) {
        let result = match &self.after {
            None => result,
            Some(norm) => {
                rms_norm(result, &norm.weight, norm.eps, spare).expect(SHAPES);
                spare
            }
        };
        if self.scale.to_bits() != 1.0f32.to_bits() {
            result.iter_mut().for_each(|v| *v *= self.scale);
        }
        add_assign(x, result).expect(SHAPES);
    }
}

/// Causal attention with grouped keys, over a paged store to which it appends.
#[derive(Debug)]
pub(crate) struct FusedAttention {
    pub(crate) geometry: Arc<Geometry>,
    pub(crate) qkv: FusedLinear,
    /// Of queries and keys.
    pub(crate) head_norms: Option<[FusedNorm; 2]>,
    /// Its sigmoid multiplies what was attended to.
    pub(crate) gate: Option<FusedLinear>,
    pub(crate) o: FusedLinear,
    pub(crate) around: FusedAround,
}

impl FusedAttention {
    /// Adds the part's result to x [T, H].
    fn add_to(&self, x: &mut [f32], store: &KvStore, layer: usize, rows: &PagedRows) {
        let g = &*self.geometry;
        let (n, width) = (rows.rows.len(), g.width());
        let parts = g.parts();
        let [queries, keys, _] = parts.each_ref().map(|columns| n * columns.len());
        let lens = [x.len(), self.around.spare(x.len()), n * width, queries, keys, keys, queries];
        with_scratch(lens, |[hidden, spare, qkv, q, k, v, attended]| {
            let normed = self.around.enter(x, hidden, &self.qkv, qkv);
            for (i, part) in [&mut *q, &mut *k].into_iter().enumerate() {
                match &self.head_norms {
                    None => columns_into(qkv, width, &parts[i], part),
                    Some(norms) => {
                        let plain = &mut attended[..part.len()];
                        columns_into(qkv, width, &parts[i], plain);
                        rms_norm(plain, &norms[i].weight, norms[i].eps, part).expect(SHAPES);
                    }
                }
            }
            columns_into(qkv, width, &parts[2], v);
            if let Some(rope) = &g.rope {
                rope_apply(q, g.n_heads, &rows.positions, &rope.table).expect(SHAPES);
                rope_apply(k, g.n_kv_heads, &rows.positions, &rope.table).expect(SHAPES);
            }
            store.with_pages(layer, |pages| {
                let paging = Paging { rows: &rows.rows, tables: &rows.tables };
                append_kv(pages, &paging, k, v).expect(SHAPES);
                paged_attention(q, g.n_heads, &paging, pages, &g.scoring(), attended).expect(SHAPES);
            });
            if let Some(gate) = &self.gate {
                // The queries are done with.
                gate.apply(normed, q);
                apply_gate(Gate::Sigmoid, q, attended).expect(SHAPES);
            }
            self.o.apply(attended, hidden);
            self.around.leave(x, hidden, spare);
        });
    }
}

/// activation(gate) · up, down.
#[derive(Debug)]
pub(crate) struct FusedMlp {
    pub(crate) gate_up: FusedLinear,
    pub(crate) down: FusedLinear,
    pub(crate) activation: Activation,
    pub(crate) around: FusedAround,
}

impl FusedMlp {
    /// Adds the part's result to x [T, H].
    fn add_to(&self, x: &mut [f32]) {
        let inner = x.len() / self.down.weight.n() * self.down.weight.k();
        let lens = [x.len(), self.around.spare(x.len()), 2 * inner, inner];
        with_scratch(lens, |[hidden, spare, gate_up, inner]| {
            self.around.enter(x, hidden, &self.gate_up, gate_up);
            gated_linear(self.activation, gate_up, inner, &self.down.weight.parts, hidden).expect(SHAPES);
            self.down.add(inner, hidden);
            self.around.leave(x, hidden, spare);
        });
    }
}

/// The parts of a layer that run as one operation.
#[derive(Debug)]
pub(crate) struct FusedParts {
    pub(crate) attention: Option<FusedAttention>,
    pub(crate) mlp: Option<FusedMlp>,
}

/// Input: hidden rows [T, H]; result: the same after the parts.
#[derive(Debug)]
pub(crate) struct RunParts {
    pub(crate) parts: Arc<FusedParts>,
    pub(crate) store: Arc<KvStore>,
    /// Index within the stage.
    pub(crate) layer: usize,
    pub(crate) rows: Arc<PagedRows>,
}

impl CpuOp for RunParts {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let mut x = inputs[0].to_vec();
        if let Some(attention) = &self.parts.attention {
            attention.add_to(&mut x, &self.store, self.layer, &self.rows);
        }
        if let Some(mlp) = &self.parts.mlp {
            mlp.add_to(&mut x);
        }
        let columns = x.len() / self.rows.rows.len();
        Output::matrix(x, columns)
    }

    fn backward(&self, _args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        unreachable!("training runs its operations one by one")
    }
}
