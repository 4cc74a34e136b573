//! `lattica-node bench`: this process and a second one on two loopback addresses, each with a node.
//!
//! MB are 10^6 bytes. Rates are medians of the rounds; the smallest and largest are reported beside them.

mod crowd;
pub(crate) mod other;

use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use lattica_bitswap::{Blocks, FsStore};
use lattica_net::{Identity, Node, NodeConfig};
use serde_json::json;
use swarm_examples::{machine, program};
use swarm_wire::PeerId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use other::{MIB, Other, PATIENCE, STREAM, peak_rss_mb};

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Transport {
    Quic,
    Tcp,
}

impl Transport {
    /// Where a node listens with it: a free port of `ip`.
    pub(crate) fn listen(self, ip: &str) -> String {
        match self {
            Self::Quic => format!("/ip4/{ip}/udp/0/quic-v1"),
            Self::Tcp => format!("/ip4/{ip}/tcp/0"),
        }
    }
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
    /// KiB of a large call and of its answer; 0 leaves them out.
    #[arg(long, default_value_t = 256)]
    echo_kib: usize,
    /// Seconds of calls per round.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// MB sent over one stream per round; 0 leaves it out.
    #[arg(long, default_value_t = 256)]
    stream_mb: usize,
    /// MB published by the other process and fetched by this one; 0 leaves it out.
    #[arg(long, default_value_t = 256)]
    blocks_mb: usize,
    /// Nodes of which one holds the block that another one asks all of them for; 0 leaves it out.
    #[arg(long, default_value_t = 64)]
    crowd: usize,
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Transport between the nodes.
    #[arg(long, value_enum, default_value = "quic")]
    transport: Transport,
    /// Be the other process.
    #[arg(long, hide = true)]
    other: bool,
    /// Print the report as one JSON object, the last line of stdout: machine, command, commit, transport; rpc_bytes,
    /// in_flight, echo_kib, stream_mb, blocks_mb and crowd as they were set; rpc_qps, rpc_p50_us, rpc_p99_us (under the load
    /// of --in-flight), rpc_sequential_p50_us, echo_qps, echo_p50_us (under the same load), echo_sequential_qps,
    /// echo_sequential_p50_us, stream_mb_per_s, blocks_mb_per_s, rss_mb (peak of this process), other_rss_mb,
    /// stream_rss_mb (peak of the larger process when the stream is over, before any block), one_holder_p50_ms,
    /// one_holder_max_ms; each rate (_qps, _mb_per_s) with _min and _max.
    #[arg(long)]
    json: bool,
}

/// Measures and reports.
pub(crate) async fn run(args: &BenchArgs) -> anyhow::Result<()> {
    if args.other {
        return other::serve(node(args.transport, "127.0.0.12").await?).await;
    }
    anyhow::ensure!(args.rounds > 0 && args.in_flight > 0, "--rounds and --in-flight must be at least 1");
    let largest_kib = NodeConfig::default().limits.body_bytes / 1024;
    anyhow::ensure!(
        args.echo_kib <= largest_kib && args.rpc_bytes <= largest_kib * 1024,
        "a call takes at most {largest_kib} KiB; send more over a stream"
    );
    let here = node(args.transport, "127.0.0.11").await?;
    let transport = format!("{:?}", args.transport).to_lowercase();
    let other = Other::start(&here, &transport).await?;
    let load = |n_bytes, in_flight| Load { n_bytes, in_flight, seconds: args.seconds, rounds: args.rounds };
    let rpc = load(args.rpc_bytes, args.in_flight).measure(&here, &other.peer).await?;
    let sequential = load(args.rpc_bytes, 1).measure(&here, &other.peer).await?;
    let (echo, echo_sequential) = if args.echo_kib > 0 {
        let n_bytes = args.echo_kib * 1024;
        (
            Some(load(n_bytes, args.in_flight).measure(&here, &other.peer).await?),
            Some(load(n_bytes, 1).measure(&here, &other.peer).await?),
        )
    } else {
        (None, None)
    };
    let streams =
        if args.stream_mb > 0 { Some(stream_rounds(&here, &other.peer, args).await?) } else { None };
    let stream_rss_mb = peak_rss_mb().max(other.peak_rss_mb(&here).await?);
    let blocks = if args.blocks_mb > 0 { Some(blocks_rounds(&here, &other, args).await?) } else { None };
    let other_rss_mb = other.peak_rss_mb(&here).await?;
    let rss_mb = peak_rss_mb();
    other.stop(&here).await?;
    here.shutdown().await;
    let one_holder = if args.crowd > 1 { Some(Rates::of(crowd::rounds(args.crowd).await?)) } else { None };
    let report = json!({
        "machine": machine::describe(),
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "commit": machine::commit(),
        "transport": transport,
        "rpc_bytes": args.rpc_bytes,
        "in_flight": args.in_flight,
        "rpc_qps": rpc.qps.median,
        "rpc_qps_min": rpc.qps.min,
        "rpc_qps_max": rpc.qps.max,
        "rpc_p50_us": rpc.p50_us,
        "rpc_p99_us": rpc.p99_us,
        "rpc_sequential_p50_us": sequential.p50_us,
        "echo_kib": args.echo_kib,
        "echo_qps": echo.as_ref().map(|e| e.qps.median),
        "echo_qps_min": echo.as_ref().map(|e| e.qps.min),
        "echo_qps_max": echo.as_ref().map(|e| e.qps.max),
        "echo_p50_us": echo.as_ref().map(|e| e.p50_us),
        "echo_sequential_qps": echo_sequential.as_ref().map(|e| e.qps.median),
        "echo_sequential_qps_min": echo_sequential.as_ref().map(|e| e.qps.min),
        "echo_sequential_qps_max": echo_sequential.as_ref().map(|e| e.qps.max),
        "echo_sequential_p50_us": echo_sequential.as_ref().map(|e| e.p50_us),
        "stream_mb": args.stream_mb,
        "stream_mb_per_s": streams.as_ref().map(|s| s.median),
        "stream_mb_per_s_min": streams.as_ref().map(|s| s.min),
        "stream_mb_per_s_max": streams.as_ref().map(|s| s.max),
        "stream_rss_mb": stream_rss_mb,
        "blocks_mb": args.blocks_mb,
        "blocks_mb_per_s": blocks.as_ref().map(|s| s.median),
        "blocks_mb_per_s_min": blocks.as_ref().map(|s| s.min),
        "blocks_mb_per_s_max": blocks.as_ref().map(|s| s.max),
        "rss_mb": rss_mb,
        "other_rss_mb": other_rss_mb,
        "crowd": args.crowd,
        "one_holder_p50_ms": one_holder.as_ref().map(|h| h.median),
        "one_holder_max_ms": one_holder.as_ref().map(|h| h.max),
    });
    if args.json {
        return program::report(&report);
    }
    for (name, value) in report.as_object().into_iter().flatten() {
        println!("{name:>24}  {value}");
    }
    Ok(())
}

async fn node(transport: Transport, ip: &str) -> anyhow::Result<Node> {
    let config = NodeConfig {
        listen: vec![transport.listen(ip)],
        network: "bench".to_owned(),
        ..NodeConfig::default()
    };
    Ok(Node::start(Identity::generate(), config).await?)
}

/// Median, smallest and largest of the rounds.
pub(crate) struct Rates {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Rates {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let round = |value: f64| (value * 10.0).round() / 10.0;
        Self {
            // Of an even number of rounds, the middle of the two in the middle.
            median: round(f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2])),
            min: round(values[0]),
            max: round(values[values.len() - 1]),
        }
    }
}

/// Callers that call again as soon as they are answered.
pub(crate) struct Load {
    pub(crate) n_bytes: usize,
    pub(crate) in_flight: usize,
    pub(crate) seconds: f64,
    pub(crate) rounds: usize,
}

pub(crate) struct Round {
    qps: f64,
    p50_us: f64,
    pub(crate) p99_us: f64,
}

pub(crate) struct Calls {
    qps: Rates,
    p50_us: f64,
    pub(crate) p99_us: f64,
}

impl Load {
    pub(crate) async fn measure(&self, node: &Node, peer: &PeerId) -> anyhow::Result<Calls> {
        self.round(node, peer, Duration::from_millis(300)).await?;
        let mut rounds = Vec::new();
        for _ in 0..self.rounds {
            rounds.push(self.round(node, peer, Duration::from_secs_f64(self.seconds)).await?);
        }
        Ok(Calls {
            p50_us: Rates::of(rounds.iter().map(|r| r.p50_us).collect()).median,
            p99_us: Rates::of(rounds.iter().map(|r| r.p99_us).collect()).median,
            qps: Rates::of(rounds.iter().map(|r| r.qps).collect()),
        })
    }

    pub(crate) async fn round(&self, node: &Node, peer: &PeerId, time: Duration) -> anyhow::Result<Round> {
        let body = Bytes::from(vec![0x5a; self.n_bytes]);
        let start = Instant::now();
        let callers: Vec<_> = (0..self.in_flight)
            .map(|_| {
                let (node, peer, body) = (node.clone(), peer.clone(), body.clone());
                tokio::spawn(async move {
                    let mut took_us = Vec::new();
                    while start.elapsed() < time {
                        let begin = Instant::now();
                        let answer = node.call(&peer, "echo", body.clone(), PATIENCE).await?;
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
}

async fn stream_rounds(node: &Node, peer: &PeerId, args: &BenchArgs) -> anyhow::Result<Rates> {
    let chunk = vec![0x3c; MIB / 4];
    let total = args.stream_mb * 1_000_000;
    let mut rates = Vec::new();
    for _ in 0..args.rounds {
        let mut stream = node.open_stream(peer, STREAM).await?;
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
    Ok(Rates::of(rates))
}

/// A file published by reference in the other process and fetched into a store on disk here, every block hashed.
async fn blocks_rounds(node: &Node, other: &Other, args: &BenchArgs) -> anyhow::Result<Rates> {
    let dir = tempfile::tempdir()?;
    let blocks = Blocks::start(node.clone(), std::sync::Arc::new(FsStore::open(dir.path())?));
    let total = args.blocks_mb as u64 * 1_000_000;
    let mut rates = Vec::new();
    for round in 0..args.rounds {
        let root = other.publish(node, round as u64, total).await?;
        let start = Instant::now();
        let manifest = blocks.fetch(&root, std::slice::from_ref(&other.peer), |_| ()).await?;
        rates.push(total as f64 / 1e6 / start.elapsed().as_secs_f64());
        anyhow::ensure!(manifest.total_bytes() == total, "the manifest has another length than the file");
    }
    Ok(Rates::of(rates))
}
