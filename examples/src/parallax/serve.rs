//! `parallax serve`: the head of a swarm: scheduler, API, and by default the first stage.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Json;
use axum::routing::get;
use clap::Args;
use lattica_bitswap::Blocks;
use parallax_engine::EngineHandle;
use parallax_engine::http::{self, HttpState, Readiness, WeightLoader};
use parallax_engine::service::head::Head;
use parallax_engine::service::membership::{self, ServeOptions, WeightUpdates};
use parallax_model::{Checkpoint, DeviceKind, KvFormat, WeightDtype};
use serde_json::json;

use super::adapters::{self, AdapterArgs};
use super::engine::EngineArgs;
use super::hub;
use super::model::DTYPES;
use super::run::{ListenArgs, http_state, model_name};
use super::swarm_node::SwarmNodeArgs;
use crate::program;

/// Positions of a cache page.
pub const PAGE_TOKENS: usize = 16;
/// Pause between attempts to make adapters resident.
const ADAPTER_RETRY: Duration = Duration::from_millis(300);

/// Serve a model over many machines: the head of a swarm. Others take part with `parallax join`.
///
/// Without --bootstrap the machines of the local network find each other; with it, machines anywhere. Stages see hidden
/// states, from which prompts can be reconstructed: let only machines that you trust join.
#[derive(Debug, Args)]
#[command(
    after_help = "Example, two terminals:\n  parallax serve --model tiny --swarm home --port 3001\n  parallax join \
                        --swarm home --bootstrap ADDRESS_THAT_SERVE_PRINTED"
)]
pub struct ServeArgs {
    /// `tiny` (embedded), a directory with config.json and safetensors, a .gguf file, or `ORG/NAME[@REVISION]` on Hugging
    /// Face or the hub that HF_ENDPOINT names
    #[arg(long)]
    model: String,
    #[command(flatten)]
    node: SwarmNodeArgs,
    /// Weights in memory, on every stage
    #[arg(long, default_value = "native", value_name = DTYPES)]
    dtype: WeightDtype,
    /// Keys and values in memory, on every stage; q8 takes a quarter of f32 and moves logits a little
    #[arg(long, default_value = "f32", value_name = "f32|bf16|q8")]
    kv: KvFormat,
    /// Where the head computes its own layers: cpu, cuda or wgpu
    #[arg(long, default_value = "cpu")]
    device: DeviceKind,
    #[command(flatten)]
    listen: ListenArgs,
    #[command(flatten)]
    engine: EngineArgs,
    /// Leave all layers to the machines that join
    #[arg(long, conflicts_with_all = ["layers", "memory_gb"])]
    no_layers: bool,
    /// Cached positions of all requests together, on every stage [default: the model's context, at most 8192]
    #[arg(long)]
    context_tokens: Option<usize>,
    #[command(flatten)]
    adapters: AdapterArgs,
    /// Print one JSON object on stdout when the API listens: url, peer, addrs
    #[arg(long)]
    json: bool,
    /// A step that takes longer counts as stuck
    #[arg(long, default_value_t = 120)]
    step_timeout_s: u64,
}

/// Runs the command.
///
/// # Errors
/// A model that cannot be read, a port in use, an address that cannot be listened on.
pub fn run(args: ServeArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let done = runtime.block_on(serve(args));
    // Weights that are being read cannot be stopped, and nobody waits for them.
    runtime.shutdown_background();
    done
}

async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let limits = args.listen.limits()?;
    let name = args.listen.served_name(&args.model)?;
    let (listener, address) = args.listen.bind().await?;
    let checkpoint = Arc::new(hub::open(&args.model)?);
    let defaults = args.listen.sampling(&checkpoint)?;
    let named = args.adapters.read(&checkpoint, &name)?;
    let options = options(&args, &checkpoint)?;
    let (node, blocks) = args.node.start().await?;
    let (head, runner) =
        membership::serve(&node, Some(&blocks), Arc::clone(&checkpoint), options.clone()).await?;
    let head = Arc::new(head);
    let engine = args.engine.start(&model_name(&args.model), &checkpoint, Box::new(runner), args.device)?;
    let updates = WeightUpdates::new(Arc::clone(&head), blocks.clone(), Arc::clone(&checkpoint), options);
    let readiness = adapted(head.readiness(), named, &engine);
    let status = head.status_source(&engine);
    let state = HttpState {
        limits,
        defaults,
        readiness: Some(readiness),
        cluster: Some(Arc::clone(&status)),
        updates: args.adapters.updates(Some(loader(updates))),
        ..http_state(engine, &checkpoint, name)?
    };
    let swarm = axum::Router::new().route("/swarm/status", get(move || async move { Json(status()) }));
    for addr in node.listen_addrs().await {
        program::say(&format!(
            "peers join with: parallax join --swarm {} --bootstrap {addr}",
            args.node.swarm
        ));
    }
    let url = format!("http://{address}");
    program::say(&format!("serving on {url}"));
    if args.json {
        program::report(&json!({"url": url, "peer": node.peer_id(), "addrs": node.listen_addrs().await}))?;
    }
    tokio::select! {
        served = http::serve_until(listener, state, swarm, program::stopping(), program::DRAIN) => served?,
        () = tell_readiness(&head) => {}
    }
    node.drain(program::DRAIN).await;
    // Until here: the other machines read the weights from them.
    drop(blocks);
    Ok(())
}

/// Readiness with the adapters: they become resident as soon as the pipeline stands, and requests wait until they are.
fn adapted(pipeline: Readiness, named: adapters::Named, engine: &EngineHandle) -> Readiness {
    if named.is_empty() {
        return pipeline;
    }
    let (loaded, ready, engine) = (Arc::new(AtomicBool::new(false)), pipeline.clone(), engine.clone());
    let done = loaded.clone();
    tokio::spawn(async move {
        loop {
            if ready().is_ok() {
                match adapters::load(&engine, named.clone()).await {
                    Ok(()) => return done.store(true, Ordering::SeqCst),
                    Err(error) => program::say(&format!("the adapters are not loaded yet: {error:#}")),
                }
            }
            tokio::time::sleep(ADAPTER_RETRY).await;
        }
    });
    Arc::new(move || {
        pipeline()?;
        if loaded.load(Ordering::SeqCst) { Ok(()) } else { Err("the adapters are being loaded".to_owned()) }
    })
}

fn options(args: &ServeArgs, checkpoint: &Checkpoint) -> anyhow::Result<ServeOptions> {
    let context = args.context_tokens.unwrap_or_else(|| checkpoint.config().max_context.min(8192));
    Ok(ServeOptions {
        swarm: args.node.swarm.clone(),
        model: model_name(&args.model),
        dtype: args.dtype,
        device: args.device,
        take_layers: !args.no_layers,
        // Asked of machines that compute.
        memory_bytes: if args.no_layers { 0 } else { args.node.memory_bytes(args.device)? },
        pinned: args.node.layers,
        kv_pages: context.div_ceil(PAGE_TOKENS).max(1),
        kv_page_tokens: PAGE_TOKENS,
        kv_format: args.kv,
        step_timeout: Duration::from_secs(args.step_timeout_s.max(1)),
    })
}

/// Has the whole swarm read other weights.
fn loader(updates: WeightUpdates<Blocks>) -> WeightLoader {
    let runtime = tokio::runtime::Handle::current();
    Arc::new(move |path| {
        let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
        let runner = runtime.block_on(updates.stage(Arc::new(checkpoint)));
        Ok(Box::new(runner.map_err(|error| error.to_string())?))
    })
}

/// One line for every change of what the swarm can do; never ends.
async fn tell_readiness(head: &Head) {
    let mut last = String::new();
    loop {
        let now = match head.ready() {
            Ok(()) => "ready".to_owned(),
            Err(why) => format!("not ready: {why}"),
        };
        if now != last {
            program::say(&now);
            last = now;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
