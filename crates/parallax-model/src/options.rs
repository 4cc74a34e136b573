//! How a stage is loaded: layer range, weight format, device, and the size of its key-value store.

use std::{fmt, ops::Range, str::FromStr};

use crate::checkpoint::Checkpoint;

/// Format of the linear weights in memory. Activations, norms and sums are f32 with each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightDtype {
    /// As stored in the file (quantised blocks stay as they are; f16 is kept as bf16 or f32).
    #[default]
    Native,
    /// 32-bit floats: the reference, and what training uses.
    F32,
    /// 16-bit brain floats.
    Bf16,
    /// Blocks of 32 signed bytes with one scale.
    Q8_0,
    /// Blocks of 32 four-bit values with one scale.
    Q4_0,
}

impl WeightDtype {
    /// Bytes of `n` weights in memory. `Native` counts as bf16, which most checkpoints are published in;
    /// [`crate::Checkpoint::stage_bytes`] knows better for an opened one.
    pub fn bytes(self, n: u64) -> u64 {
        match self {
            Self::F32 => n * 4,
            Self::Native | Self::Bf16 => n * 2,
            // 32 values and a 16-bit scale.
            Self::Q8_0 => n.div_ceil(32) * 34,
            Self::Q4_0 => n.div_ceil(32) * 18,
        }
    }
}

impl FromStr for WeightDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "native" => Ok(Self::Native),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "q8_0" | "q8" => Ok(Self::Q8_0),
            "q4_0" | "q4" => Ok(Self::Q4_0),
            other => Err(format!("unknown weight format {other:?}; known are native, f32, bf16, q8_0, q4_0")),
        }
    }
}

impl fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
            Self::Q4_0 => "q4_0",
        })
    }
}

/// Where a stage computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// This machine's processor.
    #[default]
    Cpu,
    /// The first NVIDIA GPU (feature `cuda`).
    Cuda,
    /// The default GPU of wgpu (feature `wgpu`).
    Wgpu,
}

impl FromStr for DeviceKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.to_ascii_lowercase().as_str() {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            "wgpu" => Ok(Self::Wgpu),
            other => Err(format!("unknown device {other:?}; known are cpu, cuda, wgpu")),
        }
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
        })
    }
}

/// What [`crate::Stage::load`] needs to know besides the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Half-open range of decoder layers; `0..n_layers` is the whole model.
    pub layers: Range<usize>,
    /// Format of the linear weights.
    pub dtype: WeightDtype,
    /// Where to compute.
    pub device: DeviceKind,
    /// Tokens per key-value page.
    pub kv_page_tokens: usize,
    /// Pages in the store, shared by all sequences.
    pub kv_pages: usize,
}

impl LoadOptions {
    /// The whole model, native weights, on the CPU, with room for one sequence of up to 2048 tokens.
    pub fn whole(checkpoint: &Checkpoint) -> Self {
        Self {
            layers: 0..checkpoint.config().n_layers,
            dtype: WeightDtype::Native,
            device: DeviceKind::Cpu,
            kv_page_tokens: 16,
            kv_pages: checkpoint.config().max_context.min(2048).div_ceil(16),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtype_names_round_trip() {
        for dtype in
            [WeightDtype::Native, WeightDtype::F32, WeightDtype::Bf16, WeightDtype::Q8_0, WeightDtype::Q4_0]
        {
            assert_eq!(dtype.to_string().parse::<WeightDtype>(), Ok(dtype));
        }
        assert!("int3".parse::<WeightDtype>().unwrap_err().contains("q8_0"));
    }
}
