//! Ports that are guessed for TCP: many connections begun on one side, many tried on the other, all from one port. The two first
//! packets that meet become one connection on both sides (a simultaneous open), which therefore nobody accepts.
//!
//! An open port of somebody else may answer a guess. So nothing is said there until the peer has shown that it knows the
//! secret; then the one connection is chosen, and the others end.

use std::io::{Error, ErrorKind, Result};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::task::Poll;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, ready};
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::punch::guess::{PACKET_BYTES, Packet, STANDING, Secret, tcp_pause};

/// Connections that are begun before other tasks have their turn.
const BEGUN_AT_ONCE: usize = 32;

/// A connection whose first packet has left.
pub(super) type Begun = BoxFuture<'static, Result<TcpStream>>;
/// A connection that met the peer, and where.
type Met = (TcpStream, SocketAddrV4);

/// A port that this machine gives to nobody else, from which all guesses of a try leave.
pub(super) struct Port {
    pub(super) number: u16,
    /// Holds the port.
    _socket: TcpSocket,
}

impl Port {
    pub(super) fn new() -> Result<Self> {
        let socket = socket_at(0)?;
        Ok(Self { number: socket.local_addr()?.port(), _socket: socket })
    }
}

/// A socket that shares its port with others of this kind.
fn socket_at(port: u16) -> Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    #[cfg(all(unix, not(any(target_os = "solaris", target_os = "illumos"))))]
    socket.set_reuseport(true)?;
    socket.set_nodelay(true)?;
    socket.bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port).into())?;
    Ok(socket)
}

/// Tries the ports until the peer is met at one, and chooses that connection. Each guess `stands` for as long, and waits as long
/// again for the peer's first bytes.
pub(super) async fn guess(
    from: &Port,
    ip: Ipv4Addr,
    mut ports: impl Iterator<Item = u16>,
    stands: Duration,
    secret: &Secret,
) -> Result<Met> {
    let mut standing: FuturesUnordered<BoxFuture<'_, Option<Met>>> = FuturesUnordered::new();
    let mut pace = interval(tcp_pause(stands));
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut next = ports.next();
    loop {
        tokio::select! {
            Some(ended) = standing.next() => {
                if let Some((mut stream, remote)) = ended {
                    stream.write_all(&secret.packet(Packet::Chosen)).await?;
                    return Ok((stream, remote));
                }
            }
            _ = pace.tick(), if next.is_some() && standing.len() < STANDING => {
                if let Some(port) = next {
                    let socket = socket_at(from.number)?;
                    standing.push(attempt(socket, SocketAddrV4::new(ip, port), stands, secret).boxed());
                    next = ports.next();
                }
            }
            else => return Err(Error::new(ErrorKind::NotFound, "no guess met the peer")),
        }
    }
}

/// One guess: the connection, if the peer is at its other end.
async fn attempt(socket: TcpSocket, remote: SocketAddrV4, stands: Duration, secret: &Secret) -> Option<Met> {
    let mut stream = timeout(stands, socket.connect(remote.into())).await.ok()?.ok()?;
    let said = timeout(stands, first_packet(&mut stream, secret)).await.ok()??;
    (said == Packet::Met).then_some((stream, remote))
}

/// Begins as many connections, each with a mapping of its own that lets `remote` in.
pub(super) async fn open(remote: SocketAddrV4, n_connections: usize) -> Result<Vec<Begun>> {
    let mut all = Vec::with_capacity(n_connections);
    for n in 0..n_connections {
        let socket = TcpSocket::new_v4()?;
        socket.set_nodelay(true)?;
        let mut begun: Begun = socket.connect(remote.into()).boxed();
        // The first packet leaves when the future is polled for the first time.
        let polled = futures::poll!(&mut begun);
        if let Poll::Ready(connected) = polled {
            begun = ready(Ok(connected?)).boxed();
        }
        all.push(begun);
        if n % BEGUN_AT_ONCE == 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(all)
}

/// Waits until the peer has met and chosen one of the connections; the others end.
pub(super) async fn be_met(begun: Vec<Begun>, secret: &Secret) -> Result<TcpStream> {
    let mut all: FuturesUnordered<_> = begun.into_iter().map(|begun| be_chosen(begun, secret)).collect();
    while let Some(ended) = all.next().await {
        if let Some(stream) = ended {
            return Ok(stream);
        }
    }
    Err(Error::new(ErrorKind::ConnectionRefused, "every connection was refused"))
}

/// The connection, if it comes about and is the one that the peer chooses.
async fn be_chosen(begun: Begun, secret: &Secret) -> Option<TcpStream> {
    let mut stream = begun.await.ok()?;
    stream.write_all(&secret.packet(Packet::Met)).await.ok()?;
    let said = first_packet(&mut stream, secret).await?;
    (said == Packet::Chosen).then_some(stream)
}

/// What the peer says first, if it is a packet of this try. Nothing of what follows is read.
async fn first_packet(stream: &mut TcpStream, secret: &Secret) -> Option<Packet> {
    let mut bytes = [0; PACKET_BYTES];
    stream.read_exact(&mut bytes).await.ok()?;
    secret.read(&bytes)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);
    const STANDS: Duration = Duration::from_secs(10);

    fn secret() -> Secret {
        Secret::new(&[1; 16], &[2; 16])
    }

    /// Somebody at a port of loopback.
    async fn listener() -> (TcpListener, SocketAddrV4) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let at = SocketAddrV4::new(Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
        (listener, at)
    }

    /// Who holds a port where nobody is heard, and the port.
    fn closed_port() -> (TcpSocket, u16) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let port = socket.local_addr().unwrap().port();
        (socket, port)
    }

    #[tokio::test]
    async fn the_peer_is_met_among_strangers_who_are_told_nothing() {
        let (from, secret) = (Port::new().unwrap(), secret());
        let (silent, silent_at) = listener().await;
        let (talks, talks_at) = listener().await;
        let (peer, peer_at) = listener().await;
        let (_held, closed) = closed_port();
        let ports = [closed, silent_at.port(), talks_at.port(), peer_at.port()];
        let (met_strangers, go_on) = oneshot::channel();
        let strangers = async {
            let (mut silent, _) = silent.accept().await.unwrap();
            let (mut talks, _) = talks.accept().await.unwrap();
            talks.write_all(b"220 somebody else's server is ready\r\n").await.unwrap();
            met_strangers.send(()).unwrap();
            let mut heard = Vec::new();
            // An end or a reset: either way nothing was said.
            let _ = silent.read_to_end(&mut heard).await;
            let _ = talks.read_to_end(&mut heard).await;
            heard
        };
        let meeting = async {
            let (mut stream, at) = peer.accept().await.unwrap();
            go_on.await.unwrap();
            stream.write_all(&secret.packet(Packet::Met)).await.unwrap();
            let said = first_packet(&mut stream, &secret).await;
            stream.write_all(b"through").await.unwrap();
            (said, at.port())
        };
        let guessing = async {
            let met = guess(&from, Ipv4Addr::LOCALHOST, ports.into_iter(), STANDS, &secret).await;
            let (mut stream, remote) = met.unwrap();
            let mut through = [0; 7];
            stream.read_exact(&mut through).await.unwrap();
            (through, remote)
        };
        let all = async { tokio::join!(guessing, meeting, strangers) };
        let ((through, remote), (said, seen_at), heard) = timeout(PATIENCE, all).await.unwrap();
        assert_eq!((&through, remote), (b"through", peer_at));
        assert_eq!((said, seen_at), (Some(Packet::Chosen), from.number));
        assert!(heard.is_empty(), "{heard:?}");
    }

    #[tokio::test]
    async fn guesses_end_when_the_ports_do() {
        let (from, secret) = (Port::new().unwrap(), secret());
        let (_held, closed) = closed_port();
        let guessing = guess(&from, Ipv4Addr::LOCALHOST, [closed].into_iter(), STANDS, &secret);
        let error = timeout(PATIENCE, guessing).await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }

    /// Here the peer accepts them, which it cannot behind a NAT.
    #[tokio::test]
    async fn connections_are_begun_when_they_are_open_and_one_is_chosen_by_who_knows_the_secret() {
        let secret = secret();
        let (listener, at) = listener().await;
        let begun = open(at, BEGUN_AT_ONCE + 8).await.unwrap();
        let mut accepted = Vec::new();
        for _ in 0..begun.len() {
            accepted.push(timeout(PATIENCE, listener.accept()).await.unwrap().unwrap().0);
        }
        let choosing = async {
            for stream in &mut accepted[..3] {
                assert_eq!(first_packet(stream, &secret).await, Some(Packet::Met));
            }
            let forged = Secret::new(&[3; 16], &[2; 16]).packet(Packet::Chosen);
            accepted[0].write_all(&forged).await.unwrap();
            accepted[1].write_all(&secret.packet(Packet::Guess)).await.unwrap();
            accepted[2].write_all(&secret.packet(Packet::Chosen)).await.unwrap();
            accepted[2].write_all(b"through").await.unwrap();
            accepted[2].peer_addr().unwrap()
        };
        let meeting = async { tokio::join!(be_met(begun, &secret), choosing) };
        let (met, chosen_at) = timeout(PATIENCE, meeting).await.unwrap();
        let mut met = met.unwrap();
        assert_eq!(met.local_addr().unwrap(), chosen_at);
        let mut through = [0; 7];
        timeout(PATIENCE, met.read_exact(&mut through)).await.unwrap().unwrap();
        assert_eq!(&through, b"through");
    }

    #[tokio::test]
    async fn who_is_refused_everywhere_waits_no_longer() {
        let refused = || -> Begun { ready(Err(ErrorKind::ConnectionRefused.into())).boxed() };
        let error = be_met(vec![refused(), refused()], &secret()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
}
