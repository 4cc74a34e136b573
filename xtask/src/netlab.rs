//! `cargo xtask netlab`: real `lattica-node` processes behind real NATs, on one machine. Network namespaces are the hosts and
//! routers, nftables the NATs, one relay stands outside. Needs root, `ip` and `nft`; says so and does nothing without them.
//!
//! Map: `nat` (rules as text), `shaper` (what a line does to frames), `statistics` (sums) are pure; `space` (namespaces), `line`
//! (emulated lines), `lab` (the map of sites), `node` (processes), `matrix` (who calls whom), `relay_kill`,
//! `outage`, `churn`, `stream` do it. It lies here and not in the
//! `tests` package because it is a command with a report, needs root, and drives nothing but a binary: so it builds in seconds.

mod churn;
mod lab;
mod line;
mod matrix;
mod nat;
mod node;
mod outage;
mod relay_kill;
mod shaper;
pub(crate) mod space;
mod statistics;
mod stream;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::json;

use self::churn::Churned;
use self::lab::{Lab, SITES_MAX};
use self::matrix::Matrix;
use self::nat::NatKind;
use self::node::{Program, Transport};
use self::outage::{Outage, Outages};
use self::relay_kill::RelayKill;
use self::shaper::Line;
use self::statistics::Pair;
use self::stream::{Streamed, Way};
use crate::ci::{commit, release_binary};

/// What to run.
#[derive(Debug, Args)]
pub(crate) struct NetlabArgs {
    /// Every kind of NAT calls every other one. What is run when nothing else is named.
    #[arg(long)]
    matrix: bool,
    /// One of three relays is killed: how long until the node behind it keeps a slot at another one.
    #[arg(long)]
    relay_kill: bool,
    /// Something happens to the network under calls: how long until they are answered again. May be given several times.
    #[arg(long, value_enum)]
    outage: Vec<Outage>,
    /// Nodes come and go for this many seconds, while others call each other: what becomes of those calls, and who can be
    /// reached in the end.
    #[arg(long, value_name = "SECONDS")]
    churn: Option<f64>,
    /// Nodes of --churn that come and go.
    #[arg(long, default_value_t = 8)]
    churn_nodes: usize,
    /// One stream between two sites at the end of a line of --mbit-per-s, with and without --loss.
    #[arg(long)]
    stream: bool,
    /// Rate of the line of --stream, in Mbit/s.
    #[arg(long, default_value_t = 100)]
    mbit_per_s: u64,
    /// Share of the packets that the second line of --stream loses.
    #[arg(long, default_value_t = 0.01)]
    loss: f64,
    /// Packets that are lost in a row, on average.
    #[arg(long, default_value_t = 1.0)]
    burst: f64,
    /// Length of the stream, in MiB.
    #[arg(long, default_value_t = 64)]
    stream_mib: u64,
    /// Runs of each pair and transport.
    #[arg(long, default_value_t = 20)]
    runs: usize,
    /// Only callers behind these; may be given several times.
    #[arg(long, value_enum)]
    from: Vec<NatKind>,
    /// Only answerers behind these; may be given several times.
    #[arg(long, value_enum)]
    to: Vec<NatKind>,
    /// Only this transport.
    #[arg(long, value_enum)]
    transport: Option<Transport>,
    /// Round trip between any two sites, and between a site and the relay, in ms.
    #[arg(long, default_value_t = 0.0)]
    rtt_ms: f64,
    /// Packets take up to this much longer on their way to another site, in ms; they keep their order.
    #[arg(long, default_value_t = 0.0)]
    jitter_ms: f64,
    /// Share of the packets that others overtake on their way to another site.
    #[arg(long, default_value_t = 0.0)]
    overtaken: f64,
    /// How long a caller waits for a direct connection, in seconds.
    #[arg(long, default_value_t = 8.0)]
    patience_s: f64,
    /// Pairs that are under way at the same time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// The lattica-node to use; by default it is built.
    #[arg(long, value_name = "FILE")]
    node: Option<PathBuf>,
    /// Write what every process logs (see RUST_LOG) to this folder.
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
    /// Print the report as one JSON object, the last line of stdout: pairs (a calls b; direct, relayed and failed runs, and
    /// milliseconds to the direct connection and to the first answer when that came over the relay, counted from the call),
    /// relay_kills (replaced and failed, and milliseconds from the kill to the new slot), outages (kind, back and failed, and
    /// milliseconds from the end of the outage to the first answer; calls of others that went on, and those of them that
    /// failed), churns (nodes killed and not started again; calls of others and those of them that failed; nodes that were
    /// reached in the end, and not), streams (the line, its length, runs that failed, and the share of the line that the stream used, in its last
    /// three quarters and from its first byte),
    /// rtt_ms, jitter_ms, overtaken, runs, patience_s, seconds, command, commit; {"skipped": reason} where the lab cannot run.
    #[arg(long)]
    json: bool,
}

/// Runs the lab and reports; a skip is no failure.
pub(crate) fn run(root: &Path, args: &NetlabArgs) -> Result<()> {
    if let Some(reason) = cannot_run() {
        println!("netlab skipped: {reason}");
        if args.json {
            println!("{}", json!({ "skipped": reason }));
        }
        return Ok(());
    }
    ensure!(args.runs > 0 && args.jobs > 0, "--runs and --jobs must be at least 1");
    ensure!(
        [args.loss, args.overtaken].iter().all(|share| (0.0..1.0).contains(share))
            && args.burst >= 1.0
            && args.mbit_per_s > 0,
        "--loss and --overtaken are from 0 to 1, --burst and --mbit-per-s at least 1"
    );
    let times = [args.rtt_ms, args.jitter_ms];
    ensure!(
        times.iter().all(|ms| (0.0..=10_000.0).contains(ms)),
        "--rtt-ms and --jitter-ms must be from 0 to 10000"
    );
    let transports = args.transport.map_or_else(|| vec![Transport::Quic, Transport::Tcp], |t| vec![t]);
    let most_nodes = SITES_MAX / transports.len() - churn::SITES_MORE;
    ensure!(
        args.churn.is_none_or(|seconds| (1.0..=3600.0).contains(&seconds))
            && (1..=most_nodes).contains(&args.churn_nodes),
        "--churn must be from 1 to 3600 seconds, --churn-nodes from 1 to {most_nodes}"
    );
    if let Some(logs) = &args.logs {
        std::fs::create_dir_all(logs).with_context(|| format!("making {}", logs.display()))?;
    }
    let built = || release_binary(root, "swarm-examples", "lattica-node");
    let node = args.node.clone().map_or_else(built, Ok)?;
    let program = Program { node, logs: args.logs.clone(), patience_s: args.patience_s };
    space::remove_leftovers()?;

    let start = Instant::now();
    // Four lines lie on the way to another site and back, two on the way there.
    let line = Line {
        delay: Duration::from_secs_f64(args.rtt_ms / 4e3),
        jitter: Duration::from_secs_f64(args.jitter_ms / 2e3),
        overtaken: args.overtaken / 2.0,
        ..Line::default()
    };
    let mut lab = Lab::new(line)?;
    let mut pairs = Vec::new();
    let other = args.relay_kill || args.stream || args.churn.is_some() || !args.outage.is_empty();
    if args.matrix || !other {
        pairs = matrix(args, &mut lab, &program, &transports)?;
    }
    let mut kills = Vec::new();
    if args.relay_kill {
        for &transport in &transports {
            kills.push(relay_kill::run(&mut lab, &program, transport, args.runs, &|line| {
                eprintln!("{line}")
            })?);
        }
    }
    let mut outages = Vec::new();
    for &kind in &args.outage {
        for &transport in &transports {
            let told = |line: &str| eprintln!("{line}");
            outages.push(outage::run(&mut lab, &program, (kind, transport), args.runs, &told)?);
        }
    }
    let mut churns = Vec::new();
    if let Some(seconds) = args.churn {
        for &transport in &transports {
            let told = |line: &str| eprintln!("{line}");
            churns.push(churn::run(&mut lab, &program, transport, (args.churn_nodes, seconds), &told)?);
        }
    }
    // Streams have labs of their own, whose namespaces have the same names.
    drop(lab);
    let mut streams = Vec::new();
    if args.stream {
        for &transport in &transports {
            for loss in [0.0, args.loss] {
                let NetlabArgs { rtt_ms, jitter_ms, mbit_per_s, burst, overtaken, .. } = *args;
                let way = Way { rtt_ms, jitter_ms, mbit_per_s, loss, burst, overtaken };
                let told = |line: &str| eprintln!("{line}");
                streams.push(stream::run(&program, transport, way, (args.stream_mib, args.runs), &told)?);
            }
        }
    }
    pairs.iter().for_each(tell_pair);
    kills.iter().for_each(tell_kill);
    outages.iter().for_each(tell_outage);
    churns.iter().for_each(tell_churn);
    streams.iter().for_each(tell_stream);
    if args.json {
        let report = json!({
            "pairs": pairs,
            "relay_kills": kills,
            "outages": outages,
            "churns": churns,
            "streams": streams,
            "runs": args.runs,
            "rtt_ms": args.rtt_ms,
            "jitter_ms": args.jitter_ms,
            "overtaken": args.overtaken,
            "patience_s": args.patience_s,
            "seconds": start.elapsed().as_secs_f64().round(),
            "command": std::env::args().collect::<Vec<_>>().join(" "),
            "commit": commit(root),
        });
        println!("{report}");
    }
    Ok(())
}

fn matrix(
    args: &NetlabArgs,
    lab: &mut Lab,
    program: &Program,
    transports: &[Transport],
) -> Result<Vec<Pair>> {
    let site = lab.add(NatKind::None)?;
    let relay = program.relay(lab.get(site), "relay")?;
    let chosen = |kinds: &[NatKind]| if kinds.is_empty() { NatKind::ALL.to_vec() } else { kinds.to_vec() };
    let matrix = Matrix {
        from: chosen(&args.from),
        to: chosen(&args.to),
        transports: transports.to_vec(),
        runs: args.runs,
        jobs: args.jobs,
    };
    let vias = |transport| relay.address(transport).map(str::to_owned).into_iter().collect();
    matrix.run(lab, program, &vias, &|line| eprintln!("{line}"))
}

fn tell_pair(pair: &Pair) {
    eprintln!(
        "{:>4} {:>15} -> {:<15} direct {:>3}  relayed {:>3}  failed {:>3}  to direct p95 {:>6} ms  first call over the \
         relay p95 {:>6} ms",
        pair.transport,
        pair.a,
        pair.b,
        pair.direct,
        pair.relayed,
        pair.failed,
        shown(pair.time_to_direct_p95_ms),
        shown(pair.relayed_first_call_p95_ms),
    );
}

fn tell_kill(kill: &RelayKill) {
    eprintln!(
        "{:>4} relay killed: slot replaced {:>3}  failed {:>3}  p95 {:>6} ms",
        kill.transport,
        kill.replaced,
        kill.failed,
        shown(kill.replaced_p95_ms),
    );
}

fn tell_outage(outage: &Outages) {
    eprintln!(
        "{:>4} {}: answered again {:>3}  failed {:>3}  p95 {:>6} ms  {} of {} calls of others failed",
        outage.transport,
        outage.kind.name(),
        outage.back,
        outage.failed,
        shown(outage.back_p95_ms),
        outage.near_calls_failed,
        outage.near_calls,
    );
}

fn tell_churn(churn: &Churned) {
    eprintln!(
        "{:>4} churn of {} nodes for {:.0} s: {} killed, {} did not come up again; {} of {} calls of others failed; in the end \
         {} reached, {} not",
        churn.transport,
        churn.nodes,
        churn.seconds,
        churn.killed,
        churn.not_started,
        churn.calls_failed,
        churn.calls,
        churn.reached,
        churn.not_reached,
    );
}

fn tell_stream(stream: &Streamed) {
    let share =
        |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{:.1}", share * 100.0));
    eprintln!(
        "{:>4} one stream, {} ms, {} Mbit/s, {:.1} % lost: {} % of the line, {} % with its start",
        stream.transport,
        stream.way.rtt_ms,
        stream.way.mbit_per_s,
        stream.way.loss * 100.0,
        share(stream.share_p50),
        share(stream.share_with_start_p50),
    );
}

fn shown(ms: Option<f64>) -> String {
    ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.0}"))
}

/// Why the lab cannot run here.
fn cannot_run() -> Option<String> {
    let found = |program: &str| {
        let paths = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&paths).any(|dir| dir.join(program).is_file())
    };
    for (program, package) in [("ip", "iproute2"), ("nft", "nftables")] {
        if !found(program) {
            return Some(format!("there is no '{program}' here (package {package})"));
        }
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    (!is_root(&status)).then(|| "network namespaces need root".to_owned())
}

/// Whether the effective user of a process is root, from its `/proc` status.
fn is_root(status: &str) -> bool {
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"));
    uids.and_then(|uids| uids.split_whitespace().nth(1)) == Some("0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_effective_user_counts() {
        assert!(is_root("Name:\tx\nUid:\t1000\t0\t0\t0\n"));
        assert!(!is_root("Uid:\t0\t1000\t1000\t1000\n"));
        assert!(!is_root(""));
    }
}
