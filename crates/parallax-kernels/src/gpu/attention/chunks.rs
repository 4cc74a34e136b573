//! The kernels of attention.

use cubecl::prelude::*;

use crate::gpu::fold::{Fold, fold};

/// Units of a cube, and keys of a block: a unit makes the scores of a key.
pub(super) const UNITS: usize = 128;
/// Blocks of a chunk.
const BLOCKS: usize = 2;
/// Keys that a cube takes: results are merged in an order that depends on nothing else.
pub(super) const CHUNK: usize = BLOCKS * UNITS;
/// Below every score, and finite: the difference of two of them is no NaN.
const NOTHING: f32 = -1e30;

/// What a kernel of attention is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::gpu) struct Shape {
    pub(in crate::gpu) n_heads: usize,
    pub(in crate::gpu) n_kv_heads: usize,
    pub(in crate::gpu) head_dim: usize,
    /// Query heads of a cube: a divisor of those that share a key.
    pub(in crate::gpu) heads: usize,
    /// Most rows of a cube.
    pub(in crate::gpu) rows: usize,
    /// Scores are capped.
    pub(in crate::gpu) capped: bool,
    /// Rows see a window of keys.
    pub(in crate::gpu) windowed: bool,
}

/// One unit per element of `qkv`: queries to `q`, keys and values to the store.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(in crate::gpu) fn rotate_append(
    qkv: &[f32],
    angles: &[f32],
    slots: &[u32],
    q: &mut [f32],
    keys: &mut [f32],
    values: &mut [f32],
    total: u32,
    q_width: u32,
    kv_width: u32,
    head_dim: u32,
    pairs: u32,
    #[comptime] interleaved: bool,
) {
    if ABSOLUTE_POS < total as usize {
        let q_width = q_width as usize;
        let kv_width = kv_width as usize;
        let width = q_width + 2 * kv_width;
        let row = ABSOLUTE_POS / width;
        let column = ABSOLUTE_POS % width;
        let pairs = pairs as usize;
        let at = column % head_dim as usize;
        let mut value = qkv[ABSOLUTE_POS];
        if column < q_width + kv_width && at < 2 * pairs {
            let pair = if comptime!(interleaved) { at / 2 } else { at % pairs };
            let second = if comptime!(interleaved) { at % 2 } else { at / pairs };
            let apart = if comptime!(interleaved) { 1usize.runtime() } else { pairs };
            let cos = angles[(row * pairs + pair) * 2];
            let sin = angles[(row * pairs + pair) * 2 + 1];
            if second == 0 {
                value = value * cos - qkv[ABSOLUTE_POS + apart] * sin;
            } else {
                value = value * cos + qkv[ABSOLUTE_POS - apart] * sin;
            }
        }
        let slot = slots[row] as usize;
        if column < q_width {
            q[row * q_width + column] = value;
        } else if column < q_width + kv_width {
            keys[slot * kv_width + column - q_width] = value;
        } else {
            values[slot * kv_width + column - q_width - kv_width] = value;
        }
    }
}

/// Cube (slice of heads, tile of rows, chunk of keys) leaves for each of its head rows the weighted sum of the values,
/// the maximum of the scores and the sum of their exponentials: `partial` [rows, Q, chunks, D + 2].
///
/// A tile is its first row, its number of rows, where its sequence's table begins, and the most keys that a row sees.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(in crate::gpu) fn attend_chunk<N: Size>(
    q: &[f32],
    keys: &[Vector<f32, N>],
    values: &[f32],
    tables: &[u32],
    tiles: &[u32],
    n_keys: &[u32],
    partial: &mut [f32],
    first_tile: u32,
    first_row: u32,
    first_chunk: u32,
    page_tokens: u32,
    scale: f32,
    softcap: f32,
    window: u32,
    #[comptime] shape: Shape,
) {
    let d = comptime!(shape.head_dim);
    let head_rows = comptime!(shape.heads * shape.rows);
    let kv_width = comptime!(shape.n_kv_heads * shape.head_dim);
    let unit = UNIT_POS as usize;
    let tile = (first_tile + CUBE_POS_Y) as usize * 4;
    let tile_row = tiles[tile] as usize;
    let tile_rows = tiles[tile + 1] as usize;
    let table = tiles[tile + 2] as usize;
    let most_keys = tiles[tile + 3];
    let start = (first_chunk + CUBE_POS_Z) * comptime!(CHUNK as u32);
    if start >= most_keys {
        terminate!();
    }
    let head = CUBE_POS_X as usize * comptime!(shape.heads);
    let kv_from = head / comptime!(shape.n_heads / shape.n_kv_heads) * d;

    let mut queries = Shared::<[f32]>::new_slice(comptime!(head_rows * d));
    let mut weights = Shared::<[f32]>::new_slice(comptime!(head_rows * UNITS));
    let mut folded = Shared::<[f32]>::new_slice(comptime!(head_rows * UNITS));
    let mut slots = Shared::<[u32]>::new_slice(UNITS);

    let mut i = unit;
    while i < comptime!(head_rows * d) {
        let number = i / d;
        // Rows that the tile lacks repeat its last one and are not written.
        let row = tile_row + (number / comptime!(shape.heads)).min(tile_rows - 1);
        let of = head + number % comptime!(shape.heads);
        queries[i] = q[(row * comptime!(shape.n_heads) + of) * d + i % d];
        i += UNITS;
    }
    sync_cube();

    let outputs = comptime!((head_rows * shape.head_dim).div_ceil(UNITS));
    let mut sums = Array::<f32>::new(outputs);
    let mut most = Array::<f32>::new(head_rows);
    let mut total = Array::<f32>::new(head_rows);
    #[unroll]
    for a in 0..outputs {
        sums[a] = 0.0;
    }
    #[unroll]
    for h in 0..head_rows {
        most[h] = NOTHING;
        total[h] = 0.0;
    }

    for block in 0..BLOCKS {
        let from = start + (block * UNITS) as u32;
        let key = from + UNIT_POS;
        let known = key.min(most_keys - 1);
        let slot = tables[table + (known / page_tokens) as usize] * page_tokens + known % page_tokens;
        slots[unit] = slot;

        let mut scores = Array::<f32>::new(head_rows);
        #[unroll]
        for h in 0..head_rows {
            scores[h] = 0.0;
        }
        let key_at = (slot as usize * kv_width + kv_from) / N::value();
        for part in 0..d / N::value() {
            let k = keys[key_at + part];
            #[unroll]
            for h in 0..head_rows {
                #[unroll]
                for i in 0..N::value() {
                    scores[h] += k.extract(i) * queries[h * d + part * N::value() + i];
                }
            }
        }
        #[unroll]
        for h in 0..head_rows {
            let row = tile_row + comptime!(h / shape.heads).min(tile_rows - 1);
            let sees = n_keys[row];
            let mut score = scores[h] * scale;
            if comptime!(shape.capped) {
                score = (score / softcap).tanh() * softcap;
            }
            let mut visible = key < sees;
            if comptime!(shape.windowed) {
                visible = visible && key + window.min(sees) >= sees;
            }
            let score = select(visible, score, NOTHING.runtime());
            scores[h] = score;
            folded[h * UNITS + unit] = score;
        }
        fold(&mut folded, unit, unit, UNITS, head_rows, UNITS, comptime!(Fold::Max));
        let mut shrink = Array::<f32>::new(head_rows);
        #[unroll]
        for h in 0..head_rows {
            let highest = most[h].max(folded[h * UNITS]);
            shrink[h] = (most[h] - highest).exp();
            most[h] = highest;
        }
        sync_cube();
        #[unroll]
        for h in 0..head_rows {
            let weight = select(scores[h] > NOTHING, (scores[h] - most[h]).exp(), 0.0f32.runtime());
            weights[h * UNITS + unit] = weight;
            folded[h * UNITS + unit] = weight;
        }
        fold(&mut folded, unit, unit, UNITS, head_rows, UNITS, comptime!(Fold::Sum));
        #[unroll]
        for h in 0..head_rows {
            total[h] = total[h] * shrink[h] + folded[h * UNITS];
        }
        let last = most_keys.max(from) - from;
        let n = last.min(comptime!(UNITS as u32)) as usize;
        #[unroll]
        for a in 0..outputs {
            let output = (unit + a * UNITS).min(comptime!(head_rows * shape.head_dim - 1));
            let number = output / d;
            let mut factor = 1.0f32;
            #[unroll]
            for h in 0..head_rows {
                factor = select(number == h, shrink[h], factor);
            }
            let mut sum = sums[a] * factor;
            let value_at = kv_from + output % d;
            for j in 0..n {
                sum += weights[number * UNITS + j] * values[slots[j] as usize * kv_width + value_at];
            }
            sums[a] = sum;
        }
        sync_cube();
    }

    let chunks = CUBE_COUNT_Z as usize;
    #[unroll]
    for a in 0..outputs {
        let output = unit + a * UNITS;
        let number = output / d;
        let row = number / comptime!(shape.heads);
        if row < tile_rows {
            let row = tile_row + row - first_row as usize;
            let of = row * comptime!(shape.n_heads) + head + number % comptime!(shape.heads);
            partial[(of * chunks + CUBE_POS_Z as usize) * comptime!(shape.head_dim + 2) + output % d] =
                sums[a];
        }
    }
    if unit == 0 {
        #[unroll]
        for h in 0..head_rows {
            if comptime!(h / shape.heads) < tile_rows {
                let row = tile_row + comptime!(h / shape.heads) - first_row as usize;
                let of = row * comptime!(shape.n_heads) + head + comptime!(h % shape.heads);
                let at = (of * chunks + CUBE_POS_Z as usize) * comptime!(shape.head_dim + 2) + d;
                partial[at] = most[h];
                partial[at + 1] = total[h];
            }
        }
    }
}

/// One unit per element of the result: the chunks that its row sees, in order.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(in crate::gpu) fn merge_chunks(
    partial: &[f32],
    n_keys: &[u32],
    sinks: &[f32],
    out: &mut [f32],
    elements: u32,
    first_row: u32,
    first_chunk: u32,
    chunks: u32,
    window: u32,
    #[comptime] has_sinks: bool,
    #[comptime] shape: Shape,
) {
    if ABSOLUTE_POS < elements as usize {
        let d = comptime!(shape.head_dim);
        let of = ABSOLUTE_POS / d;
        let row = of / comptime!(shape.n_heads) + first_row as usize;
        let sees = n_keys[row];
        let end = sees.div_ceil(comptime!(CHUNK as u32)) - first_chunk;
        let mut from = 0u32;
        if comptime!(shape.windowed) {
            from = (sees - window.min(sees)) / comptime!(CHUNK as u32) - first_chunk;
        }
        let at = of * chunks as usize * comptime!(shape.head_dim + 2);
        let mut most = NOTHING.runtime();
        if comptime!(has_sinks) {
            most = sinks[of % comptime!(shape.n_heads)];
        }
        for chunk in from..end {
            most = most.max(partial[at + chunk as usize * comptime!(shape.head_dim + 2) + d]);
        }
        let mut total = 0.0f32;
        if comptime!(has_sinks) {
            total = (sinks[of % comptime!(shape.n_heads)] - most).exp();
        }
        let mut sum = 0.0f32;
        for chunk in from..end {
            let at = at + chunk as usize * comptime!(shape.head_dim + 2);
            let factor = (partial[at + d] - most).exp();
            total += partial[at + d + 1] * factor;
            sum += partial[at + ABSOLUTE_POS % d] * factor;
        }
        out[(row * comptime!(shape.n_heads) + of % comptime!(shape.n_heads)) * d + ABSOLUTE_POS % d] =
            sum / total;
    }
}

/// Copies `n` values inside a buffer.
#[cube(launch_unchecked, create_dummy_kernel)]
pub(in crate::gpu) fn copy_values(data: &mut [f32], from: u32, to: u32, n: u32) {
    if ABSOLUTE_POS < n as usize {
        data[to as usize + ABSOLUTE_POS] = data[from as usize + ABSOLUTE_POS];
    }
}
