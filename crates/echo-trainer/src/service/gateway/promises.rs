//! Answers that are not there yet: every request that takes time is a promise with a name, which its client asks for until it is
//! kept. Kept ones stay for a while, because an answer may be lost on its way.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::time::Instant;

/// What a promise came to.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Outcome {
    /// An answer in JSON.
    Json(Value),
    /// An answer in protobuf.
    Proto(Bytes),
    /// A failure, in words.
    Failed {
        /// What went wrong.
        message: String,
        /// Whether the request was at fault, and not this server.
        user: bool,
    },
}

impl Outcome {
    fn bytes(&self) -> usize {
        match self {
            Self::Proto(bytes) => bytes.len(),
            Self::Json(_) => 512,
            Self::Failed { message, .. } => message.len(),
        }
    }
}

/// What is known of a promise.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Answer {
    /// There was none of this name, or its outcome was dropped.
    Unknown,
    /// It is still being worked on.
    Pending,
    /// It is kept.
    Ready(Outcome),
}

/// How many promises are kept track of.
#[derive(Debug, Clone, Copy)]
pub(super) struct PromiseLimits {
    /// Open ones.
    pub(super) pending: usize,
    /// Bytes of those that are kept; the oldest go first.
    pub(super) kept_bytes: usize,
}

#[derive(Debug, Default)]
struct Table {
    /// `None` while it is open.
    outcomes: BTreeMap<String, Option<Outcome>>,
    pending: usize,
    kept: VecDeque<String>,
    kept_bytes: usize,
    waiters: BTreeMap<String, Arc<Notify>>,
}

/// All promises of a server.
#[derive(Debug)]
pub(super) struct Promises {
    limits: PromiseLimits,
    table: Mutex<Table>,
}

impl Promises {
    pub(super) fn new(limits: PromiseLimits) -> Self {
        Self { limits, table: Mutex::default() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a promise; false when too many are open. One that is known stays as it is.
    pub(super) fn open(&self, name: &str) -> bool {
        let mut table = self.table();
        if table.outcomes.contains_key(name) {
            return true;
        }
        if table.pending >= self.limits.pending {
            return false;
        }
        table.pending += 1;
        table.outcomes.insert(name.to_owned(), None);
        true
    }

    /// Whether there is a promise of this name.
    pub(super) fn is_known(&self, name: &str) -> bool {
        self.table().outcomes.contains_key(name)
    }

    /// Keeps a promise that is open.
    pub(super) fn keep(&self, name: &str, outcome: Outcome) {
        let mut table = self.table();
        let Some(open @ None) = table.outcomes.get_mut(name) else { return };
        let bytes = name.len() + outcome.bytes();
        *open = Some(outcome);
        table.kept_bytes += bytes;
        table.pending -= 1;
        table.kept.push_back(name.to_owned());
        while table.kept_bytes > self.limits.kept_bytes && table.kept.len() > 1 {
            let oldest = table.kept.pop_front().expect("more than one");
            let dropped = table.outcomes.remove(&oldest).flatten();
            table.kept_bytes -= oldest.len() + dropped.map_or(0, |outcome| outcome.bytes());
        }
        if let Some(waiters) = table.waiters.remove(name) {
            waiters.notify_waiters();
        }
    }

    /// What `name` came to; waits for it until `until`.
    pub(super) async fn get(&self, name: &str, until: Instant) -> Answer {
        loop {
            let kept = {
                let mut table = self.table();
                match table.outcomes.get(name) {
                    None => return Answer::Unknown,
                    Some(Some(outcome)) => return Answer::Ready(outcome.clone()),
                    Some(None) => {}
                }
                let waiters = Arc::clone(table.waiters.entry(name.to_owned()).or_default());
                // Registered before the table is given free, so that nothing is missed.
                let mut kept = Box::pin(waiters.notified_owned());
                kept.as_mut().enable();
                kept
            };
            if tokio::time::timeout_at(until, kept).await.is_err() {
                return Answer::Pending;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn promises(pending: usize, kept_bytes: usize) -> Arc<Promises> {
        Arc::new(Promises::new(PromiseLimits { pending, kept_bytes }))
    }

    fn answer(bytes: usize) -> Outcome {
        Outcome::Proto(vec![7; bytes].into())
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_it_and_whoever_comes_later_hears_the_same() {
        let promises = promises(2, 1000);
        assert!(promises.open("a"));
        let (now, later) = (Instant::now(), Instant::now() + Duration::from_secs(600));
        assert_eq!(promises.get("a", now).await, Answer::Pending);
        let waiter = Arc::clone(&promises);
        let waits = tokio::spawn(async move { waiter.get("a", later).await });
        tokio::task::yield_now().await;
        promises.keep("a", answer(3));
        assert_eq!(waits.await.unwrap(), Answer::Ready(answer(3)));
        promises.keep("a", answer(9));
        assert_eq!(promises.get("a", later).await, Answer::Ready(answer(3)), "the first answer counts");
        assert_eq!(promises.get("b", later).await, Answer::Unknown);
    }

    #[tokio::test]
    async fn open_ones_and_the_bytes_of_kept_ones_are_bounded() {
        let promises = promises(2, 20);
        assert!(promises.open("a") && promises.open("b") && !promises.open("c") && promises.open("a"));
        promises.keep("a", answer(10));
        assert!(promises.open("c"));
        promises.keep("b", answer(10));
        let now = Instant::now();
        assert_eq!(promises.get("a", now).await, Answer::Unknown, "the oldest was dropped");
        assert_eq!(promises.get("b", now).await, Answer::Ready(answer(10)));
        promises.keep("c", answer(99));
        assert_eq!(
            promises.get("c", now).await,
            Answer::Ready(answer(99)),
            "the newest stays, however large"
        );
    }
}
