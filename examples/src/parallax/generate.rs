//! `parallax generate`: continue one prompt.

use std::io::Write as _;
use std::time::Instant;

use anyhow::{Context as _, bail};
use clap::{ArgGroup, Args};
use parallax_engine::{EngineConfig, EngineHandle, Event, FinishReason, Request, SamplingParams};
use parallax_model::{ChatMessage, Checkpoint, StreamDecoder, Tokenizer, TokenizerError};
use serde::Serialize;

use super::model::ModelArgs;
use crate::program;

/// Continue one prompt. Greedy unless --temperature is given; the same seed gives the same tokens on any number of
/// threads and stages.
///
/// Report (--json): prompt_ids, token_ids (a met end token included), text, logprobs (of the chosen tokens, at
/// temperature 1), finish_reason (stop or length), ttft_ms, decode_tokens_per_s, load_ms.
#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("what").required(true).args(["prompt", "prompt_ids"])),
    after_help = "Examples:\n  parallax generate --model tiny --prompt 'What is 1+2?' --chat\n  parallax generate \
                        --model SmolLM2-135M-Instruct.Q4_1.gguf --prompt 'Gravity is' --max-tokens 40 --stages 3\n  \
                        parallax generate --model DIR --prompt-ids 1,2,3 --json      (needs no tokenizer)"
)]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The prompt as text
    #[arg(long)]
    prompt: Option<String>,
    /// The prompt as token ids. Where the model has no tokenizer, the answer is token ids, too
    #[arg(long, value_delimiter = ',')]
    prompt_ids: Option<Vec<u32>>,
    /// Treat the prompt as a user's chat message: apply the model's chat template
    #[arg(long, requires = "prompt")]
    chat: bool,
    /// New tokens at most
    #[arg(long, default_value_t = 128)]
    max_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Keep the k likeliest tokens; 0 keeps all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Keep the likeliest tokens that have this much probability together
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Drop tokens below this fraction of the likeliest
    #[arg(long, default_value_t = 0.0)]
    min_p: f32,
    /// Seed of the sampler
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    prompt_ids: Vec<u32>,
    token_ids: Vec<u32>,
    text: String,
    logprobs: Vec<f32>,
    finish_reason: &'static str,
    ttft_ms: f64,
    decode_tokens_per_s: f64,
    load_ms: f64,
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be loaded, a prompt that does not fit, a failed forward pass.
pub fn run(args: GenerateArgs) -> anyhow::Result<()> {
    let checkpoint = args.model.open()?;
    let config = checkpoint.config();
    let tokenizer = tokenizer(&args, &checkpoint)?;
    let prompt_ids = prompt_ids(&args, &checkpoint, tokenizer.as_ref())?;
    let sampling = SamplingParams {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed,
        max_tokens: args.max_tokens,
        stop_ids: config.eos.clone(),
        ..SamplingParams::default()
    };
    let request = Request { prompt: prompt_ids.clone(), sampling, ..Request::default() };
    // Before the weights are read: a bad request should not cost a load.
    let limits = parallax_engine::RequestLimits { vocab: config.vocab, context_tokens: config.max_context };
    request.validate(&limits)?;
    let cache_tokens = prompt_ids.len() + request.token_allowance(&limits);
    let loaded = args.model.load(checkpoint, cache_tokens)?;
    let engine = EngineHandle::start(Box::new(loaded.pipeline), EngineConfig::default())?;
    let decoder = tokenizer.as_ref().map(Tokenizer::stream);
    let mut report = stream(&engine, request, decoder, args.json)?;
    report.load_ms = loaded.load_ms;
    if tokenizer.is_none() && !args.json {
        let ids: Vec<String> = report.token_ids.iter().map(u32::to_string).collect();
        program::list(&ids.join(","))?;
    }
    program::say(&format!(
        "\n{} tokens, {}: first after {:.1} ms, then {:.1} tokens/s",
        report.token_ids.len(),
        report.finish_reason,
        report.ttft_ms,
        report.decode_tokens_per_s
    ));
    if args.json { program::report(&report) } else { Ok(()) }
}

/// Text is a convenience with --prompt-ids, and the point without.
fn tokenizer(args: &GenerateArgs, checkpoint: &Checkpoint) -> anyhow::Result<Option<Tokenizer>> {
    match checkpoint.tokenizer() {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(TokenizerError::Missing(_)) if args.prompt_ids.is_some() => Ok(None),
        Err(error) if args.prompt_ids.is_some() => {
            program::say(&format!("tokens only, without text: {error}"));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn prompt_ids(
    args: &GenerateArgs,
    checkpoint: &Checkpoint,
    tokenizer: Option<&Tokenizer>,
) -> anyhow::Result<Vec<u32>> {
    let (Some(text), Some(tokenizer)) = (&args.prompt, tokenizer) else {
        return Ok(args.prompt_ids.clone().unwrap_or_default());
    };
    if !args.chat {
        return Ok(tokenizer.encode(text, true)?);
    }
    let template =
        checkpoint.chat_template()?.context("the model has no chat template; leave --chat away")?;
    let prompt = template.render(&[ChatMessage::new("user", text)], true)?;
    // The template writes its own special tokens.
    Ok(tokenizer.encode(&prompt, false)?)
}

fn stream(
    engine: &EngineHandle,
    request: Request,
    mut decoder: Option<StreamDecoder>,
    quiet_stdout: bool,
) -> anyhow::Result<Report> {
    let mut report = Report {
        prompt_ids: request.prompt.clone(),
        token_ids: Vec::new(),
        text: String::new(),
        logprobs: Vec::new(),
        finish_reason: "",
        ttft_ms: 0.0,
        decode_tokens_per_s: 0.0,
        load_ms: 0.0,
    };
    let started = Instant::now();
    let (mut first, mut last) = (started, started);
    let mut events = engine.submit(request)?;
    while let Some(event) = events.next_blocking() {
        let piece = match event {
            Event::Token(token) => {
                last = Instant::now();
                if report.token_ids.is_empty() {
                    first = last;
                }
                report.token_ids.push(token.id);
                report.logprobs.push(token.logprob);
                decoder.as_mut().map(|d| d.push(token.id)).transpose()?
            }
            Event::Prompt { .. } => None,
            Event::Finished { reason: FinishReason::Error, error, .. } => {
                bail!(error.map_or_else(String::new, |e| e.to_string()))
            }
            Event::Finished { reason, .. } => {
                report.finish_reason = reason.as_str();
                decoder.as_mut().map(StreamDecoder::finish).transpose()?
            }
        };
        if let Some(piece) = piece {
            show(&piece, quiet_stdout)?;
            report.text.push_str(&piece);
        }
    }
    report.ttft_ms = (first - started).as_secs_f64() * 1e3;
    let decode_s = (last - first).as_secs_f64();
    if decode_s > 0.0 {
        report.decode_tokens_per_s = (report.token_ids.len() - 1) as f64 / decode_s;
    }
    Ok(report)
}

/// The text belongs to stdout, unless the report goes there.
fn show(piece: &str, quiet_stdout: bool) -> anyhow::Result<()> {
    if quiet_stdout {
        std::io::stderr().write_all(piece.as_bytes())?;
    } else {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(piece.as_bytes())?;
        stdout.flush()?;
    }
    Ok(())
}
