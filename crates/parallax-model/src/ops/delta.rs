//! The gated delta net (Qwen3-Next): a short convolution, the gated delta rule, a gated norm. What it remembers of a
//! sequence is one state per layer, kept in a [`StateStore`] beside the key-value pages.

use std::{
    collections::BTreeMap,
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use parallax_kernels::{
    delta::{DeltaRows, DeltaShape, causal_conv_silu, delta_gates, gated_delta_rule},
    gates::{Gate, apply_gate},
    norm::rms_norm,
};

use super::{BackwardArgs, CpuOp, Output, norm::columns};
use crate::error::ForwardError;

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// What the mixer knows beside its linear layers.
#[derive(Debug)]
pub(crate) struct DeltaWeights {
    pub(crate) shape: DeltaShape,
    /// [taps, channels]; channels are q, k and v.
    pub(crate) conv: Vec<f32>,
    /// [Hv]
    pub(crate) a_log: Vec<f32>,
    /// [Hv]
    pub(crate) dt_bias: Vec<f32>,
    /// Of each head of the result. [Dv]
    pub(crate) norm: Vec<f32>,
    pub(crate) eps: f32,
}

impl DeltaWeights {
    fn key_width(&self) -> usize {
        self.shape.n_key_heads * self.shape.key_dim
    }

    fn value_width(&self) -> usize {
        self.shape.n_heads * self.shape.value_dim
    }

    /// Channels of the convolution.
    pub(crate) fn channels(&self) -> usize {
        2 * self.key_width() + self.value_width()
    }

    fn fresh(&self) -> LayerState {
        let taps = self.conv.len() / self.channels();
        LayerState {
            conv: vec![0.0; (taps - 1) * self.channels()],
            matrix: vec![0.0; self.shape.state_len()],
        }
    }

    /// Heads of unit length, times `scale`.
    fn unit(&self, heads: &[f32], scale: f32) -> Vec<f32> {
        // x / sqrt(Σx² + 1e-6) is the RMS norm with weight 1 / sqrt(Dk) and eps / Dk.
        let dim = self.shape.key_dim;
        let weight = vec![scale / (dim as f32).sqrt(); dim];
        let mut out = vec![0.0; heads.len()];
        rms_norm(heads, &weight, 1e-6 / dim as f32, &mut out).expect(SHAPES);
        out
    }
}

/// What one layer remembers of a sequence.
#[derive(Clone, Debug)]
struct LayerState {
    /// [taps - 1, channels]
    conv: Vec<f32>,
    matrix: Vec<f32>,
}

/// What a stage remembers of a sequence.
#[derive(Debug, Default)]
struct SequenceState {
    /// Rows seen; `None` while a forward pass runs, and after one that failed.
    position: Option<u32>,
    /// By the layer's index in the stage.
    layers: BTreeMap<usize, LayerState>,
    /// When it was last used.
    used: u64,
}

/// Rows of one sequence in a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StateRows {
    /// Whose state.
    pub(crate) id: u64,
    /// Position of the first row.
    pub(crate) start: u32,
    /// Rows of the batch.
    pub(crate) rows: Range<usize>,
}

/// States of the sequences that a stage is working on.
#[derive(Debug)]
pub(crate) struct StateStore {
    /// Sequences kept; the one unused for longest makes room.
    capacity: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    sequences: BTreeMap<u64, SequenceState>,
    clock: u64,
}

impl StateStore {
    /// Room for so many sequences.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { capacity: capacity.max(1), inner: Mutex::default() }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a forward pass: rows from position 0 begin anew, others must continue where their state stands.
    ///
    /// # Errors
    /// They do not, or a sequence appears twice, or the batch has more sequences than there is room for.
    pub(crate) fn begin(&self, rows: &[StateRows]) -> Result<(), ForwardError> {
        let batch = |reason: String| Err(ForwardError::Batch { reason });
        if rows.len() > self.capacity {
            return batch(format!("{} sequences, there is state for {}", rows.len(), self.capacity));
        }
        let mut inner = self.lock();
        for (i, row) in rows.iter().enumerate() {
            if rows[..i].iter().any(|other| other.id == row.id) {
                return batch(format!("sequence {} appears twice; its state has one successor", row.id));
            }
            let stands = inner.sequences.get(&row.id).and_then(|s| s.position);
            if row.start > 0 && stands != Some(row.start) {
                let stands = stands.map_or_else(|| "is gone".to_owned(), |at| format!("stands at {at}"));
                return batch(format!(
                    "sequence {} continues at position {}, but its recurrent state {stands}; run it again from 0",
                    row.id, row.start
                ));
            }
        }
        inner.clock += 1;
        let clock = inner.clock;
        for row in rows {
            let state = inner.sequences.entry(row.id).or_default();
            if row.start == 0 {
                state.layers.clear();
            }
            (state.position, state.used) = (None, clock);
        }
        while inner.sequences.len() > self.capacity {
            let oldest = inner.sequences.iter().min_by_key(|(_, s)| s.used).map(|(id, _)| *id);
            inner.sequences.remove(&oldest.expect("the map is not empty"));
        }
        Ok(())
    }

    /// After a forward pass that went well.
    pub(crate) fn commit(&self, rows: &[StateRows]) {
        let mut inner = self.lock();
        for row in rows {
            if let Some(state) = inner.sequences.get_mut(&row.id) {
                state.position = Some(row.start + row.rows.len() as u32);
            }
        }
    }

    /// Forgets a sequence.
    pub(crate) fn release(&self, id: u64) {
        self.lock().sequences.remove(&id);
    }

    /// Sequences remembered.
    pub(crate) fn len(&self) -> usize {
        self.lock().sequences.len()
    }

    fn take(&self, layer: usize, rows: &[StateRows], weights: &DeltaWeights) -> Vec<LayerState> {
        let mut inner = self.lock();
        let mut one = |row: &StateRows| {
            let state = inner.sequences.get_mut(&row.id).expect("begin made an entry for every sequence");
            state.layers.remove(&layer).unwrap_or_else(|| weights.fresh())
        };
        rows.iter().map(&mut one).collect()
    }

    fn put(&self, layer: usize, rows: &[StateRows], states: Vec<LayerState>) {
        let mut inner = self.lock();
        for (row, state) in rows.iter().zip(states) {
            if let Some(sequence) = inner.sequences.get_mut(&row.id) {
                sequence.layers.insert(layer, state);
            }
        }
    }
}

/// Inputs: [q | k | v | z] [T, channels + Hv·Dv] and [b | a] [T, 2·Hv]; result [T, Hv·Dv]. Moves the states on.
#[derive(Debug)]
pub(crate) struct GatedDelta {
    pub(crate) weights: Arc<DeltaWeights>,
    pub(crate) states: Arc<StateStore>,
    /// Index within the stage.
    pub(crate) layer: usize,
    pub(crate) rows: Arc<Vec<StateRows>>,
}

impl CpuOp for GatedDelta {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let w = &self.weights;
        let (channels, keys, values) = (w.channels(), w.key_width(), w.value_width());
        let (n_heads, width) = (w.shape.n_heads, channels + values);
        let mixed = columns(inputs[0], width, &(0..channels));
        let z = columns(inputs[0], width, &(channels..width));
        let b = columns(inputs[1], 2 * n_heads, &(0..n_heads));
        let a = columns(inputs[1], 2 * n_heads, &(n_heads..2 * n_heads));
        let [decay, beta] = delta_gates(&a, &b, &w.a_log, &w.dt_bias).expect(SHAPES);
        let sequences: Vec<Range<usize>> = self.rows.iter().map(|r| r.rows.clone()).collect();

        let mut states = self.states.take(self.layer, &self.rows, w);
        let mut convolved = vec![0.0; mixed.len()];
        let mut conv: Vec<&mut [f32]> = states.iter_mut().map(|s| s.conv.as_mut_slice()).collect();
        causal_conv_silu(&mixed, &w.conv, channels, &sequences, &mut conv, &mut convolved).expect(SHAPES);
        let part = |range| columns(&convolved, channels, &range);
        let rows = DeltaRows {
            q: &w.unit(&part(0..keys), (w.shape.key_dim as f32).sqrt().recip()),
            k: &w.unit(&part(keys..2 * keys), 1.0),
            v: &part(2 * keys..channels),
            decay: &decay,
            beta: &beta,
            sequences: &sequences,
        };
        let mut out = vec![0.0; rows.v.len()];
        let mut matrices: Vec<&mut [f32]> = states.iter_mut().map(|s| s.matrix.as_mut_slice()).collect();
        gated_delta_rule(w.shape, &rows, &mut matrices, &mut out).expect(SHAPES);
        self.states.put(self.layer, &self.rows, states);

        let mut normed = vec![0.0; out.len()];
        rms_norm(&out, &w.norm, w.eps, &mut normed).expect(SHAPES);
        apply_gate(Gate::Silu, &z, &mut normed).expect(SHAPES);
        Output::matrix(normed, values)
    }

    fn backward(&self, _args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        unreachable!("models with recurrent layers are refused where gradients are asked for")
    }
}

/// Inputs: y [T, N], gate [T, N] or [T, 1]; result y · sigmoid(gate).
#[derive(Debug)]
pub(crate) struct SigmoidGate {
    pub(crate) columns: usize,
}

impl CpuOp for SigmoidGate {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let mut y = inputs[0].to_vec();
        if inputs[1].len() == y.len() {
            apply_gate(Gate::Sigmoid, inputs[1], &mut y).expect(SHAPES);
        } else {
            let wide: Vec<f32> =
                inputs[1].iter().flat_map(|g| std::iter::repeat_n(*g, self.columns)).collect();
            apply_gate(Gate::Sigmoid, &wide, &mut y).expect(SHAPES);
        }
        Output::matrix(y, self.columns)
    }

    fn backward(&self, _args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        unreachable!("models with output gates are refused where gradients are asked for")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parallax_kernels::reference::noise;

    fn weights() -> DeltaWeights {
        let shape = DeltaShape { n_key_heads: 2, n_heads: 4, key_dim: 8, value_dim: 6 };
        let channels = 2 * 16 + 24;
        DeltaWeights {
            shape,
            conv: noise(4 * channels, 1),
            a_log: noise(4, 2),
            dt_bias: noise(4, 3),
            norm: vec![1.0; 6],
            eps: 1e-6,
        }
    }

    fn run(store: &Arc<StateStore>, rows: &[StateRows], x: &[f32], ba: &[f32]) -> Vec<f32> {
        store.begin(rows).unwrap();
        let op = GatedDelta {
            weights: Arc::new(weights()),
            states: Arc::clone(store),
            layer: 0,
            rows: Arc::new(rows.to_vec()),
        };
        let out = op.forward(&[x, ba], false).values;
        store.commit(rows);
        out
    }

    #[test]
    fn sequences_keep_their_own_state_whatever_the_batches() {
        let (width, gates, n) = (56 + 24, 8, 17);
        let (x, ba) = (noise(n * width, 4), noise(n * gates, 5));
        let whole = StateStore::new(4);
        let expected = run(&Arc::new(whole), &[StateRows { id: 1, start: 0, rows: 0..n }], &x, &ba);
        let store = Arc::new(StateStore::new(4));
        let mut got = Vec::new();
        for (start, end) in [(0, 5), (5, 6), (6, 17)] {
            // Another sequence runs along, always from its beginning.
            let m = end - start;
            let rows = [
                StateRows { id: 7, start: 0, rows: 0..m },
                StateRows { id: 1, start: start as u32, rows: m..2 * m },
            ];
            let with = |v: &[f32], width: usize| [&v[..m * width], &v[start * width..end * width]].concat();
            let out = run(&store, &rows, &with(&x, width), &with(&ba, gates));
            let (other, own) = out.split_at(m * 24);
            assert_eq!(other, &expected[..m * 24]);
            got.extend_from_slice(own);
        }
        assert!(got.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()));
    }

    #[test]
    fn a_state_is_continued_where_it_stands_or_not_at_all() {
        let store = StateStore::new(2);
        let row = |id, start, n: usize| StateRows { id, start, rows: 0..n };
        let begin = |row: StateRows| store.begin(&[row]);
        assert!(begin(row(1, 3, 1)).is_err(), "never begun");
        begin(row(1, 0, 3)).unwrap();
        assert!(begin(row(1, 3, 1)).is_err(), "the pass did not end");
        begin(row(1, 0, 3)).unwrap();
        store.commit(&[row(1, 0, 3)]);
        assert!(begin(row(1, 2, 1)).is_err(), "no way back");
        begin(row(1, 3, 1)).unwrap();
        store.commit(&[row(1, 3, 1)]);
        assert!(store.begin(&[row(2, 0, 1), row(2, 0, 1)]).is_err());
        begin(row(2, 0, 1)).unwrap();
        begin(row(3, 0, 1)).unwrap();
        assert_eq!(store.len(), 2, "the one unused for longest made room");
        assert!(begin(row(1, 4, 1)).is_err());
        store.release(3);
        assert_eq!(store.len(), 1);
    }
}
