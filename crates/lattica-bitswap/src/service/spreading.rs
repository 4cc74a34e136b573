//! A spread on real peers: one task a member drives the state machine; every neighbour has a stream with a reader and a
//! writer.

mod connection;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use lattica_net::{NetEvent, Node, Stream};
use swarm_wire::{Cid, PeerId};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use super::exchange::Exchange;
use super::{Blocks, Progress, files};
use crate::spread::wire::{Contact, Frame};
use crate::spread::{Action, Bitmap, Spread, SpreadConfig};
use crate::{FetchError, Manifest};

/// Frames that wait for one neighbour's stream.
const OUTGOING_MAX: usize = 1024;
/// Members that are remembered as possible neighbours.
const CONTACTS_MAX: usize = 256;
/// New neighbours are not looked for more often.
const SEARCH_EVERY: Duration = Duration::from_secs(1);
/// Neighbours that are tried in one search.
const SEARCH_TRIES: usize = 4;

/// What waits for a neighbour's stream.
enum Outgoing {
    Frame(Frame),
    /// A chunk to load and send.
    Chunk(u32),
}

/// A neighbour's stream.
struct Link {
    /// Who opened it: of two streams that cross, the one of the smaller peer stays.
    opener: PeerId,
    queue: mpsc::Sender<Outgoing>,
    generation: u64,
}

struct State {
    spread: Spread<PeerId>,
    links: BTreeMap<PeerId, Link>,
    generations: u64,
    /// Members that sent wrong bytes: not taken as neighbours again.
    shunned: BTreeSet<PeerId>,
    contacts: BTreeMap<PeerId, Vec<String>>,
}

/// One member of one spread.
pub(super) struct Member {
    exchange: Arc<Exchange>,
    root: Cid,
    manifest: Manifest,
    source: Option<PeerId>,
    give_up_after: Duration,
    state: Mutex<State>,
    wake: Notify,
    told: watch::Sender<Status>,
}

#[derive(Debug, Clone)]
enum Status {
    At(Progress),
    Failed(Arc<FetchError>),
}

/// This node's part in a spread. It takes and passes on chunks until it is dropped; dropping it early leaves the fleet
/// without this member's uplink, nothing else.
pub struct Spreading {
    member: Arc<Member>,
    driver: AbortHandle,
}

impl std::fmt::Debug for Spreading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Spreading({}, {:?})", self.member.root, *self.member.told.borrow())
    }
}

impl Drop for Spreading {
    fn drop(&mut self) {
        self.driver.abort();
        self.member.exchange.forget_spread(&self.member.root);
        self.member.lock().links.clear();
    }
}

impl Spreading {
    /// What is spread.
    pub fn manifest(&self) -> &Manifest {
        &self.member.manifest
    }

    /// How much is here.
    pub fn progress(&self) -> Progress {
        match &*self.member.told.borrow() {
            Status::At(progress) => *progress,
            Status::Failed(_) => self.member.progress(),
        }
    }

    /// Chunks that this member has sent.
    pub fn uploaded(&self) -> u64 {
        self.member.lock().spread.uploaded()
    }

    /// Peers that this member exchanges chunks with.
    pub fn neighbours(&self) -> Vec<PeerId> {
        self.member.lock().spread.neighbours().cloned().collect()
    }

    /// Waits until everything is here; `progress` hears of what came. Cancel-safe.
    ///
    /// # Errors
    /// When nobody delivers what is missing, or the store refuses, for example because the disk is full.
    pub async fn done(&self, mut progress: impl FnMut(Progress) + Send) -> Result<(), Arc<FetchError>> {
        let mut told = self.member.told.subscribe();
        loop {
            let status = told.borrow_and_update().clone();
            match status {
                Status::At(at) => {
                    progress(at);
                    if at.done_bytes == at.total_bytes {
                        return Ok(());
                    }
                }
                Status::Failed(error) => return Err(error),
            }
            if told.changed().await.is_err() {
                return Err(Arc::new(FetchError::Closed));
            }
        }
    }
}

impl Blocks {
    /// Takes part in spreading the artefact `root`: as its source when `source` is `None` and all blocks are stored here,
    /// else as a member that begins with `source` and finds the others through it. What is stored is not fetched again,
    /// so a member that was killed goes on where it was.
    ///
    /// # Errors
    /// When the manifest cannot be had, or a source lacks blocks.
    pub async fn spread(
        &self,
        root: &Cid,
        source: Option<&PeerId>,
        config: SpreadConfig,
    ) -> Result<Spreading, FetchError> {
        let manifest =
            self.fetch_manifest(root, source.map(std::slice::from_ref).unwrap_or_default()).await?;
        let cids: Vec<Cid> = manifest.blocks().iter().map(|b| b.cid).collect();
        let n_chunks = cids.len() as u32;
        let have = self
            .exchange
            .blocking(move |store| {
                let mut have = Bitmap::empty(n_chunks);
                for (chunk, cid) in cids.iter().enumerate() {
                    if store.length_of(cid)?.is_some() {
                        have.insert(chunk as u32);
                    }
                }
                Ok::<_, crate::StoreError>(have)
            })
            .await??;
        if source.is_none() && !have.is_full() {
            let missing = manifest.blocks().iter().enumerate().find(|(i, _)| !have.contains(*i as u32));
            let cid = missing.map_or(*root, |(_, block)| block.cid);
            return Err(files::not_here(root, cid));
        }
        let own = self.exchange.node.peer_id();
        let seed =
            own.as_bytes().iter().fold(config.seed, |h, &b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
        let spread = Spread::new(SpreadConfig { seed, ..config }, have, source.is_none());
        let state = State {
            spread,
            links: BTreeMap::new(),
            generations: 0,
            shunned: BTreeSet::new(),
            contacts: source.map(|peer| (peer.clone(), Vec::new())).into_iter().collect(),
        };
        let total_bytes = manifest.total_bytes();
        let member = Arc::new(Member {
            exchange: Arc::clone(&self.exchange),
            root: *root,
            manifest,
            source: source.cloned(),
            give_up_after: self.exchange.config.give_up_after,
            state: Mutex::new(state),
            wake: Notify::new(),
            told: watch::Sender::new(Status::At(Progress { done_bytes: 0, total_bytes })),
        });
        member.told.send_replace(Status::At(member.progress()));
        self.exchange.remember_spread(*root, &member);
        let events = self.exchange.node.events();
        let driver = self.exchange.runtime.spawn(drive(Arc::clone(&member), events)).abort_handle();
        Ok(Spreading { member, driver })
    }
}

/// Gives an incoming stream to the spread that it names.
pub(super) async fn accept(exchange: Weak<Exchange>, peer: PeerId, stream: Stream) {
    connection::accept(exchange, peer, stream).await;
}

impl Member {
    fn lock(&self) -> MutexGuard<'_, State> {
        // The state machine has no half-made changes to hide.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.exchange.now()
    }

    fn node(&self) -> &Node {
        &self.exchange.node
    }

    fn n_chunks(&self) -> u32 {
        self.manifest.blocks().len() as u32
    }

    fn progress(&self) -> Progress {
        let state = self.lock();
        let length = |chunk: u32| u64::from(self.manifest.blocks()[chunk as usize].length);
        let done_bytes = state.spread.have().iter().map(length).sum();
        Progress { done_bytes, total_bytes: self.manifest.total_bytes() }
    }

    fn fail(&self, error: FetchError) {
        self.told.send_replace(Status::Failed(Arc::new(error)));
    }

    /// Does what the state machine wants, until it wants nothing.
    fn act(&self) {
        let now = self.now();
        let mut state = self.lock();
        let State { spread, links, shunned, .. } = &mut *state;
        while let Some(action) = spread.poll(now) {
            match action {
                Action::Send { to, message } => {
                    let queued =
                        links.get(&to).map(|l| l.queue.try_send(Outgoing::Frame(Frame::Message(message))));
                    if !matches!(queued, Some(Ok(()))) {
                        // It does not read, or is gone: either way it is no neighbour.
                        links.remove(&to);
                        spread.remove_neighbour(&to, now);
                    }
                }
                Action::Upload { to, chunk } => {
                    let queued = links.get(&to).map(|l| l.queue.try_send(Outgoing::Chunk(chunk)));
                    if !matches!(queued, Some(Ok(()))) {
                        links.remove(&to);
                        spread.remove_neighbour(&to, now);
                    }
                }
                Action::Drop { peer, reason } => {
                    tracing::warn!(peer = %peer.short(), root = %self.root, reason, "neighbour is dropped");
                    links.remove(&peer);
                    shunned.insert(peer);
                }
            }
        }
    }

    /// Up to a frame's worth of other members, those that take part now first.
    fn sample(&self, for_peer: &PeerId) -> Vec<Contact> {
        let linked: BTreeSet<PeerId> = self.lock().links.keys().cloned().collect();
        let known =
            self.node().peers().into_iter().filter(|p| linked.contains(&p.peer) && p.peer != *for_peer);
        let mut sample: Vec<Contact> = known.map(|p| (p.peer, p.addrs)).collect();
        // Another start for everybody who asks, so that not all get the same.
        let start =
            for_peer.as_bytes().iter().fold(0usize, |h, &b| h.wrapping_mul(31).wrapping_add(b.into()));
        let n = sample.len().max(1);
        sample.rotate_left(start % n);
        sample.truncate(crate::spread::wire::PEERS_MAX);
        sample
    }

    fn learn(&self, contacts: Vec<Contact>) {
        let own = self.node().peer_id();
        for (peer, addresses) in contacts {
            if peer == own {
                continue;
            }
            for address in &addresses {
                if let Err(error) = self.node().add_address(&peer, address) {
                    tracing::debug!(peer = %peer.short(), %error, "address of a member is not used");
                }
            }
            let mut state = self.lock();
            if state.contacts.len() < CONTACTS_MAX || state.contacts.contains_key(&peer) {
                state.contacts.insert(peer, addresses);
            }
        }
        self.wake.notify_one();
    }

    /// Opens streams to members that are not neighbours yet; the source again when nobody is left.
    fn search(self: &Arc<Self>) {
        let own = self.node().peer_id();
        let tries: Vec<PeerId> = {
            let mut state = self.lock();
            let state = &mut *state;
            let fresh =
                |p: &&PeerId| !state.links.contains_key(*p) && !state.shunned.contains(*p) && **p != own;
            let mut tries: Vec<PeerId> = state.contacts.keys().filter(fresh).cloned().collect();
            // Others start elsewhere in the list.
            let start = own.as_bytes().last().copied().unwrap_or_default() as usize;
            let n = tries.len().max(1);
            tries.rotate_left(start % n);
            tries.truncate(SEARCH_TRIES);
            for peer in &tries {
                state.contacts.remove(peer);
            }
            let source = self.source.as_ref().filter(|s| !state.links.contains_key(*s) && !tries.contains(s));
            tries.extend(source.filter(|_| tries.len() < SEARCH_TRIES).cloned());
            for link in state.links.values() {
                let _ = link.queue.try_send(Outgoing::Frame(Frame::AskPeers));
            }
            tries
        };
        for peer in tries {
            self.exchange.runtime.spawn(connection::open(Arc::downgrade(self), peer));
        }
    }
}

/// Runs one member until it is dropped.
async fn drive(member: Arc<Member>, mut events: tokio::sync::broadcast::Receiver<NetEvent>) {
    let mut searched_at: Option<Duration> = None;
    let mut progress_at = member.now();
    let mut done_before = member.progress();
    let mut announced = false;
    loop {
        member.act();
        let now = member.now();
        let progress = member.progress();
        if progress != done_before {
            (done_before, progress_at) = (progress, now);
            member.told.send_replace(Status::At(progress));
        }
        let done = progress.done_bytes == progress.total_bytes;
        if done && !announced {
            announced = true;
            if let Ok(Err(error)) = member.exchange.blocking(|store| store.flush()).await {
                member.fail(error.into());
            }
        }
        if !done && now >= progress_at + member.give_up_after {
            let state = member.lock();
            let missing_blocks = (member.n_chunks() - state.spread.have().count()) as usize;
            let (root, asked_peers) = (Box::new(member.root), state.links.len());
            let reason = "no member of the spread delivered anything for too long";
            drop(state);
            member.fail(FetchError::Incomplete { root, missing_blocks, asked_peers, reason });
            return;
        }
        let wants = member.lock().spread.wants_neighbours(now);
        let may_search = searched_at.is_none_or(|at| now >= at + SEARCH_EVERY);
        if wants && may_search {
            searched_at = Some(now);
            member.search();
        }
        let deadline = member.lock().spread.next_deadline();
        let ends = [
            deadline,
            wants.then(|| searched_at.unwrap_or(now) + SEARCH_EVERY),
            (!done).then_some(progress_at + member.give_up_after),
        ];
        let next = ends.into_iter().flatten().min().unwrap_or(now + Duration::from_secs(60));
        tokio::select! {
            () = member.wake.notified() => {}
            () = sleep_until(Instant::now() + next.saturating_sub(now) + Duration::from_millis(1)) => {
                let now = member.now();
                member.lock().spread.handle_timeout(now);
            }
            event = events.recv() => match event {
                Ok(NetEvent::Disconnected(peer)) => {
                    let now = member.now();
                    let mut state = member.lock();
                    state.links.remove(&peer);
                    state.spread.remove_neighbour(&peer, now);
                }
                Ok(_) | Err(tokio::sync::broadcast::error::RecvError::Lagged(_)) => {}
                Err(tokio::sync::broadcast::error::RecvError::Closed) => return member.fail(FetchError::Closed),
            },
        }
    }
}
