//! Adam with decoupled weight decay (Loshchilov and Hutter, arXiv 1711.05101) over flat named parameters.
//!
//! Ours instead of burn-optim's because parameters are named matrices rather than module fields, masters and moments
//! must be written to checkpoints and come back bit for bit, and a non-finite gradient must change nothing.

use crate::parameters::{Gradients, Parameter};

use super::{OptimConfig, OptimError, clip};

/// First and second moment of one parameter.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Moments {
    /// Running mean of the gradient.
    pub first: Vec<f32>,
    /// Running mean of its square.
    pub second: Vec<f32>,
}

/// The optimiser's state.
#[derive(Debug, Clone, PartialEq)]
pub struct AdamW {
    config: OptimConfig,
    steps: u64,
    moments: Vec<Moments>,
}

/// What one update did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateReport {
    /// The global gradient norm before clipping.
    pub grad_norm: f64,
    /// The learning rate that was used.
    pub learning_rate: f64,
}

impl AdamW {
    /// Fresh moments for `parameters`.
    ///
    /// # Errors
    /// When a setting is out of range.
    pub fn new(config: OptimConfig, parameters: &[Parameter]) -> Result<Self, OptimError> {
        config.validate()?;
        let zeros =
            |p: &Parameter| Moments { first: vec![0.0; p.values.len()], second: vec![0.0; p.values.len()] };
        Ok(Self { config, steps: 0, moments: parameters.iter().map(zeros).collect() })
    }

    /// Continues from a checkpoint.
    ///
    /// # Errors
    /// When a setting is out of range or a moment does not fit its parameter.
    pub fn resume(
        config: OptimConfig,
        parameters: &[Parameter],
        steps: u64,
        moments: Vec<Moments>,
    ) -> Result<Self, OptimError> {
        config.validate()?;
        let lengths = moments.iter().map(|m| m.first.len().min(m.second.len()));
        check_lengths("moment", parameters, lengths)?;
        Ok(Self { config, steps, moments })
    }

    /// Goes on with other settings; the moments stay.
    ///
    /// # Errors
    /// When a setting is out of range; the old ones stay then.
    pub fn set_config(&mut self, config: OptimConfig) -> Result<(), OptimError> {
        config.validate()?;
        self.config = config;
        Ok(())
    }

    /// Updates so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The moments, in parameter order.
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Clips `gradients`, then moves `parameters` by one step.
    ///
    /// # Errors
    /// When shapes differ or a gradient is not finite; nothing has changed then.
    pub fn update(
        &mut self,
        parameters: &mut [Parameter],
        gradients: &mut Gradients,
    ) -> Result<UpdateReport, OptimError> {
        check_lengths("gradient", parameters, gradients.values.iter().map(Vec::len))?;
        let finite = |values: &Vec<f32>| values.iter().all(|g| g.is_finite());
        if let Some(i) = gradients.values.iter().position(|g| !finite(g)) {
            return Err(OptimError::NotFinite { name: parameters[i].name.clone() });
        }
        let c = self.config;
        let grad_norm = clip::clip_global_norm(gradients, c.max_grad_norm);
        let learning_rate = c.learning_rate * c.schedule.factor(self.steps);
        self.steps += 1;
        let t = i32::try_from(self.steps).unwrap_or(i32::MAX);
        let step_size = (learning_rate / (1.0 - c.beta1.powi(t))) as f32;
        let second_scale = (1.0 / (1.0 - c.beta2.powi(t)).sqrt()) as f32;
        let keep = (1.0 - learning_rate * c.weight_decay) as f32;
        let (beta1, beta2, epsilon) = (c.beta1 as f32, c.beta2 as f32, c.epsilon as f32);
        for ((p, g), m) in parameters.iter_mut().zip(&gradients.values).zip(&mut self.moments) {
            let moments = m.first.iter_mut().zip(&mut m.second);
            for ((w, g), (first, second)) in p.values.iter_mut().zip(g).zip(moments) {
                *first = beta1 * *first + (1.0 - beta1) * g;
                *second = beta2 * *second + (1.0 - beta2) * g * g;
                *w = keep * *w - step_size * *first / (second.sqrt() * second_scale + epsilon);
            }
        }
        Ok(UpdateReport { grad_norm, learning_rate })
    }
}

fn check_lengths(
    what: &'static str,
    parameters: &[Parameter],
    lengths: impl ExactSizeIterator<Item = usize>,
) -> Result<(), OptimError> {
    if lengths.len() != parameters.len() {
        let name = "(all)".to_owned();
        return Err(OptimError::Shape { what, name, got: lengths.len(), needed: parameters.len() });
    }
    for (p, got) in parameters.iter().zip(lengths) {
        if got != p.values.len() {
            return Err(OptimError::Shape { what, name: p.name.clone(), got, needed: p.values.len() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::optim::Schedule;

    fn parameter(values: &[f32]) -> Vec<Parameter> {
        vec![Parameter { name: "w".to_owned(), shape: [1, values.len()], values: values.to_vec() }]
    }

    /// The textbook update in f64.
    fn naive(config: &OptimConfig, start: &[f32], gradients: &[Vec<f32>]) -> Vec<f64> {
        let mut w: Vec<f64> = start.iter().map(|v| f64::from(*v)).collect();
        let (mut m, mut v) = (vec![0.0; w.len()], vec![0.0; w.len()]);
        for (t, g) in gradients.iter().enumerate() {
            let norm = g.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
            let scale = if norm > config.max_grad_norm { config.max_grad_norm / norm } else { 1.0 };
            let lr = config.learning_rate * config.schedule.factor(t as u64);
            for i in 0..w.len() {
                let g = f64::from(g[i]) * scale;
                m[i] = config.beta1 * m[i] + (1.0 - config.beta1) * g;
                v[i] = config.beta2 * v[i] + (1.0 - config.beta2) * g * g;
                let m_hat = m[i] / (1.0 - config.beta1.powi(t as i32 + 1));
                let v_hat: f64 = v[i] / (1.0 - config.beta2.powi(t as i32 + 1));
                w[i] -= lr * (m_hat / (v_hat.sqrt() + config.epsilon) + config.weight_decay * w[i]);
            }
        }
        w
    }

    proptest! {
        #[test]
        fn updates_follow_the_textbook_in_f64(
            start in proptest::collection::vec(-1.0..1.0f32, 4),
            gradients in proptest::collection::vec(proptest::collection::vec(-2.0..2.0f32, 4), 1..12),
        ) {
            let schedule = Schedule { warmup_steps: 3, ..Schedule::default() };
            let config = OptimConfig { learning_rate: 0.01, weight_decay: 0.1, schedule, ..OptimConfig::default() };
            let mut p = parameter(&start);
            let mut adam = AdamW::new(config, &p).unwrap();
            for g in &gradients {
                adam.update(&mut p, &mut Gradients { values: vec![g.clone()] }).unwrap();
            }
            for (got, want) in p[0].values.iter().zip(naive(&config, &start, &gradients)) {
                prop_assert!((f64::from(*got) - want).abs() < 2e-5, "{got} {want}");
            }
        }
    }

    #[test]
    fn a_non_finite_gradient_changes_nothing() {
        let mut p = parameter(&[1.0, 2.0]);
        let mut adam = AdamW::new(OptimConfig::default(), &p).unwrap();
        let (before, state) = (p.clone(), adam.clone());
        let mut g = Gradients { values: vec![vec![0.0, f32::NAN]] };
        assert_eq!(adam.update(&mut p, &mut g), Err(OptimError::NotFinite { name: "w".to_owned() }));
        assert_eq!((p, adam), (before, state));
    }

    #[test]
    fn resumed_state_continues_bit_for_bit() {
        let mut p = parameter(&[1.0, -2.0]);
        let mut whole = AdamW::new(OptimConfig::default(), &p).unwrap();
        let g = |t: f32| Gradients { values: vec![vec![t, 1.0 - t]] };
        whole.update(&mut p, &mut g(0.3)).unwrap();
        let mut q = p.clone();
        let mut resumed =
            AdamW::resume(OptimConfig::default(), &q, whole.steps(), whole.moments().to_vec()).unwrap();
        whole.update(&mut p, &mut g(0.9)).unwrap();
        resumed.update(&mut q, &mut g(0.9)).unwrap();
        assert_eq!((p, whole), (q, resumed));
        let p = parameter(&[0.0]);
        assert!(AdamW::resume(OptimConfig::default(), &p, 1, vec![Moments::default()]).is_err());
    }
}
