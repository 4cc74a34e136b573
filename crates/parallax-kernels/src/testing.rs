//! What the tests share: comparisons, and the levels of this machine.

use std::sync::{Mutex, PoisonError};

use half::bf16;

use crate::attention::KvFormat;
use crate::dispatch::{LEVELS, Level, available, with_level};
use crate::pool;
pub(crate) use crate::reference::noise;

/// Rows of `d` elements as a store of `format` gives them back, in plain arithmetic.
pub(crate) fn rounded(format: KvFormat, values: &[f32], d: usize) -> Vec<f32> {
    match format {
        KvFormat::F32 => values.to_vec(),
        KvFormat::Bf16 => values.iter().map(|v| bf16::from_f32(*v).to_f32()).collect(),
        KvFormat::Q8 => values.chunks(d).flat_map(|row| row.chunks(32)).flat_map(eight_bits).collect(),
    }
}

fn eight_bits(block: &[f32]) -> Vec<f32> {
    let largest = block.iter().fold(0f32, |m, v| m.max(v.abs())) / 127.0;
    let near = bf16::from_f32(largest);
    let scale = if near.to_f32() < largest { bf16::from_bits(near.to_bits() + 1) } else { near }.to_f32();
    let code = |v: f32| if scale == 0.0 { 0 } else { (v / scale).round_ties_even() as i32 };
    block.iter().map(|v| code(*v) as f32 * scale).collect()
}

/// Bit patterns, so that -0 and NaN are told apart.
pub(crate) fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

/// Runs `f` at every level of this machine and asserts that all give the bits of the scalar level, which are returned.
/// Says on stderr which levels could not be tried here.
pub(crate) fn same_at_every_level(f: impl Fn() -> Vec<f32>) -> Vec<f32> {
    let expected = with_level(Level::Scalar, &f).expect("the scalar level always exists");
    for &level in LEVELS.iter().filter(|&&level| level != Level::Scalar) {
        match with_level(level, &f) {
            Some(got) => assert_eq!(bits(&expected), bits(&got), "{level:?} differs from the scalar level"),
            None => eprintln!("skipped: {level:?} is not on this machine ({:?})", available()),
        }
    }
    expected
}

/// Runs `f` with `threads` threads. The count is process-wide, so callers take turns; other tests do not care, since
/// that no result depends on it is just what is being tested.
pub(crate) fn with_threads<R>(threads: usize, f: impl FnOnce() -> R) -> R {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let outer = pool::threads();
    pool::set_threads(threads);
    let result = f();
    pool::set_threads(outer);
    result
}

/// Asserts `|got - expected| <= tolerance * max(1, |expected|)` everywhere.
pub(crate) fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(g) - e).abs();
        assert!(error <= tolerance * e.abs().max(1.0), "element {i}: {g} against {e}, off by {error}");
    }
}

/// Asserts that `gradient` [n] is the derivative of `f` at `x` along each coordinate in `coordinates`.
pub(crate) fn assert_gradient(
    x: &[f32],
    gradient: &[f32],
    coordinates: impl Iterator<Item = usize>,
    tolerance: f64,
    f: impl Fn(&[f32]) -> f64,
) {
    const STEP: f32 = 1.0 / 128.0;
    for i in coordinates {
        let mut moved = x.to_vec();
        moved[i] = x[i] + STEP;
        let above = f(&moved);
        moved[i] = x[i] - STEP;
        let slope = (above - f(&moved)) / f64::from(2.0 * STEP);
        let error = (slope - f64::from(gradient[i])).abs();
        assert!(error <= tolerance * slope.abs().max(1.0), "coordinate {i}: {} against {slope}", gradient[i]);
    }
}
