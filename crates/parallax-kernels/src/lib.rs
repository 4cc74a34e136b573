//! CPU kernels for language models: scalar reference, AVX2, AVX-512, and the fork-join pool they run on.
#![allow(unsafe_code, reason = "this crate is the one home of unsafe code: intrinsics and the fork-join pool")]

pub mod dispatch;
pub mod dtype;
mod error;
pub mod linear;
mod parallel;
pub mod pool;
mod simd;

pub use dtype::WeightKind;
pub use error::KernelError;
pub use linear::PackedWeight;
