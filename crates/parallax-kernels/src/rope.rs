//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of whole heads or of their
//! first elements. In the half-split convention element `i` is rotated with element `i + half`, in the interleaved one
//! with its neighbour. GGUF files of the Llama family store q and k rows for the interleaved convention; their loader
//! permutes the rows.

use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::math;
use crate::parallel::for_rows;
use crate::simd::{LANES, read, write};

/// `theta^(-2i / dims)` for each pair `i` of `dims` rotated elements, in f32. [dims / 2]
pub fn frequencies(dims: usize, theta: f64) -> Vec<f32> {
    let ln_theta = math::ln(theta);
    (0..dims / 2).map(|i| math::exp(-ln_theta * (2 * i) as f64 / dims as f64) as f32).collect()
}

/// Which elements of a head are rotated together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeLayout {
    /// Elements per head (D); those after the rotated pairs pass through.
    pub head_dim: usize,
    /// Pairs are neighbours (2i, 2i + 1) instead of (i, i + half).
    pub interleaved: bool,
    /// Factor of the rotated elements (YaRN's and LongRoPE's attention factor); 1 rotates without stretching.
    pub magnitude: f32,
}

/// Cosines and sines of every position and frequency.
#[derive(Debug, Clone)]
pub struct RopeTable {
    layout: RopeLayout,
    /// Pairs that are rotated.
    half: usize,
    max_pos: usize,
    /// [max_pos, pairs]
    cos: Vec<f32>,
    /// [max_pos, pairs]
    sin: Vec<f32>,
}

impl RopeTable {
    /// Angles `position * frequencies[i]` for positions below `max_pos`, rounded to f32 as the reference implementations do.
    ///
    /// # Errors
    /// When there is no frequency, or more than one per two elements of a head.
    pub fn new(layout: RopeLayout, frequencies: &[f32], max_pos: usize) -> Result<Self, KernelError> {
        let half = frequencies.len();
        if half == 0 || 2 * half > layout.head_dim {
            let rule = "must be positive, at most half of the head dimension";
            return Err(KernelError::BadDimension { op: "rope table", what: "frequencies", got: half, rule });
        }
        let (mut cos, mut sin) = (Vec::with_capacity(max_pos * half), Vec::with_capacity(max_pos * half));
        for position in 0..max_pos {
            for frequency in frequencies {
                let (s, c) = math::sin_cos(f64::from(position as f32 * frequency));
                cos.push(c as f32 * layout.magnitude);
                sin.push(s as f32 * layout.magnitude);
            }
        }
        Ok(Self { layout, half, max_pos, cos, sin })
    }

    /// First position without an entry.
    pub fn max_pos(&self) -> usize {
        self.max_pos
    }

    /// Pairs that are rotated.
    pub fn pairs(&self) -> usize {
        self.half
    }

    /// Cosine and sine of every pair at each position, for kernels elsewhere. [T, pairs, 2]
    ///
    /// # Errors
    /// When a position is not in the table.
    pub fn angles(&self, positions: &[u32]) -> Result<Vec<f32>, KernelError> {
        self.check("rope angles", positions)?;
        let entry = |p: &u32| *p as usize * self.half..(*p as usize + 1) * self.half;
        let pair = |i: usize| [self.cos[i], self.sin[i]];
        Ok(positions.iter().flat_map(entry).flat_map(pair).collect())
    }

    fn check(&self, op: &'static str, positions: &[u32]) -> Result<(), KernelError> {
        let limit = self.max_pos;
        match positions.iter().find(|p| **p as usize >= limit) {
            Some(far) => Err(KernelError::OutOfRange { op, what: "position", limit, got: *far as usize }),
            None => Ok(()),
        }
    }
}

/// Rotates `x` [T, heads, D] in place; row `t` stands at `positions[t]`.
///
/// # Errors
/// When the lengths do not fit together or a position is not in the table.
pub fn rope_apply(
    x: &mut [f32],
    heads: usize,
    positions: &[u32],
    table: &RopeTable,
) -> Result<(), KernelError> {
    apply(x, heads, positions, table, 1.0)
}

/// Rotates back: the gradient of [`rope_apply`], and its inverse where the magnitude is 1.
///
/// # Errors
/// As [`rope_apply`].
pub fn rope_apply_inverse(
    x: &mut [f32],
    heads: usize,
    positions: &[u32],
    table: &RopeTable,
) -> Result<(), KernelError> {
    apply(x, heads, positions, table, -1.0)
}

fn apply(
    x: &mut [f32],
    heads: usize,
    positions: &[u32],
    table: &RopeTable,
    direction: f32,
) -> Result<(), KernelError> {
    let (op, width) = ("rope", heads * table.layout.head_dim);
    let rows = rows_of(op, "x", x.len(), width)?;
    check_len(op, "positions", rows, positions.len())?;
    table.check(op, positions)?;
    let isa = dispatch::current();
    for_rows(x, width, width * 4, |rows, x| rotate(isa, x, width, &positions[rows], table, direction));
    Ok(())
}

simd_kernel! {
    fn rotate(s; x: &mut [f32], width: usize, positions: &[u32], table: &RopeTable, direction: f32) {
        let half = table.half;
        let sign = direction;
        let direction = s.splat(direction);
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let entry = position as usize * half..(position as usize + 1) * half;
            let (cos, sin) = (&table.cos[entry.clone()], &table.sin[entry]);
            for head in row.chunks_exact_mut(table.layout.head_dim) {
                if table.layout.interleaved {
                    for (i, pair) in head[..2 * half].as_chunks_mut::<2>().0.iter_mut().enumerate() {
                        let ([a, b], c, sin) = (*pair, cos[i], sin[i] * sign);
                        *pair = [a * c - b * sin, b * c + a * sin];
                    }
                    continue;
                }
                let (first, second) = head[..2 * half].split_at_mut(half);
                for i in (0..half).step_by(LANES) {
                    let (a, b) = (read(s, first, i, 0.0), read(s, second, i, 0.0));
                    let c = read(s, cos, i, 0.0);
                    let sin = s.mul(read(s, sin, i, 0.0), direction);
                    write(s, first, i, s.sub(s.mul(a, c), s.mul(b, sin)));
                    write(s, second, i, s.add(s.mul(b, c), s.mul(a, sin)));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
