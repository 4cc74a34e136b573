//! The gated delta net (Qwen3-Next): a short convolution, the gated delta rule, a gated norm. What it remembers of a
//! sequence is one state per layer, kept in a slot of a [`StateStore`] beside the key-value pages.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use parallax_kernels::{
    delta::{DeltaRows, DeltaShape, causal_conv_silu, delta_gates, gated_delta_rule},
    gates::{Gate, apply_gate},
    norm::rms_norm,
};

use super::{BackwardArgs, CpuOp, Output, norm::columns};
use crate::{error::ForwardError, stage::StateSave};

const SHAPES: &str = "shapes were checked when the weights were loaded";

/// What the mixer knows beside its linear layers.
#[derive(Debug)]
pub(crate) struct DeltaWeights {
    pub(crate) shape: DeltaShape,
    /// [taps, channels]; channels are q, k and v.
    pub(crate) conv: Vec<f32>,
    /// How fast each head forgets. [Hv]
    pub(crate) rates: Vec<f64>,
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

    fn fresh(&self) -> State {
        let taps = self.conv.len() / self.channels();
        State { conv: vec![0.0; (taps - 1) * self.channels()], matrix: vec![0.0; self.shape.state_len()] }
    }

    /// Moves states over drafted rows that stay; their results are known already.
    fn replay(&self, kept: &[Kept], states: &mut [State]) {
        let mut inputs = Inputs::default();
        let (mut due, mut moved) = (Vec::new(), Vec::new());
        for (kept, state) in kept.iter().zip(states) {
            let n = kept.drafts.n_rows(self);
            if n > 0 {
                let first = inputs.n_rows(self);
                inputs.append(self, &kept.drafts, &(0..n));
                due.push(first..first + n);
                moved.push(state);
            }
        }
        let mut out = vec![0.0; inputs.n_rows(self) * self.value_width()];
        self.walk(&inputs, &due, moved, &mut out);
    }

    /// Moves a state for each of the neighbouring ranges `due` of rows, and writes these rows' results to their places in `out`.
    fn walk<'s>(
        &self,
        inputs: &Inputs,
        due: &[Range<usize>],
        states: impl IntoIterator<Item = &'s mut State>,
        out: &mut [f32],
    ) {
        let rows = due.first().map_or(0, |r| r.start)..due.last().map_or(0, |r| r.end);
        if rows.is_empty() {
            return;
        }
        let (channels, keys, n_heads) = (self.channels(), self.key_width(), self.shape.n_heads);
        let sequences: Vec<Range<usize>> =
            due.iter().map(|r| r.start - rows.start..r.end - rows.start).collect();
        let mixed = &inputs.mixed[rows.start * channels..rows.end * channels];
        let gates = rows.start * n_heads..rows.end * n_heads;
        let (mut conv, mut matrices): (Vec<&mut [f32]>, Vec<&mut [f32]>) =
            states.into_iter().map(|s| (s.conv.as_mut_slice(), s.matrix.as_mut_slice())).unzip();
        let mut convolved = vec![0.0; mixed.len()];
        causal_conv_silu(mixed, &self.conv, channels, &sequences, &mut conv, &mut convolved).expect(SHAPES);
        let part = |range| columns(&convolved, channels, &range);
        let heads = DeltaRows {
            q: &self.unit(&part(0..keys), (self.shape.key_dim as f32).sqrt().recip()),
            k: &self.unit(&part(keys..2 * keys), 1.0),
            v: &part(2 * keys..channels),
            decay: &inputs.decay[gates.clone()],
            beta: &inputs.beta[gates],
            sequences: &sequences,
        };
        let values = self.value_width();
        let out = &mut out[rows.start * values..rows.end * values];
        gated_delta_rule(self.shape, &heads, &mut matrices, out).expect(SHAPES);
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
#[derive(Clone, Debug, Default)]
struct State {
    /// [taps - 1, channels]
    conv: Vec<f32>,
    matrix: Vec<f32>,
}

/// What the recurrence takes from rows.
#[derive(Clone, Debug, Default)]
struct Inputs {
    /// [T, channels]
    mixed: Vec<f32>,
    /// [T, Hv]
    decay: Vec<f32>,
    /// [T, Hv]
    beta: Vec<f32>,
}

impl Inputs {
    fn n_rows(&self, w: &DeltaWeights) -> usize {
        self.decay.len() / w.shape.n_heads
    }

    fn append(&mut self, w: &DeltaWeights, from: &Self, rows: &Range<usize>) {
        let part = |width: usize| rows.start * width..rows.end * width;
        self.mixed.extend_from_slice(&from.mixed[part(w.channels())]);
        self.decay.extend_from_slice(&from.decay[part(w.shape.n_heads)]);
        self.beta.extend_from_slice(&from.beta[part(w.shape.n_heads)]);
    }

    fn truncate(&mut self, w: &DeltaWeights, rows: usize) {
        self.mixed.truncate(rows * w.channels());
        self.decay.truncate(rows * w.shape.n_heads);
        self.beta.truncate(rows * w.shape.n_heads);
    }
}

/// One layer of a slot.
#[derive(Clone, Debug, Default)]
struct Kept {
    state: State,
    /// Of the rows behind the state.
    drafts: Inputs,
}

/// The state of one sequence, or a copy of one at some position.
#[derive(Clone, Debug, Default)]
struct Slot {
    /// Rows that the states of its layers have seen.
    position: u32,
    /// Rows behind them that may be taken back: only their inputs are kept.
    drafted: u32,
    /// False before anything was computed, while a forward pass runs, and after one that failed.
    whole: bool,
    /// By the layer's index in the stage.
    layers: BTreeMap<usize, Kept>,
}

/// Rows of one sequence in a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StateRows {
    /// Where its state is.
    pub(crate) slot: u32,
    /// Position of the first row.
    pub(crate) start: u32,
    /// Rows of the batch.
    pub(crate) rows: Range<usize>,
    /// Positions at the end that may be taken back.
    pub(crate) drafted: u32,
    /// Copies of its state on the way, by rising positions.
    pub(crate) saves: Vec<StateSave>,
}

impl StateRows {
    fn end(&self) -> u32 {
        self.start + self.rows.len() as u32
    }

    /// All that is before the first row stays.
    fn settles(&self) -> bool {
        self.start.saturating_add(self.drafted) <= self.end()
    }

    /// Position of the state after the pass, given that it was at `position`.
    fn lands(&self, position: u32) -> u32 {
        match self.drafted {
            0 => self.end(),
            _ if self.settles() => self.start,
            _ => position,
        }
    }
}

/// Rows behind a state whose inputs are kept at most; speculation guesses about half as many at once.
const MAX_DRAFTED: u32 = 128;

/// The recurrent states of a stage, in numbered slots. Who calls it knows which slot belongs to whom.
///
/// Rows that may be taken back do not move a state: their inputs are kept beside it, and what of them turns out to stay is run
/// once more over the state, which costs the recurrence of these rows and nothing of the large products before it.
#[derive(Debug)]
pub(crate) struct StateStore {
    slots: Mutex<Vec<Slot>>,
}

impl StateStore {
    /// Empty slots.
    pub(crate) fn new(slots: usize) -> Self {
        Self { slots: Mutex::new(vec![Slot::default(); slots]) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Slots.
    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Copies a state.
    ///
    /// # Errors
    /// A slot that is not there.
    pub(crate) fn copy(&self, from: u32, to: u32) -> Result<(), ForwardError> {
        let mut slots = self.lock();
        for slot in [from, to] {
            check_slot(slot, slots.len())?;
        }
        slots[to as usize] = slots[from as usize].clone();
        Ok(())
    }

    /// Before a forward pass: rows from position 0 begin anew, others must continue where their state stands, or at one of the
    /// positions that it can be taken to.
    ///
    /// # Errors
    /// They do not, or a slot is not there or named twice, or positions to keep or take back are not among the rows.
    pub(crate) fn begin(&self, rows: &[StateRows]) -> Result<(), ForwardError> {
        let batch = |reason: String| Err(ForwardError::Batch { reason });
        let mut slots = self.lock();
        let mut named = BTreeSet::new();
        for row in rows {
            for slot in std::iter::once(row.slot).chain(row.saves.iter().map(|save| save.slot)) {
                check_slot(slot, slots.len())?;
                if !named.insert(slot) {
                    return batch(format!("state slot {slot} is named twice"));
                }
            }
            let on_the_way = |save: &StateSave| (row.start..row.end()).contains(&save.position);
            if !row.saves.iter().all(on_the_way) || !row.saves.is_sorted_by_key(|save| save.position) {
                return batch(format!(
                    "states {:?} are not on the way {}..{}",
                    row.saves,
                    row.start,
                    row.end()
                ));
            }
            let slot = &slots[row.slot as usize];
            let reach = slot.position..=slot.position + slot.drafted;
            if row.start > 0 && !(slot.whole && reach.contains(&row.start)) {
                let stands = if slot.whole { format!("stands at {reach:?}") } else { "is gone".to_owned() };
                return batch(format!(
                    "a sequence continues at position {}, but the recurrent state in slot {} {stands}; run it again from 0",
                    row.start, row.slot
                ));
            }
            let position = if row.start > 0 { slot.position } else { 0 };
            let drafted = row.end() - row.lands(position);
            if row.drafted > row.end() - position || (row.drafted > 0 && drafted > MAX_DRAFTED) {
                return batch(format!(
                    "{} positions of slot {} are to be taken back, at most {MAX_DRAFTED} after {position} can",
                    row.drafted, row.slot
                ));
            }
        }
        for row in rows {
            let slot = &mut slots[row.slot as usize];
            if row.start == 0 {
                *slot = Slot::default();
            }
            slot.whole = false;
            row.saves.iter().for_each(|save| slots[save.slot as usize] = Slot::default());
        }
        Ok(())
    }

    /// After a forward pass that went well.
    pub(crate) fn commit(&self, rows: &[StateRows]) {
        let mut slots = self.lock();
        for row in rows {
            let slot = &mut slots[row.slot as usize];
            slot.position = row.lands(slot.position);
            (slot.drafted, slot.whole) = (row.end() - slot.position, true);
            for save in &row.saves {
                let slot = &mut slots[save.slot as usize];
                (slot.position, slot.whole) = (save.position, true);
            }
        }
    }

    /// The layer's part of each slot, with the drafted rows before the batch's first ones.
    fn take(&self, layer: usize, rows: &[StateRows], weights: &DeltaWeights) -> Vec<Kept> {
        let mut slots = self.lock();
        let mut one = |row: &StateRows| {
            let slot = &mut slots[row.slot as usize];
            let fresh = || Kept { state: weights.fresh(), drafts: Inputs::default() };
            let mut kept = slot.layers.remove(&layer).unwrap_or_else(fresh);
            kept.drafts.truncate(weights, (row.start - slot.position) as usize);
            kept
        };
        rows.iter().map(&mut one).collect()
    }

    fn put(&self, layer: usize, slot: u32, kept: Kept) {
        self.lock()[slot as usize].layers.insert(layer, kept);
    }
}

fn check_slot(slot: u32, slots: usize) -> Result<(), ForwardError> {
    if (slot as usize) < slots {
        return Ok(());
    }
    Err(ForwardError::Batch { reason: format!("state slot {slot} of a store of {slots}") })
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

impl GatedDelta {
    /// The results of all rows [T, Hv·Dv], before the norm.
    fn recur(&self, inputs: &Inputs) -> Vec<f32> {
        let w = &self.weights;
        let mut kept = self.states.take(self.layer, &self.rows, w);
        // What the rows move: the state itself, or a copy where guesses before them may yet be taken back.
        let state = |(row, kept): (&StateRows, &mut Kept)| {
            if row.settles() { std::mem::take(&mut kept.state) } else { kept.state.clone() }
        };
        let mut states: Vec<State> = self.rows.iter().zip(&mut kept).map(state).collect();
        w.replay(&kept, &mut states);
        for ((row, kept), state) in self.rows.iter().zip(&mut kept).zip(&states) {
            if row.drafted > 0 && row.settles() {
                *kept = Kept { state: state.clone(), drafts: Inputs::default() };
            }
        }
        let mut out = vec![0.0; inputs.n_rows(w) * w.value_width()];
        // Rows that are due, of sequences from `first` on: a pass ends where a state is to be kept.
        let (mut due, mut first) = (Vec::with_capacity(self.rows.len()), 0);
        for (i, row) in self.rows.iter().enumerate() {
            let mut at = row.rows.start;
            for save in &row.saves {
                let cut = row.rows.start + (save.position - row.start) as usize;
                due.push(at..cut);
                w.walk(inputs, &due, &mut states[first..=i], &mut out);
                let copy = Kept { state: states[i].clone(), drafts: Inputs::default() };
                self.states.put(self.layer, save.slot, copy);
                due.clear();
                (first, at) = (i, cut);
            }
            due.push(at..row.rows.end);
        }
        w.walk(inputs, &due, &mut states[first..], &mut out);
        for ((row, mut kept), state) in self.rows.iter().zip(kept).zip(states) {
            if row.drafted > 0 {
                kept.drafts.append(w, inputs, &row.rows);
            } else {
                kept = Kept { state, drafts: Inputs::default() };
            }
            self.states.put(self.layer, row.slot, kept);
        }
        out
    }
}

impl CpuOp for GatedDelta {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let w = &self.weights;
        let (channels, values) = (w.channels(), w.value_width());
        let (n_heads, width) = (w.shape.n_heads, channels + values);
        let mixed = columns(inputs[0], width, &(0..channels));
        let z = columns(inputs[0], width, &(channels..width));
        let b = columns(inputs[1], 2 * n_heads, &(0..n_heads));
        let a = columns(inputs[1], 2 * n_heads, &(n_heads..2 * n_heads));
        let [decay, beta] = delta_gates(&a, &b, &w.rates, &w.dt_bias).expect(SHAPES);
        let out = self.recur(&Inputs { mixed, decay, beta });

        let mut normed = vec![0.0; out.len()];
        rms_norm(&out, &w.norm, w.eps, &mut normed).expect(SHAPES);
        apply_gate(Gate::Silu, &z, &mut normed).expect(SHAPES);
        Output::matrix(normed, values)
    }

    fn backward(&self, _args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        unreachable!("models with recurrent layers are refused where gradients are asked for")
    }
}

/// Inputs: y [T, N], gate [T, 1]; result y · sigmoid(gate).
#[derive(Debug)]
pub(crate) struct SigmoidGate {
    pub(crate) columns: usize,
}

impl CpuOp for SigmoidGate {
    fn forward(&self, inputs: &[&[f32]], _keep: bool) -> Output {
        let mut y = inputs[0].to_vec();
        let wide: Vec<f32> = inputs[1].iter().flat_map(|g| std::iter::repeat_n(*g, self.columns)).collect();
        apply_gate(Gate::Sigmoid, &wide, &mut y).expect(SHAPES);
        Output::matrix(y, self.columns)
    }

    fn backward(&self, _args: &BackwardArgs<'_>) -> Vec<Option<Vec<f32>>> {
        unreachable!("models with experts are refused where gradients are asked for")
    }
}

#[cfg(test)]
mod tests {
    use parallax_kernels::{delta::decay_rates, reference::noise};
    use proptest::prelude::*;

    use super::*;

    fn weights() -> DeltaWeights {
        let shape = DeltaShape { n_key_heads: 2, n_heads: 4, key_dim: 8, value_dim: 6, tiled: false };
        let channels = 2 * 16 + 24;
        DeltaWeights {
            shape,
            conv: noise(4 * channels, 1),
            rates: decay_rates(&noise(4, 2)),
            dt_bias: noise(4, 3),
            norm: vec![1.0; 6],
            eps: 1e-6,
        }
    }

    const WIDTH: usize = 56 + 24;
    const GATES: usize = 8;

    /// The rows of a whole sequence, and the results of one pass over them.
    fn sequence(n: usize, seed: u64) -> [Vec<f32>; 3] {
        let (x, ba) = (noise(n * WIDTH, seed), noise(n * GATES, seed + 1));
        let whole = StateRows { rows: 0..n, ..StateRows::default() };
        let expected = run(&Arc::new(StateStore::new(1)), &[whole], &x, &ba).unwrap();
        [x, ba, expected]
    }

    fn run(
        store: &Arc<StateStore>,
        rows: &[StateRows],
        x: &[f32],
        ba: &[f32],
    ) -> Result<Vec<f32>, ForwardError> {
        store.begin(rows)?;
        let op = GatedDelta {
            weights: Arc::new(weights()),
            states: Arc::clone(store),
            layer: 0,
            rows: Arc::new(rows.to_vec()),
        };
        let out = op.forward(&[x, ba], false).values;
        store.commit(rows);
        Ok(out)
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn sequences_keep_their_own_state_whatever_the_batches() {
        let [x, ba, expected] = sequence(17, 4);
        let store = Arc::new(StateStore::new(8));
        let mut got = Vec::new();
        for (start, end) in [(0, 5), (5, 6), (6, 17)] {
            // Another sequence runs along, always from its beginning.
            let m = end - start;
            let rows = [
                StateRows { slot: 7, rows: 0..m, ..StateRows::default() },
                StateRows { slot: 1, start: start as u32, rows: m..2 * m, ..StateRows::default() },
            ];
            let with = |v: &[f32], width: usize| [&v[..m * width], &v[start * width..end * width]].concat();
            let out = run(&store, &rows, &with(&x, WIDTH), &with(&ba, GATES)).unwrap();
            let (other, own) = out.split_at(m * 24);
            assert_eq!(other, &expected[..m * 24]);
            got.extend_from_slice(own);
        }
        assert_eq!(bits(&got), bits(&expected));
    }

    #[test]
    fn a_state_is_continued_where_it_stands_or_not_at_all() {
        let store = StateStore::new(3);
        let row = |slot, start, n: usize| StateRows { slot, start, rows: 0..n, ..StateRows::default() };
        let begin = |row: StateRows| store.begin(&[row]);
        assert!(begin(row(1, 3, 1)).is_err(), "never begun");
        begin(row(1, 0, 3)).unwrap();
        assert!(begin(row(1, 3, 1)).is_err(), "the pass did not end");
        begin(row(1, 0, 3)).unwrap();
        store.commit(&[row(1, 0, 3)]);
        assert!(begin(row(1, 2, 1)).is_err(), "no way back");
        assert!(store.begin(&[row(2, 0, 1), row(2, 0, 1)]).is_err());
        assert!(begin(row(3, 0, 1)).is_err() && store.copy(0, 3).is_err() && store.copy(3, 0).is_err());
        let save = |position, slot| StateRows { saves: vec![StateSave { position, slot }], ..row(1, 3, 4) };
        assert!(begin(save(2, 0)).is_err() && begin(save(7, 0)).is_err(), "not on the way");
        assert!(begin(save(5, 1)).is_err() && begin(save(5, 3)).is_err(), "its own slot, no slot");
        let drafted = |drafted, n| StateRows { drafted, ..row(1, 3, n) };
        assert!(begin(drafted(5, 4)).is_err(), "further than the state can go");
        assert!(begin(drafted(1, MAX_DRAFTED as usize + 1)).is_err(), "too much to keep");
        begin(drafted(4, 4)).unwrap();
        store.commit(&[drafted(4, 4)]);
        assert!(begin(row(1, 8, 1)).is_err());
        begin(row(1, 3, 1)).unwrap();
        store.commit(&[row(1, 3, 1)]);
        assert!(begin(row(1, 5, 1)).is_err(), "what was guessed behind it is gone");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Sequences that run in pieces, guess, go back to any position that they may, and keep and take up states on the way,
        /// have the results of one pass over the rows that stayed.
        #[test]
        fn states_are_those_of_the_rows_that_stayed(
            passes in proptest::collection::vec((0u32..3, 1u32..7, 0u32..12, 0u32..12, any::<bool>(), 0u32..10), 1..30),
        ) {
            // Slots 0 to 2 are sequences, 3 to 5 hold a copy of each at some position.
            let store = Arc::new(StateStore::new(6));
            let sequences: Vec<_> = (0..3).map(|i| sequence(80, 10 * i + 4)).collect();
            // Positions of each: the earliest that it may go back to, its end, and that of its copy.
            let mut at = [(0u32, 0u32, None); 3];
            for chunk in passes.chunks(2) {
                let (mut rows, mut x, mut ba, mut expected) = (Vec::new(), vec![], vec![], vec![]);
                let mut ends = Vec::new();
                for (i, n, back, drafted, save, take) in chunk {
                    let (s, (firm, end, copy)) = (*i as usize, &mut at[*i as usize]);
                    if rows.iter().any(|row: &StateRows| row.slot == *i) {
                        continue;
                    }
                    if let (Some(position), 0) = (*copy, *take) {
                        store.copy(3 + i, *i).unwrap();
                        (*firm, *end) = (position, position);
                    }
                    let start = end.saturating_sub(*back).max(*firm);
                    if start + n > 80 {
                        continue;
                    }
                    let drafted = (*drafted).min(start + n - *firm);
                    let position = start + back % n;
                    let saves = if *save { vec![StateSave { position, slot: 3 + i }] } else { vec![] };
                    let [of_x, of_ba, out] = &sequences[s];
                    let part = |values: &[f32], width: usize| {
                        values[start as usize * width..(start + n) as usize * width].to_vec()
                    };
                    let first = rows.last().map_or(0, |row: &StateRows| row.rows.end);
                    rows.push(StateRows { slot: *i, start, rows: first..first + *n as usize, drafted, saves });
                    x.extend(part(of_x, WIDTH));
                    ba.extend(part(of_ba, GATES));
                    expected.extend(part(out, 24));
                    let copy = if *save { Some(position) } else { *copy };
                    ends.push((s, (start + n - drafted, start + n, copy)));
                }
                if rows.is_empty() {
                    continue;
                }
                prop_assert_eq!(bits(&run(&store, &rows, &x, &ba).unwrap()), bits(&expected));
                ends.into_iter().for_each(|(s, end)| at[s] = end);
            }
        }
    }
}
