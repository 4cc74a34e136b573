//! Asks peers for news, answers theirs, and makes this node's own: its links and where it can be reached. Who came to know
//! peers that way stays in the network without its bootstrap peers.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, SystemTime};

use libp2p::StreamProtocol;
use libp2p::core::{Multiaddr, PeerRecord};
use libp2p::identity::Keypair;
use rand::RngExt as _;
use rand::seq::IteratorRandom as _;
use swarm_wire::{DecodeError, PeerId};
use tokio::io::BufReader;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::connection::{Connection, OpenError};
use super::driver::Command;
use super::identity::Identity;
use super::peers_file;
use super::shared::{Acceptor, Shared, lock};
use super::stream::{Stream, read_frame, send_last_frame};
use crate::addr::{is_plausible, worth_telling};
use crate::error::FrameError;
use crate::event::NetEvent;
use crate::links::LinkEstimate;
use crate::links::map::LinkMap;
use crate::news::record::{self, Record};
use crate::news::wire::{Reply, Request, decode_vector, encode_vector};
use crate::news::{AUTHORS_MAX, Item, Newest, REPLY_MAX_BYTES};

/// Longest question: two kinds of statements, a tag and a time of each author.
const REQUEST_MAX_BYTES: usize = 64 * 1024;
/// Longest answer: its statements and what goes with each.
const REPLY_FRAME_MAX_BYTES: usize = 2 * REPLY_MAX_BYTES;
/// A question and its answer take no longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Questions of ours, and of others, under way at a time.
const QUESTIONS_MAX: usize = 4;
/// Statements that are checked without letting other tasks have their turn.
const STATEMENTS_IN_A_ROW: usize = 16;
/// Own links are told of this many intervals after the last time, later where many do it.
const VECTOR_INTERVALS: u32 = 2;
const VECTOR_PER_AUTHOR: Duration = Duration::from_millis(100);
/// An unchanged peer record is renewed this often.
const RECORD_RENEWED: Duration = Duration::from_secs(900);
/// Peer records that were not renewed for this long are forgotten.
const RECORD_EXPIRES: Duration = Duration::from_secs(3600);
/// Statements that are further from our clock are replays, or somebody's clock is wrong.
const SKEW_MAX: Duration = Duration::from_secs(2 * 3600);
/// Links that were not measured for longer say nothing of now.
const LINK_FRESH: Duration = Duration::from_secs(30);
/// A peer to which a connection was tried is tried again after this long.
const TRIED_AGAIN: Duration = Duration::from_secs(60);
/// The file of peers is written no more often.
const SAVED_EVERY: Duration = Duration::from_secs(60);

/// Everything that was heard.
#[derive(Debug)]
pub(crate) struct News {
    state: Mutex<State>,
}

#[derive(Debug)]
pub(crate) struct State {
    pub(crate) links: LinkMap,
    /// Where peers can be reached, as they say.
    records: Newest<()>,
    /// Peers that a rendezvous point named, and until when that counts.
    met: HashMap<PeerId, Duration>,
}

impl State {
    /// A rendezvous point named a peer: until then a connection to it may be tried.
    pub(super) fn meet(&mut self, peer: PeerId, until: Duration) {
        if self.met.len() < AUTHORS_MAX || self.met.contains_key(&peer) {
            self.met.insert(peer, until);
        }
    }
}

impl News {
    pub(crate) fn new(own: PeerId) -> Self {
        let records = Newest::new(AUTHORS_MAX, RECORD_EXPIRES);
        Self { state: Mutex::new(State { links: LinkMap::new(own), records, met: HashMap::new() }) }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// Asks and tells until the node stops.
pub(super) fn start(shared: &Arc<Shared>, identity: Identity) {
    let name = format!("/lattica/news/1.0.0/{}", shared.config.network);
    let Ok(protocol) = StreamProtocol::try_from_owned(name) else { return };
    let answering = Arc::new(Semaphore::new(QUESTIONS_MAX));
    let weak = Arc::downgrade(shared);
    let answer_stream = move |_, stream: Stream| -> super::shared::BoxFuture<()> {
        let (shared, answering) = (Weak::clone(&weak), Arc::clone(&answering));
        Box::pin(async move {
            let Some(shared) = shared.upgrade() else { return };
            let asker = stream.asker();
            // One question of a peer at a time, so that none takes the places of all. Who finds us busy asks somebody else.
            if let (Ok(_turn), Ok(_place)) = (asker.asking().try_acquire(), answering.try_acquire()) {
                let _ = timeout(PATIENCE, answer(&shared, stream)).await;
            }
        })
    };
    shared.set_acceptor(protocol.clone(), Some(Acceptor::Application(Arc::new(answer_stream))));
    let teller = Teller {
        keypair: identity.libp2p_keypair(),
        identity,
        vector_at: None,
        written_ms: 0,
        record: None,
        tried: HashMap::new(),
        remembered: Vec::new(),
        saved_at: Duration::ZERO,
    };
    shared.network.spawn(run(Arc::clone(shared), protocol, teller));
}

async fn answer(shared: &Shared, stream: Stream) -> Result<(), FrameError> {
    let mut stream = BufReader::new(stream);
    let Some(question) = read_frame(&mut stream, "question for news", REQUEST_MAX_BYTES).await? else {
        return Ok(());
    };
    let request = Request::decode(question)?;
    let now = shared.now();
    let reply = {
        let state = shared.news.lock();
        // Records first: they are small, and who lacks them may be about to lose everybody.
        let records = state.records.missing(now, &request.records, REPLY_MAX_BYTES / 2);
        let vectors = state.links.vectors().missing(now, &request.vectors, REPLY_MAX_BYTES / 2);
        Reply { vectors, records }
    };
    send_last_frame(&mut stream, &reply.encode()).await?;
    Ok(())
}

/// What one node says, and whom it asks.
struct Teller {
    identity: Identity,
    keypair: Keypair,
    vector_at: Option<Duration>,
    written_ms: u64,
    /// The addresses of the last record, and when it was made.
    record: Option<(Vec<Multiaddr>, Duration)>,
    /// Peers to which a connection was tried, and when.
    tried: HashMap<PeerId, Duration>,
    /// Peers out of the file.
    remembered: Vec<PeerId>,
    saved_at: Duration,
}

async fn run(shared: Arc<Shared>, protocol: StreamProtocol, mut teller: Teller) {
    let every = shared.config.news_interval;
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut events = shared.events.subscribe();
    let asking = Arc::new(Semaphore::new(QUESTIONS_MAX));
    teller.remember(&shared).await;
    loop {
        let ask = tokio::select! {
            _ = tick.tick() => {
                teller.tell(&shared).await;
                teller.keep_peers(&shared).await;
                if teller.saved_at + SAVED_EVERY <= shared.now() {
                    teller.saved_at = shared.now();
                    let shared = Arc::clone(&shared);
                    let _ = tokio::task::spawn_blocking(move || save(&shared)).await;
                }
                shared.table().connected_peers().into_iter().choose(&mut rand::rng())
            }
            // Whoever is new may know what nobody else here does.
            event = events.recv() => match event {
                Ok(NetEvent::Connected(peer)) => Some(peer),
                _ => None,
            },
            () = shared.stopped.cancelled() => return,
        };
        let connection = ask.and_then(|peer| shared.table().best(&peer));
        if let (Some(connection), Ok(place)) = (connection, Arc::clone(&asking).try_acquire_owned()) {
            let (shared, protocol) = (Arc::clone(&shared), protocol.clone());
            tokio::spawn(async move {
                let peer = connection.peer.clone();
                match timeout(PATIENCE, question(&shared, connection, protocol)).await {
                    Ok(Err(FrameError::Malformed(error))) => {
                        tracing::warn!(peer = %peer.short(), %error, "news refused");
                    }
                    Ok(Err(error)) => tracing::debug!(peer = %peer.short(), %error, "no news"),
                    Ok(Ok(())) | Err(_) => {}
                }
                drop(place);
            });
        }
    }
}

/// Asks a peer for what this node lacks.
async fn question(
    shared: &Arc<Shared>,
    connection: Arc<Connection>,
    protocol: StreamProtocol,
) -> Result<(), FrameError> {
    let stream = match connection.open(protocol).await {
        Ok(stream) => stream,
        // Nodes of other networks, and other programs, do not speak it.
        Err(OpenError::Unsupported | OpenError::Lost | OpenError::Timeout) => return Ok(()),
        Err(OpenError::Io(error)) => return Err(error.into()),
    };
    let mut stream = BufReader::new(Stream::new(Arc::clone(shared), Arc::clone(&connection), stream));
    let request = {
        let state = shared.news.lock();
        Request { vectors: state.links.vectors().known(), records: state.records.known() }
    };
    send_last_frame(&mut stream, &request.encode()).await?;
    let Some(reply) = read_frame(&mut stream, "news", REPLY_FRAME_MAX_BYTES).await? else {
        return Ok(());
    };
    let reply = Reply::decode(reply)?;
    for (n, item) in reply.records.into_iter().enumerate() {
        take_record(shared, &connection, item)?;
        let_others(n).await;
    }
    for (n, item) in reply.vectors.into_iter().enumerate() {
        take_vector(shared, &connection, item)?;
        let_others(n).await;
    }
    Ok(())
}

/// After some statements, whose signatures take their time, other tasks of the thread have their turn.
async fn let_others(n: usize) {
    if n % STATEMENTS_IN_A_ROW == STATEMENTS_IN_A_ROW - 1 {
        tokio::task::yield_now().await;
    }
}

fn take_vector(shared: &Shared, from: &Connection, (statement, age): Item) -> Result<(), DecodeError> {
    let wants = |author: &PeerId, time: u64| shared.news.lock().links.vectors().wants(author, time);
    let Some((author, vector)) = decode_vector(&statement, wants)? else { return Ok(()) };
    let time = vector.written_ms;
    if is_usable(shared, from, &author, Duration::from_millis(time)) {
        let now = shared.now();
        shared.news.lock().links.vectors_mut().insert(now, &author, time, (statement, age), vector);
    }
    Ok(())
}

fn take_record(shared: &Shared, from: &Connection, (statement, age): Item) -> Result<(), DecodeError> {
    let Record { author, written_s, addresses } = record::decode(&statement)?;
    let news = shared.news.lock().records.wants(&author, written_s);
    if !news || !is_usable(shared, from, &author, Duration::from_secs(written_s)) {
        return Ok(());
    }
    let now = shared.now();
    let (teller, of) = (from.peer.short(), author.short());
    if !shared.news.lock().records.insert(now, &author, written_s, (statement, age), ()) {
        // Otherwise somebody else just told it, or there are more authors than are remembered.
        if age > RECORD_EXPIRES {
            tracing::info!(from = teller, author = of, ?age, "news is not used: it is too old");
        }
        return Ok(());
    }
    for address in &addresses {
        if is_plausible(address, &from.address) {
            shared.table().handle_address(now, &author, address);
        } else {
            tracing::debug!(
                from = teller,
                author = of,
                address,
                "address not kept: it is nearer than who told it"
            );
        }
    }
    Ok(())
}

/// Whether a statement made at `written` (Unix time) by `author` may be used.
fn is_usable(shared: &Shared, from: &Connection, author: &PeerId, written: Duration) -> bool {
    let from = from.peer.short();
    if *author == shared.local {
        // What it said before it was restarted comes back, too.
        if written > unix_now().saturating_sub(shared.now()) {
            tracing::warn!(%from, "this node's key signed news that it did not make: does another node run with it?");
        }
        return false;
    }
    let usable = unix_now().abs_diff(written) <= SKEW_MAX;
    if !usable {
        tracing::info!(%from, author = %author.short(), "news is not used: its author's clock, or ours, is hours off");
    }
    usable
}

/// The time of day.
pub(super) fn unix_now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

impl Teller {
    /// Moves the coordinate with what was measured, and says anew what has to be said.
    async fn tell(&mut self, shared: &Arc<Shared>) {
        let now = shared.now();
        let links = fresh_links(shared, now);
        let n_authors = {
            let mut state = shared.news.lock();
            state.links.vectors_mut().expire(now);
            state.records.expire(now);
            state.met.retain(|_, until| now < *until);
            state.links.handle_links(now, &links, rand::rng().random());
            state.links.vectors().len() as u32
        };
        let pause = (shared.config.news_interval * VECTOR_INTERVALS).max(VECTOR_PER_AUTHOR * n_authors);
        if !links.is_empty() && self.vector_at.is_none_or(|at| now >= at + pause) {
            self.vector_at = Some(now);
            // Later than the last one even when the clock was set back.
            self.written_ms = (unix_now().as_millis() as u64).max(self.written_ms + 1);
            let mut state = shared.news.lock();
            let vector = state.links.own_vector(self.written_ms, &links);
            let statement = (encode_vector(&vector, &self.identity), Duration::ZERO);
            state.links.vectors_mut().insert(now, &shared.local, self.written_ms, statement, vector);
        }
        self.tell_addresses(shared, now).await;
    }

    async fn tell_addresses(&mut self, shared: &Shared, now: Duration) {
        let addresses = own_addresses(shared).await;
        let current =
            self.record.as_ref().is_some_and(|(said, at)| *said == addresses && now < *at + RECORD_RENEWED);
        if addresses.is_empty() || current {
            return;
        }
        match PeerRecord::new_interop(&self.keypair, addresses.clone()) {
            Ok(record) => {
                let time = record.seq();
                let statement = record.into_signed_envelope().into_protobuf_encoding();
                let item = (statement.into(), Duration::ZERO);
                // Its times are seconds: a second change within one has to wait for the next.
                if shared.news.lock().records.insert(now, &shared.local, time, item, ()) {
                    self.record = Some((addresses, now));
                }
            }
            Err(error) => tracing::warn!(%error, "own addresses could not be signed"),
        }
    }

    /// Connects to peers that were heard of while there are few.
    async fn keep_peers(&mut self, shared: &Shared) {
        let now = shared.now();
        let connected: HashSet<PeerId> = shared.table().connected_peers().into_iter().collect();
        if connected.len() >= shared.config.keep_peers {
            return;
        }
        self.tried.retain(|_, at| now < *at + TRIED_AGAIN);
        let candidate = {
            let state = shared.news.lock();
            let heard = state
                .records
                .iter()
                .map(|(author, ())| author)
                .chain(&self.remembered)
                .chain(state.met.keys());
            let fresh =
                |p: &&PeerId| **p != shared.local && !connected.contains(*p) && !self.tried.contains_key(*p);
            heard.filter(fresh).choose(&mut rand::rng()).cloned()
        };
        if let Some(peer) = candidate {
            self.tried.insert(peer.clone(), now);
            // Nobody waits for it: a peer that comes is an event like any other.
            let (reply, _) = oneshot::channel();
            let _ = shared.command(Command::Connect { peer, reply }).await;
        }
    }

    /// Reads the file of peers, once.
    async fn remember(&mut self, shared: &Arc<Shared>) {
        let Some(path) = shared.config.peers_file.clone() else { return };
        let read = tokio::task::spawn_blocking(move || peers_file::load(&path)).await;
        for statement in read.unwrap_or_default() {
            let Ok(record) = record::decode(&statement) else { continue };
            for address in &record.addresses {
                shared.table().handle_address(shared.now(), &record.author, address);
            }
            self.remembered.push(record.author);
        }
    }
}

/// Writes the latest records to the file of peers. Blocks.
pub(super) fn save(shared: &Shared) {
    let Some(path) = &shared.config.peers_file else { return };
    let records: Vec<Item> = {
        let state = shared.news.lock();
        let own = state.records.known_of(&shared.local).into_iter().collect();
        state.records.missing(shared.now(), &own, peers_file::MAX_BYTES / 2)
    };
    if records.is_empty() {
        // Whoever was remembered is better than nobody.
        return;
    }
    let statements: Vec<_> = records.into_iter().map(|(statement, _)| statement).collect();
    if let Err(error) = peers_file::save(path, &statements) {
        tracing::warn!(path = %path.display(), %error, "peers are not remembered on disk");
    }
}

/// The addresses of this node that others are told; none when it is about to stop.
pub(super) async fn own_addresses(shared: &Shared) -> Vec<Multiaddr> {
    let (reply, answer) = oneshot::channel();
    if shared.command(Command::OwnAddrs { reply }).await.is_err() {
        return Vec::new();
    }
    let own: Vec<String> = answer.await.unwrap_or_default().iter().map(ToString::to_string).collect();
    let told = worth_telling(own, shared.config.limits.addresses_per_peer);
    told.iter().filter_map(|a| a.parse().ok()).collect()
}

/// Connected peers whose path in use was measured lately, with that path first and others that were after it.
fn fresh_links(shared: &Shared, now: Duration) -> Vec<(PeerId, Vec<LinkEstimate>)> {
    let table = shared.table();
    let estimates = |peer: PeerId| {
        let in_use = table.best(&peer)?.path;
        let mut paths = table.known_state(&peer)?.links().estimates(now, Some(in_use));
        paths.retain(|link| link.age <= LINK_FRESH);
        paths.first().is_some_and(|link| link.path == in_use).then_some((peer, paths))
    };
    table.connected_peers().into_iter().filter_map(estimates).collect()
}
