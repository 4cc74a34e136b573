//! libp2p's TCP transport, which also takes in connections that were made elsewhere, because a hole was punched with them: a
//! dial to where one leads takes it. Both ends dial then, one of them in the listener's part.

use std::collections::HashMap;
use std::io::{Error, ErrorKind};
use std::net::{SocketAddrV4, TcpStream};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt as _;
use libp2p::core::Multiaddr;
use libp2p::core::transport::{DialOpts, ListenerId, Transport, TransportError, TransportEvent};
use libp2p::tcp;

use super::shared::lock;
use crate::punch::guess::Way;

/// Connections that wait for their dial.
const WAITING_MAX: usize = 16;
/// One that nobody has dialled by then is closed.
const WAITS: Duration = Duration::from_secs(15);

type Stock = tcp::tokio::Transport;

/// The connections that were taken in and wait for their dial, by the address that each leads to.
#[derive(Debug, Default)]
pub(crate) struct AdoptedTcp(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    by_remote: HashMap<SocketAddrV4, (u64, TcpStream)>,
    n_adopted: u64,
}

impl AdoptedTcp {
    /// Takes in a connection that stands and does not block: the next dial to `remote` takes it.
    ///
    /// # Errors
    /// When there are too many.
    pub(crate) fn adopt(self: &Arc<Self>, stream: TcpStream, remote: SocketAddrV4) -> std::io::Result<()> {
        let mut waiting = lock(&self.0);
        if waiting.by_remote.len() >= WAITING_MAX && !waiting.by_remote.contains_key(&remote) {
            return Err(Error::new(ErrorKind::QuotaExceeded, "too many connections were adopted"));
        }
        waiting.n_adopted += 1;
        let number = waiting.n_adopted;
        waiting.by_remote.insert(remote, (number, stream));
        drop(waiting);
        let table = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(WAITS).await;
            let mut waiting = lock(&table.0);
            // A later one may lead to the same address.
            if waiting.by_remote.get(&remote).is_some_and(|(now, _)| *now == number) {
                waiting.by_remote.remove(&remote);
            }
        });
        Ok(())
    }

    fn take(&self, remote: SocketAddrV4) -> Option<TcpStream> {
        lock(&self.0).by_remote.remove(&remote).map(|(_, stream)| stream)
    }
}

/// See the module.
pub(crate) struct Tcp {
    stock: Stock,
    adopted: Arc<AdoptedTcp>,
}

impl Tcp {
    pub(crate) fn new(config: tcp::Config, adopted: Arc<AdoptedTcp>) -> Self {
        Self { stock: Stock::new(config), adopted }
    }
}

impl Transport for Tcp {
    type Output = <Stock as Transport>::Output;
    type Error = Error;
    type ListenerUpgrade = <Stock as Transport>::ListenerUpgrade;
    type Dial = <Stock as Transport>::Dial;

    fn listen_on(&mut self, id: ListenerId, at: Multiaddr) -> Result<(), TransportError<Error>> {
        self.stock.listen_on(id, at)
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        self.stock.remove_listener(id)
    }

    fn dial(&mut self, to: Multiaddr, options: DialOpts) -> Result<Self::Dial, TransportError<Error>> {
        let adopted = Way::Tcp.address(&to.to_string()).and_then(|remote| self.adopted.take(remote));
        let Some(stream) = adopted else { return self.stock.dial(to, options) };
        let connected = async move { tokio::net::TcpStream::from_std(stream).map(tcp::tokio::TcpStream) };
        Ok(connected.boxed())
    }

    fn poll(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<TransportEvent<Self::ListenerUpgrade, Error>> {
        Pin::new(&mut self.stock).poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr, TcpListener};

    use libp2p::core::Endpoint;
    use libp2p::core::muxing::StreamMuxerBox;
    use libp2p::core::transport::{Boxed, PortUse};
    use libp2p::core::upgrade::Version;
    use libp2p::identity::Keypair;
    use libp2p::{PeerId, noise, yamux};
    use tokio::time::timeout;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    /// The transport, what it took in, and who it is. Not `V1Lazy` as in a node: what that leaves unsent goes out only when somebody
    /// polls the connection.
    fn node() -> (Boxed<(PeerId, StreamMuxerBox)>, Arc<AdoptedTcp>, PeerId) {
        let keypair = Keypair::generate_ed25519();
        let adopted = Arc::<AdoptedTcp>::default();
        let transport = Tcp::new(tcp::Config::new(), Arc::clone(&adopted))
            .upgrade(Version::V1)
            .authenticate(noise::Config::new(&keypair).unwrap())
            .multiplex(yamux::Config::default())
            .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(muxer)))
            .boxed();
        (transport, adopted, keypair.public().to_peer_id())
    }

    fn v4(address: SocketAddr) -> SocketAddrV4 {
        let SocketAddr::V4(address) = address else { panic!("asked for IPv4") };
        address
    }

    /// The two ends of a connection, each with the address that it leads to.
    fn connection() -> [(TcpStream, SocketAddrV4); 2] {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let here = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (there, from) = listener.accept().unwrap();
        for end in [&here, &there] {
            end.set_nonblocking(true).unwrap();
        }
        let to = v4(here.peer_addr().unwrap());
        [(here, to), (there, v4(from))]
    }

    fn multiaddr(address: SocketAddrV4) -> Multiaddr {
        Way::Tcp.multiaddr(address).parse().unwrap()
    }

    fn options(role: Endpoint) -> DialOpts {
        DialOpts { role, port_use: PortUse::New }
    }

    #[tokio::test]
    async fn both_ends_of_an_adopted_connection_dial_and_one_takes_the_listeners_part() {
        let ((mut a, adopted_a, peer_a), (mut b, adopted_b, peer_b)) = (node(), node());
        let [(end_a, to_b), (end_b, to_a)] = connection();
        adopted_a.adopt(end_a, to_b).unwrap();
        adopted_b.adopt(end_b, to_a).unwrap();
        // Whose name is in the address makes no difference.
        let to_b = multiaddr(to_b).with_p2p(peer_b).unwrap();
        let dial_a = a.dial(to_b, options(Endpoint::Dialer)).unwrap();
        let dial_b = b.dial(multiaddr(to_a), options(Endpoint::Listener)).unwrap();
        let dials = async { tokio::join!(dial_a, dial_b) };
        let (dialled_a, dialled_b) = timeout(PATIENCE, dials).await.unwrap();
        let ((found_b, _), (found_a, _)) = (dialled_a.unwrap(), dialled_b.unwrap());
        assert_eq!((found_a, found_b), (peer_a, peer_b));
    }

    #[tokio::test]
    async fn an_adopted_connection_is_dialled_once_and_other_dials_are_as_usual() {
        let adopted = Arc::<AdoptedTcp>::default();
        let mut transport = Tcp::new(tcp::Config::new(), Arc::clone(&adopted));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let at = v4(listener.local_addr().unwrap());
        let [(end, _), _other] = connection();
        let from = end.local_addr().unwrap();
        // It leads elsewhere than it says, so that it can be told from the others.
        adopted.adopt(end, at).unwrap();
        let mut froms = Vec::new();
        for _ in 0..2 {
            let dial = transport.dial(multiaddr(at), options(Endpoint::Dialer)).unwrap();
            let stream = timeout(PATIENCE, dial).await.unwrap().unwrap();
            froms.push(stream.0.local_addr().unwrap());
        }
        assert_eq!(froms[0], from);
        let (_, dialled_from) = listener.accept().unwrap();
        assert_eq!(froms[1], dialled_from);
    }

    #[tokio::test]
    async fn connections_are_adopted_up_to_a_limit_and_a_later_one_to_the_same_address_counts() {
        let adopted = Arc::<AdoptedTcp>::default();
        let remote = |port| SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 9), port);
        let end = || {
            let [(end, _), _other] = connection();
            end
        };
        for port in 1..=16 {
            adopted.adopt(end(), remote(port)).unwrap();
        }
        assert!(adopted.adopt(end(), remote(17)).is_err());
        let later = end();
        let at = later.local_addr().unwrap();
        adopted.adopt(later, remote(1)).unwrap();
        assert_eq!(adopted.take(remote(1)).unwrap().local_addr().unwrap(), at);
        assert!(adopted.take(remote(1)).is_none());
        assert!(adopted.adopt(end(), remote(17)).is_ok(), "there is room again");
    }
}
