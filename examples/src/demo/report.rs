//! The report of a run, field by field as docs/REPORTS.md has it, built from what the learner says; its plots and its page.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::page;
use super::plots::{Series, histogram, line_plot};

/// The report.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// The model.
    pub model: String,
    /// The environment.
    pub env: String,
    /// Worker processes.
    pub workers: usize,
    /// Policy versions after the base model.
    pub versions: u64,
    /// Mean reward of the first step's rollouts.
    pub reward_before: f64,
    /// Mean reward of the last step's rollouts.
    pub reward_after: f64,
    /// Mean reward on held-out tasks before training, sampled at temperature 1.
    pub eval_before: f64,
    /// The same after training.
    pub eval_after: f64,
    /// Share of held-out tasks solved greedily before training.
    pub eval_greedy_before: f64,
    /// The same after training.
    pub eval_greedy_after: f64,
    /// The whole demo, start and chat included.
    pub seconds: f64,
    /// Counts of trajectories.
    pub trajectories: Value,
    /// Ages of what was trained on.
    pub staleness: Value,
    /// Share of the training loop in which the learner trained.
    pub learner_utilisation: f64,
    /// Largest deviation of learner and sampler probabilities from a ratio of 1.
    pub ratio_deviation_max: f64,
    /// Bytes of one published update.
    pub update_bytes: u64,
    /// Bytes of all weights in f32.
    pub full_bytes: u64,
    /// What the run cost at the prices that were given, its start and end without steps left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<f64>,
    /// The worker with other weights, when there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cheater: Option<Cheater>,
    /// The question at the end.
    pub chat: Option<Chat>,
    /// The plots.
    pub plots: Vec<PathBuf>,
    /// The page with all of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub page: Option<PathBuf>,
    /// File of the last adapter.
    #[serde(skip)]
    pub adapter: Option<String>,
    #[serde(skip)]
    prices: Option<Prices>,
    #[serde(skip)]
    steps: Vec<Value>,
    /// Version and what was paid until then.
    #[serde(skip)]
    costs: Vec<(f64, f64)>,
    #[serde(skip)]
    evals: Vec<(f64, f64)>,
    #[serde(skip)]
    convicted: Vec<(String, u64)>,
    #[serde(skip)]
    poisoned_trained: u64,
}

/// What an hour costs, in any currency.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Of the learner.
    pub learner_per_hour: f64,
    /// Of one worker.
    pub worker_per_hour: f64,
}

/// What became of the cheater.
#[derive(Debug, Clone, Serialize)]
pub struct Cheater {
    /// Its peer id.
    pub peer: String,
    /// Whether it was caught.
    pub detected: bool,
    /// Audits of its rollouts up to the one that caught it.
    pub audits_until_detected: u64,
    /// Rollouts of it that were trained on.
    pub poisoned_trained: u64,
}

/// A question and its answer.
#[derive(Debug, Clone, Serialize)]
pub struct Chat {
    /// What was asked.
    pub prompt: String,
    /// What came back.
    pub reply: String,
    /// Processes that computed it.
    pub stages: usize,
}

impl Report {
    /// An empty report.
    pub fn new(model: &str, env: &str, workers: usize) -> Self {
        Self { model: model.to_owned(), env: env.to_owned(), workers, ..Self::default() }
    }

    /// With the cost of the run at these prices.
    #[must_use]
    pub fn priced(self, prices: Option<Prices>) -> Self {
        Self { prices, ..self }
    }

    /// Takes one event of the learner; returns a line for people when it is worth one.
    pub fn take(&mut self, event: &Value) -> Option<String> {
        let number = |field: &str| event[field].as_f64().unwrap_or_default();
        match event["event"].as_str()? {
            "ready" => {
                // A program says itself what it is called.
                self.env = event["env"].as_str()?.to_owned();
                None
            }
            "eval" => {
                let (version, eval, greedy) = (number("version"), number("eval"), number("eval_greedy"));
                if self.evals.is_empty() {
                    (self.eval_before, self.eval_greedy_before) = (eval, greedy);
                }
                (self.eval_after, self.eval_greedy_after) = (eval, greedy);
                self.evals.push((version, eval));
                Some(format!("held-out reward at version {version}: {eval:.3} sampled, {greedy:.3} greedy"))
            }
            "step" => {
                if self.steps.is_empty() {
                    self.reward_before = number("reward");
                }
                self.reward_after = number("reward");
                self.versions = event["version"].as_u64().unwrap_or_default();
                self.update_bytes = event["update_bytes"].as_u64().unwrap_or_default();
                self.ratio_deviation_max = self.ratio_deviation_max.max(number("ratio_deviation_max"));
                if let Some(prices) = &self.prices {
                    let per_hour = prices.learner_per_hour + number("workers") * prices.worker_per_hour;
                    let cost = self.cost.unwrap_or(0.0) + number("step_s") / 3600.0 * per_hour;
                    self.cost = Some(cost);
                    self.costs.push((number("version"), cost));
                }
                self.steps.push(event.clone());
                None
            }
            "convicted" => {
                let peer = event["peer"].as_str()?.to_owned();
                let audits = event["audits"].as_u64().unwrap_or_default();
                let line = format!(
                    "worker {peer} was convicted after {audits} audits; its rollouts are not trained on"
                );
                self.convicted.push((peer, audits));
                Some(line)
            }
            "left_out" => {
                let (peer, reason) = (event["peer"].as_str()?, event["reason"].as_str()?);
                let out = if event["dismissed"] == true { " for this run" } else { "" };
                Some(format!("assistant {peer} is left out{out}: {reason}; its share was computed by others"))
            }
            "done" => {
                self.trajectories = event["trajectories"].clone();
                self.staleness = event["staleness"].clone();
                self.learner_utilisation = number("learner_utilisation");
                self.full_bytes = event["full_bytes"].as_u64().unwrap_or_default();
                self.poisoned_trained = event["poisoned_trained"].as_u64().unwrap_or_default();
                self.adapter = event["adapter"].as_str().filter(|_| self.versions > 0).map(str::to_owned);
                None
            }
            _ => None,
        }
    }

    /// The newest figures, for the progress bar.
    pub fn headline(&self) -> String {
        if self.steps.is_empty() { String::new() } else { format!("reward {:.2}", self.reward_after) }
    }

    /// Says what became of the worker `peer`.
    pub fn judge_cheater(&mut self, peer: &str) {
        let caught = self.convicted.iter().find(|(convicted, _)| convicted == peer);
        self.cheater = Some(Cheater {
            peer: peer.to_owned(),
            detected: caught.is_some(),
            audits_until_detected: caught.map_or(0, |(_, audits)| *audits),
            poisoned_trained: self.poisoned_trained,
        });
    }

    /// Draws the plots into `dir`, and writes `report.html` with all of them and the figures.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&mut self, dir: &Path) -> anyhow::Result<()> {
        self.plot(dir)?;
        let path = dir.join("report.html");
        let page = page::page(&serde_json::to_value(&*self)?, &self.plots)?;
        std::fs::write(&path, page).with_context(|| format!("writing {}", path.display()))?;
        self.page = Some(path);
        Ok(())
    }

    fn plot(&mut self, dir: &Path) -> anyhow::Result<()> {
        let points = |field: &str| {
            let point = |s: &Value| Some((s["version"].as_f64()?, s[field].as_f64()?));
            self.steps.iter().filter_map(point).collect::<Vec<_>>()
        };
        let rewards = [
            Series { name: "rollouts", color: "#2f6f5e", points: points("reward") },
            Series { name: "held out", color: "#c2571a", points: self.evals.clone() },
        ];
        let times = [
            Series { name: "rollouts", color: "#2f6f5e", points: points("rollouts_s") },
            Series { name: "training", color: "#3b5b92", points: points("train_s") },
        ];
        let busy = |s: &Value| Some((s["version"].as_f64()?, s["train_s"].as_f64()? / s["step_s"].as_f64()?));
        let busy = self.steps.iter().filter_map(busy).collect();
        let busy = [Series { name: "learner", color: "#3b5b92", points: busy }];
        let full: Vec<_> = points("update_bytes").iter().map(|(v, _)| (*v, self.full_bytes as f64)).collect();
        let bytes = [
            Series { name: "published update", color: "#2f6f5e", points: points("update_bytes") },
            Series { name: "all weights", color: "#8a8a8a", points: full },
        ];
        let ages = self.staleness["by_age"].as_array().into_iter().flatten();
        let ages: Vec<u64> = ages.filter_map(Value::as_u64).collect();
        let title = format!("{} on {}", self.model, self.env);
        self.plots = vec![
            line_plot(&dir.join("reward.svg"), &title, "policy version", "mean reward", &rewards)?,
            line_plot(
                &dir.join("seconds.svg"),
                "Where the time goes",
                "policy version",
                "seconds per step",
                &times,
            )?,
            line_plot(
                &dir.join("utilisation.svg"),
                "How busy the learner is",
                "policy version",
                "share of the step",
                &busy,
            )?,
            line_plot(&dir.join("bytes.svg"), "What is sent", "policy version", "bytes", &bytes)?,
        ];
        if !ages.is_empty() {
            let path = dir.join("staleness.svg");
            let title = "How old rollouts were when they were trained on";
            self.plots.push(histogram(&path, title, "versions", "rollouts", &ages)?);
        }
        if !self.costs.is_empty() {
            let paid = [Series { name: "paid", color: "#c2571a", points: self.costs.clone() }];
            let path = dir.join("cost.svg");
            self.plots.push(line_plot(&path, "What it costs", "policy version", "paid until then", &paid)?);
        }
        Ok(())
    }

    /// A few lines for people.
    pub fn for_people(&self) -> String {
        let mut lines = vec![format!(
            "held-out reward {:.3} -> {:.3} (greedy {:.3} -> {:.3}) in {} versions and {:.0} s",
            self.eval_before,
            self.eval_after,
            self.eval_greedy_before,
            self.eval_greedy_after,
            self.versions,
            self.seconds
        )];
        lines.push(format!("trajectories: {}", self.trajectories));
        lines.push(format!(
            "one update: {} bytes of {} ({:.1} %)",
            self.update_bytes,
            self.full_bytes,
            100.0 * self.update_bytes as f64 / self.full_bytes.max(1) as f64
        ));
        if let Some(cheater) = &self.cheater {
            let outcome = if cheater.detected { "caught" } else { "NOT caught" };
            lines.push(format!(
                "cheater {}: {outcome} after {} audits, {} of its rollouts trained on",
                cheater.peer, cheater.audits_until_detected, cheater.poisoned_trained
            ));
        }
        if let Some(chat) = &self.chat {
            lines
                .push(format!("asked over {} processes: {:?} -> {:?}", chat.stages, chat.prompt, chat.reply));
        }
        lines.extend(self.cost.map(|cost| format!("cost: {cost:.4}")));
        lines.extend(self.plots.iter().map(|p| format!("plot: {}", p.display())));
        lines.extend(self.page.iter().map(|p| format!("page: {}", p.display())));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_becomes_a_report_with_plots() {
        let prices = Prices { learner_per_hour: 2.0, worker_per_hour: 0.5 };
        let mut report = Report::new("tiny", "arithmetic", 3).priced(Some(prices));
        for event in [
            json!({"event": "ready", "peer": "12D3", "addrs": [], "env": "<guess>"}),
            json!({"event": "eval", "version": 0, "eval": 0.25, "eval_greedy": 0.5}),
            json!({"event": "step", "version": 1, "reward": 0.3, "update_bytes": 10, "rollouts_s": 1.0, "train_s": 0.5, "step_s": 1800.0, "workers": 4}),
            json!({"event": "convicted", "peer": "12D3", "audits": 2}),
            json!({"event": "step", "version": 2, "reward": 0.6, "update_bytes": 12, "rollouts_s": 1.0, "train_s": 0.5, "step_s": 1800.0, "workers": 2}),
            json!({"event": "eval", "version": 2, "eval": 0.75, "eval_greedy": 0.9}),
            json!({"event": "done", "trajectories": {"leased": 4}, "staleness": {"max": 1, "by_age": [3, 1]}, "learner_utilisation": 0.5,
                   "full_bytes": 100, "poisoned_trained": 0, "adapter": "a.safetensors"}),
        ] {
            report.take(&event);
        }
        report.judge_cheater("12D3");
        let dir = tempfile::tempdir().unwrap();
        report.write(dir.path()).unwrap();
        let page = std::fs::read_to_string(report.page.as_ref().unwrap()).unwrap();
        assert_eq!(page.matches("<svg").count(), 6, "reward, seconds, utilisation, bytes, ages, cost");
        assert!(page.contains("&lt;guess&gt;") && !page.contains("<guess>"));
        for foreign in ["http://", "https://", "src="] {
            let own = page.replace("http://www.w3.org/", "");
            assert!(!own.contains(foreign), "one file, nothing fetched: {foreign}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((json["eval_before"].as_f64(), json["eval_after"].as_f64()), (Some(0.25), Some(0.75)));
        assert_eq!((json["reward_before"].as_f64(), json["reward_after"].as_f64()), (Some(0.3), Some(0.6)));
        assert_eq!(
            json["cheater"],
            json!({"peer": "12D3", "detected": true, "audits_until_detected": 2, "poisoned_trained": 0})
        );
        assert_eq!(json["trajectories"]["leased"], 4);
        assert_eq!(json["cost"], 3.5, "half an hour at 4 and one at 3");
        assert!(report.plots.iter().all(|p| p.exists()));
        report.judge_cheater("another");
        assert!(!report.cheater.unwrap().detected);
    }
}
