//! `training-swarm --config`: the learner of a swarm over many machines. Workers join it with `rollout-fleet`.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::Args;
use echo_trainer::RunConfig;
use lattica_bitswap::Blocks;
use lattica_net::{Identity, Node, NodeConfig};
use parallax_model::{BaseDtype, Checkpoint};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::demo::report::{Prices, Report};
use crate::network::{NetworkArgs, THIS_MACHINE};
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
    /// Name of the network.
    network: String,
    /// Where it listens (else on this machine only), whom it joins through, the swarm's key.
    #[serde(flatten)]
    place: NetworkArgs,
    /// Carry connections of workers that cannot reach each other.
    relay: bool,
    /// Look for workers on the local network.
    mdns: bool,
    /// Remember peers here, and find back through them when no bootstrap peer is left.
    peers_file: Option<PathBuf>,
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
            network: "default".to_owned(),
            place: NetworkArgs::default(),
            relay: false,
            mdns: false,
            peers_file: None,
        }
    }
}

impl NodeSettings {
    /// What the node is started with.
    ///
    /// # Errors
    /// Everything that is wrong, one sentence each.
    fn config(&self) -> Result<NodeConfig, Vec<String>> {
        let place = self.place.config(&self.network, THIS_MACHINE)?;
        let peers_file = self.peers_file.clone();
        Ok(NodeConfig { relay_server: self.relay, mdns: self.mdns, peers_file, ..place })
    }

    /// What workers in this network are told with the learner's `address`.
    fn worker_words<'a>(&'a self, address: &'a str) -> Vec<Cow<'a, str>> {
        let mut words = ["--network", &self.network, "--trainer", address].map(Cow::from).to_vec();
        if self.relay {
            words.extend(["--via", address].map(Cow::from));
        }
        if let Some(key) = &self.place.swarm_key {
            words.extend(["--swarm-key".into(), key.to_string_lossy()]);
        }
        words
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
    let node = settings.node.config();
    let run = settings.run.validate().err().into_iter().flat_map(|faults| faults.0);
    let mut faults: Vec<String> = run.map(|fault| fault.to_string()).collect();
    faults.extend(node.as_ref().err().into_iter().flatten().map(|fault| format!("node: {fault}")));
    match node {
        Ok(node) if faults.is_empty() => {
            tokio::runtime::Runtime::new()?.block_on(serve(settings, node, args.json))
        }
        _ => bail!("settings in {}:\n{}", path.display(), faults.join("\n")),
    }
}

async fn serve(settings: Settings, config: NodeConfig, json: bool) -> anyhow::Result<()> {
    let Settings { model, dir, threads, node, prices, run } = settings;
    if threads > 0 {
        parallax_kernels::pool::set_threads(threads);
    }
    let mut report = Report::new(&model, &run.environment, run.workers).priced(prices);
    let started = std::time::Instant::now();
    let learner = Node::start(Identity::load_or_create(&node.identity)?, config).await?;
    learn(learner, &model, run.clone(), &dir, |event| {
        let listening = event["addrs"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let mut addresses: Vec<String> = listening.map(str::to_owned).collect();
        if let (false, Some(peer)) = (addresses.is_empty(), event["peer"].as_str()) {
            addresses.extend(node.place.external.iter().map(|address| format!("{address}/p2p/{peer}")));
        }
        for address in &addresses {
            program::say(&format!("workers: {}", join_command(&model, &node, address, &run)));
            if !run.assistants.is_empty() {
                program::say(&format!("assistants: {}", assist_command(&model, &node, address)));
            }
            if !run.auditors.is_empty() {
                program::say(&format!("auditors: {}", audit_command(&model, &node, address, &run)));
            }
        }
        if let Some(news) = report.take(event) {
            program::say(&news);
        }
        if json && event["event"] != "done" { program::report(event) } else { Ok(()) }
    })
    .await?;
    report.seconds = started.elapsed().as_secs_f64();
    report.write(&dir)?;
    program::tell(&report.for_people(), json)?;
    if json { program::report(&report) } else { Ok(()) }
}

/// What starts workers of `run`. The environment comes last: a program takes all words that follow.
fn join_command(model: &str, node: &NodeSettings, address: &str, run: &RunConfig) -> String {
    let mut words: Vec<Cow<'_, str>> = ["rollout-fleet", "--model", model].map(Cow::from).to_vec();
    words.extend(node.worker_words(address));
    words.extend(format_words(run));
    if run.environment_program.is_empty() {
        words.extend(["--env", &run.environment].map(Cow::from));
    } else {
        words.push("--env-program".into());
        words.extend(run.environment_program.iter().map(Cow::from));
    }
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// In which format workers and auditors have the weights, where it is not f32.
fn format_words(run: &RunConfig) -> Vec<Cow<'static, str>> {
    match run.trainer.base_dtype {
        BaseDtype::F32 => Vec::new(),
        other => vec!["--base-dtype".into(), other.to_string().into()],
    }
}

/// What starts an auditor of `run`.
fn audit_command(model: &str, node: &NodeSettings, address: &str, run: &RunConfig) -> String {
    let mut words: Vec<Cow<'_, str>> = ["veri-audit", "run", "--model", model].map(Cow::from).to_vec();
    words.extend(node.worker_words(address));
    words.extend(format_words(run));
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// What starts an assistant.
fn assist_command(model: &str, node: &NodeSettings, address: &str) -> String {
    let mut words: Vec<Cow<'_, str>> = ["training-swarm", "assist", "--model", model].map(Cow::from).to_vec();
    words.extend(node.worker_words(address));
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
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
    fn the_example_settings_are_the_defaults_and_unknown_ones_are_named() {
        let example = include_str!("../../configs/training-swarm.toml");
        let settings: Settings = toml::from_str(example).unwrap();
        assert_eq!(settings.run, RunConfig::default());
        let (given, default) = (settings.node.config().unwrap(), NodeSettings::default().config().unwrap());
        assert_eq!(format!("{given:?}"), format!("{default:?}"));
        let unknown = toml::from_str::<Settings>("[node]\nswarmkey = \"k\"\n").unwrap_err();
        assert!(unknown.to_string().contains("swarmkey"), "{unknown}");
    }

    #[test]
    fn workers_are_told_what_the_learner_trains_on() {
        let mut run = RunConfig { environment: "holdem:station".to_owned(), ..RunConfig::default() };
        let mut node = NodeSettings::default();
        let address = "/ip4/127.0.0.1/tcp/1/p2p/12D3";
        let command = |run: &RunConfig| join_command("a model", &NodeSettings::default(), address, run);
        let start =
            "rollout-fleet --model 'a model' --network default --trainer /ip4/127.0.0.1/tcp/1/p2p/12D3";
        assert_eq!(command(&run), format!("{start} --env holdem:station"));
        let mut thin = run.clone();
        thin.trainer.base_dtype = BaseDtype::Bf16;
        assert_eq!(command(&thin), format!("{start} --base-dtype bf16 --env holdem:station"));
        assert_eq!(
            audit_command("tiny", &NodeSettings::default(), address, &thin),
            format!("veri-audit run --model tiny --network default --trainer {address} --base-dtype bf16")
        );
        run.environment_program = ["python3", "game.py", "--say", "it's"].map(str::to_owned).to_vec();
        assert_eq!(command(&run), format!(r"{start} --env-program python3 game.py --say 'it'\''s'"));
        node.relay = true;
        node.place.swarm_key = Some("swarm.key".into());
        let assistant = assist_command("tiny", &node, address);
        assert!(
            assistant.starts_with("training-swarm assist --model tiny --network default --trainer"),
            "{assistant}"
        );
        assert!(assistant.ends_with(&format!("--via {address} --swarm-key swarm.key")), "{assistant}");
        let private = join_command("tiny", &node, address, &run);
        assert!(
            private.contains(&format!("--via {address} --swarm-key swarm.key --env-program")),
            "{private}"
        );
    }
}
