//! The head's side: answers members, forgets silent ones, and tells them what to run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lattica_net::{DhtError, NetEvent, Node, Status};
use prost::Message;
use swarm_wire::generated::parallax::v1 as pb;
use swarm_wire::{DecodeError, PeerId};
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;

use super::{DESCRIBE, HEARTBEAT, JOIN, LEAVE, head_key};
use crate::{Coordinator, Incarnation, JoinError, NodeId, NodeProfile, PlanView, Report, wire};

/// The coordinator is ticked this often.
const TICK: Duration = Duration::from_millis(50);
/// Link measurements are taken over this often (in ticks), of so many pairs at most: all of 60 members four times a second, all
/// of a thousand once a minute.
const RTT_TICKS: u32 = 5;
const RTT_PAIRS: usize = 2048;
/// The head announces itself in the DHT again this often, and this often after an announcement that was not answered in time.
const ANNOUNCE_EVERY: Duration = Duration::from_secs(60);
const ANNOUNCE_RETRY: Duration = Duration::from_secs(2);

/// Completes an assignment with what only the engine knows: cache pages, byte spans of the weights.
pub type Answer = dyn Fn(&mut pb::Assignment) + Send + Sync;

/// Membership of one swarm, at its head. A cheap handle; the tasks end when the last clone is dropped.
#[derive(Clone)]
pub struct MembershipServer {
    inner: Arc<Inner>,
    _tasks: Arc<Tasks>,
}

impl std::fmt::Debug for MembershipServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MembershipServer").field("swarm", &self.inner.swarm).finish_non_exhaustive()
    }
}

struct Inner {
    node: Node,
    coordinator: Mutex<Coordinator>,
    local: Mutex<Option<(NodeId, Incarnation, Report)>>,
    swarm: String,
    served: Mutex<Arc<Served>>,
    next: Mutex<Option<Arc<Served>>>,
    view: watch::Sender<PlanView>,
    busy: AtomicBool,
    started: Instant,
}

/// A model, and what completes the assignments of its layers.
struct Served {
    description: pb::ModelDescription,
    complete: Box<Answer>,
}

struct Tasks(Vec<JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl MembershipServer {
    /// Answers members of `description.swarm` on `node` from now on.
    pub fn start(
        node: &Node,
        coordinator: Coordinator,
        description: pb::ModelDescription,
        complete: impl Fn(&mut pb::Assignment) + Send + Sync + 'static,
    ) -> Self {
        let view = watch::Sender::new(coordinator.view().clone());
        let inner = Arc::new(Inner {
            node: node.clone(),
            coordinator: Mutex::new(coordinator),
            local: Mutex::new(None),
            swarm: description.swarm.clone(),
            served: Mutex::new(Arc::new(Served { description, complete: Box::new(complete) })),
            next: Mutex::new(None),
            view,
            busy: AtomicBool::new(false),
            started: Instant::now(),
        });
        answer(&inner, DESCRIBE, |inner, _, body| inner.describe(body));
        answer(&inner, JOIN, |inner, peer, body| inner.join(&peer, body));
        answer(&inner, HEARTBEAT, |inner, peer, body| inner.heartbeat(&peer, body));
        answer(&inner, LEAVE, |inner, peer, body| inner.leave(&peer, body));
        let tasks = vec![
            tokio::spawn(tick_forever(Arc::clone(&inner))),
            tokio::spawn(announce_forever(Arc::clone(&inner))),
            tokio::spawn(watch_connections(Arc::clone(&inner), node.events())),
        ];
        Self { inner, _tasks: Arc::new(Tasks(tasks)) }
    }

    /// Every change of the plan.
    pub fn watch(&self) -> watch::Receiver<PlanView> {
        self.inner.view.subscribe()
    }

    /// Looks at the coordinator.
    pub fn read<T>(&self, look: impl FnOnce(&Coordinator) -> T) -> T {
        look(&self.inner.coordinator())
    }

    /// What the swarm serves.
    pub fn description(&self) -> pb::ModelDescription {
        self.inner.served().description.clone()
    }

    /// From now on the members of the plan are asked to read their layers of this model beside those that they serve;
    /// [`Coordinator::unstaged`] says how far they are.
    pub fn stage(
        &self,
        description: pb::ModelDescription,
        complete: impl Fn(&mut pb::Assignment) + Send + Sync + 'static,
    ) {
        *lock(&self.inner.next) = Some(Arc::new(Served { description, complete: Box::new(complete) }));
    }

    /// The next model is not wanted any more.
    pub fn withdraw(&self) {
        *lock(&self.inner.next) = None;
    }

    /// The next model is the one that the swarm serves, in a new epoch of the same plan.
    pub fn adopt(&self) {
        let mut coordinator = self.inner.coordinator();
        let Some(next) = lock(&self.inner.next).take() else { return };
        *lock(&self.inner.served) = next;
        coordinator.renew();
        self.inner.view.send_replace(coordinator.view().clone());
    }

    /// While busy, plans that are merely better wait.
    pub fn set_busy(&self, busy: bool) {
        self.inner.busy.store(busy, Ordering::Relaxed);
    }

    /// The head itself takes part, without network.
    ///
    /// # Errors
    /// When the profile is not usable.
    pub fn join_local(
        &self,
        profile: NodeProfile,
        incarnation: Incarnation,
        device: &str,
    ) -> Result<(), JoinError> {
        let id = profile.id.clone();
        self.inner.coordinator().join(
            self.inner.now(),
            profile,
            incarnation,
            Vec::new(),
            device.to_owned(),
        )?;
        *lock(&self.inner.local) = Some((id, incarnation, Report::default()));
        Ok(())
    }

    /// What the head says about its own stage; repeated as heartbeat until it changes.
    pub fn report_local(&self, report: Report) {
        if let Some((id, incarnation, last)) = lock(&self.inner.local).as_mut() {
            self.inner.coordinator().heartbeat(self.inner.now(), id, *incarnation, report.clone());
            *last = report;
        }
    }

    /// The current plan does not work although every member answers (a link between two of them is broken): everybody
    /// starts over in a new epoch.
    pub fn rebuild(&self, reason: &str) {
        self.inner.coordinator().rebuild(self.inner.now(), reason);
        self.inner.tick();
    }

    /// A member's stage was found dead by somebody else: its connection broke during a step.
    pub fn lost(&self, peer: &PeerId) {
        self.inner.coordinator().lost(self.inner.now(), &NodeId::from(peer));
        self.inner.tick();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn answer(
    inner: &Arc<Inner>,
    method: &'static str,
    reply: impl Fn(&Inner, PeerId, &Bytes) -> Result<Vec<u8>, Status> + Send + Sync + Clone + 'static,
) {
    let weak = Arc::downgrade(inner);
    inner.node.handle(method, move |peer, body| {
        let (weak, reply) = (weak.clone(), reply.clone());
        async move {
            let inner = weak.upgrade().ok_or_else(|| Status::unavailable("the head is shutting down"))?;
            reply(&inner, peer, &body).map(Bytes::from)
        }
    });
}

/// Bytes of a member's message; a heartbeat with round trips to a thousand members takes a quarter of it.
const MESSAGE_MAX_BYTES: usize = 256 << 10;

fn decode<M: Message + Default>(what: &'static str, body: &Bytes) -> Result<M, Status> {
    if body.len() > MESSAGE_MAX_BYTES {
        let (limit_bytes, got_bytes) = (MESSAGE_MAX_BYTES, body.len());
        return Err(Status::invalid_argument(DecodeError::TooLarge { what, limit_bytes, got_bytes }));
    }
    M::decode(&body[..]).map_err(|e| Status::invalid_argument(DecodeError::message(what, &e)))
}

impl Inner {
    fn coordinator(&self) -> MutexGuard<'_, Coordinator> {
        lock(&self.coordinator)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn served(&self) -> Arc<Served> {
        Arc::clone(&lock(&self.served))
    }

    fn check_swarm(&self, swarm: &str) -> Result<(), Status> {
        if swarm == self.swarm {
            return Ok(());
        }
        Err(Status::not_found(format!("this is the head of swarm `{}`, not `{swarm}`", self.swarm)))
    }

    fn describe(&self, body: &Bytes) -> Result<Vec<u8>, Status> {
        let request: pb::DescribeRequest = decode("DescribeRequest", body)?;
        self.check_swarm(&request.swarm)?;
        Ok(self.served().description.encode_to_vec())
    }

    fn join(&self, peer: &PeerId, body: &Bytes) -> Result<Vec<u8>, Status> {
        let request: pb::JoinRequest = decode("JoinRequest", body)?;
        self.check_swarm(&request.swarm)?;
        let profile = request.profile.unwrap_or_default();
        let profile = wire::node_profile(NodeId::from(peer), &profile).map_err(Status::invalid_argument)?;
        let addrs = wire::addrs(request.addrs).map_err(Status::invalid_argument)?;
        let device: String = request.device.chars().take(100).collect();
        let mut coordinator = self.coordinator();
        coordinator.join(self.now(), profile, request.incarnation, addrs, device).map_err(
            |error| match error {
                JoinError::Full { .. } => Status::resource_exhausted(error),
                JoinError::Ghost { .. } => Status::failed_precondition(error),
                JoinError::Profile(_) => Status::invalid_argument(error),
            },
        )?;
        tracing::info!(peer = %peer.short(), "member joined");
        let config = coordinator.config();
        let ms = |d: Duration| u32::try_from(d.as_millis()).unwrap_or(u32::MAX);
        let reply = pb::JoinReply {
            epoch: coordinator.view().epoch,
            heartbeat_ms: ms(config.heartbeat),
            timeout_ms: ms(config.timeout),
        };
        Ok(reply.encode_to_vec())
    }

    fn heartbeat(&self, peer: &PeerId, body: &Bytes) -> Result<Vec<u8>, Status> {
        let heartbeat: pb::Heartbeat = decode("Heartbeat", body)?;
        let (incarnation, epoch) = (heartbeat.incarnation, heartbeat.epoch);
        let report = wire::report(heartbeat).map_err(Status::invalid_argument)?;
        let id = NodeId::from(peer);
        let mut coordinator = self.coordinator();
        let staged = report.staged.as_ref().map(|staged| staged.checkpoint_id.clone());
        let known = coordinator.heartbeat(self.now(), &id, incarnation, report);
        let current = coordinator.view().epoch;
        // With the lock held, in which the served model changes together with the epoch.
        let (served, next) = (self.served(), lock(&self.next).clone());
        let tells = known && (epoch != current || next.is_some());
        let mut own = tells.then(|| self.assignment(&coordinator, &id));
        drop(coordinator);
        let runs = own.as_ref().is_some_and(|own| own.layers_start < own.layers_end);
        let next = next.filter(|_| runs).map(|next| {
            let has_it = staged.is_some_and(|staged| staged == next.description.checkpoint_id);
            let files = own.clone().filter(|_| !has_it).map(|mut own| {
                (next.complete)(&mut own);
                own.files
            });
            let model = Some(next.description.clone());
            pb::NextWeights { model, files: files.unwrap_or_default(), epoch: current }
        });
        let assignment = own.take_if(|_| epoch != current).map(|mut assignment| {
            if runs {
                (served.complete)(&mut assignment);
            }
            assignment
        });
        Ok(pb::HeartbeatReply { epoch: current, known, assignment, next }.encode_to_vec())
    }

    fn leave(&self, peer: &PeerId, body: &Bytes) -> Result<Vec<u8>, Status> {
        let request: pb::LeaveRequest = decode("LeaveRequest", body)?;
        self.coordinator().leave(self.now(), &NodeId::from(peer), request.incarnation);
        Ok(pb::LeaveReply {}.encode_to_vec())
    }

    /// What `id` runs in the current epoch; nothing when it is in no pipeline.
    fn assignment(&self, coordinator: &Coordinator, id: &NodeId) -> pb::Assignment {
        let epoch = coordinator.view().epoch;
        let nothing = pb::Assignment { epoch, ..pb::Assignment::default() };
        let Ok(plan) = &coordinator.view().plan else { return nothing };
        let Some((pipeline, index, layers)) = plan.stage_of(id) else { return nothing };
        let next = plan.pipelines[pipeline].stages.get(index + 1).map(|s| &s.node);
        let peer_of = |id: Option<&NodeId>| {
            let peer = id.and_then(|id| id.as_str().parse::<PeerId>().ok());
            peer.unwrap_or_else(|| self.node.peer_id()).as_bytes().to_vec().into()
        };
        let previous = index.checked_sub(1).map(|i| &plan.pipelines[pipeline].stages[i].node);
        pb::Assignment {
            epoch,
            layers_start: layers.start(),
            layers_end: layers.end(),
            stage_index: u32::try_from(index).unwrap_or(u32::MAX),
            next_is_head: next.is_none(),
            next_peer: peer_of(next),
            previous_peer: peer_of(previous),
            n_stages: u32::try_from(plan.pipelines[pipeline].stages.len()).unwrap_or(u32::MAX),
            next_addrs: next
                .and_then(|id| coordinator.member(id))
                .map(|m| m.addrs.clone())
                .unwrap_or_default(),
            ..nothing
        }
    }

    fn tick(&self) {
        let local = lock(&self.local).clone();
        let mut coordinator = self.coordinator();
        let now = self.now();
        if let Some((id, incarnation, report)) = local {
            coordinator.heartbeat(now, &id, incarnation, report);
        }
        if coordinator.tick(now, self.busy.load(Ordering::Relaxed)) {
            let view = coordinator.view().clone();
            tracing::info!(epoch = view.epoch, plan = ?view.plan, "new plan");
            self.view.send_replace(view);
        }
    }

    /// Round trips of the next pairs: measured here, told by the members, or predicted.
    fn measure_links(&self, turns: &mut PairTurns) {
        let named = |id: &NodeId| Some((id.clone(), id.as_str().parse::<PeerId>().ok()?));
        let members: Vec<(NodeId, PeerId)> =
            self.coordinator().members().filter_map(|(id, _)| named(id)).collect();
        let pairs = turns.next(members.len(), RTT_PAIRS).map(|(a, b)| (&members[a], &members[b]));
        let known: Vec<(&NodeId, &NodeId, f64)> = pairs
            .filter_map(|((a, peer), (b, other))| Some((a, b, self.node.link_between(peer, other)?.rtt_ms)))
            .collect();
        let mut coordinator = self.coordinator();
        for (a, b, rtt_ms) in known {
            coordinator.set_rtt(a, b, rtt_ms);
        }
    }
}

/// Whose turn it is among all pairs. Who joins or leaves moves the others' places, so that a pair may wait for another round.
#[derive(Debug, Default)]
struct PairTurns {
    next: usize,
}

impl PairTurns {
    /// The next pairs of `n` members, the smaller number first: at most `most`, none twice, up to the end of the round.
    fn next(&mut self, n: usize, most: usize) -> impl Iterator<Item = (usize, usize)> + use<> {
        let all = n * n.saturating_sub(1) / 2;
        let from = if self.next < all { self.next } else { 0 };
        self.next = from + most.min(all - from);
        (0..n).flat_map(move |a| (a + 1..n).map(move |b| (a, b))).skip(from).take(self.next - from)
    }
}

async fn tick_forever(inner: Arc<Inner>) {
    let mut turns = PairTurns::default();
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for n in 0u32.. {
        interval.tick().await;
        inner.tick();
        if n % RTT_TICKS == 0 {
            inner.measure_links(&mut turns);
        }
    }
}

/// Lets members that share only a bootstrap peer with the head find it.
async fn announce_forever(inner: Arc<Inner>) {
    let key = head_key(&inner.swarm);
    loop {
        let pause = match inner.node.provide(&key).await {
            Ok(()) => ANNOUNCE_EVERY,
            Err(DhtError::ShutDown) => return,
            Err(error) => {
                tracing::debug!(%error, "the head could not announce itself yet");
                ANNOUNCE_RETRY
            }
        };
        tokio::time::sleep(pause).await;
    }
}

async fn watch_connections(inner: Arc<Inner>, mut events: broadcast::Receiver<NetEvent>) {
    loop {
        match events.recv().await {
            Ok(NetEvent::Disconnected(peer)) => {
                inner.coordinator().lost(inner.now(), &NodeId::from(&peer));
                inner.tick();
            }
            // Whoever was missed is found by its missing heartbeats.
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_has_its_turn_and_no_turn_is_long() {
        for (n, most) in [(0, 3), (1, 3), (2, 3), (3, 3), (7, 4), (7, 100)] {
            let all: Vec<(usize, usize)> = (0..n).flat_map(|a| (a + 1..n).map(move |b| (a, b))).collect();
            let mut turns = PairTurns::default();
            for round in 0..2 {
                let mut seen = Vec::new();
                for _ in 0..all.len().div_ceil(most) {
                    let turn: Vec<(usize, usize)> = turns.next(n, most).collect();
                    assert!(turn.len() <= most, "{n} {most} {round}");
                    seen.extend(turn);
                }
                assert_eq!(seen, all, "{n} members, {most} at a time, round {round}");
            }
        }
    }

    #[test]
    fn a_swarm_that_shrinks_starts_anew() {
        let mut turns = PairTurns::default();
        assert_eq!(turns.next(10, 40).count(), 40);
        assert_eq!(turns.next(3, 40).collect::<Vec<_>>(), [(0, 1), (0, 2), (1, 2)]);
    }
}
