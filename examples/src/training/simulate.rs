//! `training-swarm simulate`: a swarm in virtual time, before money is spent on a real one.

use std::path::PathBuf;

use clap::Args;
use echo_rollout::fleet::{KindCount, Plan};
use echo_rollout::simulation::{Outcome, Scenario};
use serde::Serialize;

use crate::program;

/// Choose the cheapest workers for a scenario, forecast what they yield, and play the run in virtual time.
#[derive(Debug, Clone, Args)]
#[command(
    after_help = "Report: {\"staleness_budget\",\"learner_utilisation\",\"predicted_utilisation\",\"step_s\",\"predicted_step_s\",\"cost_per_step\",\
                  \"predicted_cost_per_step\",\"workers_selected\":[{\"kind\",\"count\"}],\"fleet_changes\":[{\"after_steps\",\"at_s\",\"workers\",\"price_per_hour\"}],\"max_staleness\",\"mean_staleness\",\"leased\",\"consumed\",\
                  \"dropped_stale\",\"dropped_with_worker\",\"central_step_s\",\"central_cost_per_step\",\"saving\",\"digest\",\"plan\":PLAN,\"curve\":[the same, for \
                  each --curve]}; PLAN is {\"counts\",\"exact\",\"meets_budget\",\"forecast\":{\"step_s\",\"utilisation\",\"rate_per_s\",\"min_staleness\",\
                  \"cost_per_step\"},\"more\":[{\"kind\",\"count\"}]}, which is all that --plan prints. Prices are in the scenario's currency."
)]
pub struct SimulateArgs {
    /// The scenario, for example examples/configs/simulate.toml
    #[arg(long)]
    scenario: PathBuf,
    /// Versions that a trajectory may lag behind, instead of the scenario's
    #[arg(long)]
    staleness: Option<u64>,
    /// The same for each of these budgets
    #[arg(long, value_delimiter = ',', conflicts_with = "plan")]
    curve: Vec<u64>,
    /// Choose and forecast only; play nothing
    #[arg(long)]
    plan: bool,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    outcome: Outcome,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    curve: Vec<Outcome>,
}

/// Runs it.
///
/// # Errors
/// A missing or malformed file, settings out of range, a swarm that gets stuck.
pub fn run(args: &SimulateArgs) -> anyhow::Result<()> {
    let mut scenario: Scenario = program::settings(&args.scenario)?;
    scenario.staleness_budget = args.staleness.unwrap_or(scenario.staleness_budget);
    if args.plan {
        let plan = scenario.plan()?;
        tell_plan(&scenario, &plan, args.json)?;
        return if args.json { program::report(&plan) } else { Ok(()) };
    }
    let outcome = scenario.run()?;
    tell_plan(&scenario, &outcome.plan, args.json)?;
    tell(&outcome, args.json)?;
    let mut curve = Vec::new();
    for staleness_budget in &args.curve {
        let point = Scenario { staleness_budget: *staleness_budget, ..scenario.clone() }.run()?;
        tell(&point, args.json)?;
        curve.push(point);
    }
    if args.json { program::report(&Report { outcome, curve }) } else { Ok(()) }
}

fn tell_plan(scenario: &Scenario, plan: &Plan, json: bool) -> anyhow::Result<()> {
    let fleet: Vec<String> = scenario
        .workers
        .iter()
        .zip(&plan.counts)
        .filter(|(_, n)| **n > 0)
        .map(|(k, n)| format!("{n} {}", k.name))
        .collect();
    let f = &plan.forecast;
    let line = format!(
        "{}: steps of {:.1} s, learner busy {:.0} %, {:.4} a step",
        if fleet.is_empty() { "no workers".to_owned() } else { fleet.join(" + ") },
        f.step_s,
        100.0 * f.utilisation,
        f.cost_per_step
    );
    program::tell(&line, json)?;
    if f.min_staleness > scenario.staleness_budget {
        let line = format!(
            "the learner would wait: a staleness budget of {} is needed for it not to, and {} is allowed",
            f.min_staleness, scenario.staleness_budget
        );
        program::tell(&line, json)?;
    }
    let more: Vec<String> = plan.more.iter().map(|m| format!("{} more of {}", m.count, m.kind)).collect();
    if !more.is_empty() {
        program::tell(&format!("too slow for the learner; enough would be {}", more.join(", or ")), json)?;
    }
    Ok(())
}

fn tell(o: &Outcome, json: bool) -> anyhow::Result<()> {
    let saving = o.saving.map(|s| format!(", {:.0} % saved", 100.0 * s)).unwrap_or_default();
    let line = format!(
        "staleness budget {:2}: steps of {:.1} s (forecast {:.1}), learner busy {:.1} %, {:.4} a step{saving}, age {:.2} on average, {} at most",
        o.staleness_budget,
        o.step_s,
        o.predicted_step_s,
        100.0 * o.learner_utilisation,
        o.cost_per_step,
        o.mean_staleness,
        o.max_staleness
    );
    program::tell(&line, json)?;
    for change in &o.fleet_changes {
        let fleet: Vec<String> =
            change.workers.iter().map(|KindCount { kind, count }| format!("{count} {kind}")).collect();
        let line = format!(
            "  after step {} ({:.0} s): {} at {:.2} an hour",
            change.after_steps,
            change.at_s,
            fleet.join(" + "),
            change.price_per_hour
        );
        program::tell(&line, json)?;
    }
    Ok(())
}
