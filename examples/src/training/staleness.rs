//! `training-swarm staleness`: what training on old rollouts does, with and without corrections. Real learning in one
//! process: every step's rollouts are just as many versions old as the curve says.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use clap::Args;
use echo_trainer::service::SoloStep;
use echo_trainer::{LossConfig, RunConfig};
use serde::{Deserialize, Serialize};

use super::solo::Bench;
use crate::demo::plots::{Series, line_plot};
use crate::program;

const COLORS: [&str; 6] = ["#2f6f5e", "#3b5b92", "#8a6d1f", "#7a3b8f", "#c2571a", "#b3261e"];

/// Train with rollouts that are 0, 1, 3, 6 and 11 versions old, with each of the settings' losses, and draw the rewards.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Report: {\"model\",\"env\",\"steps\",\"runs\":[{\"staleness\",\"loss\",\"staleness_max\",\"reward_last\",\"eval_before\",\"eval_after\",\
                  \"eval_after_ci95\",\"rewards\":[PER STEP],\"seconds\"}],\"plots\"}; reward_last is the mean over the last fifth of the steps."
)]
pub struct StalenessArgs {
    /// Settings, for example examples/configs/staleness.toml
    #[arg(long)]
    config: PathBuf,
    /// The model, instead of the settings'
    #[arg(long)]
    model: Option<String>,
    /// How old rollouts are, in versions; at most six values, each at most 64
    #[arg(long, value_delimiter = ',', default_value = "0,1,3,6,11")]
    staleness: Vec<u64>,
    /// Learner steps of each run, instead of the settings'
    #[arg(long)]
    steps: Option<u64>,
    /// Seed, instead of the settings'
    #[arg(long)]
    seed: Option<u64>,
    /// Where the plots go
    #[arg(long, default_value = "staleness-out")]
    out: PathBuf,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

/// The file.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    /// `tiny`, a directory, a .gguf file, or a repository in the local hub cache.
    model: String,
    /// Losses to compare, instead of the run's.
    losses: Vec<Named>,
    #[serde(default)]
    run: RunConfig,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    name: String,
    loss: LossConfig,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    env: String,
    steps: u64,
    runs: Vec<Outcome>,
    plots: Vec<PathBuf>,
}

#[derive(Debug, Serialize)]
struct Outcome {
    staleness: u64,
    loss: String,
    staleness_max: u64,
    reward_last: f64,
    eval_before: f64,
    eval_after: f64,
    eval_after_ci95: [f64; 2],
    rewards: Vec<f64>,
    seconds: f64,
}

/// Runs it.
///
/// # Errors
/// Settings out of range, a model that cannot be trained, a full disk.
pub fn run(args: &StalenessArgs) -> anyhow::Result<()> {
    let mut settings: Settings = program::settings(&args.config)?;
    settings.model = args.model.clone().unwrap_or(settings.model);
    settings.run.trainer.steps = args.steps.unwrap_or(settings.run.trainer.steps);
    settings.run.seed = args.seed.unwrap_or(settings.run.seed);
    ensure!(!settings.losses.is_empty(), "{} names no [[losses]] to compare", args.config.display());
    ensure!(
        args.staleness.len() <= COLORS.len() && args.staleness.iter().all(|s| *s <= 64),
        "--staleness takes at most {} values, each at most 64",
        COLORS.len()
    );
    let files: BTreeSet<String> = settings.losses.iter().map(|named| file_name(&named.name)).collect();
    ensure!(
        files.len() == settings.losses.len(),
        "{} has [[losses]] with the same name, as far as letters and digits go; each is drawn into a file of its name",
        args.config.display()
    );
    std::fs::create_dir_all(&args.out).with_context(|| format!("creating {}", args.out.display()))?;
    let runtime = tokio::runtime::Runtime::new()?;
    let mut report = Report {
        model: settings.model.clone(),
        env: String::new(),
        steps: settings.run.trainer.steps,
        runs: Vec::new(),
        plots: Vec::new(),
    };
    for named in &settings.losses {
        for staleness in &args.staleness {
            let run = runtime.block_on(report.learn(&settings, named, *staleness))?;
            let line = format!(
                "staleness {staleness:2}, {}: reward {:.3} at the end, held out {:.3} -> {:.3}, {:.0} s",
                named.name, run.reward_last, run.eval_before, run.eval_after, run.seconds
            );
            program::tell(&line, args.json)?;
        }
    }
    report.plot(args)?;
    if args.json { program::report(&report) } else { Ok(()) }
}

/// Of a loss's plot.
fn file_name(loss: &str) -> String {
    let word: String = loss.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    format!("staleness-{}.svg", word.to_ascii_lowercase())
}

impl Report {
    /// Adds one run; all begin with the same policy on the same tasks, which the first has measured.
    async fn learn(
        &mut self,
        settings: &Settings,
        named: &Named,
        staleness: u64,
    ) -> anyhow::Result<&Outcome> {
        let started = std::time::Instant::now();
        let mut run = settings.run.clone();
        run.trainer.max_staleness = staleness;
        run.trainer.loss = named.loss;
        let mut bench = Bench::set_up(&settings.model, &run)?;
        let eval_before = match self.runs.first() {
            Some(first) => first.eval_before,
            None => bench.solo.evaluate().await?.eval,
        };
        let (mut rewards, mut staleness_max) = (Vec::new(), 0);
        for _ in 0..run.trainer.steps {
            let Some(SoloStep { report, .. }) = bench.step(None).await? else { break };
            rewards.push(report.reward_mean);
            staleness_max = staleness_max.max(report.staleness_max);
        }
        let after = bench.solo.evaluate().await?;
        let last = &rewards[rewards.len() - rewards.len().div_ceil(5)..];
        self.env = bench.env;
        let outcome = Outcome {
            staleness,
            loss: named.name.clone(),
            staleness_max,
            reward_last: last.iter().sum::<f64>() / last.len().max(1) as f64,
            eval_before,
            eval_after: after.eval,
            eval_after_ci95: after.eval_ci95,
            rewards,
            seconds: started.elapsed().as_secs_f64(),
        };
        self.runs.push(outcome);
        Ok(&self.runs[self.runs.len() - 1])
    }

    /// One plot for each loss, with a line for each age.
    fn plot(&mut self, args: &StalenessArgs) -> anyhow::Result<()> {
        let mut losses: Vec<&str> = self.runs.iter().map(|r| r.loss.as_str()).collect();
        losses.dedup();
        let mut plots = Vec::new();
        for loss in losses {
            let runs = self.runs.iter().filter(|r| r.loss == loss);
            let names: Vec<(String, &Outcome)> = runs.map(|r| (format!("S = {}", r.staleness), r)).collect();
            let lines: Vec<Series<'_>> = names
                .iter()
                .zip(COLORS)
                .map(|((name, run), color)| {
                    let points = run.rewards.iter().zip(1_u64..).map(|(r, i)| (i as f64, *r)).collect();
                    Series { name, color, points }
                })
                .collect();
            let title = format!("{} on {}: {loss}", self.model, self.env);
            let path = args.out.join(file_name(loss));
            plots.push(line_plot(&path, &title, "policy version", "mean reward of rollouts", &lines)?);
        }
        for plot in &plots {
            program::tell(&format!("plot: {}", plot.display()), args.json)?;
        }
        self.plots = plots;
        Ok(())
    }
}
