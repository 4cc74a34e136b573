//! A connection whose streams are given another type as they open: what `early` wraps is the streams, not the connection. Its
//! end has a limit: the swarm counts a connection until it is closed, and closing may wait for a peer that reads no more.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use tokio::time::{Sleep, sleep};

/// What takes longer to close is dropped.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The connection `M` with streams `S`.
pub(super) struct Wrapped<M: StreamMuxer, S> {
    inner: M,
    /// What becomes of a stream that the peer opens, and of one that is opened here.
    incoming: fn(M::Substream) -> S,
    outgoing: fn(M::Substream) -> S,
    /// Since it is being closed: for how long it may still take.
    closing: Option<Pin<Box<Sleep>>>,
}

impl<M: StreamMuxer, S> Wrapped<M, S> {
    pub(super) fn new(inner: M, incoming: fn(M::Substream) -> S, outgoing: fn(M::Substream) -> S) -> Self {
        Self { inner, incoming, outgoing, closing: None }
    }
}

impl<M: StreamMuxer + Unpin, S: AsyncRead + AsyncWrite> StreamMuxer for Wrapped<M, S> {
    type Substream = S;
    type Error = M::Error;

    fn poll_inbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<S, M::Error>> {
        let this = self.get_mut();
        Pin::new(&mut this.inner).poll_inbound(cx).map_ok(this.incoming)
    }

    fn poll_outbound(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<S, M::Error>> {
        let this = self.get_mut();
        Pin::new(&mut this.inner).poll_outbound(cx).map_ok(this.outgoing)
    }

    fn poll_close(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        let this = self.get_mut();
        if let Poll::Ready(closed) = Pin::new(&mut this.inner).poll_close(cx) {
            return Poll::Ready(closed);
        }
        let limit = this.closing.get_or_insert_with(|| Box::pin(sleep(CLOSE_TIMEOUT)));
        limit.as_mut().poll(cx).map(Ok)
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, M::Error>> {
        Pin::new(&mut self.get_mut().inner).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;
    use libp2p::core::muxing::StreamMuxerExt as _;
    use tokio::time::timeout;

    use super::*;

    /// A connection whose peer takes nothing any more.
    struct Stuck;

    impl StreamMuxer for Stuck {
        type Substream = Cursor<Vec<u8>>;
        type Error = std::io::Error;

        fn poll_inbound(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Result<Self::Substream, Self::Error>> {
            Poll::Pending
        }

        fn poll_outbound(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Result<Self::Substream, Self::Error>> {
            Poll::Pending
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
            Poll::Pending
        }

        fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, Self::Error>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_connection_ends_although_its_peer_does_not_let_it_be_closed() {
        let stuck = Wrapped::new(Stuck, |stream| stream, |stream| stream);
        timeout(CLOSE_TIMEOUT * 10, stuck.close()).await.unwrap().unwrap();
    }
}
