//! Queries to the DHT and who waits for them.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use libp2p::PeerId as LibPeerId;
use libp2p::core::Multiaddr;
use libp2p::kad::{
    self, AddProviderError, GetClosestPeersError, GetClosestPeersOk, GetProvidersOk, GetRecordError,
    GetRecordOk, PutRecordError, QueryId, QueryResult, Quorum, Record, RecordKey, store,
};
use swarm_wire::PeerId;

use super::super::behaviour::DHT_VALUE_MAX_BYTES;
use super::super::wire_peer;
use super::{Driver, Reply};
use crate::dht::{self, SignedRecord, own::Own};
use crate::error::DhtError;

mod signed;

use signed::weigh;

/// Queries that run at the same time; further ones are refused.
const QUERIES_MAX: usize = 1024;
/// Providers of one key that are reported.
const PROVIDERS_MAX: usize = 64;
/// Announcements that wait for the first peer.
const WAITING_MAX: usize = 4096;
/// Times that one query is made while nobody answers it. A stream that breaks takes its answer along: over QUIC a peer that
/// resets a stream after answering (js-libp2p does, when it looks for a next question before it has seen that none
/// follows) discards what was not yet read.
const TRIES: u32 = 4;
/// How long a query may wait for peers, and from when on it is not made again.
const PATIENCE: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Default)]
pub(super) struct Queries {
    running: HashMap<QueryId, Query>,
    /// Those that are made when it is known whether a peer that is connected takes part.
    waiting: Vec<Query>,
    /// Keys that were announced while nobody was there to hear it.
    waiting_keys: HashSet<RecordKey>,
    /// What this node publishes.
    own: Own,
}

/// A signed record, where there is one.
type Newest = Option<SignedRecord>;

struct Query {
    what: What,
    tries: u32,
    /// When it ceases to wait and to be made again.
    until: Duration,
}

enum What {
    /// Announce a key; again and for nobody, where it had to wait.
    Provide { key: RecordKey, reply: Option<Reply<(), DhtError>> },
    /// Who announced a key, and those found so far.
    Providers { key: RecordKey, found: HashSet<PeerId>, reply: Reply<Vec<PeerId>, DhtError> },
    /// Store a record; with its name and sequence, one of those that this node publishes.
    Put { record: Record, own: Option<(String, u64)>, reply: Option<Reply<(), DhtError>> },
    /// A record of anybody's.
    Get { key: RecordKey, reply: Reply<Option<Vec<u8>>, DhtError> },
    /// The newest signed record, and the best one so far.
    Published { key: RecordKey, best: Newest, reply: Reply<Newest, DhtError> },
    /// The addresses of a peer.
    Find { peer: LibPeerId },
}

impl Query {
    /// Whether to make it again, when nobody answered.
    fn goes_on(&self, now: Duration) -> bool {
        let wanted = match &self.what {
            What::Provide { reply, .. } | What::Put { reply, .. } => {
                reply.as_ref().is_none_or(|reply| !reply.is_closed())
            }
            What::Providers { reply, .. } => !reply.is_closed(),
            What::Get { reply, .. } => !reply.is_closed(),
            What::Published { reply, .. } => !reply.is_closed(),
            What::Find { .. } => false,
        };
        wanted && self.tries < TRIES && now < self.until
    }

    fn fail(self, error: DhtError) {
        match self.what {
            What::Provide { reply: Some(reply), .. } | What::Put { reply: Some(reply), .. } => {
                let _ = reply.send(Err(error));
            }
            What::Providers { reply, .. } => {
                let _ = reply.send(Err(error));
            }
            What::Get { reply, .. } => {
                let _ = reply.send(Err(error));
            }
            What::Published { reply, .. } => {
                let _ = reply.send(Err(error));
            }
            What::Provide { reply: None, .. } | What::Put { reply: None, .. } | What::Find { .. } => {}
        }
    }
}

impl Driver {
    pub(super) fn dht_is_empty(&mut self) -> bool {
        self.swarm.behaviour_mut().kad.kbuckets().all(|bucket| bucket.is_empty())
    }

    fn too_many_queries(&self) -> Option<DhtError> {
        let running = self.queries.running.len() + self.queries.waiting.len();
        (running >= QUERIES_MAX).then_some(DhtError::Busy { running })
    }

    /// Announces a key. With nobody there yet the announcement is kept and made when the first peer joins.
    pub(super) fn provide(&mut self, key: Vec<u8>, reply: Reply<(), DhtError>) {
        if let Some(error) = self.too_many_queries() {
            let _ = reply.send(Err(error));
            return;
        }
        let key = RecordKey::from(key);
        if !self.dht_is_empty() {
            let query = self.query(What::Provide { key, reply: Some(reply) });
            return self.make(query);
        }
        let waiting = &mut self.queries.waiting_keys;
        // Those who announce again and again wait once.
        let _ = reply.send(if waiting.len() >= WAITING_MAX && !waiting.contains(&key) {
            Err(DhtError::Busy { running: waiting.len() })
        } else if let Err(error) = self.swarm.behaviour_mut().kad.start_providing(key.clone()) {
            Err(store_error(&error))
        } else {
            // Whoever asks this node is told already.
            waiting.insert(key);
            Ok(())
        });
    }

    /// Takes an announcement back, also one that waits or is to be repeated.
    pub(super) fn stop_providing(&mut self, key: Vec<u8>) {
        let stopped = RecordKey::from(key);
        self.swarm.behaviour_mut().kad.stop_providing(&stopped);
        self.queries.waiting_keys.remove(&stopped);
        for query in self.queries.running.values_mut() {
            if matches!(&query.what, What::Provide { key, .. } if *key == stopped) {
                query.tries = TRIES;
            }
        }
    }

    /// Makes the announcements that waited for peers, where there are some now.
    fn announce_waiting(&mut self) {
        if self.queries.waiting_keys.is_empty() || self.dht_is_empty() {
            return;
        }
        let room = QUERIES_MAX.saturating_sub(self.queries.running.len() + self.queries.waiting.len());
        let keys: Vec<RecordKey> = self.queries.waiting_keys.iter().take(room).cloned().collect();
        for key in keys {
            self.queries.waiting_keys.remove(&key);
            let query = self.query(What::Provide { key, reply: None });
            self.make(query);
        }
    }

    pub(super) fn providers(&mut self, key: Vec<u8>, reply: Reply<Vec<PeerId>, DhtError>) {
        if let Some(error) = self.too_many_queries() {
            let _ = reply.send(Err(error));
            return;
        }
        let query = self.query(What::Providers { key: key.into(), found: HashSet::new(), reply });
        self.make_when_known(query);
    }

    pub(super) fn put_record(&mut self, key: Vec<u8>, value: Vec<u8>, reply: Reply<(), DhtError>) {
        let refusal = if value.len() > DHT_VALUE_MAX_BYTES {
            let reason = format!("{} bytes are over the limit of {DHT_VALUE_MAX_BYTES}", value.len());
            Some(DhtError::Store { reason })
        } else if dht::is_signed(&key) {
            Some(DhtError::ReservedKey)
        } else {
            self.too_many_queries()
        };
        if let Some(error) = refusal {
            let _ = reply.send(Err(error));
            return;
        }
        let record = Record::new(key, value);
        let query = self.query(What::Put { record, own: None, reply: Some(reply) });
        self.make_when_known(query);
    }

    pub(super) fn get_record(&mut self, key: Vec<u8>, reply: Reply<Option<Vec<u8>>, DhtError>) {
        if let Some(error) = self.too_many_queries() {
            let _ = reply.send(Err(error));
            return;
        }
        let query = self.query(What::Get { key: key.into(), reply });
        self.make_when_known(query);
    }

    fn query(&self, what: What) -> Query {
        Query { what, tries: 0, until: self.shared.now() + PATIENCE }
    }

    /// Makes a query, once it is known whether somebody who is connected takes part.
    fn make_when_known(&mut self, query: Query) {
        if self.dht_is_empty() && !self.unidentified.is_empty() {
            self.queries.waiting.push(query);
        } else {
            self.make(query);
        }
    }

    /// Makes the announcements and the queries that waited, where there is nothing to wait for any more.
    pub(super) fn make_waiting(&mut self) {
        self.announce_waiting();
        if self.queries.waiting.is_empty() {
            return;
        }
        let now = self.shared.now();
        let waits = self.dht_is_empty() && !self.unidentified.is_empty();
        let (wait, due): (Vec<Query>, Vec<Query>) =
            std::mem::take(&mut self.queries.waiting).into_iter().partition(|q| waits && now < q.until);
        self.queries.waiting = wait;
        for query in due {
            self.make(query);
        }
    }

    fn make(&mut self, mut query: Query) {
        query.tries += 1;
        let alone = self.dht_is_empty();
        let kad = &mut self.swarm.behaviour_mut().kad;
        let id = match &query.what {
            What::Provide { key, .. } => kad.start_providing(key.clone()),
            What::Providers { key, .. } => Ok(kad.get_providers(key.clone())),
            What::Put { own: Some((name, sequence)), .. } if !self.queries.own.is_last(name, *sequence) => {
                let reason = "it was taken back, or another one is in its place".to_owned();
                return query.fail(DhtError::NotStored { reason });
            }
            What::Put { own, .. } if alone => {
                if let Some((name, _)) = own {
                    self.queries.own.handle_alone(self.shared.now(), name);
                }
                return query.fail(DhtError::NoPeers);
            }
            What::Put { record, .. } => kad.put_record(record.clone(), Quorum::One),
            What::Get { key, .. } | What::Published { key, .. } => Ok(kad.get_record(key.clone())),
            What::Find { peer } => Ok(kad.get_closest_peers(*peer)),
        };
        match id {
            Ok(id) => {
                self.queries.running.insert(id, query);
            }
            Err(error) => {
                let error = store_error(&error);
                if let What::Put { own: Some((name, sequence)), .. } = &query.what {
                    self.handle_own_put(name, *sequence, Some(&error));
                }
                query.fail(error);
            }
        }
    }

    /// Looks for the addresses of a peer; `false` when nobody can be asked.
    pub(super) fn find_peer(&mut self, peer: LibPeerId) -> bool {
        if self.dht_is_empty() || self.too_many_queries().is_some() {
            return false;
        }
        let query = self.query(What::Find { peer });
        self.make(query);
        true
    }

    pub(super) fn handle_kad_event(&mut self, event: kad::Event) {
        let kad::Event::OutboundQueryProgressed { id, result, step, stats } = event else { return };
        let Some(query) = self.queries.running.remove(&id) else { return };
        // Others may have answered where one failed, but a record is stored nowhere.
        let unheard = match &result {
            QueryResult::PutRecord(Err(PutRecordError::QuorumFailed { .. })) => true,
            QueryResult::PutRecord(_) => false,
            _ => step.last && stats.num_successes() == 0,
        };
        if unheard && stats.num_failures() > 0 && query.goes_on(self.shared.now()) {
            return self.make(query);
        }
        let Query { what, tries, until } = query;
        match (what, result) {
            (What::Providers { key, mut found, reply }, QueryResult::GetProviders(result)) => {
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = result {
                    found.extend(providers.iter().filter_map(|p| wire_peer(p).ok()).take(PROVIDERS_MAX));
                }
                if step.last || found.len() >= PROVIDERS_MAX {
                    let mut found: Vec<PeerId> = found.into_iter().collect();
                    found.sort();
                    found.truncate(PROVIDERS_MAX);
                    let _ = reply.send(Ok(found));
                } else {
                    let what = What::Providers { key, found, reply };
                    self.queries.running.insert(id, Query { what, tries, until });
                }
            }
            (What::Provide { reply, .. }, QueryResult::StartProviding(result)) => {
                let result = result.map(|_| ()).map_err(|AddProviderError::Timeout { .. }| DhtError::Timeout);
                if let Some(reply) = reply {
                    let _ = reply.send(result);
                }
            }
            (What::Put { own, reply, .. }, QueryResult::PutRecord(result)) => {
                let result = match result {
                    Ok(_) => Ok(()),
                    Err(PutRecordError::Timeout { .. }) => Err(DhtError::Timeout),
                    Err(PutRecordError::QuorumFailed { .. }) => {
                        Err(DhtError::NotStored { reason: "no peer accepted it".to_owned() })
                    }
                };
                if let Some((name, sequence)) = own {
                    self.handle_own_put(&name, sequence, result.as_ref().err());
                }
                if let Some(reply) = reply {
                    let _ = reply.send(result);
                }
            }
            (What::Get { reply, .. }, QueryResult::GetRecord(result)) => match result {
                Ok(GetRecordOk::FoundRecord(found)) => {
                    let _ = reply.send(Ok(Some(found.record.value)));
                    if let Some(mut query) = self.swarm.behaviour_mut().kad.query_mut(&id) {
                        query.finish();
                    }
                }
                Ok(GetRecordOk::FinishedWithNoAdditionalRecord { .. })
                | Err(GetRecordError::NotFound { .. }) => {
                    let _ = reply.send(Ok(None));
                }
                Err(GetRecordError::Timeout { .. }) => {
                    let _ = reply.send(Err(DhtError::Timeout));
                }
            },
            (What::Published { key, mut best, reply }, QueryResult::GetRecord(result)) => match result {
                Ok(GetRecordOk::FoundRecord(found)) => {
                    weigh(&key, &found, &mut best);
                    let what = What::Published { key, best, reply };
                    self.queries.running.insert(id, Query { what, tries, until });
                }
                Ok(GetRecordOk::FinishedWithNoAdditionalRecord { .. })
                | Err(GetRecordError::NotFound { .. }) => {
                    let _ = reply.send(Ok(best));
                }
                Err(GetRecordError::Timeout { .. }) => {
                    let _ = reply.send(best.map(Some).ok_or(DhtError::Timeout));
                }
            },
            (What::Find { peer }, QueryResult::GetClosestPeers(result)) => {
                let peers = match result {
                    Ok(GetClosestPeersOk { peers, .. })
                    | Err(GetClosestPeersError::Timeout { peers, .. }) => peers,
                };
                let addresses: Vec<Multiaddr> =
                    peers.into_iter().filter(|p| p.peer_id == peer).flat_map(|p| p.addrs).collect();
                let limit = self.shared.config.limits.addresses_per_peer;
                self.dial_found(peer, addresses.into_iter().take(limit).collect());
            }
            // A result of another kind than its query cannot come; the query then simply ends.
            _ => {}
        }
    }
}

fn store_error(error: &store::Error) -> DhtError {
    DhtError::Store { reason: error.to_string() }
}
