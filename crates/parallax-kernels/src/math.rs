//! Scalar elementary functions in f64, from exactly rounded operations only.
//!
//! The platform's own may differ in the last bit from one system to the next; tables and log-probabilities must not.

use std::f64::consts::{FRAC_PI_2, LN_2, LOG2_E};

/// Natural logarithm of a positive normal number; NaN below zero, -infinity at zero.
pub(crate) fn ln(x: f64) -> f64 {
    if x.is_nan() || x < 0.0 {
        return f64::NAN;
    }
    if x == 0.0 {
        return f64::NEG_INFINITY;
    }
    if x == f64::INFINITY {
        return x;
    }
    let bits = x.to_bits();
    let mut exponent = ((bits >> 52) as i64 - 1023) as f64;
    let mut mantissa = f64::from_bits(bits & 0x000f_ffff_ffff_ffff | 0x3ff0_0000_0000_0000);
    if mantissa > std::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1.0;
    }
    // ln m = 2 atanh((m - 1) / (m + 1)), whose argument is at most 0.172.
    let z = (mantissa - 1.0) / (mantissa + 1.0);
    let z2 = z * z;
    let mut series = 0.0;
    for i in (0..12).rev() {
        series = series * z2 + 1.0 / f64::from(2 * i + 1);
    }
    exponent * LN_2 + 2.0 * z * series
}

/// e^x for |x| below 700.
pub(crate) fn exp(x: f64) -> f64 {
    let n = (x * LOG2_E).round_ties_even();
    // ln 2 in two parts; n times the first is exact.
    let r = (x - n * 0.693_147_180_369_123_8) - n * 1.908_214_929_270_587_7e-10;
    let mut series = 1.0;
    for i in (1..18).rev() {
        series = series * r / f64::from(i) + 1.0;
    }
    series * f64::from_bits(((n as i64 + 1023) as u64) << 52)
}

/// Sine and cosine, for angles up to about 10^6.
pub(crate) fn sin_cos(x: f64) -> (f64, f64) {
    let n = (x / FRAC_PI_2).round_ties_even();
    // pi / 2 in two parts; n times the first is exact for the angles in question.
    let r = (x - n * 1.570_796_326_734_125_6) - n * 6.077_100_506_506_192e-11;
    let r2 = r * r;
    let (mut sin, mut cos) = (0.0, 0.0);
    for i in (0..11).rev() {
        let step = f64::from(2 * i);
        sin = 1.0 - sin * r2 / ((step + 2.0) * (step + 3.0));
        cos = 1.0 - cos * r2 / ((step + 1.0) * (step + 2.0));
    }
    let sin = sin * r;
    match (n as i64).rem_euclid(4) {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_agree_with_the_platform() {
        for i in 1..2000 {
            let x = f64::from(i) * 0.37 - 300.0;
            assert!((exp(x) / x.exp() - 1.0).abs() < 1e-13, "exp {x}");
            let x = f64::from(i) * f64::from(i) * 0.03;
            assert!((ln(x) - x.ln()).abs() < 1e-14 * x.ln().abs().max(1.0), "ln {x}");
            let x = f64::from(i) * 61.7;
            let (sin, cos) = sin_cos(x);
            assert!((sin - x.sin()).abs() < 1e-11 && (cos - x.cos()).abs() < 1e-11, "sin cos {x}");
        }
        assert_eq!(ln(0.0), f64::NEG_INFINITY);
        assert!(ln(-1.0).is_nan());
    }
}
