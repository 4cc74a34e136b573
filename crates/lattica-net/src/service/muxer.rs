//! A connection whose streams are given another type as they open: what `early` wraps is the streams, not the connection.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};

/// The connection `M` with streams `S`.
pub(super) struct Wrapped<M: StreamMuxer, S> {
    inner: M,
    /// What becomes of a stream that the peer opens, and of one that is opened here.
    incoming: fn(M::Substream) -> S,
    outgoing: fn(M::Substream) -> S,
}

impl<M: StreamMuxer, S> Wrapped<M, S> {
    pub(super) fn new(inner: M, incoming: fn(M::Substream) -> S, outgoing: fn(M::Substream) -> S) -> Self {
        Self { inner, incoming, outgoing }
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
        Pin::new(&mut self.get_mut().inner).poll_close(cx)
    }

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, M::Error>> {
        Pin::new(&mut self.get_mut().inner).poll(cx)
    }
}
