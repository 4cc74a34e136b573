//! A connection as the swarm sees it: streams that come and streams that are opened.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use libp2p::PeerId;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerEvent};
use quinn::{ConnectionError, RecvStream, SendStream};
use tokio_util::sync::ReusableBoxFuture;

use super::config::FIRST_STREAMS;
use super::stream::Stream;
use super::{QuicError, tls};

type Opening = ReusableBoxFuture<'static, Result<(SendStream, RecvStream), ConnectionError>>;

/// See the module.
pub(crate) struct Connection {
    connection: quinn::Connection,
    incoming: Opening,
    outgoing: Option<Opening>,
    /// One more than there are streams of the peer.
    places: Arc<()>,
    /// Streams that the peer may have open, and the most that it ever may.
    allowed: u32,
    allowed_max: u32,
}

/// Waits for the end of a handshake. Dropping the future ends it.
pub(super) async fn establish(
    handshake: quinn::Connecting,
    limit: Duration,
    streams: u32,
) -> Result<(PeerId, Connection), QuicError> {
    let done = tokio::time::timeout(limit, handshake).await;
    let connection = done.map_err(|_| QuicError::Timeout { limit })??;
    let peer = tls::peer(&connection)?;
    Ok((peer, Connection::new(connection, streams)))
}

impl Connection {
    fn new(connection: quinn::Connection, allowed_max: u32) -> Self {
        let incoming = ReusableBoxFuture::new(accept(connection.clone()));
        let places = Arc::default();
        let allowed = FIRST_STREAMS.min(allowed_max);
        Self { connection, incoming, outgoing: None, places, allowed, allowed_max }
    }

    /// What it is made of.
    #[cfg(test)]
    pub(super) fn raw(&self) -> &quinn::Connection {
        &self.connection
    }

    /// Allows the peer twice as many streams when half of those that it may open are in use.
    fn allow(&mut self) {
        let used = Arc::strong_count(&self.places) - 1;
        if used * 2 >= self.allowed as usize && self.allowed < self.allowed_max {
            self.allowed = (self.allowed * 2).min(self.allowed_max);
            self.connection.set_max_concurrent_bi_streams(self.allowed.into());
        }
    }
}

async fn accept(connection: quinn::Connection) -> Result<(SendStream, RecvStream), ConnectionError> {
    connection.accept_bi().await
}

async fn open(connection: quinn::Connection) -> Result<(SendStream, RecvStream), ConnectionError> {
    connection.open_bi().await
}

impl StreamMuxer for Connection {
    type Substream = Stream;
    type Error = QuicError;

    fn poll_inbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Stream, QuicError>> {
        let streams = ready!(self.incoming.poll(cx));
        let next = accept(self.connection.clone());
        self.incoming.set(next);
        let stream = Stream::incoming(streams?, Arc::clone(&self.places));
        self.allow();
        Poll::Ready(Ok(stream))
    }

    fn poll_outbound(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Stream, QuicError>> {
        let this = &mut *self;
        let opening =
            this.outgoing.get_or_insert_with(|| ReusableBoxFuture::new(open(this.connection.clone())));
        let streams = ready!(opening.poll(cx));
        this.outgoing = None;
        Poll::Ready(Ok(Stream::outgoing(streams?)))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), QuicError>> {
        // quinn tells the peer, and keeps the socket until it has.
        self.connection.close(0u32.into(), b"");
        Poll::Ready(Ok(()))
    }

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<StreamMuxerEvent, QuicError>> {
        Poll::Pending
    }
}
