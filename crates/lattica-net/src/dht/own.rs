//! What this node publishes, and when it is to be put again: records end by themselves, and those who keep them come and go.
//! Pure: time is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;

use super::{Refusal, TTL_MAX, TTL_MIN, check_name, check_value};

/// Names that one node publishes.
pub const NAMES_MAX: usize = 256;
/// A record is put again so many times while it counts, so that it survives two times at which nobody could be asked.
const PUTS: u32 = 3;
/// What nobody stored is put again after this long, or sooner where it counts for a short time.
const SOON: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug, Default)]
pub struct Own {
    entries: BTreeMap<String, Entry>,
    /// The highest sequence so far, under whatever name, also one that was withdrawn.
    last: Option<u64>,
}

#[derive(Debug)]
struct Entry {
    value: Bytes,
    ttl: Duration,
    put_at: Duration,
    /// Of the record that was put last.
    sequence: Option<u64>,
}

impl Own {
    /// From now on `value` is published under `name`, in place of what was before, in records that count for `ttl`. It is due
    /// at once.
    ///
    /// # Errors
    /// When something is out of range, or too many names are published.
    pub fn publish(&mut self, now: Duration, name: &str, value: Bytes, ttl: Duration) -> Result<(), Refusal> {
        check_name(name)?;
        check_value(&value)?;
        if !(TTL_MIN..=TTL_MAX).contains(&ttl) {
            return Err(Refusal::Ttl { ttl });
        }
        let n_names = self.entries.len();
        if n_names >= NAMES_MAX && !self.entries.contains_key(name) {
            return Err(Refusal::Full { n_names });
        }
        self.entries.insert(name.to_owned(), Entry { value, ttl, put_at: now, sequence: None });
        Ok(())
    }

    /// Publishes it no more; whether it was.
    pub fn withdraw(&mut self, name: &str) -> bool {
        self.entries.remove(name).is_some()
    }

    /// A name whose record is to be put.
    pub fn due(&self, now: Duration) -> Option<String> {
        self.entries.iter().find(|(_, entry)| entry.put_at <= now).map(|(name, _)| name.clone())
    }

    /// The sequence of the next record, where one of `kept` is known under its name: this time of day in milliseconds, or one
    /// more than the highest so far.
    pub fn next_sequence(&self, time_of_day: Duration, kept: Option<u64>) -> u64 {
        let time = u64::try_from(time_of_day.as_millis()).unwrap_or(u64::MAX);
        kept.max(self.last).map_or(time, |last| time.max(last.saturating_add(1)))
    }

    /// The value of a record that is put now with this sequence, and how long it is to count. It is due again soon, unless
    /// somebody stores it.
    pub fn put(&mut self, now: Duration, name: &str, sequence: u64) -> Option<(Bytes, Duration)> {
        let entry = self.entries.get_mut(name)?;
        entry.put_at = now + SOON.min(entry.ttl / PUTS);
        entry.sequence = Some(sequence);
        self.last = self.last.max(Some(sequence));
        Some((entry.value.clone(), entry.ttl))
    }

    /// Whether this record is the one that was put last: neither replaced since nor withdrawn.
    pub fn is_last(&self, name: &str, sequence: u64) -> bool {
        self.entries.get(name).is_some_and(|entry| entry.sequence == Some(sequence))
    }

    /// Somebody stored the record of this sequence.
    pub fn handle_stored(&mut self, now: Duration, name: &str, sequence: u64) {
        if let Some(entry) = self.entries.get_mut(name).filter(|entry| entry.sequence == Some(sequence)) {
            entry.put_at = now + entry.ttl / PUTS;
        }
    }

    /// Nobody was there who could store it: it is due as soon as there is somebody.
    pub fn handle_alone(&mut self, now: Duration, name: &str) {
        if let Some(entry) = self.entries.get_mut(name) {
            entry.put_at = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{NAME_MAX_BYTES, VALUE_MAX_BYTES};
    use super::*;

    const S: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);

    fn value(n_bytes: usize) -> Bytes {
        vec![7; n_bytes].into()
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let mut own = Own::default();
        let mut publish = |name: &str, n_bytes, ttl| own.publish(S, name, value(n_bytes), ttl);
        assert_eq!(publish("", 1, HOUR), Err(Refusal::Name { got_bytes: 0 }));
        assert_eq!(publish(&"x".repeat(256), 1, HOUR), Err(Refusal::Name { got_bytes: 256 }));
        let got_bytes = VALUE_MAX_BYTES + 1;
        assert_eq!(publish("a", got_bytes, HOUR), Err(Refusal::Value { got_bytes }));
        assert_eq!(publish("a", 1, 59 * S), Err(Refusal::Ttl { ttl: 59 * S }));
        assert_eq!(publish("a", 1, TTL_MAX + S), Err(Refusal::Ttl { ttl: TTL_MAX + S }));
        assert_eq!(publish(&"x".repeat(NAME_MAX_BYTES), VALUE_MAX_BYTES, TTL_MAX), Ok(()));
        assert_eq!(publish("a", 0, TTL_MIN), Ok(()));
    }

    #[test]
    fn names_are_counted_and_can_be_replaced_and_withdrawn() {
        let mut own = Own::default();
        for n in 0..NAMES_MAX {
            assert_eq!(own.publish(S, &n.to_string(), value(1), HOUR), Ok(()));
        }
        assert_eq!(own.publish(S, "more", value(1), HOUR), Err(Refusal::Full { n_names: NAMES_MAX }));
        assert_eq!(own.publish(S, "0", value(2), HOUR), Ok(()));
        assert_eq!(own.put(S, "0", 1), Some((value(2), HOUR)));
        assert!(own.withdraw("0") && !own.withdraw("0"));
        assert_eq!(own.put(S, "0", 2), None);
        assert_eq!(own.publish(S, "more", value(1), HOUR), Ok(()));
    }

    #[test]
    fn a_record_is_put_again_in_time_and_sooner_where_nobody_stored_it() {
        let mut own = Own::default();
        own.publish(S, "a", value(1), HOUR).unwrap();
        assert_eq!(own.due(S).as_deref(), Some("a"));
        own.put(S, "a", 1);
        // Nothing is heard of it.
        assert_eq!(own.due(60 * S), None);
        assert_eq!(own.due(61 * S).as_deref(), Some("a"));
        own.put(61 * S, "a", 2);
        own.handle_stored(62 * S, "a", 2);
        assert_eq!(own.due(1261 * S), None);
        assert_eq!(own.due(1262 * S).as_deref(), Some("a"), "after a third of its time");
        own.put(1262 * S, "a", 3);
        own.handle_alone(1263 * S, "a");
        assert_eq!(own.due(1263 * S).as_deref(), Some("a"));
    }

    #[test]
    fn what_becomes_of_an_older_record_says_nothing_of_the_one_in_its_place() {
        let mut own = Own::default();
        own.publish(S, "a", value(1), HOUR).unwrap();
        own.put(S, "a", 1);
        assert!(own.is_last("a", 1));
        own.publish(S, "a", value(2), HOUR).unwrap();
        assert!(!own.is_last("a", 1), "replaced");
        own.put(S, "a", 2);
        own.handle_stored(2 * S, "a", 1);
        assert_eq!(own.due(61 * S).as_deref(), Some("a"), "nobody stored the newer one");
        assert!(own.is_last("a", 2) && own.withdraw("a") && !own.is_last("a", 2));
    }

    #[test]
    fn sequences_grow_also_where_the_clock_is_set_back_or_after_a_record_was_withdrawn() {
        let mut own = Own::default();
        let at = Duration::from_millis(9);
        let kept = [None, Some(3), Some(9), Some(20), Some(u64::MAX)];
        assert_eq!(kept.map(|kept| own.next_sequence(at, kept)), [9, 9, 10, 21, u64::MAX]);
        own.publish(S, "a", value(1), HOUR).unwrap();
        own.put(S, "a", 9);
        own.withdraw("a");
        assert_eq!((own.next_sequence(at, None), own.next_sequence(at, Some(5))), (10, 10));
    }

    #[test]
    fn the_shortest_record_is_put_thrice_while_it_counts() {
        let mut own = Own::default();
        own.publish(S, "a", value(1), TTL_MIN).unwrap();
        let puts = (0..TTL_MIN.as_secs()).filter(|s| {
            let now = S + Duration::from_secs(*s);
            let due = own.due(now).is_some();
            if due {
                own.put(now, "a", *s);
            }
            due
        });
        assert_eq!(puts.count(), 3);
    }
}
