//! Sockets that the QUIC transport did not make but that lead to a peer: holes that were punched elsewhere. libp2p's
//! transport takes no sockets in, so a task carries datagrams between such a socket and one on this machine, which QUIC
//! dials or hears from. [`Adopting`] exchanges the addresses, so that everybody above sees the peer's true one.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use libp2p::core::Multiaddr;
use libp2p::core::transport::{DialOpts, ListenerId, PortUse, Transport, TransportError, TransportEvent};
use tokio::net::UdpSocket;
use tokio::time::{Instant, sleep_until};

use super::shared::lock;
use crate::punch::guess::{multiaddr, quic_address};

/// Sockets that are carried for at the same time.
const SOCKETS_MAX: usize = 64;
/// A socket through which nothing came or went for this long is closed. QUIC is never silent as long.
const IDLE: Duration = Duration::from_secs(30);
/// Datagrams that are passed on in one direction before the other one has its turn.
const TURN: usize = 64;
const DATAGRAM_MAX_BYTES: usize = 64 * 1024;

/// Where each adopted socket leads, and the address on this machine that stands for it.
#[derive(Debug, Default)]
pub(crate) struct Adopted(Mutex<HashMap<SocketAddrV4, SocketAddrV4>>);

/// A place in the table, given up on drop.
struct Place {
    table: Arc<Adopted>,
    remote: SocketAddrV4,
    local: SocketAddrV4,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut table = lock(&self.table.0);
        // A later socket may lead to the same address.
        if table.get(&self.remote) == Some(&self.local) {
            table.remove(&self.remote);
        }
    }
}

impl Adopted {
    fn place(self: &Arc<Self>, remote: SocketAddrV4, local: SocketAddrV4) -> std::io::Result<Place> {
        let mut table = lock(&self.0);
        if table.len() >= SOCKETS_MAX && !table.contains_key(&remote) {
            return Err(std::io::Error::new(ErrorKind::QuotaExceeded, "too many sockets were adopted"));
        }
        table.insert(remote, local);
        Ok(Place { table: Arc::clone(self), remote, local })
    }

    fn local(&self, remote: SocketAddrV4) -> Option<SocketAddrV4> {
        lock(&self.0).get(&remote).copied()
    }

    fn remote(&self, local: SocketAddrV4) -> Option<SocketAddrV4> {
        lock(&self.0).iter().find(|(_, l)| **l == local).map(|(remote, _)| *remote)
    }

    /// Whether a connection to or from this address goes through an adopted socket.
    pub(crate) fn leads_to(&self, address: &Multiaddr) -> bool {
        quic_address(&address.to_string()).is_some_and(|remote| self.local(remote).is_some())
    }

    /// Takes in a socket that leads to `remote`, for QUIC to dial there through it.
    pub(crate) async fn for_dial(
        self: &Arc<Self>,
        outer: UdpSocket,
        remote: SocketAddrV4,
    ) -> std::io::Result<Carrier> {
        let inner = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        self.carrier(outer, remote, inner, None)
    }

    /// Takes in a socket that leads to `remote`, for the listener at `listener` on this machine to hear from there.
    pub(crate) async fn for_listener(
        self: &Arc<Self>,
        outer: UdpSocket,
        remote: SocketAddrV4,
        listener: SocketAddrV4,
    ) -> std::io::Result<Carrier> {
        let inner = UdpSocket::bind((*listener.ip(), 0)).await?;
        self.carrier(outer, remote, inner, Some(listener.into()))
    }

    fn carrier(
        self: &Arc<Self>,
        outer: UdpSocket,
        remote: SocketAddrV4,
        inner: UdpSocket,
        quic: Option<SocketAddr>,
    ) -> std::io::Result<Carrier> {
        let SocketAddr::V4(local) = inner.local_addr()? else { return Err(ErrorKind::Unsupported.into()) };
        let place = self.place(remote, local)?;
        Ok(Carrier { outer, inner, quic, _place: place })
    }
}

/// Carries datagrams between a socket that leads to a peer and QUIC on this machine.
pub(crate) struct Carrier {
    /// Leads to the peer, and only there.
    outer: UdpSocket,
    /// Towards QUIC.
    inner: UdpSocket,
    /// Where QUIC is; who dials shows itself by its first datagram.
    quic: Option<SocketAddr>,
    _place: Place,
}

impl Carrier {
    /// Passes one datagram of the peer on.
    pub(crate) fn hand_in(&self, datagram: &[u8]) {
        if let Some(quic) = self.quic {
            // What does not fit is lost, as anywhere on its way.
            let _ = self.inner.try_send_to(datagram, quic);
        }
    }

    /// Carries until nothing comes or goes any more.
    pub(crate) async fn run(mut self) {
        let mut datagram = vec![0; DATAGRAM_MAX_BYTES];
        let mut idle_at = Instant::now() + IDLE;
        loop {
            tokio::select! {
                Ok(()) = self.outer.readable() => {
                    for _ in 0..TURN {
                        // An error is a datagram of ours that was refused on its way; those are taken one by one, too.
                        match self.outer.try_recv(&mut datagram) {
                            Ok(n) => self.hand_in(&datagram[..n]),
                            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                            Err(_) => {}
                        }
                    }
                }
                Ok(()) = self.inner.readable() => {
                    for _ in 0..TURN {
                        match self.inner.try_recv_from(&mut datagram) {
                            Ok((n, from)) if *self.quic.get_or_insert(from) == from => {
                                let _ = self.outer.try_send(&datagram[..n]);
                            }
                            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                            Ok(_) | Err(_) => {}
                        }
                    }
                }
                () = sleep_until(idle_at) => return,
            }
            idle_at = Instant::now() + IDLE;
        }
    }
}

/// A transport of QUIC whose adopted sockets go by the addresses that they lead to.
pub(crate) struct Adopting<T> {
    quic: T,
    adopted: Arc<Adopted>,
}

impl<T> Adopting<T> {
    pub(crate) fn new(quic: T, adopted: Arc<Adopted>) -> Self {
        Self { quic, adopted }
    }
}

impl<T: Transport + Unpin> Transport for Adopting<T> {
    type Output = T::Output;
    type Error = T::Error;
    type ListenerUpgrade = T::ListenerUpgrade;
    type Dial = T::Dial;

    fn listen_on(&mut self, id: ListenerId, address: Multiaddr) -> Result<(), TransportError<T::Error>> {
        self.quic.listen_on(id, address)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.quic.remove_listener(id)
    }

    fn dial(&mut self, address: Multiaddr, options: DialOpts) -> Result<T::Dial, TransportError<T::Error>> {
        let local = quic_address(&address.to_string()).and_then(|remote| self.adopted.local(remote));
        match local.and_then(|local| multiaddr(local).parse().ok()) {
            // A socket of its own: what comes from it is told from what comes to the listener.
            Some(local) => self.quic.dial(local, DialOpts { port_use: PortUse::New, ..options }),
            None => self.quic.dial(address, options),
        }
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<T::ListenerUpgrade, T::Error>> {
        let event = Pin::new(&mut self.quic).poll(cx);
        event.map(|event| match event {
            TransportEvent::Incoming { listener_id, upgrade, local_addr, send_back_addr } => {
                let remote =
                    quic_address(&send_back_addr.to_string()).and_then(|local| self.adopted.remote(local));
                let remote = remote.and_then(|remote| multiaddr(remote).parse().ok());
                let send_back_addr = remote.unwrap_or(send_back_addr);
                TransportEvent::Incoming { listener_id, upgrade, local_addr, send_back_addr }
            }
            event => event,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REMOTE: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 9), 7);

    async fn socket() -> (UdpSocket, SocketAddrV4) {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let SocketAddr::V4(address) = socket.local_addr().unwrap() else { panic!("asked for IPv4") };
        (socket, address)
    }

    #[tokio::test]
    async fn datagrams_go_both_ways_and_strangers_are_not_carried() {
        let (peer, at_peer) = socket().await;
        let (outer, at_outer) = socket().await;
        outer.connect(at_peer).await.unwrap();
        let (quic, _) = socket().await;
        let adopted = Arc::new(Adopted::default());
        let carrier = adopted.for_dial(outer, at_peer).await.unwrap();
        let local = adopted.local(at_peer).unwrap();
        assert_eq!(adopted.remote(local), Some(at_peer));
        let carrying = tokio::spawn(carrier.run());
        quic.send_to(b"out", local).await.unwrap();
        let mut bytes = [0; 16];
        assert_eq!(peer.recv_from(&mut bytes).await.unwrap(), (3, at_outer.into()));
        let (stranger, _) = socket().await;
        stranger.send_to(b"stranger", local).await.unwrap();
        stranger.send_to(b"stranger", at_outer).await.unwrap();
        peer.send_to(b"in", at_outer).await.unwrap();
        assert_eq!(quic.recv_from(&mut bytes).await.unwrap(), (2, local.into()));
        quic.send_to(b"more", local).await.unwrap();
        assert_eq!(peer.recv_from(&mut bytes).await.unwrap().0, 4, "what the stranger sent got nowhere");
        carrying.abort();
        assert!(carrying.await.unwrap_err().is_cancelled());
        assert_eq!(adopted.local(at_peer), None, "its place is free again");
    }

    #[tokio::test]
    async fn a_later_socket_to_the_same_address_counts_and_places_are_bounded() {
        let adopted = Arc::new(Adopted::default());
        let local = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        let first = adopted.place(REMOTE, local(1)).unwrap();
        let second = adopted.place(REMOTE, local(2)).unwrap();
        drop(first);
        assert_eq!(adopted.local(REMOTE), Some(local(2)));
        drop(second);
        assert_eq!(adopted.local(REMOTE), None);
        let remote = |port| SocketAddrV4::new(*REMOTE.ip(), port);
        let places: Vec<Place> =
            (1..=SOCKETS_MAX as u16).map(|n| adopted.place(remote(n), local(n)).unwrap()).collect();
        assert!(adopted.place(remote(999), local(999)).is_err());
        drop(places);
        assert!(adopted.place(remote(999), local(999)).is_ok());
    }
}
