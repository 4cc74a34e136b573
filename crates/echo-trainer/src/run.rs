//! What a run is: environment, workers, audits, evaluation and the trainer's settings, as a file gives them.
//!
//! [`RunConfig::validate`] names everything that is wrong at once: a run is set up by hand, on several machines, and a
//! fault a start is tedious.

use std::fmt;

use echo_rollout::asynchronous::{AsyncConfig, Impossible};
use echo_rollout::environment::check_name;
use echo_rollout::lease::SamplingSpec;
use echo_rollout::staleness::StalenessBound;
use echo_rollout::{AuditPolicy, DispatchConfig};
use serde::{Deserialize, Serialize};
use swarm_wire::{PeerId, RunId};

use crate::averaging::MAX_ASSISTANTS;
use crate::config::{ConfigError, TrainerConfig};

/// How rollouts and training alternate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Sample with the newest weights, train, publish, and again.
    #[default]
    Sequential,
    /// Sample and train at the same time; rollouts may lag behind by `trainer.max_staleness` versions.
    Async,
}

/// One run of the learner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunConfig {
    /// Names the run, and seeds its tasks, its sampling and the adapter's first values.
    pub seed: u64,
    /// What is trained on, for example `arithmetic`, or the http address of a server that is the environment.
    pub environment: String,
    /// A program that is the environment, with its arguments; empty for the built-in one called `environment`.
    pub environment_program: Vec<String>,
    /// How rollouts and training alternate.
    pub mode: Mode,
    /// Asynchronous mode: a version is published after so many steps.
    pub publish_every: u64,
    /// Workers to wait for before the first lease; the run starts with fewer when they do not come in time.
    pub workers: usize,
    /// Seconds to wait for them.
    pub workers_timeout_s: u64,
    /// Milliseconds that a round waits for slow workers to take up a version.
    pub ack_timeout_ms: u64,
    /// Peers whose verdicts count.
    pub auditors: Vec<PeerId>,
    /// Share of trajectories that an auditor recomputes before they are trained on, 0 to 1.
    pub audit_fraction: f64,
    /// The first trajectories of each worker are always audited: this many.
    pub audit_first: u32,
    /// Seconds that an auditor has for what it took, the weights included, before it is given to another; after three times what was
    /// drawn is not used.
    pub audit_timeout_s: u64,
    /// Peers that compute shares of each step's batch (`training-swarm assist`), while they are there. The batch is cut for all of them
    /// in any case.
    pub assistants: Vec<PeerId>,
    /// Seconds that one of them is waited for before its share is computed here, and that it may take to receive weights.
    pub assistant_timeout_s: u64,
    /// Share of rounds in which one share of an assistant is computed here as well, 0 to 1; one with other bits is out. A step has one
    /// round, or two where its loss needs the present weights' log-probabilities first. Only for machines that compute the same bits.
    pub assistant_check: f64,
    /// Held-out tasks of one evaluation; evaluations are made before the first and after the last step.
    pub eval_tasks: u64,
    /// No step begins after this many seconds.
    pub seconds: u64,
    /// Groups, loss, optimiser.
    pub trainer: TrainerConfig,
}

impl Default for RunConfig {
    fn default() -> Self {
        Self {
            seed: 1,
            environment: "arithmetic".to_owned(),
            environment_program: Vec::new(),
            mode: Mode::Sequential,
            publish_every: 1,
            workers: 1,
            workers_timeout_s: 60,
            ack_timeout_ms: 10_000,
            auditors: Vec::new(),
            audit_fraction: 0.0,
            audit_first: 0,
            audit_timeout_s: 15,
            assistants: Vec::new(),
            assistant_timeout_s: 60,
            assistant_check: 0.0,
            eval_tasks: 200,
            seconds: 3600,
            trainer: TrainerConfig::default(),
        }
    }
}

/// One thing that is wrong with a run's settings.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RunFault {
    /// An asynchronous run that could not go on.
    #[error("mode = \"async\": {0} (trainer.max_staleness, publish_every)")]
    Impossible(#[from] Impossible),
    /// Old rollouts in a mode that takes none.
    #[error("trainer.max_staleness = {max_staleness} needs mode = \"async\": set that, or set it to 0")]
    Staleness {
        /// The budget.
        max_staleness: u64,
    },
    /// No such environment.
    #[error("environment = {name:?}: {reason}")]
    Environment {
        /// What was asked for.
        name: String,
        /// Which there are.
        reason: String,
    },
    /// A number that is out of range.
    #[error("{setting} = {value} must be {allowed}")]
    OutOfRange {
        /// Its name.
        setting: String,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: String,
    },
    /// Audits without anybody to make them.
    #[error(
        "audit_fraction and audit_first ask for audits but auditors names nobody: add an auditor's peer id, or set both to 0"
    )]
    NoAuditor,
    /// The trainer's settings.
    #[error("trainer: {0}")]
    Trainer(ConfigError),
}

/// Everything that is wrong with a run's settings, one line each.
#[derive(Debug, Clone, PartialEq)]
pub struct RunFaults(pub Vec<RunFault>);

impl fmt::Display for RunFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            write!(f, "{separator}{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for RunFaults {}

impl RunConfig {
    /// The run's number.
    pub fn run(&self) -> RunId {
        RunId(self.seed)
    }

    /// Whether any trajectory is audited.
    pub fn is_audited(&self) -> bool {
        self.audit_fraction > 0.0 || self.audit_first > 0
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// All that is wrong.
    pub fn validate(&self) -> Result<(), RunFaults> {
        let mut faults = Vec::new();
        if self.mode == Mode::Async {
            // The trainer names a step without groups itself.
            let impossible = self.asynchronous().validate().err();
            faults.extend(impossible.filter(|i| *i != Impossible::NoGroups).map(RunFault::Impossible));
        } else if self.trainer.max_staleness > 0 {
            faults.push(RunFault::Staleness { max_staleness: self.trainer.max_staleness });
        } else if self.publish_every != 1 {
            let (setting, allowed) = ("publish_every".to_owned(), "1 in the sequential mode".to_owned());
            faults.push(RunFault::OutOfRange { setting, value: self.publish_every.to_string(), allowed });
        }
        if self.environment_program.is_empty()
            && let Err(error) = check_name(&self.environment)
        {
            faults.push(RunFault::Environment { name: self.environment.clone(), reason: error.to_string() });
        }
        for (setting, value) in [
            ("workers", self.workers as u64),
            ("workers_timeout_s", self.workers_timeout_s),
            ("audit_timeout_s", self.audit_timeout_s),
            ("assistant_timeout_s", self.assistant_timeout_s),
            ("eval_tasks", self.eval_tasks),
            ("seconds", self.seconds),
        ] {
            if value == 0 {
                let (setting, allowed) = (setting.to_owned(), "at least 1".to_owned());
                faults.push(RunFault::OutOfRange { setting, value: value.to_string(), allowed });
            }
        }
        let mut assistants = self.assistants.clone();
        assistants.sort_unstable();
        assistants.dedup();
        if assistants.len() < self.assistants.len() || assistants.len() > MAX_ASSISTANTS {
            let (setting, allowed) =
                ("assistants", format!("at most {MAX_ASSISTANTS} peers, each named once"));
            let value = format!("a list of {}", self.assistants.len());
            faults.push(RunFault::OutOfRange { setting: setting.to_owned(), value, allowed });
        }
        if self.is_audited() && self.auditors.is_empty() {
            faults.push(RunFault::NoAuditor);
        }
        // Checked here for the trainer's names of the settings; the dispatcher would name its own.
        faults.extend(self.trainer.faults().into_iter().map(RunFault::Trainer));
        if faults.is_empty()
            && let Err(e) = self.dispatch(0).validate()
        {
            faults.push(RunFault::OutOfRange {
                setting: e.field.to_owned(),
                value: e.value,
                allowed: e.allowed,
            });
        } else if !(0.0..=1.0).contains(&self.audit_fraction) {
            let (setting, allowed) = ("audit_fraction".to_owned(), "0 to 1".to_owned());
            faults.push(RunFault::OutOfRange { setting, value: self.audit_fraction.to_string(), allowed });
        }
        if !(0.0..=1.0).contains(&self.assistant_check) {
            let (setting, allowed) = ("assistant_check".to_owned(), "0 to 1".to_owned());
            faults.push(RunFault::OutOfRange { setting, value: self.assistant_check.to_string(), allowed });
        }
        if faults.is_empty() { Ok(()) } else { Err(RunFaults(faults)) }
    }

    /// How rollouts run ahead of the learner in the asynchronous mode.
    pub fn asynchronous(&self) -> AsyncConfig {
        AsyncConfig {
            groups_per_step: u32::try_from(self.trainer.groups_per_step).unwrap_or(u32::MAX),
            budget: StalenessBound(self.trainer.max_staleness),
            publish_every: self.publish_every,
            steps: self.trainer.steps,
        }
    }

    /// How leases are given out. `audit_secret` decides which trajectories are audited; workers must not know it.
    pub fn dispatch(&self, audit_secret: u64) -> DispatchConfig {
        let saturated = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let sampling = SamplingSpec {
            max_tokens: self.trainer.max_completion_tokens,
            seed: self.seed,
            ..SamplingSpec::default()
        };
        DispatchConfig {
            // Different runs see different tasks, and all stay below the held-out seeds.
            first_task: (self.seed % (1 << 20)) << 40,
            group_size: saturated(self.trainer.group_size),
            groups_per_step: saturated(self.trainer.groups_per_step),
            sampling,
            audit: AuditPolicy { fraction: self.audit_fraction, first: self.audit_first, seed: audit_secret },
            staleness: StalenessBound(self.trainer.max_staleness),
            ..DispatchConfig::new(self.run())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        RunConfig::default().validate().unwrap();
        let program = vec!["python3".to_owned(), "chess.py".to_owned()];
        let elsewhere = RunConfig {
            environment: "chess".to_owned(),
            environment_program: program,
            ..RunConfig::default()
        };
        elsewhere.validate().unwrap();
        let mut config = RunConfig {
            mode: Mode::Async,
            environment: "chess".to_owned(),
            workers: 0,
            audit_fraction: 2.0,
            audit_timeout_s: 0,
            ..RunConfig::default()
        };
        config.trainer.group_size = 0;
        config.trainer.full = true;
        config.trainer.lora_rank = 0;
        config.trainer.base_dtype = parallax_model::BaseDtype::Bf16;
        let text = config.validate().unwrap_err().to_string();
        for named in [
            "lets nobody sample",
            "chess",
            "workers",
            "audit_fraction",
            "auditors",
            "group_size",
            "lora_rank",
            "audit_timeout_s",
            "trainer: base_dtype",
        ] {
            assert!(text.contains(named), "{named}: {text}");
        }
        assert_eq!(text.lines().count(), 9, "{text}");
        // Whole models are audited as adapters are.
        let auditors = vec![PeerId::from_ed25519(&[1; 32])];
        let mut full = RunConfig { auditors, audit_first: 2, audit_fraction: 0.1, ..RunConfig::default() };
        full.trainer.full = true;
        full.validate().unwrap();
        let mut stale = RunConfig::default();
        stale.trainer.max_staleness = 2;
        assert!(stale.validate().unwrap_err().to_string().contains("max_staleness = 2"));
        stale.mode = Mode::Async;
        stale.validate().unwrap();
        stale.publish_every = 4;
        assert!(stale.validate().unwrap_err().to_string().contains("stand still"));
        let mut long = RunConfig::default();
        long.trainer.max_completion_tokens = u32::MAX;
        assert!(long.validate().unwrap_err().to_string().contains("max_tokens"));
    }

    #[test]
    fn assistants_are_named_once_each() {
        let peer = |i| PeerId::from_ed25519(&[i; 32]);
        let named = |assistants| RunConfig { assistants, ..RunConfig::default() }.validate();
        named(vec![peer(1), peer(2)]).unwrap();
        assert!(named(vec![peer(1), peer(2), peer(1)]).unwrap_err().to_string().contains("assistants"));
        assert!(named((0..65).map(peer).collect()).unwrap_err().to_string().contains("at most 64"));
        let often = RunConfig { assistant_check: f64::NAN, ..RunConfig::default() };
        assert!(often.validate().unwrap_err().to_string().contains("assistant_check"));
    }

    #[test]
    fn runs_have_their_own_tasks_and_stay_below_the_held_out_ones() {
        let first = |seed| RunConfig { seed, ..RunConfig::default() }.dispatch(0).first_task;
        assert!(first(4) - first(3) >= 1 << 40, "room for 2^40 groups");
        assert!(first(u64::MAX) + (1 << 40) <= echo_rollout::environment::HELD_OUT_SEEDS);
        // No setting makes a step that can never be complete.
        let mut wide = RunConfig::default();
        (wide.trainer.groups_per_step, wide.trainer.max_pending_groups) = (5000, 5000);
        assert!(wide.validate().unwrap_err().to_string().contains("max_open_groups"));
    }
}
