//! Signed DHT records: what a peer says under a name, for a time. Nobody else can say it, the newest counts, and it ends when
//! it says so, whoever keeps it. Pure: the time of day is an argument, counted from the Unix epoch.
//!
//! Such a record stands under a key that is made of its network, publisher and name, so that everybody who is given one can
//! tell whether it belongs there. Records under any other key are nobody's, and are not looked at.

pub mod own;
pub mod wire;

use std::time::Duration;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};
use swarm_wire::{DecodeError, PeerId};

/// How keys of signed records begin.
pub const SIGNED_PREFIX: &[u8] = b"/lattica/signed/";
/// Longest name of a record, in bytes.
pub const NAME_MAX_BYTES: usize = 255;
/// Longest name of a network, in bytes.
pub const NETWORK_MAX_BYTES: usize = 64;
/// Longest value.
pub const VALUE_MAX_BYTES: usize = 32 * 1024;
/// Longest record with its signature, as it is stored and sent.
pub const STATEMENT_MAX_BYTES: usize = VALUE_MAX_BYTES + 1024;
/// The shortest time that a record counts: it is put again every third of it.
pub const TTL_MIN: Duration = Duration::from_secs(60);
/// The longest. So long, too, can an older record be shown to who has not seen a newer one.
pub const TTL_MAX: Duration = Duration::from_secs(24 * 3600);
/// How far behind its publisher's the clock may be of who keeps or reads a record that counts for the longest time. To a clock
/// that is ahead, records end sooner.
pub const SKEW_MAX: Duration = Duration::from_secs(10 * 60);

/// Why a record is not published, kept or used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It is no record, or its signature is no good.
    #[error(transparent)]
    Malformed(#[from] DecodeError),
    /// The name is missing or too long.
    #[error("a name has 1 to {NAME_MAX_BYTES} bytes, not {got_bytes}")]
    Name {
        /// Its length.
        got_bytes: usize,
    },
    /// The value is too long.
    #[error("a value of {got_bytes} bytes is over the limit of {VALUE_MAX_BYTES}")]
    Value {
        /// Its length.
        got_bytes: usize,
    },
    /// It is to count for too long, or not long enough.
    #[error("a record counts for {TTL_MIN:?} to {TTL_MAX:?}, not for {ttl:?}")]
    Ttl {
        /// How long it was to count.
        ttl: Duration,
    },
    /// This node publishes too much.
    #[error("{n_names} names are published already; take one back first")]
    Full {
        /// Names that are published.
        n_names: usize,
    },
    /// It is of another network, publisher or name.
    #[error("it belongs under another key")]
    WrongKey,
    /// Its time is over.
    #[error("it expired {ago:?} ago")]
    Expired {
        /// Since when.
        ago: Duration,
    },
    /// It would count for longer than any record may.
    #[error("it expires in {ahead:?}, longer than records count: its publisher's clock, or ours, is off")]
    TooFar {
        /// In what time.
        ahead: Duration,
    },
    /// A newer one is known.
    #[error("its sequence is {sequence}, a newer one of {known} is known")]
    Older {
        /// Its sequence.
        sequence: u64,
        /// The newer one's.
        known: u64,
    },
}

/// What a peer said under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedRecord {
    /// The peer, whose key signed it.
    pub publisher: PeerId,
    /// The network that it belongs to.
    pub network: String,
    /// The name.
    pub name: String,
    /// Which of the publisher's records under this name it is: the highest is the newest. Milliseconds since the Unix epoch,
    /// unless the publisher's clock was set back.
    pub sequence: u64,
    /// From when on it counts no more: Unix time in seconds.
    pub expires_s: u64,
    /// What was said.
    pub value: Bytes,
}

impl SignedRecord {
    /// Where it stands in the DHT.
    pub fn key(&self) -> Vec<u8> {
        key(&self.network, &self.publisher, &self.name)
    }

    /// From when on it counts no more, since the Unix epoch.
    pub fn expires(&self) -> Duration {
        Duration::from_secs(self.expires_s)
    }

    /// Whether it takes the place of `other`, which stands under the same key. A publisher that gave one sequence twice (two
    /// nodes with one key) is not told which of its records wins, but all nodes choose the same.
    pub fn is_newer_than(&self, other: &Self) -> bool {
        let rank = |record: &Self| (record.sequence, record.expires_s);
        (rank(self), &self.value) > (rank(other), &other.value)
    }

    /// Whether it counts at `now`.
    ///
    /// # Errors
    /// When it has expired, or expires later than any record may.
    pub fn check_time(&self, now: Duration) -> Result<(), Refusal> {
        let ahead = self.expires().saturating_sub(now);
        if ahead.is_zero() {
            return Err(Refusal::Expired { ago: now.saturating_sub(self.expires()) });
        }
        if ahead > TTL_MAX + SKEW_MAX {
            return Err(Refusal::TooFar { ahead });
        }
        Ok(())
    }
}

/// Where `publisher`'s record under `name` stands: the prefix, then SHA-256 over network, peer id and name, each with its
/// length as 8 little-endian bytes in front.
pub fn key(network: &str, publisher: &PeerId, name: &str) -> Vec<u8> {
    let mut hash = Sha256::new();
    for part in [network.as_bytes(), publisher.as_bytes(), name.as_bytes()] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let digest: [u8; 32] = hash.finalize().into();
    [SIGNED_PREFIX, &digest].concat()
}

/// Whether only signed records may stand under `key`.
pub fn is_signed(key: &[u8]) -> bool {
    key.starts_with(SIGNED_PREFIX)
}

/// Whether what somebody put or answered under `key` counts, where `kept` was accepted before.
///
/// # Errors
/// When it is malformed, forged, of another key, not of this time, or older than what is kept.
pub fn accept(
    now: Duration,
    key: &[u8],
    statement: &[u8],
    kept: Option<&[u8]>,
) -> Result<SignedRecord, Refusal> {
    wire::decode(statement, |record| {
        if record.key() != key {
            return Err(Refusal::WrongKey);
        }
        record.check_time(now)?;
        let kept = kept.and_then(|kept| wire::decode_kept(kept).ok());
        match kept.filter(|kept| kept.expires() > now) {
            Some(kept) if kept.is_newer_than(record) => {
                Err(Refusal::Older { sequence: record.sequence, known: kept.sequence })
            }
            _ => Ok(()),
        }
    })
}

fn check_name(name: &str) -> Result<(), Refusal> {
    let got_bytes = name.len();
    (1..=NAME_MAX_BYTES).contains(&got_bytes).then_some(()).ok_or(Refusal::Name { got_bytes })
}

fn check_value(value: &Bytes) -> Result<(), Refusal> {
    let got_bytes = value.len();
    (got_bytes <= VALUE_MAX_BYTES).then_some(()).ok_or(Refusal::Value { got_bytes })
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;
    use prost::Message as _;
    use swarm_wire::generated::swarm::v1::Signed;
    use swarm_wire::signed::{Signer as _, signed_bytes};

    use super::*;

    const NOW_S: u64 = 1_700_000_000;
    const NOW: Duration = Duration::from_secs(NOW_S);
    const HOUR_S: u64 = 3600;

    fn signer(seed: u8) -> SigningKey {
        SigningKey::from_bytes(&[seed; 32])
    }

    fn record(seed: u8, sequence: u64, expires_s: u64) -> SignedRecord {
        SignedRecord {
            publisher: PeerId::from_ed25519(&signer(seed).public_key()),
            network: "test".to_owned(),
            name: "name".to_owned(),
            sequence,
            expires_s,
            value: Bytes::from_static(b"value"),
        }
    }

    fn statement(seed: u8, record: &SignedRecord) -> Vec<u8> {
        wire::encode(record, &signer(seed))
    }

    /// The first peer's record as a forger signs it in that peer's name.
    fn forged(record: &SignedRecord) -> Vec<u8> {
        let mut signed = Signed::decode(&statement(1, record)[..]).unwrap();
        let bytes = signed_bytes(wire::RECORD_DOMAIN, &signed.payload);
        signed.signature = signer(2).signature(&bytes).to_vec().into();
        signed.encode_to_vec()
    }

    #[test]
    fn a_good_record_is_accepted_under_its_own_key_alone() {
        let good = record(1, 7, NOW_S + HOUR_S);
        let bytes = statement(1, &good);
        assert_eq!(accept(NOW, &good.key(), &bytes, None), Ok(good.clone()));
        assert!(is_signed(&good.key()) && !is_signed(b"/lattica/other"));
        let elsewhere = [
            SignedRecord { name: "another".to_owned(), ..good.clone() },
            SignedRecord { network: "another".to_owned(), ..good.clone() },
            record(2, 7, NOW_S + HOUR_S),
        ];
        for other in elsewhere {
            assert_eq!(accept(NOW, &other.key(), &bytes, None), Err(Refusal::WrongKey), "{other:?}");
        }
        assert_eq!(accept(NOW, b"/lattica/signed/", &bytes, None), Err(Refusal::WrongKey));
    }

    #[test]
    fn parts_of_a_key_cannot_be_shifted_into_each_other() {
        let publisher = record(1, 0, 0).publisher;
        assert_ne!(key("ab", &publisher, "c"), key("a", &publisher, "bc"));
        assert_eq!(key("a", &publisher, "b").len(), SIGNED_PREFIX.len() + 32);
    }

    #[test]
    fn what_another_key_signed_or_somebody_changed_is_refused() {
        let good = record(1, 7, NOW_S + HOUR_S);
        let own = statement(2, &record(2, 8, NOW_S + HOUR_S));
        assert_eq!(accept(NOW, &good.key(), &own, None), Err(Refusal::WrongKey));
        let forged = forged(&record(1, 8, NOW_S + HOUR_S));
        let bad = |refused: Result<SignedRecord, Refusal>| {
            matches!(refused, Err(Refusal::Malformed(DecodeError::BadSignature { .. })))
        };
        assert!(bad(accept(NOW, &good.key(), &forged, None)));
        let mut changed = statement(1, &good);
        *changed.last_mut().unwrap() ^= 1;
        assert!(bad(accept(NOW, &good.key(), &changed, None)));
        let refused = accept(NOW, &good.key(), b"no record", None);
        assert!(matches!(refused, Err(Refusal::Malformed(_))), "{refused:?}");
    }

    #[test]
    fn records_count_between_now_and_the_longest_time_and_a_little_more() {
        let at = |expires_s: u64| {
            let record = record(1, 7, expires_s);
            accept(NOW, &record.key(), &statement(1, &record), None).map(|_| ())
        };
        let last_s = NOW_S + (TTL_MAX + SKEW_MAX).as_secs();
        assert_eq!(at(NOW_S + 1), Ok(()));
        assert_eq!(at(last_s), Ok(()));
        assert_eq!(at(NOW_S), Err(Refusal::Expired { ago: Duration::ZERO }));
        assert_eq!(at(NOW_S - 60), Err(Refusal::Expired { ago: Duration::from_secs(60) }));
        let ahead = TTL_MAX + SKEW_MAX + Duration::from_secs(1);
        assert_eq!(at(last_s + 1), Err(Refusal::TooFar { ahead }));
        assert!(matches!(at(u64::MAX), Err(Refusal::TooFar { .. })));
        assert!(matches!(at(0), Err(Refusal::Expired { .. })));
    }

    #[test]
    fn an_older_one_is_refused_until_the_newer_one_has_expired() {
        let (old, new) = (record(1, 7, NOW_S + 2 * HOUR_S), record(1, 8, NOW_S + HOUR_S));
        let (old_bytes, new_bytes) = (statement(1, &old), statement(1, &new));
        let offer = |now, bytes: &[u8], kept: &[u8]| accept(now, &old.key(), bytes, Some(kept));
        assert_eq!(offer(NOW, &new_bytes, &old_bytes), Ok(new.clone()));
        assert_eq!(offer(NOW, &old_bytes, &new_bytes), Err(Refusal::Older { sequence: 7, known: 8 }));
        assert_eq!(offer(NOW, &new_bytes, &new_bytes), Ok(new), "put again");
        assert_eq!(offer(NOW + Duration::from_secs(HOUR_S), &old_bytes, &new_bytes), Ok(old.clone()));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        // Of everything that is offered, whatever the order, the newest that is valid stays: the maximum of a plain list.
        #[test]
        fn the_newest_valid_one_wins_whatever_the_order(
            offers in proptest::collection::vec((0u8..4, 0u64..4, -2i64..30, 0u8..3), 1..10)
        ) {
            let mut list: Vec<SignedRecord> = Vec::new();
            let mut statements = Vec::new();
            for (kind, sequence, hours, value) in offers {
                let expires_s = NOW_S.saturating_add_signed(hours * HOUR_S as i64);
                let value = Bytes::from(vec![value]);
                let good = SignedRecord { value, ..record(1, sequence, expires_s) };
                statements.push(match kind {
                    0 => forged(&good),
                    1 => statement(2, &SignedRecord { publisher: record(2, 0, 0).publisher, ..good }),
                    _ => {
                        let bytes = statement(1, &good);
                        if (1..=24).contains(&hours) {
                            list.push(good);
                        }
                        bytes
                    }
                });
            }
            let newest: Option<Result<SignedRecord, Refusal>> =
                list.into_iter().max_by_key(|r| (r.sequence, r.expires_s, r.value.clone())).map(Ok);
            let key = record(1, 0, 0).key();
            for _ in 0..2 {
                let mut kept: Option<Vec<u8>> = None;
                for bytes in &statements {
                    if accept(NOW, &key, bytes, kept.as_deref()).is_ok() {
                        kept = Some(bytes.clone());
                    }
                }
                let kept = kept.map(|kept| accept(NOW, &key, &kept, None));
                prop_assert_eq!(&kept, &newest);
                statements.reverse();
            }
        }
    }
}
