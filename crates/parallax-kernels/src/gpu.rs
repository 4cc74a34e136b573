//! Kernels for GPUs, written once in CubeCL for CUDA, Vulkan, Metal and DirectX (features `cuda` and `wgpu`).
//!
//! They do what the CPU's kernels do, on buffers of a device: products with packed weights, norms, rotation, attention
//! over a paged store, the gated activation. Activations and sums are f32; weights stay packed and are widened in
//! registers. [`mod@crate::reference`] is their specification too.
//!
//! ```no_run
//! # #[cfg(feature = "wgpu")] {
//! use cubecl::{Device, wgpu::WgpuDeviceKind};
//! use parallax_kernels::{WeightKind, dtype, gpu::{Values, linear}};
//!
//! let client = Device::wgpu(WgpuDeviceKind::DefaultDevice).expect("an adapter").client();
//! let raw = dtype::quantize(WeightKind::Q8_0, &vec![0.25; 3 * 32])?;
//! let weight = linear::DeviceWeight::from_bytes(&client, WeightKind::Q8_0, &raw, 3, 32)?;
//! let x = Values::upload(&client, &vec![1.0; 2 * 32]);
//! let y = linear::linear(&client, &x, &[weight])?;
//! assert_eq!(y.len(), 2 * 3);
//! # }
//! # Ok::<(), parallax_kernels::KernelError>(())
//! ```
//!
//! # What can be relied on
//!
//! A row's result depends on that row alone, but not bit for bit: products have one order of summation for up to four
//! rows and another for more, and a device may contract or reorder what its compiler likes. Attention is the same for
//! every cut into chunks and pages: keys are taken in blocks that begin at multiples of 256 and merged in order.
//!
//! # Safety
//!
//! A launch takes lengths on trust, so every one is behind a function that compares the buffers with the shape first;
//! [`Values`] and [`Ids`] know how long they are. Indices inside a buffer (pages, ids) are compared with its length on
//! the host before they are uploaded.

pub mod activation;
pub mod attention;
mod buffers;
mod fold;
pub mod linear;
pub mod norm;
mod widen;

#[cfg(all(test, feature = "gpu-tests"))]
mod tests;

pub use buffers::{Ids, Values};

use cubecl::prelude::CubeCount;

use crate::error::KernelError;

/// Cubes along one axis that every device can start.
const MOST_CUBES: usize = 65_535;

/// Kernels count elements in 32 bits.
fn check_indices(op: &'static str, what: &'static str, got: usize) -> Result<(), KernelError> {
    let limit = u32::MAX as usize;
    if got >= limit { Err(KernelError::OutOfRange { op, what, limit, got }) } else { Ok(()) }
}

/// A grid of at least `n` cubes, which a kernel counts through by `CUBE_POS`.
fn grid(n: usize) -> CubeCount {
    let x = n.clamp(1, MOST_CUBES);
    CubeCount::Static(x as u32, n.div_ceil(x).max(1) as u32, 1)
}
