//! `parallax run`: an OpenAI-compatible server and a chat page on this machine.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, bail, ensure};
use axum::Router;
use axum::http::HeaderValue;
use clap::Args;
use parallax_engine::http::{self, DEFAULT_BODY_LIMIT_BYTES, HttpLimits, HttpState, WeightLoader};
use parallax_engine::{EngineHandle, SamplingParams};
use parallax_model::Checkpoint;
use serde::Serialize;
use tokio::net::TcpListener;

use super::adapters::{self, AdapterArgs};
use super::engine::EngineArgs;
use super::model::{LoadedModel, ModelArgs};
use crate::program;

/// Serve a model on this machine: OpenAI's and Anthropic's APIs under /v1, a chat page at /, a cluster page at /cluster,
/// Prometheus metrics at /metrics.
///
/// Report (--json), printed when the server is ready: url, model, context_tokens, load_ms.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  parallax run --model tiny\n  parallax run --model SmolLM2-135M-Instruct.Q4_1.gguf --port 8080 \
                  --api-key secret\n\nThen open the printed address in a browser, or point an OpenAI client at it with \
                  base_url = URL/v1, or an Anthropic client with base_url = URL."
)]
pub struct RunArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// Cached positions that all requests share
    #[arg(long, default_value_t = 16384)]
    context: usize,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

/// Where an HTTP server listens and whom it lets in.
#[derive(Debug, Clone, Args)]
pub struct ListenArgs {
    /// Address to listen on; the default is reachable from this machine only
    #[arg(long, default_value = "127.0.0.1")]
    pub host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 3001)]
    pub port: u16,
    /// Key that clients must send as `Authorization: Bearer KEY` or `x-api-key: KEY`; several with commas between
    #[arg(long, env = "PARALLAX_API_KEY", hide_env_values = true, value_delimiter = ',')]
    pub api_key: Vec<String>,
    /// Requests that are answered at the same time; one more gets 429
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub max_concurrent: usize,
    /// Requests that one key may begin in a minute; without keys all clients share them [default: no limit]
    #[arg(long, value_name = "N")]
    pub requests_per_minute: Option<u32>,
    /// Largest request body
    #[arg(long, default_value_t = DEFAULT_BODY_LIMIT_BYTES, value_name = "BYTES")]
    pub max_body_bytes: usize,
    /// Name under which clients ask for the model [default: the last part of --model, without .gguf]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Let clients put requests before those of others, with a `priority` below 0
    #[arg(long)]
    pub urgent_requests: bool,
    /// Origin whose pages may use this server in a browser, as `https://app.example`; again for another, `*` for all
    #[arg(long, value_name = "ORIGIN", value_parser = origin)]
    pub allow_origin: Vec<HeaderValue>,
    /// Sample at temperature 1 where a request does not say how, whatever the model's generation_config.json says
    #[arg(long)]
    pub plain_sampling: bool,
}

/// An origin as browsers send it: one with a path, or with the port that they leave out, would never match.
fn origin(text: &str) -> Result<HeaderValue, String> {
    let text = text.to_ascii_lowercase();
    let (scheme, host) = text.split_once("://").unwrap_or_default();
    let usual = [("http", ":80"), ("https", ":443")];
    let left_out = usual.into_iter().any(|(of, port)| scheme == of && host.ends_with(port));
    let is_origin = !scheme.is_empty() && !host.is_empty() && !host.contains(['/', '?', '#', '@', ' ']);
    if text != "*" && (!is_origin || left_out) {
        let form = "SCHEME://HOST or SCHEME://HOST:PORT, without a path or the scheme's usual port, or *";
        return Err(format!("give {form}"));
    }
    let printable = |text: &String| text.bytes().all(|byte| byte.is_ascii_graphic());
    Some(text).filter(printable).and_then(|text| text.parse().ok()).ok_or_else(|| {
        "an origin has printable ASCII letters only; write a name with others in its xn-- form".to_owned()
    })
}

impl ListenArgs {
    /// Opens the port.
    ///
    /// # Errors
    /// A port in use or a host that is not this machine's, with the remedy.
    pub async fn bind(&self) -> anyhow::Result<(TcpListener, SocketAddr)> {
        let bound = TcpListener::bind((self.host.as_str(), self.port)).await;
        let listener = bound.map_err(|error| {
            let remedy = match error.kind() {
                ErrorKind::AddrInUse => "choose another --port, or --port 0 for a free one",
                ErrorKind::PermissionDenied => "choose a --port above 1023, or --port 0 for a free one",
                _ => "--host must be an address of this machine, 127.0.0.1 or 0.0.0.0 for example",
            };
            anyhow::anyhow!("cannot listen on {}:{}: {error}; {remedy}", self.host, self.port)
        })?;
        let address = listener.local_addr()?;
        if !address.ip().is_loopback() && self.api_key.is_empty() {
            program::say(&format!(
                "note: {address} is open to the network and asks for no key; give --api-key"
            ));
        }
        Ok((listener, address))
    }

    /// The name under which `model` is listed.
    ///
    /// # Errors
    /// An empty name.
    pub fn served_name(&self, model: &str) -> anyhow::Result<String> {
        let name = self.served_model_name.clone().unwrap_or_else(|| model_name(model));
        ensure!(!name.trim().is_empty(), "--served-model-name must not be empty");
        Ok(name)
    }

    /// What requests are sampled with where they do not say.
    ///
    /// # Errors
    /// A generation_config.json with what cannot be sampled with.
    pub fn sampling(&self, checkpoint: &Checkpoint) -> anyhow::Result<SamplingParams> {
        let plain = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        if self.plain_sampling {
            return Ok(plain);
        }
        let model = checkpoint.generation_defaults();
        let params = SamplingParams {
            temperature: model.temperature.unwrap_or(plain.temperature),
            top_p: model.top_p.unwrap_or(plain.top_p),
            top_k: model.top_k.unwrap_or(plain.top_k),
            min_p: model.min_p.unwrap_or(plain.min_p),
            repetition_penalty: model.repetition_penalty.unwrap_or(plain.repetition_penalty),
            ..plain
        };
        params.validate().context("the model's generation_config.json (--plain-sampling goes without it)")?;
        Ok(params)
    }

    /// As the server takes them.
    ///
    /// # Errors
    /// A limit that would let nobody in, or an empty key.
    pub fn limits(&self) -> anyhow::Result<HttpLimits> {
        ensure!(self.max_concurrent > 0, "--max-concurrent must be at least 1");
        ensure!(self.requests_per_minute != Some(0), "--requests-per-minute must be at least 1");
        ensure!(self.api_key.iter().all(|key| !key.trim().is_empty()), "--api-key must not be empty");
        Ok(HttpLimits {
            api_keys: self.api_key.clone(),
            body_bytes: self.max_body_bytes,
            concurrent_requests: self.max_concurrent,
            requests_per_minute: self.requests_per_minute,
            urgent_requests: self.urgent_requests,
            allow_origins: self.allow_origin.clone(),
            ..HttpLimits::default()
        })
    }
}

#[derive(Debug, Serialize)]
struct Report {
    url: String,
    model: String,
    context_tokens: usize,
    load_ms: f64,
}

/// Runs the command until ctrl-c or SIGTERM: then requests in flight finish within [`program::DRAIN`], new ones get 503,
/// and a second one ends it at once.
///
/// # Errors
/// A model that cannot be loaded, a port that cannot be opened.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let limits = args.listen.limits()?;
    let name = args.listen.served_name(&args.model.model)?;
    if args.context == 0 {
        bail!("--context must be at least 1");
    }
    tokio::runtime::Runtime::new()?.block_on(async {
        // The port first: a taken port should not cost a load.
        let (listener, address) = args.listen.bind().await?;
        let checkpoint = args.model.open()?;
        let defaults = args.listen.sampling(&checkpoint)?;
        let named = args.adapters.read(&checkpoint, &name)?;
        let LoadedModel { checkpoint, pipeline, load_ms } = args.model.load(checkpoint, args.context)?;
        let engine = args.engine.start(&name, &checkpoint, Box::new(pipeline), args.model.device)?;
        adapters::load(&engine, named).await?;
        let context_tokens = engine.limits().context_tokens;
        let updates = args.adapters.updates(Some(loader(args.model, args.context)));
        let state = HttpState { limits, updates, defaults, ..http_state(engine, &checkpoint, name)? };
        let report = Report {
            url: format!("http://{address}"),
            model: state.model_name.clone(),
            context_tokens,
            load_ms,
        };
        program::say(&format!("{} is ready at {} (ctrl-c ends it)", report.model, report.url));
        if args.json {
            program::report(&report)?;
        }
        let served =
            http::serve_until(listener, state, Router::new(), program::stopping(), program::DRAIN).await;
        served.context("serving HTTP")
    })
}

/// Reads other weights as these were read.
fn loader(model: ModelArgs, cache_tokens: usize) -> WeightLoader {
    Arc::new(move |path| {
        let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
        let loaded = model.load(checkpoint, cache_tokens).map_err(|error| format!("{error:#}"))?;
        Ok(Box::new(loaded.pipeline))
    })
}

/// What the HTTP server needs of a model.
///
/// # Errors
/// A checkpoint without a tokenizer, or with a chat template that does not compile.
pub fn http_state(
    engine: EngineHandle,
    checkpoint: &Checkpoint,
    model_name: String,
) -> anyhow::Result<HttpState> {
    Ok(HttpState {
        template: checkpoint.chat_template()?.map(Arc::new),
        stop_ids: checkpoint.config().eos.clone(),
        ..HttpState::new(engine, checkpoint.tokenizer()?, model_name)
    })
}

/// The last part of what was given as model, without `.gguf`: where it lies on this machine is nobody's business.
pub fn model_name(model: &str) -> String {
    // A revision is no part of the name.
    let model = if Path::new(model).exists() { model } else { model.split('@').next().unwrap_or(model) };
    let path = Path::new(model);
    // Only what has no name of its own, as `.`, is followed: a hub's cache links names to hashes.
    let whole = if path.file_name().is_none() { std::fs::canonicalize(path).ok() } else { None };
    let name = whole.as_deref().unwrap_or(path).file_name();
    let name = name.map_or_else(|| model.to_owned(), |name| name.to_string_lossy().into_owned());
    name.strip_suffix(".gguf").unwrap_or(&name).to_owned()
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches as _;

    use super::*;

    #[test]
    fn an_origin_is_what_browsers_send() {
        for (text, taken) in [
            ("*", "*"),
            ("https://App.example", "https://app.example"),
            ("http://[::1]:8080", "http://[::1]:8080"),
            ("http://app.example:443", "http://app.example:443"),
        ] {
            assert_eq!(origin(text).unwrap(), taken);
        }
        for text in [
            "",
            "app.example",
            "://app.example",
            "https://",
            "https://app.example/",
            "https://app.example/chat",
            "https://app.example?chat",
            "https://me@app.example",
            "https://app.example, https://b.example",
            "https://app.example:443",
            "http://app.example:80",
            "https://ä",
        ] {
            assert!(origin(text).is_err(), "{text}");
        }
    }

    #[test]
    fn requests_that_do_not_say_are_sampled_as_the_model_recommends() {
        let listening = |options: &[&str]| {
            let command = ListenArgs::augment_args(clap::Command::new("run").no_binary_name(true));
            ListenArgs::from_arg_matches(&command.get_matches_from(options)).unwrap()
        };
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("../assets/tiny");
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(tiny.join(file), dir.path().join(file)).unwrap();
        }
        let sampling = |file: &str, options: &[&str]| {
            std::fs::write(dir.path().join("generation_config.json"), file).unwrap();
            listening(options).sampling(&Checkpoint::open(dir.path()).unwrap())
        };
        let plain = SamplingParams { temperature: 1.0, ..SamplingParams::default() };
        assert_eq!(sampling("{}", &[]).unwrap(), plain);
        let whole =
            r#"{"temperature": 0.5, "top_p": 0.25, "top_k": 20, "min_p": 0.125, "repetition_penalty": 1.5}"#;
        let recommended = SamplingParams {
            temperature: 0.5,
            top_p: 0.25,
            top_k: 20,
            min_p: 0.125,
            repetition_penalty: 1.5,
            ..plain.clone()
        };
        assert_eq!(sampling(whole, &[]).unwrap(), recommended);
        assert_eq!(sampling(whole, &["--plain-sampling"]).unwrap(), plain);
        let wrong = r#"{"top_p": 0}"#;
        let error = format!("{:#}", sampling(wrong, &[]).unwrap_err());
        assert!(error.contains("--plain-sampling") && error.contains("top_p"), "{error}");
        assert_eq!(sampling(wrong, &["--plain-sampling"]).unwrap(), plain);
    }

    #[test]
    fn a_model_is_known_by_its_own_name() {
        let here = std::env::current_dir().unwrap();
        let here = here.file_name().unwrap().to_str().unwrap();
        for (model, name) in [
            ("tiny", "tiny"),
            ("org/Some-Model-1.5B@v2", "Some-Model-1.5B"),
            ("org/Some-Model-1.5B@refs/pr/7", "Some-Model-1.5B"),
            ("/models/a.b/smollm2.Q4_1.gguf", "smollm2.Q4_1"),
            ("models/llama/", "llama"),
            (".", here),
        ] {
            assert_eq!(model_name(model), name, "{model}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_known_by_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let (blob, link) = (dir.path().join("0a1b"), dir.path().join("small@2.gguf"));
        std::fs::write(&blob, "").unwrap();
        std::os::unix::fs::symlink(&blob, &link).unwrap();
        assert_eq!(model_name(link.to_str().unwrap()), "small@2");
    }
}
