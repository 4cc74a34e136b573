//! `parallax bench-swarm`: what does cutting a model over processes cost?

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use lattica_bitswap::Blocks;
use lattica_net::{Identity, Node, NodeConfig};
use parallax_engine::local::Pipeline;
use parallax_engine::service::head::Head;
use parallax_engine::service::membership::{self, ServeOptions};
use parallax_engine::{Completion, EngineConfig, EngineHandle, FinishReason, Request};
use parallax_model::{Checkpoint, DeviceKind, KvFormat, LoadOptions, WeightDtype};
use serde::Serialize;
use serde_json::Value;

use super::model::DTYPES;
use super::serve::PAGE_TOKENS;
use crate::{machine, program};

/// Positions per sequence: prompt and answer.
const PROMPT_TOKENS: usize = 32;
const ANSWER_TOKENS: usize = 64;

/// Start N stage processes on this machine, each on a loopback address of its own, and compare them with one process.
///
/// Report (--json): tpot_ms and single_process_tpot_ms (medians of the time per output token of one stream), tpot_ratio,
/// aggregate_tokens_per_s (all streams together), requests_failed, outputs_identical (token ids and log-probability
/// bits), kills, detect_ms_p95 and gap_ms_p99 (null: nothing is killed), wire_bytes_per_token_hop and
/// payload_bytes_per_token_hop (hidden rows from one stage to the next, with and without headers), machine, commit.
#[derive(Debug, Args)]
pub struct BenchSwarmArgs {
    /// As for `parallax serve`
    #[arg(long)]
    model: String,
    /// Stage processes
    #[arg(long)]
    nodes: usize,
    /// Weights in memory, on every stage
    #[arg(long, default_value = "native", value_name = DTYPES)]
    dtype: WeightDtype,
    /// Streams at the same time, after the single one
    #[arg(long, default_value_t = 4)]
    streams: usize,
    /// How long each part measures, at least
    #[arg(long, default_value_t = 5)]
    seconds: u64,
    /// Only 0 is possible: this command adds no delay to the links of the machine
    #[arg(long, default_value_t = 0.0)]
    rtt_ms: f64,
    /// Not possible yet: this command kills no stage
    #[arg(long)]
    kill_every_s: Option<u64>,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    tpot_ms: f64,
    single_process_tpot_ms: f64,
    tpot_ratio: f64,
    aggregate_tokens_per_s: f64,
    requests_failed: usize,
    outputs_identical: bool,
    kills: usize,
    detect_ms_p95: Option<f64>,
    gap_ms_p99: Option<f64>,
    wire_bytes_per_token_hop: f64,
    payload_bytes_per_token_hop: f64,
    nodes: usize,
    streams: usize,
    machine: String,
    commit: String,
}

/// Child processes that do not outlive the measurement.
struct Stages(Vec<Child>);

impl Drop for Stages {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // A child that has ended already needs neither.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs the command.
///
/// # Errors
/// Options that are not possible, a model that cannot be cut so often, stages that do not come up.
pub fn run(args: BenchSwarmArgs) -> anyhow::Result<()> {
    if args.kill_every_s.is_some() {
        bail!(
            "--kill-every-s is not possible yet: this command kills no stage; kill a `parallax join` beside `parallax serve` by hand"
        );
    }
    ensure!(
        args.rtt_ms == 0.0,
        "--rtt-ms is not possible yet: links of this command are as fast as the loopback"
    );
    let checkpoint = Arc::new(super::hub::open(&args.model)?);
    let n_layers = checkpoint.config().n_layers;
    ensure!(
        (1..=n_layers).contains(&args.nodes) && args.streams >= 1,
        "--nodes must be 1 to {n_layers} (the model's layers) and --streams at least 1"
    );
    let requests = requests(&checkpoint, args.streams.max(2));
    let budget = Duration::from_secs(args.seconds.max(1));

    program::say("measuring one process");
    let single = single_process(&args, &checkpoint)?;
    let (expected, single_process_tpot_ms) = one_stream(&single, &requests, budget)?;
    drop(single);

    program::say(&format!("starting {} stages", args.nodes));
    let runtime = tokio::runtime::Runtime::new()?;
    let dir = tempfile::tempdir()?;
    let (head, engine, stages) = runtime.block_on(swarm(&args, &checkpoint, dir.path()))?;
    let (got, tpot_ms) = one_stream(&engine, &requests, budget)?;
    let (wire_bytes_per_token_hop, payload_bytes_per_token_hop) = bytes_per_hop(&head, &engine)?;
    let (parallel, aggregate_tokens_per_s) = many_streams(&engine, &requests[..args.streams], budget)?;
    drop(stages);

    let failed = |c: &&Completion| c.reason == FinishReason::Error;
    let requests_failed = got.iter().chain(&parallel).filter(failed).count();
    let same = |a: &[Completion]| a.iter().zip(&expected).all(|(a, b)| bits(a) == bits(b));
    let report = Report {
        tpot_ms,
        single_process_tpot_ms,
        tpot_ratio: tpot_ms / single_process_tpot_ms,
        aggregate_tokens_per_s,
        requests_failed,
        outputs_identical: same(&got) && same(&parallel),
        kills: 0,
        detect_ms_p95: None,
        gap_ms_p99: None,
        wire_bytes_per_token_hop,
        payload_bytes_per_token_hop,
        nodes: args.nodes,
        streams: args.streams,
        machine: machine::describe(),
        commit: machine::commit(),
    };
    let line = format!(
        "{tpot_ms:.2} ms a token over {} processes, {single_process_tpot_ms:.2} in one ({:.2}x); {} streams: {aggregate_tokens_per_s:.0} tokens/s; identical: {}",
        args.nodes, report.tpot_ratio, args.streams, report.outputs_identical
    );
    program::tell(&line, args.json)?;
    if args.json { program::report(&report) } else { Ok(()) }
}

/// Token ids and the bits of their log-probabilities.
fn bits(completion: &Completion) -> Vec<(u32, u32)> {
    completion.tokens.iter().map(|t| (t.id, t.logprob.to_bits())).collect()
}

/// Prompts that differ in every token.
fn requests(checkpoint: &Checkpoint, n: usize) -> Vec<Request> {
    let vocab = checkpoint.config().vocab as u64;
    let token = |i: usize, t: usize| u32::try_from((i as u64 * 7919 + t as u64 * 104_729 + 11) % vocab);
    (0..n)
        .map(|i| {
            let prompt = (0..PROMPT_TOKENS).filter_map(|t| token(i, t).ok()).collect();
            Request::greedy(prompt, ANSWER_TOKENS)
        })
        .collect()
}

fn pages(streams: usize) -> usize {
    (PROMPT_TOKENS + ANSWER_TOKENS).div_ceil(PAGE_TOKENS) * (streams.max(2) + 1)
}

fn single_process(args: &BenchSwarmArgs, checkpoint: &Checkpoint) -> anyhow::Result<EngineHandle> {
    let options = LoadOptions {
        layers: 0..checkpoint.config().n_layers,
        dtype: args.dtype,
        device: DeviceKind::Cpu,
        kv_page_tokens: PAGE_TOKENS,
        kv_pages: pages(args.streams),
        kv_format: KvFormat::F32,
    };
    let pipeline = Pipeline::load(checkpoint, &options, 1, |_| ())?;
    Ok(EngineHandle::start(
        Box::new(pipeline),
        EngineConfig { prefix_cache: false, ..EngineConfig::default() },
    )?)
}

/// A head in this process, without layers, and the stages as processes.
async fn swarm(
    args: &BenchSwarmArgs,
    checkpoint: &Arc<Checkpoint>,
    dir: &Path,
) -> anyhow::Result<(Head, EngineHandle, Stages)> {
    let name = format!("bench-{}", std::process::id());
    let node = Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.1", "default")).await?;
    let options = ServeOptions {
        swarm: name.clone(),
        model: args.model.clone(),
        dtype: args.dtype,
        device: DeviceKind::Cpu,
        take_layers: false,
        memory_bytes: 0,
        pinned: None,
        kv_pages: pages(args.streams),
        kv_page_tokens: PAGE_TOKENS,
        kv_format: KvFormat::F32,
        step_timeout: Duration::from_secs(60),
    };
    let (head, runner) = membership::serve(&node, None::<&Blocks>, Arc::clone(checkpoint), options).await?;
    let engine = EngineHandle::start(
        Box::new(runner),
        EngineConfig { prefix_cache: false, ..EngineConfig::default() },
    )?;
    let addr = node
        .listen_addrs()
        .await
        .into_iter()
        .find(|a| a.contains("/tcp/"))
        .context("the head does not listen")?;
    let mut stages = Stages(Vec::new());
    for i in 0..args.nodes {
        let ip = format!("127.0.0.{}", i + 2);
        let child = Command::new(std::env::current_exe()?)
            .args(["join", "--swarm", &name, "--bootstrap", &addr, "--model", &args.model])
            .args(["--listen", &format!("/ip4/{ip}/tcp/0"), "--listen", &format!("/ip4/{ip}/udp/0/quic-v1")])
            .args(["--layers", &even_cut(checkpoint.config().n_layers, args.nodes, i)])
            .arg("--cache-dir")
            .arg(dir.join(i.to_string()))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("starting a stage")?;
        stages.0.push(child);
    }
    let patience = Duration::from_secs(120);
    if tokio::time::timeout(patience, head.until_ready()).await.is_err() {
        bail!("the stages did not come up within {patience:?}: {}", head.status(&engine)["why"]);
    }
    Ok((head, engine, stages))
}

/// The same number of layers for everybody, as nearly as possible: the machine is the same, too.
fn even_cut(n_layers: usize, n: usize, i: usize) -> String {
    format!("{}..{}", n_layers * i / n, n_layers * (i + 1) / n)
}

/// Every request alone, again and again until the budget is spent; answers of the first round, median time per token.
fn one_stream(
    engine: &EngineHandle,
    requests: &[Request],
    budget: Duration,
) -> anyhow::Result<(Vec<Completion>, f64)> {
    let started = Instant::now();
    let (mut first_round, mut times_ms) = (Vec::new(), Vec::new());
    while first_round.len() < requests.len() || started.elapsed() < budget {
        let round = first_round.len() < requests.len();
        let request =
            requests[if round { first_round.len() } else { times_ms.len() % requests.len() }].clone();
        let mut stream = engine.submit(request)?;
        let (mut completion, mut last) = (Completion::default(), None::<Instant>);
        while let Some(event) = stream.next_blocking() {
            if matches!(event, parallax_engine::Event::Token(_)) {
                times_ms.extend(last.map(|at| at.elapsed().as_secs_f64() * 1e3));
                last = Some(Instant::now());
            }
            completion.take(event);
        }
        if let Some(error) = &completion.error {
            bail!("a request failed: {error}");
        }
        if round {
            first_round.push(completion);
        }
    }
    times_ms.sort_by(f64::total_cmp);
    let median = *times_ms.get(times_ms.len() / 2).context("no token was measured")?;
    Ok((first_round, median))
}

/// All requests at once, again and again; answers of the first round, tokens per second of all together.
fn many_streams(
    engine: &EngineHandle,
    requests: &[Request],
    budget: Duration,
) -> anyhow::Result<(Vec<Completion>, f64)> {
    let started = Instant::now();
    let (mut first_round, mut n_tokens) = (Vec::new(), 0);
    while first_round.is_empty() || started.elapsed() < budget {
        let streams = requests.iter().map(|r| engine.submit(r.clone())).collect::<Result<Vec<_>, _>>()?;
        let mut round = Vec::new();
        for mut stream in streams {
            let mut completion = Completion::default();
            while let Some(event) = stream.next_blocking() {
                completion.take(event);
            }
            n_tokens += completion.tokens.len();
            round.push(completion);
        }
        if first_round.is_empty() {
            first_round = round;
        }
    }
    Ok((first_round, n_tokens as f64 / started.elapsed().as_secs_f64()))
}

/// Bytes of frames and of payload per row and hop between stages, from the members' own counters.
fn bytes_per_hop(head: &Head, engine: &EngineHandle) -> anyhow::Result<(f64, f64)> {
    // Counters come with heartbeats, once a second.
    std::thread::sleep(Duration::from_millis(1500));
    let status = head.status(engine);
    let sum = |field: &str| -> f64 {
        status["nodes"].as_array().into_iter().flatten().filter_map(|n: &Value| n[field].as_f64()).sum()
    };
    let tokens = sum("sent_tokens");
    Ok(if tokens == 0.0 {
        (0.0, 0.0)
    } else {
        (sum("sent_bytes") / tokens, sum("sent_payload_bytes") / tokens)
    })
}
