//! Kernels for language models, on the CPU and (feature `gpu`) on GPUs: quantised and dense linear layers, attention over a paged cache, norms, rotary
//! embedding, log-probabilities, their gradients, and the fork-join pool they run on. Slices in, slices out; no tensors.
//!
//! ```
//! use parallax_kernels::{PackedWeight, WeightKind, linear::linear, logprob, pool};
//!
//! pool::set_threads(2);
//! // Three outputs of thirty-two inputs, kept as eight-bit blocks.
//! let rows: Vec<f32> = (0..3 * 32).map(|i| (i % 7) as f32 - 3.0).collect();
//! let weight = PackedWeight::pack_f32(WeightKind::Q8_0, &rows, 3, 32)?;
//! let (x, mut logits, mut log_p) = (vec![0.5; 2 * 32], vec![0.0; 2 * 3], vec![0.0; 2]);
//! linear(&x, &weight, &mut logits)?;
//! logprob::token_logprobs(&logits, 3, &[0, 2], &mut log_p)?;
//! assert!(log_p.iter().all(|p| *p < 0.0));
//! # Ok::<(), parallax_kernels::KernelError>(())
//! ```
//!
//! # What can be relied on
//!
//! - **A row's result depends on that row alone**: not on how many rows the call has, how a prompt is cut, where a
//!   sequence's pages lie, or how many threads there are. Work is shared out by outputs, never by the terms of a sum.
//! - **Every instruction set gives the same bits**, for every kernel: vectors are sixteen lanes at all levels, sums run
//!   in a fixed order, each operation is exactly rounded (fused multiply-adds included), integer dot products are
//!   exact, and exponential, logarithm, sine and cosine are our own. The tests compare each level that the machine has
//!   with the scalar one.
//! - Linear layers and matrix products are one chain of fused multiply-adds per output, in the order of the inputs (of
//!   the blocks of 32, for quantised weights). `gemm_nt` and the F32 linear layer give the same bits, and so do training
//!   and paged attention, and log-probabilities with and without materialised logits.
//! - NaN and infinity are never swallowed: they reach the outputs of their row, and of no other row. The bits of a NaN
//!   are not specified.
//!
//! # Map
//!
//! [`linear`] packed weights and their products · [`matmul`] unpacked products for training · [`attention`] paged and
//! packed causal attention, [`attention::latent`] over compressed keys · [`delta`] the gated delta rule · [`router`] the
//! choice of experts · [`gates`], [`norm`], [`activation`], [`rope`] the small kernels · [`logprob`] the one definition of a
//! token's log-probability · [`pool`] threads · [`dispatch`] instruction sets · [`dtype`] weight formats ·
//! [`mod@reference`] the same mathematics as plain loops, which the tests compare with · `gpu` the same on GPUs, in CubeCL,
//! to which the promises above do not extend.
//!
//! # Safety policy
//!
//! This is the only crate with unsafe code. It appears in four forms, each behind a safe, checked function: intrinsics,
//! justified by a token that only feature detection creates (`simd/`); disjoint parts of one output slice for the tasks
//! of a run (`parallel.rs`); the pool's borrowed job (`pool.rs`); and launches of GPU kernels, whose buffers were compared with
//! the shape (`gpu/`).
#![allow(
    unsafe_code,
    reason = "this crate is the one home of unsafe code: intrinsics, the fork-join pool, and launches of GPU kernels"
)]

pub mod activation;
pub mod attention;
pub mod delta;
pub mod dispatch;
pub mod dtype;
mod error;
pub mod gates;
#[cfg(feature = "gpu")]
pub mod gpu;
pub mod linear;
pub mod logprob;
mod math;
pub mod matmul;
pub mod norm;
mod parallel;
pub mod pool;
pub mod reference;
pub mod rope;
pub mod router;
mod simd;
#[cfg(test)]
mod testing;

pub use dtype::WeightKind;
pub use error::KernelError;
pub use linear::PackedWeight;
