//! `lattica-node bench-idle`: how much memory and processor time connections take over which nobody says anything. This
//! process listens; others, started from the same binary, are full of nodes that connect to it and stay.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use lattica_net::{Identity, Limits, Node, NodeConfig};
use serde::{Deserialize, Serialize};
use serde_json::json;
use swarm_examples::{machine, program};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinSet;

use super::bench::Transport;

/// Nodes of one other process; each has threads of its own.
const NODES_OF_A_PROCESS: usize = 250;
/// Dials that are under way at the same time, in each of the others.
const DIALS: usize = 8;
/// How often each node tries: hundreds of them on a few cores keep each other waiting.
const TRIES: usize = 5;
/// How long all of them may take to connect.
const PATIENCE: Duration = Duration::from_secs(300);

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct BenchIdleArgs {
    /// Connections, each of another node.
    #[arg(long, default_value_t = 1000)]
    connections: usize,
    /// Transport of the connections.
    #[arg(long, value_enum, default_value = "quic")]
    transport: Transport,
    /// Seconds of silence before memory is read, and over which processor time is counted.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Be one of the other processes: connect to this address with so many nodes as --connections says.
    #[arg(long, hide = true)]
    to: Option<String>,
    /// Print the report as one JSON object, the last line of stdout: machine, command, commit, transport, connections; rss_mb
    /// (of the node that listens, after the silence), rss_before_mb (before the first connection), rss_connected_mb (when the
    /// last one stood), kb_per_connection, busy (processor seconds of that node per second of silence), left (connections at
    /// the end).
    #[arg(long)]
    json: bool,
}

/// The line of another process whose nodes are all connected.
#[derive(Serialize, Deserialize)]
struct Connected {
    connected: usize,
}

/// Nodes elsewhere, ended on drop.
struct Crowd {
    process: Child,
    /// They stay until this is closed.
    stdin: Option<ChildStdin>,
}

/// Measures and reports.
pub(crate) async fn run(args: &BenchIdleArgs) -> anyhow::Result<()> {
    if let Some(address) = &args.to {
        return stay(args.connections, address).await;
    }
    anyhow::ensure!(args.connections > 0 && args.seconds >= 0.0, "--connections must be at least 1");
    let node = node(args).await?;
    let address = node.listen_addrs().await.into_iter().next().context("no address to listen on")?;
    let before = machine::resident_mb();
    let mut crowds = Vec::new();
    for begin in (0..args.connections).step_by(NODES_OF_A_PROCESS) {
        let n = NODES_OF_A_PROCESS.min(args.connections - begin);
        crowds.push(Crowd::start(n, &address).await?);
    }
    let connected = machine::resident_mb();
    let (start, worked) = (Instant::now(), machine::processor_time());
    tokio::time::sleep(Duration::from_secs_f64(args.seconds)).await;
    let busy = (machine::processor_time() - worked).as_secs_f64() / start.elapsed().as_secs_f64();
    let (rss, left) = (machine::resident_mb(), node.connected_peers().len());
    for crowd in crowds {
        crowd.end().await?;
    }
    node.shutdown().await;
    let round = |value: f64| (value * 100.0).round() / 100.0;
    let report = json!({
        "machine": machine::describe(),
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "commit": machine::commit(),
        "transport": format!("{:?}", args.transport).to_lowercase(),
        "connections": args.connections,
        "rss_mb": round(rss),
        "rss_before_mb": round(before),
        "rss_connected_mb": round(connected),
        "kb_per_connection": round((rss - before) * 1e3 / args.connections as f64),
        "busy": round(busy),
        "left": left,
    });
    if args.json {
        return program::report(&report);
    }
    for (name, value) in report.as_object().into_iter().flatten() {
        println!("{name:>20}  {value}");
    }
    Ok(())
}

/// The node that is measured: as everybody's, but that it takes so many connections.
async fn node(args: &BenchIdleArgs) -> anyhow::Result<Node> {
    let connections = u32::try_from(2 * args.connections).context("too many connections")?;
    let config = NodeConfig {
        listen: vec![args.transport.listen("127.0.0.11")],
        network: "bench".to_owned(),
        limits: Limits { connections, ..Limits::default() },
        ..NodeConfig::default()
    };
    Ok(Node::start(Identity::generate(), config).await?)
}

impl Crowd {
    /// Starts a process with `n` nodes and waits until all of them are connected.
    async fn start(n: usize, address: &str) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program's own file")?;
        let mut process = Command::new(program)
            .args(["bench-idle", "--connections", &n.to_string(), "--to", address])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting another process")?;
        let stdin = process.stdin.take();
        let stdout = process.stdout.take().context("its standard output is piped")?;
        let line = tokio::time::timeout(PATIENCE, BufReader::new(stdout).lines().next_line()).await??;
        let said: Connected = serde_json::from_str(&line.context("another process ended at once")?)?;
        anyhow::ensure!(said.connected == n, "{} of {n} nodes connected", said.connected);
        Ok(Self { process, stdin })
    }

    async fn end(mut self) -> anyhow::Result<()> {
        drop(self.stdin.take());
        tokio::time::timeout(PATIENCE, self.process.wait()).await??;
        Ok(())
    }
}

/// Connects `n` nodes with `address` and keeps them until standard input ends.
async fn stay(n: usize, address: &str) -> anyhow::Result<()> {
    let mut nodes = Vec::with_capacity(n);
    let mut dials = JoinSet::new();
    for begun in 0..n {
        if begun >= DIALS
            && let Some(dialled) = dials.join_next().await
        {
            nodes.push(dialled??);
        }
        let address = address.to_owned();
        dials.spawn(async move {
            // Nobody can reach them, and they look for nobody else.
            let config = NodeConfig {
                listen: Vec::new(),
                network: "bench".to_owned(),
                keep_peers: 1,
                io_threads: 1,
                ..NodeConfig::default()
            };
            let node = Node::start(Identity::generate(), config).await?;
            let mut tries = 1;
            while let Err(error) = node.dial(&address).await {
                tracing::info!(%error, tries, "not connected");
                anyhow::ensure!(tries < TRIES, error);
                tries += 1;
            }
            anyhow::Ok(node)
        });
    }
    while let Some(dialled) = dials.join_next().await {
        nodes.push(dialled??);
    }
    program::report(&Connected { connected: nodes.len() })?;
    tokio::io::copy(&mut tokio::io::stdin(), &mut tokio::io::sink()).await?;
    // What is left of them ends with the process.
    Ok(())
}
