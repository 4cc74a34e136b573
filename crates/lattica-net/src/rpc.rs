//! The bookkeeping of calls, without streams or clocks: which of our calls wait for an answer, and which calls of a peer
//! may run here.

pub mod hedge;
pub mod once;

use std::collections::HashMap;
use std::time::Duration;

/// Calls that wait for their answers on one stream. `T` is whatever completes a call.
#[derive(Debug)]
pub struct CallTable<T> {
    waiting: HashMap<u64, Waiting<T>>,
    limit: usize,
    closed: bool,
}

#[derive(Debug)]
struct Waiting<T> {
    deadline: Duration,
    completion: T,
}

/// Why a call could not be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InsertError {
    /// As many calls as allowed are waiting.
    Full,
    /// The stream is gone.
    Closed,
}

impl<T> CallTable<T> {
    /// A table for at most `limit` waiting calls.
    pub fn new(limit: usize) -> Self {
        Self { waiting: HashMap::new(), limit, closed: false }
    }

    /// Enters call `call_id`, which is given up at `deadline`. Numbers come from [`once::Outgoing`] and are entered once.
    ///
    /// # Errors
    /// When the table is full or closed; the completion comes back.
    pub fn insert(
        &mut self,
        call_id: u64,
        deadline: Duration,
        completion: T,
    ) -> Result<(), (InsertError, T)> {
        if self.closed {
            return Err((InsertError::Closed, completion));
        }
        if self.waiting.len() >= self.limit {
            return Err((InsertError::Full, completion));
        }
        self.waiting.insert(call_id, Waiting { deadline, completion });
        Ok(())
    }

    /// An answer came, or the caller gave up: the call is over. `None` when it was over before, which is normal: an answer
    /// and a cancel may cross.
    pub fn remove(&mut self, call_id: u64) -> Option<T> {
        self.waiting.remove(&call_id).map(|w| w.completion)
    }

    /// Removes the calls whose deadline has passed at `now`.
    pub fn expire(&mut self, now: Duration) -> Vec<(u64, T)> {
        let over: Vec<u64> =
            self.waiting.iter().filter(|(_, w)| w.deadline <= now).map(|(id, _)| *id).collect();
        over.into_iter().filter_map(|id| Some((id, self.remove(id)?))).collect()
    }

    /// The stream is gone: no further call can be entered, and these were waiting.
    pub fn close(&mut self) -> Vec<T> {
        self.closed = true;
        self.waiting.drain().map(|(_, w)| w.completion).collect()
    }

    /// Whether the stream is gone.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Calls that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no call waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// How much of this node one peer's calls take, and whether one more may run.
#[derive(Debug, Clone)]
pub struct Admission {
    calls_limit: usize,
    bytes_limit: usize,
    calls: usize,
    bytes: usize,
}

/// Why a call may not run now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The peer has as many calls running as it may.
    #[error("{limit} calls of this peer are running; wait for one of them")]
    Calls {
        /// The limit.
        limit: usize,
    },
    /// The bodies of the peer's calls and answers take as much memory as they may.
    #[error("calls of this peer hold {limit_bytes} bytes; wait for their answers")]
    Bytes {
        /// The limit.
        limit_bytes: usize,
    },
}

impl Admission {
    /// At most `calls_limit` calls and `bytes_limit` bytes at the same time.
    pub fn new(calls_limit: usize, bytes_limit: usize) -> Self {
        Self { calls_limit, bytes_limit, calls: 0, bytes: 0 }
    }

    /// A call with a body of `body_bytes` wants to run.
    ///
    /// # Errors
    /// When a limit would be passed; nothing is taken then.
    pub fn admit(&mut self, body_bytes: usize) -> Result<(), Refusal> {
        if self.calls >= self.calls_limit {
            return Err(Refusal::Calls { limit: self.calls_limit });
        }
        if self.bytes.saturating_add(body_bytes) > self.bytes_limit {
            return Err(Refusal::Bytes { limit_bytes: self.bytes_limit });
        }
        self.calls += 1;
        self.bytes += body_bytes;
        Ok(())
    }

    /// A running call now holds `from_bytes` no more, but `to_bytes` (its body was used, its answer made). Answers are
    /// not refused: the work is done. They keep further calls out until they are sent.
    pub fn resize(&mut self, from_bytes: usize, to_bytes: usize) {
        self.bytes = self.bytes.saturating_sub(from_bytes).saturating_add(to_bytes);
    }

    /// A call that held `held_bytes` is over.
    pub fn finish(&mut self, held_bytes: usize) {
        debug_assert!(self.calls > 0, "finish without admit");
        self.calls = self.calls.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(held_bytes);
    }

    /// Calls that run.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Bytes that they hold.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u64),
        Remove(u64),
        Expire(u64),
        Close,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0u64..50).prop_map(Step::Insert),
            4 => (1u64..40).prop_map(Step::Remove),
            2 => (0u64..50).prop_map(Step::Expire),
            1 => Just(Step::Close),
        ];
        proptest::collection::vec(step, 0..120)
    }

    proptest! {
        // Each completion comes back exactly once, and never after it was given back.
        #[test]
        fn every_call_ends_exactly_once(steps in steps()) {
            let mut table = CallTable::new(8);
            let mut model: BTreeMap<u64, u64> = BTreeMap::new();
            let (mut entered, mut ended, mut closed) = (0u64, 0u64, false);
            for step in steps {
                match step {
                    Step::Insert(deadline) => match table.insert(entered + 1, Duration::from_secs(deadline), entered) {
                        Ok(()) => {
                            prop_assert!(!closed && model.len() < 8 && model.insert(entered + 1, deadline).is_none());
                            entered += 1;
                        }
                        Err((InsertError::Full, _)) => prop_assert_eq!(model.len(), 8),
                        Err((InsertError::Closed, _)) => prop_assert!(closed),
                    },
                    Step::Remove(id) => {
                        let found = table.remove(id).is_some();
                        prop_assert_eq!(found, model.remove(&id).is_some());
                        ended += u64::from(found);
                    }
                    Step::Expire(now) => {
                        let mut over: Vec<u64> = table.expire(Duration::from_secs(now)).into_iter().map(|(id, _)| id).collect();
                        over.sort_unstable();
                        let expected: Vec<u64> = model.iter().filter(|(_, d)| **d <= now).map(|(id, _)| *id).collect();
                        prop_assert_eq!(&over, &expected);
                        model.retain(|_, d| *d > now);
                        ended += over.len() as u64;
                    }
                    Step::Close => {
                        let drained = table.close().len();
                        prop_assert_eq!(drained, model.len());
                        model.clear();
                        ended += drained as u64;
                        closed = true;
                    }
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert_eq!(entered, ended + table.len() as u64);
            }
        }

        #[test]
        fn admission_never_passes_its_limits_and_gives_everything_back(bodies in proptest::collection::vec(0usize..300, 0..60)) {
            let mut admission = Admission::new(10, 1000);
            let mut running: Vec<usize> = Vec::new();
            for body in bodies {
                match admission.admit(body) {
                    Ok(()) => running.push(body),
                    Err(Refusal::Calls { .. }) => prop_assert_eq!(running.len(), 10),
                    Err(Refusal::Bytes { .. }) => prop_assert!(running.iter().sum::<usize>() + body > 1000),
                }
                prop_assert_eq!((admission.calls(), admission.bytes()), (running.len(), running.iter().sum::<usize>()));
                if body % 3 == 0 && !running.is_empty() {
                    let held = running.remove(body % running.len());
                    admission.finish(held);
                }
            }
            for held in running {
                admission.finish(held);
            }
            prop_assert_eq!((admission.calls(), admission.bytes()), (0, 0));
        }
    }

    #[test]
    fn large_answers_keep_further_calls_out_until_they_are_sent() {
        let mut admission = Admission::new(10, 1000);
        admission.admit(10).unwrap();
        admission.resize(10, 5000);
        assert_eq!(admission.admit(0), Err(Refusal::Bytes { limit_bytes: 1000 }));
        admission.finish(5000);
        assert_eq!(admission.admit(1000), Ok(()));
    }
}
