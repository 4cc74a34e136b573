//! [`Stream`]: bytes both ways between the application and a peer; and frames from it.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use swarm_wire::{PeerId, frame};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

use super::connection::Connection;
use super::shared::{PeerState, Shared};
use crate::error::FrameError;

/// Memory for what was announced grows in these steps, so that it follows the bytes that came.
const READ_STEP_BYTES: usize = 256 * 1024;

/// A stream of bytes to a peer, both ways. Shut it down (`AsyncWriteExt::shutdown`) to tell the peer that nothing follows;
/// dropping it ends both directions. When the connection is lost, reads end or fail at once.
pub struct Stream {
    inner: Compat<libp2p::Stream>,
    shared: Arc<Shared>,
    connection: Arc<Connection>,
}

impl Stream {
    pub(crate) fn new(shared: Arc<Shared>, connection: Arc<Connection>, stream: libp2p::Stream) -> Self {
        Self { inner: stream.compat(), shared, connection }
    }

    /// The peer at the other end.
    pub fn peer(&self) -> &PeerId {
        &self.connection.peer
    }

    /// What is kept of the peer.
    pub(super) fn asker(&self) -> Arc<PeerState> {
        Arc::clone(&self.connection.state)
    }

    /// Whether the bytes go through a relay.
    pub fn is_relayed(&self) -> bool {
        self.connection.is_relayed()
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Stream({:?})", self.connection)
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        let n_bytes = buf.filled().len() - before;
        if n_bytes > 0 {
            let now = self.shared.now();
            self.connection.measured(|link| link.handle_received(now, n_bytes));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// One frame's payload: a varint length and that many bytes; `None` at a clean end. Reads single bytes, so give it a buffered
/// reader.
///
/// Not cancel safe: after a dropped future the stream is out of step.
///
/// # Errors
/// When the stream breaks, or the length is malformed or above `limit_bytes`; nothing is allocated before.
pub async fn read_frame(
    reader: &mut (impl AsyncRead + Unpin),
    what: &'static str,
    limit_bytes: usize,
) -> Result<Option<Bytes>, FrameError> {
    match read_length(reader, what, limit_bytes).await? {
        Some(n_bytes) => Ok(Some(read_bytes(reader, n_bytes).await?)),
        None => Ok(None),
    }
}

/// The length of the next frame, whose payload [`read_bytes`] reads; `None` at a clean end. As [`read_frame`] otherwise.
///
/// Not cancel safe: after a dropped future the stream is out of step.
///
/// # Errors
/// As [`read_frame`].
pub async fn read_length(
    reader: &mut (impl AsyncRead + Unpin),
    what: &'static str,
    limit_bytes: usize,
) -> Result<Option<usize>, FrameError> {
    let mut prefix = [0u8; frame::LENGTH_MAX_BYTES];
    let mut n = 0;
    loop {
        match reader.read(&mut prefix[n..=n]).await? {
            0 if n == 0 => return Ok(None),
            0 => return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into()),
            _ => n += 1,
        }
        if let Some((length, _)) = frame::decode_length(what, &prefix[..n], limit_bytes)? {
            return Ok(Some(length));
        }
    }
}

/// Sends one frame, and that nothing follows it. Not cancel safe.
pub(super) async fn send_last_frame(
    writer: &mut (impl AsyncWrite + Unpin),
    payload: &[u8],
) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(payload.len() + frame::LENGTH_MAX_BYTES);
    frame::encode(payload, &mut bytes);
    writer.write_all(&bytes).await?;
    writer.shutdown().await
}

/// The next `n_bytes`.
///
/// Not cancel safe: after a dropped future the stream is out of step.
///
/// # Errors
/// When the stream breaks or ends before.
pub async fn read_bytes(reader: &mut (impl AsyncRead + Unpin), n_bytes: usize) -> std::io::Result<Bytes> {
    let mut bytes = BytesMut::with_capacity(n_bytes.min(READ_STEP_BYTES));
    let mut limited = reader.take(n_bytes as u64);
    while bytes.len() < n_bytes {
        bytes.reserve((n_bytes - bytes.len()).min(READ_STEP_BYTES));
        if limited.read_buf(&mut bytes).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(bytes.freeze())
}
