//! Rollout workers for a trainer: they sample what it leases, with the policies that it publishes.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use echo_rollout::service::{InFlight, Stopper, Worker, WorkerStats};
use lattica_net::{Identity, Node, NodeConfig};
use parallax_model::{BaseDtype, Checkpoint, WeightDtype};
use serde::{Deserialize, Serialize};
use swarm_examples::network::{EVERYWHERE, NetworkArgs};
use swarm_examples::parallax::model::DTYPES;
use swarm_examples::program;
use swarm_examples::rollouts::{WorkerOptions, start_worker};

/// The flags that a file takes the place of: all but --json.
const IN_A_FILE: [&str; 19] = [
    "trainer",
    "patience_s",
    "model",
    "env",
    "env_program",
    "workers",
    "network",
    "bootstrap",
    "listen",
    "external",
    "via",
    "swarm_key",
    "mdns",
    "keys",
    "base_dtype",
    "dtype",
    "leases",
    "cache_tokens",
    "in_flight",
];

/// Runs rollout workers against a trainer until it is done with them.
///
/// With --json: one line per change, `{"workers":[STATS,…]}`, where STATS is `{"peer":…,"version":…,"sampled":…,
/// "accepted":…,"refused":…,"failed":…,"tokens":…,"reward_sum":…}`; the last line has `"ended":[REASON,…]` as well.
#[derive(Debug, Clone, Parser, Deserialize)]
#[command(
    after_help = "Examples:\n  rollout-fleet --trainer /ip4/192.0.2.1/udp/4001/quic-v1/p2p/12D3KooW... --workers 2\n  behind a NAT, in a private \
                  swarm whose trainer has relay = true:\n  rollout-fleet --trainer ADDRESS --via ADDRESS --swarm-key swarm.key"
)]
#[serde(default, deny_unknown_fields)]
struct Args {
    /// A TOML file with these options (dashes become underscores) instead of flags, of which only --json may be beside it
    #[arg(long, conflicts_with_all = IN_A_FILE)]
    #[serde(skip)]
    config: Option<PathBuf>,
    /// Address of the trainer, with its /p2p/ part
    #[arg(long, default_value = "")]
    trainer: String,
    /// How long to dial a trainer that does not answer, with growing pauses
    #[arg(long, default_value_t = 60)]
    patience_s: u64,
    /// `tiny`, a directory, a .gguf file, or a repository in the local hub cache; the one that the trainer has
    #[arg(long, default_value = "tiny")]
    model: String,
    /// The trainer's environment, or the http address at which it is asked
    #[arg(long, default_value = "arithmetic", conflicts_with = "env_program")]
    env: String,
    /// A program that is the environment instead, and its arguments (`--env-program python3 examples/environments/guess.py`);
    /// the trainer has the same one
    #[arg(long, num_args = 1.., allow_hyphen_values = true, value_name = "PROGRAM")]
    env_program: Vec<String>,
    /// How many workers, each with its own copy of the model
    #[arg(long, default_value_t = 1)]
    workers: usize,
    /// The network's name, as the trainer has it
    #[arg(long, default_value = "default")]
    network: String,
    #[command(flatten)]
    #[serde(flatten)]
    place: NetworkArgs,
    /// Look for other workers on the local network, to pass policies on to them
    #[arg(long)]
    mdns: bool,
    /// Directory of the workers' keys, so that they are the same peers after a restart [default: new keys]
    #[arg(long)]
    keys: Option<PathBuf>,
    /// Format of the trainer's frozen weights (its run.trainer.base_dtype), which it names in the command that it prints. A trainer
    /// with another one refuses the worker
    #[arg(long, default_value = "f32", value_name = "f32|bf16|f16|q8_0")]
    base_dtype: String,
    /// Weights in memory. A trainer that audits expects what --base-dtype says, and with others the probabilities of sampling are
    /// not quite those of training [default: as --base-dtype]
    #[arg(long, value_name = DTYPES)]
    dtype: Option<String>,
    /// Samples made at once by one worker
    #[arg(long, default_value_t = 16)]
    leases: u32,
    /// Positions of the key-value cache of one worker
    #[arg(long, default_value_t = 4096)]
    cache_tokens: usize,
    /// What becomes of samples in the making when a newer policy is here. `switch` makes no commitments, so a trainer that
    /// audits refuses its samples
    #[arg(long, value_enum, default_value = "finish")]
    in_flight: InFlightArg,
    /// Print what happens as JSON lines
    #[arg(long)]
    json: bool,
}

/// As a flag and in a file.
#[derive(Debug, Clone, Copy, ValueEnum, Deserialize)]
#[serde(rename_all = "snake_case")]
enum InFlightArg {
    /// Finish them with the old one.
    Finish,
    /// Go on with the new one; each token carries the version that sampled it.
    Switch,
    /// Break them off and give their leases back.
    Abort,
}

impl From<InFlightArg> for InFlight {
    fn from(arg: InFlightArg) -> Self {
        match arg {
            InFlightArg::Finish => Self::Finish,
            InFlightArg::Switch => Self::Switch,
            InFlightArg::Abort => Self::Abort,
        }
    }
}

impl Default for Args {
    fn default() -> Self {
        Self::parse_from(["rollout-fleet"])
    }
}

#[derive(Serialize)]
struct Line {
    workers: Vec<Stats>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ended: Vec<String>,
}

#[derive(Serialize)]
struct Stats {
    peer: String,
    #[serde(flatten)]
    stats: WorkerStats,
}

/// How long workers that were asked to stop have for what they have begun.
const DRAIN: std::time::Duration = std::time::Duration::from_secs(30);

fn main() -> ExitCode {
    program::run(|| {
        let args = options(Args::parse())?;
        let settled = settle(&args).map_err(|faults| anyhow::anyhow!(faults.join("\n")))?;
        tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(fleet(&args, &settled))
    })
}

/// The flags, or what the file says that they name.
///
/// # Errors
/// A file that cannot be read, or says what is no option.
fn options(flags: Args) -> anyhow::Result<Args> {
    let Some(path) = &flags.config else { return Ok(flags) };
    let file: Args = program::settings(path)?;
    Ok(Args { json: flags.json || file.json, ..file })
}

/// What the words in the options mean.
struct Settled {
    node: NodeConfig,
    base_dtype: BaseDtype,
    dtype: WeightDtype,
}

/// Checks all options.
///
/// # Errors
/// Everything that is wrong, one sentence each.
fn settle(args: &Args) -> Result<Settled, Vec<String>> {
    let mut faults = Vec::new();
    if args.trainer.is_empty() {
        faults.push("no trainer named; give --trainer ADDR/p2p/PEER_ID".to_owned());
    }
    for (name, value) in [
        ("--workers", args.workers),
        ("--leases", args.leases as usize),
        ("--cache-tokens", args.cache_tokens),
    ] {
        if value == 0 {
            faults.push(format!("{name} must be at least 1"));
        }
    }
    if args.workers > 1 {
        let fixed = args.place.fixed_ports();
        faults.extend(fixed.map(|address| {
            format!(
                "--listen {address}: {} workers cannot share a port; give port 0, or --workers 1",
                args.workers
            )
        }));
    }
    let base_dtype = args.base_dtype.parse::<BaseDtype>();
    let base_dtype = base_dtype.map_err(|reason| faults.push(format!("--base-dtype: {reason}")));
    let dtype = args.dtype.as_deref().map(str::parse::<WeightDtype>).transpose();
    let dtype = dtype.map_err(|reason| faults.push(format!("--dtype: {reason}")));
    let node = args.place.config(&args.network, EVERYWHERE).map_err(|found| faults.extend(found));
    match (base_dtype, dtype, node) {
        (Ok(base_dtype), Ok(dtype), Ok(node)) if faults.is_empty() => {
            let dtype = dtype.unwrap_or_else(|| base_dtype.weights());
            Ok(Settled { node: NodeConfig { mdns: args.mdns, ..node }, base_dtype, dtype })
        }
        _ => Err(faults),
    }
}

async fn fleet(args: &Args, settled: &Settled) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::resolve(&args.model)?;
    let (mut running, mut stats, mut peers) = (tokio::task::JoinSet::new(), Vec::new(), Vec::new());
    let (mut nodes, mut stoppers) = (Vec::new(), Vec::new());
    for index in 0..args.workers {
        let (node, worker) = worker(args, settled, &checkpoint, index).await?;
        peers.push(node.peer_id().to_string());
        nodes.push(node);
        stats.push(worker.stats());
        stoppers.push(worker.stopper());
        running.spawn(worker.run());
    }
    program::say(&format!("{} workers sample for {}", args.workers, args.trainer));
    let mut tick = tokio::time::interval(std::time::Duration::from_secs(2));
    let (mut ended, mut finished) = (Vec::new(), false);
    let mut drained_by = None;
    let mut signal = Box::pin(program::asked_to_stop());
    let line = |ended: &[String]| {
        let workers =
            peers.iter().zip(&stats).map(|(peer, s)| Stats { peer: peer.clone(), stats: *s.borrow() });
        Line { workers: workers.collect(), ended: ended.to_vec() }
    };
    loop {
        tokio::select! {
            done = running.join_next() => match done {
                Some(Ok(Ok(()))) => {
                    finished = true;
                    ended.push(if drained_by.is_some() { "asked to stop" } else { "the run is finished" }.to_owned());
                }
                Some(done) => ended.extend(done?.err().map(|e| e.to_string())),
                None => break,
            },
            _ = tick.tick() => if args.json { program::report(&line(&ended))? },
            asked = &mut signal => {
                asked?;
                finished = true;
                if drained_by.is_some() {
                    break;
                }
                program::say("finishing what is begun; ask again to stop at once");
                stoppers.iter().for_each(Stopper::stop);
                signal.set(program::asked_to_stop());
                drained_by = Some(tokio::time::Instant::now() + DRAIN);
            }
            () = until(drained_by) => break,
        }
    }
    if args.json {
        program::report(&line(&ended))?;
    }
    for node in nodes {
        node.shutdown().await;
    }
    match ended.last() {
        Some(reason) if !finished => anyhow::bail!("{reason}"),
        _ => ended.iter().for_each(|reason| program::say(reason)),
    }
    Ok(())
}

async fn until(time: Option<tokio::time::Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn worker(
    args: &Args,
    settled: &Settled,
    checkpoint: &Checkpoint,
    index: usize,
) -> anyhow::Result<(Node, Worker)> {
    let identity = match &args.keys {
        Some(dir) => Identity::load_or_create(&dir.join(format!("worker-{index}.key")))?,
        None => Identity::generate(),
    };
    let node = Node::start(identity, settled.node.clone()).await?;
    let options = WorkerOptions {
        trainer: args.trainer.clone(),
        patience: std::time::Duration::from_secs(args.patience_s),
        environment: args.env.clone(),
        environment_program: args.env_program.clone(),
        base_dtype: settled.base_dtype,
        dtype: settled.dtype,
        leases: args.leases,
        cache_tokens: args.cache_tokens,
        in_flight: args.in_flight.into(),
    };
    Ok((node.clone(), start_worker(node, checkpoint, &options).await?))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn help_names_every_weight_format_that_is_taken() {
        let command = Args::command();
        let dtype = command.get_arguments().find(|argument| argument.get_id() == "dtype").unwrap();
        assert_eq!(dtype.get_value_names().unwrap()[0].as_str(), DTYPES);
    }

    #[test]
    fn a_file_says_what_flags_say_and_unknown_settings_are_named() {
        let flags = [
            "rollout-fleet",
            "--trainer",
            "T",
            "--bootstrap",
            "B",
            "--bootstrap",
            "C",
            "--listen",
            "L",
            "--mdns",
        ];
        let flags = Args::parse_from(flags);
        let file: Args =
            toml::from_str("trainer = \"T\"\nbootstrap = [\"B\", \"C\"]\nlisten = [\"L\"]\nmdns = true\n")
                .unwrap();
        assert_eq!((&file.trainer, &file.place, file.mdns), (&flags.trainer, &flags.place, flags.mdns));
        assert_eq!(file.place.bootstrap, ["B", "C"]);
        let unknown = toml::from_str::<Args>("swarmkey = \"k\"").unwrap_err().to_string();
        assert!(unknown.contains("swarmkey"), "{unknown}");
    }

    #[test]
    fn beside_a_file_only_json_counts_and_other_flags_are_refused() {
        let command = Args::command();
        let named = |id: &str| command.get_arguments().find(|argument| argument.get_id() == id).unwrap();
        let refused: Vec<&str> = command
            .get_arg_conflicts_with(named("config"))
            .iter()
            .map(|argument| argument.get_id().as_str())
            .collect();
        for argument in command.get_arguments().map(|argument| argument.get_id().as_str()) {
            let taken = ["config", "json", "help"].contains(&argument);
            assert!(taken != refused.contains(&argument), "{argument}");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fleet.toml");
        std::fs::write(&path, "trainer = \"T\"\nworkers = 2\n").unwrap();
        let flags = |more: &[&str]| {
            let config = ["rollout-fleet", "--config", path.to_str().unwrap()];
            Args::try_parse_from([&config[..], more].concat())
        };
        let cases: [(&[&str], bool); 2] = [(&[], false), (&["--json"], true)];
        for (more, json) in cases {
            let args = options(flags(more).unwrap()).unwrap();
            assert_eq!((&*args.trainer, args.workers, args.json), ("T", 2, json));
        }
        let error = flags(&["--workers", "3"]).unwrap_err().to_string();
        assert!(error.contains("--config") && error.contains("--workers"), "{error}");
        let both = ["rollout-fleet", "--env", "sort", "--env-program", "python3"];
        assert!(Args::try_parse_from(both).is_err());
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let args = [
            "rollout-fleet",
            "--workers",
            "2",
            "--listen",
            "/ip4/0.0.0.0/tcp/4001",
            "--base-dtype",
            "f98",
            "--dtype",
            "f99",
            "--via",
            "x",
        ];
        let faults = settle(&Args::parse_from(args)).err().unwrap();
        for (fault, named) in faults.iter().zip(["--trainer", "cannot share a port", "f98", "f99", "via x"]) {
            assert!(fault.contains(named), "{named}: {fault}");
        }
        assert_eq!(faults.len(), 5, "{faults:?}");
    }
}
