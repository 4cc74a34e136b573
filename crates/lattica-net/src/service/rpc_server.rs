//! Answers calls of peers. Every call runs as a task of its own on the application's runtime, under its deadline; what a
//! peer may have running and in memory is limited, and beyond that it is told so at once.

use std::collections::HashMap;
use std::io::{Error, ErrorKind};
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::{AsyncReadExt, FutureExt};
use swarm_wire::PeerId;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::connection::{Connection, Incoming};
use super::frames::{FrameReader, OutFrame, STALL_TIMEOUT, write_frames};
use super::shared::{Held, Shared, lock};
use crate::status::{Status, StatusCode};
use crate::wire::Header;

/// Answers that wait for the stream's writer.
const ANSWER_QUEUE: usize = 64;

/// Calls that run for one stream, by their number.
type Running = Arc<Mutex<HashMap<u64, AbortHandle>>>;

/// Serves one RPC stream that the peer opened, until it ends or breaks the protocol.
pub(crate) async fn serve(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    stream: libp2p::Stream,
    place: Incoming,
) {
    let (reader, writer) = stream.split();
    let (answers, queue) = mpsc::channel(ANSWER_QUEUE);
    let writing = tokio::spawn(write_frames(writer, queue));
    let running = Running::default();
    let mut reader = FrameReader::new(reader, STALL_TIMEOUT);
    let served = tokio::select! {
        served = read_calls(&shared, &connection, &mut reader, &answers, &running) => served,
        // A peer that takes no answers gets no further calls served.
        _ = writing => Ok(()),
        () = connection.closed.cancelled() => Ok(()),
    };
    match served {
        Err(error) if error.kind() == ErrorKind::InvalidData => {
            tracing::warn!(peer = %connection.peer.short(), %error, "rpc stream closed: the peer broke the protocol");
        }
        Err(error) => tracing::debug!(peer = %connection.peer.short(), %error, "rpc stream ended"),
        Ok(()) => {}
    }
    for (_, call) in lock(&running).drain() {
        call.abort();
    }
    drop(place);
}

async fn read_calls(
    shared: &Arc<Shared>,
    connection: &Arc<Connection>,
    reader: &mut FrameReader<futures::io::ReadHalf<libp2p::Stream>>,
    answers: &mpsc::Sender<OutFrame>,
    running: &Running,
) -> std::io::Result<()> {
    let body_limit = shared.config.limits.body_bytes;
    loop {
        match reader.header(|bytes| Header::decode(bytes, body_limit)).await? {
            None => return Ok(()),
            Some(Header::Cancel { call_id }) => {
                if let Some(call) = lock(running).remove(&call_id) {
                    call.abort();
                }
            }
            Some(Header::Answer { .. }) => {
                return Err(Error::new(ErrorKind::InvalidData, "an answer where only calls are expected"));
            }
            Some(Header::Request { call_id, method, deadline, body_bytes }) => {
                if lock(running).contains_key(&call_id) {
                    return Err(Error::new(
                        ErrorKind::InvalidData,
                        format!("call {call_id} is running already"),
                    ));
                }
                match connection.state.admit(&shared.config, body_bytes) {
                    Ok(held) => {
                        let body = reader.body(body_bytes).await?;
                        connection.state.link().handle_received(shared.now(), body.len());
                        let call = Call { call_id, method, deadline, body, held };
                        call.start(shared, connection, answers, running);
                    }
                    Err(refusal) => {
                        reader.skip(body_bytes).await?;
                        let refusal = Err(Status::resource_exhausted(refusal));
                        // Waits when the peer sends calls faster than it takes refusals: its stream is then not read.
                        if answers.send(answer(call_id, refusal, body_limit, None)).await.is_err() {
                            return Ok(());
                        }
                    }
                }
            }
        }
    }
}

struct Call {
    call_id: u64,
    method: String,
    deadline: Duration,
    body: Bytes,
    held: Held,
}

impl Call {
    fn start(
        self,
        shared: &Arc<Shared>,
        connection: &Arc<Connection>,
        answers: &mpsc::Sender<OutFrame>,
        running: &Running,
    ) {
        let Self { call_id, method, deadline, body, held } = self;
        let (shared_here, peer) = (Arc::clone(shared), connection.peer.clone());
        let (answers, finished) = (answers.clone(), Arc::clone(running));
        let body_limit = shared.config.limits.body_bytes;
        // The lock is held while the task starts, so that it cannot end before it is entered.
        let mut entered = lock(running);
        let task = shared.application.spawn(async move {
            let outcome = run(&shared_here, peer, &method, body, deadline).await;
            lock(&finished).remove(&call_id);
            let _ = answers.send(answer(call_id, outcome, body_limit, Some(held))).await;
        });
        entered.insert(call_id, task.abort_handle());
    }
}

/// Runs one call under its deadline; a handler that panics is an internal error of its own call only.
pub(crate) async fn run(
    shared: &Shared,
    peer: PeerId,
    method: &str,
    body: Bytes,
    deadline: Duration,
) -> Result<Bytes, Status> {
    let Some(handler) = shared.method(method) else {
        return Err(Status::new(StatusCode::Unimplemented, format!("no method {method} here")));
    };
    let work = AssertUnwindSafe(async move { handler(peer, body).await }).catch_unwind();
    match tokio::time::timeout(deadline, work).await {
        Ok(Ok(outcome)) => outcome,
        Ok(Err(_panic)) => {
            tracing::error!(method, "handler panicked");
            Err(Status::internal(format!("the handler of {method} panicked")))
        }
        Err(_) => {
            Err(Status::new(StatusCode::DeadlineExceeded, format!("{method} took longer than {deadline:?}")))
        }
    }
}

fn answer(call_id: u64, outcome: Result<Bytes, Status>, body_limit: usize, held: Option<Held>) -> OutFrame {
    let outcome = outcome.and_then(|body| {
        if body.len() > body_limit {
            let n_bytes = body.len();
            return Err(Status::internal(format!(
                "the answer of {n_bytes} bytes is over the limit of {body_limit}"
            )));
        }
        Ok(body)
    });
    let (refusal, body) = match outcome {
        Ok(body) => (None, body),
        Err(status) => (Some(status), Bytes::new()),
    };
    let held = held.map(|mut held| {
        held.resize(body.len());
        held
    });
    OutFrame { header: Header::Answer { call_id, refusal, body_bytes: body.len() }.encode(), body, held }
}
