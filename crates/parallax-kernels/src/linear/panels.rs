//! Dense weights (f32, f16, bf16) in panels of sixteen outputs, inner dimension in order.

use std::ops::Range;

use half::{bf16, f16};

use super::Output;
use crate::dispatch::{Isa, simd_kernel};
use crate::dtype::WeightKind;
use crate::parallel::for_rows;
use crate::simd::{LANES, Line, Simd};

/// A dense weight: `lines[panel * k + i]` holds input `i` of the panel's sixteen outputs.
#[derive(Debug, Clone)]
pub(super) struct PackedDense<L> {
    lines: Vec<L>,
    n: usize,
    k: usize,
}

/// The left operand: rows of at least as many elements as a panel has lines, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub x: &'a [f32],
    pub stride: usize,
    /// Whether the sums go on from what the output holds.
    pub continued: bool,
}

/// The right operand: `stride` lines per panel, of which `inner` lines from `first` on take part.
#[derive(Clone, Copy)]
pub(crate) struct Panels<'a, L> {
    pub lines: &'a [L],
    pub stride: usize,
    pub first: usize,
    pub inner: usize,
}

/// Sixteen outputs' weights for one input.
pub(super) trait DenseLine: Copy + Send {
    type Element: Copy;
    const KIND: WeightKind;
    const ZERO: Self;
    fn set(&mut self, lane: usize, value: Self::Element);
    fn get(&self, lane: usize) -> f32;
    fn load<S: Simd>(&self, s: S) -> S::F;
    /// Products with panels of such lines; see [`walk`].
    const KERNEL: DenseKernel<Self>;
}

/// Computes rows by panels. Different tasks must be given different panels.
type DenseKernel<L> = fn(Isa, Rows<'_>, Panels<'_, L>, Range<usize>, Range<usize>, &Output<'_>);

impl DenseLine for Line {
    type Element = f32;
    const KIND: WeightKind = WeightKind::F32;
    const ZERO: Self = Self([0.0; LANES]);
    const KERNEL: DenseKernel<Self> = dense_f32;

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
}

simd_kernel! {
    /// Products with f32 panels; see [`walk`].
    pub(crate) fn dense_f32(s; x: Rows<'_>, w: Panels<'_, Line>, rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
        walk(s, x, w, rows, panels, out);
    }
}

/// Defines a line of sixteen bit patterns of `$element`, and the products with panels of it.
macro_rules! half_line {
    ($line:ident, $element:ident, $kind:ident, $widen:ident, $kernel:ident) => {
        /// Sixteen bit patterns of two bytes.
        #[derive(Debug, Clone, Copy)]
        #[repr(C, align(32))]
        pub(super) struct $line([u16; LANES]);

        impl DenseLine for $line {
            type Element = $element;
            const KIND: WeightKind = WeightKind::$kind;
            const ZERO: Self = Self([0; LANES]);
            const KERNEL: DenseKernel<Self> = $kernel;

            fn set(&mut self, lane: usize, value: $element) {
                self.0[lane] = value.to_bits();
            }
            fn get(&self, lane: usize) -> f32 {
                $element::from_bits(self.0[lane]).to_f32()
            }
            #[inline(always)]
            fn load<S: Simd>(&self, s: S) -> S::F {
                s.$widen(&self.0)
            }
        }

        simd_kernel! {
            fn $kernel(s; x: Rows<'_>, w: Panels<'_, $line>, rows: Range<usize>, panels: Range<usize>, out: &Output<'_>) {
                walk(s, x, w, rows, panels, out);
            }
        }
    };
}

half_line! { Bf16Line, bf16, Bf16, widen_bf16, dense_bf16 }
half_line! { F16Line, f16, F16, widen_f16, dense_f16 }

impl<L: DenseLine> PackedDense<L> {
    /// Packs the weight whose element `o * k + i` is `element(o * k + i)`.
    pub(super) fn pack(n: usize, k: usize, element: impl Fn(usize) -> L::Element + Sync) -> Self {
        let mut lines = vec![L::ZERO; n.div_ceil(LANES) * k];
        for_rows(&mut lines, k, LANES * k, |panels, lines| {
            for (panel, lines) in panels.zip(lines.chunks_exact_mut(k)) {
                for o in panel * LANES..n.min((panel + 1) * LANES) {
                    for (i, line) in lines.iter_mut().enumerate() {
                        line.set(o % LANES, element(o * k + i));
                    }
                }
            }
        });
        Self { lines, n, k }
    }

    #[expect(clippy::unused_self, reason = "as the quantised packing, for one call over all packings")]
    pub(super) fn kind(&self) -> WeightKind {
        L::KIND
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
    pub(super) fn multiply(
        &self,
        isa: Isa,
        x: &[f32],
        rows: Range<usize>,
        panels: Range<usize>,
        out: &Output<'_>,
    ) {
        let x = Rows { x, stride: self.k, continued: false };
        let w = Panels { lines: &self.lines, stride: self.k, first: 0, inner: self.k };
        (L::KERNEL)(isa, x, w, rows, panels, out);
    }
}

/// Groups of panels by groups of rows; the tile shapes depend on the registers, the sums do not.
#[inline(always)]
fn walk<S: Simd, L: DenseLine>(
    s: S,
    x: Rows<'_>,
    w: Panels<'_, L>,
    rows: Range<usize>,
    panels: Range<usize>,
    out: &Output<'_>,
) {
    let mut panel = panels.start;
    while panel < panels.end {
        let left = panels.end - panel;
        // Few rows: several panels at a time, to have enough independent sums in flight.
        panel += if S::TILE >= 24 && rows.len() == 1 && left >= 8 {
            walk_rows::<S, L, 8>(s, x, w, rows.clone(), panel, out)
        } else if rows.len() * 4 <= S::TILE && rows.len() <= 2 && left >= 4 {
            walk_rows::<S, L, 4>(s, x, w, rows.clone(), panel, out)
        } else if (S::TILE >= 24 || rows.len() == 2) && left >= 2 {
            walk_rows::<S, L, 2>(s, x, w, rows.clone(), panel, out)
        } else {
            walk_rows::<S, L, 1>(s, x, w, rows.clone(), panel, out)
        };
    }
}

/// All rows against `P` panels; returns `P`.
#[inline(always)]
fn walk_rows<S: Simd, L: DenseLine, const P: usize>(
    s: S,
    x: Rows<'_>,
    w: Panels<'_, L>,
    rows: Range<usize>,
    panel: usize,
    out: &Output<'_>,
) -> usize {
    let w: [&[L]; P] = std::array::from_fn(|p| &w.lines[(panel + p) * w.stride + w.first..][..w.inner]);
    let mut row = rows.start;
    while row < rows.end {
        let left = rows.end - row;
        row += if P >= 8 {
            tile::<S, L, 1, P>(s, x, w, row, panel, out)
        } else if P >= 4 {
            match left {
                1 => tile::<S, L, 1, P>(s, x, w, row, panel, out),
                _ => tile::<S, L, 2, P>(s, x, w, row, panel, out),
            }
        } else if S::TILE >= 24 && left >= 12 {
            tile::<S, L, 12, P>(s, x, w, row, panel, out)
        } else if S::TILE >= 24 && left >= 8 {
            tile::<S, L, 8, P>(s, x, w, row, panel, out)
        } else {
            // Two middling tiles are faster than a full one and a single row.
            match if left > 6 && left < 12 { left.div_ceil(2) } else { left } {
                1 => tile::<S, L, 1, P>(s, x, w, row, panel, out),
                2 => tile::<S, L, 2, P>(s, x, w, row, panel, out),
                3 => tile::<S, L, 3, P>(s, x, w, row, panel, out),
                4 => tile::<S, L, 4, P>(s, x, w, row, panel, out),
                5 => tile::<S, L, 5, P>(s, x, w, row, panel, out),
                _ => tile::<S, L, 6, P>(s, x, w, row, panel, out),
            }
        };
    }
    P
}

/// `R` rows by `P` panels in registers; returns `R`.
#[inline(always)]
fn tile<S: Simd, L: DenseLine, const R: usize, const P: usize>(
    s: S,
    x: Rows<'_>,
    w: [&[L]; P],
    row: usize,
    panel: usize,
    out: &Output<'_>,
) -> usize {
    let k = w[0].len();
    let rows: [&[f32]; R] = std::array::from_fn(|r| &x.x[(row + r) * x.stride..][..k]);
    let w: [&[L]; P] = std::array::from_fn(|p| &w[p][..k]);
    let mut acc = [[s.splat(0.0); P]; R];
    if x.continued {
        for (r, acc) in acc.iter_mut().enumerate() {
            for (p, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the panels of this call belong to this task alone.
                *acc = unsafe { out.read(s, row + r, panel + p) };
            }
        }
    }
    for i in 0..k {
        let mut lines = [s.splat(0.0); P];
        for p in 0..P {
            lines[p] = w[p][i].load(s);
        }
        for r in 0..R {
            let v = s.splat(rows[r][i]);
            for p in 0..P {
                acc[r][p] = s.fma(v, lines[p], acc[r][p]);
            }
        }
    }
    for (r, acc) in acc.into_iter().enumerate() {
        for (p, acc) in acc.into_iter().enumerate() {
            // SAFETY: the panels of this call belong to this task alone.
            unsafe { out.write(s, row + r, panel + p, acc) };
        }
    }
    R
}
