//! `parallax bench`: load time, memory, prefill and decode speed of one model on this machine.

use std::time::Instant;

use anyhow::bail;
use clap::Args;
use parallax_engine::local::Pipeline;
use parallax_engine::{Engine, EngineConfig, Request, StageRunner};
use serde::Serialize;

use super::model::ModelArgs;
use crate::{machine, program};

/// Tokens of the prompts that decode measurements start from.
const DECODE_PROMPT_TOKENS: usize = 16;

/// Measure prefill and decode speed. Every figure is the median of --repeats runs.
///
/// Report (--json): machine, command, commit, model, dtype, device, threads, stages, load_ms, rss_mb, weight_mb, prefill [{prompt_tokens,
/// tokens_per_s, min, max}], decode [{batch, context, tokens_per_s (of one sequence), aggregate (of all), aggregate_min, aggregate_max,
/// step_ms, engine_overhead_ms (of a step, outside the forward pass)}].
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  parallax bench --model SmolLM2-135M-Instruct.Q4_1.gguf --dtype q8_0 --threads 2 \
                        --batch 1,8 --json"
)]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Prompt lengths
    #[arg(long, value_delimiter = ',', default_value = "128,512")]
    prompt_tokens: Vec<usize>,
    /// Sequences decoded at once
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    batch: Vec<usize>,
    /// Tokens decoded by each sequence
    #[arg(long, default_value_t = 64)]
    gen_tokens: usize,
    /// Tokens that are in the cache before decoding starts [default: 16]
    #[arg(long, default_value_t = DECODE_PROMPT_TOKENS)]
    context: usize,
    /// Runs per figure, at least 3
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    machine: String,
    command: String,
    commit: String,
    model: String,
    dtype: String,
    device: String,
    threads: usize,
    stages: usize,
    load_ms: f64,
    rss_mb: f64,
    weight_mb: f64,
    prefill: Vec<Prefill>,
    decode: Vec<Decode>,
}

#[derive(Debug, Serialize)]
struct Prefill {
    prompt_tokens: usize,
    tokens_per_s: f64,
    min: f64,
    max: f64,
}

#[derive(Debug, Serialize)]
struct Decode {
    batch: usize,
    context: usize,
    tokens_per_s: f64,
    aggregate: f64,
    aggregate_min: f64,
    aggregate_max: f64,
    step_ms: f64,
    engine_overhead_ms: f64,
}

/// Runs the command.
///
/// # Errors
/// Lengths that do not fit the model, a model that cannot be loaded, a failed forward pass.
pub fn run(args: BenchArgs) -> anyhow::Result<()> {
    if args.repeats < 3 || args.gen_tokens < 2 {
        bail!("--repeats must be at least 3 and --gen-tokens at least 2");
    }
    if [&args.prompt_tokens[..], &args.batch[..], &[args.context]].concat().contains(&0) {
        bail!("prompt lengths, batch sizes and --context must be at least 1");
    }
    let checkpoint = args.model.open()?;
    let context = checkpoint.config().max_context;
    let longest = args.prompt_tokens.iter().max().map_or(0, |n| n + 1).max(args.context + args.gen_tokens);
    if longest > context {
        bail!(
            "{longest} tokens do not fit the model's context of {context}; give shorter prompts or --gen-tokens"
        );
    }
    let widest = args.batch.iter().max().copied().unwrap_or(1);
    // One page more per sequence: their last pages are not shared.
    let cache_tokens = longest.max(widest * (args.context + args.gen_tokens + 16));
    let mut loaded = args.model.load(checkpoint, cache_tokens)?;
    let runner = &mut loaded.pipeline;
    let mut report = Report {
        machine: machine::describe(),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        commit: machine::commit(),
        model: args.model.model.clone(),
        dtype: args.model.dtype.to_string(),
        device: args.model.device.to_string(),
        threads: parallax_kernels::pool::threads(),
        stages: args.model.stages,
        load_ms: loaded.load_ms,
        rss_mb: 0.0,
        weight_mb: runner.weight_bytes() as f64 / 1e6,
        prefill: Vec::new(),
        decode: Vec::new(),
    };
    let line = format!("{}, {} threads, loaded in {:.0} ms", report.machine, report.threads, report.load_ms);
    program::tell(&line, args.json)?;
    prefill(runner, 32)?; // warm-up
    for &prompt_tokens in &args.prompt_tokens {
        let runs = repeat(args.repeats, || prefill(runner, prompt_tokens))?;
        let [min, median, max] = spread(runs);
        let line = format!("prefill {prompt_tokens:5} tokens: {median:8.1} tokens/s ({min:.1} to {max:.1})");
        program::tell(&line, args.json)?;
        report.prefill.push(Prefill { prompt_tokens, tokens_per_s: median, min, max });
    }
    for &batch in &args.batch {
        let runs = repeat(args.repeats, || decode(runner, batch, args.context, args.gen_tokens))?;
        let [aggregate_min, aggregate, aggregate_max] = spread(runs.iter().map(|r| r.aggregate).collect());
        let [_, step_ms, _] = spread(runs.iter().map(|r| r.step_ms).collect());
        let [_, engine_overhead_ms, _] = spread(runs.iter().map(|r| r.overhead_ms).collect());
        let line = format!(
            "decode batch {batch:4}: {aggregate:8.1} tokens/s ({aggregate_min:.1} to {aggregate_max:.1}), step {step_ms:.2} ms, \
             of it {engine_overhead_ms:.3} ms outside the forward pass"
        );
        program::tell(&line, args.json)?;
        report.decode.push(Decode {
            batch,
            context: args.context,
            tokens_per_s: aggregate / batch as f64,
            aggregate,
            aggregate_min,
            aggregate_max,
            step_ms,
            engine_overhead_ms,
        });
    }
    report.rss_mb = machine::resident_mb();
    program::tell(&format!("resident memory {:.0} MB", report.rss_mb), args.json)?;
    if args.json { program::report(&report) } else { Ok(()) }
}

struct DecodeRun {
    aggregate: f64,
    step_ms: f64,
    overhead_ms: f64,
}

/// A prompt of known ids: speed does not depend on them, within the vocabulary.
fn prompt(tokens: usize, salt: usize, vocab: usize) -> Vec<u32> {
    (0..tokens).map(|i| ((i * 7919 + salt * 104_729 + 11) % vocab) as u32).collect()
}

fn engine(runner: &Pipeline, batch: usize) -> anyhow::Result<Engine> {
    // Every run computes its prompt.
    let config = EngineConfig { running_sequences: batch, prefix_cache: false, ..EngineConfig::default() };
    let config = EngineConfig { step_tokens: config.step_tokens.max(batch), ..config };
    Ok(Engine::new(runner.shape(), runner.log_softmax(), config)?)
}

/// Tokens per second of one prompt up to its first token.
fn prefill(runner: &mut Pipeline, tokens: usize) -> anyhow::Result<f64> {
    let mut engine = engine(runner, 1)?;
    engine.add(Request::greedy(prompt(tokens, 0, runner.shape().vocab), 1))?;
    let started = Instant::now();
    while engine.is_busy() {
        step(&mut engine, runner)?;
    }
    Ok(tokens as f64 / started.elapsed().as_secs_f64())
}

/// Decodes `gen_tokens` with `batch` sequences that have `context` tokens behind them. The prompts are not timed.
fn decode(
    runner: &mut Pipeline,
    batch: usize,
    context: usize,
    gen_tokens: usize,
) -> anyhow::Result<DecodeRun> {
    let mut engine = engine(runner, batch)?;
    for salt in 0..batch {
        engine.add(Request::greedy(prompt(context, salt, runner.shape().vocab), usize::MAX))?;
    }
    while engine.metrics().generated_tokens < batch as u64 {
        step(&mut engine, runner)?;
    }
    let before = engine.metrics().generated_tokens;
    let started = Instant::now();
    let mut forward_s = 0.0;
    for _ in 1..gen_tokens {
        forward_s += step(&mut engine, runner)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let steps = (gen_tokens - 1) as f64;
    Ok(DecodeRun {
        aggregate: (engine.metrics().generated_tokens - before) as f64 / seconds,
        step_ms: seconds / steps * 1e3,
        overhead_ms: (seconds - forward_s) / steps * 1e3,
    })
}

/// One step; returns the seconds inside the forward pass.
fn step(engine: &mut Engine, runner: &mut Pipeline) -> anyhow::Result<f64> {
    let Some((batch, input)) = engine.plan() else { return Ok(0.0) };
    let started = Instant::now();
    let output = runner.forward(&batch, input);
    let seconds = started.elapsed().as_secs_f64();
    if let Err(error) = &output {
        bail!("{error}");
    }
    engine.complete(&batch, output);
    Ok(seconds)
}

fn repeat<T>(repeats: usize, mut run: impl FnMut() -> anyhow::Result<T>) -> anyhow::Result<Vec<T>> {
    (0..repeats).map(|_| run()).collect()
}

/// Smallest, median and largest.
fn spread(mut runs: Vec<f64>) -> [f64; 3] {
    runs.sort_by(f64::total_cmp);
    [runs[0], runs[runs.len() / 2], runs[runs.len() - 1]]
}
