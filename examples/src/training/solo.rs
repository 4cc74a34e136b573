//! `training-swarm solo`: a run in one process. For opponents that change with the policy (`kuhn:best`, `holdem:self`), and
//! for trying settings out.

mod past;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use echo_rollout::environment::Guests;
use echo_rollout::environment::cards::{Shared, Speaker};
use echo_trainer::RunConfig;
use echo_trainer::exploitability::{ExploitabilityError, strategies};
use echo_trainer::service::evaluation::{Evaluation, Player};
use echo_trainer::service::{Solo, SoloStep, learner::weights_file};
use parallax_model::Checkpoint;
use parallax_model::train::TrainModel;
use past::PastSelf;
use serde::{Deserialize, Serialize};
use serde_json::json;
use swarm_wire::PolicyVersion;

use crate::demo::plots::{Series, line_plot};
use crate::program;
use crate::rollouts::{
    EngineSampler, ModelText, endpoint, environment, environment_name, environment_with, guests, trainable,
};

/// Cached positions of the engine.
const CACHE_TOKENS: usize = 32 * 1024;
/// Points of a curve of exploitability over a run.
const CURVE_POINTS: u64 = 40;

/// Train in one process: no network, no workers; games may be played against what changes with the policy.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Report: {\"model\",\"env\",\"steps\",\"eval_before\",\"eval_after\",\"eval_before_ci95\",\"eval_after_ci95\",\"eval_greedy_before\",\
                  \"eval_greedy_after\",\"eval_greedy_before_ci95\",\"eval_greedy_after_ci95\",\"eval_tasks\",\"exploitability_before\",\"exploitability_after\",\
                  \"exploitability_curve\":[[VERSION,ANTES]],\"rewards\":[PER STEP],\"seconds\",\"train_seconds\",\"adapter\",\"plots\"}; exploitability \
                  (antes per hand) for kuhn and leduc, else null. With --json each step is a line before it: {\"event\":\"step\",\"version\",\"reward\",\
                  \"loss\",\"grad_norm\",\"staleness_max\",\"ratio_deviation_max\",\"flat_groups\",\"exploitability\"}; flat_groups had equal rewards and \
                  were replaced (dynamic_sampling)."
)]
pub struct SoloArgs {
    /// Settings, for example examples/configs/kuhn.toml
    #[arg(long)]
    config: PathBuf,
    /// The model, instead of the settings'
    #[arg(long)]
    model: Option<String>,
    /// The environment, instead of the settings'
    #[arg(long)]
    env: Option<String>,
    /// Seed, instead of the settings'
    #[arg(long)]
    seed: Option<u64>,
    /// Learner steps, instead of the settings'
    #[arg(long)]
    steps: Option<u64>,
    /// Where the adapter and the plots go
    #[arg(long, default_value = "solo-out")]
    out: PathBuf,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

/// The file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Settings {
    /// `tiny`, a directory, a .gguf file, or a repository in the local hub cache.
    pub(super) model: String,
    /// What held-out hands are played against; empty: what the run plays.
    eval_environment: String,
    /// Threads of the CPU kernels; 0: all cores.
    threads: usize,
    /// `trainer.max_staleness` is how many versions behind all rollouts are. Workers and audits are not looked at.
    run: RunConfig,
}

impl Default for Settings {
    fn default() -> Self {
        let (model, eval_environment) = ("tiny".to_owned(), String::new());
        Self { model, eval_environment, threads: 0, run: RunConfig::default() }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    env: String,
    steps: u64,
    eval_tasks: u64,
    eval_before: f64,
    eval_after: f64,
    eval_before_ci95: [f64; 2],
    eval_after_ci95: [f64; 2],
    eval_greedy_before: f64,
    eval_greedy_after: f64,
    eval_greedy_before_ci95: [f64; 2],
    eval_greedy_after_ci95: [f64; 2],
    exploitability_before: Option<f64>,
    exploitability_after: Option<f64>,
    exploitability_curve: Vec<(f64, f64)>,
    rewards: Vec<f64>,
    seconds: f64,
    train_seconds: f64,
    adapter: PathBuf,
    plots: Vec<PathBuf>,
}

/// Runs it.
///
/// # Errors
/// Settings out of range, an unknown environment, a model that cannot be trained, a full disk.
pub fn run(args: &SoloArgs) -> anyhow::Result<()> {
    let settings = settings(args)?;
    std::fs::create_dir_all(&args.out).with_context(|| format!("creating {}", args.out.display()))?;
    let report = tokio::runtime::Runtime::new()?.block_on(train(&settings, &args.out, args.json))?;
    program::tell(&report.for_people(), args.json)?;
    if args.json { program::report(&report) } else { Ok(()) }
}

/// The file, with what the flags say instead.
fn settings(args: &SoloArgs) -> anyhow::Result<Settings> {
    let mut settings: Settings = program::settings(&args.config)?;
    settings.model = args.model.clone().unwrap_or(settings.model);
    let run = &mut settings.run;
    if let Some(environment) = &args.env {
        run.environment.clone_from(environment);
        // It would come before the one by name.
        run.environment_program.clear();
    }
    run.seed = args.seed.unwrap_or(run.seed);
    run.trainer.steps = args.steps.unwrap_or(run.trainer.steps);
    Ok(settings)
}

/// A loaded model with everything that plays and learns.
pub(super) struct Bench {
    pub(super) solo: Solo<TrainModel>,
    text: Arc<ModelText>,
    /// Kept the best answer to the policy.
    best: Option<Arc<Shared>>,
    /// Kept an earlier version of the policy.
    past: Option<Arc<PastSelf>>,
    /// The version that was studied last, and what it gives away.
    studied: Option<(PolicyVersion, Option<f64>)>,
    /// What reports call the environment.
    pub(super) env: String,
}

impl Bench {
    /// Loads model and opponents for `run`.
    ///
    /// # Errors
    /// Settings out of range, an unknown environment, weights that cannot be read.
    pub(super) fn set_up(model: &str, run: &RunConfig) -> anyhow::Result<Self> {
        // Lag is forced here, not allowed: the mode that a swarm would need for it is not looked at.
        let mode = if run.trainer.max_staleness > 0 { echo_trainer::run::Mode::Async } else { run.mode };
        if let Err(faults) = (RunConfig { mode, ..run.clone() }).validate() {
            bail!("settings of the run:\n{faults}");
        }
        let checkpoint = Checkpoint::resolve(model)?;
        let text = Arc::new(ModelText::open(&checkpoint)?);
        let sampler = Arc::new(EngineSampler::load(&checkpoint, run.trainer.base_dtype, CACHE_TOKENS)?);
        let opponent = run.environment.split_once(':').map(|(_, opponent)| opponent);
        let best = (opponent == Some("best")).then(Arc::<Shared>::default);
        let past = match opponent {
            Some("self") => Some(Arc::new(PastSelf::load(&checkpoint, run, CACHE_TOKENS)?)),
            _ => None,
        };
        let speaker = |who: &str| match (&past, who) {
            (Some(past), "self") => Ok(Arc::clone(past) as Arc<dyn Speaker>),
            _ => endpoint(who),
        };
        let guests = Guests { best: best.clone(), speaker: &speaker, ..guests() };
        let environment = environment_with(&run.environment, &run.environment_program, &guests)?;
        let env = environment_name(run, &*environment);
        let player = Player { sampler, text: text.clone(), environment };
        let solo = Solo::new(run, trainable(&checkpoint, run)?, player)?;
        Ok(Self { solo, text, best, past, studied: None, env })
    }

    /// Makes a step against opponents that are up to date, or none when it is later than `until` before it has its groups.
    ///
    /// # Errors
    /// What the step cannot do.
    pub(super) async fn step(&mut self, until: Option<Instant>) -> anyhow::Result<Option<SoloStep>> {
        if self.best.is_some() {
            self.study()?;
        }
        if let Some(past) = &self.past {
            past.meet(self.solo.version(), self.solo.weights()).await?;
        }
        Ok(self.solo.step(until).await?)
    }

    /// What the present policy gives away in antes per hand, in a game that is small enough, against a best answer that is
    /// kept in the other seat where the run plays one. Looks once at each version.
    fn study(&mut self) -> anyhow::Result<Option<f64>> {
        let version = self.solo.version();
        if let Some((_, gives)) = self.studied.filter(|(studied, _)| *studied == version) {
            return Ok(gives);
        }
        let gives = match strategies(self.solo.environment().name(), self.solo.policy(), &*self.text) {
            Ok(found) => {
                if let Some(best) = &self.best {
                    best.replace(found.best);
                }
                Some(found.figures.exploitability)
            }
            Err(ExploitabilityError::Game { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        self.studied = Some((version, gives));
        Ok(gives)
    }
}

async fn train(settings: &Settings, out: &Path, json: bool) -> anyhow::Result<Report> {
    let started = Instant::now();
    if settings.threads > 0 {
        parallax_kernels::pool::set_threads(settings.threads);
    }
    let run = &settings.run;
    let mut bench = Bench::set_up(&settings.model, run)?;
    if !settings.eval_environment.is_empty() {
        bench.solo.measure_on(environment(&settings.eval_environment, &[])?);
    }
    let before = bench.measure().await?;
    say_measured(0, &before, run.eval_tasks);
    let (mut rewards, mut curve) = (Vec::new(), Vec::new());
    curve.extend(before.1.map(|gives| (0.0, gives)));
    // None for a time that no clock reaches.
    let until = started.checked_add(Duration::from_secs(run.seconds));
    let training = Instant::now();
    let every = (run.trainer.steps / CURVE_POINTS).max(1);
    for _ in 0..run.trainer.steps {
        let Some(SoloStep { report, flat_groups }) = bench.step(until).await? else { break };
        let version = report.version.0;
        rewards.push(report.reward_mean);
        let gives = if version.is_multiple_of(every) { bench.study()? } else { None };
        curve.extend(gives.map(|gives| (version as f64, gives)));
        let line = json!({"event": "step", "version": version, "reward": report.reward_mean, "loss": report.loss.loss,
            "grad_norm": report.grad_norm, "staleness_max": report.staleness_max,
            "ratio_deviation_max": report.loss.ratio_deviation_max, "flat_groups": flat_groups, "exploitability": gives});
        if json {
            program::report(&line)?;
        }
        if version.is_multiple_of(every) {
            let gives = gives.map(|gives| format!(", exploitability {gives:.4}")).unwrap_or_default();
            let seconds = started.elapsed().as_secs_f64();
            program::say(&format!(
                "step {version:4}  reward {:+.3}{gives}  {seconds:.0} s",
                report.reward_mean
            ));
        }
    }
    let train_seconds = training.elapsed().as_secs_f64();
    let after = bench.measure().await?;
    say_measured(bench.solo.version().0, &after, run.eval_tasks);
    let weights = bench.solo.weights();
    let adapter = out.join(weights_file(weights));
    if bench.solo.version().0 > 0 {
        std::fs::write(&adapter, weights.bytes())
            .with_context(|| format!("writing {}", adapter.display()))?;
    }
    if run.trainer.full {
        bench.solo.policy().save_companions(out)?;
    }
    let ((one, gave), (two, gives)) = (before, after);
    let mut report = Report {
        model: settings.model.clone(),
        env: bench.env.clone(),
        steps: bench.solo.version().0,
        eval_tasks: run.eval_tasks,
        eval_before: one.eval,
        eval_after: two.eval,
        eval_before_ci95: one.eval_ci95,
        eval_after_ci95: two.eval_ci95,
        eval_greedy_before: one.eval_greedy,
        eval_greedy_after: two.eval_greedy,
        eval_greedy_before_ci95: one.eval_greedy_ci95,
        eval_greedy_after_ci95: two.eval_greedy_ci95,
        exploitability_before: gave,
        exploitability_after: gives,
        exploitability_curve: curve,
        rewards,
        seconds: 0.0,
        train_seconds,
        adapter,
        plots: Vec::new(),
    };
    report.plot(out)?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

type Measured = (Evaluation, Option<f64>);

impl Bench {
    async fn measure(&mut self) -> anyhow::Result<Measured> {
        // First, because held-out hands may be played against the best answer.
        let gives = self.study()?;
        Ok((self.solo.evaluate().await?, gives))
    }
}

fn say_measured(version: u64, (e, gives): &Measured, tasks: u64) {
    let [low, high] = e.eval_ci95;
    let gives = gives.map(|gives| format!(", exploitability {gives:.4} antes")).unwrap_or_default();
    program::say(&format!(
        "version {version}: {:+.3} per held-out task (95 % of {tasks}: {low:+.3} to {high:+.3}), greedy {:+.3}{gives}",
        e.eval, e.eval_greedy
    ));
}

impl Report {
    fn plot(&mut self, dir: &Path) -> anyhow::Result<()> {
        let title = format!("{} on {}", self.model, self.env);
        let points = |values: &[f64]| values.iter().zip(1_u64..).map(|(r, i)| (i as f64, *r)).collect();
        let rewards = [Series { name: "rollouts", color: "#2f6f5e", points: points(&self.rewards) }];
        self.plots.push(line_plot(
            &dir.join("reward.svg"),
            &title,
            "policy version",
            "mean reward",
            &rewards,
        )?);
        if !self.exploitability_curve.is_empty() {
            let points = self.exploitability_curve.clone();
            let gives = [Series { name: "exploitability", color: "#c2571a", points }];
            let path = dir.join("exploitability.svg");
            self.plots.push(line_plot(&path, &title, "policy version", "antes per hand", &gives)?);
        }
        Ok(())
    }

    fn for_people(&self) -> String {
        let mut lines = vec![format!(
            "{} steps in {:.0} s, {:.0} s in all; reward {:+.3} -> {:+.3}",
            self.steps, self.train_seconds, self.seconds, self.eval_before, self.eval_after
        )];
        if let (Some(before), Some(after)) = (&self.exploitability_before, &self.exploitability_after) {
            lines.push(format!("exploitability {before:.4} -> {after:.4} antes per hand"));
        }
        lines.push(format!("adapter: {}", self.adapter.display()));
        lines.extend(self.plots.iter().map(|p| format!("plot: {}", p.display())));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use clap::FromArgMatches as _;

    use super::*;

    #[test]
    fn an_environment_that_is_named_takes_the_place_of_a_program() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        std::fs::write(&path, "[run]\nenvironment_program = [\"python3\", \"game.py\"]\nseed = 5\n").unwrap();
        let run = |more: &[&str]| {
            let command = SoloArgs::augment_args(clap::Command::new("solo").no_binary_name(true));
            let config = ["--config", path.to_str().unwrap()];
            let matches = command.get_matches_from([&config[..], more].concat());
            settings(&SoloArgs::from_arg_matches(&matches).unwrap()).unwrap().run
        };
        let (file, named) = (run(&[]), run(&["--env", "kuhn", "--seed", "6"]));
        assert_eq!((file.environment_program.len(), file.seed), (2, 5));
        assert_eq!((&*named.environment, named.environment_program.len(), named.seed), ("kuhn", 0, 6));
    }
}
