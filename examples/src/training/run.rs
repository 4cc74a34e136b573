//! `training-swarm --config`: the learner of a swarm over many machines. Workers join it with `rollout-fleet`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use echo_trainer::RunConfig;
use lattica_bitswap::Blocks;
use lattica_net::{Identity, Node, NodeConfig};
use parallax_model::Checkpoint;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::demo::report::{Prices, Report};
use crate::program;
use crate::rollouts::{environment, environment_name, memory_blocks, start_learner};

/// Train with rollouts from many machines.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Settings of a run, for example examples/configs/training-swarm.toml
    #[arg(long)]
    config: Option<PathBuf>,
    /// Print one line per event on stdout; the last line is the summary
    #[arg(long)]
    json: bool,
}

/// The file: what is trained where, and the run.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Settings {
    /// `tiny`, a directory, a .gguf file, or a repository in the local hub cache.
    model: String,
    /// Directory of the checkpoint, the journal and the newest adapter; a run that is there goes on.
    dir: PathBuf,
    /// Threads of the CPU kernels; 0: all cores.
    threads: usize,
    node: NodeSettings,
    /// What an hour costs; with it the report says what the run cost.
    prices: Option<Prices>,
    run: RunConfig,
}

/// The learner's place in the network.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct NodeSettings {
    /// Key file; made when it does not exist. Workers know the learner by this key.
    identity: PathBuf,
    /// Where to listen.
    listen: Vec<String>,
    /// Addresses under which it can be reached from outside.
    external: Vec<String>,
    /// Nodes to join through.
    bootstrap: Vec<String>,
    /// Name of the network.
    network: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: "tiny".to_owned(),
            dir: PathBuf::from("training-swarm-out"),
            threads: 0,
            node: NodeSettings::default(),
            prices: None,
            run: RunConfig::default(),
        }
    }
}

impl Default for NodeSettings {
    fn default() -> Self {
        Self {
            identity: PathBuf::from("training-swarm.key"),
            listen: ["/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/127.0.0.1/tcp/0"].map(str::to_owned).to_vec(),
            external: Vec::new(),
            bootstrap: Vec::new(),
            network: "default".to_owned(),
        }
    }
}

/// How long workers have to hear that the run is over.
const GOODBYE: Duration = Duration::from_secs(5);

/// Runs it.
///
/// # Errors
/// Settings out of range (all of them at once), a port in use, no workers, a full disk.
pub fn run(args: &RunArgs) -> anyhow::Result<()> {
    let path = args.config.as_ref().context("no run named; give --config FILE, or a command (see --help)")?;
    let settings: Settings = program::settings(path)?;
    if let Err(faults) = settings.run.validate() {
        bail!("settings in {}:\n{faults}", path.display());
    }
    tokio::runtime::Runtime::new()?.block_on(serve(settings, args.json))
}

async fn serve(settings: Settings, json: bool) -> anyhow::Result<()> {
    let Settings { model, dir, threads, node, prices, run } = settings;
    if threads > 0 {
        parallax_kernels::pool::set_threads(threads);
    }
    let config = NodeConfig {
        listen: node.listen,
        external: node.external,
        bootstrap: node.bootstrap,
        network: node.network.clone(),
        ..NodeConfig::default()
    };
    let mut report = Report::new(&model, &run.environment, run.workers).priced(prices);
    let started = std::time::Instant::now();
    let learner = Node::start(Identity::load_or_create(&node.identity)?, config).await?;
    learn(learner, &model, run.clone(), &dir, |event| {
        for address in event["addrs"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            program::say(&format!("workers: {}", join_command(&model, &node.network, address, &run)));
        }
        if let Some(news) = report.take(event) {
            program::say(&news);
        }
        if json && event["event"] != "done" { program::report(event) } else { Ok(()) }
    })
    .await?;
    report.seconds = started.elapsed().as_secs_f64();
    report.write(&dir)?;
    program::say(&report.for_people());
    if json { program::report(&report) } else { Ok(()) }
}

/// What starts workers of `run`. The environment comes last: a program takes all words that follow.
fn join_command(model: &str, network: &str, address: &str, run: &RunConfig) -> String {
    let mut words = vec!["rollout-fleet", "--model", model, "--network", network, "--trainer", address];
    if run.environment_program.is_empty() {
        words.extend(["--env", &run.environment]);
    } else {
        words.push("--env-program");
        words.extend(run.environment_program.iter().map(String::as_str));
    }
    words.into_iter().map(quoted).collect::<Vec<_>>().join(" ")
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Runs a learner on `node` to its end, and tells what happens: `ready`, what the learner says, `done` with the summary.
///
/// # Errors
/// What `tell` or the learner cannot do.
pub async fn learn(
    node: Node,
    model: &str,
    config: RunConfig,
    dir: &Path,
    mut tell: impl FnMut(&Value) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::resolve(model)?;
    let blocks = Blocks::start(node.clone(), memory_blocks());
    let environment = environment(&config.environment, &config.environment_program)?;
    let env = environment_name(&config, &*environment);
    let mut learner = start_learner(node.clone(), blocks, &checkpoint, environment, config, dir).await?;
    let addrs = node.listen_addrs().await;
    tell(&json!({"event": "ready", "peer": node.peer_id(), "addrs": addrs, "env": env}))?;
    let mut told = Ok(());
    let summary = learner
        .run(|event| {
            if told.is_ok() {
                told = serde_json::to_value(event).map_err(Into::into).and_then(|event| tell(&event));
            }
        })
        .await?;
    told?;
    let mut done = serde_json::to_value(&summary)?;
    done["event"] = json!("done");
    learner.finish(GOODBYE).await;
    tell(&done)?;
    node.shutdown().await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_told_what_the_learner_trains_on() {
        let mut run = RunConfig { environment: "holdem:station".to_owned(), ..RunConfig::default() };
        let command =
            |run: &RunConfig| join_command("a model", "default", "/ip4/127.0.0.1/tcp/1/p2p/12D3", run);
        let start =
            "rollout-fleet --model 'a model' --network default --trainer /ip4/127.0.0.1/tcp/1/p2p/12D3";
        assert_eq!(command(&run), format!("{start} --env holdem:station"));
        run.environment_program = ["python3", "game.py", "--say", "it's"].map(str::to_owned).to_vec();
        assert_eq!(command(&run), format!(r"{start} --env-program python3 game.py --say 'it'\''s'"));
    }
}
