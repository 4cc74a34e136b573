//! Trainable parameters by name, as f32 masters on the host, and gradients of the same shapes.
//!
//! The order is the model's and never changes within a run; norms and updates therefore sum in a fixed order, which
//! is what makes a resumed run equal to an uninterrupted one bit for bit.

/// One matrix of parameters.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameter {
    /// The model's name for it.
    pub name: String,
    /// Rows and columns.
    pub shape: [usize; 2],
    /// Row-major values.
    pub values: Vec<f32>,
}

/// All parameters that a run trains.
pub type Parameters = Vec<Parameter>;

/// Derivatives, one list for each parameter in the same order.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Gradients {
    /// `values[i]` belongs to parameter `i`.
    pub values: Vec<Vec<f32>>,
}

impl Gradients {
    /// Zeros in the shapes of `parameters`.
    pub fn zeros(parameters: &[Parameter]) -> Self {
        Self { values: parameters.iter().map(|p| vec![0.0; p.values.len()]).collect() }
    }

    /// Adds `other`, for gradients that are accumulated over micro-batches in a fixed order.
    pub fn add(&mut self, other: &Self) {
        for (sum, values) in self.values.iter_mut().zip(&other.values) {
            for (s, v) in sum.iter_mut().zip(values) {
                *s += v;
            }
        }
    }
}
