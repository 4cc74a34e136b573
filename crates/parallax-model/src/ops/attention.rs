//! The paged store that inference attends to, and the operation of training: rotary embedding and causal grouped attention
//! inside packed sequences. Inference runs the same kernels inside a fused operation (`fused.rs`), with the same bits.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::{Device, Tensor};
use parallax_kernels::{
    attention::{
        KvFormat, KvPages, RowRef, Scoring, causal_attention_backward, causal_attention_forward,
        latent::LatentPages,
    },
    rope::{RopeTable, rope_apply, rope_apply_inverse},
};

use super::{
    BackwardArgs, CpuOp, Output,
    delta::StateRows,
    norm::{columns, put_columns},
};
use crate::config::{LayerConfig, Mixer};

const SIZES: &str = "the store's sizes were checked with the load options";
const SHAPES: &str = "the batch was checked against the store before the first layer";

/// The attention of a layer without its linear weights; sinks are weights, but of the scores.
#[derive(Debug)]
pub(crate) struct Geometry {
    pub(crate) n_heads: usize,
    pub(crate) n_kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) rope: Option<Arc<Rotation>>,
    pub(crate) scale: f32,
    pub(crate) window: Option<usize>,
    pub(crate) softcap: Option<f32>,
    /// [Q]
    pub(crate) sinks: Option<Vec<f32>>,
}

/// A rotation, shared by the layers that have the same.
#[derive(Debug)]
pub(crate) struct Rotation {
    pub(crate) table: RopeTable,
    pub(crate) interleaved: bool,
    pub(crate) magnitude: f32,
    /// Radians per position of each pair, for the composed rotation. [dims / 2]
    pub(crate) frequencies: Vec<f32>,
}

impl Geometry {
    pub(super) fn scoring(&self) -> Scoring<'_> {
        let Self { scale, window, softcap, .. } = *self;
        Scoring { scale, window, softcap, sinks: self.sinks.as_deref() }
    }

    /// Columns of a fused row.
    pub(super) fn width(&self) -> usize {
        (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
    }

    /// Column ranges of q, k and v in a fused row.
    pub(super) fn parts(&self) -> [Range<usize>; 3] {
        let q = self.n_heads * self.head_dim;
        let kv = self.n_kv_heads * self.head_dim;
        [0..q, q..q + kv, q + kv..q + 2 * kv]
    }

    /// q and k rotated, v as it is.
    fn rotated(&self, qkv: &[f32], positions: &[u32]) -> [Vec<f32>; 3] {
        let [q, k, v] = self.parts().map(|range| columns(qkv, self.width(), &range));
        let rotate = |mut x: Vec<f32>, heads| {
            if let Some(rope) = &self.rope {
                rope_apply(&mut x, heads, positions, &rope.table).expect(SHAPES);
            }
            x
        };
        [rotate(q, self.n_heads), rotate(k, self.n_kv_heads), v]
    }
}

#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "one per layer")]
enum LayerStore {
    /// For the kernels.
    Pages(KvPages),
    /// For GPUs.
    #[cfg(feature = "gpu")]
    Device(super::gpu::DevicePages),
    /// For the composed route: [pages · page tokens, K·D] each.
    Tensors { k: Tensor<2>, v: Tensor<2> },
    /// Latent rows, for the kernels.
    Latents(LatentPages),
    /// The layer keeps a state per sequence instead.
    Nothing,
}

/// Keys and values of all layers of a stage, in pages that sequences share.
#[derive(Debug)]
pub(crate) struct KvStore {
    pub(crate) page_tokens: usize,
    layers: Vec<Mutex<LayerStore>>,
}

impl KvStore {
    /// Zeroed pages of sizes that were checked; the operating system hands out the memory when a page is first written.
    pub(crate) fn new(layers: &[LayerConfig], n_pages: usize, page_tokens: usize, format: KvFormat) -> Self {
        let layer = |layer: &LayerConfig| match &layer.mixer {
            Mixer::Attention(a) => {
                let pages = KvPages::new(format, n_pages, page_tokens, a.n_kv_heads, a.head_dim);
                Mutex::new(LayerStore::Pages(pages.expect(SIZES)))
            }
            Mixer::Latent(a) => {
                let pages = LatentPages::new(format, n_pages, page_tokens, a.stored());
                Mutex::new(LayerStore::Latents(pages.expect(SIZES)))
            }
            Mixer::Delta(_) => Mutex::new(LayerStore::Nothing),
        };
        Self { page_tokens, layers: layers.iter().map(layer).collect() }
    }

    /// The same as tensors, for the composed route.
    pub(crate) fn tensors(
        layers: &[LayerConfig],
        n_pages: usize,
        page_tokens: usize,
        device: &Device,
    ) -> Self {
        Self::of_attention(layers, page_tokens, |width| {
            let zeros = || Tensor::zeros([n_pages * page_tokens, width], device);
            LayerStore::Tensors { k: zeros(), v: zeros() }
        })
    }

    /// The same on a GPU.
    #[cfg(feature = "gpu")]
    pub(crate) fn on_device(
        layers: &[LayerConfig],
        n_pages: usize,
        page_tokens: usize,
        device: &Device,
    ) -> Self {
        Self::of_attention(layers, page_tokens, |width| {
            LayerStore::Device(super::gpu::DevicePages::new(device, n_pages * page_tokens, width))
        })
    }

    /// A store of layers that all attend, by the width of their keys.
    fn of_attention(layers: &[LayerConfig], page_tokens: usize, store: impl Fn(usize) -> LayerStore) -> Self {
        let layer = |layer: &LayerConfig| match &layer.mixer {
            Mixer::Attention(a) => Mutex::new(store(a.kv_width())),
            Mixer::Latent(_) | Mixer::Delta(_) => {
                unreachable!("loading refuses these layers on other devices")
            }
        };
        Self { page_tokens, layers: layers.iter().map(layer).collect() }
    }

    /// Copies the keys and values of a page of the store into another, in every layer.
    pub(crate) fn copy_page(&self, from: usize, to: usize) {
        for layer in &self.layers {
            match &mut *layer.lock().unwrap_or_else(PoisonError::into_inner) {
                LayerStore::Pages(pages) => pages.copy_page(from, to).expect(SHAPES),
                #[cfg(feature = "gpu")]
                LayerStore::Device(pages) => {
                    pages.copy_rows(from * self.page_tokens, to * self.page_tokens, self.page_tokens);
                }
                LayerStore::Tensors { k, v } => {
                    let rows = |page: usize| page * self.page_tokens..(page + 1) * self.page_tokens;
                    for values in [k, v] {
                        let width = values.dims()[1];
                        let page = values.clone().slice([rows(from), 0..width]);
                        *values = values.clone().slice_assign([rows(to), 0..width], page);
                    }
                }
                LayerStore::Latents(pages) => pages.copy_page(from, to).expect(SHAPES),
                LayerStore::Nothing => {}
            }
        }
    }

    /// Bytes when all pages are written.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |layer: &Mutex<LayerStore>| match &*layer.lock().unwrap_or_else(PoisonError::into_inner) {
            LayerStore::Pages(pages) => pages.bytes(),
            LayerStore::Latents(pages) => pages.bytes(),
            #[cfg(feature = "gpu")]
            LayerStore::Device(pages) => pages.bytes(),
            LayerStore::Tensors { k, v } => {
                4 * [k, v].iter().map(|t| t.dims().iter().product::<usize>()).sum::<usize>()
            }
            LayerStore::Nothing => 0,
        };
        self.layers.iter().map(bytes).sum()
    }

    pub(super) fn with_pages<R>(&self, layer: usize, f: impl FnOnce(&mut KvPages) -> R) -> R {
        let mut layer = self.layers[layer].lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *layer {
            LayerStore::Pages(pages) => f(pages),
            _ => unreachable!("a stage on the kernels' route makes a store in memory for attention"),
        }
    }

    pub(crate) fn with_latents<R>(&self, layer: usize, f: impl FnOnce(&mut LatentPages) -> R) -> R {
        let mut layer = self.layers[layer].lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *layer {
            LayerStore::Latents(latents) => f(latents),
            _ => unreachable!("a store has latent rows where the layer's attention is latent"),
        }
    }

    /// One layer of keys and values.
    #[cfg(test)]
    pub(crate) fn pages(page_tokens: usize, n_pages: usize, n_kv_heads: usize, head_dim: usize) -> Self {
        let pages = KvPages::new(KvFormat::F32, n_pages, page_tokens, n_kv_heads, head_dim).expect(SIZES);
        Self { page_tokens, layers: vec![Mutex::new(LayerStore::Pages(pages))] }
    }

    /// One layer of latent rows.
    #[cfg(test)]
    pub(crate) fn latents(page_tokens: usize, n_pages: usize, width: usize) -> Self {
        let pages = LatentPages::new(KvFormat::F32, n_pages, page_tokens, width).expect(SIZES);
        Self { page_tokens, layers: vec![Mutex::new(LayerStore::Latents(pages))] }
    }

    pub(crate) fn with_tensors<R>(
        &self,
        layer: usize,
        f: impl FnOnce(&mut Tensor<2>, &mut Tensor<2>) -> R,
    ) -> R {
        let mut layer = self.layers[layer].lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *layer {
            LayerStore::Tensors { k, v } => f(k, v),
            _ => unreachable!("a stage on the composed route makes a store of tensors"),
        }
    }

    #[cfg(feature = "gpu")]
    pub(super) fn with_device<R>(&self, layer: usize, f: impl FnOnce(&super::gpu::DevicePages) -> R) -> R {
        let layer = self.layers[layer].lock().unwrap_or_else(PoisonError::into_inner);
        match &*layer {
            LayerStore::Device(pages) => f(pages),
            _ => unreachable!("a stage on the route of GPUs makes its store there"),
        }
    }
}

/// The rows of a batch as attention sees them.
#[derive(Debug, Default)]
pub(crate) struct PagedRows {
    /// Position of each row in its sequence. [T]
    pub(crate) positions: Vec<u32>,
    /// Sequence of each row, and how many keys it attends to. [T]
    pub(crate) rows: Vec<RowRef>,
    /// Page table of each sequence.
    pub(crate) tables: Vec<Vec<u32>>,
    /// Rows of each sequence, as recurrent layers see them.
    pub(crate) sequences: Arc<Vec<StateRows>>,
    #[cfg(feature = "gpu")]
    pub(crate) device: super::gpu::DeviceBatch,
}

/// Input: qkv [T, (Q + 2K)·D] of packed sequences; result [T, Q·D].
#[derive(Debug)]
pub(crate) struct PackedAttention {
    pub(crate) geometry: Arc<Geometry>,
    pub(crate) positions: Arc<Vec<u32>>,
    /// Sequence i is rows `cu_seqlens[i]..cu_seqlens[i + 1]`.
    pub(crate) cu_seqlens: Arc<Vec<u32>>,
}

impl CpuOp for PackedAttention {
    fn forward(&self, inputs: &[&[f32]], keep: bool) -> Output {
        let g = &self.geometry;
        let [q, k, v] = g.rotated(inputs[0], &self.positions);
        let mut out = vec![0.0; q.len()];
        let mut lse = vec![0.0; self.positions.len() * g.n_heads];
        causal_attention_forward(
            &q,
            &k,
            &v,
            g.n_heads,
            g.n_kv_heads,
            g.head_dim,
            &self.cu_seqlens,
            &g.scoring(),
            &mut out,
            &mut lse,
        )
        .expect(SHAPES);
        let columns = g.n_heads * g.head_dim;
        let saved = if keep { [out.as_slice(), &lse].concat() } else { Vec::new() };
        Output { saved, ..Output::matrix(out, columns) }
    }

    fn backward(&self, args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        let g = &self.geometry;
        // Rotating again is cheaper than keeping three more buffers per layer.
        let [q, k, v] = g.rotated(args.inputs[0], &self.positions);
        let (out, lse) = args.saved.split_at(q.len());
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
        causal_attention_backward(
            &q,
            &k,
            &v,
            out,
            lse,
            args.grad,
            g.n_heads,
            g.n_kv_heads,
            g.head_dim,
            &self.cu_seqlens,
            &g.scoring(),
            &mut dq,
            &mut dk,
            &mut dv,
        )
        .expect(SHAPES);
        if let Some(rope) = &g.rope {
            rope_apply_inverse(&mut dq, g.n_heads, &self.positions, &rope.table).expect(SHAPES);
            rope_apply_inverse(&mut dk, g.n_kv_heads, &self.positions, &rope.table).expect(SHAPES);
        }
        let mut dx = vec![0.0; args.inputs[0].len()];
        for (range, part) in g.parts().iter().zip([dq, dk, dv]) {
            put_columns(&mut dx, g.width(), range, &part);
        }
        vec![Some(dx)]
    }
}
