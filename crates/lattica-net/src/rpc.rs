//! The bookkeeping of calls, without streams or clocks: which of our calls wait for an answer, and which calls of a peer
//! may run here.

pub mod hedge;
pub mod once;

use std::collections::HashMap;

/// Calls that wait for their answers on one stream. `T` is whatever completes a call.
#[derive(Debug)]
pub struct CallTable<T> {
    /// `None` when the stream is gone.
    waiting: Option<HashMap<u64, T>>,
}

impl<T> Default for CallTable<T> {
    fn default() -> Self {
        Self { waiting: Some(HashMap::new()) }
    }
}

impl<T> CallTable<T> {
    /// Enters call `call_id`. Numbers are entered once; how many wait is bounded by what the peer granted.
    ///
    /// # Errors
    /// When the stream is gone; the completion comes back.
    pub fn insert(&mut self, call_id: u64, completion: T) -> Result<(), T> {
        match &mut self.waiting {
            Some(waiting) => {
                waiting.insert(call_id, completion);
                Ok(())
            }
            None => Err(completion),
        }
    }

    /// An answer came, or the caller gave up: the call is over. `None` when it was over before, which is normal: an answer
    /// and a cancel may cross.
    pub fn remove(&mut self, call_id: u64) -> Option<T> {
        self.waiting.as_mut()?.remove(&call_id)
    }

    /// The stream is gone: no further call can be entered, and these were waiting.
    pub fn close(&mut self) -> Vec<T> {
        self.waiting.take().map_or_else(Vec::new, |waiting| waiting.into_values().collect())
    }

    /// Whether the stream is gone.
    pub fn is_closed(&self) -> bool {
        self.waiting.is_none()
    }

    /// Whether no call waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.as_ref().is_none_or(HashMap::is_empty)
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
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_call_ends_once_and_none_begins_on_a_stream_that_is_gone() {
        let mut table = CallTable::default();
        for id in 1..=3 {
            assert_eq!(table.insert(id, id * 10), Ok(()));
        }
        assert_eq!((table.remove(2), table.remove(2), table.is_empty()), (Some(20), None, false));
        let mut left = table.close();
        left.sort_unstable();
        assert_eq!(
            (left, table.close(), table.is_closed(), table.is_empty()),
            (vec![10, 30], vec![], true, true)
        );
        assert_eq!((table.insert(4, 40), table.remove(1)), (Err(40), None));
    }

    proptest! {
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
