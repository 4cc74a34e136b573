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
}

#[derive(Debug)]
struct Entry {
    value: Bytes,
    ttl: Duration,
    put_at: Duration,
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
        self.entries.insert(name.to_owned(), Entry { value, ttl, put_at: now });
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

    /// The value of a record that is put now, and how long it is to count. It is due again soon, unless somebody stores it.
    pub fn put(&mut self, now: Duration, name: &str) -> Option<(Bytes, Duration)> {
        let entry = self.entries.get_mut(name)?;
        entry.put_at = now + SOON.min(entry.ttl / PUTS);
        Some((entry.value.clone(), entry.ttl))
    }

    /// Somebody stored it.
    pub fn handle_stored(&mut self, now: Duration, name: &str) {
        if let Some(entry) = self.entries.get_mut(name) {
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
        assert_eq!(own.put(S, "0"), Some((value(2), HOUR)));
        assert!(own.withdraw("0") && !own.withdraw("0"));
        assert_eq!(own.put(S, "0"), None);
        assert_eq!(own.publish(S, "more", value(1), HOUR), Ok(()));
    }

    #[test]
    fn a_record_is_put_again_in_time_and_sooner_where_nobody_stored_it() {
        let mut own = Own::default();
        own.publish(S, "a", value(1), HOUR).unwrap();
        assert_eq!(own.due(S).as_deref(), Some("a"));
        own.put(S, "a");
        // Nothing is heard of it.
        assert_eq!(own.due(60 * S), None);
        assert_eq!(own.due(61 * S).as_deref(), Some("a"));
        own.put(61 * S, "a");
        own.handle_stored(62 * S, "a");
        assert_eq!(own.due(1261 * S), None);
        assert_eq!(own.due(1262 * S).as_deref(), Some("a"), "after a third of its time");
        own.put(1262 * S, "a");
        own.handle_alone(1263 * S, "a");
        assert_eq!(own.due(1263 * S).as_deref(), Some("a"));
    }

    #[test]
    fn the_shortest_record_is_put_thrice_while_it_counts() {
        let mut own = Own::default();
        own.publish(S, "a", value(1), TTL_MIN).unwrap();
        let puts = (0..TTL_MIN.as_secs()).filter(|s| {
            let now = S + Duration::from_secs(*s);
            let due = own.due(now).is_some();
            if due {
                own.put(now, "a");
            }
            due
        });
        assert_eq!(puts.count(), 3);
    }
}
