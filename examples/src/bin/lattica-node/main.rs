//! `lattica-node`: one node of the network, as bootstrap peer, relay and DHT server; `lattica-node bench` measures two of
//! them on this machine, `lattica-node bench-spread` many, `lattica-node probe` the way to a peer.
#![expect(clippy::print_stdout, reason = "a command line tool reports there")]

mod bench;
mod bench_spread;
mod probe;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use lattica_net::{Access, Identity, NetEvent, Node, NodeConfig, create_swarm_key, load_swarm_key};
use serde_json::json;
use swarm_examples::program;
use swarm_wire::PeerId;

/// Runs a node until ctrl-c or SIGTERM, or measures some of them.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    node: NodeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Two nodes on loopback: calls, a stream and blocks.
    Bench(bench::BenchArgs),
    /// One artefact from one node to many, with slow uplinks, deaths and liars.
    BenchSpread(bench_spread::BenchSpreadArgs),
    /// Reaches a peer over relays and tells how well, or waits to be reached.
    Probe(probe::ProbeArgs),
    /// Makes the key of a private swarm; copy the file to every member.
    SwarmKey {
        /// The new file; one that exists is left alone.
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
struct NodeArgs {
    /// Address to listen on; may be given several times. Port 0 picks a free one.
    #[arg(long, value_name = "MULTIADDR", default_values = ["/ip4/0.0.0.0/udp/0/quic-v1", "/ip4/0.0.0.0/tcp/0"])]
    listen: Vec<String>,
    /// Carry connections of peers that cannot reach each other. The listen addresses (or --external) must be reachable.
    #[arg(long)]
    relay: bool,
    /// A node to join through, with its /p2p/ part; may be given several times.
    #[arg(long, value_name = "ADDR")]
    bootstrap: Vec<String>,
    /// A relay at which to be reachable, with its /p2p/ part; may be given several times.
    #[arg(long, value_name = "ADDR")]
    via: Vec<String>,
    /// An address under which this node can be reached from outside; may be given several times.
    #[arg(long, value_name = "MULTIADDR")]
    external: Vec<String>,
    /// Name of the network; its DHT holds only nodes with the same name.
    #[arg(long, default_value = "default")]
    network: String,
    /// Key of a private swarm (made by `lattica-node swarm-key FILE`): only peers that have it too are talked to.
    #[arg(long, value_name = "FILE")]
    swarm_key: Option<PathBuf>,
    /// Talk to this peer and the others named like this only; may be given several times.
    #[arg(long, value_name = "PEER_ID")]
    allow: Vec<PeerId>,
    /// Look for peers on the local network.
    #[arg(long)]
    mdns: bool,
    /// Ask the router for a port (UPnP).
    #[arg(long)]
    upnp: bool,
    /// Key file; made when it does not exist. Without it the node has a new identity each time.
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Remember peers here, and find back through them when no bootstrap peer is left.
    #[arg(long, value_name = "FILE")]
    peers_file: Option<PathBuf>,
    /// Print {"peer":…,"addresses":[…]} as one line when the node is up; everything else goes to stderr.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    program::run(|| {
        tokio::runtime::Runtime::new()?.block_on(async {
            match cli.command {
                Some(Command::Bench(args)) => bench::run(&args).await,
                Some(Command::BenchSpread(args)) => bench_spread::run(&args).await,
                Some(Command::Probe(args)) => probe::run(&args).await,
                Some(Command::SwarmKey { file }) => Ok(create_swarm_key(&file).map(|_| ())?),
                None => run(cli.node).await,
            }
        })
    })
}

async fn run(args: NodeArgs) -> anyhow::Result<()> {
    let identity = match &args.identity {
        Some(path) => Identity::load_or_create(path)?,
        None => Identity::generate(),
    };
    let config = NodeConfig {
        listen: args.listen,
        bootstrap: args.bootstrap,
        relays: args.via,
        external: args.external,
        network: args.network,
        access: Access {
            key: args.swarm_key.as_deref().map(load_swarm_key).transpose()?,
            allow: (!args.allow.is_empty()).then(|| args.allow.into_iter().collect()),
        },
        mdns: args.mdns,
        upnp: args.upnp,
        relay_server: args.relay,
        peers_file: args.peers_file,
        ..NodeConfig::default()
    };
    let node = Node::start(identity, config).await?;
    let mut events = node.events();
    let addresses = node.listen_addrs().await;
    if args.json {
        println!("{}", json!({"peer": node.peer_id(), "addresses": addresses}));
    } else {
        println!("peer {}", node.peer_id());
        for address in &addresses {
            println!("listening {address}");
        }
        println!("stop with ctrl-c");
    }
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
    Ok(())
}
