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
/// A neighbour that was dropped for being slow is no neighbour for this long.
const PAUSE: Duration = Duration::from_secs(10);
/// A neighbour is told of other members no more often.
const TELL_PEERS_EVERY: Duration = Duration::from_secs(1);

/// A neighbour that answers within this time, directly, is on the same local network; longer ways through a city take more.
const NEAR_RTT_MS: f64 = 2.0;
/// Links of neighbours are looked at no more often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

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
    /// Whether it owes us an answer to a question for other members.
    asked_peers: bool,
    /// When it was last told of other members.
    told_peers_at: Duration,
}

struct State {
    spread: Spread<PeerId>,
    links: BTreeMap<PeerId, Link>,
    generations: u64,
    /// Members that were too slow, and when they may be neighbours again.
    paused: BTreeMap<PeerId, Duration>,
    /// Possible neighbours.
    contacts: BTreeSet<PeerId>,
    /// Bytes of the chunks that are here.
    done_bytes: u64,
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
        self.member.exchange.forget_spread(&self.member.root, &self.member);
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
        self.member.progress()
    }

    /// Chunks that this member has sent.
    pub fn uploaded(&self) -> u64 {
        self.member.lock().spread.uploaded()
    }

    /// Chunks that came although they were here already.
    pub fn duplicates(&self) -> u64 {
        self.member.lock().spread.duplicates()
    }

    /// Peers that this member exchanges chunks with.
    pub fn neighbours(&self) -> Vec<PeerId> {
        self.member.lock().spread.neighbours().cloned().collect()
    }

    /// Has chunks asked for as if `urgency` neighbours fewer had them, so that what is needed first comes early.
    pub fn set_urgency(&self, chunks: std::ops::Range<u32>, urgency: u8) {
        let end = chunks.end.min(self.member.n_chunks());
        let mut state = self.member.lock();
        (chunks.start..end).for_each(|chunk| state.spread.set_urgency(chunk, urgency));
    }

    /// Waits until everything is here and on disk; `progress` hears of what came.
    ///
    /// Cancel safe.
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
    /// Cancel safe: this node takes part only when what is returned is there.
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
        let lengths: Vec<u32> = manifest.blocks().iter().map(|b| b.length).collect();
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
        let done_bytes = have.iter().map(|chunk| u64::from(lengths[chunk as usize])).sum();
        let spread = Spread::new(SpreadConfig { seed, ..config }, have, source.is_none());
        let state = State {
            spread,
            links: BTreeMap::new(),
            generations: 0,
            paused: BTreeMap::new(),
            contacts: source.cloned().into_iter().collect(),
            done_bytes,
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
        self.exchange.remember_spread(*root, &member);
        let events = self.exchange.node.events();
        let driver = self.exchange.runtime.spawn(drive(Arc::clone(&member), events)).abort_handle();
        Ok(Spreading { member, driver })
    }
}

impl Blocks {
    /// Gets a whole artefact by taking part in its spread, which begins at `source`: most of it comes from other members.
    /// Returns when all of it is on disk; what is returned passes chunks on until it is dropped.
    ///
    /// Cancel safe: dropping the future leaves the spread and keeps what came.
    ///
    /// # Errors
    /// As [`Spreading::done`]; also when the manifest cannot be had. Nobody delivers when `source` does not spread it.
    pub async fn fetch_via_spread(
        &self,
        root: &Cid,
        source: &PeerId,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Spreading, Arc<FetchError>> {
        let part = self.spread(root, Some(source), SpreadConfig::default()).await.map_err(Arc::new)?;
        part.done(progress).await?;
        Ok(part)
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
        Progress { done_bytes: self.lock().done_bytes, total_bytes: self.manifest.total_bytes() }
    }

    /// Ends this member's part: whoever waits is told why, and nothing that comes later changes that.
    fn fail(&self, error: FetchError) {
        self.tell(Status::Failed(Arc::new(error)));
        self.wake.notify_one();
    }

    fn tell(&self, status: Status) {
        self.told.send_if_modified(|told| {
            let goes_on = !matches!(told, Status::Failed(_));
            if goes_on {
                *told = status;
            }
            goes_on
        });
    }

    fn has_failed(&self) -> bool {
        matches!(*self.told.borrow(), Status::Failed(_))
    }

    /// Whether `peer` sent wrong bytes, here or elsewhere.
    fn is_shunned(&self, peer: &PeerId) -> bool {
        self.exchange.lock().ledger.is_shunned(peer)
    }

    /// Does what the state machine wants, until it wants nothing.
    fn act(&self) {
        let now = self.now();
        let mut state = self.lock();
        let State { spread, links, paused, .. } = &mut *state;
        let mut liars = Vec::new();
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
                    if !links.get(&to).is_some_and(|link| self.upload(&link.queue, chunk)) {
                        links.remove(&to);
                        spread.remove_neighbour(&to, now);
                    }
                }
                Action::Drop { peer, reason, wrong } => {
                    tracing::warn!(peer = %peer.short(), root = %self.root, reason, "neighbour is dropped");
                    links.remove(&peer);
                    if wrong {
                        liars.push(peer);
                    } else {
                        paused.retain(|_, until| *until > now);
                        if paused.len() < CONTACTS_MAX {
                            paused.insert(peer, now + PAUSE);
                        }
                    }
                }
            }
        }
        drop(state);
        let mut exchange = self.exchange.lock();
        liars.iter().for_each(|peer| exchange.ledger.wrong(peer));
    }

    /// Queues a chunk for a neighbour, when it is its turn on the uplink; `false` when the neighbour does not read.
    fn upload(&self, queue: &mpsc::Sender<Outgoing>, chunk: u32) -> bool {
        if self.exchange.uplink.is_none() {
            return queue.try_send(Outgoing::Chunk(chunk)).is_ok();
        }
        let n_bytes = self.manifest.blocks()[chunk as usize].length;
        let (exchange, queue) = (Arc::clone(&self.exchange), queue.downgrade());
        self.exchange.runtime.spawn(async move {
            if let Some(uplink) = &exchange.uplink {
                let mut turn = uplink.lock().await;
                // A neighbour that is gone by then is owed nothing, and takes nobody's turn.
                if queue.upgrade().is_none() {
                    return;
                }
                let now = exchange.now();
                let due = turn.reserve(n_bytes, now);
                sleep_until(Instant::now() + due.saturating_sub(now)).await;
            }
            if let Some(queue) = queue.upgrade() {
                let _ = queue.send(Outgoing::Chunk(chunk)).await;
            }
        });
        true
    }

    /// Up to a frame's worth of other members, those that take part now first.
    fn sample(&self, for_peer: &PeerId) -> Vec<Contact> {
        let mut linked: Vec<PeerId> = self.lock().links.keys().filter(|p| *p != for_peer).cloned().collect();
        // Another start for everybody who asks, so that not all get the same.
        let start =
            for_peer.as_bytes().iter().fold(0usize, |h, &b| h.wrapping_mul(31).wrapping_add(b.into()));
        let n = linked.len().max(1);
        linked.rotate_left(start % n);
        linked.truncate(crate::spread::wire::PEERS_MAX);
        linked.into_iter().map(|peer| (peer.clone(), self.node().addresses(&peer))).collect()
    }

    /// `neighbour` names other members. Counts only when it was asked.
    fn learn(&self, neighbour: &PeerId, contacts: Vec<Contact>) {
        let own = self.node().peer_id();
        let asked = |link: &mut Link| std::mem::take(&mut link.asked_peers);
        if !self.lock().links.get_mut(neighbour).is_some_and(asked) {
            return tracing::debug!(peer = %neighbour.short(), "members are named that nobody asked for");
        }
        for (peer, addresses) in contacts {
            let taken = peer != own && {
                let mut state = self.lock();
                let room = state.contacts.len() < CONTACTS_MAX || state.contacts.contains(&peer);
                if room {
                    state.contacts.insert(peer.clone());
                }
                room
            };
            for address in addresses.iter().filter(|_| taken) {
                if let Err(error) = self.node().learn_address(&peer, address, neighbour) {
                    tracing::debug!(peer = %peer.short(), %error, "address of a member is not used");
                }
            }
        }
        self.wake.notify_one();
    }

    /// `neighbour` asks for other members.
    fn tell_peers(&self, neighbour: &PeerId) {
        let now = self.now();
        let may = |link: &mut Link| {
            let may = now >= link.told_peers_at + TELL_PEERS_EVERY;
            if may {
                link.told_peers_at = now;
            }
            may
        };
        if !self.lock().links.get_mut(neighbour).is_some_and(may) {
            return;
        }
        let contacts = self.sample(neighbour);
        if let Some(link) = self.lock().links.get(neighbour) {
            let _ = link.queue.try_send(Outgoing::Frame(Frame::Peers(contacts)));
        }
    }

    /// Tells the state machine who is on the same local network, as far as links have been measured.
    fn look_at_links(&self) {
        let (now, node) = (self.now(), self.node());
        let mut state = self.lock();
        let neighbours: Vec<PeerId> = state.spread.neighbours().cloned().collect();
        for peer in neighbours {
            let link = node.link(&peer);
            let near = link.is_some_and(|link| !link.path.is_relayed() && link.rtt_min_ms <= NEAR_RTT_MS);
            state.spread.set_near(&peer, near, now);
        }
    }

    /// Opens streams to members that are not neighbours yet; the source again when nobody is left.
    fn search(self: &Arc<Self>) {
        let own = self.node().peer_id();
        let tries: Vec<PeerId> = {
            let mut state = self.lock();
            let state = &mut *state;
            let now = self.now();
            let exchange = self.exchange.lock();
            let fresh = |p: &PeerId| {
                !state.links.contains_key(p)
                    && *p != own
                    && !exchange.ledger.is_shunned(p)
                    && state.paused.get(p).is_none_or(|until| now >= *until)
            };
            let mut tries: Vec<PeerId> = state.contacts.iter().filter(|p| fresh(p)).cloned().collect();
            // Others start elsewhere in the list.
            let start = own.as_bytes().last().copied().unwrap_or_default() as usize;
            let n = tries.len().max(1);
            tries.rotate_left(start % n);
            tries.truncate(SEARCH_TRIES);
            let source = self.source.as_ref().filter(|s| fresh(s) && !tries.contains(s));
            let source = source.filter(|_| tries.len() < SEARCH_TRIES).cloned();
            drop(exchange);
            for peer in &tries {
                state.contacts.remove(peer);
            }
            tries.extend(source);
            for link in state.links.values_mut() {
                link.asked_peers |= link.queue.try_send(Outgoing::Frame(Frame::AskPeers)).is_ok();
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
    let (mut searched_at, mut looked_at): (Option<Duration>, Option<Duration>) = (None, None);
    let mut progress_at = member.now();
    let mut done_before: Option<Progress> = None;
    let mut on_disk = false;
    loop {
        if member.has_failed() {
            // Nothing more is asked for or passed on: what comes could not be kept.
            let now = member.now();
            let mut state = member.lock();
            for peer in std::mem::take(&mut state.links).into_keys() {
                state.spread.remove_neighbour(&peer, now);
            }
            return;
        }
        let now = member.now();
        if looked_at.is_none_or(|at| now >= at + LOOK_EVERY) {
            looked_at = Some(now);
            member.look_at_links();
        }
        member.act();
        let progress = member.progress();
        let done = progress.done_bytes == progress.total_bytes;
        if done && !on_disk {
            // Only what is on disk is done.
            match member.exchange.blocking(|store| store.flush()).await {
                Ok(Ok(())) => on_disk = true,
                Ok(Err(error)) => member.fail(error.into()),
                Err(error) => member.fail(error),
            }
            if on_disk && member.source.is_some() {
                member.exchange.announce(member.root);
            }
        }
        if done_before != Some(progress) {
            (done_before, progress_at) = (Some(progress), now);
            member.tell(Status::At(progress));
        }
        if !done && now >= progress_at + member.give_up_after {
            let state = member.lock();
            let missing_blocks = (member.n_chunks() - state.spread.have().count()) as usize;
            let (root, asked_peers) = (Box::new(member.root), state.links.len());
            let reason = "no member of the spread delivered anything for too long";
            drop(state);
            member.fail(FetchError::Incomplete { root, missing_blocks, asked_peers, reason });
            continue;
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
                Err(tokio::sync::broadcast::error::RecvError::Closed) => member.fail(FetchError::Closed),
            },
        }
    }
}
