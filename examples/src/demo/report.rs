//! The demo's report, field by field as docs/REPORTS.md has it, built from what the learner says.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use super::plots::{Series, line_plot};

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
    /// The worker with other weights, when there was one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cheater: Option<Cheater>,
    /// The question at the end.
    pub chat: Option<Chat>,
    /// The plots.
    pub plots: Vec<PathBuf>,
    /// File of the last adapter.
    #[serde(skip)]
    pub adapter: Option<String>,
    #[serde(skip)]
    steps: Vec<Value>,
    #[serde(skip)]
    evals: Vec<(f64, f64)>,
    #[serde(skip)]
    convicted: Vec<(String, u64)>,
    #[serde(skip)]
    poisoned_trained: u64,
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

    /// Takes one event of the learner; returns a line for people when it is worth one.
    pub fn take(&mut self, event: &Value) -> Option<String> {
        let number = |field: &str| event[field].as_f64().unwrap_or_default();
        match event["event"].as_str()? {
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

    /// Draws the plots into `dir`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn plot(&mut self, dir: &Path) -> anyhow::Result<()> {
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
        ];
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
        lines.extend(self.plots.iter().map(|p| format!("plot: {}", p.display())));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_run_becomes_a_report_with_plots() {
        let mut report = Report::new("tiny", "arithmetic", 3);
        for event in [
            json!({"event": "eval", "version": 0, "eval": 0.25, "eval_greedy": 0.5}),
            json!({"event": "step", "version": 1, "reward": 0.3, "update_bytes": 10, "rollouts_s": 1.0, "train_s": 0.5}),
            json!({"event": "convicted", "peer": "12D3", "audits": 2}),
            json!({"event": "step", "version": 2, "reward": 0.6, "update_bytes": 12, "rollouts_s": 1.0, "train_s": 0.5}),
            json!({"event": "eval", "version": 2, "eval": 0.75, "eval_greedy": 0.9}),
            json!({"event": "done", "trajectories": {"leased": 4}, "staleness": {"max": 0}, "learner_utilisation": 0.5,
                   "full_bytes": 100, "poisoned_trained": 0, "adapter": "a.safetensors"}),
        ] {
            report.take(&event);
        }
        report.judge_cheater("12D3");
        let dir = tempfile::tempdir().unwrap();
        report.plot(dir.path()).unwrap();
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!((json["eval_before"].as_f64(), json["eval_after"].as_f64()), (Some(0.25), Some(0.75)));
        assert_eq!((json["reward_before"].as_f64(), json["reward_after"].as_f64()), (Some(0.3), Some(0.6)));
        assert_eq!(
            json["cheater"],
            json!({"peer": "12D3", "detected": true, "audits_until_detected": 2, "poisoned_trained": 0})
        );
        assert_eq!(json["trajectories"]["leased"], 4);
        assert!(report.plots.iter().all(|p| p.exists()));
        report.judge_cheater("another");
        assert!(!report.cheater.unwrap().detected);
    }
}
