//! Rotary positions: frequencies, and how they are stretched past the length a model was trained on.

use parallax_kernels::rope::frequencies;

/// Rotation of queries and keys by position.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f32,
    /// Elements of a head that are rotated, from its first; the rest passes.
    pub dims: usize,
    /// Pairs are neighbours (GLM-4, DeepSeek) instead of halves.
    pub interleaved: bool,
    /// Stretching of the frequencies.
    pub scaling: Option<RopeScaling>,
}

impl Rope {
    /// Radians per position of each pair. [dims / 2]
    pub fn frequencies(&self) -> Vec<f32> {
        let mut out = frequencies(self.dims, f64::from(self.theta));
        if let Some(scaling) = &self.scaling {
            for (frequency, factor) in out.iter_mut().zip(scaling.factors(self.dims, self.theta)) {
                *frequency /= factor;
            }
        }
        out
    }

    /// Factor of the rotated elements.
    pub fn magnitude(&self) -> f32 {
        self.scaling.as_ref().map_or(1.0, RopeScaling::magnitude)
    }
}

/// How rotary frequencies are stretched past the length a model was trained on.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// All positions divided by a factor.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1's: long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the long wavelengths.
        factor: f32,
        /// Wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context before stretching, in tokens.
        original_context: usize,
    },
    /// YaRN (Peng et al. 2023, arXiv:2309.00071): frequencies that turn less than `beta_slow` times within the
    /// original context are divided, those that turn more than `beta_fast` times kept, a ramp between.
    Yarn {
        /// Divisor of the slow frequencies.
        factor: f32,
        /// Turns from which a frequency is kept.
        beta_fast: f32,
        /// Turns up to which a frequency is divided.
        beta_slow: f32,
        /// Context before stretching, in tokens.
        original_context: usize,
        /// Whether the ends of the ramp are rounded to whole pairs.
        truncate: bool,
        /// Factor of the rotated elements.
        magnitude: f32,
    },
    /// LongRoPE (Ding et al. 2024, arXiv:2402.13753): one divisor per frequency, found by search.
    LongRope {
        /// The divisors. [dims / 2]
        factors: Vec<f32>,
        /// Factor of the rotated elements.
        magnitude: f32,
    },
    /// One divisor per frequency, as GGUF files carry them (`rope_freqs.weight`). [dims / 2]
    Factors(Vec<f32>),
}

impl RopeScaling {
    /// The divisor of each of the `dims / 2` frequencies.
    pub fn factors(&self, dims: usize, theta: f32) -> Vec<f32> {
        let half = dims / 2;
        match self {
            Self::Linear { factor } => vec![*factor; half],
            Self::Factors(factors) | Self::LongRope { factors, .. } => factors.clone(),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let context = *original_context as f64;
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let factor = f64::from(*factor);
                (0..half)
                    .map(|i| {
                        let inv = f64::from(theta).powf(-((2 * i) as f64) / dims as f64);
                        let wavelength = std::f64::consts::TAU / inv;
                        if wavelength < context / high {
                            1.0
                        } else if wavelength > context / low {
                            factor as f32
                        } else {
                            let smooth = (context / wavelength - low) / (high - low);
                            (1.0 / ((1.0 - smooth) / factor + smooth)) as f32
                        }
                    })
                    .collect()
            }
            Self::Yarn { factor, beta_fast, beta_slow, original_context, truncate, .. } => {
                // The pair that turns `n` times within the original context.
                let pair = |turns: f32| {
                    let waves = *original_context as f64 / (f64::from(turns) * std::f64::consts::TAU);
                    dims as f64 * waves.ln() / (2.0 * f64::from(theta).ln())
                };
                let (mut low, mut high) = (pair(*beta_fast), pair(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
                let width = if low == high { 0.001 } else { high - low };
                (0..half)
                    .map(|i| {
                        let kept = 1.0 - ((i as f64 - low) / width).clamp(0.0, 1.0);
                        (1.0 / ((1.0 - kept) / f64::from(*factor) + kept)) as f32
                    })
                    .collect()
            }
        }
    }

    /// Factor of the rotated elements.
    pub fn magnitude(&self) -> f32 {
        match self {
            Self::Yarn { magnitude, .. } | Self::LongRope { magnitude, .. } => *magnitude,
            Self::Linear { .. } | Self::Llama3 { .. } | Self::Factors(_) => 1.0,
        }
    }

    /// What is wrong with it, for `dims` rotated elements.
    pub(super) fn fault(&self, dims: usize) -> Option<&'static str> {
        let positive = |v: &f32| v.is_finite() && *v > 0.0;
        match self {
            Self::Linear { factor } if !positive(factor) => Some("the factor must be positive"),
            Self::Factors(f) | Self::LongRope { factors: f, .. } if f.len() != dims / 2 => {
                Some("there must be one factor per pair of rotated elements")
            }
            Self::Factors(f) | Self::LongRope { factors: f, .. } if !f.iter().all(positive) => {
                Some("factors must be positive")
            }
            Self::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, original_context }
                if !(positive(factor) && positive(low) && high > low && *original_context > 0) =>
            {
                Some("factors must be positive and ordered")
            }
            Self::Yarn { factor, beta_fast, beta_slow, original_context, .. }
                if !(positive(factor)
                    && positive(beta_slow)
                    && beta_fast >= beta_slow
                    && *original_context > 0) =>
            {
                Some("factors must be positive and ordered")
            }
            _ if !positive(&self.magnitude()) => Some("the attention factor must be positive"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_short_waves_and_divides_long_ones() {
        let s = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 8192,
        };
        let f = s.factors(128, 500_000.0);
        assert_eq!((f[0], f[63]), (1.0, 8.0));
        assert!(f.windows(2).all(|w| w[0] <= w[1]));
        assert!(f.iter().any(|x| *x > 1.0 && *x < 8.0));
    }

    #[test]
    fn yarn_keeps_fast_frequencies_and_divides_slow_ones() {
        let s = RopeScaling::Yarn {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 4096,
            truncate: true,
            magnitude: 1.3466,
        };
        let f = s.factors(64, 150_000.0);
        assert_eq!((f[0], f[31]), (1.0, 32.0));
        assert!(f.windows(2).all(|w| w[0] <= w[1]));
        assert!(f.iter().any(|x| *x > 1.0 && *x < 32.0));
    }
}
