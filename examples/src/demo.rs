//! The demo: a whole swarm on one machine, every node a process of its own. It starts them, follows what the learner says,
//! asks the trained model a question through a two-stage pipeline, and writes the report.

pub mod auditor;
pub mod learner;
pub mod page;
pub mod plots;
pub mod process;
pub mod report;
pub mod role;
pub mod worker;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use lattica_net::Identity;
use process::Role;
use report::{Chat, Report};
use serde_json::{Value, json};

use crate::program;

/// How long a process may take to start on a busy machine.
const START: Duration = Duration::from_secs(90);
/// How long the learner may be silent: one step, evaluations included.
const SILENCE: Duration = Duration::from_secs(180);
/// Time kept for the chat at the end.
const CHAT: Duration = Duration::from_secs(45);
/// What the trained adapter is called where it is asked.
const TRAINED: &str = "trained";

/// How rollouts and training alternate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// Sample with the newest weights, train, publish, and again.
    Sequential,
    /// Sample and train at the same time.
    Async,
}

impl From<Mode> for echo_trainer::run::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Sequential => Self::Sequential,
            Mode::Async => Self::Async,
        }
    }
}

/// What the demo runs.
#[derive(Debug, Clone, Args)]
pub struct DemoArgs {
    /// The model to train: `tiny` (embedded), a directory, or a .gguf file
    #[arg(long, default_value = "tiny")]
    model: String,
    /// The environment
    #[arg(long, default_value = "arithmetic")]
    env: String,
    /// Worker processes
    #[arg(long, default_value_t = 3)]
    workers: usize,
    /// Let the last worker compute with other weights than it says
    #[arg(long)]
    cheater: bool,
    /// Time for training, minutes
    #[arg(long, default_value_t = 4.0)]
    minutes: f64,
    /// How rollouts and training alternate
    #[arg(long, value_enum, default_value = "sequential")]
    mode: Mode,
    /// Versions that a rollout may lag behind [default: 0, in asynchronous mode 2]
    #[arg(long)]
    staleness: Option<u64>,
    /// Seed of the run
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Learner steps [default: the trainer's]
    #[arg(long)]
    steps: Option<u64>,
    /// Learning rate [default: the trainer's]
    #[arg(long)]
    learning_rate: Option<f64>,
    /// Most tokens of one episode, the environment's words between turns included [default: the trainer's]
    #[arg(long)]
    completion_tokens: Option<u32>,
    /// Held-out tasks of one evaluation
    #[arg(long, default_value_t = 200)]
    eval_tasks: u64,
    /// Where the report, the plots and the logs go
    #[arg(long, default_value = "demo-swarm-out")]
    out: PathBuf,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

/// Runs the demo.
///
/// # Errors
/// Settings that this version cannot do, a process that fails, an unwritable directory.
pub fn run(args: &DemoArgs) -> anyhow::Result<()> {
    args.check()?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("creating {}", args.out.display()))?;
    let report = tokio::runtime::Runtime::new()?.block_on(demo(args))?;
    let path = args.out.join("report.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&report)?)
        .with_context(|| format!("writing {}", path.display()))?;
    program::tell(&format!("{}\nreport: {}", report.for_people(), path.display()), args.json)?;
    if args.json { program::report(&report) } else { Ok(()) }
}

impl DemoArgs {
    fn check(&self) -> anyhow::Result<()> {
        match self.mode {
            Mode::Sequential => ensure!(
                self.staleness() == 0,
                "--staleness {} needs --mode async: the sequential mode trains on nothing older than its weights",
                self.staleness()
            ),
            Mode::Async => ensure!(
                (1..=64).contains(&self.staleness()),
                "--staleness must be 1 to 64 with --mode async, not {}: with 0 nobody could sample while the learner learns",
                self.staleness()
            ),
        }
        ensure!((1..=32).contains(&self.workers), "--workers must be 1 to 32, not {}", self.workers);
        ensure!(
            !self.cheater || self.workers > 1,
            "--cheater needs a second, honest worker: --workers 2 or more"
        );
        ensure!(self.minutes > 0.0 && self.minutes <= 600.0, "--minutes must be above 0 and at most 600");
        ensure!(self.eval_tasks > 0, "--eval-tasks must be at least 1");
        Ok(())
    }

    fn staleness(&self) -> u64 {
        self.staleness.unwrap_or(if self.mode == Mode::Async { 2 } else { 0 })
    }

    fn steps(&self) -> u64 {
        self.steps.unwrap_or_else(|| echo_trainer::TrainerConfig::default().steps)
    }
}

/// A process's place in the network.
struct Seat {
    name: String,
    key: PathBuf,
    ip: String,
    peer: String,
}

impl Seat {
    fn new(dir: &Path, name: &str, number: usize) -> anyhow::Result<Self> {
        let key = dir.join(format!("{name}.key"));
        let peer = Identity::load_or_create(&key)?.peer_id().to_string();
        Ok(Self { name: name.to_owned(), key, ip: format!("127.0.0.{}", number + 2), peer })
    }

    /// Starts the role, which must say that it is ready.
    async fn start(&self, logs: &Path, role: &str, more: &[(&str, String)]) -> anyhow::Result<(Role, Value)> {
        let mut args = vec!["role".into(), role.into()];
        let own = [("--identity", self.key.display().to_string()), ("--ip", self.ip.clone())];
        for (flag, value) in own.iter().chain(more) {
            args.extend([(*flag).to_owned(), value.clone()]);
        }
        let mut process = Role::start(logs, &self.name, &args)?;
        let ready = process.expect("ready", START).await?;
        Ok((process, ready))
    }
}

async fn demo(args: &DemoArgs) -> anyhow::Result<Report> {
    let started = Instant::now();
    let work = tempfile::tempdir().context("making a directory for keys and checkpoints")?;
    let (dir, logs) = (work.path(), args.out.as_path());
    let seat = |name: &str, number| Seat::new(dir, name, number);
    let (bootstrap, learner, auditor) = (seat("bootstrap", 0)?, seat("learner", 1)?, seat("auditor", 2)?);
    let workers =
        (0..args.workers).map(|i| seat(&format!("worker-{i}"), 5 + i)).collect::<Result<Vec<_>, _>>()?;
    let cheater = args.cheater.then(|| workers[workers.len() - 1].peer.clone());

    program::say("starting: bootstrap node, learner, auditor, workers");
    let (bootstrap_process, ready) = bootstrap.start(logs, "bootstrap", &[]).await?;
    let known = first_address(&ready)?;
    let common = [("--bootstrap", known.clone())];
    let learner_args = [
        ("--threads", "2".to_owned()),
        ("--model", args.model.clone()),
        ("--env", args.env.clone()),
        ("--dir", dir.join("run").display().to_string()),
        ("--workers", args.workers.to_string()),
        ("--auditor", auditor.peer.clone()),
        ("--audit-fraction", "0.02".to_owned()),
        ("--audit-first", "4".to_owned()),
        ("--seed", args.seed.to_string()),
        ("--mode", (if args.mode == Mode::Async { "async" } else { "sequential" }).to_owned()),
        ("--staleness", args.staleness().to_string()),
        ("--steps", args.steps().to_string()),
        ("--seconds", format!("{:.0}", args.minutes * 60.0)),
        ("--eval-tasks", args.eval_tasks.to_string()),
    ];
    let rate = args.learning_rate.map(|rate| ("--learning-rate", rate.to_string()));
    let tokens = args.completion_tokens.map(|n| ("--completion-tokens", n.to_string()));
    let learner_args = [&common[..], &learner_args, rate.as_slice(), tokens.as_slice()].concat();
    let (mut learner_process, ready) = learner.start(logs, "learner", &learner_args).await?;
    let trainer = ("--trainer", first_address(&ready)?);
    let model = ("--model", args.model.clone());
    let evidence = ("--evidence", logs.display().to_string());
    let auditor_args = [&common[..], &[trainer.clone(), model.clone(), evidence]].concat();
    let (auditor_process, _) = auditor.start(logs, "auditor", &auditor_args).await?;
    let mut worker_processes = Vec::new();
    for worker in &workers {
        let dtype = if cheater.as_ref() == Some(&worker.peer) { "q4_0" } else { "f32" };
        let more =
            [trainer.clone(), model.clone(), ("--env", args.env.clone()), ("--dtype", dtype.to_owned())];
        worker_processes.push(worker.start(logs, "worker", &[&common[..], &more].concat()).await?.0);
    }

    let mut report = Report::new(&args.model, &args.env, args.workers);
    follow(&mut learner_process, &mut report, args.steps()).await?;
    learner_process.stop().await;
    auditor_process.stop().await;
    for process in worker_processes {
        process.stop().await;
    }
    if let Some(peer) = cheater {
        report.judge_cheater(&peer);
    }
    program::say("asking the trained model through a pipeline of two processes");
    report.chat = Some(chat(args, dir, &known, report.adapter.as_deref()).await?);
    bootstrap_process.stop().await;
    report.seconds = started.elapsed().as_secs_f64();
    report.write(&args.out)?;
    Ok(report)
}

/// Reads what the learner says until it is done.
async fn follow(learner: &mut Role, report: &mut Report, steps: u64) -> anyhow::Result<()> {
    let style = ProgressStyle::with_template("training [{bar:30}] {pos}/{len} steps, {elapsed} {msg}")?;
    let bar = ProgressBar::new(steps).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(500));
    loop {
        let event = tokio::time::timeout(SILENCE, learner.next()).await;
        let Some(event) = event.map_err(|_| silent(learner))?? else {
            bail!("the learner ended early; its log ends with:\n{}", learner.log_tail());
        };
        let done = event["event"] == "done";
        if let Some(news) = report.take(&event) {
            bar.suspend(|| program::say(&news));
        }
        bar.set_position(report.versions);
        bar.set_message(report.headline());
        if done {
            bar.finish_and_clear();
            return Ok(());
        }
    }
}

fn silent(learner: &Role) -> anyhow::Error {
    anyhow::anyhow!(
        "the learner said nothing for {} s; its log ends with:\n{}",
        SILENCE.as_secs(),
        learner.log_tail()
    )
}

fn first_address(ready: &Value) -> anyhow::Result<String> {
    Ok(ready["addrs"][0].as_str().context("a node that is ready has an address")?.to_owned())
}

/// Serves the trained model over two processes and asks it what it was trained for.
async fn chat(args: &DemoArgs, dir: &Path, bootstrap: &str, adapter: Option<&str>) -> anyhow::Result<Chat> {
    let listen = |n: u8| [format!("/ip4/127.0.0.{n}/udp/0/quic-v1"), format!("/ip4/127.0.0.{n}/tcp/0")];
    let text = |parts: &[&str]| parts.iter().map(|p| (*p).to_owned()).collect::<Vec<_>>();
    let cache = dir.join("weights").display().to_string();
    let common = |n: u8, bootstrap: &str| {
        let [quic, tcp] = listen(n);
        text(&[
            "--swarm",
            "demo-chat",
            "--bootstrap",
            bootstrap,
            "--listen",
            &quic,
            "--listen",
            &tcp,
            "--cache-dir",
            &cache,
        ])
    };
    let mut serve =
        text(&["role", "serve", "--model", &args.model, "--dtype", "f32", "--port", "0", "--json"]);
    serve.extend(common(5, bootstrap));
    if let Some(adapter) = adapter {
        serve.extend(text(&["--adapter", &format!("{TRAINED}={adapter}")]));
    }
    let mut head = Role::start(&args.out, "serve", &serve)?;
    let ready =
        tokio::time::timeout(START, head.next()).await.context("the head did not start in time")??;
    let ready = ready.with_context(|| format!("the head ended; its log ends with:\n{}", head.log_tail()))?;
    let url = ready["url"].as_str().context("the head says where it listens")?.to_owned();
    let mut join = text(&["role", "join"]);
    join.extend(common(6, &first_address(&ready)?));
    let stage = Role::start(&args.out, "join", &join)?;

    let client = reqwest::Client::builder().timeout(CHAT).build()?;
    let deadline = Instant::now() + START;
    let mut stages = 0;
    while stages < 2 {
        if Instant::now() > deadline {
            bail!("no pipeline of two stages formed; the head's log ends with:\n{}", head.log_tail());
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        let healthy = client.get(format!("{url}/health")).send().await.is_ok_and(|r| r.status().is_success());
        if healthy {
            let status: Value = client.get(format!("{url}/swarm/status")).send().await?.json().await?;
            let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
            stages = nodes.iter().filter(|n| n["layers"].is_array()).count();
        }
    }
    let prompt = "What is 12+34?";
    let mut body =
        json!({"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 48});
    if adapter.is_some() {
        body["model"] = json!(TRAINED);
    }
    let response = client.post(format!("{url}/v1/chat/completions")).json(&body).send().await?;
    let answer: Value = response.json().await.context("the pipeline's answer is JSON")?;
    let reply = answer["choices"][0]["message"]["content"].as_str();
    let reply = reply.with_context(|| format!("the pipeline answered {answer}"))?.to_owned();
    stage.stop().await;
    head.stop().await;
    Ok(Chat { prompt: prompt.to_owned(), reply, stages })
}
