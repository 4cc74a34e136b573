//! The calls of one peer that run here, whichever stream they came on. A call outlives its stream for a moment, so that its
//! caller can ask for the answer on another path.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::frames::OutFrame;
use super::shared::{PeerState, lock};
use crate::rpc::once::{Arrival, Once};
use crate::status::Status;

/// Answers that are kept for a peer until it has acknowledged them.
const ANSWERS_MAX: usize = 4096;
/// Their bytes: room for one of the largest size.
const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;
/// How long a call whose stream broke goes on, waiting for its caller to come back.
pub(crate) const RESUME_GRACE: Duration = Duration::from_secs(2);

/// Incarnation of the caller, number of the call.
pub(crate) type CallKey = (u64, u64);
/// What a handler said.
pub(crate) type Outcome = Result<Bytes, Status>;

/// See the module.
pub(crate) struct Served(Mutex<Calls>);

struct Calls {
    once: Once<Outcome>,
    running: HashMap<CallKey, RunningCall>,
}

/// A call that runs.
struct RunningCall {
    task: AbortHandle,
    /// Where its answer goes: to where the caller sent it last.
    asker: Asker,
}

/// Where a sending of a call came from.
#[derive(Clone)]
pub(crate) struct Asker {
    pub(crate) answers: mpsc::Sender<OutFrame>,
    /// The number of the stream.
    pub(crate) stream: u64,
    /// How often the call was sent before.
    pub(crate) attempt: u32,
}

impl Default for Served {
    fn default() -> Self {
        let once = Once::new(ANSWERS_MAX, ANSWER_BYTES_MAX);
        Self(Mutex::new(Calls { once, running: HashMap::new() }))
    }
}

/// What to do with a call that arrived.
pub(crate) enum Next {
    /// It was started.
    Started,
    /// It runs; its answer goes to where the caller sent it last.
    Runs,
    /// It is done.
    Answer(Outcome),
    /// It was done and its answer is forgotten.
    Stale,
    /// The same stream asks twice.
    Repeated,
}

impl Served {
    /// The header of a call arrived on `stream`. Says what to do with a call that came before; `None` when it is new.
    pub(crate) fn handle_again(&self, key: CallKey, done_below: u64, asker: &Asker) -> Option<Next> {
        let mut calls = lock(&self.0);
        let arrival = calls.once.look(key.0, key.1, done_below);
        calls.again(key, arrival, asker)
    }

    /// A whole call arrived on `stream`; `start` runs it when it is new. Two streams may have brought it meanwhile.
    pub(crate) fn handle_call(
        &self,
        key: CallKey,
        done_below: u64,
        asker: &Asker,
        start: impl FnOnce() -> AbortHandle,
    ) -> Next {
        // The lock is held while the task starts, so that it cannot end before it is entered.
        let mut calls = lock(&self.0);
        let arrival = calls.once.handle_call(key.0, key.1, done_below);
        if let Some(next) = calls.again(key, arrival, asker) {
            return next;
        }
        let running = RunningCall { task: start(), asker: asker.clone() };
        calls.running.insert(key, running);
        Next::Started
    }

    /// The call's handler has ended. Returns where the answer is to go; nowhere when the caller gave up.
    pub(crate) fn handle_outcome(&self, key: CallKey, outcome: &Outcome) -> Option<mpsc::Sender<OutFrame>> {
        let mut calls = lock(&self.0);
        let running = calls.running.remove(&key)?;
        let n_bytes = match outcome {
            Ok(body) => body.len(),
            Err(status) => status.message.len(),
        };
        calls.once.handle_answer(key.0, key.1, outcome.clone(), n_bytes);
        Some(running.asker.answers)
    }

    /// The caller gave up.
    pub(crate) fn handle_cancel(&self, key: CallKey) {
        self.end(|calls| calls.running.contains_key(&key).then_some(key).into_iter().collect());
    }

    /// Ends the calls that still wait for `stream` to take their answers.
    pub(crate) fn end_stream(&self, stream: u64) {
        self.end(|calls| {
            calls.running.iter().filter(|(_, r)| r.asker.stream == stream).map(|(k, _)| *k).collect()
        });
    }

    /// Whether a call waits for `stream` to take its answer.
    pub(crate) fn has_stream(&self, stream: u64) -> bool {
        lock(&self.0).running.values().any(|r| r.asker.stream == stream)
    }

    /// Whether answers are kept for the peer.
    pub(crate) fn keeps_answers(&self) -> bool {
        lock(&self.0).once.kept().0 > 0
    }

    /// Forgets every answer that is kept for the peer.
    pub(crate) fn forget_answers(&self) {
        lock(&self.0).once.forget_answers();
    }

    fn end(&self, which: impl FnOnce(&Calls) -> Vec<CallKey>) {
        let mut calls = lock(&self.0);
        for key in which(&calls) {
            if let Some(running) = calls.running.remove(&key) {
                running.task.abort();
                let gone = Err(Status::unavailable("the call was given up"));
                calls.once.handle_answer(key.0, key.1, gone, 0);
            }
        }
    }
}

impl Calls {
    /// What to do with a call that came before.
    fn again(&mut self, key: CallKey, arrival: Arrival<Outcome>, asker: &Asker) -> Option<Next> {
        Some(match arrival {
            Arrival::New => return None,
            Arrival::Running => match self.running.get_mut(&key) {
                Some(running) if running.asker.stream == asker.stream => Next::Repeated,
                Some(running) => {
                    // What a broken path delivers late must not take the answer back there.
                    if asker.attempt > running.asker.attempt {
                        running.asker = asker.clone();
                    }
                    Next::Runs
                }
                None => Next::Stale,
            },
            Arrival::Done(answer) => Next::Answer(answer),
            Arrival::Stale => Next::Stale,
        })
    }
}

/// Ends the calls of a stream when it is dropped.
pub(crate) struct StreamCalls {
    pub(crate) state: Arc<PeerState>,
    pub(crate) stream: u64,
}

impl Drop for StreamCalls {
    fn drop(&mut self) {
        self.state.served().end_stream(self.stream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(stream: u64, attempt: u32) -> (Asker, mpsc::Receiver<OutFrame>) {
        let (answers, queue) = mpsc::channel(1);
        (Asker { answers, stream, attempt }, queue)
    }

    #[tokio::test]
    async fn the_answer_goes_to_the_last_sending_whichever_comes_first() {
        for late_first in [false, true] {
            let served = Served::default();
            let start = || tokio::spawn(std::future::pending::<()>()).abort_handle();
            let (old, new) = (asker(1, 0), asker(2, 1));
            let (first, second) = if late_first { (&old, &new) } else { (&new, &old) };
            assert!(served.handle_again((7, 1), 1, &first.0).is_none());
            assert!(matches!(served.handle_call((7, 1), 1, &first.0, start), Next::Started));
            assert!(matches!(served.handle_again((7, 1), 1, &second.0), Some(Next::Runs)));
            let answers = served.handle_outcome((7, 1), &Ok(Bytes::new())).unwrap();
            assert!(answers.same_channel(&new.0.answers), "the first to come was {}", first.0.attempt);
            assert!(matches!(served.handle_again((7, 1), 1, &old.0), Some(Next::Answer(Ok(_)))));
        }
    }

    #[tokio::test]
    async fn one_number_twice_on_one_stream_is_told() {
        let served = Served::default();
        let start = || tokio::spawn(std::future::pending::<()>()).abort_handle();
        let (first, _queue) = asker(1, 0);
        served.handle_call((7, 1), 1, &first, start);
        assert!(served.has_stream(1) && !served.has_stream(2));
        assert!(matches!(served.handle_again((7, 1), 1, &first), Some(Next::Repeated)));
        served.end_stream(1);
        assert!(matches!(served.handle_again((7, 1), 1, &first), Some(Next::Answer(Err(_)))));
    }
}
