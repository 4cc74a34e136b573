//! Dense weights (f32, bf16) in panels of sixteen outputs, inner dimension in order.

use std::ops::Range;

use half::bf16;

use super::Output;
use crate::dispatch::{Isa, simd_kernel};
use crate::simd::{LANES, Line, Simd};

/// A dense weight: `lines[panel * k + i]` holds input `i` of the panel's sixteen outputs.
#[derive(Debug, Clone)]
pub(super) struct PackedDense<L> {
    lines: Vec<L>,
    n: usize,
    k: usize,
}

/// Sixteen bf16 bit patterns.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(32))]
pub(super) struct Bf16Line([u16; LANES]);

/// Sixteen outputs' weights for one input.
pub(super) trait DenseLine: Copy {
    type Element: Copy;
    const ZERO: Self;
    fn set(&mut self, lane: usize, value: Self::Element);
    fn get(&self, lane: usize) -> f32;
    fn load<S: Simd>(&self, s: S) -> S::F;
    fn kernel(isa: Isa, x: &[f32], k: usize, w: &[Self], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>);
}

impl DenseLine for Line {
    type Element = f32;
    const ZERO: Self = Self([0.0; LANES]);

    fn set(&mut self, lane: usize, value: f32) {
        self.0[lane] = value;
    }
    fn get(&self, lane: usize) -> f32 {
        self.0[lane]
    }
    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::F {
        s.load(&self.0)
    }
    fn kernel(isa: Isa, x: &[f32], k: usize, w: &[Self], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        dense_f32(isa, x, k, w, rows, panels, out);
    }
}

impl DenseLine for Bf16Line {
    type Element = bf16;
    const ZERO: Self = Self([0; LANES]);

    fn set(&mut self, lane: usize, value: bf16) {
        self.0[lane] = value.to_bits();
    }
    fn get(&self, lane: usize) -> f32 {
        bf16::from_bits(self.0[lane]).to_f32()
    }
    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> S::F {
        s.from_bf16(&self.0)
    }
    fn kernel(isa: Isa, x: &[f32], k: usize, w: &[Self], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        dense_bf16(isa, x, k, w, rows, panels, out);
    }
}

impl<L: DenseLine> PackedDense<L> {
    /// Packs the weight whose element `o * k + i` is `element(o * k + i)`.
    pub(super) fn pack(n: usize, k: usize, element: impl Fn(usize) -> L::Element) -> Self {
        let mut lines = vec![L::ZERO; n.div_ceil(LANES) * k];
        for o in 0..n {
            let panel = o / LANES * k;
            for (i, line) in lines[panel..panel + k].iter_mut().enumerate() {
                line.set(o % LANES, element(o * k + i));
            }
        }
        Self { lines, n, k }
    }

    pub(super) fn n(&self) -> usize {
        self.n
    }

    pub(super) fn k(&self) -> usize {
        self.k
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(self.lines.as_slice())
    }

    pub(super) fn row(&self, i: usize, out: &mut [f32]) {
        let panel = i / LANES * self.k;
        for (v, line) in out.iter_mut().zip(&self.lines[panel..panel + self.k]) {
            *v = line.get(i % LANES);
        }
    }

    /// Computes the outputs of `panels` for `rows` of `x`. Different tasks must be given different panels.
    pub(super) fn multiply(&self, isa: Isa, x: &[f32], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        L::kernel(isa, x, self.k, &self.lines, rows, panels, out);
    }
}

simd_kernel! {
    fn dense_f32(s; x: &[f32], k: usize, w: &[Line], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        walk(s, x, k, w, rows, panels, out);
    }
}

simd_kernel! {
    fn dense_bf16(s; x: &[f32], k: usize, w: &[Bf16Line], rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        walk(s, x, k, w, rows, panels, out);
    }
}

/// Groups of panels by groups of rows; the tile shapes depend on the registers, the sums do not.
#[inline(always)]
fn walk<S: Simd, L: DenseLine>(
    s: S,
    x: &[f32],
    k: usize,
    w: &[L],
    rows: Range<usize>,
    panels: Range<usize>,
    out: &Output<'_>,
) {
    let mut panel = panels.start;
    while panel < panels.end {
        let left = panels.end - panel;
        // Few rows: several panels at a time, to have enough independent sums in flight.
        panel += if rows.len() <= 2 && left >= 4 {
            walk_rows::<S, L, 4>(s, x, k, w, rows.clone(), panel, out)
        } else if (S::TILE >= 24 || rows.len() <= 4) && left >= 2 {
            walk_rows::<S, L, 2>(s, x, k, w, rows.clone(), panel, out)
        } else {
            walk_rows::<S, L, 1>(s, x, k, w, rows.clone(), panel, out)
        };
    }
}

/// All rows against `P` panels; returns `P`.
#[inline(always)]
fn walk_rows<S: Simd, L: DenseLine, const P: usize>(
    s: S,
    x: &[f32],
    k: usize,
    w: &[L],
    rows: Range<usize>,
    panel: usize,
    out: &Output<'_>,
) -> usize {
    let w: [&[L]; P] = std::array::from_fn(|p| &w[(panel + p) * k..(panel + p + 1) * k]);
    let mut row = rows.start;
    while row < rows.end {
        let left = rows.end - row;
        row += if P <= 2 && S::TILE >= 24 && left >= 12 {
            tile::<S, L, 12, P>(s, x, k, w, row, panel, out)
        } else if P * 6 <= S::TILE && left >= 6 {
            tile::<S, L, 6, P>(s, x, k, w, row, panel, out)
        } else if P <= 2 && left >= 3 {
            tile::<S, L, 3, P>(s, x, k, w, row, panel, out)
        } else if P <= 2 && left >= 2 {
            tile::<S, L, 2, P>(s, x, k, w, row, panel, out)
        } else {
            tile::<S, L, 1, P>(s, x, k, w, row, panel, out)
        };
    }
    P
}

/// `R` rows by `P` panels in registers; returns `R`.
#[inline(always)]
fn tile<S: Simd, L: DenseLine, const R: usize, const P: usize>(
    s: S,
    x: &[f32],
    k: usize,
    w: [&[L]; P],
    row: usize,
    panel: usize,
    out: &Output<'_>,
) -> usize {
    let x: [&[f32]; R] = std::array::from_fn(|r| &x[(row + r) * k..][..k]);
    let w: [&[L]; P] = std::array::from_fn(|p| &w[p][..k]);
    let mut acc = [[s.splat(0.0); P]; R];
    for i in 0..k {
        let lines: [S::F; P] = std::array::from_fn(|p| w[p][i].load(s));
        for r in 0..R {
            let v = s.splat(x[r][i]);
            for p in 0..P {
                acc[r][p] = s.fma(v, lines[p], acc[r][p]);
            }
        }
    }
    let mut lanes = [0.0; LANES];
    for (r, acc) in acc.into_iter().enumerate() {
        for (p, acc) in acc.into_iter().enumerate() {
            s.store(acc, &mut lanes);
            // SAFETY: the panels of this call belong to this task alone.
            unsafe { out.write(row + r, panel + p, &lanes) };
        }
    }
    R
}
