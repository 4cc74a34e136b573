//! The gate of a private swarm: part of every transport, below all protocols. A connection that does not pass is never
//! seen by the swarm, so that nothing, not even identify, is said to whoever is at its other end.
//!
//! It runs on the first stream of the encrypted connection: hello and nonce; nonce and proof; proof. The dialler may go on
//! after one round trip.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::PeerId as LibPeerId;
use libp2p::core::muxing::{StreamMuxerBox, StreamMuxerExt, SubstreamBox};
use libp2p::core::{ConnectedPoint, Endpoint};
use rand::RngExt as _;
use swarm_wire::PeerId;

use super::wire_peer;
use crate::access::{
    Access, FIELD_BYTES, HELLO_BYTES, Nonce, Refusal, Role, Session, Verdict, hello, read_hello,
};

/// The handshake has to be over after this long.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the other end gets to read why it was refused.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Clone)]
pub(super) struct Gate {
    local: PeerId,
    network: Arc<str>,
    access: Arc<Access>,
}

/// A connection was refused; for the chain of sources of a dial error.
#[derive(Debug, thiserror::Error)]
#[error("refused")]
pub(super) struct Refused(#[source] pub(super) PeerRefused);

/// Who was refused, and why.
#[derive(Debug, Clone, thiserror::Error)]
#[error("peer {peer} does not belong to this swarm: {refusal}")]
pub(super) struct PeerRefused {
    pub(super) peer: String,
    pub(super) refusal: Refusal,
}

impl Gate {
    pub(super) fn new(local: PeerId, network: &str, access: Access) -> Self {
        Self { local, network: network.into(), access: Arc::new(access) }
    }

    /// Lets a fresh connection through, or says why not. Dropping the future drops the connection.
    pub(super) async fn pass(
        self,
        (peer_id, mut muxer): (LibPeerId, StreamMuxerBox),
        endpoint: ConnectedPoint,
    ) -> Result<(LibPeerId, StreamMuxerBox), Refused> {
        if self.access.is_open() {
            return Ok((peer_id, muxer));
        }
        let refused = |refusal| {
            tracing::warn!(peer = %peer_id, address = %endpoint.get_remote_address(), reason = %refusal, "connection refused");
            Refused(PeerRefused { peer: peer_id.to_string(), refusal })
        };
        let Ok(peer) = wire_peer(&peer_id) else { return Err(refused(Refusal::NoProof)) };
        // In a punched hole one of two diallers plays the listener.
        let dialled = match endpoint {
            ConnectedPoint::Dialer { role_override, .. } => role_override == Endpoint::Dialer,
            ConnectedPoint::Listener { .. } => false,
        };
        let handshake = async {
            if dialled { self.dial(&peer, &mut muxer).await } else { self.listen(&peer, &mut muxer).await }
        };
        match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(())) => Ok((peer_id, muxer)),
            Ok(Err(refusal)) => Err(refused(refusal)),
            Err(_) => Err(refused(Refusal::Timeout)),
        }
    }

    async fn dial(&self, peer: &PeerId, muxer: &mut StreamMuxerBox) -> Result<(), Refusal> {
        if !self.access.allows(peer) {
            return Err(Refusal::NotAllowed);
        }
        let Some(key) = &self.access.key else { return Ok(()) };
        let mut stream = substream(muxer, StreamMuxerExt::poll_outbound_unpin).await?;
        let nonce = fresh();
        drive(muxer, send(&mut stream, &hello(&nonce))).await?;
        let mut verdict = [0; 1];
        // A peer without the handshake resets a stream whose first bytes it does not understand.
        drive(muxer, read(&mut stream, &mut verdict)).await?;
        Verdict::check(verdict[0])?;
        let mut answer = [0; 2 * FIELD_BYTES];
        drive(muxer, read(&mut stream, &mut answer)).await?;
        let ([listener_nonce, proof], []) = answer.as_chunks::<FIELD_BYTES>() else {
            unreachable!("the answer is two fields long")
        };
        let session = Session {
            network: &self.network,
            dialler: &self.local,
            listener: peer,
            dialler_nonce: &nonce,
            listener_nonce,
        };
        if !key.verify(Role::Listener, &session, proof) {
            last_words(muxer, &mut stream, Verdict::WrongKey).await;
            return Err(Refusal::WrongKey);
        }
        let mut message = [Verdict::Go as u8; 1 + FIELD_BYTES];
        message[1..].copy_from_slice(&key.prove(Role::Dialler, &session));
        drive(muxer, async {
            send(&mut stream, &message).await?;
            // Whether the other end has closed it already makes no difference.
            let _ = stream.close().await;
            Ok(())
        })
        .await
    }

    async fn listen(&self, peer: &PeerId, muxer: &mut StreamMuxerBox) -> Result<(), Refusal> {
        let allowed = self.access.allows(peer);
        let Some(key) = &self.access.key else {
            return if allowed { Ok(()) } else { Err(Refusal::NotAllowed) };
        };
        let mut stream = substream(muxer, StreamMuxerExt::poll_inbound_unpin).await?;
        let mut first = [0; HELLO_BYTES];
        drive(muxer, read(&mut stream, &mut first)).await?;
        let dialler_nonce = read_hello(&first)?;
        if !allowed {
            last_words(muxer, &mut stream, Verdict::NotAllowed).await;
            return Err(Refusal::NotAllowed);
        }
        let nonce = fresh();
        let session = Session {
            network: &self.network,
            dialler: peer,
            listener: &self.local,
            dialler_nonce: &dialler_nonce,
            listener_nonce: &nonce,
        };
        let mut answer = [Verdict::Go as u8; 1 + 2 * FIELD_BYTES];
        answer[1..=FIELD_BYTES].copy_from_slice(&nonce);
        answer[1 + FIELD_BYTES..].copy_from_slice(&key.prove(Role::Listener, &session));
        drive(muxer, send(&mut stream, &answer)).await?;
        let mut verdict = [0; 1];
        drive(muxer, read(&mut stream, &mut verdict)).await?;
        Verdict::check(verdict[0])?;
        let mut proof = [0; FIELD_BYTES];
        drive(muxer, read(&mut stream, &mut proof)).await?;
        if !key.verify(Role::Dialler, &session, &proof) {
            last_words(muxer, &mut stream, Verdict::WrongKey).await;
            return Err(Refusal::WrongKey);
        }
        Ok(())
    }
}

fn fresh() -> Nonce {
    rand::rng().random()
}

async fn send(stream: &mut SubstreamBox, bytes: &[u8]) -> Result<(), Refusal> {
    let sent = async {
        stream.write_all(bytes).await?;
        stream.flush().await
    };
    sent.await.map_err(|_| Refusal::NoProof)
}

async fn read(stream: &mut SubstreamBox, bytes: &mut [u8]) -> Result<(), Refusal> {
    stream.read_exact(bytes).await.map_err(|_| Refusal::NoProof)
}

/// Tells the other end why it is refused and waits a moment until it has hung up, else the reason might be lost with the
/// connection.
async fn last_words(muxer: &mut StreamMuxerBox, stream: &mut SubstreamBox, verdict: Verdict) {
    let telling = drive(muxer, async {
        send(stream, &[verdict as u8]).await?;
        let _ = stream.close().await;
        let mut rest = [0; 64];
        while stream.read(&mut rest).await.is_ok_and(|n| n > 0) {}
        Ok(())
    });
    let _ = tokio::time::timeout(LAST_WORDS, telling).await;
}

/// A stream of `muxer`, from `poll`.
async fn substream(
    muxer: &mut StreamMuxerBox,
    poll: impl Fn(&mut StreamMuxerBox, &mut Context<'_>) -> Poll<std::io::Result<SubstreamBox>>,
) -> Result<SubstreamBox, Refusal> {
    poll_fn(|cx| {
        while let Poll::Ready(event) = muxer.poll_unpin(cx) {
            if event.is_err() {
                return Poll::Ready(Err(Refusal::Broken));
            }
        }
        poll(muxer, cx).map_err(|_| Refusal::Broken)
    })
    .await
}

/// Runs `work` on a stream of `muxer`, which moves no byte unless it is polled.
async fn drive<T>(
    muxer: &mut StreamMuxerBox,
    work: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refusal> {
    let mut work = std::pin::pin!(work);
    let mut broken = false;
    poll_fn(|cx| {
        while let (false, Poll::Ready(event)) = (broken, muxer.poll_unpin(cx)) {
            broken = event.is_err();
        }
        // What arrived before the end can still be read.
        match work.as_mut().poll(cx) {
            Poll::Pending if broken => Poll::Ready(Err(Refusal::Broken)),
            polled => polled,
        }
    })
    .await
}
