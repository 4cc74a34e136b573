//! CPU kernels for language models: scalar reference, AVX2, AVX-512, and the fork-join pool they run on.
#![allow(
    unsafe_code,
    reason = "this crate is the one home of unsafe code: intrinsics and the fork-join pool"
)]

pub mod activation;
pub mod attention;
pub mod dispatch;
pub mod dtype;
mod error;
pub mod linear;
pub mod logprob;
mod math;
pub mod matmul;
pub mod norm;
mod parallel;
pub mod pool;
pub mod reference;
pub mod rope;
mod simd;
#[cfg(test)]
mod testing;

pub use dtype::WeightKind;
pub use error::KernelError;
pub use linear::PackedWeight;
