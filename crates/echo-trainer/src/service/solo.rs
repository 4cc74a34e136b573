//! A run in one process: the same tasks, seeds, credit and steps as the sequential mode of a swarm, without leases and
//! network. For games whose opponent changes with the policy, and to see what staleness does: every step can be made from
//! rollouts that are a given number of versions old.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use echo_rollout::environment::Environment;
use echo_rollout::{DispatchConfig, GroupId, Weights};
use swarm_wire::PolicyVersion;

use super::evaluation::{Evaluation, EvaluationError, Played, Player, SampleRequest, evaluate, play_all};
use super::publisher::Update;
use crate::averaging::Absent;
use crate::error::{AddError, StepError};
use crate::metrics::StepReport;
use crate::run::RunConfig;
use crate::trainer::{Group, Rollout, Trainer};

/// Why a run ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SoloError {
    /// Episodes.
    #[error(transparent)]
    Evaluation(#[from] EvaluationError),
    /// The engine.
    #[error("installing {version} in the engine: {reason}")]
    Install {
        /// The version.
        version: PolicyVersion,
        /// The engine's own words.
        reason: String,
    },
    /// A group that the trainer does not take.
    #[error(transparent)]
    Add(#[from] AddError),
    /// A step.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// A step that was made.
#[derive(Debug, Clone, PartialEq)]
pub struct SoloStep {
    /// What the trainer says of it.
    pub report: StepReport,
    /// Groups whose rewards were all equal and that dynamic sampling had replaced.
    pub flat_groups: u64,
}

/// A learner and its only worker.
pub struct Solo<P> {
    trainer: Trainer<P>,
    player: Player,
    /// None, in the seats of those that a swarm would have.
    assistants: Absent,
    dispatch: DispatchConfig,
    eval_tasks: u64,
    /// What it is measured on.
    judge: Arc<dyn Environment>,
    /// Versions that rollouts lag behind.
    lag: u64,
    /// The number of the next group; every group has a task of its own.
    next_group: u64,
    /// The newest versions' weights, the newest last; as many as the lag needs.
    versions: VecDeque<(PolicyVersion, Weights)>,
    installed: Option<PolicyVersion>,
}

impl<P> std::fmt::Debug for Solo<P> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Solo({} behind by {})", self.player.environment.name(), self.lag)
    }
}

impl<P: Update + Send> Solo<P> {
    /// A run of `config` from `policy`; its `trainer.max_staleness` is how many versions behind all rollouts are, as far as
    /// there are so many.
    ///
    /// # Errors
    /// A setting that is out of range.
    pub fn new(config: &RunConfig, policy: P, player: Player) -> Result<Self, SoloError> {
        let trainer = Trainer::new(policy, config.trainer.clone())?;
        Ok(Self {
            lag: config.trainer.max_staleness,
            assistants: Absent(config.assistants.len()),
            next_group: 0,
            dispatch: config.dispatch(0),
            eval_tasks: config.eval_tasks,
            judge: Arc::clone(&player.environment),
            versions: [(trainer.version(), Weights::Base)].into(),
            trainer,
            player,
            installed: None,
        })
    }

    /// The policy as it is now.
    pub fn policy(&self) -> &P {
        self.trainer.policy()
    }

    /// What is played.
    pub fn environment(&self) -> &dyn Environment {
        &*self.player.environment
    }

    /// Measures on held-out tasks of `environment` from now on, instead of what is trained on.
    pub fn measure_on(&mut self, environment: Arc<dyn Environment>) {
        self.judge = environment;
    }

    /// The version of the present weights.
    pub fn version(&self) -> PolicyVersion {
        self.trainer.version()
    }

    /// The present weights.
    pub fn weights(&self) -> &Weights {
        self.versions.back().map_or(&Weights::Base, |(_, weights)| weights)
    }

    /// Samples as many groups as a step needs, others instead of those that dynamic sampling gives up, and makes it; `None` when it
    /// is later than `until` before there are enough.
    ///
    /// # Errors
    /// Episodes that cannot be played or judged, a model that cannot be trained.
    pub async fn step(&mut self, until: Option<Instant>) -> Result<Option<SoloStep>, SoloError> {
        // The oldest that is kept is the one that is due.
        let due = self.versions.front().map_or_else(|| self.version(), |(version, _)| *version);
        self.install(due).await?;
        let needed = u64::from(self.dispatch.groups_per_step);
        let (mut groups, mut flat_groups): (Vec<Group>, u64) = (Vec::new(), 0);
        while (groups.len() as u64) < needed {
            if until.is_some_and(|until| Instant::now() > until) {
                return Ok(None);
            }
            let numbers = self.next_group..self.next_group + needed - groups.len() as u64;
            groups.extend(self.sample(numbers, due).await?);
            let flat = self.trainer.flat(&groups, flat_groups);
            flat_groups += flat.len() as u64;
            groups.retain(|group| !flat.contains(&group.id));
        }
        for group in groups {
            self.trainer.add_group(group)?;
        }
        let report = self.trainer.train_step_with(&mut self.assistants)?;
        self.versions.push_back((report.version, self.trainer.policy().weights()?));
        while self.versions.len() as u64 > self.lag + 1 {
            self.versions.pop_front();
        }
        Ok(Some(SoloStep { report, flat_groups }))
    }

    /// The groups of these numbers, sampled with the installed version.
    async fn sample(&mut self, numbers: Range<u64>, version: PolicyVersion) -> Result<Vec<Group>, SoloError> {
        let samples = self.dispatch.group_size;
        let episodes = numbers.clone().flat_map(|group| (0..samples).map(move |i| (group, i)));
        let episodes = episodes.map(|(group, i)| {
            let request = SampleRequest {
                prompt: Vec::new(),
                max_tokens: self.dispatch.sampling.max_tokens,
                temperature: self.dispatch.sampling.temperature,
                seed: self.dispatch.sample_seed(GroupId(group), i),
            };
            (self.dispatch.first_task + group, request)
        });
        let played = play_all(&self.player, episodes).await?;
        self.next_group = numbers.end;
        let mut played = played.into_iter();
        let group = |id: u64| {
            let lease = |i: u32| id * u64::from(samples) + u64::from(i);
            let rollouts = (0..samples).zip(played.by_ref());
            Group { id, rollouts: rollouts.map(|(i, p)| rollout(p, lease(i), version)).collect() }
        };
        Ok(numbers.map(group).collect())
    }

    /// Measures the present weights on held-out tasks.
    ///
    /// # Errors
    /// Episodes that cannot be played or judged.
    pub async fn evaluate(&mut self) -> Result<Evaluation, SoloError> {
        let version = self.version();
        self.install(version).await?;
        let player = Player { environment: Arc::clone(&self.judge), ..self.player.clone() };
        Ok(evaluate(&player, version, self.eval_tasks, self.dispatch.sampling.max_tokens).await?)
    }

    async fn install(&mut self, version: PolicyVersion) -> Result<(), SoloError> {
        if self.installed == Some(version) {
            return Ok(());
        }
        let kept = self.versions.iter().find(|(kept, _)| *kept == version);
        let weights = kept.map_or(Weights::Base, |(_, weights)| weights.clone());
        let installed = self.player.sampler.install(version, weights).await;
        installed.map_err(|reason| SoloError::Install { version, reason })?;
        self.installed = Some(version);
        Ok(())
    }
}

fn rollout(played: Played, lease: u64, version: PolicyVersion) -> Rollout {
    let Played { prompt, tokens, logprobs, trainable, reward } = played;
    Rollout {
        lease,
        prompt_tokens: prompt.len(),
        tokens: [prompt, tokens].concat(),
        logprobs,
        trainable,
        version,
        reward: f64::from(reward),
    }
}
