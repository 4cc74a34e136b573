//! What the tasks of a block exchange share: the server's and the sessions' state, and what a message does to them.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use lattica_net::{NetEvent, Node};
use swarm_wire::{Cid, PeerId};
use tokio::runtime::Handle;
use tokio::sync::{Notify, broadcast, mpsc};

use super::fetch::provider_key;
use super::spreading::Member;
use super::streams::Room;
use super::{files, streams};
use crate::serve::Batch;
use crate::session::Arrival;
use crate::spread::Uplink;
use crate::wire::{Message, WantEntry};
use crate::{Block, BlockStore, ExchangeConfig, FetchError, Ledger, Server, Session};

/// Messages that wait for one peer's stream.
const OUTGOING_MAX: usize = 256;
/// Wants of sessions that are over, remembered because the blocks may still be on their way.
const RECENT_MAX: usize = 8192;

/// What waits for a peer's stream.
pub(super) enum Outgoing {
    /// Wants and cancels.
    Message(Message),
    /// Blocks to load and send.
    Served(Batch),
}

/// A fetch and what its future needs to know.
pub(super) struct Fetch {
    pub(super) session: Session,
    /// Lengths that the manifest promises; empty when the manifest itself is fetched.
    pub(super) lengths: HashMap<Cid, u32>,
    pub(super) root: Cid,
    /// Bytes that arrived so far.
    pub(super) arrived_bytes: u64,
    /// When the last new block came.
    pub(super) last_arrival: Duration,
    pub(super) failed: Option<FetchError>,
    pub(super) hints: HashSet<PeerId>,
    pub(super) wake: Arc<Notify>,
}

pub(super) struct State {
    pub(super) server: Server,
    pub(super) ledger: Ledger,
    pub(super) fetches: HashMap<u64, Fetch>,
    pub(super) next_fetch: u64,
    writers: HashMap<PeerId, mpsc::Sender<Outgoing>>,
    /// Room for messages that are being taken in, by peer, as long as one of its streams is read.
    rooms: HashMap<PeerId, Weak<Room>>,
    recent: VecDeque<(PeerId, Cid)>,
}

pub(super) struct Exchange {
    pub(super) node: Node,
    pub(super) store: Arc<dyn BlockStore>,
    pub(super) config: ExchangeConfig,
    pub(super) runtime: Handle,
    started: Instant,
    state: Mutex<State>,
    spreads: Mutex<HashMap<Cid, Weak<Member>>>,
    /// Held by who has the turn. Who waits for one and leaves has taken none.
    pub(super) uplink: Option<tokio::sync::Mutex<Uplink>>,
}

impl Exchange {
    pub(super) fn new(
        node: Node,
        store: Arc<dyn BlockStore>,
        config: ExchangeConfig,
        runtime: Handle,
    ) -> Arc<Self> {
        let state = State {
            server: Server::new(config.serve.clone()),
            ledger: Ledger::new(),
            fetches: HashMap::new(),
            next_fetch: 0,
            writers: HashMap::new(),
            rooms: HashMap::new(),
            recent: VecDeque::new(),
        };
        let uplink = config.spread_bytes_per_s.map(|rate| tokio::sync::Mutex::new(Uplink::new(rate)));
        Arc::new(Self {
            node,
            store,
            config,
            runtime,
            started: Instant::now(),
            state: Mutex::new(state),
            spreads: Mutex::default(),
            uplink,
        })
    }

    /// The room for messages of `peer`, whichever stream brings them.
    pub(super) fn room(&self, peer: &PeerId) -> Arc<Room> {
        let mut state = self.lock();
        if let Some(room) = state.rooms.get(peer).and_then(Weak::upgrade) {
            return room;
        }
        state.rooms.retain(|_, room| room.strong_count() > 0);
        let room = Arc::new(Room::default());
        state.rooms.insert(peer.clone(), Arc::downgrade(&room));
        room
    }

    /// Time for the pure parts.
    pub(super) fn now(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // The state machines have no half-made changes to hide.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on streams for the spread of `root` belong to `member`.
    pub(super) fn remember_spread(&self, root: Cid, member: &Arc<Member>) {
        self.spreads.lock().unwrap_or_else(PoisonError::into_inner).insert(root, Arc::downgrade(member));
    }

    /// The spread of `root` by `member` has ended here; a newer one of the same root stays.
    pub(super) fn forget_spread(&self, root: &Cid, member: &Arc<Member>) {
        let mut spreads = self.spreads.lock().unwrap_or_else(PoisonError::into_inner);
        if spreads.get(root).is_some_and(|known| std::ptr::eq(known.as_ptr(), Arc::as_ptr(member))) {
            spreads.remove(root);
        }
    }

    /// The member that spreads `root` here.
    pub(super) fn spread_of(&self, root: &Cid) -> Option<Arc<Member>> {
        self.spreads.lock().unwrap_or_else(PoisonError::into_inner).get(root)?.upgrade()
    }

    /// Runs `work` on the store, off the async threads.
    pub(super) async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&dyn BlockStore) -> T + Send + 'static,
    ) -> Result<T, FetchError> {
        let store = Arc::clone(&self.store);
        self.runtime.spawn_blocking(move || work(&*store)).await.map_err(|_| FetchError::Closed)
    }

    /// Tells the DHT, and peers that wait for these blocks, in the background.
    pub(super) fn announce(self: &Arc<Self>, root: Cid) {
        let (exchange, node) = (Arc::downgrade(self), self.node.clone());
        self.runtime.spawn(async move {
            if let Some(exchange) = exchange.upgrade() {
                let blocks = exchange.blocking(move |store| {
                    let manifest = files::stored_manifest(store, &root).ok().flatten();
                    let root_bytes = store.length_of(&root).ok().flatten();
                    (manifest, root_bytes)
                });
                if let Ok((Some(manifest), Some(root_bytes))) = blocks.await {
                    let mut state = exchange.lock();
                    state.server.block_arrived(&root, root_bytes);
                    for block in manifest.blocks() {
                        state.server.block_arrived(&block.cid, block.length as usize);
                    }
                    drop(state);
                    exchange.pump();
                }
            }
            if let Err(error) = node.provide(&provider_key(&root)).await {
                tracing::debug!(%root, %error, "not announced in the DHT");
            }
        });
    }

    /// Queues a message for `peer`; a peer that does not take its messages counts as gone.
    pub(super) fn send(self: &Arc<Self>, peer: &PeerId, outgoing: Outgoing) {
        let refused = {
            let mut state = self.lock();
            let writer = state.writers.entry(peer.clone()).or_insert_with(|| self.start_writer(peer));
            match writer.try_send(outgoing) {
                Ok(()) => None,
                Err(mpsc::error::TrySendError::Full(outgoing)) => Some(outgoing),
                Err(mpsc::error::TrySendError::Closed(outgoing)) => {
                    // The old writer ended; a fresh channel has room.
                    let writer = self.start_writer(peer);
                    let _ = writer.try_send(outgoing);
                    state.writers.insert(peer.clone(), writer);
                    None
                }
            }
        };
        if refused.is_some() {
            tracing::debug!(peer = %peer.short(), "peer does not read its messages");
            self.peer_gone(peer);
        }
    }

    fn start_writer(self: &Arc<Self>, peer: &PeerId) -> mpsc::Sender<Outgoing> {
        let (sender, receiver) = mpsc::channel(OUTGOING_MAX);
        let writer = streams::write(Arc::downgrade(self), self.node.clone(), peer.clone(), receiver);
        self.runtime.spawn(writer);
        sender
    }

    /// Forgets an idle writer; `false` when something was queued meanwhile.
    pub(super) fn release_writer(&self, peer: &PeerId, queue: &mpsc::Receiver<Outgoing>) -> bool {
        let mut state = self.lock();
        let idle = queue.is_empty();
        if idle {
            state.writers.remove(peer);
        }
        idle
    }

    /// Sends what the budget allows of what peers want.
    pub(super) fn pump(self: &Arc<Self>) {
        loop {
            let Some(batch) = self.lock().server.poll() else { return };
            let peer = batch.peer.clone();
            self.send(&peer, Outgoing::Served(batch));
        }
    }

    /// A batch has left, or never will.
    pub(super) fn batch_done(self: &Arc<Self>, batch: &Batch, sent: bool) {
        {
            let mut state = self.lock();
            state.server.handle_sent(&batch.peer, batch.bytes);
            if sent {
                state.ledger.sent(&batch.peer, batch.bytes);
            }
        }
        self.pump();
    }

    /// The peer cannot be reached or does not read: nothing is asked of it or kept for it.
    pub(super) fn peer_gone(&self, peer: &PeerId) {
        let now = self.now();
        let mut state = self.lock();
        state.writers.remove(peer);
        state.server.remove_peer(peer);
        for fetch in state.fetches.values_mut() {
            fetch.session.remove_peer(peer, now);
            fetch.wake.notify_one();
        }
    }

    /// The peer broke the protocol or sent what it was not asked for.
    pub(super) fn peer_lied(&self, peer: &PeerId, what: &str) {
        tracing::warn!(peer = %peer.short(), what, "peer is not asked for blocks any more");
        let now = self.now();
        let mut state = self.lock();
        state.ledger.wrong(peer);
        for fetch in state.fetches.values_mut() {
            fetch.session.drop_peer(peer, now);
            fetch.wake.notify_one();
        }
    }

    /// One message from `peer`. Returns when its blocks are stored: that is the back-pressure on the sender. `false`: it lied.
    pub(super) async fn handle_message(self: &Arc<Self>, peer: &PeerId, message: Message) -> bool {
        let Message { entries, full, blocks, presences, .. } = message;
        if !presences.is_empty() {
            let now = self.now();
            let mut state = self.lock();
            for fetch in state.fetches.values_mut() {
                for (cid, have) in &presences {
                    fetch.session.handle_presence(peer, cid, *have, now);
                }
                fetch.wake.notify_one();
            }
        }
        let honest = blocks.is_empty() || self.handle_blocks(peer, blocks).await;
        if full || !entries.is_empty() {
            self.handle_wants(peer, entries, full).await;
        }
        self.pump();
        honest
    }

    async fn handle_wants(self: &Arc<Self>, peer: &PeerId, entries: Vec<WantEntry>, full: bool) {
        let peer = peer.clone();
        let found = self
            .blocking(move |store| {
                let mut lengths = HashMap::new();
                for entry in &entries {
                    if let WantEntry::Want { cid, .. } = entry {
                        match store.length_of(cid) {
                            Ok(Some(length)) => drop(lengths.insert(*cid, length)),
                            Ok(None) => {}
                            Err(error) => tracing::warn!(%cid, %error, "block cannot be looked up"),
                        }
                    }
                }
                (entries, lengths)
            })
            .await;
        if let Ok((entries, lengths)) = found {
            self.lock().server.handle_wantlist(&peer, &entries, full, |cid| lengths.get(cid).copied());
        }
    }

    /// `false` when one of the blocks was not asked for.
    async fn handle_blocks(self: &Arc<Self>, peer: &PeerId, blocks: Vec<Block>) -> bool {
        let mut wanted = Vec::with_capacity(blocks.len());
        let mut lied = false;
        {
            let mut state = self.lock();
            for block in blocks {
                let cid = *block.cid();
                let asked = state.fetches.values().any(|f| f.session.has_asked(peer, &cid));
                let recent = || state.recent.iter().any(|(p, c)| p == peer && *c == cid);
                if !asked {
                    // One is enough: the look into what was taken back is a long one.
                    lied = lied || !recent();
                    continue;
                }
                let misfit = state.fetches.values_mut().find_map(|f| {
                    let expected = *f.lengths.get(&cid)? as usize;
                    (expected != block.len()).then_some((f, expected))
                });
                if let Some((fetch, expected_bytes)) = misfit {
                    let (root, cid, got_bytes) = (Box::new(fetch.root), Box::new(cid), block.len());
                    fetch.failed = Some(FetchError::WrongLength { root, cid, expected_bytes, got_bytes });
                    fetch.wake.notify_one();
                    continue;
                }
                wanted.push(block);
            }
        }
        if lied {
            self.peer_lied(peer, "a block that was not asked for");
        }
        if wanted.is_empty() {
            return !lied;
        }
        let stored = self
            .blocking(move |store| {
                let results: Vec<_> = wanted.iter().map(|block| store.put(block)).collect();
                (wanted, results)
            })
            .await;
        let Ok((blocks, results)) = stored else { return !lied };
        let mut arrived = Vec::with_capacity(blocks.len());
        for (block, result) in blocks.into_iter().zip(results) {
            match result {
                Ok(_) => arrived.push(block),
                Err(error) => {
                    let mut state = self.lock();
                    let asked = |f: &&mut Fetch| f.session.has_asked(peer, block.cid());
                    // One fetch learns why; the others run into the same wall with their next block.
                    if let Some(fetch) = state.fetches.values_mut().find(asked) {
                        fetch.failed = Some(error.into());
                        fetch.wake.notify_one();
                    }
                }
            }
        }
        self.stored(peer, &arrived);
        !lied
    }

    /// Blocks of `peer` are stored: those who wait for them here hear of it. Call [`Exchange::pump`] for those elsewhere.
    pub(super) fn stored(&self, peer: &PeerId, blocks: &[Block]) {
        let now = self.now();
        let mut state = self.lock();
        let State { fetches, server, ledger, .. } = &mut *state;
        for block in blocks {
            ledger.received(peer, block.len());
            server.block_arrived(block.cid(), block.len());
            for fetch in fetches.values_mut() {
                let before = fetch.session.missing();
                if fetch.session.has_asked(peer, block.cid()) {
                    let arrival = fetch.session.handle_block(peer, block.cid(), now);
                    debug_assert_ne!(arrival, Arrival::Unasked);
                } else {
                    fetch.session.mark_stored(block.cid(), now);
                }
                if fetch.session.missing() < before {
                    fetch.arrived_bytes += block.len() as u64;
                    fetch.last_arrival = now;
                }
                fetch.wake.notify_one();
            }
        }
    }

    /// Ends a fetch: takes its wants back and remembers what may still arrive.
    pub(super) fn end_fetch(&self, id: u64) {
        let mut state = self.lock();
        let Some(mut fetch) = state.fetches.remove(&id) else { return };
        state.recent.extend(fetch.session.still_owed());
        let excess = state.recent.len().saturating_sub(RECENT_MAX);
        state.recent.drain(..excess);
        for (peer, entries) in fetch.session.cancel_all() {
            if let Some(writer) = state.writers.get(&peer) {
                // A full queue means that the peer reads nothing; then it hears of no cancel either.
                let _ = writer.try_send(Outgoing::Message(Message { entries, ..Message::default() }));
            }
        }
    }
}

/// Follows who comes and goes, until the exchange or the node ends.
pub(super) async fn follow(exchange: Weak<Exchange>, mut events: broadcast::Receiver<NetEvent>) {
    loop {
        let event = match events.recv().await {
            Ok(event) => event,
            // What was missed shows when a stream to the peer breaks.
            Err(broadcast::error::RecvError::Lagged(_)) => continue,
            Err(broadcast::error::RecvError::Closed) => return,
        };
        let Some(exchange) = exchange.upgrade() else { return };
        match event {
            NetEvent::Disconnected(peer) => exchange.peer_gone(&peer),
            NetEvent::Connected(peer) => {
                let now = exchange.now();
                let mut state = exchange.lock();
                if state.ledger.is_shunned(&peer) {
                    continue;
                }
                for fetch in state.fetches.values_mut() {
                    if fetch.hints.contains(&peer) {
                        fetch.session.add_holder(&peer, now);
                    } else if fetch.hints.is_empty() {
                        fetch.session.add_candidates([&peer], now);
                    }
                    fetch.wake.notify_one();
                }
            }
            _ => {}
        }
    }
}
