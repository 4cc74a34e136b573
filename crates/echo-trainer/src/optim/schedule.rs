//! The learning rate over the steps: a linear warm-up, then constant, linear or cosine decay.

use serde::{Deserialize, Serialize};

/// What follows the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Decay {
    /// The peak rate to the end.
    #[default]
    Constant,
    /// Straight down to the floor.
    Linear,
    /// Half a cosine down to the floor.
    Cosine,
}

/// A factor on the peak learning rate for every step.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Schedule {
    /// Steps from zero to the peak.
    pub warmup_steps: u64,
    /// Steps of the whole run; the floor is reached there. Not used by a constant rate.
    pub total_steps: u64,
    /// What follows the warm-up.
    pub decay: Decay,
    /// Share of the peak that is left at the end.
    pub floor: f64,
}

impl Schedule {
    /// The factor of step `step`, counted from 0. The first warm-up step is already above zero.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return (step + 1) as f64 / self.warmup_steps as f64;
        }
        let span = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let progress = ((step - self.warmup_steps) as f64 / span).min(1.0);
        let left = match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear => 1.0 - progress,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
        };
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Linear | Decay::Cosine => self.floor + (1.0 - self.floor) * left,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_warms_up_then_decays_to_its_floor() {
        let s = Schedule { warmup_steps: 4, total_steps: 14, decay: Decay::Cosine, floor: 0.1 };
        let f: Vec<f64> = (0..15).map(|step| s.factor(step)).collect();
        assert_eq!(f[..4], [0.25, 0.5, 0.75, 1.0]);
        assert!(
            (f[9] - 0.55).abs() < 1e-12 && (f[14] - 0.1).abs() < 1e-12 && (s.factor(99) - 0.1).abs() < 1e-12
        );
        assert!(f[4..].windows(2).all(|w| w[0] > w[1]));
        let linear = Schedule { decay: Decay::Linear, floor: 0.0, ..s };
        assert!((linear.factor(9) - 0.5).abs() < 1e-12);
        assert_eq!(Schedule::default().factor(7), 1.0);
    }
}
