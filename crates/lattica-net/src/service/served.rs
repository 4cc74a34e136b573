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
pub(crate) struct RunningCall {
    pub(crate) task: AbortHandle,
    /// Where its answer goes: the stream that asked last.
    pub(crate) answers: mpsc::Sender<OutFrame>,
    /// The number of that stream.
    pub(crate) stream: u64,
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
    /// Its answer comes on the stream that asked last, which is this one now.
    Moved,
    /// It is done.
    Answer(Outcome),
    /// It may have been done.
    Stale,
    /// The same stream asks twice.
    Repeated,
}

impl Served {
    /// A whole call arrived on `stream`; `start` runs it when it is new.
    pub(crate) fn handle_call(
        &self,
        key: CallKey,
        done_below: u64,
        stream: u64,
        answers: &mpsc::Sender<OutFrame>,
        start: impl FnOnce() -> AbortHandle,
    ) -> Next {
        // The lock is held while the task starts, so that it cannot end before it is entered.
        let mut calls = lock(&self.0);
        match calls.once.handle_call(key.0, key.1, done_below) {
            Arrival::New => {
                let running = RunningCall { task: start(), answers: answers.clone(), stream };
                calls.running.insert(key, running);
                Next::Started
            }
            Arrival::Running => match calls.running.get_mut(&key) {
                Some(running) if running.stream == stream => Next::Repeated,
                Some(running) => {
                    running.stream = stream;
                    running.answers = answers.clone();
                    Next::Moved
                }
                None => Next::Stale,
            },
            Arrival::Done(answer) => Next::Answer(answer),
            Arrival::Stale => Next::Stale,
        }
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
        Some(running.answers)
    }

    /// The caller gave up.
    pub(crate) fn handle_cancel(&self, key: CallKey) {
        self.end(|calls| calls.running.contains_key(&key).then_some(key).into_iter().collect());
    }

    /// Ends the calls that still wait for `stream` to take their answers.
    pub(crate) fn end_stream(&self, stream: u64) {
        self.end(|calls| calls.running.iter().filter(|(_, r)| r.stream == stream).map(|(k, _)| *k).collect());
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
