//! Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split convention: element `i` is rotated with
//! element `i + D/2`. GGUF files of the Llama family store q and k rows for the interleaved convention; their loader
//! permutes the rows.

use crate::dispatch::{self, simd_kernel};
use crate::error::{KernelError, check_len, rows_of};
use crate::math;
use crate::parallel::for_rows;
use crate::simd::{LANES, read, write};

/// Cosines and sines of every position and frequency.
#[derive(Debug, Clone)]
pub struct RopeTable {
    head_dim: usize,
    max_pos: usize,
    /// [max_pos, D / 2]
    cos: Vec<f32>,
    /// [max_pos, D / 2]
    sin: Vec<f32>,
}

impl RopeTable {
    /// Angles `position * theta^(-2i / D) / factors[i]` for positions below `max_pos`. Frequencies and angles are rounded to f32
    /// as the reference implementations do.
    ///
    /// # Errors
    /// When `head_dim` is odd or zero, or `factors` is not D / 2 long.
    pub fn new(
        head_dim: usize,
        theta: f64,
        factors: Option<&[f32]>,
        max_pos: usize,
    ) -> Result<Self, KernelError> {
        let op = "rope table";
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            let rule = "must be even and positive";
            return Err(KernelError::BadDimension { op, what: "head dimension", got: head_dim, rule });
        }
        let half = head_dim / 2;
        if let Some(factors) = factors {
            check_len(op, "factors", half, factors.len())?;
        }
        let ln_theta = math::ln(theta);
        let frequencies: Vec<f32> = (0..half)
            .map(|i| {
                let frequency = math::exp(-ln_theta * (2 * i) as f64 / head_dim as f64) as f32;
                factors.map_or(frequency, |f| frequency / f[i])
            })
            .collect();
        let (mut cos, mut sin) = (Vec::with_capacity(max_pos * half), Vec::with_capacity(max_pos * half));
        for position in 0..max_pos {
            for frequency in &frequencies {
                let (s, c) = math::sin_cos(f64::from(position as f32 * frequency));
                cos.push(c as f32);
                sin.push(s as f32);
            }
        }
        Ok(Self { head_dim, max_pos, cos, sin })
    }

    /// First position without an entry.
    pub fn max_pos(&self) -> usize {
        self.max_pos
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

/// Rotates back: the inverse of [`rope_apply`], and its gradient.
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
    let (op, width) = ("rope", heads * table.head_dim);
    let rows = rows_of(op, "x", x.len(), width)?;
    check_len(op, "positions", rows, positions.len())?;
    if let Some(&far) = positions.iter().find(|&&p| p as usize >= table.max_pos) {
        return Err(KernelError::OutOfRange {
            op,
            what: "position",
            limit: table.max_pos,
            got: far as usize,
        });
    }
    let isa = dispatch::current();
    for_rows(x, width, width * 4, |rows, x| rotate(isa, x, width, &positions[rows], table, direction));
    Ok(())
}

simd_kernel! {
    fn rotate(s; x: &mut [f32], width: usize, positions: &[u32], table: &RopeTable, direction: f32) {
        let half = table.head_dim / 2;
        let direction = s.splat(direction);
        for (row, &position) in x.chunks_exact_mut(width).zip(positions) {
            let entry = position as usize * half..(position as usize + 1) * half;
            let (cos, sin) = (&table.cos[entry.clone()], &table.sin[entry]);
            for head in row.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
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
