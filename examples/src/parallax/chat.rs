//! `parallax chat`: a conversation in the terminal, with a model here or a server anywhere.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use anyhow::{Context as _, bail};
use clap::{ArgGroup, Args};
use parallax_engine::{EngineConfig, EngineHandle, Event, FinishReason, Request, SamplingParams};
use parallax_model::{ChatMessage, ChatTemplate, DeviceKind, KvFormat, Tokenizer, WeightDtype};
use serde_json::{Value, json};

use super::model::{DTYPES, ModelArgs};
use crate::program;

/// Cached positions of a local chat.
const CACHE_TOKENS: usize = 8192;
/// A line of a server's stream that is longer than this is no event.
const MAX_EVENT_BYTES: usize = 1 << 20;

/// Talk with a model in the terminal. `/new` starts over, `/exit` (or ctrl-d) ends.
#[derive(Debug, Args)]
#[command(
    group(ArgGroup::new("partner").required(true).args(["model", "url"])),
    after_help = "Examples:\n  parallax chat --model tiny\n  parallax chat --url http://127.0.0.1:3001\n  echo 'What is 1+2?' \
                  | parallax chat --model tiny"
)]
pub struct ChatArgs {
    /// `tiny` (embedded), a directory with config.json and safetensors, a .gguf file, or `ORG/NAME[@REVISION]` on Hugging
    /// Face or the hub that HF_ENDPOINT names
    #[arg(long)]
    model: Option<String>,
    /// A server to talk to instead of loading a model, as `parallax run` and `parallax serve` print it
    #[arg(long)]
    url: Option<String>,
    /// The server's API key
    #[arg(long, env = "PARALLAX_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Weights in memory, with --model
    #[arg(long, default_value = "native", value_name = DTYPES, conflicts_with = "url")]
    dtype: WeightDtype,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Tokens of one answer at most
    #[arg(long, default_value_t = 512)]
    max_tokens: usize,
}

#[expect(clippy::large_enum_variant, reason = "there is one")]
enum Partner {
    Local { engine: EngineHandle, tokenizer: Tokenizer, template: ChatTemplate, stop_ids: Vec<u32> },
    Remote { client: reqwest::Client, url: String, api_key: Option<String> },
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be loaded, a server that does not answer.
pub fn run(args: ChatArgs) -> anyhow::Result<()> {
    tokio::runtime::Runtime::new()?.block_on(converse(args))
}

async fn converse(args: ChatArgs) -> anyhow::Result<()> {
    let partner = Partner::find(&args)?;
    let prompting = std::io::stdin().is_terminal();
    let mut messages: Vec<ChatMessage> = Vec::new();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if prompting {
            show("> ")?;
        }
        let Some(line) = lines.next().transpose().context("reading standard input")? else { return Ok(()) };
        match line.trim() {
            "" => continue,
            "/exit" => return Ok(()),
            "/new" => messages.clear(),
            text => {
                messages.push(ChatMessage::new("user", text));
                match partner.answer(&messages, &args).await {
                    Ok(answer) => messages.push(ChatMessage::new("assistant", answer)),
                    Err(error) if prompting => {
                        messages.pop();
                        program::say(&format!("error: {error:#}"));
                    }
                    Err(error) => return Err(error),
                }
                show("\n")?;
            }
        }
    }
}

impl Partner {
    fn find(args: &ChatArgs) -> anyhow::Result<Self> {
        if let Some(url) = &args.url {
            let url = url.trim_end_matches('/').trim_end_matches("/v1").to_owned();
            return Ok(Self::Remote { client: reqwest::Client::new(), url, api_key: args.api_key.clone() });
        }
        let model = args.model.clone().context("give --model or --url")?;
        let (dtype, kv) = (args.dtype, KvFormat::F32);
        let model = ModelArgs { model, dtype, kv, device: DeviceKind::Cpu, threads: None, stages: 1 };
        let checkpoint = model.open()?;
        let template = checkpoint
            .chat_template()?
            .context("this model has no chat template; use `parallax generate`")?;
        let (tokenizer, stop_ids) = (checkpoint.tokenizer()?, checkpoint.config().eos.clone());
        let cache_tokens = checkpoint.config().max_context.min(CACHE_TOKENS);
        let engine = EngineHandle::start(
            Box::new(model.load(checkpoint, cache_tokens)?.pipeline),
            EngineConfig::default(),
        )?;
        Ok(Self::Local { engine, tokenizer, template, stop_ids })
    }

    /// Streams one answer to stdout and returns it.
    async fn answer(&self, messages: &[ChatMessage], args: &ChatArgs) -> anyhow::Result<String> {
        match self {
            Self::Local { engine, tokenizer, template, stop_ids } => {
                let prompt = tokenizer.encode(&template.render(messages, true)?, false)?;
                let sampling = SamplingParams {
                    temperature: args.temperature,
                    max_tokens: args.max_tokens,
                    stop_ids: stop_ids.clone(),
                    // Another question, another seed; the same conversation gives the same answers.
                    seed: messages.len() as u64,
                    ..SamplingParams::default()
                };
                let mut events = engine.submit(Request { prompt, sampling, ..Request::default() })?;
                let (mut decoder, mut answer) = (tokenizer.stream(), String::new());
                while let Some(event) = events.next().await {
                    let piece = match event {
                        Event::Token(token) if stop_ids.contains(&token.id) => continue,
                        Event::Token(token) => decoder.push(token.id)?,
                        Event::Prompt { .. } => continue,
                        Event::Finished { reason: FinishReason::Error, error, .. } => {
                            bail!(error.map_or_else(String::new, |e| e.to_string()))
                        }
                        Event::Finished { .. } => decoder.finish()?,
                    };
                    show(&piece)?;
                    answer.push_str(&piece);
                }
                Ok(answer)
            }
            Self::Remote { client, url, api_key } => {
                let messages: Vec<Value> =
                    messages.iter().map(|m| json!({"role": m.role, "content": m.content})).collect();
                let body = json!({"messages": messages, "stream": true, "temperature": args.temperature,
                                  "max_tokens": args.max_tokens});
                let mut request = client.post(format!("{url}/v1/chat/completions")).json(&body);
                if let Some(key) = api_key {
                    request = request.bearer_auth(key);
                }
                let response = request.send().await.with_context(|| format!("no answer from {url}"))?;
                if !response.status().is_success() {
                    let (status, body) = (response.status(), response.text().await.unwrap_or_default());
                    let message = serde_json::from_str::<Value>(&body).ok();
                    let message = message.as_ref().and_then(|m| m["error"]["message"].as_str());
                    bail!("{url} answered {status}: {}", message.unwrap_or_else(|| body.trim()));
                }
                remote_stream(response).await
            }
        }
    }
}

/// Reads server-sent events: `data: {...}` lines until `[DONE]`.
async fn remote_stream(mut response: reqwest::Response) -> anyhow::Result<String> {
    let (mut buffer, mut answer) = (Vec::new(), String::new());
    while let Some(bytes) = response.chunk().await.context("the stream broke off")? {
        buffer.extend_from_slice(&bytes);
        while let Some(end) = buffer.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let Some(data) = line.trim().strip_prefix("data:") else { continue };
            if data.trim() == "[DONE]" {
                return Ok(answer);
            }
            let event: Value =
                serde_json::from_str(data).context("the server sent an event that is no JSON")?;
            if let Some(message) = event["error"]["message"].as_str() {
                bail!("{message}");
            }
            let piece = event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
            show(piece)?;
            answer.push_str(piece);
        }
        if buffer.len() > MAX_EVENT_BYTES {
            bail!("the server sent an event of more than {MAX_EVENT_BYTES} bytes");
        }
    }
    bail!("the stream ended before the answer did")
}

fn show(text: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    Ok(stdout.flush()?)
}
