//! `parallax models`: which families run, and what known checkpoints need.

use clap::Args;
use parallax_model::{
    Family, KvFormat, WeightDtype,
    catalogue::{self, KnownModel},
};
use serde::Serialize;

use crate::program;

/// Supported families, and known checkpoints with the memory they need.
///
/// Weights are as `--dtype` keeps them, keys and values of 1024 tokens as f32: `--kv q8` takes about a quarter of that. Any other
/// checkpoint of a supported family works too.
///
/// Report (--json): families [...], models [{name, family, parameters, layers, context, weights_gb {bf16, q8_0, q4_0},
/// kv_mb_per_1k_tokens}].
#[derive(Debug, Args)]
pub struct ModelsArgs {
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    families: Vec<&'static str>,
    models: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: &'static str,
    family: &'static str,
    parameters: u64,
    layers: u64,
    context: u64,
    weights_gb: Weights,
    kv_mb_per_1k_tokens: f64,
}

#[derive(Debug, Serialize)]
struct Weights {
    bf16: f64,
    q8_0: f64,
    q4_0: f64,
}

/// Runs the command.
///
/// # Errors
/// A closed stdout.
pub fn run(args: ModelsArgs) -> anyhow::Result<()> {
    let models: Vec<Row> = catalogue::known().map(|known| row(&known)).collect();
    let mut table = format!(
        "{:<44} {:>11} {:>9} {:>9} {:>9} {:>12} {:>9}\n",
        "checkpoint", "family", "bf16 GB", "q8_0 GB", "q4_0 GB", "KV MB / 1k", "context"
    );
    for m in &models {
        table += &format!(
            "{:<44} {:>11} {:>9.2} {:>9.2} {:>9.2} {:>12.1} {:>9}\n",
            m.name,
            m.family,
            m.weights_gb.bf16,
            m.weights_gb.q8_0,
            m.weights_gb.q4_0,
            m.kv_mb_per_1k_tokens,
            m.context
        );
    }
    table += "Any other checkpoint of these families works too: a directory with config.json and safetensors, or GGUF.";
    program::tell(&table, args.json)?;
    let families = Family::ALL.map(Family::name).to_vec();
    if args.json { program::report(&Report { families, models }) } else { Ok(()) }
}

fn row(known: &KnownModel) -> Row {
    let config = known.config();
    let gb = |dtype| config.stage_bytes(&(0..config.n_layers), dtype) as f64 / 1e9;
    Row {
        name: known.name,
        family: known.family().name(),
        parameters: config.parameters(),
        layers: config.n_layers as u64,
        context: config.max_context as u64,
        weights_gb: Weights {
            bf16: gb(WeightDtype::Bf16),
            q8_0: gb(WeightDtype::Q8_0),
            q4_0: gb(WeightDtype::Q4_0),
        },
        kv_mb_per_1k_tokens: config.kv_bytes(1024, KvFormat::F32) as f64 / 1e6,
    }
}
