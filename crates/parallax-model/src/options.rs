//! How a stage is loaded: layer range, weight format, device, and the size of its key-value store.

use std::{fmt, ops::Range, str::FromStr};

use parallax_kernels::WeightKind;
pub use parallax_kernels::attention::KvFormat;
use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;

/// Format of the linear weights in memory. Activations, norms and sums are f32 with each of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WeightDtype {
    /// As stored in the file, for every format that the kernels run: floats, all GGUF block formats, MXFP4, and GPTQ, AWQ
    /// and pack-quantized as blocks with zero points. Eight-bit floats, and groups in an activation order, become bf16.
    #[default]
    Native,
    /// 32-bit floats: the reference, and what training uses.
    F32,
    /// 16-bit brain floats.
    Bf16,
    /// 16-bit IEEE floats.
    F16,
    /// Blocks of 32 signed bytes with one scale.
    Q8_0,
    /// Blocks of 32 four-bit values with one scale.
    Q4_0,
    /// Blocks of 32 four-bit values with a scale and a minimum.
    Q4_1,
    /// Blocks of 32 five-bit values with one scale.
    Q5_0,
    /// Blocks of 32 five-bit values with a scale and a minimum.
    Q5_1,
    /// Blocks of 256 four-bit values with scales and minima of six bits.
    Q4K,
    /// Blocks of 256 five-bit values with scales and minima of six bits.
    Q5K,
    /// Blocks of 256 six-bit values with scales of eight bits.
    Q6K,
}

/// Every format with its name, in the order in which messages list them.
const NAMES: [(&str, WeightDtype); 12] = [
    ("native", WeightDtype::Native),
    ("f32", WeightDtype::F32),
    ("bf16", WeightDtype::Bf16),
    ("f16", WeightDtype::F16),
    ("q8_0", WeightDtype::Q8_0),
    ("q6_k", WeightDtype::Q6K),
    ("q5_k", WeightDtype::Q5K),
    ("q5_1", WeightDtype::Q5_1),
    ("q5_0", WeightDtype::Q5_0),
    ("q4_k", WeightDtype::Q4K),
    ("q4_1", WeightDtype::Q4_1),
    ("q4_0", WeightDtype::Q4_0),
];

impl WeightDtype {
    /// The kernels' format; `None` for native, which has none of its own.
    pub fn kind(self) -> Option<WeightKind> {
        Some(match self {
            Self::Native => return None,
            Self::F32 => WeightKind::F32,
            Self::Bf16 => WeightKind::Bf16,
            Self::F16 => WeightKind::F16,
            Self::Q8_0 => WeightKind::Q8_0,
            Self::Q4_0 => WeightKind::Q4_0,
            Self::Q4_1 => WeightKind::Q4_1,
            Self::Q5_0 => WeightKind::Q5_0,
            Self::Q5_1 => WeightKind::Q5_1,
            Self::Q4K => WeightKind::Q4K,
            Self::Q5K => WeightKind::Q5K,
            Self::Q6K => WeightKind::Q6K,
        })
    }

    /// Format of the embedding table and the head: fewer than eight bits become eight, since a table is read by row and
    /// its errors reach every logit.
    pub fn table(self) -> Self {
        match self.kind() {
            Some(kind) if kind.block().1 < kind.block().0 => Self::Q8_0,
            _ => self,
        }
    }

    /// Bytes of `n` weights in memory. `Native` counts as bf16, which most checkpoints are published in;
    /// [`crate::Checkpoint::stage_bytes`] knows better for an opened one.
    pub fn bytes(self, n: u64) -> u64 {
        let (values, bytes) = self.kind().unwrap_or(WeightKind::Bf16).block();
        n.div_ceil(values as u64) * bytes as u64
    }
}

impl FromStr for WeightDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.to_ascii_lowercase();
        match text.as_str() {
            "q8" => return Ok(Self::Q8_0),
            "q4" => return Ok(Self::Q4_0),
            _ => {}
        }
        NAMES.iter().find(|(name, _)| *name == text).map(|(_, dtype)| *dtype).ok_or_else(|| {
            let known: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            format!("unknown weight format {text:?}; known are {}", known.join(", "))
        })
    }
}

impl fmt::Display for WeightDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES.iter().find(|(_, dtype)| dtype == self).map_or("native", |(name, _)| name))
    }
}

/// Format of the weights under a trained adapter. A sampler whose stage is loaded in [`Self::weights`] computes the
/// log-probabilities of training, bit for bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum BaseDtype {
    /// 32-bit floats, and their transpose beside them in the layers: 8 bytes a weight, 4 in tables.
    #[default]
    F32,
    /// 16-bit brain floats: 2 bytes a weight.
    Bf16,
    /// 16-bit IEEE floats: 2 bytes a weight.
    F16,
    /// Blocks of 32 signed bytes with one scale: 1.06 bytes a weight. Activations round to eight bits in these layers, and gradients
    /// pass straight through the rounding.
    Q8_0,
}

impl BaseDtype {
    /// Every format.
    pub const ALL: [Self; 4] = [Self::F32, Self::Bf16, Self::F16, Self::Q8_0];

    /// The format that training's weights are packed in, and a sampler's have to be.
    pub fn weights(self) -> WeightDtype {
        match self {
            Self::F32 => WeightDtype::F32,
            Self::Bf16 => WeightDtype::Bf16,
            Self::F16 => WeightDtype::F16,
            Self::Q8_0 => WeightDtype::Q8_0,
        }
    }

    /// What names the model `checkpoint` ([`Checkpoint::id`]) with its weights in this format to learners, workers and auditors:
    /// another format is another model.
    pub fn model_id(self, checkpoint: &str) -> String {
        match self {
            Self::F32 => checkpoint.to_owned(),
            other => format!("{checkpoint} with weights in {other}"),
        }
    }
}

impl FromStr for BaseDtype {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|dtype| dtype.to_string() == text).ok_or_else(|| {
            let known = Self::ALL.map(|dtype| dtype.to_string());
            format!("unknown format {text:?} of frozen weights; known are {}", known.join(", "))
        })
    }
}

impl fmt::Display for BaseDtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.weights(), f)
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
    /// The default GPU of wgpu: by Vulkan, Metal or DirectX, as the system has it (feature `wgpu`).
    Wgpu,
}

impl DeviceKind {
    /// Every kind, compiled in or not.
    pub const ALL: [Self; 3] = [Self::Cpu, Self::Cuda, Self::Wgpu];
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
    /// How the store keeps numbers; other devices than the CPU have f32 only.
    pub kv_format: KvFormat,
}

impl LoadOptions {
    /// The whole model, native weights, an f32 store, on the CPU, with room for one sequence of up to 2048 tokens.
    pub fn whole(checkpoint: &Checkpoint) -> Self {
        Self {
            layers: 0..checkpoint.config().n_layers,
            dtype: WeightDtype::Native,
            device: DeviceKind::Cpu,
            kv_page_tokens: 16,
            kv_pages: checkpoint.config().max_context.min(2048).div_ceil(16),
            kv_format: KvFormat::F32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_have_eight_bits_at_least() {
        assert_eq!(WeightDtype::Q6K.table(), WeightDtype::Q8_0);
        assert_eq!(WeightDtype::Q4_0.table(), WeightDtype::Q8_0);
        assert_eq!(WeightDtype::Bf16.table(), WeightDtype::Bf16);
        assert_eq!(WeightDtype::Native.table(), WeightDtype::Native);
    }

    #[test]
    fn dtype_names_round_trip() {
        for (name, dtype) in NAMES {
            assert_eq!(dtype.to_string(), name);
            assert_eq!(name.parse(), Ok(dtype));
        }
        assert!("int3".parse::<WeightDtype>().unwrap_err().contains("q8_0"));
    }

    #[test]
    fn formats_of_frozen_weights_have_one_name_everywhere() {
        for dtype in BaseDtype::ALL {
            let name = dtype.to_string();
            assert_eq!(name.parse(), Ok(dtype));
            assert_eq!(serde_json::to_string(&dtype).unwrap(), format!("{name:?}"));
        }
        assert!("q4_0".parse::<BaseDtype>().unwrap_err().contains("q8_0"));
        assert_eq!(BaseDtype::F32.model_id("m"), "m", "what it was called before there were others");
        let ids = BaseDtype::ALL.map(|dtype| dtype.model_id("m"));
        assert!(ids.iter().all(|id| ids.iter().filter(|other| *other == id).count() == 1), "{ids:?}");
    }
}
