//! `tinker-gateway`: a Tinker-compatible service on this machine, with an engine of its own to sample.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use echo_trainer::service::evaluation::BoxFuture;
use echo_trainer::service::gateway::{
    Gateway, GatewayConfig, SampleError, SampleTask, SampledAnswer, SampledAnswers, Stop, TaskSampler,
};
use futures::future::try_join_all;
use parallax_engine::{
    Completion, EngineConfig, EngineHandle, Event, FinishReason, Request, RequestError, SamplingParams,
    StopStrings, TokenStream,
};
use parallax_model::{BaseDtype, Checkpoint, StreamDecoder, Tokenizer, TokenizerError};
use serde_json::json;

use crate::program;
use crate::rollouts;

/// Options of the gateway.
#[derive(Debug, Args)]
pub struct GatewayArgs {
    /// `tiny` (embedded), a directory with config.json and safetensors, or a .gguf file
    #[arg(long, default_value = "tiny")]
    model: String,
    /// Name under which clients ask for the base model [default: as --model]
    #[arg(long)]
    name: Option<String>,
    /// Format of the weights under the adapters, which are frozen: bf16 and f16 take a quarter of f32's memory, q8_0 an eighth. Adapters,
    /// gradients and optimisers are f32 with each. What was saved over one format is refused over another
    #[arg(long, default_value_t = BaseDtype::F32, value_name = "f32|bf16|f16|q8_0")]
    base_dtype: BaseDtype,
    /// Where to listen; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:8383")]
    listen: SocketAddr,
    /// Directory of what clients save
    #[arg(long, default_value = "tinker-gateway-out")]
    dir: PathBuf,
    /// File with the API keys that clients may send, one a line; the PyPI client only sends keys that begin with tml-.
    /// Without it, everyone who can reach the port is let in
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,
    /// Models in training at a time
    #[arg(long, default_value_t = 4)]
    max_models: usize,
    /// Cached positions of all samples in the making together
    #[arg(long, default_value_t = 16_384)]
    cache_tokens: usize,
    /// Threads of the CPU kernels; 0: all cores
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print one JSON object on stdout when the service listens: url, model
    #[arg(long)]
    json: bool,
}

/// Runs the service until it is asked to stop.
///
/// # Errors
/// Weights that cannot be read, a port in use, a directory that cannot be written.
pub fn run(args: &GatewayArgs) -> anyhow::Result<()> {
    if args.threads > 0 {
        parallax_kernels::pool::set_threads(args.threads);
    }
    let api_keys = match &args.api_keys {
        None => Vec::new(),
        Some(path) => {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
            let keys: Vec<String> =
                text.lines().map(str::trim).filter(|key| !key.is_empty()).map(str::to_owned).collect();
            anyhow::ensure!(!keys.is_empty(), "{} holds no key", path.display());
            keys
        }
    };
    let name = args.name.clone().unwrap_or_else(|| args.model.clone());
    let config = GatewayConfig {
        api_keys,
        base_dtype: args.base_dtype,
        max_models: args.max_models,
        concurrent_samples: EngineConfig::default().queued_requests,
        ..GatewayConfig::new(name.clone())
    };
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let sampler = Arc::new(EngineTasks::load(&checkpoint, args.base_dtype, args.cache_tokens)?);
    let gateway = Gateway::open(config, checkpoint, sampler, &args.dir)?;
    tokio::runtime::Runtime::new()?.block_on(async {
        let listener = tokio::net::TcpListener::bind(args.listen).await;
        let listener = listener.with_context(|| format!("listening on {}", args.listen))?;
        let url = format!("http://{}", listener.local_addr()?);
        program::say(&format!(
            "serving {name} on {url}; clients: TINKER_BASE_URL={url} TINKER_API_KEY=tml-…"
        ));
        if args.json {
            program::report(&json!({"url": url, "model": name}))?;
        }
        tokio::select! {
            served = gateway.serve(listener) => served?,
            () = program::stopping() => {}
        }
        Ok(())
    })
}

/// A local engine as a gateway's sampler.
#[derive(Debug)]
pub struct EngineTasks {
    engine: EngineHandle,
    tokenizer: Option<Tokenizer>,
    end_ids: Vec<u32>,
}

impl EngineTasks {
    /// Loads the whole model in the format in which it is trained over.
    ///
    /// # Errors
    /// Weights that cannot be read, or a tokenizer that is there and broken.
    pub fn load(checkpoint: &Checkpoint, base_dtype: BaseDtype, cache_tokens: usize) -> anyhow::Result<Self> {
        // Without a tokenizer, texts cannot stop an answer; tokens can.
        let tokenizer = match checkpoint.tokenizer() {
            Ok(tokenizer) => Some(tokenizer),
            Err(TokenizerError::Missing(_)) => None,
            Err(broken) => return Err(broken.into()),
        };
        let engine = rollouts::engine(checkpoint, base_dtype.weights(), cache_tokens)?;
        Ok(Self { engine, tokenizer, end_ids: checkpoint.config().eos.clone() })
    }

    /// The tokens that end an answer, and what looks for texts that do.
    fn stops(&self, stop: Stop) -> Result<(Vec<u32>, Option<TextStops>), SampleError> {
        let texts = match stop {
            Stop::Model => return Ok((self.end_ids.clone(), None)),
            Stop::Tokens(tokens) => return Ok((tokens, None)),
            Stop::Texts(texts) => texts,
        };
        let invalid = |reason: String| SampleError::Invalid { reason };
        let no_tokenizer = || invalid("this model has no tokenizer; give the stop as token ids".to_owned());
        let tokenizer = self.tokenizer.as_ref().ok_or_else(no_tokenizer)?;
        // Where the model ends its text, nothing more can match.
        let mut ids = self.end_ids.clone();
        for text in &texts {
            // Markers such as <|im_end|> are not part of the text; they are met as the tokens that they are.
            if let [token] = tokenizer.encode(text, false).map_err(|e| invalid(e.to_string()))?[..] {
                ids.push(token);
            }
        }
        Ok((ids, Some(TextStops { text: tokenizer.stream(), stops: StopStrings::new(texts) })))
    }
}

/// Looks for stop texts in an answer while its tokens arrive, wherever the tokenizer has cut them.
#[derive(Debug, Clone)]
struct TextStops {
    text: StreamDecoder,
    stops: StopStrings,
}

impl TextStops {
    /// Whether a stop text is complete with this token.
    fn meets(&mut self, token: u32) -> Result<bool, SampleError> {
        let piece = self.text.push(token).map_err(|e| SampleError::Failed { reason: e.to_string() })?;
        Ok(self.stops.push(&piece).1.is_some())
    }
}

/// Reads an answer to its end, or to the token that completes a stop text; the rest is not made.
async fn read(mut stream: TokenStream, mut stops: Option<TextStops>) -> Result<Completion, SampleError> {
    let mut completion = Completion::default();
    while let Some(event) = stream.next().await {
        let met = match (&event, &mut stops) {
            (Event::Token(token), Some(stops)) => stops.meets(token.id)?,
            _ => false,
        };
        completion.take(event);
        if met {
            completion.reason = FinishReason::Stop;
            return Ok(completion);
        }
    }
    if matches!(completion.reason, FinishReason::Stop | FinishReason::Length) {
        return Ok(completion);
    }
    let failure = completion.error.map(|e| e.to_string());
    Err(SampleError::Failed { reason: failure.unwrap_or_else(|| "the engine has stopped".to_owned()) })
}

/// Whose fault it is: a full or stopped engine is not the client's.
fn refusal(refused: &RequestError) -> SampleError {
    let reason = refused.to_string();
    match refused {
        RequestError::QueueFull { .. } | RequestError::Stopped => SampleError::Failed { reason },
        _ => SampleError::Invalid { reason },
    }
}

fn answer(completion: &Completion) -> SampledAnswer {
    let tokens = completion.tokens.iter();
    SampledAnswer {
        tokens: completion.token_ids(),
        logprobs: tokens.clone().map(|t| t.sampled_logprob).collect(),
        stopped: completion.reason == FinishReason::Stop,
        top: tokens.map(|t| t.top_logprobs.clone()).filter(|top| !top.is_empty()).collect(),
    }
}

impl TaskSampler for EngineTasks {
    fn add(&self, name: &str, adapter: Vec<u8>) -> BoxFuture<'_, Result<(), String>> {
        let name = name.to_owned();
        Box::pin(async move { self.engine.add_adapter(&name, adapter).await.map_err(|e| e.to_string()) })
    }

    fn remove(&self, name: &str) {
        if let Err(error) = self.engine.remove_adapter(name) {
            tracing::warn!(%error, name, "an adapter stays in the engine");
        }
    }

    fn sample(&self, task: SampleTask) -> BoxFuture<'static, Result<SampledAnswers, SampleError>> {
        let streams = self.stops(task.stop).and_then(|(stop_ids, stops)| {
            let sampling = SamplingParams {
                temperature: task.temperature,
                top_k: task.top_k,
                top_p: task.top_p,
                seed: task.seed,
                max_tokens: task.max_tokens.unwrap_or(usize::MAX),
                stop_ids,
                top_logprobs: task.top_logprobs,
                ..SamplingParams::default()
            };
            let request = Request {
                prompt: task.prompt,
                sampling,
                prompt_logprobs: task.prompt_logprobs,
                adapter: task.adapter,
                ..Request::default()
            };
            let streams = self.engine.submit_n(request, task.samples);
            Ok((streams.map_err(|refused| refusal(&refused))?, stops))
        });
        Box::pin(async move {
            let (streams, stops) = streams?;
            // All at once: one that meets a stop text must not go on while another is read.
            let completions = try_join_all(streams.into_iter().map(|s| read(s, stops.clone()))).await?;
            let first = completions.first();
            Ok(SampledAnswers {
                cached_tokens: first.map_or(0, |c| c.usage.cached_tokens),
                prompt_logprobs: first.map(|c| c.prompt_logprobs.clone()).unwrap_or_default(),
                answers: completions.iter().map(answer).collect(),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use parallax_model::train::{LoraConfig, TrainModel, TrainOptions};

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        gateway: GatewayArgs,
    }

    #[test]
    fn the_format_of_frozen_weights_is_an_option_and_unknown_ones_are_named() {
        let parsed = |more: &[&str]| Cli::try_parse_from([&["tinker-gateway"][..], more].concat());
        let format = |more: &[&str]| parsed(more).unwrap().gateway.base_dtype;
        assert_eq!(format(&[]), BaseDtype::F32);
        for known in BaseDtype::ALL {
            assert_eq!(format(&["--base-dtype", &known.to_string()]), known);
        }
        let unknown = parsed(&["--base-dtype", "q4_0"]).err().unwrap().to_string();
        assert!(unknown.contains("q4_0") && unknown.contains("f32, bf16, f16, q8_0"), "{unknown}");
    }

    #[tokio::test]
    async fn it_samples_with_the_bits_that_are_trained_over_in_each_format() {
        let checkpoint = Checkpoint::resolve("tiny").unwrap();
        let prompt: Vec<u32> = (40..60).collect();
        let mut seen = Vec::new();
        for base_dtype in BaseDtype::ALL {
            let engine = EngineTasks::load(&checkpoint, base_dtype, 64).unwrap();
            let task = SampleTask {
                adapter: None,
                prompt: prompt.clone(),
                samples: 1,
                max_tokens: Some(8),
                temperature: 1.0,
                top_k: 0,
                top_p: 1.0,
                seed: 3,
                stop: Stop::Tokens(Vec::new()),
                prompt_logprobs: false,
                top_logprobs: 0,
            };
            let answer = engine.sample(task).await.unwrap().answers.remove(0);
            let lora = LoraConfig { rank: 2, alpha: 32.0, targets: Vec::new(), seed: 1, base_dtype };
            let options = TrainOptions { lora: Some(lora), full: false };
            let trained = TrainModel::from_checkpoint(&checkpoint, &options).unwrap();
            let tokens = [&prompt[..], &answer.tokens].concat();
            let end = u32::try_from(tokens.len()).unwrap();
            let learnt = trained.token_logprobs(&tokens, &[0, end]).unwrap().into_data();
            let learnt: Vec<f32> = learnt.convert::<f32>().try_into_vec().unwrap();
            assert_eq!(learnt[prompt.len() - 1..], answer.logprobs, "{base_dtype}");
            seen.push(answer.logprobs);
        }
        assert_eq!(seen[0], seen[1], "the tiny model's weights are bf16");
        assert_ne!(seen[0], seen[3], "another format, another policy");
    }

    #[test]
    fn a_full_engine_is_not_the_clients_fault() {
        let full = refusal(&RequestError::QueueFull { queued: 3 });
        assert!(matches!(&full, SampleError::Failed { reason } if reason.contains("later")), "{full}");
        assert!(matches!(refusal(&RequestError::Stopped), SampleError::Failed { .. }));
        assert!(matches!(refusal(&RequestError::EmptyPrompt), SampleError::Invalid { .. }));
    }

    #[test]
    fn an_answer_ends_with_the_token_that_completes_a_stop_text() {
        let tokenizer = Checkpoint::resolve("tiny").unwrap().tokenizer().unwrap();
        let stops = |texts: &[&str]| TextStops {
            text: tokenizer.stream(),
            stops: StopStrings::new(texts.iter().map(|t| (*t).to_owned()).collect()),
        };
        let read = |answer: &str, mut stops: TextStops| {
            let tokens = tokenizer.encode(answer, false).unwrap();
            let end = tokens.iter().position(|token| stops.meets(*token).unwrap());
            end.map(|at| tokenizer.decode(&tokens[..=at]).unwrap())
        };
        let turn = ["\n\nUser:"];
        assert_eq!(read("4\n\nUser: and 3+3?", stops(&turn)).as_deref(), Some("4\n\nUser:"));
        assert_eq!(read("4\nUser", stops(&turn)), None);
        assert_eq!(
            read("caf\u{e9}!", stops(&["\u{e9}"])).as_deref(),
            Some("caf\u{e9}"),
            "two tokens, one letter"
        );
        assert_eq!(
            read("one, two", stops(&["two", ", "])).as_deref(),
            Some("one, "),
            "whichever comes first"
        );
        assert_eq!(read("anything", stops(&[""])), None, "nothing stops nothing");
    }
}
