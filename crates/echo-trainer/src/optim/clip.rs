//! Clipping by the global norm.

use crate::parameters::Gradients;

/// The norm over all gradients together, summed in f64 in parameter order.
pub fn global_norm(gradients: &Gradients) -> f64 {
    let squares = gradients.values.iter().flatten().map(|g| f64::from(*g) * f64::from(*g));
    squares.sum::<f64>().sqrt()
}

/// Scales `gradients` so that their global norm is at most `max_norm` and returns the norm they had; 0 leaves them.
pub fn clip_global_norm(gradients: &mut Gradients, max_norm: f64) -> f64 {
    let norm = global_norm(gradients);
    if max_norm > 0.0 && norm > max_norm {
        let factor = (max_norm / norm) as f32;
        gradients.values.iter_mut().flatten().for_each(|g| *g *= factor);
    }
    norm
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_gradients_are_shortened_and_short_ones_left_alone() {
        let start = Gradients { values: vec![vec![3.0], vec![0.0, 4.0]] };
        let mut g = start.clone();
        assert_eq!(clip_global_norm(&mut g, 1.0), 5.0);
        assert!((global_norm(&g) - 1.0).abs() < 1e-6);
        for max_norm in [0.0, 6.0] {
            let mut g = start.clone();
            clip_global_norm(&mut g, max_norm);
            assert_eq!(g, start);
        }
    }
}
