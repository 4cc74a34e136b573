//! Which model, on what, cut into how many stages: the options that every local command shares.

use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use parallax_engine::local::Pipeline;
use parallax_model::{Checkpoint, DeviceKind, KvFormat, LoadOptions, WeightDtype};

use super::hub;

/// Tokens of a cache page.
const PAGE_TOKENS: usize = 16;

/// What `--dtype` takes, as help shows it.
pub const DTYPES: &str = "native|f32|bf16|f16|q8_0|q6_k|q5_k|q5_1|q5_0|q4_k|q4_1|q4_0";

/// The model and how to run it.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// `tiny` (embedded), a directory with config.json and safetensors, a .gguf file, or `ORG/NAME[@REVISION]` on Hugging
    /// Face or the hub that HF_ENDPOINT names
    #[arg(long)]
    pub model: String,
    /// Weights in memory: native keeps what the file has
    #[arg(long, default_value = "native", value_name = DTYPES)]
    pub dtype: WeightDtype,
    /// Keys and values in memory; q8 takes a quarter of f32 and moves logits a little
    #[arg(long, default_value = "f32", value_name = "f32|bf16|q8")]
    pub kv: KvFormat,
    /// Where to compute: cpu, cuda or wgpu (the latter two when compiled in)
    #[arg(long, default_value = "cpu")]
    pub device: DeviceKind,
    /// Threads of the CPU kernels [default: all cores]. The result does not depend on it
    #[arg(long)]
    pub threads: Option<usize>,
    /// Cut the layers into this many stages in this process. The result does not depend on it
    #[arg(long, default_value_t = 1)]
    pub stages: usize,
}

/// A model that is ready to run.
#[derive(Debug)]
pub struct LoadedModel {
    /// Its files.
    pub checkpoint: Checkpoint,
    /// Its layers.
    pub pipeline: Pipeline,
    /// How long loading took.
    pub load_ms: f64,
}

impl ModelArgs {
    /// A model as it is, whole.
    pub fn of(model: &str, device: DeviceKind) -> Self {
        let (dtype, kv) = (WeightDtype::Native, KvFormat::F32);
        Self { model: model.to_owned(), dtype, kv, device, threads: None, stages: 1 }
    }

    /// Opens the checkpoint; reads no weights yet.
    ///
    /// # Errors
    /// A model that is not there or cannot be read.
    pub fn open(&self) -> anyhow::Result<Checkpoint> {
        if self.threads == Some(0) {
            bail!("--threads must be at least 1");
        }
        if let Some(threads) = self.threads {
            parallax_kernels::pool::set_threads(threads);
        }
        hub::open(&self.model)
    }

    /// Loads the weights with a cache for `cache_tokens` positions, a progress bar on stderr meanwhile.
    ///
    /// # Errors
    /// Weights that cannot be read, a device that is not there, an impossible number of stages.
    pub fn load(&self, checkpoint: Checkpoint, cache_tokens: usize) -> anyhow::Result<LoadedModel> {
        let n_layers = checkpoint.config().n_layers;
        if self.stages == 0 || self.stages > n_layers {
            bail!("--stages {} does not fit a model of {n_layers} layers; give 1 to {n_layers}", self.stages);
        }
        let started = Instant::now();
        let options = LoadOptions {
            layers: 0..n_layers,
            dtype: self.dtype,
            device: self.device,
            kv_page_tokens: PAGE_TOKENS,
            kv_pages: cache_tokens.div_ceil(PAGE_TOKENS).max(1),
            kv_format: self.kv,
        };
        let style = ProgressStyle::with_template("loading {msg} [{bar:30}] {pos}/{len} stages, {elapsed}")
            .context("progress bar template")?;
        let bar = ProgressBar::new(self.stages as u64).with_style(style).with_message(self.model.clone());
        bar.tick();
        let pipeline =
            Pipeline::load(&checkpoint, &options, self.stages, |loaded| bar.set_position(loaded as u64))?;
        bar.finish_and_clear();
        Ok(LoadedModel { checkpoint, pipeline, load_ms: started.elapsed().as_secs_f64() * 1e3 })
    }
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::super::{bench_swarm::BenchSwarmArgs, chat::ChatArgs, plan::PlanArgs, serve::ServeArgs};
    use super::*;

    #[test]
    fn help_names_every_weight_format_that_is_taken() {
        let unknown = "no".parse::<WeightDtype>().unwrap_err();
        let (_, known) = unknown.split_once("known are ").unwrap();
        assert_eq!(DTYPES, known.replace(", ", "|"));
        let options = [
            ModelArgs::augment_args,
            BenchSwarmArgs::augment_args,
            ChatArgs::augment_args,
            PlanArgs::augment_args,
            ServeArgs::augment_args,
        ];
        for augment in options {
            let command: Command = augment(Command::new("parallax"));
            let dtype = command.get_arguments().find(|argument| argument.get_id() == "dtype").unwrap();
            assert_eq!(dtype.get_value_names().unwrap()[0].as_str(), DTYPES);
        }
    }
}
