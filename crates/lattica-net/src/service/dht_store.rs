//! What this node keeps for the DHT. Under keys of signed records only such records are kept, and only the newest; the peer that
//! puts another one gets no answer, so that it does not take it for stored.

use std::borrow::Cow;
use std::time::Instant;

use libp2p::PeerId as LibPeerId;
use libp2p::kad::store::{self, MemoryStore, RecordStore};
use libp2p::kad::{ProviderRecord, Record, RecordKey};

use super::news::unix_now;
use crate::dht;

/// See the module.
pub(crate) struct CheckedStore {
    memory: MemoryStore,
}

impl CheckedStore {
    pub(crate) fn new(memory: MemoryStore) -> Self {
        Self { memory }
    }
}

impl RecordStore for CheckedStore {
    type RecordsIter<'a> = <MemoryStore as RecordStore>::RecordsIter<'a>;
    type ProvidedIter<'a> = <MemoryStore as RecordStore>::ProvidedIter<'a>;

    fn get(&self, key: &RecordKey) -> Option<Cow<'_, Record>> {
        self.memory.get(key)
    }

    fn put(&mut self, mut record: Record) -> store::Result<()> {
        if dht::is_signed(record.key.as_ref()) {
            let now = unix_now();
            let accepted = {
                let kept = self.memory.get(&record.key);
                let kept = kept.as_ref().map(|kept| kept.value.as_slice());
                dht::accept(now, record.key.as_ref(), &record.value, kept)
            };
            match accepted {
                // What it says itself counts, not the time that came with it, which nobody signed.
                Ok(signed) => {
                    record.expires = Some(Instant::now() + signed.expires().saturating_sub(now));
                }
                Err(refusal) => {
                    let publisher = record.publisher.map(|peer| peer.to_string());
                    tracing::debug!(key = ?record.key, publisher, %refusal, "DHT record not kept");
                    // libp2p has no better word; it is not sent.
                    return Err(store::Error::ValueTooLarge);
                }
            }
        }
        self.memory.put(record)
    }

    fn remove(&mut self, key: &RecordKey) {
        self.memory.remove(key);
    }

    fn records(&self) -> Self::RecordsIter<'_> {
        self.memory.records()
    }

    fn add_provider(&mut self, record: ProviderRecord) -> store::Result<()> {
        self.memory.add_provider(record)
    }

    fn providers(&self, key: &RecordKey) -> Vec<ProviderRecord> {
        self.memory.providers(key)
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        self.memory.provided()
    }

    fn remove_provider(&mut self, key: &RecordKey, provider: &LibPeerId) {
        self.memory.remove_provider(key, provider);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::super::identity::Identity;
    use super::*;
    use crate::dht::{SignedRecord, wire};

    const HOUR: Duration = Duration::from_secs(3600);

    fn store() -> CheckedStore {
        CheckedStore::new(MemoryStore::new(LibPeerId::random()))
    }

    fn said(identity: &Identity, sequence: u64, ttl: Duration) -> Record {
        let record = SignedRecord {
            publisher: identity.peer_id(),
            network: "test".to_owned(),
            name: "name".to_owned(),
            sequence,
            expires_s: (unix_now() + ttl).as_secs(),
            value: Bytes::from_static(b"value"),
        };
        Record::new(record.key(), wire::encode(&record, identity))
    }

    #[test]
    fn the_newest_of_the_publisher_is_kept_and_nothing_else() {
        let (identity, forger) = (Identity::from_seed([1; 32]), Identity::from_seed([2; 32]));
        let mut store = store();
        let (old, new) = (said(&identity, 1, HOUR), said(&identity, 2, HOUR));
        let forged = Record::new(old.key.clone(), said(&forger, 9, HOUR).value);
        let kept = |store: &CheckedStore| store.get(&new.key).map(|record| record.value.clone());
        assert!(store.put(forged.clone()).is_err() && kept(&store).is_none());
        store.put(old.clone()).unwrap();
        store.put(new.clone()).unwrap();
        for refused in [forged, old, said(&identity, 9, Duration::ZERO), said(&identity, 9, 30 * HOUR)] {
            assert!(store.put(refused).is_err());
            assert_eq!(kept(&store), Some(new.value.clone()));
        }
    }

    #[test]
    fn a_signed_record_stays_as_long_as_it_says_whatever_time_came_with_it() {
        let mut store = store();
        let record = said(&Identity::from_seed([1; 32]), 1, HOUR);
        for claimed in [Some(Instant::now() + Duration::from_secs(1)), Some(Instant::now() + 48 * HOUR), None]
        {
            store.put(Record { expires: claimed, ..record.clone() }).unwrap();
            let kept = store.get(&record.key).unwrap();
            let left = kept.expires.unwrap().saturating_duration_since(Instant::now());
            assert!(left > HOUR / 2 && left <= HOUR, "{left:?}");
        }
    }

    #[test]
    fn other_keys_are_nobody_s() {
        let mut store = store();
        let key = RecordKey::new(b"key");
        for value in [b"one", b"two"] {
            store.put(Record::new(key.clone(), value.to_vec())).unwrap();
            assert_eq!(store.get(&key).unwrap().value, value);
        }
    }
}
