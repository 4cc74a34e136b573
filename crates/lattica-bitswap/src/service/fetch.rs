//! Driving one fetch: a session's wants go out, its timers run, and its end is told.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use swarm_wire::{Cid, PeerId};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use super::exchange::{Exchange, Fetch, Outgoing};
use crate::session::{Outlook, Wanted};
use crate::wire::Message;
use crate::{FetchError, Session};

/// How long the DHT may take to name holders.
const PROVIDERS_TIMEOUT: Duration = Duration::from_secs(10);

/// What is wanted, of which artefact, from whom.
pub(super) struct Order {
    /// Of the artefact: its holders are looked for.
    pub(super) root: Cid,
    pub(super) wanted: Vec<Wanted>,
    /// Lengths to check arrivals against.
    pub(super) lengths: HashMap<Cid, u32>,
    pub(super) from: Vec<PeerId>,
}

/// The key under which holders of an artefact announce themselves: the root's multihash, as IPFS has it.
pub(super) fn provider_key(root: &Cid) -> Vec<u8> {
    root.hash().to_bytes()
}

/// Removes the fetch when its future ends or is dropped.
struct Registered {
    exchange: Arc<Exchange>,
    id: u64,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.exchange.end_fetch(self.id);
    }
}

/// Where the search for holders stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Search {
    NotYet,
    Over,
}

/// Fetches what `order` names into the store. `progress` hears of bytes that arrived. Dropping the future takes the wants
/// back; blocks that arrived stay stored.
pub(super) async fn run(
    exchange: &Arc<Exchange>,
    order: Order,
    mut progress: impl FnMut(u64),
) -> Result<(), FetchError> {
    let root = order.root;
    let asked_for_hints = !order.from.is_empty();
    let wake = Arc::new(Notify::new());
    let registered = register(exchange, order, &wake);
    let id = registered.id;
    let mut search = Search::NotYet;
    let mut looking = None;
    if !asked_for_hints {
        add_connected(exchange, id);
        looking = Some(Box::pin(find_providers(Arc::clone(exchange), root)));
        search = Search::Over;
    }
    let mut told_bytes = 0;
    let mut hopeless_since: Option<Duration> = None;
    loop {
        let mut step = step(exchange, id)?;
        for (peer, entries) in std::mem::take(&mut step.sends) {
            exchange.send(&peer, Outgoing::Message(Message { entries, ..Message::default() }));
        }
        if step.arrived_bytes != told_bytes {
            told_bytes = step.arrived_bytes;
            progress(told_bytes);
        }
        let now = exchange.now();
        let hopeless = match step.outlook {
            Outlook::Done => return Ok(()),
            Outlook::Waiting => None,
            outlook @ (Outlook::NobodyHas | Outlook::NoPeers) => Some(outlook),
        };
        if hopeless.is_some() && search == Search::NotYet {
            search = Search::Over;
            add_connected(exchange, id);
            looking = Some(Box::pin(find_providers(Arc::clone(exchange), root)));
            continue;
        }
        let give_up_at = match hopeless {
            None => {
                hopeless_since = None;
                step.last_arrival + exchange.config.give_up_after
            }
            Some(_) if looking.is_some() => step.last_arrival + exchange.config.give_up_after,
            Some(_) => *hopeless_since.get_or_insert(now) + exchange.config.dont_have_grace,
        };
        if now >= give_up_at {
            return Err(failure(root, &step, hopeless));
        }
        let deadline = step.deadline.map_or(give_up_at, |d| d.min(give_up_at));
        tokio::select! {
            () = wake.notified() => {}
            () = sleep_until(Instant::now() + deadline.saturating_sub(now) + Duration::from_millis(1)) => {
                let now = exchange.now();
                let mut state = exchange.lock();
                let late = state.fetches.get_mut(&id).map(|f| {
                    f.session.handle_timeout(now);
                    f.session.take_stalled()
                });
                for peer in late.unwrap_or_default() {
                    tracing::debug!(peer = %peer.short(), %root, "peer stalled");
                    state.ledger.stalled(&peer);
                }
            }
            found = async { looking.as_mut().expect("guarded").await }, if looking.is_some() => {
                looking = None;
                let now = exchange.now();
                let mut state = exchange.lock();
                let found: Vec<PeerId> = found.into_iter().filter(|p| !state.ledger.is_shunned(p)).collect();
                if let Some(fetch) = state.fetches.get_mut(&id) {
                    found.iter().for_each(|peer| fetch.session.add_holder(peer, now));
                }
            }
        }
    }
}

fn register(exchange: &Arc<Exchange>, order: Order, wake: &Arc<Notify>) -> Registered {
    let now = exchange.now();
    let own = exchange.node.peer_id();
    let mut state = exchange.lock();
    let id = state.next_fetch;
    state.next_fetch += 1;
    let mut config = exchange.config.session.clone();
    // Every node starts at another block, so that receivers can serve each other.
    config.seed ^= own.as_bytes().iter().fold(id, |h, &b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    let mut session = Session::new(config, &order.wanted);
    let hints: HashSet<PeerId> = order.from.into_iter().filter(|p| *p != own).collect();
    for peer in hints.iter().filter(|p| !state.ledger.is_shunned(p)) {
        session.add_holder(peer, now);
    }
    let fetch = Fetch {
        session,
        lengths: order.lengths,
        root: order.root,
        arrived_bytes: 0,
        last_arrival: now,
        failed: None,
        hints,
        wake: Arc::clone(wake),
    };
    state.fetches.insert(id, fetch);
    Registered { exchange: Arc::clone(exchange), id }
}

struct Step {
    sends: Vec<(PeerId, Vec<crate::wire::WantEntry>)>,
    outlook: Outlook,
    deadline: Option<Duration>,
    arrived_bytes: u64,
    last_arrival: Duration,
    missing: usize,
    asked_peers: usize,
}

fn step(exchange: &Exchange, id: u64) -> Result<Step, FetchError> {
    let mut state = exchange.lock();
    let fetch = state.fetches.get_mut(&id).ok_or(FetchError::Closed)?;
    if let Some(error) = fetch.failed.take() {
        return Err(error);
    }
    Ok(Step {
        sends: std::iter::from_fn(|| fetch.session.poll_send()).collect(),
        outlook: fetch.session.outlook(),
        deadline: fetch.session.next_deadline(),
        arrived_bytes: fetch.arrived_bytes,
        last_arrival: fetch.last_arrival,
        missing: fetch.session.missing(),
        asked_peers: fetch.session.asked_peers(),
    })
}

fn failure(root: Cid, step: &Step, hopeless: Option<Outlook>) -> FetchError {
    if step.asked_peers == 0 {
        return FetchError::NoPeers { root };
    }
    let reason = match hopeless {
        Some(Outlook::NobodyHas) => "the peers that were asked do not have them",
        Some(_) => "every peer left, stalled or sent wrong blocks",
        None => "no peer delivered anything for too long",
    };
    FetchError::Incomplete {
        root: Box::new(root),
        missing_blocks: step.missing,
        asked_peers: step.asked_peers,
        reason,
    }
}

/// Asks whoever is connected whether they have something.
fn add_connected(exchange: &Exchange, id: u64) {
    let mut connected = exchange.node.connected_peers();
    let now = exchange.now();
    let mut state = exchange.lock();
    connected.retain(|p| !state.ledger.is_shunned(p));
    connected.sort_by_key(|p| std::cmp::Reverse(state.ledger.account(p).score));
    if let Some(fetch) = state.fetches.get_mut(&id) {
        fetch.session.add_candidates(&connected, now);
    }
}

async fn find_providers(exchange: Arc<Exchange>, root: Cid) -> Vec<PeerId> {
    let own = exchange.node.peer_id();
    match timeout(PROVIDERS_TIMEOUT, exchange.node.providers(&provider_key(&root))).await {
        Ok(Ok(peers)) => peers.into_iter().filter(|p| *p != own).collect(),
        Ok(Err(error)) => {
            tracing::debug!(%root, %error, "no providers from the DHT");
            Vec::new()
        }
        Err(_) => Vec::new(),
    }
}
