//! `lattica-node bench-spread`: one artefact from one node to many, all of this process, every uplink as slow as is said.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;
use lattica_bitswap::spread::wire::{FRAME_MAX_BYTES, Frame, PROTOCOL};
use lattica_bitswap::spread::{Bitmap, Fleet, SpreadMessage};
use lattica_bitswap::{Blocks, ExchangeConfig, Manifest, MemoryStore, SpreadConfig, Spreading};
use lattica_net::{Identity, Node, NodeConfig, Stream, read_frame};
use serde_json::json;
use swarm_examples::{machine, program};
use swarm_wire::Cid;
use tokio::io::{AsyncWriteExt, BufReader};
use tokio::task::JoinSet;

const NETWORK: &str = "bench-spread";

/// What to spread, among whom.
#[derive(Debug, Args)]
pub(crate) struct BenchSpreadArgs {
    /// Nodes that are to get it.
    #[arg(long, default_value_t = 16)]
    peers: usize,
    /// MB of the artefact.
    #[arg(long, default_value_t = 32)]
    mb: usize,
    /// KiB of a chunk.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..=2048))]
    chunk_kib: u64,
    /// Mbit/s that every node may send. Together they must stay below what this machine can move.
    #[arg(long, default_value_t = 20.0)]
    uplink_mbit: f64,
    /// Share of the nodes that are shut down at random times of the first half.
    #[arg(long, default_value_t = 0.0)]
    kill: f64,
    /// Share of the nodes that show everything and send garbage.
    #[arg(long, default_value_t = 0.0)]
    liars: f64,
    /// Draws who and when.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the report as one JSON object, the last line of stdout: completion_s (until the last honest node that was not
    /// killed has everything), fluid_bound_s (no plan can be faster), ratio, source_copies (what the source sent, in
    /// artefacts), wrong_bytes (stored, of all of them), duplicate_fraction (chunks that came twice, of those that were
    /// needed), peers, killed, liars, completed (of the honest that were not killed), mb, chunks, uplink_mbit, rss_mb, machine,
    /// command, commit.
    #[arg(long)]
    json: bool,
}

struct Member {
    node: Node,
    blocks: Blocks,
}

/// Spreads and reports.
pub(crate) async fn run(args: &BenchSpreadArgs) -> anyhow::Result<()> {
    let share =
        |share: f64| (0.0..=1.0).contains(&share).then(|| (args.peers as f64 * share).round() as usize);
    let (Some(n_killed), Some(n_liars)) = (share(args.kill), share(args.liars)) else {
        anyhow::bail!("--kill and --liars are shares of the nodes, 0 to 1");
    };
    anyhow::ensure!(n_killed + n_liars < args.peers, "no honest node would be left; lower --kill or --liars");
    anyhow::ensure!(args.uplink_mbit > 0.0 && args.mb > 0, "--uplink-mbit and --mb must be above 0");
    let rate = args.uplink_mbit * 1e6 / 8.0;
    let mut random = blake3::Hasher::new().update(&args.seed.to_le_bytes()).finalize_xof();
    let mut content = vec![0; args.mb * 1_000_000];
    random.fill(&mut content);
    let content = Bytes::from(content);
    let source = member(args, rate).await?;
    let root = source.blocks.publish_bytes("artefact", "file", content.clone()).await?;
    let feeding = source.blocks.spread(&root, None, SpreadConfig::default()).await?;
    let manifest = feeding.manifest().clone();
    let n_chunks = manifest.blocks().len();
    let fleet = Fleet {
        bytes: content.len() as u64,
        chunk_bytes: args.chunk_kib << 10,
        source_uplink: rate,
        uplinks: vec![rate; args.peers - n_liars],
        downlinks: vec![f64::INFINITY; args.peers - n_liars],
        leaves: 0,
        hop_s: 0.0,
    };
    let bound_s = fleet.bound_s();
    let address = source.node.listen_addrs().await.remove(0);
    let mut liars = Vec::new();
    for _ in 0..n_liars {
        let node = node().await?;
        node.dial(&address).await?;
        lie(&node, &source.node, root, &manifest).await?;
        liars.push(node);
    }
    let mut members = Vec::new();
    for _ in n_liars..args.peers {
        let member = member(args, rate).await?;
        member.node.dial(&address).await?;
        // What is measured begins when everybody knows what there is.
        member.blocks.fetch_manifest(&root, &[source.node.peer_id()]).await?;
        members.push(member);
    }
    let begin = Instant::now();
    for member in members.drain(..n_killed) {
        let mut byte = [0];
        random.fill(&mut byte);
        let at = Duration::from_secs_f64(bound_s * f64::from(byte[0]) / 512.0);
        let from = source.node.peer_id();
        tokio::spawn(async move {
            let part = member.blocks.spread(&root, Some(&from), SpreadConfig::default()).await;
            tokio::time::sleep(at).await;
            drop(part);
            member.node.shutdown().await;
        });
    }
    let mut spreading = JoinSet::new();
    for member in members {
        let from = source.node.peer_id();
        spreading.spawn(async move {
            let part = member.blocks.fetch_via_spread(&root, &from, |_| ()).await?;
            anyhow::Ok((part, member))
        });
    }
    // Who has everything passes on until all have.
    let mut done: Vec<(Spreading, Member)> = Vec::new();
    while let Some(ended) = spreading.join_next().await {
        done.push(ended??);
    }
    let completion_s = begin.elapsed().as_secs_f64();
    let mut wrong_bytes = 0;
    for (_, member) in &done {
        let got = member.blocks.read(&root).await?;
        wrong_bytes +=
            got.iter().zip(&content).filter(|(a, b)| a != b).count() + content.len().abs_diff(got.len());
    }
    let duplicates: u64 = done.iter().map(|(part, _)| part.duplicates()).sum();
    let report = json!({
        "machine": machine::describe(),
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "commit": machine::commit(),
        "peers": args.peers,
        "killed": n_killed,
        "liars": n_liars,
        "completed": done.len(),
        "mb": args.mb,
        "chunks": n_chunks,
        "uplink_mbit": args.uplink_mbit,
        "completion_s": round(completion_s),
        "fluid_bound_s": round(bound_s),
        "ratio": round(completion_s / bound_s),
        "source_copies": round(feeding.uploaded() as f64 / n_chunks as f64),
        "wrong_bytes": wrong_bytes,
        "duplicate_fraction": duplicates as f64 / (done.len() * n_chunks) as f64,
        "rss_mb": machine::resident_mb(),
    });
    if args.json {
        return program::report(&report);
    }
    for (name, value) in report.as_object().into_iter().flatten() {
        println!("{name:>24}  {value}");
    }
    Ok(())
}

fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

async fn node() -> anyhow::Result<Node> {
    let config =
        NodeConfig { io_threads: 1, dht_server: false, ..NodeConfig::loopback("127.0.0.1", NETWORK) };
    Ok(Node::start(Identity::generate(), config).await?)
}

async fn member(args: &BenchSpreadArgs, rate: f64) -> anyhow::Result<Member> {
    let node = node().await?;
    let config = ExchangeConfig {
        leaf_bytes: (args.chunk_kib << 10) as usize,
        spread_bytes_per_s: Some(rate),
        ..ExchangeConfig::default()
    };
    let blocks = Blocks::start_with(node.clone(), Arc::new(MemoryStore::new()), config);
    Ok(Member { node, blocks })
}

/// Makes `node` a member of the source's spread that shows everything and sends garbage.
async fn lie(node: &Node, source: &Node, root: Cid, manifest: &Manifest) -> anyhow::Result<()> {
    let lengths: Arc<[u32]> = manifest.blocks().iter().map(|b| b.length).collect();
    let given = Arc::clone(&lengths);
    node.handle_stream(PROTOCOL, move |_, stream| garbage(stream, Arc::clone(&given)))?;
    let mut stream = node.open_stream(&source.peer_id(), PROTOCOL).await?;
    stream.write_all(&Frame::Hello(root).encode()).await?;
    tokio::spawn(garbage(stream, lengths));
    Ok(())
}

/// Answers every request with bytes of the right length.
async fn garbage(stream: Stream, lengths: Arc<[u32]>) {
    let n_chunks = lengths.len() as u32;
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader);
    let mut send = Some(Frame::Message(SpreadMessage::Holds(Bitmap::full(n_chunks))));
    loop {
        if let Some(frame) = send.take()
            && (writer.write_all(&frame.encode()).await.is_err() || writer.flush().await.is_err())
        {
            return;
        }
        let Ok(Some(payload)) = read_frame(&mut reader, "spread frame", FRAME_MAX_BYTES).await else {
            return;
        };
        if let Ok(Frame::Message(SpreadMessage::Request(index))) = Frame::decode(payload, n_chunks) {
            let bytes = Bytes::from(vec![index as u8; lengths[index as usize] as usize]);
            send = Some(Frame::Chunk { index, bytes });
        }
    }
}
