//! Signed records: this node's own are put and put again, those of others are judged as the answers come.

use std::time::{Duration, Instant};

use bytes::Bytes;
use libp2p::kad::store::RecordStore as _;
use libp2p::kad::{PeerRecord, Record, RecordKey};
use swarm_wire::PeerId;

use super::{Driver, Reply, What};
use crate::dht::{self, SignedRecord, wire};
use crate::error::DhtError;
use crate::service::news::unix_now;

/// Own records that are put in one tick.
const PUTS_PER_TICK: usize = 8;

impl Driver {
    /// Publishes a record from now on.
    pub(in crate::service::driver) fn publish_record(
        &mut self,
        name: &str,
        value: Bytes,
        ttl: Duration,
        reply: Reply<(), DhtError>,
    ) {
        let published = self.queries.own.publish(self.shared.now(), name, value, ttl);
        // Published all the same, and put when there is room.
        let refusal = published.err().map(DhtError::from).or_else(|| self.too_many_queries());
        match refusal {
            None => self.put_own(name, Some(reply)),
            Some(error) => {
                let _ = reply.send(Err(error));
            }
        }
    }

    /// Takes a record back, also one that waits or is to be put again.
    pub(in crate::service::driver) fn unpublish_record(&mut self, name: &str) {
        if !self.queries.own.withdraw(name) {
            return;
        }
        let key = self.own_key(name);
        // Whoever put it here last.
        self.swarm.behaviour_mut().kad.store_mut().remove(&key);
    }

    /// Puts own records again whose time has come.
    pub(in crate::service::driver) fn put_due(&mut self) {
        for _ in 0..PUTS_PER_TICK {
            let Some(name) = self.queries.own.due(self.shared.now()) else { return };
            if self.dht_is_empty() || self.too_many_queries().is_some() {
                return;
            }
            self.put_own(&name, None);
        }
    }

    fn put_own(&mut self, name: &str, reply: Option<Reply<(), DhtError>>) {
        let (key, now) = (self.own_key(name), unix_now());
        // Later than the last one even when the clock was set back, or it is of an earlier start of this node.
        let kept = self.swarm.behaviour_mut().kad.store_mut().get(&key);
        let kept = kept.and_then(|kept| wire::decode_kept(&kept.value).ok()).map(|kept| kept.sequence);
        let sequence = self.queries.own.next_sequence(now, kept);
        let Some((value, ttl)) = self.queries.own.put(self.shared.now(), name, sequence) else { return };
        let record = SignedRecord {
            publisher: self.shared.local.clone(),
            network: self.shared.config.network.clone(),
            name: name.to_owned(),
            sequence,
            expires_s: (now + ttl).as_secs(),
            value,
        };
        let statement = wire::encode(&record, &self.identity);
        // The time beside it is for nodes that do not read the record.
        let record = Record { expires: Some(Instant::now() + ttl), ..Record::new(key, statement) };
        let query = self.query(What::Put { record, own: Some((name.to_owned(), sequence)), reply });
        self.make_when_known(query);
    }

    /// An own record was put, or not because of an error.
    pub(super) fn handle_own_put(&mut self, name: &str, sequence: u64, error: Option<&DhtError>) {
        match error {
            None => self.queries.own.handle_stored(self.shared.now(), name, sequence),
            Some(error) if self.queries.own.is_last(name, sequence) => {
                tracing::warn!(name, %error, "own DHT record: put again soon");
            }
            Some(_) => {}
        }
    }

    /// Asks for the newest record of a peer.
    pub(in crate::service::driver) fn published_record(
        &mut self,
        publisher: &PeerId,
        name: &str,
        reply: Reply<Option<SignedRecord>, DhtError>,
    ) {
        if let Some(error) = self.too_many_queries() {
            let _ = reply.send(Err(error));
            return;
        }
        let key = RecordKey::from(dht::key(&self.shared.config.network, publisher, name));
        let query = self.query(What::Published { key, best: None, reply });
        self.make_when_known(query);
    }

    fn own_key(&self, name: &str) -> RecordKey {
        dht::key(&self.shared.config.network, &self.shared.local, name).into()
    }
}

/// Keeps the better one of an answer and the best so far.
pub(super) fn weigh(key: &RecordKey, found: &PeerRecord, best: &mut Option<SignedRecord>) {
    match dht::accept(unix_now(), key.as_ref(), &found.record.value, None) {
        Ok(record) if best.as_ref().is_none_or(|best| record.is_newer_than(best)) => *best = Some(record),
        Ok(_) => {}
        Err(refusal) => {
            // Without a peer it was kept here, and may have expired since.
            let peer = found.peer.map(|peer| peer.to_string());
            tracing::debug!(peer, %refusal, "DHT record not used");
        }
    }
}
