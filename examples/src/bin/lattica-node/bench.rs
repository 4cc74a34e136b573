//! `lattica-node bench`: two nodes of this process on two loopback addresses.
//!
//! MB are 10^6 bytes. Rates are medians of the rounds; the smallest and largest are reported beside them.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use lattica_bitswap::{Blocks, FsStore};
use lattica_net::{Identity, Node, NodeConfig};
use serde_json::json;
use swarm_wire::PeerId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const STREAM: &str = "/lattica/bench/1.0.0";
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Transport {
    Quic,
    Tcp,
}

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// Bytes of a call and of its answer.
    #[arg(long, default_value_t = 128)]
    rpc_bytes: usize,
    /// Calls that are under way at the same time.
    #[arg(long, default_value_t = 64)]
    in_flight: usize,
    /// Seconds of calls per round.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// MB sent over one stream per round; 0 leaves it out.
    #[arg(long, default_value_t = 256)]
    stream_mb: usize,
    /// MB published at one node and fetched by the other; 0 leaves it out.
    #[arg(long, default_value_t = 256)]
    blocks_mb: usize,
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Transport between the nodes.
    #[arg(long, value_enum, default_value = "quic")]
    transport: Transport,
    /// Print the report as one JSON object, the last line of stdout: rpc_qps, rpc_p50_us, rpc_p99_us (under the load of
    /// --in-flight), rpc_sequential_p50_us, stream_mb_per_s, blocks_mb_per_s, rss_mb (peak of the process), each rate with
    /// _min and _max.
    #[arg(long)]
    json: bool,
}

/// Measures and reports.
pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.rounds > 0 && args.in_flight > 0, "--rounds and --in-flight must be at least 1");
    let (a, b) = pair(args.transport).await?;
    let rpc = calls(&a, &b, args).await?;
    let sequential =
        calls_round(&a, &b.peer_id(), args, 1, Duration::from_secs_f64(args.seconds / 2.0)).await?;
    let streams = if args.stream_mb > 0 { Some(stream_rounds(&a, &b, args).await?) } else { None };
    let rss_before_blocks = peak_rss_mb();
    let blocks = if args.blocks_mb > 0 { Some(blocks_rounds(&a, &b, args).await?) } else { None };
    let report = json!({
        "machine": machine(),
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "commit": commit(),
        "transport": format!("{:?}", args.transport).to_lowercase(),
        "rpc_bytes": args.rpc_bytes,
        "in_flight": args.in_flight,
        "rpc_qps": rpc.qps.median,
        "rpc_qps_min": rpc.qps.min,
        "rpc_qps_max": rpc.qps.max,
        "rpc_p50_us": rpc.p50_us,
        "rpc_p99_us": rpc.p99_us,
        "rpc_sequential_p50_us": sequential.p50_us,
        "stream_mb": args.stream_mb,
        "stream_mb_per_s": streams.as_ref().map(|s| s.median),
        "stream_mb_per_s_min": streams.as_ref().map(|s| s.min),
        "stream_mb_per_s_max": streams.as_ref().map(|s| s.max),
        "blocks_mb": args.blocks_mb,
        "blocks_mb_per_s": blocks.as_ref().map(|s| s.median),
        "blocks_mb_per_s_min": blocks.as_ref().map(|s| s.min),
        "blocks_mb_per_s_max": blocks.as_ref().map(|s| s.max),
        "rss_mb_before_blocks": rss_before_blocks,
        "rss_mb": peak_rss_mb(),
    });
    if args.json {
        println!("{report}");
    } else {
        for (name, value) in report.as_object().into_iter().flatten() {
            println!("{name:>24}  {value}");
        }
    }
    a.shutdown().await;
    b.shutdown().await;
    Ok(())
}

async fn pair(transport: Transport) -> anyhow::Result<(Node, Node)> {
    let config = |ip: &str| NodeConfig {
        listen: vec![match transport {
            Transport::Quic => format!("/ip4/{ip}/udp/0/quic-v1"),
            Transport::Tcp => format!("/ip4/{ip}/tcp/0"),
        }],
        network: "bench".to_owned(),
        ..NodeConfig::default()
    };
    let a = Node::start(Identity::generate(), config("127.0.0.11")).await?;
    let b = Node::start(Identity::generate(), config("127.0.0.12")).await?;
    b.handle("echo", |_, body| async move { Ok(body) });
    b.handle_stream(STREAM, |_, mut stream| async move {
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => return tracing::error!(%error, "stream"),
            }
        }
        // Tells the sender that everything has arrived.
        let _ = stream.write_all(&[1]).await;
        let _ = stream.shutdown().await;
    })?;
    a.dial(&b.listen_addrs().await[0]).await?;
    Ok((a, b))
}

/// Median, smallest and largest of the rounds.
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let round = |value: f64| (value * 10.0).round() / 10.0;
        Self {
            median: round(values[values.len() / 2]),
            min: round(values[0]),
            max: round(values[values.len() - 1]),
        }
    }
}

struct Round {
    qps: f64,
    p50_us: f64,
    p99_us: f64,
}

struct Calls {
    qps: Spread,
    p50_us: f64,
    p99_us: f64,
}

async fn calls(a: &Node, b: &Node, args: &BenchArgs) -> anyhow::Result<Calls> {
    let peer = b.peer_id();
    calls_round(a, &peer, args, args.in_flight, Duration::from_millis(300)).await?;
    let mut rounds = Vec::new();
    for _ in 0..args.rounds {
        rounds
            .push(calls_round(a, &peer, args, args.in_flight, Duration::from_secs_f64(args.seconds)).await?);
    }
    Ok(Calls {
        p50_us: Spread::of(rounds.iter().map(|r| r.p50_us).collect()).median,
        p99_us: Spread::of(rounds.iter().map(|r| r.p99_us).collect()).median,
        qps: Spread::of(rounds.iter().map(|r| r.qps).collect()),
    })
}

async fn calls_round(
    a: &Node,
    peer: &PeerId,
    args: &BenchArgs,
    in_flight: usize,
    time: Duration,
) -> anyhow::Result<Round> {
    let body = Bytes::from(vec![0x5a; args.rpc_bytes]);
    let start = Instant::now();
    let callers: Vec<_> = (0..in_flight)
        .map(|_| {
            let (a, peer, body) = (a.clone(), peer.clone(), body.clone());
            tokio::spawn(async move {
                let mut took_us = Vec::new();
                while start.elapsed() < time {
                    let begin = Instant::now();
                    let answer = a.call(&peer, "echo", body.clone(), PATIENCE).await?;
                    anyhow::ensure!(answer == body, "the answer is not the call's body");
                    took_us.push(begin.elapsed().as_secs_f64() * 1e6);
                }
                Ok(took_us)
            })
        })
        .collect();
    let mut took_us = Vec::new();
    for caller in callers {
        took_us.extend(caller.await??);
    }
    let seconds = start.elapsed().as_secs_f64();
    took_us.sort_by(f64::total_cmp);
    anyhow::ensure!(!took_us.is_empty(), "no call ended within {time:?}");
    let at = |share: f64| took_us[((took_us.len() - 1) as f64 * share) as usize].round();
    Ok(Round { qps: took_us.len() as f64 / seconds, p50_us: at(0.5), p99_us: at(0.99) })
}

async fn stream_rounds(a: &Node, b: &Node, args: &BenchArgs) -> anyhow::Result<Spread> {
    let chunk = vec![0x3c; 256 * 1024];
    let total = args.stream_mb * 1_000_000;
    let mut rates = Vec::new();
    for _ in 0..args.rounds {
        let mut stream = a.open_stream(&b.peer_id(), STREAM).await?;
        let start = Instant::now();
        let mut left = total;
        while left > 0 {
            let n = left.min(chunk.len());
            stream.write_all(&chunk[..n]).await?;
            left -= n;
        }
        stream.shutdown().await?;
        anyhow::ensure!(stream.read_u8().await? == 1, "the other node did not confirm");
        rates.push(total as f64 / 1e6 / start.elapsed().as_secs_f64());
    }
    Ok(Spread::of(rates))
}

/// A file published by reference at one node and fetched into the block store of the other, every block hashed.
async fn blocks_rounds(a: &Node, b: &Node, args: &BenchArgs) -> anyhow::Result<Spread> {
    let dir = tempfile::tempdir()?;
    let source = Blocks::start(a.clone(), Arc::new(FsStore::open(dir.path().join("source"))?));
    let sink = Blocks::start(b.clone(), Arc::new(FsStore::open(dir.path().join("sink"))?));
    let total = args.blocks_mb * 1_000_000;
    let mut rates = Vec::new();
    for round in 0..args.rounds {
        let path = dir.path().join(format!("artefact-{round}"));
        write_noise(&path, round as u64, total)?;
        let root = source.publish_file(&path).await?;
        let start = Instant::now();
        let manifest = sink.fetch(&root, &[a.peer_id()], |_| ()).await?;
        rates.push(total as f64 / 1e6 / start.elapsed().as_secs_f64());
        anyhow::ensure!(
            manifest.total_bytes() == total as u64,
            "the manifest has another length than the file"
        );
    }
    Ok(Spread::of(rates))
}

/// Writes a file without repetition, so that no block is a copy of another (splitmix64).
fn write_noise(path: &Path, seed: u64, n_bytes: usize) -> std::io::Result<()> {
    let mut file = BufWriter::new(std::fs::File::create(path)?);
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    let mut left = n_bytes;
    while left > 0 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let n = left.min(8);
        file.write_all(&(z ^ (z >> 31)).to_le_bytes()[..n])?;
        left -= n;
    }
    file.flush()
}

/// Peak resident memory of this process.
fn peak_rss_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some((kib * 1024.0 / 1e5).round() / 10.0)
}

fn machine() -> String {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split(':').nth(1));
    format!("{} x {}, {}", cpus, model.unwrap_or("CPU").trim(), std::env::consts::OS)
}

fn commit() -> Option<String> {
    let output = std::process::Command::new("git").args(["rev-parse", "--short", "HEAD"]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
