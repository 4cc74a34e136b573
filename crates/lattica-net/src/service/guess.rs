//! Carries out what [`crate::punch::guess`] is about: the agreement over the relayed connection, the many sockets of one side,
//! the many guesses of the other, and the socket that is met handed to QUIC. The side that guessed dials through it.

use std::io::{Error, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt as _};
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::StreamProtocol;
use rand::RngExt as _;
use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::connection::{Connection, Incoming, OpenError};
use super::driver::Command;
use super::frames::{FrameReader, write_all};
use super::punch::is_direct;
use super::shared::Shared;
use crate::addr::is_plausible;
use crate::punch::PunchDial;
use crate::punch::guess::{
    GUESS_PAUSE, GUESS_TIMEOUT, GUESSES_AT_ONCE, GuessMessage, GuessOffer, Mapping, Packet, SOCKETS, Secret,
    guesses, mapping, multiaddr, quic_address,
};
use crate::wire::{decode_guess, encode_guess};

/// The protocol of the agreement.
pub(crate) const GUESS_PROTOCOL: StreamProtocol = StreamProtocol::new("/lattica/punch/1.0.0");
/// The agreement takes two round trips over the relay.
const AGREEMENT_TIMEOUT: Duration = Duration::from_secs(5);
/// A packet that may have been lost is sent again after this long: four times at most.
const RESEND_AFTER: Duration = Duration::from_secs(1);
/// Sockets that are opened before other tasks have their turn.
const OPENED_AT_ONCE: usize = 32;
/// Longest datagram that is read: QUIC's first are 1200 bytes.
const DATAGRAM_MAX_BYTES: usize = 1500;

/// This node's part.
struct Part {
    offer: GuessOffer,
    /// The socket to guess from, where the own NAT keeps ports.
    guesser: Option<UdpSocket>,
}

impl Part {
    /// `None` when nobody tells over QUIC and IPv4 where this node is seen.
    async fn new(shared: &Shared) -> std::io::Result<Option<Self>> {
        let (reply, answer) = oneshot::channel();
        shared.command(Command::ListenAddrs { reply }).await.map_err(Error::other)?;
        let listened = answer.await.unwrap_or_default();
        let listened: Vec<SocketAddrV4> =
            listened.iter().filter_map(|address| quic_address(&address.to_string())).collect();
        let ports: Vec<u16> = listened.iter().map(SocketAddrV4::port).collect();
        let seen = mapping(&ports, shared.seen_at.borrow().iter().map(String::as_str));
        let Some((ip, mapping)) = seen else { return Ok(None) };
        let guesser = match mapping {
            Mapping::Kept => Some(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?),
            Mapping::Changed => None,
        };
        let port = guesser.as_ref().map(UdpSocket::local_addr).transpose()?.map(|address| address.port());
        Ok(Some(Self { offer: GuessOffer { nonce: rand::rng().random(), ip, port }, guesser }))
    }

    /// Whether the two parts fit together, and the peer names no address that is nearer than the relay.
    fn fits(&self, theirs: &GuessOffer, relay: &str) -> bool {
        let named = multiaddr(SocketAddrV4::new(theirs.ip, theirs.port.unwrap_or(1)));
        self.offer.port.is_some() != theirs.port.is_some() && is_plausible(&named, relay)
    }
}

/// Asks the peer at the other end of a relayed connection to take part. `Ok(false)` when it does not, or nothing was met; after
/// `Ok(true)` a connection may be about to stand.
pub(crate) async fn ask(shared: &Arc<Shared>, connection: &Connection) -> std::io::Result<bool> {
    let Ok(_one) = shared.guessing.try_acquire() else { return Ok(false) };
    let Some(part) = Part::new(shared).await? else { return Ok(false) };
    let stream = match connection.open(GUESS_PROTOCOL).await {
        Ok(stream) => stream,
        Err(OpenError::Io(error)) => return Err(error),
        Err(OpenError::Unsupported) => return Err(ErrorKind::Unsupported.into()),
        Err(OpenError::Timeout) => return Err(ErrorKind::TimedOut.into()),
        Err(OpenError::Lost) => return Err(ErrorKind::ConnectionReset.into()),
    };
    let (reader, mut writer) = stream.split();
    let mut reader = FrameReader::new(reader, AGREEMENT_TIMEOUT);
    let agreeing = async {
        say(&mut writer, GuessMessage::Offer(part.offer)).await?;
        reader.header(decode_guess).await
    };
    let Some(GuessMessage::Offer(theirs)) = timeout(AGREEMENT_TIMEOUT, agreeing).await?? else {
        return Ok(false);
    };
    if !part.fits(&theirs, &connection.address) || !connection.state.may_guess(shared.now()) {
        return Ok(false);
    }
    let secret = Secret::new(&part.offer.nonce, &theirs.nonce);
    timeout(GUESS_TIMEOUT, meet(shared, connection, part, &theirs, &secret, (&mut reader, &mut writer)))
        .await??;
    Ok(true)
}

/// The other side of [`ask`].
pub(crate) async fn answer(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    stream: libp2p::Stream,
    place: Incoming,
) {
    let answering = async {
        let (reader, mut writer) = stream.split();
        let mut reader = FrameReader::new(reader, AGREEMENT_TIMEOUT);
        let Some(GuessMessage::Offer(theirs)) = reader.header(decode_guess).await? else {
            return Err(Error::new(ErrorKind::InvalidData, "an offer was expected"));
        };
        let one = shared.guessing.try_acquire();
        let needed = connection.is_relayed() && !is_direct(&shared, &connection) && one.is_ok();
        let part = if needed { Part::new(&shared).await? } else { None };
        let Some(part) = part.filter(|part| {
            part.fits(&theirs, &connection.address) && connection.state.may_guess(shared.now())
        }) else {
            return say(&mut writer, GuessMessage::No).await;
        };
        say(&mut writer, GuessMessage::Offer(part.offer)).await?;
        let secret = Secret::new(&theirs.nonce, &part.offer.nonce);
        let meeting = meet(&shared, &connection, part, &theirs, &secret, (&mut reader, &mut writer));
        // No longer than the peer tries, so that the place is free for others then.
        timeout(GUESS_TIMEOUT, meeting).await?
    };
    let answering = timeout(AGREEMENT_TIMEOUT + GUESS_TIMEOUT, answering);
    if let Some(Ok(Err(error))) = connection.until_closed(&shared, answering).await {
        tracing::debug!(peer = %connection.peer.short(), %error, "no port was met");
    }
    drop(place);
}

async fn say(
    writer: &mut futures::io::WriteHalf<libp2p::Stream>,
    message: GuessMessage,
) -> std::io::Result<()> {
    write_all(writer, &encode_guess(message)).await?;
    writer.flush().await
}

type Halves<'a> = (
    &'a mut FrameReader<futures::io::ReadHalf<libp2p::Stream>>,
    &'a mut futures::io::WriteHalf<libp2p::Stream>,
);

/// What follows once both sides take part.
async fn meet(
    shared: &Arc<Shared>,
    connection: &Connection,
    part: Part,
    theirs: &GuessOffer,
    secret: &Secret,
    (reader, writer): Halves<'_>,
) -> std::io::Result<()> {
    match (part.guesser, theirs.port) {
        (Some(socket), None) => {
            // Until the peer's NAT lets us in, every guess is lost.
            let Some(GuessMessage::Open) = reader.header(decode_guess).await? else {
                return Err(Error::new(ErrorKind::InvalidData, "the peer opens nothing"));
            };
            let (socket, remote) = guess(socket, theirs.ip, secret).await?;
            shared.adopted.adopt(socket.into_std()?, remote)?;
            let dial = PunchDial { addresses: vec![multiaddr(remote)], as_listener: false, fresh_port: true };
            let dials = vec![dial];
            shared
                .command(Command::Punch { peer: connection.peer.clone(), dials })
                .await
                .map_err(Error::other)?;
            tracing::debug!(peer = %connection.peer.short(), %remote, "a guessed port was met");
        }
        (None, Some(port)) => {
            let remote = SocketAddrV4::new(theirs.ip, port);
            let sockets = open(remote, secret).await?;
            say(writer, GuessMessage::Open).await?;
            let socket = be_met(sockets, remote, secret).await?;
            shared.adopted.adopt(socket.into_std()?, remote)?;
        }
        _ => return Err(Error::other("the parts do not fit")),
    }
    Ok(())
}

/// Guesses until one is met, and chooses it.
async fn guess(
    socket: UdpSocket,
    ip: Ipv4Addr,
    secret: &Secret,
) -> std::io::Result<(UdpSocket, SocketAddrV4)> {
    let (packet, chosen) = (secret.packet(Packet::Guess), secret.packet(Packet::Chosen));
    let mut ports = guesses(rand::rng().random());
    let mut pace = interval(GUESS_PAUSE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut datagram = [0; DATAGRAM_MAX_BYTES];
    loop {
        tokio::select! {
            received = socket.recv_from(&mut datagram) => {
                // Errors are guesses that were refused on their way.
                let Ok((n, SocketAddr::V4(from))) = received else { continue };
                if *from.ip() == ip && secret.read(&datagram[..n]) == Some(Packet::Met) {
                    // Should this one be lost, QUIC's first packet says the same.
                    let _ = socket.send_to(&chosen, from).await;
                    return Ok((socket, from));
                }
            }
            _ = pace.tick(), if ports.size_hint().0 > 0 => {
                for port in ports.by_ref().take(GUESSES_AT_ONCE) {
                    let _ = socket.send_to(&packet, SocketAddrV4::new(ip, port)).await;
                }
            }
        }
    }
}

/// Opens the sockets, each with a mapping of its own that lets `remote` in.
async fn open(remote: SocketAddrV4, secret: &Secret) -> std::io::Result<Vec<UdpSocket>> {
    let packet = secret.packet(Packet::Open);
    let mut sockets = Vec::with_capacity(SOCKETS);
    for n in 0..SOCKETS {
        // Sent before tokio knows the socket: it refuses to try until it has heard that the socket can be written to.
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        let _ = socket.send_to(&packet, remote);
        sockets.push(UdpSocket::from_std(socket)?);
        if n % OPENED_AT_ONCE == 0 {
            tokio::task::yield_now().await;
        }
    }
    Ok(sockets)
}

/// Waits until the peer has chosen one of the sockets; the others are closed.
async fn be_met(
    sockets: Vec<UdpSocket>,
    remote: SocketAddrV4,
    secret: &Secret,
) -> std::io::Result<UdpSocket> {
    let mut all: FuturesUnordered<_> =
        sockets.into_iter().map(|socket| be_chosen(socket, remote, secret)).collect();
    all.next().await.ok_or_else(|| Error::other("there are no sockets"))
}

async fn be_chosen(socket: UdpSocket, remote: SocketAddrV4, secret: &Secret) -> UdpSocket {
    let mut says = Packet::Open;
    let mut datagram = vec![0; DATAGRAM_MAX_BYTES];
    loop {
        tokio::select! {
            received = socket.peek_from(&mut datagram) => {
                let said = match received {
                    Ok((n, from)) if from == SocketAddr::from(remote) => Some(secret.read(&datagram[..n])),
                    // A stranger's, or an error: a packet of ours that was refused on its way.
                    Ok(_) | Err(_) => None,
                };
                // Who was told that it met a socket begins to speak QUIC there, and that packet is left to QUIC.
                if said == Some(None) && says == Packet::Met {
                    return socket;
                }
                let _ = socket.try_recv_from(&mut datagram);
                match said.flatten() {
                    Some(Packet::Guess) => says = Packet::Met,
                    Some(Packet::Chosen) => return socket,
                    Some(_) | None => continue,
                }
            }
            () = sleep(RESEND_AFTER) => {}
        }
        let _ = socket.send_to(&secret.packet(says), remote).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Without a NAT every socket has a port of its own, as behind one that changes ports. By chance a try fails once in 3,400.
    #[tokio::test]
    async fn a_guess_meets_one_of_the_sockets_and_both_sides_take_the_same_pair() {
        for _ in 0..3 {
            if timeout(GUESS_TIMEOUT, meets()).await.is_ok() {
                return;
            }
        }
        panic!("nothing was met in three tries");
    }

    /// A guess that arrives where nothing was sent from is lost.
    #[tokio::test]
    async fn sockets_have_sent_when_they_are_open() {
        let guesser = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        guesser.set_nonblocking(true).unwrap();
        let SocketAddr::V4(at_guesser) = guesser.local_addr().unwrap() else { panic!("asked for IPv4") };
        let sockets = open(at_guesser, &Secret::new(&[1; 16], &[2; 16])).await.unwrap();
        let mut from = std::collections::HashSet::new();
        while let Ok((_, address)) = guesser.recv_from(&mut [0; 64]) {
            from.insert(address.port());
        }
        // A system may drop what does not fit into the guesser's buffer.
        assert!(from.len() > SOCKETS / 4, "{} of {} sockets", from.len(), sockets.len());
    }

    async fn meets() {
        let secret = Secret::new(&[1; 16], &[2; 16]);
        let guesser = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let SocketAddr::V4(at_guesser) = guesser.local_addr().unwrap() else { panic!("asked for IPv4") };
        let sockets = open(at_guesser, &secret).await.unwrap();
        assert_eq!(sockets.len(), SOCKETS);
        // A forged packet from the same address does not count.
        let forged = Secret::new(&[3; 16], &[2; 16]).packet(Packet::Chosen);
        let port = sockets[0].local_addr().unwrap().port();
        guesser.send_to(&forged, (Ipv4Addr::LOCALHOST, port)).await.unwrap();
        let (guessed, met) =
            tokio::join!(guess(guesser, Ipv4Addr::LOCALHOST, &secret), be_met(sockets, at_guesser, &secret));
        let ((guesser, remote), socket) = (guessed.unwrap(), met.unwrap());
        assert_eq!(socket.local_addr().unwrap().port(), remote.port());
        guesser.send_to(b"through", remote).await.unwrap();
        let mut bytes = [0; 64];
        loop {
            let (n, _) = socket.recv_from(&mut bytes).await.unwrap();
            // A choice that was sent again may still be on its way.
            if secret.read(&bytes[..n]).is_none() {
                assert_eq!(&bytes[..n], b"through");
                return;
            }
        }
    }
}
