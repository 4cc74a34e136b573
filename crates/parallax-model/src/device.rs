//! Devices by name. Never Burn's default device, which changes with the compiled features.

#[cfg(feature = "gpu")]
use burn::backend::CubeDevice;
use burn::tensor::Device;

use crate::{error::LoadError, layer::Route, options::DeviceKind};

impl DeviceKind {
    /// What the driver calls the device of this kind on this machine, which it opens; of the processor, which instruction
    /// set the kernels use.
    ///
    /// # Errors
    /// It was not compiled in, or is not present.
    pub fn describe(self) -> Result<String, LoadError> {
        match self {
            Self::Cpu => Ok(format!("this machine's processor ({})", parallax_kernels::dispatch::level())),
            #[cfg(feature = "gpu")]
            other => Ok(gpu(other)?.client().properties().identity.name.clone()),
            #[cfg(not(feature = "gpu"))]
            other => Err(unavailable(other, &absent(other))),
        }
    }
}

/// The device, and how operations run on it.
pub(crate) fn open(kind: DeviceKind) -> Result<(Device, Route), LoadError> {
    match kind {
        DeviceKind::Cpu => Ok((Device::flex(), Route::Kernels)),
        #[cfg(feature = "gpu")]
        other => Ok((Device::new(gpu(other)?), Route::Gpu)),
        #[cfg(not(feature = "gpu"))]
        other => Err(unavailable(other, &absent(other))),
    }
}

#[cfg(feature = "gpu")]
fn gpu(kind: DeviceKind) -> Result<CubeDevice, LoadError> {
    match kind {
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => CubeDevice::cuda(0).map_err(|e| unavailable(kind, &e)),
        #[cfg(feature = "wgpu")]
        DeviceKind::Wgpu => CubeDevice::wgpu(Default::default()).map_err(|e| unavailable(kind, &e)),
        other => Err(unavailable(other, &absent(other))),
    }
}

fn absent(kind: DeviceKind) -> String {
    format!("this program was built without the feature `{kind}`")
}

fn unavailable(kind: DeviceKind, reason: &impl ToString) -> LoadError {
    LoadError::Device { device: kind.to_string(), reason: reason.to_string() }
}
