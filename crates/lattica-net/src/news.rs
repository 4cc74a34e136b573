//! What nodes tell each other about the network: for each kind of statement the newest one of each author, passed on as it
//! was signed. Nodes ask each other for what they lack, so nobody can push anything here. Pure: time is an argument.
//!
//! Which of two statements is newer is the author's business (its times grow); how old one is, is counted along the way, so
//! that nobody's clock matters.

#[cfg(feature = "records")]
pub mod record;
pub mod wire;

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use swarm_wire::PeerId;

/// Authors that are remembered, of each kind of statement.
pub const AUTHORS_MAX: usize = 1024;
/// The longest statement: a link vector of 64 neighbours, a peer record of 16 long addresses.
pub const STATEMENT_MAX_BYTES: usize = 8 * 1024;
/// Statements in one answer, in bytes; the rest comes with the next question.
pub const REPLY_MAX_BYTES: usize = 256 * 1024;

/// The newest statement of each author.
#[derive(Debug)]
pub struct Newest<T> {
    kept: HashMap<PeerId, Kept<T>>,
    authors_max: usize,
    expires_after: Duration,
}

#[derive(Debug)]
struct Kept<T> {
    /// The author's time.
    time: u64,
    heard_at: Duration,
    age_when_heard: Duration,
    statement: Bytes,
    value: T,
}

impl<T> Kept<T> {
    fn age(&self, now: Duration) -> Duration {
        self.age_when_heard + now.saturating_sub(self.heard_at)
    }
}

/// What a question names of one kind of statement: authors' tags and times.
pub type Known = Vec<(u64, u64)>;

/// A statement that is passed on, and its age.
pub type Item = (Bytes, Duration);

impl<T> Newest<T> {
    /// Of at most `authors_max` authors, none older than `expires_after`.
    pub fn new(authors_max: usize, expires_after: Duration) -> Self {
        Self { kept: HashMap::new(), authors_max, expires_after }
    }

    /// Whether a statement of `author`'s `time` would be news; its signature need not be checked otherwise.
    pub fn wants(&self, author: &PeerId, time: u64) -> bool {
        self.kept.get(author).is_none_or(|kept| kept.time < time)
    }

    /// Remembers a checked statement; `false` when it is not news, or too old. Room is made by forgetting the oldest.
    pub fn insert(
        &mut self,
        now: Duration,
        author: &PeerId,
        time: u64,
        (statement, age): Item,
        value: T,
    ) -> bool {
        if age > self.expires_after || !self.wants(author, time) {
            return false;
        }
        let new = Kept { time, heard_at: now, age_when_heard: age, statement, value };
        if !self.kept.contains_key(author) && self.kept.len() >= self.authors_max {
            let oldest = self.kept.iter().max_by_key(|(_, kept)| kept.age(now));
            match oldest.filter(|(_, kept)| kept.age(now) > age).map(|(author, _)| author.clone()) {
                Some(oldest) => self.kept.remove(&oldest),
                None => return false,
            };
        }
        self.kept.insert(author.clone(), new);
        true
    }

    /// Forgets what is too old.
    pub fn expire(&mut self, now: Duration) {
        let expires_after = self.expires_after;
        self.kept.retain(|_, kept| kept.age(now) <= expires_after);
    }

    /// What `author` said last, and how long ago.
    pub fn get(&self, now: Duration, author: &PeerId) -> Option<(&T, Duration)> {
        self.kept.get(author).map(|kept| (&kept.value, kept.age(now)))
    }

    /// Everybody who said something.
    pub fn iter(&self) -> impl Iterator<Item = (&PeerId, &T)> {
        self.kept.iter().map(|(author, kept)| (author, &kept.value))
    }

    /// What a question says of `author`.
    pub fn known_of(&self, author: &PeerId) -> Option<(u64, u64)> {
        self.kept.get(author).map(|kept| (tag(author), kept.time))
    }

    /// Authors that are remembered.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether nobody said anything.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// What a question says of this kind.
    pub fn known(&self) -> Known {
        self.kept.iter().map(|(author, kept)| (tag(author), kept.time)).collect()
    }

    /// What who knows `known` lacks, the latest first, at most `budget_bytes` of it.
    pub fn missing(&self, now: Duration, known: &Known, budget_bytes: usize) -> Vec<Item> {
        let known: HashMap<u64, u64> = known.iter().copied().collect();
        let lacks = |(author, kept): &(&PeerId, &Kept<T>)| {
            known.get(&tag(author)).is_none_or(|time| *time < kept.time)
        };
        let mut news: Vec<&Kept<T>> = self.kept.iter().filter(lacks).map(|(_, kept)| kept).collect();
        news.sort_by_key(|kept| kept.age(now));
        let mut left = budget_bytes;
        news.into_iter()
            .take_while(|kept| {
                let fits = kept.statement.len() <= left;
                left = left.saturating_sub(kept.statement.len());
                fits
            })
            .map(|kept| (kept.statement.clone(), kept.age(now)))
            .collect()
    }
}

/// Eight bytes of the author's key name it in a question.
fn tag(author: &PeerId) -> u64 {
    let bytes = author.as_bytes().last_chunk::<8>();
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn peer(n: u8) -> PeerId {
        PeerId::from_ed25519(&[n; 32])
    }

    fn item(text: &str, age: Duration) -> Item {
        (Bytes::copy_from_slice(text.as_bytes()), age)
    }

    #[test]
    fn the_newest_counts_whenever_it_comes_and_ages_along_the_way() {
        let mut newest = Newest::new(4, 60 * S);
        assert!(newest.insert(S, &peer(1), 7, item("seven", 10 * S), 7));
        assert!(!newest.insert(2 * S, &peer(1), 6, item("six", S), 6), "an older one comes later");
        assert_eq!(newest.get(5 * S, &peer(1)), Some((&7, 14 * S)));
        assert!(!newest.insert(S, &peer(2), 1, item("old", 61 * S), 0));
        newest.expire(51 * S);
        assert_eq!(newest.len(), 1);
        newest.expire(52 * S);
        assert!(newest.is_empty());
    }

    #[test]
    fn when_it_is_full_the_oldest_gives_way_but_not_to_older_ones() {
        let mut newest = Newest::new(2, 60 * S);
        newest.insert(S, &peer(1), 1, item("a", 30 * S), 1);
        newest.insert(S, &peer(2), 1, item("b", 10 * S), 2);
        assert!(!newest.insert(S, &peer(3), 1, item("c", 40 * S), 3));
        assert!(newest.insert(S, &peer(4), 1, item("d", 5 * S), 4));
        assert!(newest.get(S, &peer(1)).is_none() && newest.get(S, &peer(2)).is_some());
    }

    #[test]
    fn answers_keep_to_their_budget_and_begin_with_the_latest() {
        let mut newest = Newest::new(9, 60 * S);
        for n in 1..=4 {
            newest.insert(S, &peer(n), 1, item("12345678", u32::from(n) * S), n);
        }
        let answer = newest.missing(S, &vec![(tag(&peer(1)), 1)], 16);
        assert_eq!(answer, [item("12345678", 2 * S), item("12345678", 3 * S)]);
    }

    proptest! {
        // Nodes that ask each other at random end with the newest statement of every author, as a plain maximum gives it.
        #[test]
        fn asking_around_spreads_the_newest_of_everybody(
            said in proptest::collection::vec((0u8..6, 0u8..6, 1u64..50), 1..40), asks in proptest::collection::vec((0usize..6, 0usize..6), 0..40)
        ) {
            let mut nodes: Vec<Newest<u64>> = (0..6).map(|_| Newest::new(16, 1000 * S)).collect();
            let mut naive: HashMap<u8, u64> = HashMap::new();
            for &(at, author, time) in &said {
                let text = format!("{author} {time}");
                nodes[usize::from(at)].insert(S, &peer(author), time, item(&text, Duration::ZERO), time);
                let best = naive.entry(author).or_default();
                *best = time.max(*best);
            }
            // The given order, then often enough around the ring that everything has gone round.
            let ring = (0..12).flat_map(|_| (0..6).map(|i| (i, (i + 1) % 6)));
            for (asker, asked) in asks.into_iter().chain(ring) {
                for (statement, age) in nodes[asked].missing(S, &nodes[asker].known(), usize::MAX) {
                    let text = String::from_utf8(statement.to_vec()).expect("made above");
                    let (author, time) = text.split_once(' ').expect("made above");
                    let (author, time) = (author.parse().expect("a number"), time.parse().expect("a number"));
                    prop_assert!(asker == asked || nodes[asker].insert(S, &peer(author), time, (statement, age), time));
                }
            }
            for node in &nodes {
                let got: HashMap<u8, u64> = naive.keys().filter_map(|&a| Some((a, *node.get(S, &peer(a))?.0))).collect();
                prop_assert_eq!(&got, &naive);
            }
        }
    }
}
