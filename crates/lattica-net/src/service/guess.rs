//! Carries out what [`crate::punch::guess`] is about: the agreement over the relayed connection, the many sockets of one side,
//! the many guesses of the other (`udp`, `tcp`), and what is met handed to the transport. The side that guessed dials through it;
//! over TCP both sides dial, and the other one takes the listener's part.

use std::io::{Error, ErrorKind};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::Arc;
use std::time::Duration;

use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::StreamProtocol;
use rand::RngExt as _;
use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::connection::{Connection, Incoming, OpenError};
use super::driver::Command;
use super::frames::{FrameReader, write_all};
use super::punch::is_direct;
use super::shared::Shared;
use crate::punch::PunchDial;
use crate::punch::guess::{
    GuessMessage, GuessOffer, Mapping, SOCKETS, Secret, Way, guesses, mapping, stands,
};
use crate::wire::{decode_guess, encode_guess};

mod tcp;
mod udp;

/// The agreement takes two round trips over the relay.
const AGREEMENT_TIMEOUT: Duration = Duration::from_secs(5);

/// The protocol of the agreement.
pub(crate) const fn protocol(way: Way) -> StreamProtocol {
    StreamProtocol::new(match way {
        Way::Quic => "/lattica/punch/1.0.0",
        Way::Tcp => "/lattica/punch/tcp/1.0.0",
    })
}

/// This node's part.
struct Part {
    way: Way,
    offer: GuessOffer,
    /// What to guess from, where the own NAT keeps ports.
    guesser: Option<Guesser>,
}

enum Guesser {
    Quic(UdpSocket),
    Tcp(tcp::Port),
}

impl Guesser {
    async fn new(way: Way) -> std::io::Result<Self> {
        Ok(match way {
            Way::Quic => Self::Quic(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?),
            Way::Tcp => Self::Tcp(tcp::Port::new()?),
        })
    }

    fn port(&self) -> std::io::Result<u16> {
        match self {
            Self::Quic(socket) => socket.local_addr().map(|address| address.port()),
            Self::Tcp(port) => Ok(port.number),
        }
    }
}

impl Part {
    /// `None` when nobody beyond the NAT tells where this node is seen, over IPv4 and this way.
    async fn new(shared: &Shared, way: Way, relay: &str) -> std::io::Result<Option<Self>> {
        let (reply, answer) = oneshot::channel();
        shared.command(Command::ListenAddrs { reply }).await.map_err(Error::other)?;
        let listened = answer.await.unwrap_or_default();
        let ports: Vec<u16> = listened
            .iter()
            .filter_map(|address| way.address(&address.to_string()))
            .map(|address| address.port())
            .collect();
        let seen = mapping(way, &ports, relay, shared.seen_at.borrow().iter().map(String::as_str));
        let Some((ip, mapping)) = seen else { return Ok(None) };
        let guesser = match mapping {
            Mapping::Kept => Some(Guesser::new(way).await?),
            Mapping::Changed => None,
        };
        let port = guesser.as_ref().map(Guesser::port).transpose()?;
        Ok(Some(Self { way, offer: GuessOffer { nonce: rand::rng().random(), ip, port }, guesser }))
    }

    /// Whether the two parts fit together, and what the peer names may be sent to.
    fn fits(&self, theirs: &GuessOffer, relay: &str) -> bool {
        self.offer.port.is_some() != theirs.port.is_some() && theirs.is_plausible(relay)
    }
}

/// Asks the peer at the other end of a relayed connection to take part. `Ok(false)` when it does not, or nothing was met; after
/// `Ok(true)` a connection may be about to stand.
pub(crate) async fn ask(shared: &Arc<Shared>, connection: &Connection, way: Way) -> std::io::Result<bool> {
    let Ok(_one) = shared.guessing.try_acquire() else { return Ok(false) };
    let Some(part) = Part::new(shared, way, &connection.address).await? else { return Ok(false) };
    let stream = match connection.open(protocol(way)).await {
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
    if !part.fits(&theirs, &connection.address) || !connection.state.may_guess(way, shared.now()) {
        return Ok(false);
    }
    let secret = Secret::new(&part.offer.nonce, &theirs.nonce);
    timeout(way.timeout(), meet(shared, connection, part, &theirs, &secret, (&mut reader, &mut writer)))
        .await??;
    Ok(true)
}

/// The other side of [`ask`].
pub(crate) async fn answer(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    way: Way,
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
        let part = if needed { Part::new(&shared, way, &connection.address).await? } else { None };
        let Some(part) = part.filter(|part| {
            part.fits(&theirs, &connection.address) && connection.state.may_guess(way, shared.now())
        }) else {
            return say(&mut writer, GuessMessage::No).await;
        };
        say(&mut writer, GuessMessage::Offer(part.offer)).await?;
        let secret = Secret::new(&theirs.nonce, &part.offer.nonce);
        let meeting = meet(&shared, &connection, part, &theirs, &secret, (&mut reader, &mut writer));
        // No longer than the peer tries, so that the place is free for others then.
        timeout(way.timeout(), meeting).await?
    };
    let answering = timeout(AGREEMENT_TIMEOUT + way.timeout(), answering);
    if let Some(Ok(Err(error))) = connection.until_closed(&shared, answering).await {
        tracing::debug!(peer = %connection.peer.short(), ?way, %error, "no port was met");
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
        (Some(guesser), None) => {
            // Until the peer's NAT lets us in, every guess is lost.
            let Some(GuessMessage::Open) = reader.header(decode_guess).await? else {
                return Err(Error::new(ErrorKind::InvalidData, "the peer opens nothing"));
            };
            let remote = match guesser {
                Guesser::Quic(socket) => {
                    let (socket, remote) = udp::guess(socket, theirs.ip, secret).await?;
                    shared.adopted.adopt(socket.into_std()?, remote)?;
                    remote
                }
                Guesser::Tcp(port) => {
                    let link = connection.measured(|link| link.estimate(shared.now(), connection.path));
                    let rtt = link.and_then(|link| Duration::try_from_secs_f64(link.rtt_ms / 1e3).ok());
                    let ports = guesses(rand::rng().random());
                    let (stream, remote) = tcp::guess(&port, theirs.ip, ports, stands(rtt), secret).await?;
                    shared.adopted_tcp.adopt(stream.into_std()?, remote)?;
                    remote
                }
            };
            tracing::debug!(peer = %connection.peer.short(), way = ?part.way, %remote, "a guessed port was met");
            dial(shared, connection, part.way.multiaddr(remote), false).await?;
        }
        (None, Some(port)) => {
            let remote = SocketAddrV4::new(theirs.ip, port);
            match part.way {
                Way::Quic => {
                    let sockets = udp::open(remote, secret).await?;
                    say(writer, GuessMessage::Open).await?;
                    let socket = udp::be_met(sockets, remote, secret).await?;
                    shared.adopted.adopt(socket.into_std()?, remote)?;
                }
                Way::Tcp => {
                    let begun = tcp::open(remote, SOCKETS).await?;
                    say(writer, GuessMessage::Open).await?;
                    let stream = tcp::be_met(begun, secret).await?;
                    shared.adopted_tcp.adopt(stream.into_std()?, remote)?;
                    dial(shared, connection, part.way.multiaddr(remote), true).await?;
                }
            }
        }
        _ => return Err(Error::other("the parts do not fit")),
    }
    Ok(())
}

/// Dials through what was met.
async fn dial(
    shared: &Shared,
    connection: &Connection,
    address: String,
    as_listener: bool,
) -> std::io::Result<()> {
    let dials = vec![PunchDial { addresses: vec![address], as_listener, fresh_port: true }];
    shared.command(Command::Punch { peer: connection.peer.clone(), dials }).await.map_err(Error::other)
}
