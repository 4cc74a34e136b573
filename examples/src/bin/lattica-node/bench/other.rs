//! The other process of a bench: this very binary, told what to do by calls; it ends when it is told, or when the pipe to
//! its standard input breaks.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use lattica_bitswap::{Blocks, FsStore, SpreadConfig};
use lattica_net::{Node, Status};
use serde::{Deserialize, Serialize};
use swarm_examples::{machine, program};
use swarm_wire::{Cid, PeerId};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

/// The protocol of the stream that is measured.
pub(crate) const STREAM: &str = "/lattica/bench/1.0.0";
/// How long anything may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes.
pub(crate) const MIB: usize = 1 << 20;

const PUBLISH: &str = "bench/publish";
const PEAK_RSS: &str = "bench/peak-rss";
const RSS: &str = "bench/rss";
const SPREAD: &str = "bench/spread";

#[derive(Serialize, Deserialize)]
struct Ready {
    address: String,
}

/// The other process, ended on drop.
pub(crate) struct Other {
    pub(crate) peer: PeerId,
    process: Child,
}

impl Other {
    /// Starts it and connects `node` to it.
    pub(crate) async fn start(node: &Node, transport: &str) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program's own file")?;
        let mut process = Command::new(program)
            .args(["bench", "--other", "--transport", transport])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting the other process")?;
        let stdout = process.stdout.take().context("its standard output is piped")?;
        let line = tokio::time::timeout(PATIENCE, BufReader::new(stdout).lines().next_line()).await??;
        let ready: Ready = serde_json::from_str(&line.context("the other process ended at once")?)?;
        let peer = node.dial(&ready.address).await?;
        Ok(Self { peer, process })
    }

    /// Has it publish `n_bytes` without repetition.
    pub(crate) async fn publish(&self, node: &Node, seed: u64, n_bytes: u64) -> anyhow::Result<Cid> {
        let order = [seed.to_le_bytes(), n_bytes.to_le_bytes()].concat();
        let root = node.call(&self.peer, PUBLISH, order.into(), PATIENCE).await?;
        Ok(swarm_wire::cid::decode(&root)?)
    }

    /// Has it publish `n_bytes` and spread them as their source.
    pub(crate) async fn spread(&self, node: &Node, n_bytes: u64) -> anyhow::Result<Cid> {
        let root = self.publish(node, 0, n_bytes).await?;
        node.call(&self.peer, SPREAD, root.to_bytes().into(), PATIENCE).await?;
        Ok(root)
    }

    /// Its peak resident memory.
    pub(crate) async fn peak_rss_mb(&self, node: &Node) -> anyhow::Result<f64> {
        self.number(node, PEAK_RSS).await
    }

    /// Its resident memory now.
    pub(crate) async fn resident_mb(&self, node: &Node) -> anyhow::Result<f64> {
        self.number(node, RSS).await
    }

    async fn number(&self, node: &Node, method: &str) -> anyhow::Result<f64> {
        let answer = node.call(&self.peer, method, Bytes::new(), PATIENCE).await?;
        Ok(f64::from_le_bytes(answer[..].try_into().context("8 bytes were expected")?))
    }

    /// Ends it.
    pub(crate) async fn stop(mut self, node: &Node) -> anyhow::Result<()> {
        drop(self.process.stdin.take());
        node.disconnect(&self.peer).await;
        tokio::time::timeout(PATIENCE, self.process.wait()).await??;
        Ok(())
    }
}

/// Answers until standard input ends.
pub(crate) async fn serve(node: Node) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let blocks = Blocks::start(node.clone(), Arc::new(FsStore::open(dir.path().join("blocks"))?));
    node.handle("echo", |_, body| async move { Ok(body) });
    node.handle(PEAK_RSS, |_, _| async move { Ok(peak_rss_mb().to_le_bytes().to_vec().into()) });
    node.handle(RSS, |_, _| async move { Ok(machine::resident_mb().to_le_bytes().to_vec().into()) });
    let (spread_by, spreading) = (blocks.clone(), Arc::new(Mutex::new(Vec::new())));
    node.handle(SPREAD, move |_, root| {
        let (blocks, spreading) = (spread_by.clone(), Arc::clone(&spreading));
        async move {
            let root = swarm_wire::cid::decode(&root).map_err(|error| Status::internal(error.to_string()))?;
            let source = blocks.spread(&root, None, SpreadConfig::default()).await;
            let source = source.map_err(|error| Status::internal(error.to_string()))?;
            // As long as the process.
            spreading.lock().await.push(source);
            Ok(Bytes::new())
        }
    });
    let files = dir.path().to_owned();
    node.handle(PUBLISH, move |_, order| {
        let (blocks, files) = (blocks.clone(), files.clone());
        async move {
            let published = publish(&blocks, &files, &order).await;
            published.map(|root| root.to_bytes().into()).map_err(|error| Status::internal(error.to_string()))
        }
    });
    node.handle_stream(STREAM, |_, mut stream| async move {
        let mut buffer = vec![0; MIB / 4];
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
    let address = node.listen_addrs().await.into_iter().next().context("no address to listen on")?;
    program::report(&Ready { address })?;
    tokio::io::copy(&mut tokio::io::stdin(), &mut tokio::io::sink()).await?;
    node.shutdown().await;
    Ok(())
}

async fn publish(blocks: &Blocks, dir: &Path, order: &[u8]) -> anyhow::Result<Cid> {
    anyhow::ensure!(order.len() == 16, "an order has 16 bytes");
    let number = |at: usize| u64::from_le_bytes(order[at..at + 8].try_into().expect("8 of 16 bytes"));
    let (seed, n_bytes) = (number(0), number(8));
    let path = dir.join(format!("artefact-{seed}"));
    let file = path.clone();
    tokio::task::spawn_blocking(move || write_noise(&file, seed, n_bytes)).await??;
    Ok(blocks.publish_file(&path).await?)
}

/// Writes a file without repetition, so that no block is a copy of another (splitmix64).
fn write_noise(path: &Path, seed: u64, n_bytes: u64) -> std::io::Result<()> {
    let mut file = BufWriter::with_capacity(MIB, std::fs::File::create(path)?);
    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d);
    let mut left = n_bytes;
    while left > 0 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let n = left.min(8);
        file.write_all(&(z ^ (z >> 31)).to_le_bytes()[..n as usize])?;
        left -= n;
    }
    file.flush()
}

/// Peak resident memory of this process in MB; what it has now where the system does not tell.
pub(crate) fn peak_rss_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmHWM:"));
    let kib = line.and_then(|l| l.split_whitespace().nth(1)).and_then(|n| n.parse::<f64>().ok());
    kib.map_or_else(machine::resident_mb, |kib| (kib * 1024.0 / 1e5).round() / 10.0)
}
