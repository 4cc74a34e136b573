//! Ports that are guessed for QUIC: many sockets on one side, one that guesses on the other, and the pair that both choose.

use std::io::Error;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::time::Duration;

use futures::stream::{FuturesUnordered, StreamExt as _};
use rand::RngExt as _;
use tokio::net::UdpSocket;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::punch::guess::{GUESS_PAUSE, GUESSES_AT_ONCE, Packet, SOCKETS, Secret, guesses};

/// A packet that may have been lost is sent again after this long: four times at most.
const RESEND_AFTER: Duration = Duration::from_secs(1);
/// Sockets that are opened before other tasks have their turn.
const OPENED_AT_ONCE: usize = 32;
/// Longest datagram that is read: QUIC's first are 1200 bytes.
const DATAGRAM_MAX_BYTES: usize = 1500;

/// Guesses until one is met, and chooses it.
pub(super) async fn guess(
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
pub(super) async fn open(remote: SocketAddrV4, secret: &Secret) -> std::io::Result<Vec<UdpSocket>> {
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
pub(super) async fn be_met(
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
    use tokio::time::timeout;

    use super::*;
    use crate::punch::guess::Way;

    /// Without a NAT every socket has a port of its own, as behind one that changes ports. By chance a try fails once in 3,400.
    #[tokio::test]
    async fn a_guess_meets_one_of_the_sockets_and_both_sides_take_the_same_pair() {
        for _ in 0..3 {
            if timeout(Way::Quic.timeout(), meets()).await.is_ok() {
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
