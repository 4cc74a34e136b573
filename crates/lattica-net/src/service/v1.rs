//! Calls to and from nodes of the original Lattica: each on a stream of its own.

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use swarm_wire::PeerId;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};

use super::{Node, Stream};
use crate::error::{CallError, StreamError};
use crate::status::Status;
use crate::v1::{MESSAGE_MAX_BYTES, Message, RPC_PROTOCOL};

/// A caller that sends or reads nothing for this long is given up.
const PATIENCE: Duration = Duration::from_secs(30);
/// A message's memory grows in these steps.
const READ_STEP_BYTES: usize = 256 * 1024;

type Answer = Pin<Box<dyn Future<Output = Result<Bytes, String>> + Send>>;
type Handler = Arc<dyn Fn(PeerId, Bytes) -> Answer + Send + Sync>;

/// Speaks to nodes of the original Lattica through a [`Node`] whose `NodeConfig::identify_version` is theirs: they drop every
/// peer with another one. A cheap handle.
#[derive(Clone)]
pub struct V1 {
    node: Node,
    methods: Arc<Mutex<HashMap<String, Handler>>>,
}

impl std::fmt::Debug for V1 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "V1({})", self.node.peer_id().short())
    }
}

impl V1 {
    /// Answers calls from now on. One for each node.
    ///
    /// # Errors
    /// Never today; the protocol's name is checked as every other.
    pub fn start(node: Node) -> Result<Self, StreamError> {
        let methods: Arc<Mutex<HashMap<String, Handler>>> = Arc::default();
        let known = Arc::clone(&methods);
        node.handle_stream(RPC_PROTOCOL, move |peer, stream| serve(Arc::clone(&known), peer, stream))?;
        Ok(Self { node, methods })
    }

    /// Answers calls of `method` (`Service.method`) with `handler`. Replaces an earlier handler. An `Err` is told to the caller.
    pub fn handle<H, F>(&self, method: &str, handler: H)
    where
        H: Fn(PeerId, Bytes) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Bytes, String>> + Send + 'static,
    {
        let handler: Handler = Arc::new(move |peer, data| Box::pin(handler(peer, data)));
        self.methods.lock().unwrap_or_else(PoisonError::into_inner).insert(method.to_owned(), handler);
    }

    /// Calls `method` of a peer.
    ///
    /// Cancel safe: dropping the future resets the stream; the peer may do the work all the same.
    ///
    /// # Errors
    /// When the peer cannot be reached, answers with an error or nonsense, or takes longer than `timeout`.
    pub async fn call(
        &self,
        peer: &PeerId,
        method: &str,
        data: Bytes,
        timeout: Duration,
    ) -> Result<Bytes, CallError> {
        let refused = |reason: String| CallError::Remote {
            peer: peer.clone(),
            method: method.to_owned(),
            status: Status::internal(reason),
        };
        let exchange = async {
            let opened = self.node.open_stream(peer, RPC_PROTOCOL).await;
            let mut stream = opened
                .map_err(|error| CallError::Unreachable { peer: peer.clone(), reason: error.to_string() })?;
            // One call for each stream: the number need not differ.
            let request = Message::Request { id: "1".to_owned(), method: method.to_owned(), data };
            write(&mut stream, &request).await.map_err(|error| refused(error.to_string()))?;
            match read(&mut stream).await.map_err(refused)? {
                Message::Response { data, .. } => Ok(data),
                Message::Error { error, .. } => Err(refused(error)),
                Message::Request { .. } => Err(refused("it answered with a question".to_owned())),
            }
        };
        tokio::time::timeout(timeout, exchange).await.unwrap_or_else(|_| {
            Err(CallError::Timeout { peer: peer.clone(), method: method.to_owned(), timeout })
        })
    }
}

async fn serve(methods: Arc<Mutex<HashMap<String, Handler>>>, peer: PeerId, mut stream: Stream) {
    let request = match tokio::time::timeout(PATIENCE, read(&mut stream)).await {
        Ok(Ok(Message::Request { id, method, data })) => (id, method, data),
        Ok(Err(reason)) => {
            tracing::warn!(peer = %peer.short(), reason, "v1 call refused");
            return;
        }
        _ => return,
    };
    let (id, method, data) = request;
    let handler = methods.lock().unwrap_or_else(PoisonError::into_inner).get(&method).cloned();
    let answer = match handler {
        Some(handler) => handler(peer, data).await,
        None => Err(format!("no method {method}")),
    };
    let message = match answer {
        Ok(data) => Message::Response { id, data },
        Err(error) => Message::Error { id, error },
    };
    // Who does not read its answer loses it.
    let _ = tokio::time::timeout(PATIENCE, write(&mut stream, &message)).await;
}

async fn write(stream: &mut Stream, message: &Message) -> std::io::Result<()> {
    stream.write_all(&message.encode()).await?;
    stream.shutdown().await
}

/// The whole of what the other side says, which ends with its half of the stream.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Message, String> {
    let mut bytes = BytesMut::new();
    let mut limited = stream.take(MESSAGE_MAX_BYTES as u64 + 1);
    loop {
        bytes.reserve(READ_STEP_BYTES.min(bytes.len().max(4096)));
        if limited.read_buf(&mut bytes).await.map_err(|e| e.to_string())? == 0 {
            return Message::decode(&bytes.freeze()).map_err(|e| e.to_string());
        }
    }
}
