//! Membership to numbered plans: who is here, what they run, and when that changes. A state machine without a clock.
//!
//! Inputs are [`Coordinator::join`], [`Coordinator::heartbeat`], [`Coordinator::leave`] and [`Coordinator::lost`]; then
//! [`Coordinator::tick`] forgets silent members and makes a new plan when one is due. Every change of what somebody runs
//! has a new epoch. Incarnations keep ghosts out: whatever an older process of a peer still sends is ignored.

use std::collections::BTreeMap;
use std::time::Duration;

use swarm_wire::LayerRange;

use crate::{
    CoordinatorConfig, JoinError, ModelProfile, NodeId, NodeProfile, Pipeline, Plan, PlanError, RttMatrix,
    StagingError, plan,
};

/// Grows with every start of a member's process.
pub type Incarnation = u64;

/// What a member says about its assignment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemberState {
    /// No layers.
    #[default]
    Standby,
    /// Getting or loading weights.
    Loading,
    /// Its stage answers.
    Ready,
    /// It cannot run its layers.
    Failed,
}

impl MemberState {
    /// In reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Standby => "standby",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Failed => "failed",
        }
    }
}

/// What became of weights that a member was asked to read beside those that it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Staged {
    /// The checkpoint that they are of.
    pub checkpoint_id: String,
    /// Why they are not in memory.
    pub failure: Option<String>,
}

/// What a heartbeat brings.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Report {
    /// The epoch of the assignment that the state speaks about.
    pub epoch: u64,
    /// How far the member is with it.
    pub state: MemberState,
    /// Why.
    pub detail: String,
    /// Newest measurement of real steps, milliseconds per layer and token.
    pub decode_ms_per_layer: Option<f64>,
    /// Bytes of frames sent to the next stage so far.
    pub sent_bytes: u64,
    /// Of these, tensor payload.
    pub sent_payload_bytes: u64,
    /// Rows that these frames carried.
    pub sent_tokens: u64,
    /// The next weights.
    pub staged: Option<Staged>,
}

/// One member.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Its process.
    pub incarnation: Incarnation,
    /// Memory and speed; the speed follows the heartbeats.
    pub profile: NodeProfile,
    /// Where the stage before it can dial it.
    pub addrs: Vec<String>,
    /// For people.
    pub device: String,
    /// The newest heartbeat.
    pub report: Report,
    last_seen: Duration,
}

/// The current plan and its number.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanView {
    /// Rises with every change of what somebody runs.
    pub epoch: u64,
    /// The plan, or why there is none.
    pub plan: Result<Plan, PlanError>,
}

/// Membership and plan.
#[derive(Debug)]
pub struct Coordinator {
    model: ModelProfile,
    config: CoordinatorConfig,
    members: BTreeMap<NodeId, Member>,
    /// Newest incarnation ever seen of peers that left; bounded by `max_members`.
    graves: BTreeMap<NodeId, Incarnation>,
    rtt: RttMatrix,
    view: PlanView,
    /// Since when a new plan is wanted, and whether the current one is broken.
    wanted: Option<(Duration, bool)>,
    last_loss: Option<String>,
}

impl Coordinator {
    /// A swarm for `model`, without members.
    ///
    /// # Errors
    /// When the model or the configuration is not usable.
    pub fn new(model: ModelProfile, config: CoordinatorConfig) -> Result<Self, PlanError> {
        model.validate()?;
        config.validate()?;
        let epoch = config.first_epoch;
        Ok(Self {
            model,
            config,
            members: BTreeMap::new(),
            graves: BTreeMap::new(),
            rtt: RttMatrix::default(),
            view: PlanView { epoch, plan: Err(PlanError::NoNodes) },
            wanted: None,
            last_loss: None,
        })
    }

    /// The current plan.
    pub fn view(&self) -> &PlanView {
        &self.view
    }

    /// Members in the order of their ids.
    pub fn members(&self) -> impl Iterator<Item = (&NodeId, &Member)> {
        self.members.iter()
    }

    /// One member.
    pub fn member(&self, id: &NodeId) -> Option<&Member> {
        self.members.get(id)
    }

    /// The configuration.
    pub fn config(&self) -> &CoordinatorConfig {
        &self.config
    }

    /// The model's profile.
    pub fn model(&self) -> &ModelProfile {
        &self.model
    }

    /// A node joins, or joins again with a newer incarnation.
    ///
    /// # Errors
    /// When the swarm is full, the incarnation is not the newest, or the profile is not usable.
    pub fn join(
        &mut self,
        now: Duration,
        profile: NodeProfile,
        incarnation: Incarnation,
        addrs: Vec<String>,
        device: String,
    ) -> Result<(), JoinError> {
        profile.validate(&self.model)?;
        let id = profile.id.clone();
        let newest = self.members.get(&id).map(|m| m.incarnation).or_else(|| self.graves.get(&id).copied());
        if let Some(newest) = newest
            && incarnation < newest
        {
            return Err(JoinError::Ghost { node: id, incarnation, newest });
        }
        if !self.members.contains_key(&id) && self.members.len() >= self.config.max_members {
            return Err(JoinError::Full { limit: self.config.max_members });
        }
        // A restarted process has lost its stage, even if nobody noticed that it was away.
        let restarted = self.members.get(&id).is_some_and(|m| m.incarnation != incarnation);
        let broke = restarted && self.in_plan(&id);
        let member =
            Member { incarnation, profile, addrs, device, report: Report::default(), last_seen: now };
        self.members.insert(id.clone(), member);
        self.graves.remove(&id);
        if broke {
            self.break_plan(now, format!("{id} restarted"));
        } else {
            self.want(now, false);
        }
        Ok(())
    }

    /// A heartbeat; `false` means that this incarnation is unknown here and has to join.
    pub fn heartbeat(
        &mut self,
        now: Duration,
        id: &NodeId,
        incarnation: Incarnation,
        report: Report,
    ) -> bool {
        let epoch = self.view.epoch;
        let Some(member) = self.members.get_mut(id).filter(|m| m.incarnation == incarnation) else {
            return false;
        };
        member.last_seen = now;
        if let Some(ms) = report.decode_ms_per_layer.filter(|ms| ms.is_finite() && *ms > 0.0) {
            member.profile.decode_ms_per_layer = ms;
        }
        let failed = report.state == MemberState::Failed && report.epoch == epoch;
        let detail = report.detail.clone();
        member.report = report;
        if failed && self.in_plan(id) {
            // It stays known but unusable until it joins again: otherwise the same plan would be made forever.
            self.bury(id);
            self.break_plan(now, format!("{id} could not run its layers: {detail}"));
        }
        true
    }

    /// A member says goodbye.
    pub fn leave(&mut self, now: Duration, id: &NodeId, incarnation: Incarnation) {
        if self.members.get(id).is_some_and(|m| m.incarnation == incarnation) {
            self.remove(now, id, "left");
        }
    }

    /// The connection to a member broke: it counts as gone without waiting for the timeout.
    pub fn lost(&mut self, now: Duration, id: &NodeId) {
        if self.members.contains_key(id) {
            self.remove(now, id, "lost its connection");
        }
    }

    /// The current plan does not work although its members answer: the next tick starts a new epoch.
    pub fn rebuild(&mut self, now: Duration, reason: &str) {
        if self.view.plan.is_ok() {
            self.break_plan(now, reason.to_owned());
        }
    }

    /// The same plan in a new epoch: its members take it up again, with the weights that the head names now. A plan that is due
    /// is made at the next tick all the same.
    pub fn renew(&mut self) {
        if self.view.plan.is_ok() {
            self.view.epoch += 1;
            self.stand_by();
        }
    }

    /// The members of the plan that have not staged this checkpoint yet.
    ///
    /// # Errors
    /// When there is no plan, or the first member that cannot stage it.
    pub fn unstaged(&self, checkpoint_id: &str) -> Result<Vec<NodeId>, StagingError> {
        let plan = self.view.plan.as_ref().map_err(|error| StagingError::NoPlan(error.clone()))?;
        let mut unstaged = Vec::new();
        for stage in plan.pipelines.iter().flat_map(|p| &p.stages) {
            let staged = self.members.get(&stage.node).and_then(|m| m.report.staged.as_ref());
            match staged.filter(|s| s.checkpoint_id == checkpoint_id).map(|s| &s.failure) {
                Some(None) => {}
                Some(Some(reason)) => {
                    return Err(StagingError::Refused { node: stage.node.clone(), reason: reason.clone() });
                }
                None => unstaged.push(stage.node.clone()),
            }
        }
        Ok(unstaged)
    }

    /// Records a round-trip time for the order of stages.
    pub fn set_rtt(&mut self, a: &NodeId, b: &NodeId, rtt_ms: f64) {
        if self.members.contains_key(a) && self.members.contains_key(b) {
            self.rtt.set(a, b, rtt_ms);
        }
    }

    /// The round-trip time between two members.
    pub fn rtt_ms(&self, a: &NodeId, b: &NodeId) -> f64 {
        self.rtt.get(a, b)
    }

    /// Forgets members that have been silent too long and, when one is due, makes a new plan; `busy` puts off plans
    /// that are merely better, because they would interrupt requests. True when the epoch changed.
    pub fn tick(&mut self, now: Duration, busy: bool) -> bool {
        let before = self.view.epoch;
        let silent: Vec<NodeId> = self
            .members
            .iter()
            .filter(|(_, m)| now.saturating_sub(m.last_seen) > self.config.timeout)
            .map(|(id, _)| id.clone())
            .collect();
        for id in silent {
            let reason = format!("sent no heartbeat for {} ms", self.config.timeout.as_millis());
            self.remove(now, &id, &reason);
        }
        let Some((since, broken)) = self.wanted else { return self.view.epoch != before };
        let settled = now.saturating_sub(since) >= self.config.settle;
        if broken || (settled && !(busy && self.view.plan.is_ok())) {
            self.wanted = None;
            self.replan(broken);
        }
        self.view.epoch != before
    }

    /// Whether every member of this pipeline runs its layers of the current epoch.
    pub fn is_ready(&self, pipeline: &Pipeline) -> bool {
        pipeline.stages.iter().all(|stage| {
            self.members
                .get(&stage.node)
                .is_some_and(|m| m.report.state == MemberState::Ready && m.report.epoch == self.view.epoch)
        })
    }

    /// Whether some pipeline serves.
    pub fn is_serving(&self) -> bool {
        self.view.plan.as_ref().is_ok_and(|plan| plan.pipelines.iter().any(|p| self.is_ready(p)))
    }

    /// One sentence about what the swarm waits for, or that it serves.
    pub fn why(&self) -> String {
        let after = |text: String| match &self.last_loss {
            Some(loss) => format!("{text} (after {loss})"),
            None => text,
        };
        match &self.view.plan {
            _ if self.is_serving() => "serving".to_owned(),
            Err(_) if self.wanted.is_some() && !self.members.is_empty() => {
                after(format!("about to plan with {} nodes", self.members.len()))
            }
            Err(error) => after(error.to_string()),
            Ok(plan) => {
                let waiting = plan.pipelines.iter().flat_map(|p| &p.stages).find_map(|stage| {
                    let member = self.members.get(&stage.node)?;
                    let current = member.report.epoch == self.view.epoch;
                    let state = if current { member.report.state } else { MemberState::Loading };
                    (state != MemberState::Ready).then(|| {
                        let detail = if current {
                            member.report.detail.as_str()
                        } else {
                            "has its assignment to take up"
                        };
                        format!(
                            "waiting for {} with layers {}: {} {detail}",
                            stage.node,
                            stage.layers,
                            state.as_str()
                        )
                    })
                });
                after(
                    waiting
                        .unwrap_or_else(|| "waiting for a pipeline to form".to_owned())
                        .trim_end()
                        .to_owned(),
                )
            }
        }
    }

    /// The newest loss that broke a plan: who, with which layers, and how it was noticed.
    pub fn last_loss(&self) -> Option<&str> {
        self.last_loss.as_deref()
    }

    /// The layers of a member in the current plan: pipeline, stage index, layers.
    pub fn stage_of(&self, id: &NodeId) -> Option<(usize, usize, LayerRange)> {
        self.view.plan.as_ref().ok()?.stage_of(id)
    }

    fn in_plan(&self, id: &NodeId) -> bool {
        self.stage_of(id).is_some()
    }

    fn remove(&mut self, now: Duration, id: &NodeId, reason: &str) {
        let held = self.stage_of(id);
        self.bury(id);
        if let Some((_, _, layers)) = held {
            self.break_plan(now, format!("{id} with layers {layers} {reason}"));
        } else {
            self.want(now, false);
        }
    }

    fn bury(&mut self, id: &NodeId) {
        if let Some(member) = self.members.remove(id) {
            if self.graves.len() >= self.config.max_members {
                self.graves.pop_first();
            }
            self.graves.insert(id.clone(), member.incarnation);
        }
        self.rtt.remove(id);
    }

    fn break_plan(&mut self, now: Duration, loss: String) {
        self.last_loss = Some(loss);
        self.want(now, true);
    }

    fn want(&mut self, now: Duration, broken: bool) {
        let was_broken = self.wanted.is_some_and(|(_, broken)| broken);
        self.wanted = Some((now, broken || was_broken));
    }

    fn replan(&mut self, broken: bool) {
        let nodes: Vec<NodeProfile> = self.members.values().map(|m| m.profile.clone()).collect();
        let new = plan(&self.model, &nodes, &self.rtt, &self.config.plan);
        if let (false, Ok(old), Ok(new)) = (broken, &self.view.plan, &new) {
            // The old plan at today's speeds; only a clear gain is worth interrupting requests.
            let slowest = |p: &Pipeline| Pipeline::price(p.stages.clone(), &nodes, &self.rtt).bottleneck_ms;
            let old_rate: f64 = old.pipelines.iter().map(|p| 1000.0 / slowest(p)).sum();
            let more = new.pipelines.iter().map(|p| p.stages.len()).sum::<usize>()
                > old.pipelines.iter().map(|p| p.stages.len()).sum::<usize>();
            let prefers_more = self.config.plan.more_nodes_slack > 1.0 && more;
            if !prefers_more && new.throughput_tokens_per_s < old_rate * self.config.min_gain {
                return;
            }
        }
        let same = match (&self.view.plan, &new) {
            (Ok(old), Ok(new)) => !broken && stages(old) == stages(new),
            (Err(_), Err(_)) => true,
            _ => false,
        };
        if new.is_ok() && !same {
            self.stand_by();
        }
        self.view = PlanView { epoch: self.view.epoch + u64::from(!same), plan: new };
    }

    fn stand_by(&mut self) {
        for member in self.members.values_mut() {
            member.report.state = MemberState::Standby;
        }
    }
}

fn stages(plan: &Plan) -> Vec<(&NodeId, LayerRange)> {
    plan.pipelines.iter().flat_map(|p| p.stages.iter().map(|s| (&s.node, s.layers))).collect()
}

#[cfg(test)]
mod tests;
