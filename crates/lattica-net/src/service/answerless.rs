//! Streams over QUIC whose opener does not wait for an answer. go-libp2p sends the protocol's name and its message in one go,
//! then closes the stream and stops reading. Over QUIC that makes our own answer to the name fail before the message is read, and
//! the stream would be given up with the message in it: Kubo's blocks would never arrive.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncWrite};
use libp2p::quic;

use super::muxer::Wrapped;

/// The most that agreeing upon a protocol writes: the answer to `/multistream/1.0.0` and a name of 140 bytes, with lengths.
const AGREEMENT_BYTES: usize = 192;

/// A QUIC connection whose incoming streams are [`Answerless`] at their beginning.
pub(super) fn connection(inner: quic::Connection) -> Wrapped<quic::Connection, Answerless<quic::Stream>> {
    Wrapped::new(
        inner,
        |inner| Answerless { inner, left_bytes: AGREEMENT_BYTES },
        |inner| Answerless { inner, left_bytes: 0 },
    )
}

/// A stream that may be written to in vain at first: the other end does not read, and what it sent can still be read.
pub(super) struct Answerless<S> {
    inner: S,
    /// So many bytes may be lost without a word.
    left_bytes: usize,
}

impl<S: AsyncRead + Unpin> AsyncRead for Answerless<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Answerless<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let written = match Pin::new(&mut self.inner).poll_write(cx, buf) {
            // What quinn says when the other end has stopped reading.
            Poll::Ready(Err(error))
                if error.kind() == std::io::ErrorKind::ConnectionReset && self.left_bytes > 0 =>
            {
                buf.len().min(self.left_bytes)
            }
            Poll::Ready(Ok(written)) => written,
            other => return other,
        };
        self.left_bytes = self.left_bytes.saturating_sub(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_close(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.inner).poll_close(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::io::{AsyncReadExt as _, AsyncWriteExt as _, Cursor};

    use super::*;

    /// A stream whose other end has sent its message and reads nothing.
    struct Stopped(Cursor<&'static [u8]>, std::io::ErrorKind);

    impl AsyncRead for Stopped {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut [u8],
        ) -> Poll<std::io::Result<usize>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Stopped {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<std::io::Result<usize>> {
            Poll::Ready(Err(self.1.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn stream(left_bytes: usize, kind: std::io::ErrorKind) -> Answerless<Stopped> {
        Answerless { inner: Stopped(Cursor::new(b"its message"), kind), left_bytes }
    }

    #[tokio::test]
    async fn what_came_is_read_although_nobody_reads_our_answer() {
        let mut incoming = stream(AGREEMENT_BYTES, std::io::ErrorKind::ConnectionReset);
        incoming.write_all(b"\x13/multistream/1.0.0\n").await.unwrap();
        let mut message = String::new();
        incoming.read_to_string(&mut message).await.unwrap();
        assert_eq!(message, "its message");
        // More than an agreement is something that somebody should have read.
        assert!(incoming.write_all(&[0; AGREEMENT_BYTES]).await.is_err());
    }

    #[tokio::test]
    async fn lost_connections_and_our_own_streams_fail_as_ever() {
        assert!(stream(AGREEMENT_BYTES, std::io::ErrorKind::NotConnected).write_all(b"x").await.is_err());
        assert!(stream(0, std::io::ErrorKind::ConnectionReset).write_all(b"x").await.is_err());
    }
}
