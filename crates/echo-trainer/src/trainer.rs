//! Rounds as a state machine: groups come in, a step consumes them, the next policy version comes out.
//!
//! Nothing is trained on twice: a lease that waits or was consumed is refused, and the consumed leases are part of the
//! same checkpoint as the weights. The order of groups does not depend on who delivered first: a step sorts by id.

use std::collections::BTreeMap;

use swarm_wire::PolicyVersion;

use crate::advantage::{Episode, advantages, is_degenerate};
use crate::averaging::{Absent, Assistants};
use crate::config::TrainerConfig;
use crate::error::{AddError, StepError};
use crate::lease_set::LeaseSet;
use crate::metrics::StepReport;
use crate::optim::AdamW;
use crate::packing::Sample;
use crate::parameters::Parameters;
use crate::policy::{Policy, read_parameters};
use crate::shares::{Cut, Replicas, policy_gradients};
use crate::step::completion_logprobs;

/// One sampled answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// Its lease, unique in the run.
    pub lease: u64,
    /// Prompt and completion.
    pub tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt_tokens: usize,
    /// Log-probability of each completion token as sampled.
    pub logprobs: Vec<f32>,
    /// Which completion tokens the policy sampled itself; false for what a tool or another player said.
    pub trainable: Vec<bool>,
    /// Oldest version that sampled one of its tokens.
    pub version: PolicyVersion,
    /// What the environment gave.
    pub reward: f64,
}

/// The answers to one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Its number, unique in the run.
    pub id: u64,
    /// Its samples.
    pub rollouts: Vec<Rollout>,
}

impl From<&echo_rollout::Group> for Group {
    fn from(group: &echo_rollout::Group) -> Self {
        let rollout = |t: &echo_rollout::Trajectory| Rollout {
            lease: t.id().0,
            tokens: t.tokens(),
            prompt_tokens: t.prompt().len(),
            logprobs: t.logprobs(),
            trainable: t.steps().iter().map(|s| s.trainable).collect(),
            version: t.oldest_version(),
            reward: f64::from(t.reward().value()),
        };
        Self { id: group.id.0, rollouts: group.trajectories.iter().map(rollout).collect() }
    }
}

/// A run.
#[derive(Debug)]
pub struct Trainer<P> {
    pub(crate) config: TrainerConfig,
    pub(crate) policy: P,
    /// Compute a step's gradients beside the policy.
    replicas: Vec<P>,
    /// The values at version 0, for a divergence from them.
    origin: Option<Parameters>,
    pub(crate) masters: Parameters,
    pub(crate) optimiser: AdamW,
    pub(crate) version: PolicyVersion,
    pub(crate) consumed: LeaseSet,
    pending: BTreeMap<u64, Group>,
    dropped_stale: u64,
}

impl<P: Policy + Send> Trainer<P> {
    /// Starts at version 0 from the policy's present values.
    ///
    /// # Errors
    /// When a setting is out of range.
    pub fn new(policy: P, config: TrainerConfig) -> Result<Self, StepError> {
        config.validate().map_err(StepError::model)?;
        let masters = read_parameters(&policy);
        let optimiser = AdamW::new(config.optim, &masters)?;
        let origin = config.divergence().map(|_| masters.clone());
        Ok(Self {
            replicas: (1..config.replicas).map(|_| policy.replica()).collect(),
            config,
            policy,
            origin,
            masters,
            optimiser,
            version: PolicyVersion(0),
            consumed: LeaseSet::default(),
            pending: BTreeMap::new(),
            dropped_stale: 0,
        })
    }

    /// Tells `assistants` the present weights, so that they have them when a step begins.
    pub fn introduce(&self, assistants: &mut dyn Assistants) {
        assistants.hold(self.version, &self.masters);
    }

    /// Goes on with these values.
    pub(crate) fn set_masters(&mut self, masters: Parameters) -> Result<(), StepError> {
        for policy in std::iter::once(&mut self.policy).chain(&mut self.replicas) {
            policy.assign(&masters)?;
        }
        self.masters = masters;
        Ok(())
    }

    /// The version of the present weights.
    pub fn version(&self) -> PolicyVersion {
        self.version
    }

    /// The policy as it is now.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// The settings.
    pub fn config(&self) -> &TrainerConfig {
        &self.config
    }

    /// Leases that were trained on.
    pub fn consumed(&self) -> &LeaseSet {
        &self.consumed
    }

    /// Rollouts that were dropped because they had become too old.
    pub fn dropped_stale(&self) -> u64 {
        self.dropped_stale
    }

    /// Groups that wait for a step.
    pub fn pending(&self) -> usize {
        self.pending.len()
    }

    /// Whether enough groups are here for [`Trainer::train_step`].
    pub fn is_ready(&self) -> bool {
        self.pending.len() >= self.config.groups_per_step
    }

    /// Takes a group for the next steps.
    ///
    /// # Errors
    /// When it is malformed, too old, was delivered before, or the queue is full; nothing of it is kept then.
    pub fn add_group(&mut self, group: Group) -> Result<(), AddError> {
        let id = group.id;
        if self.pending.len() >= self.config.max_pending_groups {
            return Err(AddError::Full { limit: self.config.max_pending_groups });
        }
        let malformed = |reason: &str| AddError::Malformed { group: id, reason: reason.to_owned() };
        if group.rollouts.is_empty() {
            return Err(malformed("no rollouts"));
        }
        let mut leases = std::collections::BTreeSet::new();
        for r in &group.rollouts {
            let queued = |g: &Group| g.rollouts.iter().any(|other| other.lease == r.lease);
            if self.consumed.contains(r.lease) || !leases.insert(r.lease) || self.pending.values().any(queued)
            {
                return Err(AddError::Duplicate { group: id, lease: r.lease });
            }
            if r.version > self.version || self.age(r.version) > self.config.max_staleness {
                return Err(AddError::Stale { group: id, got: r.version, wanted: self.version });
            }
            if r.prompt_tokens == 0
                || r.prompt_tokens + r.logprobs.len() != r.tokens.len()
                || r.logprobs.is_empty()
            {
                return Err(malformed("log-probabilities do not fit the completion"));
            }
            if r.trainable.len() != r.logprobs.len() || !r.trainable.contains(&true) {
                return Err(malformed("no token is trainable, or marks do not fit the completion"));
            }
            if !r.logprobs.iter().all(|l| l.is_finite() && *l <= 0.0) || !r.reward.is_finite() {
                return Err(malformed("a log-probability or reward is not a proper number"));
            }
        }
        if self.pending.contains_key(&id) {
            return Err(malformed("its number was used before"));
        }
        self.pending.insert(id, group);
        Ok(())
    }

    /// Which of the groups for one step dynamic sampling gives up, of which it has given up `given_up` before: those whose
    /// rewards, with the penalty for length, are all equal; in order of their numbers, so that it does not matter which came
    /// first.
    pub fn flat(&self, groups: &[Group], given_up: u64) -> Vec<u64> {
        if !self.config.dynamic_sampling {
            return Vec::new();
        }
        let mut flat: Vec<u64> = groups.iter().filter(|g| self.is_flat(g)).map(|g| g.id).collect();
        flat.sort_unstable();
        let left = self.config.max_flat_groups.saturating_sub(given_up);
        flat.truncate(usize::try_from(left).unwrap_or(usize::MAX));
        flat
    }

    fn is_flat(&self, group: &Group) -> bool {
        is_degenerate(&group.rollouts.iter().map(|r| self.shaped(r)).collect::<Vec<_>>())
    }

    /// The reward with the penalty for its length: what a tool or another player said is not the policy's doing.
    fn shaped(&self, rollout: &Rollout) -> f64 {
        let overlong = self.config.shaping.overlong;
        rollout.reward + overlong.map_or(0.0, |o| o.of(rollout.trainable.iter().filter(|t| **t).count()))
    }

    fn age(&self, version: PolicyVersion) -> u64 {
        self.version.0.saturating_sub(version.0)
    }

    /// Drops groups that have become too old while they waited.
    fn drop_stale(&mut self) {
        let (now, budget) = (self.version.0, self.config.max_staleness);
        let too_old = |r: &Rollout| now.saturating_sub(r.version.0) > budget;
        let before: usize = self.pending.values().map(|g| g.rollouts.len()).sum();
        self.pending.retain(|_, group| !group.rollouts.iter().any(too_old));
        let after: usize = self.pending.values().map(|g| g.rollouts.len()).sum();
        self.dropped_stale += (before - after) as u64;
    }

    /// Gives `samples` of `batch` their credit.
    fn give_credit(&self, batch: &[&Group], samples: &mut [Sample]) -> Result<(), StepError> {
        let rollouts: Vec<(u64, &Rollout)> =
            batch.iter().flat_map(|g| g.rollouts.iter().map(|r| (g.id, r))).collect();
        let in_reward = self.config.shaping.divergence();
        let cost = |sample: &Sample| -> Vec<f64> {
            let (Some(kl), Some(reference)) = (in_reward, &sample.reference_logprobs) else {
                return Vec::new();
            };
            let pairs = sample.sampled_logprobs.iter().zip(reference);
            pairs.map(|(q, p)| kl.weight * kl.evaluate(f64::from(*q), f64::from(*p)).0).collect()
        };
        let costs: Vec<Vec<f64>> = samples.iter().map(cost).collect();
        let episodes: Vec<Episode<'_>> = rollouts
            .iter()
            .zip(&costs)
            .map(|((group, r), costs)| Episode {
                group: *group,
                reward: self.shaped(r),
                trainable: &r.trainable,
                costs,
            })
            .collect();
        let credit = advantages(&episodes, &self.config.advantage)?;
        for (sample, credit) in samples.iter_mut().zip(credit) {
            sample.advantages = credit;
        }
        Ok(())
    }

    /// Consumes the groups with the smallest numbers and makes the next version. When all of them are degenerate
    /// the weights stay but the version advances, so that everyone sees that the groups are spent.
    ///
    /// # Errors
    /// When too few groups wait, or model, loss or optimiser refuse; the weights and the queue are as before then.
    pub fn train_step(&mut self) -> Result<StepReport, StepError> {
        self.train_step_with(&mut Absent(0))
    }

    /// The same with `assistants`, who hold the new weights afterwards. Which of them are there changes nothing but the time; for
    /// how many the batch is cut changes last bits, as replicas do.
    ///
    /// # Errors
    /// As [`Trainer::train_step`].
    pub fn train_step_with(&mut self, assistants: &mut dyn Assistants) -> Result<StepReport, StepError> {
        self.drop_stale();
        let needed = self.config.groups_per_step;
        if self.pending.len() < needed {
            return Err(StepError::TooFewGroups { needed, got: self.pending.len() });
        }
        let batch: Vec<&Group> = self.pending.values().take(needed).collect();
        let degenerate_groups = batch.iter().filter(|g| self.is_flat(g)).count();
        let mut samples = samples(&batch);
        if let Some(origin) = &self.origin {
            // The same model with the values that it began with: a second one would need its memory again.
            self.policy.assign(origin)?;
            let logprobs = completion_logprobs(&self.policy, &samples, self.config.micro_batch_tokens);
            self.policy.assign(&self.masters)?;
            for (sample, logprobs) in samples.iter_mut().zip(logprobs?) {
                sample.reference_logprobs = Some(logprobs);
            }
        }
        self.give_credit(&batch, &mut samples)?;
        assistants.hold(self.version, &self.masters);
        let policies: Vec<&mut P> = std::iter::once(&mut self.policy).chain(&mut self.replicas).collect();
        let cut = Cut {
            shares: policies.len() + assistants.seats(),
            micro_batch_tokens: self.config.micro_batch_tokens,
        };
        let mut own = Replicas::new(policies, &self.config.loss);
        let compute = |shares: &[_]| assistants.compute(shares, &mut own);
        let (mut gradients, loss) = policy_gradients(compute, &samples, &self.config.loss, cut)?;
        let update = self.optimiser.update(&mut self.masters, &mut gradients)?;
        for policy in std::iter::once(&mut self.policy).chain(&mut self.replicas) {
            policy.assign(&self.masters)?;
        }

        let rollouts = || batch.iter().flat_map(|g| &g.rollouts);
        let n = rollouts().count();
        let ages: Vec<u64> = rollouts().map(|r| self.age(r.version)).collect();
        let report = StepReport {
            version: PolicyVersion(self.version.0 + 1),
            groups: batch.len(),
            rollouts: n,
            degenerate_groups,
            reward_mean: rollouts().map(|r| r.reward).sum::<f64>() / n as f64,
            staleness_max: ages.iter().copied().max().unwrap_or(0),
            staleness_mean: ages.iter().sum::<u64>() as f64 / n as f64,
            loss,
            grad_norm: update.grad_norm,
            learning_rate: update.learning_rate,
        };
        let spent: Vec<u64> = batch.iter().map(|g| g.id).collect();
        for group in spent.iter().filter_map(|id| self.pending.remove(id)) {
            for rollout in group.rollouts {
                self.consumed.insert(rollout.lease);
            }
        }
        self.version = report.version;
        assistants.hold(self.version, &self.masters);
        Ok(report)
    }
}

/// What `batch` says, without credit.
fn samples(batch: &[&Group]) -> Vec<Sample> {
    let sample = |r: &Rollout| Sample {
        trainable: r.trainable.clone(),
        ..Sample::new(r.tokens.clone(), r.prompt_tokens, r.logprobs.clone(), 0.0)
    };
    batch.iter().flat_map(|group| &group.rollouts).map(sample).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::advantage::RewardShaping;
    use crate::data::LineDraws;
    use crate::loss::kl::{KlEstimator, KlGradient, KlTerm};
    use crate::optim::OptimConfig;
    use crate::policy::values;
    use crate::step::tests::Bigram;

    pub(crate) fn config() -> TrainerConfig {
        TrainerConfig {
            groups_per_step: 2,
            optim: OptimConfig { learning_rate: 0.2, ..OptimConfig::default() },
            ..TrainerConfig::default()
        }
    }

    /// A group of four answers of one token to the prompt `[prompt]`, sampled from the policy; token 2 is right.
    pub(crate) fn group(policy: &Bigram, id: u64, version: PolicyVersion) -> Group {
        let rollout = |i: u64| {
            let lease = id * 4 + i;
            let prompt = (id % 2) as u32;
            let token_logprob =
                |t: u32| values(policy.token_logprobs(&[prompt, t], &[0, 2]).unwrap().into_data())[0];
            let mut left = LineDraws::new(9, version.0, lease).uniform() as f32;
            let sampled = (0..3).find(|t| {
                left -= token_logprob(*t).exp();
                left < 0.0
            });
            let token = sampled.unwrap_or(3);
            let reward = f64::from(u8::from(token == 2));
            let logprobs = vec![token_logprob(token)];
            let (tokens, trainable) = (vec![prompt, token], vec![true]);
            Rollout { lease, tokens, prompt_tokens: 1, logprobs, trainable, version, reward }
        };
        Group { id, rollouts: (0..4).map(rollout).collect() }
    }

    pub(crate) fn round(trainer: &mut Trainer<Bigram>) -> StepReport {
        round_with(trainer, &mut Absent(0))
    }

    pub(crate) fn round_with(trainer: &mut Trainer<Bigram>, assistants: &mut dyn Assistants) -> StepReport {
        let next = trainer.consumed().len() / 4;
        for id in next..next + 2 {
            trainer.add_group(group(&trainer.policy().clone(), id, trainer.version())).unwrap();
        }
        trainer.train_step_with(assistants).unwrap()
    }

    #[test]
    fn a_batch_is_cut_for_assistants_who_are_not_there() {
        let weights = |replicas, seats| {
            let mut trainer = Trainer::new(Bigram::new(4), TrainerConfig { replicas, ..config() }).unwrap();
            let reports: Vec<_> = (0..5).map(|_| round_with(&mut trainer, &mut Absent(seats))).collect();
            (trainer.masters, reports)
        };
        let three = weights(3, 0);
        assert!(three == weights(1, 2) && three == weights(2, 1), "to the bit");
    }

    #[test]
    fn rewards_rise_and_on_policy_ratios_are_exactly_one() {
        let mut trainer = Trainer::new(Bigram::new(4), config()).unwrap();
        let reports: Vec<StepReport> = (0..40).map(|_| round(&mut trainer)).collect();
        let mean = |r: &[StepReport]| r.iter().map(|r| r.reward_mean).sum::<f64>() / r.len() as f64;
        assert!(mean(&reports[..10]) < 0.6 && mean(&reports[30..]) > 0.9, "{}", mean(&reports[30..]));
        assert!(reports.iter().all(|r| r.loss.ratio_deviation_max == 0.0 && r.staleness_max == 0));
        assert_eq!((trainer.version(), trainer.consumed().len()), (PolicyVersion(40), 320));
    }

    #[test]
    fn nothing_is_taken_twice_or_too_old() {
        let mut trainer = Trainer::new(Bigram::new(4), config()).unwrap();
        let first = group(trainer.policy(), 0, PolicyVersion(0));
        trainer.add_group(first.clone()).unwrap();
        assert!(matches!(trainer.add_group(first.clone()), Err(AddError::Duplicate { group: 0, lease: 0 })));
        assert!(matches!(trainer.train_step(), Err(StepError::TooFewGroups { needed: 2, got: 1 })));
        trainer.add_group(group(trainer.policy(), 1, PolicyVersion(0))).unwrap();
        trainer.train_step().unwrap();
        let moved = Group { id: 77, ..first };
        assert!(matches!(trainer.add_group(moved), Err(AddError::Duplicate { group: 77, .. })));
        let old = group(trainer.policy(), 5, PolicyVersion(0));
        assert!(matches!(trainer.add_group(old), Err(AddError::Stale { group: 5, .. })));
        let future = group(trainer.policy(), 5, PolicyVersion(9));
        assert!(matches!(trainer.add_group(future), Err(AddError::Stale { group: 5, .. })));
    }

    #[test]
    fn groups_that_grow_old_in_the_queue_are_dropped_and_counted() {
        let mut trainer =
            Trainer::new(Bigram::new(4), TrainerConfig { max_staleness: 1, ..config() }).unwrap();
        for id in 0..7 {
            trainer.add_group(group(&trainer.policy().clone(), id, PolicyVersion(0))).unwrap();
        }
        trainer.train_step().unwrap();
        assert_eq!(trainer.train_step().unwrap().staleness_max, 1);
        assert!(matches!(trainer.train_step(), Err(StepError::TooFewGroups { got: 0, .. })));
        assert_eq!((trainer.dropped_stale(), trainer.consumed().len()), (12, 16));
    }

    #[test]
    fn dynamic_sampling_gives_up_flat_groups_in_order_as_far_as_it_may() {
        let rewarded = |id, rewards: [f64; 4]| {
            let mut group = group(&Bigram::new(4), id, PolicyVersion(0));
            group.rollouts.iter_mut().zip(rewards).for_each(|(r, reward)| r.reward = reward);
            group
        };
        let groups = [rewarded(5, [1.0; 4]), rewarded(3, [1.0, 0.0, 0.0, 0.0]), rewarded(2, [0.5; 4])];
        let flat = |dynamic_sampling, given_up| {
            let config = TrainerConfig { dynamic_sampling, max_flat_groups: 4, ..config() };
            Trainer::new(Bigram::new(4), config).unwrap().flat(&groups, given_up)
        };
        assert_eq!(flat(true, 0), [2, 5]);
        assert_eq!(flat(true, 3), [2], "one is left");
        assert!(flat(true, 9).is_empty() && flat(false, 0).is_empty());
    }

    #[test]
    fn what_a_tool_says_makes_no_answer_overlong() {
        let overlong = crate::advantage::OverlongPenalty { max_tokens: 3, buffer_tokens: 2, factor: 1.0 };
        let shaping = RewardShaping { overlong: Some(overlong), kl: None };
        let trainer = Trainer::new(Bigram::new(4), TrainerConfig { shaping, ..config() }).unwrap();
        let mut rollout = group(trainer.policy(), 0, PolicyVersion(0)).rollouts.remove(0);
        rollout.trainable = vec![true, false, false];
        rollout.logprobs = vec![-1.0, 0.0, 0.0];
        assert_eq!(trainer.shaped(&rollout), rollout.reward);
        rollout.trainable = vec![true, false, true];
        assert_eq!(trainer.shaped(&rollout), rollout.reward - 0.5);
    }

    /// The mean reward of the last ten of 60 steps with this divergence, and how far log-probabilities are from where they began.
    fn learnt(in_reward: Option<KlTerm>, in_loss: Option<KlTerm>) -> (f64, f64) {
        let mut settings = config();
        settings.shaping.kl = in_reward;
        settings.loss.kl = in_loss;
        let mut trainer = Trainer::new(Bigram::new(4), settings).unwrap();
        let logprobs = |policy: &Bigram| {
            let all = [0, 0, 0, 1, 0, 2, 0, 3, 1, 0, 1, 1, 1, 2, 1, 3];
            let ends: Vec<u32> = (0..=8).map(|i| 2 * i).collect();
            values(policy.token_logprobs(&all, &ends).unwrap().into_data())
        };
        let began = logprobs(trainer.policy());
        let rewards: Vec<f64> = (0..60).map(|_| round(&mut trainer).reward_mean).collect();
        let reward = rewards[50..].iter().sum::<f64>() / 10.0;
        let far = logprobs(trainer.policy()).into_iter().zip(&began).map(|(l, p)| f64::from((l - p).abs()));
        (reward, far.sum())
    }

    #[test]
    fn a_divergence_pulls_towards_the_policy_that_the_run_began_with() {
        let term = |weight| KlTerm { gradient: KlGradient::K2, ..KlTerm::trl(weight) };
        let cost = |weight| KlTerm { estimator: KlEstimator::K1, ..KlTerm::trl(weight) };
        let (reward, far) = learnt(None, None);
        assert!(reward > 0.9, "it learns when nothing holds it: {reward}");
        assert_eq!((reward, far), learnt(Some(cost(0.0)), Some(term(0.0))), "no weight, no pull");
        for (in_reward, in_loss) in [(Some(cost(5.0)), None), (None, Some(term(5.0)))] {
            let (held_reward, held) = learnt(in_reward, in_loss);
            assert!(held < far / 2.0 && held_reward < reward, "{held} of {far}, {held_reward} of {reward}");
        }
    }

    #[test]
    fn broken_rollouts_are_named() {
        let mut trainer = Trainer::new(Bigram::new(4), config()).unwrap();
        let good = group(trainer.policy(), 3, PolicyVersion(0));
        let broken = |change: &dyn Fn(&mut Rollout)| {
            let mut g = good.clone();
            change(&mut g.rollouts[1]);
            g
        };
        for g in [
            broken(&|r| r.reward = f64::NAN),
            broken(&|r| r.logprobs[0] = 0.5),
            broken(&|r| r.logprobs.clear()),
            broken(&|r| r.prompt_tokens = 0),
            broken(&|r| r.trainable = vec![false]),
            broken(&|r| r.trainable.clear()),
            Group { id: 3, rollouts: Vec::new() },
        ] {
            assert!(matches!(trainer.add_group(g), Err(AddError::Malformed { group: 3, .. })));
        }
        assert_eq!(trainer.pending(), 0);
    }
}
