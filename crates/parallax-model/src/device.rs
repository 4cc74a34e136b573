//! Burn devices by name. Never Burn's default device, which changes with the compiled features.

use burn::tensor::Device;

use crate::{error::LoadError, layer::Route, options::DeviceKind};

/// The device, and how operations run on it.
pub(crate) fn open(kind: DeviceKind) -> Result<(Device, Route), LoadError> {
    match kind {
        DeviceKind::Cpu => Ok((Device::flex(), Route::Kernels)),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok((Device::cuda(0), Route::Composed)),
        #[cfg(feature = "wgpu")]
        DeviceKind::Wgpu => Ok((Device::wgpu(burn::tensor::DeviceKind::DefaultDevice), Route::Composed)),
        #[cfg(not(all(feature = "cuda", feature = "wgpu")))]
        other => Err(LoadError::Device {
            device: other.to_string(),
            reason: format!("this program was built without the feature `{other}`"),
        }),
    }
}
