//! `lattica-node`: one node of the network, as bootstrap peer, relay and DHT server; `lattica-node bench` measures two of
//! them on this machine, `lattica-node bench-spread` many, `lattica-node bench-idle` what idle connections take, `lattica-node bench-hostile` what a hostile peer costs,
//! `lattica-node probe` the way to a peer. `lattica-node publish` and
//! `fetch` share files, with IPFS too, `lattica-node store` looks after what they keep.
#![expect(clippy::print_stdout, reason = "a command line tool reports there")]

mod bench;
mod bench_hostile;
mod bench_idle;
mod bench_spread;
mod metrics;
mod node;
mod probe;
mod share;
mod store;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use lattica_net::{NetEvent, Node, create_swarm_key};
use node::NodeArgs;
use serde_json::json;
use swarm_examples::program;

/// Runs a node until ctrl-c or SIGTERM, or measures some of them.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    node: NodeArgs,
    /// Answer GET /metrics for Prometheus at this address, for example 127.0.0.1:9464.
    #[arg(long, value_name = "HOST:PORT")]
    metrics: Option<SocketAddr>,
    /// Print {"peer":…,"addresses":[…]} as one line when the node is up; everything else goes to stderr.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Two nodes on loopback: calls, a stream and blocks.
    Bench(bench::BenchArgs),
    /// What a hostile peer costs a node and those whom it serves: their calls' p99, its memory.
    BenchHostile(bench_hostile::BenchHostileArgs),
    /// Many connections over which nobody says anything: memory and processor time of the node that listens.
    BenchIdle(bench_idle::BenchIdleArgs),
    /// One artefact from one node to many, with slow uplinks, deaths and liars.
    BenchSpread(bench_spread::BenchSpreadArgs),
    /// Reaches a peer over relays and tells how well, or waits to be reached.
    Probe(probe::ProbeArgs),
    /// Shares files or a directory until it is stopped.
    Publish(share::PublishArgs),
    /// Gets what somebody shares: an artefact of this network, or a file or directory of IPFS.
    Fetch(share::FetchArgs),
    /// Looks after a directory of blocks: what is pinned, whether all is whole, what nobody needs.
    Store(store::StoreArgs),
    /// Makes the key of a private swarm; copy the file to every member.
    SwarmKey {
        /// The new file; one that exists is left alone.
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::run(|| {
        tokio::runtime::Runtime::new()?.block_on(async {
            match cli.command {
                Some(Command::Bench(args)) => bench::run(&args).await,
                Some(Command::BenchHostile(args)) => bench_hostile::run(&args).await,
                Some(Command::BenchIdle(args)) => bench_idle::run(&args).await,
                Some(Command::BenchSpread(args)) => bench_spread::run(&args).await,
                Some(Command::Probe(args)) => probe::run(&args).await,
                Some(Command::Publish(args)) => share::publish(args).await,
                Some(Command::Fetch(args)) => share::fetch(args).await,
                Some(Command::Store(args)) => store::run(&args),
                Some(Command::SwarmKey { file }) => Ok(create_swarm_key(&file).map(|_| ())?),
                None => run(cli.node, cli.metrics, cli.json).await,
            }
        })
    })
}

async fn run(args: NodeArgs, metrics: Option<SocketAddr>, json: bool) -> anyhow::Result<()> {
    let node = args.start().await?;
    if let Some(address) = metrics {
        metrics::serve(&node, address).await?;
    }
    let mut events = node.events();
    let addresses = node.listen_addrs().await;
    if json {
        println!("{}", json!({"peer": node.peer_id(), "addresses": addresses}));
    } else {
        println!("peer {}", node.peer_id());
        for address in &addresses {
            println!("listening {address}");
        }
        println!("stop with ctrl-c");
    }
    serve(&node, &mut events).await;
    Ok(())
}

/// Says what happens until the node is asked to stop, then lets it finish.
async fn serve(node: &Node, events: &mut tokio::sync::broadcast::Receiver<NetEvent>) {
    let mut stop = std::pin::pin!(program::stopping());
    loop {
        tokio::select! {
            () = &mut stop => break,
            event = events.recv() => match event {
                Ok(NetEvent::Reachable(address)) => program::say(&format!("reachable at {address}")),
                Ok(NetEvent::RelayReserved(relay)) => program::say(&format!("reachable through relay {relay}")),
                Ok(event) => tracing::info!(?event),
                Err(tokio::sync::broadcast::error::RecvError::Lagged(n)) => tracing::info!(n, "events skipped"),
                Err(tokio::sync::broadcast::error::RecvError::Closed) => break,
            },
        }
    }
    node.drain(program::DRAIN).await;
}
