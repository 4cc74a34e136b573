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

#[test]
fn impossible_scenarios_are_refused() {
    let dead = Scenario { publish_every: 5, ..scenario(3) };
    assert!(matches!(dead.run(), Err(SimulationError::Impossible(_))));
    let mut wrong = scenario(3);
    wrong.workers[0].link_mbit = f64::NAN;
    assert!(wrong.run().unwrap_err().to_string().contains("workers[0].link_mbit"));
    let mut nobody = scenario(3);
    nobody.workers[0].available = 0;
    assert!(matches!(nobody.run(), Err(SimulationError::Stuck { step: 0, .. })));
}
