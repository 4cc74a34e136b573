//! Streams whose first bytes do not wait until the peer has agreed to the protocol: calls, and the two streams of a circuit
//! over a relay. Each saves the round trip that agreeing takes.
//!
//! multistream-select can do so itself, but for all streams or none; and while the answer is outstanding it flushes the stream
//! whenever it is read, so that of two tasks that read and write, one takes the other's place to be woken at (0023). So it is
//! done below: once the name of such a protocol has been written, the stream gives the answer that is hoped for, and the peer's
//! own answer is compared with it when the first bytes behind it are read.

use std::io::ErrorKind;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures::{AsyncRead, AsyncWrite};
use libp2p::core::muxing::StreamMuxer;

use super::muxer::Wrapped;

/// What opens such a stream, and the answer of a peer that agrees is the same: the version of multistream-select and a name, each
/// with its length. A name must not be offered together with others, and what follows it must not look like another one: a
/// peer that does not know the name takes what follows for the next offer.
const OFFERS: [&[u8]; 3] = [
    b"\x13/multistream/1.0.0\n\x13/lattica/rpc/2.0.0\n",
    b"\x13/multistream/1.0.0\n\x20/libp2p/circuit/relay/0.2.0/hop\n",
    b"\x13/multistream/1.0.0\n\x21/libp2p/circuit/relay/0.2.0/stop\n",
];
/// No offer is longer.
const OFFER_MAX_BYTES: usize = 64;

/// A connection whose outgoing streams are [`Early`].
pub(super) fn connection<M: StreamMuxer>(inner: M) -> Wrapped<M, Early<M::Substream>> {
    Wrapped::new(inner, |inner| Early { inner, state: State::Settled }, Early::outgoing)
}

/// A stream that is written to before the peer has agreed to its protocol. Where the peer does not, the first read behind the
/// answer that was assumed fails, with [`ErrorKind::Unsupported`] if it says so.
pub(super) struct Early<S> {
    inner: S,
    state: State,
}

#[derive(Clone, Copy)]
enum State {
    /// Written so far are the first `said` bytes of `offer`, nothing else.
    Naming { offer: &'static [u8], said: usize },
    /// All of `offer` was written. Of the answer, `told` bytes were given to the reader and `heard` bytes came from the peer.
    Assumed { offer: &'static [u8], told: usize, heard: usize },
    /// The peer's answer is another one.
    Refused,
    /// Bytes pass as they are.
    Settled,
}

impl State {
    /// After `bytes` were written.
    fn said(self, bytes: &[u8]) -> Self {
        let Self::Naming { offer, said } = self else { return self };
        let (before, n) = (&offer[..said], said + bytes.len());
        match OFFERS.into_iter().find(|o| o.strip_prefix(before).is_some_and(|rest| rest.starts_with(bytes)))
        {
            Some(offer) if offer.len() == n => Self::Assumed { offer, told: 0, heard: 0 },
            Some(offer) => Self::Naming { offer, said: n },
            None => Self::Settled,
        }
    }
}

impl<S> Early<S> {
    fn outgoing(inner: S) -> Self {
        Self { inner, state: State::Naming { offer: OFFERS[0], said: 0 } }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Early<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut [u8],
    ) -> Poll<std::io::Result<usize>> {
        let this = &mut *self;
        loop {
            match &mut this.state {
                State::Settled => return Pin::new(&mut this.inner).poll_read(cx, buf),
                State::Naming { .. } => {
                    let n_bytes = ready!(Pin::new(&mut this.inner).poll_read(cx, buf))?;
                    // Whoever reads before all is said waits for the true answer.
                    this.state = State::Settled;
                    return Poll::Ready(Ok(n_bytes));
                }
                State::Assumed { offer, told, .. } if *told < offer.len() => {
                    let n_bytes = buf.len().min(offer.len() - *told);
                    buf[..n_bytes].copy_from_slice(&offer[*told..*told + n_bytes]);
                    *told += n_bytes;
                    return Poll::Ready(Ok(n_bytes));
                }
                State::Assumed { offer, heard, .. } => {
                    let expected = &offer[*heard..];
                    let mut answer = [0; OFFER_MAX_BYTES];
                    let answer = &mut answer[..expected.len()];
                    let n_bytes = ready!(Pin::new(&mut this.inner).poll_read(cx, answer))?;
                    if n_bytes == 0 {
                        return Poll::Ready(Err(ErrorKind::UnexpectedEof.into()));
                    }
                    *heard += n_bytes;
                    if answer[..n_bytes] != expected[..n_bytes] {
                        this.state = State::Refused;
                    } else if n_bytes == expected.len() {
                        this.state = State::Settled;
                    }
                }
                State::Refused => {
                    let refused = "the peer does not speak the protocol";
                    return Poll::Ready(Err(std::io::Error::new(ErrorKind::Unsupported, refused)));
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Early<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        self.state = self.state.said(&buf[..written]);
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
    use std::collections::VecDeque;

    use futures::FutureExt as _;
    use futures::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use libp2p::{StreamProtocol, relay};

    use super::super::rpc_client::RPC_PROTOCOL;
    use super::*;

    /// The other end of a stream: what it sends, in pieces that come one at a time, and what it got.
    #[derive(Default)]
    struct Peer {
        sends: VecDeque<Vec<u8>>,
        /// Nothing follows what it sends.
        ended: bool,
        got: Vec<u8>,
        /// It takes this much at a time; 0 is everything.
        takes: usize,
        n_flushes: usize,
    }

    impl AsyncRead for Peer {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut [u8],
        ) -> Poll<std::io::Result<usize>> {
            let Some(piece) = self.sends.front_mut() else {
                return if self.ended { Poll::Ready(Ok(0)) } else { Poll::Pending };
            };
            let n_bytes = piece.len().min(buf.len());
            buf[..n_bytes].copy_from_slice(&piece[..n_bytes]);
            piece.drain(..n_bytes);
            if piece.is_empty() {
                self.sends.pop_front();
            }
            Poll::Ready(Ok(n_bytes))
        }
    }

    impl AsyncWrite for Peer {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &[u8],
        ) -> Poll<std::io::Result<usize>> {
            let n_bytes = if self.takes == 0 { buf.len() } else { buf.len().min(self.takes) };
            self.got.extend_from_slice(&buf[..n_bytes]);
            Poll::Ready(Ok(n_bytes))
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            self.n_flushes += 1;
            Poll::Ready(Ok(()))
        }

        fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<std::io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// How multistream-select offers a protocol, and agrees to it.
    fn offer(protocol: &str) -> Vec<u8> {
        let lines = ["/multistream/1.0.0", protocol].map(|line| {
            let length = u8::try_from(line.len() + 1).unwrap();
            assert!(length < 0x80, "its length takes one byte");
            [&[length], line.as_bytes(), b"\n"].concat()
        });
        lines.concat()
    }

    fn names() -> [StreamProtocol; 3] {
        [RPC_PROTOCOL, relay::HOP_PROTOCOL_NAME, relay::STOP_PROTOCOL_NAME]
    }

    /// A stream to a peer that sends `pieces`, whose opener has said `name` in one go, as multistream-select does.
    fn opened(name: &str, pieces: &[&[u8]]) -> Early<Peer> {
        let sends = pieces.iter().map(|piece| piece.to_vec()).collect();
        let mut stream = Early::outgoing(Peer { sends, ended: true, ..Peer::default() });
        now(stream.write_all(&offer(name)));
        now(stream.flush());
        stream
    }

    /// What `work` comes to, without waiting for anything.
    fn now<T>(work: impl Future<Output = std::io::Result<T>>) -> T {
        work.now_or_never().expect("at once").unwrap()
    }

    /// Reads the answer, as multistream-select does, and leaves the stream to the protocol.
    fn agree(stream: &mut Early<Peer>, name: &str) {
        for expected in offer(name) {
            let mut byte = [0];
            now(stream.read_exact(&mut byte));
            assert_eq!(byte[0], expected);
        }
    }

    #[test]
    fn the_offers_are_those_of_the_protocols() {
        assert_eq!(OFFERS.map(<[u8]>::to_vec), names().map(|name| offer(name.as_ref())));
        assert!(OFFERS.iter().all(|offer| offer.len() <= OFFER_MAX_BYTES));
    }

    #[test]
    fn the_answer_is_there_at_once_and_first_bytes_leave_with_the_name() {
        for name in names() {
            let mut stream = opened(name.as_ref(), &[]);
            stream.inner.ended = false;
            agree(&mut stream, name.as_ref());
            // Who only writes is never held up.
            now(stream.write_all(b"first bytes"));
            assert_eq!(stream.inner.got, [&offer(name.as_ref())[..], b"first bytes"].concat());
            // Reading waits for the peer, and leaves the writer's place to be woken at alone.
            let n_flushes = stream.inner.n_flushes;
            assert!(stream.read(&mut [0; 8]).now_or_never().is_none());
            stream.inner.sends.push_back([&offer(name.as_ref())[..], b"late"].concat());
            let mut late = [0; 4];
            now(stream.read_exact(&mut late));
            assert_eq!((&late, stream.inner.n_flushes), (b"late", n_flushes));
        }
    }

    #[test]
    fn a_name_may_be_written_in_pieces() {
        for takes in [1, 7, 20, 21, 39] {
            let mut stream = Early::outgoing(Peer { takes, ..Peer::default() });
            now(stream.write_all(&offer(RPC_PROTOCOL.as_ref())));
            agree(&mut stream, RPC_PROTOCOL.as_ref());
        }
    }

    #[test]
    fn the_true_answer_is_taken_off_however_it_comes() {
        let name = RPC_PROTOCOL;
        let answer = offer(name.as_ref());
        let whole = [&answer[..], b"payload"].concat();
        let bytes: Vec<&[u8]> = whole.chunks(1).collect();
        let halves: Vec<&[u8]> = whole.chunks(whole.len() / 2 + 1).collect();
        for pieces in [&[&whole[..]][..], &bytes, &halves, &[&answer, b"payload"]] {
            let mut stream = opened(name.as_ref(), pieces);
            agree(&mut stream, name.as_ref());
            let mut payload = String::new();
            now(stream.read_to_string(&mut payload));
            assert_eq!(payload, "payload");
        }
    }

    #[test]
    fn a_peer_that_does_not_agree_fails_the_first_read_and_each_after_it() {
        let header: &[u8] = b"\x13/multistream/1.0.0\n";
        let refusal: &[u8] = b"\x13/multistream/1.0.0\n\x03na\n";
        let other = offer("/lattica/rpc/1.0.0");
        for (pieces, kind) in [
            (vec![refusal], ErrorKind::Unsupported),
            (refusal.chunks(1).collect(), ErrorKind::Unsupported),
            (vec![&other], ErrorKind::Unsupported),
            (vec![header], ErrorKind::UnexpectedEof),
            (vec![], ErrorKind::UnexpectedEof),
        ] {
            let mut stream = opened(RPC_PROTOCOL.as_ref(), &pieces);
            agree(&mut stream, RPC_PROTOCOL.as_ref());
            for _ in 0..2 {
                let error = stream.read(&mut [0; 8]).now_or_never().expect("at once").unwrap_err();
                assert_eq!(error.kind(), kind, "{pieces:?}");
            }
        }
    }

    #[test]
    fn whatever_else_is_written_passes_as_it_is() {
        let gate = crate::access::hello(&[7; crate::access::FIELD_BYTES]);
        let longer = offer("/lattica/rpc/2.0.0/more");
        let in_one_go = [&offer(RPC_PROTOCOL.as_ref())[..], b"payload"].concat();
        for said in [&gate[..], &offer("/lattica/link/1.0.0"), &longer, &in_one_go] {
            let sends = VecDeque::from([b"what the peer says".to_vec()]);
            let mut stream = Early::outgoing(Peer { sends, ended: true, ..Peer::default() });
            now(stream.write_all(said));
            let mut heard = String::new();
            now(stream.read_to_string(&mut heard));
            assert_eq!((&stream.inner.got[..], &heard[..]), (said, "what the peer says"));
        }
    }

    #[test]
    fn who_reads_before_the_name_is_said_gets_the_true_answer() {
        let mut stream =
            Early::outgoing(Peer { sends: [b"one".to_vec(), b"two".to_vec()].into(), ..Peer::default() });
        now(stream.read_exact(&mut [0; 3]));
        now(stream.write_all(&offer(RPC_PROTOCOL.as_ref())));
        let mut heard = [0; 3];
        now(stream.read_exact(&mut heard));
        assert_eq!(&heard, b"two");
    }
}
