//! What a peer lets us have under way there, as it granted it: calls, and bytes of their bodies.
//!
//! Large bodies queue in a line of their own: were they to wait where small calls pass, every heartbeat would wait behind
//! the ninth tensor.

use std::sync::Mutex;

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

use super::shared::lock;
use crate::wire::Hello;

/// From here on a body is large: it has a stream of its own.
pub(crate) const LARGE_BODY_BYTES: usize = 64 * 1024;
/// Calls with large bodies that are under way to one peer; as many streams are there for them on a connection.
pub(crate) const LARGE_CALLS: usize = 8;
/// What a caller may have under way at a peer before the peer has said how much that is.
const FIRST_CALLS: usize = 64;
/// Bytes of their bodies, in units of 1 KiB: one body of the largest size.
const FIRST_KIB: usize = 8 * 1024;
/// No grant counts for more than this.
const CALLS_MAX: usize = 1 << 16;
const KIB_MAX: usize = 1 << 24;

/// What one peer lets us have under way there.
pub(crate) struct Credit {
    large_turns: Semaphore,
    large_kib: Pool,
    calls: Pool,
    kib: Pool,
    /// Our own limit on calls.
    calls_limit: usize,
}

/// The part of the credit that a call uses, given back on drop.
pub(crate) struct Place<'a> {
    _large: Option<(SemaphorePermit<'a>, Taken<'a>)>,
    _call: Taken<'a>,
    _kib: Taken<'a>,
}

impl Credit {
    /// The credit at a peer that has not said anything yet; never more than `calls_limit` calls.
    pub(crate) fn new(calls_limit: usize) -> Self {
        Self {
            large_turns: Semaphore::new(LARGE_CALLS),
            large_kib: Pool::new(FIRST_KIB),
            calls: Pool::new(FIRST_CALLS.min(calls_limit)),
            kib: Pool::new(FIRST_KIB),
            calls_limit,
        }
    }

    /// The peer said what it grants.
    pub(crate) fn handle_hello(&self, hello: &Hello) {
        if hello.calls == 0 {
            return;
        }
        self.calls.regrant(hello.calls.min(self.calls_limit).min(CALLS_MAX));
        // One body of the largest size always goes, else it would wait for ever.
        let kib = (hello.body_bytes / 1024).clamp(FIRST_KIB, KIB_MAX);
        self.kib.regrant(kib);
        // A quarter stays for small bodies where the grant is large enough for that.
        self.large_kib.regrant((kib / 4 * 3).max(FIRST_KIB));
    }

    /// Waits until one more call with a body of `body_bytes` may be under way.
    pub(crate) async fn place(&self, body_bytes: usize) -> Result<Place<'_>, AcquireError> {
        let kib = body_bytes.div_ceil(1024).min(FIRST_KIB);
        let large = if body_bytes < LARGE_BODY_BYTES {
            None
        } else {
            Some((self.large_turns.acquire().await?, self.large_kib.take(kib).await?))
        };
        Ok(Place { _large: large, _call: self.calls.take(1).await?, _kib: self.kib.take(kib).await? })
    }
}

/// Permits whose number the peer may change while some are in use.
struct Pool {
    free: Semaphore,
    grant: Mutex<Grant>,
}

struct Grant {
    total: usize,
    /// Permits in use that are not to come back: the grant became smaller while they were out.
    debt: usize,
}

/// Permits in use, given back on drop.
struct Taken<'a> {
    pool: &'a Pool,
    n: usize,
}

impl Pool {
    fn new(total: usize) -> Self {
        Self { free: Semaphore::new(total), grant: Mutex::new(Grant { total, debt: 0 }) }
    }

    async fn take(&self, n: usize) -> Result<Taken<'_>, AcquireError> {
        let permits = u32::try_from(n).expect("callers ask for at most 8192");
        self.free.acquire_many(permits).await?.forget();
        Ok(Taken { pool: self, n })
    }

    fn regrant(&self, total: usize) {
        let mut grant = lock(&self.grant);
        if total < grant.total {
            let fewer = grant.total - total;
            grant.debt += fewer - self.free.forget_permits(fewer);
        } else {
            let more = total - grant.total;
            let paid = more.min(grant.debt);
            grant.debt -= paid;
            self.free.add_permits(more - paid);
        }
        grant.total = total;
    }
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut grant = lock(&self.pool.grant);
        let paid = self.n.min(grant.debt);
        grant.debt -= paid;
        self.pool.free.add_permits(self.n - paid);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;
    use proptest::prelude::*;

    use super::*;

    fn hello(calls: usize, body_bytes: usize) -> Hello {
        Hello { incarnation: 1, calls, body_bytes }
    }

    /// As many places as there are, and what stopped: one more would wait.
    fn all(credit: &Credit, body_bytes: usize) -> Vec<Place<'_>> {
        std::iter::from_fn(|| credit.place(body_bytes).now_or_never().map(Result::unwrap)).collect()
    }

    #[test]
    fn a_smaller_grant_holds_as_soon_as_what_was_out_comes_back() {
        let credit = Credit::new(4096);
        let out = all(&credit, 0);
        assert_eq!(out.len(), FIRST_CALLS);
        credit.handle_hello(&hello(8, 0));
        drop(out);
        assert_eq!(all(&credit, 0).len(), 8);
        credit.handle_hello(&hello(20, 0));
        assert_eq!(all(&credit, 0).len(), 20);
    }

    #[test]
    fn small_calls_pass_large_ones_that_wait() {
        let credit = Credit::new(4096);
        credit.handle_hello(&hello(256, 64 << 20));
        let out = all(&credit, 8 << 20);
        assert_eq!(out.len(), 6, "three quarters of the grant");
        let mut waiting = Box::pin(credit.place(8 << 20));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(credit.place(1000).now_or_never().is_some());
        drop(out);
        assert!(waiting.now_or_never().is_some());
    }

    #[test]
    fn many_of_the_smaller_large_bodies_leave_room_for_calls() {
        let credit = Credit::new(4096);
        credit.handle_hello(&hello(16, 64 << 20));
        let out = all(&credit, LARGE_BODY_BYTES);
        assert_eq!(out.len(), LARGE_CALLS);
        assert_eq!(all(&credit, 1000).len(), 8);
    }

    proptest! {
        // Whatever is granted when, as many are out as were granted once everything has come back.
        #[test]
        fn the_grant_is_what_counts_in_the_end(steps in proptest::collection::vec((any::<bool>(), 1usize..40), 0..60)) {
            let pool = Pool::new(10);
            let mut out = Vec::new();
            for (regrant, n) in steps {
                if regrant {
                    pool.regrant(n);
                } else if out.len() > n {
                    out.truncate(n);
                } else if let Some(taken) = pool.take(1).now_or_never() {
                    out.push(taken.unwrap());
                    prop_assert!(out.len() <= lock(&pool.grant).total);
                }
            }
            let total = lock(&pool.grant).total;
            out.clear();
            prop_assert_eq!((pool.free.available_permits(), lock(&pool.grant).debt), (total, 0));
        }
    }
}
