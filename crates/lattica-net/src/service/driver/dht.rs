//! Queries to the DHT and who waits for them.

use std::collections::{HashMap, HashSet};

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
use crate::error::DhtError;

/// Queries that run at the same time; further ones are refused.
const QUERIES_MAX: usize = 1024;
/// Providers of one key that are reported.
const PROVIDERS_MAX: usize = 64;
/// Announcements that wait for the first peer.
const WAITING_MAX: usize = 4096;

/// See the module.
#[derive(Default)]
pub(super) struct Queries {
    running: HashMap<QueryId, Query>,
    /// Keys that were announced while nobody was there to hear it.
    waiting_keys: HashSet<RecordKey>,
}

enum Query {
    Provide { reply: Option<Reply<(), DhtError>> },
    Providers { found: HashSet<PeerId>, reply: Reply<Vec<PeerId>, DhtError> },
    Put { reply: Reply<(), DhtError> },
    Get { reply: Reply<Option<Vec<u8>>, DhtError> },
    Find { peer: LibPeerId },
}

impl Driver {
    fn dht_is_empty(&mut self) -> bool {
        self.swarm.behaviour_mut().kad.kbuckets().all(|bucket| bucket.is_empty())
    }

    fn too_many_queries(&self) -> Option<DhtError> {
        let reason = format!("{QUERIES_MAX} queries run already");
        (self.queries.running.len() >= QUERIES_MAX).then_some(DhtError::Store { reason })
    }

    /// Announces a key. With nobody there yet the announcement is kept and made when the first peer joins.
    pub(super) fn provide(&mut self, key: Vec<u8>, reply: Reply<(), DhtError>) {
        if let Some(error) = self.too_many_queries() {
            let _ = reply.send(Err(error));
            return;
        }
        let key = RecordKey::from(key);
        let alone = self.dht_is_empty();
        match self.swarm.behaviour_mut().kad.start_providing(key.clone()) {
            Ok(_) if alone => {
                // Those who announce again and again wait once.
                if self.queries.waiting_keys.len() < WAITING_MAX {
                    self.queries.waiting_keys.insert(key);
                }
                let _ = reply.send(Ok(()));
            }
            Ok(id) => {
                self.queries.running.insert(id, Query::Provide { reply: Some(reply) });
            }
            Err(error) => {
                let _ = reply.send(Err(store_error(&error)));
            }
        }
    }

    /// Peers are there now: makes the announcements that waited for them.
    pub(super) fn announce_waiting(&mut self) {
        for key in std::mem::take(&mut self.queries.waiting_keys) {
            if let Ok(id) = self.swarm.behaviour_mut().kad.start_providing(key) {
                self.queries.running.insert(id, Query::Provide { reply: None });
            }
        }
    }

    pub(super) fn providers(&mut self, key: Vec<u8>, reply: Reply<Vec<PeerId>, DhtError>) {
        if let Some(error) = self.too_many_queries() {
            let _ = reply.send(Err(error));
            return;
        }
        let id = self.swarm.behaviour_mut().kad.get_providers(key.into());
        self.queries.running.insert(id, Query::Providers { found: HashSet::new(), reply });
    }

    pub(super) fn put_record(&mut self, key: Vec<u8>, value: Vec<u8>, reply: Reply<(), DhtError>) {
        let refusal = if value.len() > DHT_VALUE_MAX_BYTES {
            let reason = format!("{} bytes are over the limit of {DHT_VALUE_MAX_BYTES}", value.len());
            Some(DhtError::Store { reason })
        } else if self.dht_is_empty() {
            Some(DhtError::NoPeers)
        } else {
            self.too_many_queries()
        };
        if let Some(error) = refusal {
            let _ = reply.send(Err(error));
            return;
        }
        match self.swarm.behaviour_mut().kad.put_record(Record::new(key, value), Quorum::One) {
            Ok(id) => {
                self.queries.running.insert(id, Query::Put { reply });
            }
            Err(error) => {
                let _ = reply.send(Err(store_error(&error)));
            }
        }
    }

    pub(super) fn get_record(&mut self, key: Vec<u8>, reply: Reply<Option<Vec<u8>>, DhtError>) {
        if let Some(error) = self.too_many_queries() {
            let _ = reply.send(Err(error));
            return;
        }
        let id = self.swarm.behaviour_mut().kad.get_record(key.into());
        self.queries.running.insert(id, Query::Get { reply });
    }

    /// Looks for the addresses of a peer; `false` when nobody can be asked.
    pub(super) fn find_peer(&mut self, peer: LibPeerId) -> bool {
        if self.dht_is_empty() || self.too_many_queries().is_some() {
            return false;
        }
        let id = self.swarm.behaviour_mut().kad.get_closest_peers(peer);
        self.queries.running.insert(id, Query::Find { peer });
        true
    }

    pub(super) fn handle_kad_event(&mut self, event: kad::Event) {
        let kad::Event::OutboundQueryProgressed { id, result, step, .. } = event else { return };
        let Some(query) = self.queries.running.remove(&id) else { return };
        match (query, result) {
            (Query::Providers { mut found, reply }, QueryResult::GetProviders(result)) => {
                if let Ok(GetProvidersOk::FoundProviders { providers, .. }) = result {
                    found.extend(providers.iter().filter_map(|p| wire_peer(p).ok()).take(PROVIDERS_MAX));
                }
                if step.last || found.len() >= PROVIDERS_MAX {
                    let mut found: Vec<PeerId> = found.into_iter().collect();
                    found.sort();
                    found.truncate(PROVIDERS_MAX);
                    let _ = reply.send(Ok(found));
                } else {
                    self.queries.running.insert(id, Query::Providers { found, reply });
                }
            }
            (Query::Provide { reply }, QueryResult::StartProviding(result)) => {
                let result = result.map(|_| ()).map_err(|AddProviderError::Timeout { .. }| DhtError::Timeout);
                if let Some(reply) = reply {
                    let _ = reply.send(result);
                }
            }
            (Query::Put { reply }, QueryResult::PutRecord(result)) => {
                let _ = reply.send(match result {
                    Ok(_) => Ok(()),
                    Err(PutRecordError::Timeout { .. }) => Err(DhtError::Timeout),
                    Err(PutRecordError::QuorumFailed { .. }) => {
                        Err(DhtError::NotStored { reason: "no peer accepted it".to_owned() })
                    }
                });
            }
            (Query::Get { reply }, QueryResult::GetRecord(result)) => match result {
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
            (Query::Find { peer }, QueryResult::GetClosestPeers(result)) => {
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
