//! `parallax models`: which families run, and what known checkpoints need.

use clap::Args;
use serde::Serialize;

use super::known::{KNOWN, Known};
use crate::program;

/// Supported families, and known checkpoints with the memory they need.
///
/// Report (--json): families [...], models [{name, family, parameters, layers, context, weights_gb {bf16, q8_0, q4_0},
/// kv_mb_per_1k_tokens}]. Any other checkpoint of a supported family works too.
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
    let models: Vec<Row> = KNOWN.iter().map(row).collect();
    let mut table = format!(
        "{:<44} {:>7} {:>9} {:>9} {:>9} {:>12} {:>9}\n",
        "checkpoint", "family", "bf16 GB", "q8_0 GB", "q4_0 GB", "KV MB / 1k", "context"
    );
    for m in &models {
        table += &format!(
            "{:<44} {:>7} {:>9.2} {:>9.2} {:>9.2} {:>12.1} {:>9}\n",
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
    program::say(&table);
    let mut families: Vec<&'static str> = models.iter().map(|m| m.family).collect();
    families.sort_unstable();
    families.dedup();
    if args.json { program::report(&Report { families, models }) } else { Ok(()) }
}

fn row(known: &Known) -> Row {
    let parameters = known.parameters();
    // Blocks of 32 values: 34 bytes in Q8_0, 18 in Q4_0.
    let gb = |bytes_per_parameter: f64| parameters as f64 * bytes_per_parameter / 1e9;
    Row {
        name: known.name,
        family: known.family,
        parameters,
        layers: known.layers,
        context: known.context,
        weights_gb: Weights { bf16: gb(2.0), q8_0: gb(34.0 / 32.0), q4_0: gb(18.0 / 32.0) },
        // Keys and values, f32 in the CPU cache.
        kv_mb_per_1k_tokens: (2 * known.layers * known.kv_heads * known.head_dim * 4 * 1024) as f64 / 1e6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        let billions = |name: &str| {
            let known = KNOWN.iter().find(|k| k.name.ends_with(name)).unwrap();
            known.parameters() as f64 / 1e9
        };
        for (name, published) in [
            ("SmolLM2-135M-Instruct", 0.1345),
            ("Llama-3.2-1B-Instruct", 1.236),
            ("Llama-3.1-8B-Instruct", 8.030),
            ("Llama-3.3-70B-Instruct", 70.55),
            ("Qwen3-0.6B", 0.596),
            ("Qwen3-8B", 8.19),
            ("Qwen3-32B", 32.76),
        ] {
            let counted = billions(name);
            assert!((counted / published - 1.0).abs() < 0.005, "{name}: {counted}");
        }
    }

    #[test]
    fn there_are_forty_models_and_no_name_twice() {
        let mut names: Vec<_> = KNOWN.iter().map(|k| k.name).collect();
        assert!(names.len() >= 40);
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), KNOWN.len());
    }
}
