//! One QUIC stream. Closing it ends what is written; dropping it does so too, and tells the peer to write no more.
//!
//! go-libp2p sends the protocol's name and its message in one go, then closes the stream and stops reading. That makes our own
//! answer to the name fail before the message is read, and the stream would be given up with the message in it: Kubo's blocks
//! would never arrive. So what a stream of the peer's is answered at first may get lost.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncWrite};
use quinn::{RecvStream, SendStream, WriteError};

/// The most that agreeing upon a protocol writes: the answer to `/multistream/1.0.0` and a name of 140 bytes, with lengths.
const AGREEMENT_BYTES: usize = 192;

/// See the module.
#[derive(Debug)]
pub(crate) struct Stream {
    send: SendStream,
    recv: RecvStream,
    /// So many bytes may be lost without a word when the peer has stopped reading.
    may_lose: usize,
    /// Counted by the connection, when the peer opened it.
    _place: Option<Arc<()>>,
}

impl Stream {
    /// A stream that the peer has opened.
    pub(super) fn incoming((send, recv): (SendStream, RecvStream), place: Arc<()>) -> Self {
        Self { send, recv, may_lose: AGREEMENT_BYTES, _place: Some(place) }
    }

    /// A stream that was opened here.
    pub(super) fn outgoing((send, recv): (SendStream, RecvStream)) -> Self {
        Self { send, recv, may_lose: 0, _place: None }
    }

    /// Waits until the peer has said that it reads no more.
    #[cfg(test)]
    pub(super) async fn stopped(&self) {
        let _ = self.send.stopped().await;
    }
}

impl AsyncRead for Stream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut [u8]) -> Poll<io::Result<usize>> {
        self.recv.poll_read(cx, buf).map_err(Into::into)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = match Pin::new(&mut self.send).poll_write(cx, buf) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(WriteError::Stopped(_))) if self.may_lose > 0 => buf.len().min(self.may_lose),
            Poll::Ready(Err(error)) => return Poll::Ready(Err(error.into())),
            Poll::Pending => return Poll::Pending,
        };
        self.may_lose = self.may_lose.saturating_sub(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // What is written leaves as soon as the line takes it.
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // An error says that it was closed before.
        let _ = self.send.finish();
        Poll::Ready(Ok(()))
    }
}
