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
//! let groups = collector.round(&mut sync, &first).await?;
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

use super::LONG_POLL;
use super::journal::{Journal, JournalError};
use crate::admission::Admission;
use crate::config::{DispatchConfig, InvalidConfig};
use crate::dispatcher::{Broken, Command, Counts, Dispatcher, Outcome, Refusal, Submission};
use crate::group::Group;
use crate::lease::{GroupId, LeaseId};
use crate::snapshot::SignedSnapshot;
use crate::sync::{Action, OutOfOrder, Phase, SequentialSync, View};

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
    /// How often an audit is given out before its trajectory is given up. Default: 3.
    pub max_audit_tries: u32,
    /// How long a worker has to open a commitment. Default: 5 s.
    pub open_timeout: Duration,
    /// How long a question for work is kept open before it is answered with nothing. Default: [`LONG_POLL`].
    pub long_poll: Duration,
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
            max_audit_tries: 3,
            open_timeout: Duration::from_secs(5),
            long_poll: LONG_POLL,
        }
    }

    /// Names everything that decides what a journal's commands mean. The audits' secret is bound, and not told.
    fn settings_hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("echo-rollout journal settings v1");
        let dispatch = serde_json::to_vec(&self.dispatch).expect("numbers become JSON");
        let version = self.environment_version.to_le_bytes();
        let secret = self.dispatch.audit.seed.to_le_bytes();
        for part in
            [&dispatch[..], self.environment.as_bytes(), &version, self.base_model_id.as_bytes(), &secret]
        {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        *hasher.finalize().as_bytes()
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
    /// Locked before `state`, so that commands are carried out in the order in which they were written down. It waits for
    /// the disk: never lock it on the runtime's threads.
    journal: Mutex<Option<Journal>>,
    /// Never held while anybody waits for anything.
    state: Mutex<State>,
    /// Counts changes that somebody may wait for.
    changed: watch::Sender<u64>,
    started: Instant,
    /// What the run's clock showed when this process started.
    base_ms: u64,
}

struct State {
    dispatcher: Dispatcher,
    closed: bool,
    /// Whether the run is over and workers are told so.
    finished: bool,
    snapshots: BTreeMap<PolicyVersion, SignedSnapshot>,
    /// Audits that an auditor works on, with the time it took the last of how many.
    audits: BTreeMap<LeaseId, (Instant, u32)>,
    /// Auditors that have asked and were not told of the end.
    auditors: BTreeSet<PeerId>,
    /// Repeated and late submissions that were answered without the books.
    duplicates_refused: u64,
    late_refused: u64,
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
        let mut dispatcher = Dispatcher::new(config.dispatch.clone())?;
        let settings = config.settings_hash();
        let read = move || -> Result<_, JournalError> {
            let mut base_ms = 0;
            let Some(path) = journal else { return Ok((dispatcher, None, base_ms)) };
            let mut journal = Journal::open(&path, &settings, |now_ms, command| {
                base_ms = base_ms.max(now_ms);
                dispatcher.handle(now_ms, command);
            })?;
            let committed = dispatcher.steps();
            // The checkpoint is written before the commit.
            let fits =
                if journal.is_empty() { steps == 0 } else { steps == committed || steps == committed + 1 };
            if !fits {
                let path = path.clone();
                return Err(JournalError::OtherCheckpoint { path, journal: committed, checkpoint: steps });
            }
            if !journal.is_empty() {
                let recover = Command::Recover { steps };
                journal.append(base_ms, std::slice::from_ref(&recover), true)?;
                dispatcher.handle(base_ms, recover);
            }
            Ok((dispatcher, Some(journal), base_ms))
        };
        let read = tokio::task::spawn_blocking(read).await.expect("reading the journal does not panic");
        let (dispatcher, journal, base_ms) = read?;
        let state = State {
            dispatcher,
            closed: false,
            finished: false,
            snapshots: BTreeMap::new(),
            audits: BTreeMap::new(),
            auditors: BTreeSet::new(),
            duplicates_refused: 0,
            late_refused: 0,
        };
        let inner = Inner {
            node: node.clone(),
            config,
            admission,
            journal: Mutex::new(journal),
            state: Mutex::new(state),
            changed: watch::Sender::new(0),
            started: Instant::now(),
            base_ms,
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
        self.command(Command::SetVersion(snapshot.manifest().version)).await?;
        self.restore(snapshot);
        Ok(())
    }

    /// After a restart: `snapshot` was published before, and what was sampled with it can be audited again. One that is
    /// newer than what the journal knows of is not told of.
    pub fn restore(&self, snapshot: &SignedSnapshot) {
        let version = snapshot.manifest().version;
        let mut state = self.inner.state();
        let newest = state.dispatcher.version();
        if version > newest {
            return;
        }
        let oldest = newest.0.saturating_sub(self.inner.config.dispatch.snapshots_kept());
        state.snapshots.insert(version, snapshot.clone());
        state.snapshots.retain(|v, _| v.0 >= oldest);
        drop(state);
        self.inner.changed.send_modify(|n| *n += 1);
    }

    /// The newest version that was published, and how many groups were last asked to be open: before a restart as well.
    pub fn reached(&self) -> (PolicyVersion, u32) {
        let state = self.inner.state();
        (state.dispatcher.version(), state.dispatcher.asked_open())
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
    ) -> Result<Vec<Group>, CollectorError> {
        let mut changed = self.changes();
        loop {
            match sync.poll(self.now_ms(), &self.view()) {
                Some(Action::Publish(expected)) => {
                    let got = snapshot.manifest().version;
                    if got != expected {
                        return Err(CollectorError::WrongVersion { got, expected });
                    }
                    self.publish(snapshot).await?;
                    sync.handle_published(self.now_ms())?;
                }
                Some(Action::OpenGroups { up_to }) => {
                    self.leave_behind().await?;
                    self.open_groups(up_to).await?;
                    sync.handle_opened()?;
                }
                Some(Action::Train { step, groups }) => {
                    let groups = self.take(step, groups).await?;
                    if !groups.is_empty() {
                        return Ok(groups);
                    }
                    wait(&mut changed).await;
                }
                Some(action @ Action::Commit { .. }) => return Err(CollectorError::Unexpected { action }),
                // The acknowledgement deadline passes without anything happening.
                None => wait(&mut changed).await,
            }
        }
    }

    /// The learner's step with the round's groups is on disk: they are consumed.
    ///
    /// # Errors
    /// When there was no such step or the journal refuses.
    pub async fn commit(&self, sync: &mut SequentialSync) -> Result<(), CollectorError> {
        if matches!(sync.phase(), Phase::Train) {
            sync.handle_trained()?;
        }
        if let Some(Action::Commit { step }) = sync.poll(self.now_ms(), &View::default()) {
            self.commit_step(step).await?;
        }
        Ok(sync.handle_committed()?)
    }

    /// What a coordinator sees.
    pub fn view(&self) -> View {
        View::of(&self.inner.state().dispatcher)
    }

    /// Milliseconds of the run's clock, which stands still while the trainer is down.
    pub fn now_ms(&self) -> u64 {
        self.inner.now_ms()
    }

    /// Changes whenever something has happened.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changed.subscribe()
    }

    /// Nobody waits any longer for workers that have not installed the newest version; they come back when they have.
    async fn leave_behind(&self) -> Result<(), CollectorError> {
        let late: Vec<Command> = {
            let state = self.inner.state();
            let newest = Some(state.dispatcher.version());
            let late = state.dispatcher.active_versions().into_iter().filter(|(_, v)| *v != newest);
            late.map(|(worker, _)| Command::Disconnect { worker }).collect()
        };
        if !late.is_empty() {
            self.inner.execute(late, false).await?;
        }
        Ok(())
    }

    /// Opens groups until so many are open, those with the learner included.
    ///
    /// # Errors
    /// When the journal refuses.
    pub async fn open_groups(&self, up_to: u32) -> Result<(), CollectorError> {
        self.command(Command::OpenGroups { up_to }).await.map(|_| ())
    }

    /// Hands so many groups to the learner's `step`, or none. The same step gets the same groups again.
    ///
    /// # Errors
    /// When the journal refuses.
    pub async fn take(&self, step: u64, groups: u32) -> Result<Vec<Group>, CollectorError> {
        let taken = self.command(Command::Take { step, groups }).await?;
        Ok(if let Outcome::Groups(groups) = taken { groups } else { Vec::new() })
    }

    /// The learner gives back what it took for `step`: the `flat` groups are given up, the others wait for it.
    ///
    /// # Errors
    /// When the journal refuses.
    pub async fn give_back(&self, step: u64, flat: Vec<GroupId>) -> Result<(), CollectorError> {
        self.command(Command::GiveBack { step, flat }).await.map(|_| ())
    }

    /// Groups that were given up for equal rewards since the last commit.
    pub fn flat_groups(&self) -> u64 {
        self.inner.state().dispatcher.flat_groups()
    }

    /// The learner's `step` is on disk: its groups are consumed.
    ///
    /// # Errors
    /// When the journal refuses.
    pub async fn commit_step(&self, step: u64) -> Result<(), CollectorError> {
        self.command(Command::Commit { step }).await.map(|_| ())
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

    /// The run is over: whoever asks for work is told so. Returns when all workers have said goodbye and all auditors were
    /// told, or after `grace`. [`Self::close`] comes next.
    pub async fn finish(&self, grace: Duration) {
        let mut changed = self.changes();
        self.inner.state().finished = true;
        self.inner.changed.send_modify(|n| *n += 1);
        let deadline = tokio::time::Instant::now() + grace;
        loop {
            let all_told = {
                let state = self.inner.state();
                state.dispatcher.active_versions().is_empty() && state.auditors.is_empty()
            };
            if all_told || tokio::time::timeout_at(deadline, changed.changed()).await.is_err() {
                return;
            }
        }
    }

    /// Stops answering and closes the journal, so that another collector can open it. Workers keep what they have and
    /// ask again.
    pub fn close(&self) {
        let mut journal = self.inner.journal.lock().unwrap_or_else(PoisonError::into_inner);
        self.inner.state().closed = true;
        *journal = None;
        drop(journal);
        self.inner.changed.send_modify(|n| *n += 1);
    }

    /// How many leases went where.
    pub fn counts(&self) -> Counts {
        let state = self.inner.state();
        let mut counts = state.dispatcher.counts();
        counts.duplicates_refused += state.duplicates_refused;
        counts.late_refused += state.late_refused;
        counts
    }

    /// How many trajectories that were trained on were 0 versions old, 1, and so on up to the oldest.
    pub fn staleness_by_age(&self) -> Vec<u64> {
        self.inner.state().dispatcher.staleness().by_age().to_vec()
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
        self.base_ms + u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Writes commands down and carries them out, off the runtime's threads.
    async fn execute(
        self: &Arc<Self>,
        commands: Vec<Command>,
        durable: bool,
    ) -> Result<Vec<Outcome>, JournalError> {
        let inner = Arc::clone(self);
        let work = move || inner.carry_out(commands, durable);
        tokio::task::spawn_blocking(work).await.expect("carrying out a command does not panic")
    }

    /// Writes commands down and carries them out. Waits for the disk.
    fn carry_out(&self, commands: Vec<Command>, durable: bool) -> Result<Vec<Outcome>, JournalError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state().closed {
            return Err(JournalError::Closed);
        }
        let now_ms = self.now_ms();
        if let Some(journal) = &mut *journal {
            journal.append(now_ms, &commands, durable)?;
        }
        let outcomes: Vec<Outcome> = {
            let mut state = self.state();
            commands.into_iter().map(|c| state.dispatcher.handle(now_ms, c)).collect()
        };
        drop(journal);
        // A question for work that was answered with nothing must not wake those who wait for work.
        let nothing = |outcome: &Outcome| matches!(outcome, Outcome::Leased(leases) if leases.is_empty());
        if !outcomes.iter().all(nothing) {
            self.changed.send_modify(|n| *n += 1);
        }
        Ok(outcomes)
    }
}

impl State {
    /// Counts a submission that the books need not hear of.
    fn count_refused(&mut self, answer: Submission) {
        self.duplicates_refused += u64::from(answer == Submission::Duplicate);
        self.late_refused += u64::from(answer != Submission::Duplicate);
    }
}

/// Until something has happened, or a moment has passed.
async fn wait(changed: &mut watch::Receiver<u64>) {
    let _ = tokio::time::timeout(TICK, changed.changed()).await;
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
        let now_ms = inner.now_ms();
        let (due, known) = {
            let state = inner.state();
            if state.closed {
                return;
            }
            let due = state.dispatcher.next_deadline_ms().is_some_and(|at| at <= now_ms);
            (due, gone.as_ref().is_some_and(|peer| !state.dispatcher.is_gone(peer)))
        };
        let command = match gone {
            Some(worker) if known => Command::Disconnect { worker },
            None if due => Command::Tick,
            _ => continue,
        };
        match inner.execute(vec![command], false).await {
            Ok(_) | Err(JournalError::Closed) => {}
            Err(error) => tracing::error!(%error, now_ms, "journal refuses"),
        }
    }
}
