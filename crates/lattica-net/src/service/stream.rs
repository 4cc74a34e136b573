//! [`Stream`]: bytes both ways between the application and a peer.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use swarm_wire::PeerId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt};

use super::connection::Connection;
use super::shared::Shared;

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

    /// Whether the bytes go through a relay.
    pub fn is_relayed(&self) -> bool {
        self.connection.relayed
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
            self.connection.state.link().handle_received(self.shared.now(), n_bytes);
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
