//! `lattica-node bench-hostile`: how much one hostile peer costs a node and those whom it serves. A friend calls the node while
//! the hostile peer attacks it, and, in turn, while the same attack goes to another node of its kind: both times the machine
//! has the same work, so that the difference is what the attacked node lets happen to others.

mod attack;

use std::time::Duration;

use clap::Args;
use lattica_net::{Identity, Node, NodeConfig};
use serde_json::{Value, json};
use swarm_examples::{machine, program};
use swarm_wire::Cid;
use tokio::task::JoinSet;

use self::attack::Attack;
use super::bench::other::Other;
use super::bench::{Load, Rates, Transport};

/// How often the attacked node's memory is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// An attack has this long to get going.
const BEGIN: Duration = Duration::from_millis(500);
/// What the nodes spread, for attacks on spreads.
const SPREAD_BYTES: u64 = attack::SPREAD_CHUNKS as u64 * (1 << 20);

/// What to measure.
#[derive(Debug, Args)]
pub(crate) struct BenchHostileArgs {
    /// Only this attack; may be given several times.
    #[arg(long, value_enum)]
    attack: Vec<Attack>,
    /// Calls of the friend that are under way at the same time.
    #[arg(long, default_value_t = 4)]
    in_flight: usize,
    /// Seconds of calls per round, with the attack on the node and with it elsewhere.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Rounds of each attack.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Transport of all connections.
    #[arg(long, value_enum, default_value = "quic")]
    transport: Transport,
    /// Print the report as one JSON object, the last line of stdout: machine, command, commit, transport, in_flight, rounds,
    /// quiet_p99_us (of the friend's calls without any attack) and attacks: name, p99_us (with the attack on the node),
    /// elsewhere_p99_us (with it on the other one), p99_ratio (median of the rounds' ratios, with _min and _max), rss_growth_mb
    /// (the most that the attacked node's memory was above what it was before).
    #[arg(long)]
    json: bool,
}

/// Measures and reports.
pub(crate) async fn run(args: &BenchHostileArgs) -> anyhow::Result<()> {
    anyhow::ensure!(args.rounds > 0 && args.in_flight > 0, "--rounds and --in-flight must be at least 1");
    let friend = node(args.transport, "127.0.0.11").await?;
    let transport = format!("{:?}", args.transport).to_lowercase();
    let attacks = if args.attack.is_empty() { Attack::ALL.to_vec() } else { args.attack.clone() };
    let mut quiet_p99_us = None;
    let mut measured = Vec::new();
    for attack in attacks {
        // New nodes for each: what one attack left behind is not the next one's.
        let scene = Scene::start(&friend, &transport, args.transport).await?;
        if quiet_p99_us.is_none() {
            quiet_p99_us = Some(load(args).measure(&friend, &scene.attacked.peer).await?.p99_us);
        }
        let found = scene.measure(&friend, attack, args).await?;
        program::tell(&found.to_string(), args.json)?;
        measured.push(found);
        scene.stop(&friend).await?;
    }
    friend.shutdown().await;
    let report = json!({
        "machine": machine::describe(),
        "command": std::env::args().collect::<Vec<_>>().join(" "),
        "commit": machine::commit(),
        "transport": transport,
        "in_flight": args.in_flight,
        "rounds": args.rounds,
        "quiet_p99_us": quiet_p99_us,
        "attacks": measured,
    });
    if args.json {
        return program::report(&report);
    }
    println!("without any attack: p99 {:.0} us", quiet_p99_us.unwrap_or_default());
    Ok(())
}

fn load(args: &BenchHostileArgs) -> Load {
    Load { n_bytes: 128, in_flight: args.in_flight, seconds: args.seconds, rounds: args.rounds }
}

async fn node(transport: Transport, ip: &str) -> anyhow::Result<Node> {
    // Who measures asks nobody for news.
    let config = NodeConfig {
        listen: vec![transport.listen(ip)],
        network: "bench".to_owned(),
        keep_peers: 0,
        ..NodeConfig::default()
    };
    Ok(Node::start(Identity::generate(), config).await?)
}

/// The node that is attacked, its like, and who attacks.
struct Scene {
    attacked: Other,
    elsewhere: Other,
    hostile: Node,
    roots: [Cid; 2],
}

impl Scene {
    async fn start(friend: &Node, name: &str, transport: Transport) -> anyhow::Result<Self> {
        let (attacked, elsewhere) = (Other::start(friend, name).await?, Other::start(friend, name).await?);
        let hostile = node(transport, "127.0.0.13").await?;
        for other in [&attacked, &elsewhere] {
            let address = friend.addresses(&other.peer).remove(0);
            hostile.dial(&format!("{address}/p2p/{}", other.peer)).await?;
        }
        let roots =
            [attacked.spread(friend, SPREAD_BYTES).await?, elsewhere.spread(friend, SPREAD_BYTES).await?];
        Ok(Self { attacked, elsewhere, hostile, roots })
    }

    async fn measure(&self, friend: &Node, attack: Attack, args: &BenchHostileArgs) -> anyhow::Result<Value> {
        let before_mb = self.attacked.resident_mb(friend).await?;
        let (mut with_us, mut elsewhere_us, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        let mut most_mb = before_mb;
        for round in 0..args.rounds {
            let mut p99_us = [0.0; 2];
            // Whatever else the machine does grows or ceases in the course of a round: each one begins with the other node.
            for target in [round % 2, 1 - round % 2] {
                let (other, root) = ([&self.attacked, &self.elsewhere][target], self.roots[target]);
                let attacking = attack.begin(&self.hostile, &other.peer, root);
                tokio::time::sleep(BEGIN).await;
                let time = Duration::from_secs_f64(args.seconds);
                let calls = load(args);
                let calls = calls.round(friend, &self.attacked.peer, time);
                let (found, memory_mb) = tokio::join!(calls, most_memory(friend, &self.attacked, time));
                p99_us[target] = found?.p99_us;
                most_mb = most_mb.max(memory_mb?);
                end(attacking).await;
            }
            ratios.push(p99_us[0] / p99_us[1]);
            with_us.push(p99_us[0]);
            elsewhere_us.push(p99_us[1]);
        }
        let hundredths = |value: f64| (value * 100.0).round() / 100.0;
        // Rates are rounded to tenths; ratios need one digit more.
        let ratio = Rates::of(ratios.iter().map(|ratio| ratio * 10.0).collect());
        Ok(json!({
            "name": attack.name(),
            "p99_us": Rates::of(with_us).median,
            "elsewhere_p99_us": Rates::of(elsewhere_us).median,
            "p99_ratio": hundredths(ratio.median / 10.0),
            "p99_ratio_min": hundredths(ratio.min / 10.0),
            "p99_ratio_max": hundredths(ratio.max / 10.0),
            "rss_growth_mb": hundredths(most_mb - before_mb),
        }))
    }

    async fn stop(self, friend: &Node) -> anyhow::Result<()> {
        self.hostile.shutdown().await;
        self.attacked.stop(friend).await?;
        self.elsewhere.stop(friend).await
    }
}

async fn most_memory(friend: &Node, other: &Other, time: Duration) -> anyhow::Result<f64> {
    let (start, mut most_mb) = (tokio::time::Instant::now(), 0.0f64);
    while start.elapsed() < time {
        most_mb = most_mb.max(other.resident_mb(friend).await?);
        tokio::time::sleep(LOOK).await;
    }
    Ok(most_mb)
}

async fn end(mut attacking: JoinSet<()>) {
    attacking.shutdown().await;
}
