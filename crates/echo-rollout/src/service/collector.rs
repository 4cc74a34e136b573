//! The trainer's side: registers workers, leases samples, takes trajectories in, has them audited, and hands complete
//! groups to the learner. What was acknowledged is in the journal.
//!
//! ```no_run
//! # async fn example(
//! #     node: lattica_net::Node, admission: std::sync::Arc<dyn echo_rollout::Admission>,
//! #     first: echo_rollout::SignedSnapshot,
//! # ) -> Result<(), Box<dyn std::error::Error>> {
//! use echo_rollout::service::{Collector, CollectorConfig};
//! use echo_rollout::sync::{SequentialConfig, SequentialSync};
//! use echo_rollout::DispatchConfig;
//! use swarm_wire::{PolicyVersion, RunId};
//!
//! let config = CollectorConfig::new(DispatchConfig::new(RunId(1)), "tiny-id", "arithmetic", 1);
//! let collector = Collector::start(node, config, admission, None, 0).await?;
//! let round = SequentialConfig { groups_per_step: 8, min_workers: 1, ack_timeout_ms: 3000 };
//! let mut sync = SequentialSync::new(round, PolicyVersion(0), 0);
//! let mut next_seed = 0..;
//! let groups = collector.round(&mut sync, &first, |n| next_seed.by_ref().take(n as usize).collect()).await?;
//! // ... train on `groups`, write the checkpoint, then:
//! collector.commit(&mut sync).await?;
//! # let _ = groups; Ok(())
//! # }
//! ```

mod handlers;
#[cfg(test)]
#[cfg(feature = "service")]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lattica_net::{NetEvent, Node};
use swarm_wire::{PeerId, PolicyVersion};
use tokio::sync::{broadcast, watch};

use super::journal::{Journal, JournalError};
use crate::admission::Admission;
use crate::config::{DispatchConfig, InvalidConfig};
use crate::dispatcher::{AuditOutcome, Broken, Command, Counts, Dispatcher, Outcome, Refusal};
use crate::group::Group;
use crate::lease::LeaseId;
use crate::snapshot::SignedSnapshot;
use crate::sync::{Action, OutOfOrder, SequentialSync, View};

/// Snapshots kept beyond the staleness bound, for audits that come late.
const SPARE_SNAPSHOTS: u64 = 4;
/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(100);

/// How a collector is set up.
#[derive(Debug, Clone)]
pub struct CollectorConfig {
    /// Leases, deadlines, audits.
    pub dispatch: DispatchConfig,
    /// Names the base checkpoint; workers with another one are refused.
    pub base_model_id: String,
    /// The environment's name.
    pub environment: String,
    /// The environment's version.
    pub environment_version: u32,
    /// Peers whose verdicts count. Must not be empty when the policy audits anything.
    pub auditors: Vec<PeerId>,
    /// An audit that an auditor took and has not finished is given out again after this long. Default: 15 s.
    pub audit_timeout: Duration,
    /// How long a worker has to open a commitment. Default: 5 s.
    pub open_timeout: Duration,
}

impl CollectorConfig {
    /// The defaults, without auditors.
    pub fn new(
        dispatch: DispatchConfig,
        base_model_id: impl Into<String>,
        environment: impl Into<String>,
        environment_version: u32,
    ) -> Self {
        Self {
            dispatch,
            base_model_id: base_model_id.into(),
            environment: environment.into(),
            environment_version,
            auditors: Vec::new(),
            audit_timeout: Duration::from_secs(15),
            open_timeout: Duration::from_secs(5),
        }
    }
}

/// What can go wrong at the trainer's side.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectorError {
    /// The configuration is out of range.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// Audits without anybody who could make them.
    #[error(
        "the audit policy draws trajectories but no auditor is named; name one or set fraction and first to 0"
    )]
    NoAuditor,
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The dispatcher refused a command of the trainer.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The round's steps were mixed up.
    #[error(transparent)]
    Order(#[from] OutOfOrder),
    /// The snapshot is not of the version that is to be published.
    #[error("snapshot of {got} given where {expected} is to be published")]
    WrongVersion {
        /// The snapshot's version.
        got: PolicyVersion,
        /// The round's version.
        expected: PolicyVersion,
    },
    /// The round asked for something that this call does not do.
    #[error("round is at {action:?}; call commit before the next round")]
    Unexpected {
        /// What it asked for.
        action: Action,
    },
}

/// What the trainer knows of its workers.
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerStatus {
    /// The worker.
    pub peer: PeerId,
    /// The version that it has installed.
    pub version: Option<PolicyVersion>,
}

/// The trainer's side of the rollout swarm. A cheap handle.
#[derive(Clone)]
pub struct Collector {
    inner: Arc<Inner>,
}

struct Inner {
    node: Node,
    config: CollectorConfig,
    admission: Arc<dyn Admission>,
    state: Mutex<State>,
    /// Counts changes that somebody may wait for.
    changed: watch::Sender<u64>,
    started: Instant,
}

struct State {
    dispatcher: Dispatcher,
    journal: Option<Journal>,
    closed: bool,
    /// What the run's clock showed when this process started.
    base_ms: u64,
    snapshots: BTreeMap<PolicyVersion, SignedSnapshot>,
    /// Audits that an auditor works on, with the time it took them.
    audits: BTreeMap<LeaseId, Instant>,
}

impl fmt::Debug for Collector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Collector({} on {})", self.inner.config.dispatch.run, self.inner.node.peer_id())
    }
}

impl Collector {
    /// Starts to answer workers and auditors on `node`. With a journal path, a run that was interrupted goes on; `steps`
    /// is then the number of steps in the trainer's checkpoint. The collector ends with the node.
    ///
    /// # Errors
    /// When the configuration is out of range or the journal cannot be used.
    pub async fn start(
        node: Node,
        config: CollectorConfig,
        admission: Arc<dyn Admission>,
        journal: Option<PathBuf>,
        steps: u64,
    ) -> Result<Self, CollectorError> {
        let audits = config.dispatch.audit.fraction > 0.0 || config.dispatch.audit.first > 0;
        if audits && config.auditors.is_empty() {
            return Err(CollectorError::NoAuditor);
        }
        let dispatcher = Dispatcher::new(config.dispatch.clone())?;
        let opened =
            tokio::task::spawn_blocking(move || journal.map(|path| Journal::open(&path)).transpose());
        let opened = opened.await.expect("opening the journal does not panic")?;
        let (journal, commands) = opened.map_or((None, Vec::new()), |(j, c)| (Some(j), c));
        let (snapshots, audits) = (BTreeMap::new(), BTreeMap::new());
        let mut state = State { dispatcher, journal, closed: false, base_ms: 0, snapshots, audits };
        let resumed = !commands.is_empty();
        for (now_ms, command) in commands {
            state.base_ms = state.base_ms.max(now_ms);
            state.dispatcher.handle(now_ms, command);
        }
        if resumed {
            let base_ms = state.base_ms;
            state.execute(base_ms, vec![Command::Recover { steps }], true)?;
        }
        let inner = Inner {
            node: node.clone(),
            config,
            admission,
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            started: Instant::now(),
        };
        let collector = Self { inner: Arc::new(inner) };
        handlers::install(&node, &collector.inner);
        tokio::spawn(watch_workers(Arc::downgrade(&collector.inner), node.events()));
        Ok(collector)
    }

    /// Workers learn of `snapshot` with their next question; groups opened from now on are made with it.
    ///
    /// # Errors
    /// When the version goes back or the journal refuses.
    pub async fn publish(&self, snapshot: &SignedSnapshot) -> Result<(), CollectorError> {
        let version = snapshot.manifest().version;
        {
            let mut state = self.inner.state();
            let keep = version.0.saturating_sub(self.inner.config.dispatch.staleness.0 + SPARE_SNAPSHOTS);
            state.snapshots.retain(|v, _| v.0 >= keep);
            state.snapshots.insert(version, snapshot.clone());
        }
        self.command(Command::SetVersion(version)).await.map(|_| ())
    }

    /// One round of the sequential mode up to complete, audited groups, which the learner then has. Dropping the future
    /// is safe; the next call goes on where this one was.
    ///
    /// # Errors
    /// When the snapshot is of another version, the steps are mixed up, or the journal refuses.
    pub async fn round(
        &self,
        sync: &mut SequentialSync,
        snapshot: &SignedSnapshot,
        mut task_seeds: impl FnMut(u32) -> Vec<u64>,
    ) -> Result<Vec<Group>, CollectorError> {
        let mut changed = self.inner.changed.subscribe();
        loop {
            let view = View::of(&self.inner.state().dispatcher);
            match sync.poll(self.inner.now_ms(), &view) {
                Some(Action::Publish(expected)) => {
                    let got = snapshot.manifest().version;
                    if got != expected {
                        return Err(CollectorError::WrongVersion { got, expected });
                    }
                    self.publish(snapshot).await?;
                    sync.handle_published(self.inner.now_ms())?;
                }
                Some(Action::OpenGroups(n)) => {
                    let missing = n.saturating_sub(u32::try_from(view.open_groups).unwrap_or(u32::MAX));
                    self.command(Command::OpenGroups { task_seeds: task_seeds(missing) }).await?;
                    sync.handle_opened()?;
                }
                Some(Action::Train { step }) => {
                    let take = Command::Take { step, max_groups: u32::MAX };
                    let Outcome::Groups(groups) = self.command(take).await? else { continue };
                    return Ok(groups);
                }
                Some(action @ Action::Commit { .. }) => return Err(CollectorError::Unexpected { action }),
                // The acknowledgement deadline passes without anything happening.
                None => {
                    let _ = tokio::time::timeout(TICK, changed.changed()).await;
                }
            }
        }
    }

    /// The learner's step with the round's groups is on disk: they are consumed.
    ///
    /// # Errors
    /// When there was no such step or the journal refuses.
    pub async fn commit(&self, sync: &mut SequentialSync) -> Result<(), CollectorError> {
        sync.handle_trained()?;
        if let Some(Action::Commit { step }) = sync.poll(self.inner.now_ms(), &View::default()) {
            self.command(Command::Commit { step }).await?;
        }
        Ok(sync.handle_committed()?)
    }

    /// Waits until `n` workers are registered, for at most `timeout`; how many there are then.
    pub async fn wait_for_workers(&self, n: usize, timeout: Duration) -> usize {
        let mut changed = self.inner.changed.subscribe();
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let here = self.workers().len();
            if here >= n || tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
                return here;
            }
        }
    }

    /// Admitted workers.
    pub fn workers(&self) -> Vec<WorkerStatus> {
        let active = self.inner.state().dispatcher.active_versions();
        active.into_iter().map(|(peer, version)| WorkerStatus { peer, version }).collect()
    }

    /// Convicted workers, each with the number of audits after which it was convicted.
    pub fn convicted(&self) -> Vec<(PeerId, u64)> {
        self.inner.state().dispatcher.convicted()
    }

    /// Stops answering and closes the journal, so that another collector can open it. Workers keep what they have and
    /// ask again.
    pub fn close(&self) {
        let mut state = self.inner.state();
        state.closed = true;
        state.journal = None;
        drop(state);
        self.inner.changed.send_modify(|n| *n += 1);
    }

    /// How many leases went where.
    pub fn counts(&self) -> Counts {
        self.inner.state().dispatcher.counts()
    }

    /// Checks all book-keeping.
    ///
    /// # Errors
    /// Names the first contradiction.
    pub fn check(&self) -> Result<(), Broken> {
        self.inner.state().dispatcher.check_invariants()
    }

    async fn command(&self, command: Command) -> Result<Outcome, CollectorError> {
        let outcome = self.inner.execute(vec![command], true).await?.pop().unwrap_or(Outcome::Done);
        match outcome {
            Outcome::Refused(refusal) => Err(refusal.into()),
            outcome => Ok(outcome),
        }
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> u64 {
        self.state().base_ms + self.elapsed_ms()
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Writes commands down and carries them out. Waiting for the disk is done off the runtime's threads.
    async fn execute(
        self: &Arc<Self>,
        commands: Vec<Command>,
        durable: bool,
    ) -> Result<Vec<Outcome>, JournalError> {
        let inner = Arc::clone(self);
        let work = move || {
            let mut state = inner.state();
            let now_ms = state.base_ms + inner.elapsed_ms();
            let outcomes = state.execute(now_ms, commands, durable);
            drop(state);
            // A question for work that was answered with nothing must not wake those who wait for work.
            let nothing = |outcome: &Outcome| matches!(outcome, Outcome::Leased(leases) if leases.is_empty());
            if !outcomes.as_ref().is_ok_and(|all| all.iter().all(nothing)) {
                inner.changed.send_modify(|n| *n += 1);
            }
            outcomes
        };
        tokio::task::spawn_blocking(work).await.expect("carrying out a command does not panic")
    }
}

impl State {
    fn execute(
        &mut self,
        now_ms: u64,
        commands: Vec<Command>,
        durable: bool,
    ) -> Result<Vec<Outcome>, JournalError> {
        if self.closed {
            return Err(JournalError::Closed);
        }
        if let Some(journal) = &mut self.journal {
            journal.append(now_ms, &commands, durable)?;
        }
        let outcomes = commands.into_iter().map(|c| self.dispatcher.handle(now_ms, c)).collect();
        let due: BTreeSet<LeaseId> = self.dispatcher.audits_due().iter().map(|t| t.id()).collect();
        self.audits.retain(|id, _| due.contains(id));
        Ok(outcomes)
    }
}

/// Lets leases expire, and tells the dispatcher of workers that are gone.
async fn watch_workers(inner: std::sync::Weak<Inner>, mut events: broadcast::Receiver<NetEvent>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let gone = tokio::select! {
            _ = tick.tick() => None,
            event = events.recv() => match event {
                Ok(NetEvent::Disconnected(peer)) => Some(peer),
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => continue,
                Err(broadcast::error::RecvError::Closed) => return,
            },
        };
        let Some(inner) = inner.upgrade() else { return };
        let (now_ms, due, known) = {
            let state = inner.state();
            let now_ms = state.base_ms + inner.elapsed_ms();
            let due = state.dispatcher.next_deadline_ms().is_some_and(|at| at <= now_ms);
            (now_ms, due, gone.as_ref().is_some_and(|peer| state.dispatcher.is_admitted(peer)))
        };
        let command = match gone {
            Some(worker) if known => Command::Disconnect { worker },
            None if due => Command::Tick,
            _ => continue,
        };
        if let Err(error) = inner.execute(vec![command], false).await {
            tracing::error!(%error, now_ms, "journal refuses");
        }
    }
}

/// What a verdict means for the books.
fn audit_outcome(verdict: swarm_wire::generated::echo::v1::Verdict) -> Option<AuditOutcome> {
    use swarm_wire::generated::echo::v1::Verdict;
    match verdict {
        Verdict::Pass => Some(AuditOutcome::Pass),
        Verdict::Fail => Some(AuditOutcome::Fail),
        Verdict::Inconclusive | Verdict::Withheld => Some(AuditOutcome::Unproven),
        Verdict::Unspecified => None,
    }
}
