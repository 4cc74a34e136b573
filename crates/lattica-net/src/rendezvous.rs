//! A rendezvous point's book: who registered under which name, for those who ask for that name. Pure: time is an argument,
//! records are bytes that the shell has checked.
//!
//! A cookie says how far somebody has read. It is the number of the last registration that was told and the name behind it, so
//! nothing is kept for those who ask. Numbers only grow, over restarts too (see [`Book::new`]).

pub mod wire;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::Duration;

use bytes::Bytes;
use swarm_wire::PeerId;

use crate::news::STATEMENT_MAX_BYTES;

/// Longest name, in bytes (as the specification recommends).
pub const NAMESPACE_MAX_BYTES: usize = 255;
/// Registrations of a book, and of one peer.
pub const REGISTRATIONS_MAX: usize = 2048;
/// See [`REGISTRATIONS_MAX`].
pub const REGISTRATIONS_OF_A_PEER: usize = 8;
/// How long a registration counts that does not say for how long, in seconds.
pub const TTL_DEFAULT_S: u64 = 2 * 3600;
/// The longest that one may count, in seconds.
pub const TTL_MAX_S: u64 = 72 * 3600;
/// Registrations in one answer, and bytes of their records; the rest comes with the next question.
pub const ANSWER_MAX: usize = 64;
/// See [`ANSWER_MAX`].
pub const ANSWER_MAX_BYTES: usize = 64 * 1024;

/// Why a rendezvous point refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Names have 1 to 255 bytes, and a question has to have one.
    #[error("the namespace is missing or too long")]
    InvalidNamespace,
    /// The record is malformed or too long.
    #[error("the signed peer record is not valid")]
    InvalidRecord,
    /// It is to count for longer than is allowed here, or not at all.
    #[error("the time to live is out of range")]
    InvalidTtl,
    /// The cookie was not made here for this name.
    #[error("the cookie is not valid")]
    InvalidCookie,
    /// The record is somebody else's.
    #[error("it is not the sender's own record")]
    NotAuthorized,
    /// Something else went wrong there.
    #[error("internal error")]
    Internal,
    /// The book is full.
    #[error("there is no place for it now")]
    Unavailable,
}

/// What somebody registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// The name.
    pub namespace: String,
    /// Where the peer can be reached, signed by it.
    pub record: Bytes,
    /// How long it still counts, in seconds.
    pub ttl_s: u64,
}

/// An answer to who asks for a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Those who registered, the longest ago first.
    pub registrations: Vec<Registration>,
    /// With it the next question gets those who came later.
    pub cookie: Bytes,
}

#[derive(Debug)]
struct Entry {
    peer: PeerId,
    namespace: String,
    record: Bytes,
    expires_at: Duration,
}

/// See the module.
#[derive(Debug)]
pub struct Book {
    /// By number.
    entries: BTreeMap<u64, Entry>,
    next: u64,
}

impl Book {
    /// An empty book whose numbers begin behind `after`: the time of day in milliseconds, so that cookies of an earlier start
    /// leave nobody out.
    pub fn new(after: u64) -> Self {
        Self { entries: BTreeMap::new(), next: after + 1 }
    }

    /// Writes `peer` down under `namespace`, in place of what it registered there before. Returns for how many seconds.
    ///
    /// # Errors
    /// When something is out of range, or the book or the peer's share of it is full.
    pub fn register(
        &mut self,
        now: Duration,
        peer: &PeerId,
        namespace: &str,
        record: Bytes,
        ttl_s: Option<u64>,
    ) -> Result<u64, Refusal> {
        check_name(namespace)?;
        if record.len() > STATEMENT_MAX_BYTES {
            return Err(Refusal::InvalidRecord);
        }
        let ttl_s = ttl_s.unwrap_or(TTL_DEFAULT_S);
        if !(1..=TTL_MAX_S).contains(&ttl_s) {
            return Err(Refusal::InvalidTtl);
        }
        self.entries.retain(|_, entry| entry.expires_at > now);
        self.unregister(peer, namespace);
        let of_peer = self.entries.values().filter(|entry| entry.peer == *peer).count();
        if self.entries.len() >= REGISTRATIONS_MAX || of_peer >= REGISTRATIONS_OF_A_PEER {
            return Err(Refusal::Unavailable);
        }
        let expires_at = now + Duration::from_secs(ttl_s);
        let entry = Entry { peer: peer.clone(), namespace: namespace.to_owned(), record, expires_at };
        self.entries.insert(self.next, entry);
        self.next += 1;
        Ok(ttl_s)
    }

    /// Strikes `peer` out under `namespace`.
    pub fn unregister(&mut self, peer: &PeerId, namespace: &str) {
        self.entries.retain(|_, entry| entry.peer != *peer || entry.namespace != namespace);
    }

    /// Who is registered under `namespace`, at most `limit` and [`ANSWER_MAX`]: with a cookie, those who came since it was made.
    ///
    /// # Errors
    /// When the name is missing (nobody is told who is in all networks), or the cookie belongs to another one.
    pub fn discover(
        &self,
        now: Duration,
        namespace: Option<&str>,
        limit: Option<u64>,
        cookie: Option<&[u8]>,
    ) -> Result<Found, Refusal> {
        let namespace = namespace.ok_or(Refusal::InvalidNamespace)?;
        check_name(namespace)?;
        let mut last = match cookie {
            None => 0,
            Some(cookie) => {
                let (number, of) = cookie.split_first_chunk().ok_or(Refusal::InvalidCookie)?;
                (of == namespace.as_bytes())
                    .then(|| u64::from_be_bytes(*number))
                    .ok_or(Refusal::InvalidCookie)?
            }
        };
        let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(ANSWER_MAX).min(ANSWER_MAX);
        let (mut registrations, mut n_bytes) = (Vec::new(), 0);
        for (number, entry) in self.entries.range((Bound::Excluded(last), Bound::Unbounded)) {
            if entry.namespace != namespace || entry.expires_at <= now {
                continue;
            }
            n_bytes += entry.record.len();
            if registrations.len() >= limit || n_bytes > ANSWER_MAX_BYTES {
                break;
            }
            last = *number;
            let ttl_s = (entry.expires_at - now).as_secs().max(1);
            registrations.push(Registration {
                namespace: namespace.to_owned(),
                record: entry.record.clone(),
                ttl_s,
            });
        }
        let cookie = [&last.to_be_bytes(), namespace.as_bytes()].concat().into();
        Ok(Found { registrations, cookie })
    }
}

fn check_name(namespace: &str) -> Result<(), Refusal> {
    let fits = (1..=NAMESPACE_MAX_BYTES).contains(&namespace.len());
    fits.then_some(()).ok_or(Refusal::InvalidNamespace)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn peer(n: u16) -> PeerId {
        let mut key = [9; 32];
        key[..2].copy_from_slice(&n.to_le_bytes());
        PeerId::from_ed25519(&key)
    }

    fn record(n: usize) -> Bytes {
        vec![7; n].into()
    }

    #[test]
    fn what_is_out_of_range_is_refused() {
        let mut book = Book::new(0);
        let mut register =
            |name: &str, n_bytes, ttl_s| book.register(S, &peer(1), name, record(n_bytes), ttl_s);
        assert_eq!(register("", 1, None), Err(Refusal::InvalidNamespace));
        assert_eq!(register(&"x".repeat(256), 1, None), Err(Refusal::InvalidNamespace));
        assert_eq!(register("a", STATEMENT_MAX_BYTES + 1, None), Err(Refusal::InvalidRecord));
        assert_eq!(register("a", 1, Some(0)), Err(Refusal::InvalidTtl));
        assert_eq!(register("a", 1, Some(u64::MAX)), Err(Refusal::InvalidTtl));
        assert_eq!(register(&"x".repeat(255), STATEMENT_MAX_BYTES, Some(TTL_MAX_S)), Ok(TTL_MAX_S));
        assert_eq!(book.discover(S, None, None, None), Err(Refusal::InvalidNamespace));
        for cookie in [&b""[..], &[0; 7], &[0; 8], b"\0\0\0\0\0\0\0\0b"] {
            assert_eq!(book.discover(S, Some("a"), None, Some(cookie)), Err(Refusal::InvalidCookie));
        }
    }

    #[test]
    fn one_peer_has_its_share_and_all_have_what_there_is() {
        let mut book = Book::new(0);
        for n in 0..REGISTRATIONS_OF_A_PEER {
            assert!(book.register(S, &peer(1), &n.to_string(), record(1), Some(10)).is_ok());
        }
        assert_eq!(book.register(S, &peer(1), "more", record(1), None), Err(Refusal::Unavailable));
        assert!(book.register(S, &peer(1), "0", record(2), Some(10)).is_ok(), "renewed");
        for n in 2..2 + (REGISTRATIONS_MAX - REGISTRATIONS_OF_A_PEER) as u16 {
            assert!(book.register(S, &peer(n), "a", record(1), None).is_ok());
        }
        assert_eq!(book.register(S, &peer(0), "a", record(1), None), Err(Refusal::Unavailable));
        // The first peer's have expired by then.
        assert!(book.register(11 * S, &peer(0), "a", record(1), None).is_ok());
    }

    #[test]
    fn cookies_of_an_earlier_start_leave_nobody_out() {
        let mut book = Book::new(1_000);
        book.register(S, &peer(1), "a", record(1), None).unwrap();
        let cookie = book.discover(S, Some("a"), None, None).unwrap().cookie;
        let mut book = Book::new(2_000);
        book.register(S, &peer(2), "a", record(2), None).unwrap();
        assert_eq!(book.discover(S, Some("a"), None, Some(&cookie)).unwrap().registrations.len(), 1);
    }

    proptest! {
        // A list of all registrations, searched each time, gives the same.
        #[test]
        fn answers_are_those_of_a_plain_list(
            steps in proptest::collection::vec((0u16..6, 0usize..2, 0u64..20, 0u8..8, 1u64..5), 1..80)
        ) {
            let (names, mut book, mut now) = (["a", "b"], Book::new(5), Duration::ZERO);
            let mut list: Vec<(PeerId, &str, Bytes, Duration)> = Vec::new();
            for (n, (who, name, ttl_s, action, limit)) in steps.into_iter().enumerate() {
                let (who, name) = (peer(who), names[name]);
                now += Duration::from_secs(limit);
                match action {
                    0 => {
                        book.unregister(&who, name);
                        list.retain(|(peer, of, ..)| (peer, *of) != (&who, name));
                    }
                    1..6 => {
                        let registered = book.register(now, &who, name, record(n), Some(ttl_s));
                        prop_assert_eq!(registered.is_ok(), ttl_s > 0);
                        if ttl_s > 0 {
                            list.retain(|(peer, of, ..)| (peer, *of) != (&who, name));
                            list.push((who, name, record(n), now + Duration::from_secs(ttl_s)));
                        }
                    }
                    _ => {
                        let mut found = Vec::new();
                        let mut cookie: Option<Bytes> = None;
                        loop {
                            let part = book.discover(now, Some(name), Some(limit), cookie.as_deref()).unwrap();
                            if part.registrations.is_empty() {
                                break;
                            }
                            prop_assert!(part.registrations.len() as u64 <= limit);
                            found.extend(part.registrations.into_iter().map(|r| (r.record, r.ttl_s)));
                            cookie = Some(part.cookie);
                        }
                        let expected: Vec<(Bytes, u64)> = list
                            .iter()
                            .filter(|(_, of, _, until)| *of == name && *until > now)
                            .map(|(_, _, record, until)| (record.clone(), (*until - now).as_secs()))
                            .collect();
                        prop_assert_eq!(found, expected);
                    }
                }
            }
        }
    }
}
