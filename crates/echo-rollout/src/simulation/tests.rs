//! What the simulated loop shows: the forecast is right, the budget is kept, overlap pays.

use super::*;

/// A GPU behind a household's line: 20 Mbit/s, 100 ms.
fn household() -> Kind {
    Kind {
        name: "household".to_owned(),
        available: 64,
        price_per_hour: 0.45,
        slots: 8,
        rollout_s: 60.0,
        rollout_sigma: 0.6,
        link_mbit: 20.0,
        latency_ms: 100.0,
        install_s: 1.0,
        mean_up_s: 0.0,
        mean_down_s: 0.0,
    }
}

fn scenario(staleness_budget: u64) -> Scenario {
    Scenario {
        seed: 1,
        steps: 60,
        warmup_steps: 20,
        groups_per_step: 8,
        group_size: 8,
        train_s: 60.0,
        staleness_budget,
        publish_every: 1,
        update_mb: 150.0,
        trajectory_kb: 40.0,
        learner_price_per_hour: 12.8,
        headroom: 0.1,
        use_all: false,
        workers: vec![household()],
        central: None,
        keep: None,
        changes: Vec::new(),
    }
}

#[test]
fn overlap_makes_slow_links_bearable_and_the_forecast_is_right() {
    let (alternating, overlapping) = (scenario(0).run().unwrap(), scenario(6).run().unwrap());
    assert!(alternating.step_s >= 3.0 * overlapping.step_s, "{alternating:?} {overlapping:?}");
    assert_eq!(alternating.max_staleness, 0);
    assert!(overlapping.learner_utilisation >= 0.95, "{overlapping:?}");
    assert!((overlapping.step_s / overlapping.predicted_step_s - 1.0).abs() < 0.05, "{overlapping:?}");
    let cost = overlapping.cost_per_step / overlapping.predicted_cost_per_step;
    assert!((cost - 1.0).abs() < 0.05, "{overlapping:?}");
    let least = overlapping.plan.forecast.min_staleness as f64;
    assert!(overlapping.mean_staleness <= least + 0.5 && overlapping.max_staleness <= 6, "{overlapping:?}");
    assert!(overlapping.plan.meets_budget && overlapping.plan.exact);
}

#[test]
fn the_same_seed_gives_the_same_events_and_another_seed_others() {
    let first = scenario(3).run().unwrap();
    assert_eq!(first, scenario(3).run().unwrap());
    assert_ne!(first.digest, Scenario { seed: 2, ..scenario(3) }.run().unwrap().digest);
}

#[test]
fn workers_come_and_go_and_the_books_stay_whole() {
    let restless = Kind { mean_up_s: 900.0, mean_down_s: 300.0, ..household() };
    for staleness_budget in [0, 2, 6] {
        let churn = Scenario { workers: vec![restless.clone()], ..scenario(staleness_budget) };
        let outcome = churn.run().unwrap();
        assert!(outcome.dropped_with_worker > 0 && outcome.max_staleness <= staleness_budget, "{outcome:?}");
        assert_eq!(outcome.consumed, (20 + 60) * 64, "{outcome:?}");
    }
}

#[test]
fn savings_grow_with_the_budget_and_saturate() {
    let central = Central { slots: 64, rollout_s: 60.0, rollout_sigma: 0.6 };
    let datacentre = Kind {
        name: "datacentre".to_owned(),
        price_per_hour: 1.60,
        link_mbit: 10_000.0,
        latency_ms: 2.0,
        ..household()
    };
    let saving = |s| {
        let workers = vec![household(), datacentre.clone()];
        Scenario { workers, central: Some(central), ..scenario(s) }.run().unwrap().saving.unwrap()
    };
    let savings = [0, 1, 3, 6, 11].map(saving);
    assert!(savings.windows(2).all(|w| w[1] > w[0] - 0.02), "{savings:?}");
    assert!(savings[0] < 0.1 && savings[2] >= 0.33, "{savings:?}");
    assert!((savings[4] - savings[3]).abs() < 0.02, "saturated: {savings:?}");
}

/// Two kinds of the same workers in two places.
fn two_places() -> Scenario {
    let there = Kind { name: "elsewhere".to_owned(), ..household() };
    Scenario { workers: vec![household(), there], keep: Some(KeepConfig::default()), ..scenario(6) }
}

fn price(at_s: f64, kind: &str, price_per_hour: f64) -> Change {
    Change { at_s, kind: kind.to_owned(), price_per_hour: Some(price_per_hour), available: None }
}

#[test]
fn a_fleet_follows_prices_that_matter() {
    let changes = vec![price(2400.0, "household", 0.9)];
    let follows = Scenario { changes: changes.clone(), ..two_places() }.run().unwrap();
    let [change] = &follows.fleet_changes[..] else { panic!("{:?}", follows.fleet_changes) };
    let same = change.workers.iter().map(|w| (w.kind.as_str(), w.count)).collect::<Vec<_>>();
    assert_eq!(same, [("elsewhere", follows.workers_selected[0].count)]);
    let stays = Scenario { changes, keep: None, ..two_places() }.run().unwrap();
    assert!(stays.fleet_changes.is_empty());
    assert!(follows.cost_per_step < 0.95 * stays.cost_per_step, "{follows:?} {stays:?}");
    assert!(follows.learner_utilisation > 0.95, "{follows:?}");
    assert_eq!(
        follows,
        Scenario { changes: vec![price(2400.0, "household", 0.9)], ..two_places() }.run().unwrap()
    );
}

#[test]
fn a_fleet_does_not_follow_every_price_because_changes_cost_work() {
    let cents = |even: bool| if even { 0.45 } else { 0.46 };
    let both = |i: u32| {
        [("household", i.is_multiple_of(2)), ("elsewhere", i % 2 == 1)].map(|k| (300.0 * f64::from(i), k))
    };
    let changes: Vec<Change> =
        (0..16).flat_map(both).map(|(at_s, (kind, cheap))| price(at_s, kind, cents(cheap))).collect();
    let run = |min_saving| {
        let keep = Some(KeepConfig { min_saving, ..KeepConfig::default() });
        Scenario { changes: changes.clone(), keep, ..two_places() }.run().unwrap()
    };
    let (calm, restless) = (run(0.03), run(0.0));
    assert!(calm.fleet_changes.is_empty() && calm.dropped_with_worker == 0, "{calm:?}");
    assert!(restless.fleet_changes.len() > 3 && restless.dropped_with_worker > 100, "{restless:?}");
    assert!(restless.cost_per_step > calm.cost_per_step, "{restless:?} {calm:?}");
}

#[test]
fn workers_that_are_withdrawn_are_replaced() {
    let withdrawn = Change { available: Some(4), price_per_hour: None, ..price(2400.0, "household", 0.0) };
    let dearer = Kind { name: "elsewhere".to_owned(), price_per_hour: 0.6, ..household() };
    let workers = vec![household(), dearer];
    let run = |keep| {
        let changes = vec![withdrawn.clone()];
        Scenario { workers: workers.clone(), changes, keep, ..two_places() }.run().unwrap()
    };
    let (replaced, left) = (run(Some(KeepConfig::default())), run(None));
    assert_eq!(replaced.fleet_changes.len(), 1, "{replaced:?}");
    assert!(replaced.learner_utilisation > left.learner_utilisation + 0.2, "{left:?} {replaced:?}");
    assert_eq!(replaced.consumed, (20 + 60) * 64);
}

#[test]
fn impossible_scenarios_are_refused() {
    let dead = Scenario { publish_every: 5, ..scenario(3) };
    assert!(matches!(dead.run(), Err(SimulationError::Impossible(_))));
    let mut wrong = scenario(3);
    wrong.workers[0].link_mbit = f64::NAN;
    assert!(wrong.run().unwrap_err().to_string().contains("workers[0].link_mbit"));
    let unknown = Scenario { changes: vec![price(1.0, "nobody", 1.0)], ..scenario(3) };
    assert!(matches!(unknown.run(), Err(SimulationError::Change { index: 0, .. })));
    let mut nobody = scenario(3);
    nobody.workers[0].available = 0;
    assert!(matches!(nobody.run(), Err(SimulationError::Stuck { step: 0, .. })));
}
