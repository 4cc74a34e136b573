//! `lattica-node`: one node of the network, as bootstrap peer, relay and DHT server; `lattica-node bench` measures two of
//! them on this machine.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool reports there")]

mod bench;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand};
use lattica_net::{Identity, Node, NodeConfig};
use serde_json::json;

/// Runs a node until ctrl-c, or measures two of them.
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
    /// Look for peers on the local network.
    #[arg(long)]
    mdns: bool,
    /// Key file; made when it does not exist. Without it the node has a new identity each time.
    #[arg(long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Print {"peer":…,"addresses":[…]} as one line when the node is up; everything else goes to stderr.
    #[arg(long)]
    json: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match cli.command {
        Some(Command::Bench(args)) => bench::run(&args).await,
        None => run(cli.node).await,
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not by returning it: that would add a backtrace where a sentence is wanted.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
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
        mdns: args.mdns,
        relay_server: args.relay,
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
    loop {
        tokio::select! {
            result = tokio::signal::ctrl_c() => {
                result.context("waiting for ctrl-c")?;
                break;
            }
            event = events.recv() => match event {
                Ok(event) => tracing::info!(?event),
                Err(tokio::sync::broadcast::error::RecvError::Lagged(n)) => tracing::info!(n, "events skipped"),
                Err(tokio::sync::broadcast::error::RecvError::Closed) => break,
            },
        }
    }
    node.shutdown().await;
    Ok(())
}
