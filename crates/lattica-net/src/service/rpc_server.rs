//! Answers calls of peers. Every call runs as a task of its own on the application's runtime, under its deadline; what a
//! peer may have running and in memory is limited, and beyond that it is told so at once.

use std::io::{Error, ErrorKind};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use futures::{AsyncReadExt, FutureExt};
use swarm_wire::PeerId;
use tokio::sync::mpsc;

use super::connection::{Connection, Incoming};
use super::frames::{FrameReader, OutFrame, STALL_TIMEOUT, write_frames};
use super::served::{Asker, Next, RESUME_GRACE, StreamCalls};
use super::shared::{Held, Shared};
use crate::status::{Status, StatusCode};
use crate::wire::{Header, Hello};

/// Answers that wait for the stream's writer.
const ANSWER_QUEUE: usize = 64;

/// One RPC stream that the peer opened.
struct Server {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    answers: mpsc::Sender<OutFrame>,
    /// Its number among all that this node serves.
    stream: u64,
    /// Who calls, after its hello.
    incarnation: u64,
}

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
    let number = shared.streams_served.fetch_add(1, Ordering::Relaxed);
    // Whatever ends this task ends the calls that nobody else waits for.
    let calls = StreamCalls { state: Arc::clone(&connection.state), stream: number };
    let limits = &shared.config.limits;
    let hello = Header::Hello(Hello {
        incarnation: shared.incarnation,
        calls: limits.calls_per_peer,
        body_bytes: limits.call_bytes_per_peer,
    });
    // The queue is empty: there is room.
    let _ = answers.try_send(OutFrame { header: hello.encode(), body: Bytes::new(), held: None });
    let mut server = Server {
        shared: Arc::clone(&shared),
        connection: Arc::clone(&connection),
        answers,
        stream: number,
        incarnation: 0,
    };
    let mut reader = FrameReader::new(reader, STALL_TIMEOUT);
    let served = tokio::select! {
        served = server.read_calls(&mut reader) => served,
        // A peer that takes no answers gets no further calls served.
        _ = writing => Ok(()),
        () = connection.closed.cancelled() => Ok(()),
    };
    match served {
        Err(error) if error.kind() == ErrorKind::InvalidData => {
            tracing::warn!(peer = %connection.peer.short(), %error, "rpc stream closed: the peer broke the protocol");
            return;
        }
        Err(error) => tracing::debug!(peer = %connection.peer.short(), %error, "rpc stream ended"),
        Ok(()) => {}
    }
    drop((server, reader));
    // The stream counts for as long as calls may be taken over from it.
    if connection.state.served().has_stream(number) {
        tokio::select! {
            () = tokio::time::sleep(RESUME_GRACE) => {}
            () = shared.stopped.cancelled() => {}
        }
    }
    drop((calls, place));
}

impl Server {
    async fn read_calls(
        &mut self,
        reader: &mut FrameReader<futures::io::ReadHalf<libp2p::Stream>>,
    ) -> std::io::Result<()> {
        let shared = Arc::clone(&self.shared);
        let invalid = |what: String| Err(Error::new(ErrorKind::InvalidData, what));
        let body_limit = shared.config.limits.body_bytes;
        loop {
            match reader.header(|bytes| Header::decode(bytes, body_limit)).await? {
                None => return Ok(()),
                Some(Header::Hello(hello)) => self.incarnation = hello.incarnation,
                Some(Header::Cancel { call_id }) => {
                    self.connection.state.served().handle_cancel((self.incarnation, call_id));
                }
                Some(Header::Answer { .. }) => {
                    return invalid("an answer where only calls are expected".to_owned());
                }
                Some(Header::Request { call_id, method, deadline, body_bytes, done_below, attempt }) => {
                    let key = (self.incarnation, call_id);
                    let state = &self.connection.state;
                    // Before anything else: a call that is sent again has its place already, whatever else runs.
                    let asker = self.asker(attempt);
                    let again = state.served().handle_again(key, done_below, &asker);
                    let next = match again {
                        Some(next) => {
                            reader.skip(body_bytes).await?;
                            next
                        }
                        None => match self.admit(body_bytes) {
                            Ok(held) => {
                                let body = reader.body(body_bytes).await?;
                                self.connection
                                    .measured(|link| link.handle_received(shared.now(), body.len()));
                                self.arrived(
                                    Call { call_id, method, deadline, body, held },
                                    done_below,
                                    &asker,
                                )
                            }
                            Err(refusal) => {
                                reader.skip(body_bytes).await?;
                                Next::Answer(Err(refusal))
                            }
                        },
                    };
                    let refusal = match next {
                        Next::Started | Next::Runs => continue,
                        Next::Repeated => return invalid(format!("call {call_id} is running already")),
                        Next::Answer(outcome) => outcome,
                        Next::Stale => Err(Status::new(
                            StatusCode::Unavailable,
                            "the call was made before and its answer is not kept any more",
                        )),
                    };
                    // Waits when the peer sends calls faster than it takes answers: its stream is then not read.
                    if self.answers.send(answer(call_id, refusal, body_limit, None)).await.is_err() {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// A place for a new call, or why there is none.
    fn admit(&self, body_bytes: usize) -> Result<Held, Status> {
        if self.shared.draining.load(Ordering::Relaxed) {
            // Not entered: the caller may well ask another node.
            return Err(Status::unavailable("the node is about to stop"));
        }
        self.connection.state.admit(&self.shared, body_bytes).map_err(Status::resource_exhausted)
    }

    fn asker(&self, attempt: u32) -> Asker {
        Asker { answers: self.answers.clone(), stream: self.stream, attempt }
    }

    fn arrived(&self, call: Call, done_below: u64, asker: &Asker) -> Next {
        let key = (self.incarnation, call.call_id);
        let state = Arc::clone(&self.connection.state);
        self.connection.state.served().handle_call(key, done_below, asker, || {
            let (shared, peer) = (Arc::clone(&self.shared), self.connection.peer.clone());
            let task = self.shared.application.spawn(async move {
                let Call { call_id, method, deadline, body, held } = call;
                let body_limit = shared.config.limits.body_bytes;
                let outcome = run(&shared, peer, &method, body, deadline).await;
                if let Some(answers) = state.served().handle_outcome(key, &outcome) {
                    let _ = answers.send(answer(call_id, outcome, body_limit, Some(held))).await;
                }
            });
            task.abort_handle()
        })
    }
}

struct Call {
    call_id: u64,
    method: String,
    deadline: Duration,
    body: Bytes,
    held: Held,
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
