//! `training-swarm bench`: speed of one adapter step, forward and backward.

use std::time::Instant;

use anyhow::ensure;
use clap::Args;
use echo_rollout::environment::draws::Draws;
use echo_trainer::loss::LossConfig;
use echo_trainer::packing::Sample;
use echo_trainer::shares::{Cut, Hands as _, Replicas, policy_gradients};
use parallax_model::train::{LoraConfig, TrainModel, TrainOptions};
use parallax_model::{BaseDtype, Checkpoint};
use serde_json::json;

use crate::{machine, program};

/// Measure forward and backward of one GRPO step with an adapter on all seven linears.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Report: {\"tokens_per_s\",\"forward_backward_ms\",\"rss_mb\",\"forward_backward_ms_min\",\"forward_backward_ms_max\",\
                  \"base_bytes\",\"machine\",\"commit\",...}; base_bytes is the memory of the frozen weights; the median of --repeats after one warm-up."
)]
pub struct BenchArgs {
    /// Model to train
    #[arg(long, default_value = "tiny")]
    model: String,
    /// Sequences of the batch
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Tokens of each sequence
    #[arg(long, default_value_t = 64)]
    seq: usize,
    /// Inner width of the adapter
    #[arg(long, default_value_t = 8)]
    lora_rank: usize,
    /// Format of the frozen weights: f32, bf16, f16 or q8_0
    #[arg(long, default_value_t = BaseDtype::F32)]
    base_dtype: BaseDtype,
    /// Keep only the layers' inputs for the backward pass and compute the rest again
    #[arg(long)]
    activation_checkpointing: bool,
    /// Copies of the model that compute at the same time, each a share of the batch
    #[arg(long, default_value_t = 1)]
    replicas: usize,
    /// Measurements
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// A model that is not there, sizes of zero.
pub fn run(args: &BenchArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.batch > 0 && args.seq > 1, "--batch must be at least 1 and --seq at least 2");
    anyhow::ensure!(args.lora_rank > 0 && args.repeats > 0, "--lora-rank and --repeats must be at least 1");
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let vocabulary = checkpoint.config().vocab as u64;
    let lora = LoraConfig {
        rank: args.lora_rank,
        alpha: 16.0,
        targets: Vec::new(),
        seed: 1,
        base_dtype: args.base_dtype,
    };
    let mut model =
        TrainModel::from_checkpoint(&checkpoint, &TrainOptions { lora: Some(lora), full: false })?;
    model.set_activation_checkpointing(args.activation_checkpointing);
    let base_bytes = model.frozen_bytes();
    let sample = |row: u64| {
        let mut draws = Draws::new("training-swarm bench tokens", row);
        let tokens = (0..args.seq).map(|_| (draws.next_u64() % vocabulary) as u32).collect();
        let advantage = if row.is_multiple_of(2) { 1.0 } else { -1.0 };
        Sample::new(tokens, 1, vec![-5.0; args.seq - 1], advantage)
    };
    let samples: Vec<Sample> = (0..args.batch as u64).map(sample).collect();
    ensure!(args.replicas > 0, "--replicas must be at least 1");
    let mut replicas: Vec<TrainModel> = (1..args.replicas).map(|_| model.replica()).collect();
    replicas.push(model);
    let cut = Cut { shares: args.replicas, micro_batch_tokens: usize::MAX };
    let loss = LossConfig::grpo();
    let mut times_ms = Vec::new();
    for _ in 0..=args.repeats {
        let started = Instant::now();
        let mut hands = Replicas::new(replicas.iter_mut().collect(), &loss);
        policy_gradients(|shares| hands.compute(shares).map(Some), &samples, &loss, cut)?;
        times_ms.push(started.elapsed().as_secs_f64() * 1e3);
    }
    times_ms.remove(0);
    times_ms.sort_by(f64::total_cmp);
    let median = times_ms[times_ms.len() / 2];
    let tokens_per_s = (args.batch * args.seq) as f64 / median * 1e3;
    let line = format!("{tokens_per_s:.0} tokens/s, {median:.1} ms forward and backward");
    program::tell(&line, args.json)?;
    if !args.json {
        return Ok(());
    }
    program::report(&json!({
        "tokens_per_s": tokens_per_s, "forward_backward_ms": median, "forward_backward_ms_min": times_ms[0],
        "forward_backward_ms_max": times_ms[times_ms.len() - 1], "rss_mb": machine::resident_mb(), "model": args.model,
        "batch": args.batch, "seq": args.seq, "lora_rank": args.lora_rank, "repeats": args.repeats, "replicas": args.replicas,
        "activation_checkpointing": args.activation_checkpointing, "base_dtype": args.base_dtype, "base_bytes": base_bytes,
        "machine": machine::describe(), "commit": machine::commit()
    }))
}
