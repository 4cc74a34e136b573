//! Listeners and dials. One socket serves both, so that a peer sees dials come from where it can call back.
//!
//! A task for each listener waits for first packets; all of them meet in one queue, which the swarm empties.

use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use futures::FutureExt as _;
use futures::future::BoxFuture;
use if_watch::IfEvent;
use if_watch::tokio::IfWatcher;
use libp2p::PeerId;
use libp2p::core::Multiaddr;
use libp2p::core::transport::{DialOpts, ListenerId, PortUse, Transport, TransportError, TransportEvent};
use quinn::Endpoint;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;

use super::adopted::{Adopted, Arrival};
use super::connection::{Connection, establish};
use super::{Configs, QuicError, address, config};

/// First packets that wait for the swarm; further ones wait in their endpoints.
const ARRIVALS: usize = 64;
/// Handshakes of peers under way; beyond, a peer has to show first that it is where it says.
const HANDSHAKES: usize = 64;
/// Beyond that, it is refused before anything is computed for it. The swarm takes no more at a time.
const HANDSHAKES_MAX: usize = 128;
/// All peers go by this name in the handshake, and it is not sent.
const NAME: &str = "peer";

type Handshake = BoxFuture<'static, Result<(PeerId, Connection), QuicError>>;
type Event = TransportEvent<Handshake, QuicError>;

/// See the module.
pub(crate) struct Quic {
    configs: Arc<Configs>,
    adopted: Arc<Adopted>,
    listeners: Vec<Listener>,
    /// Endpoints of dials where nothing listens, for IPv4 and IPv6.
    dialers: [Option<Endpoint>; 2],
    arrivals: mpsc::Receiver<Arrival>,
    report: mpsc::Sender<Arrival>,
    events: VecDeque<Event>,
    /// One more than there are handshakes of peers under way.
    handshakes: Arc<()>,
    waker: Option<Waker>,
}

/// Dropping it stops the listening; connections go on.
struct Listener {
    id: ListenerId,
    endpoint: Endpoint,
    local: SocketAddr,
    /// Tells the addresses that a wildcard stands for.
    watcher: Option<IfWatcher>,
    /// Those that it has told.
    ips: HashSet<IpAddr>,
    accepting: AbortHandle,
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.accepting.abort();
        self.endpoint.set_server_config(None);
    }
}

impl Listener {
    fn new(
        id: ListenerId,
        at: SocketAddr,
        configs: &Configs,
        report: mpsc::Sender<Arrival>,
    ) -> Result<Self, QuicError> {
        let unusable = |reason| QuicError::Socket { address: at, reason };
        let socket = config::socket(at).map_err(unusable)?;
        let local = socket.local_addr().map_err(unusable)?;
        let watcher = local.ip().is_unspecified().then(IfWatcher::new).transpose();
        let watcher = watcher.map_err(QuicError::Interfaces)?;
        let endpoint = configs.endpoint(socket, true).map_err(unusable)?;
        let accepting = tokio::spawn(accept(endpoint.clone(), id, local, report)).abort_handle();
        Ok(Self { id, endpoint, local, watcher, ips: HashSet::new(), accepting })
    }

    /// An address of the machine that comes or goes.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let (id, port, ipv4) = (self.id, self.local.port(), self.local.is_ipv4());
        let Some(watcher) = &mut self.watcher else { return Poll::Pending };
        while let Poll::Ready(event) = watcher.poll_if_event(cx) {
            match event {
                Ok(IfEvent::Up(net)) if net.addr().is_ipv4() == ipv4 && self.ips.insert(net.addr()) => {
                    let listen_addr = address::multiaddr(SocketAddr::new(net.addr(), port));
                    return Poll::Ready(TransportEvent::NewAddress { listener_id: id, listen_addr });
                }
                Ok(IfEvent::Down(net)) if self.ips.remove(&net.addr()) => {
                    let listen_addr = address::multiaddr(SocketAddr::new(net.addr(), port));
                    return Poll::Ready(TransportEvent::AddressExpired { listener_id: id, listen_addr });
                }
                Ok(_) => {}
                Err(error) => {
                    // It would say so forever; what was found stays.
                    self.watcher = None;
                    let error = QuicError::Interfaces(error);
                    return Poll::Ready(TransportEvent::ListenerError { listener_id: id, error });
                }
            }
        }
        Poll::Pending
    }

    /// Whether packets to `remote` may leave here. A wildcard need not have told its addresses yet.
    fn reaches(&self, remote: SocketAddr) -> bool {
        let ip = self.local.ip();
        self.local.is_ipv4() == remote.is_ipv4()
            && (ip.is_unspecified() || ip.is_loopback() == remote.ip().is_loopback())
    }
}

/// Reports whoever arrives.
async fn accept(endpoint: Endpoint, id: ListenerId, local: SocketAddr, report: mpsc::Sender<Arrival>) {
    while let Some(incoming) = endpoint.accept().await {
        if report.send(Arrival { listener: id, local, incoming }).await.is_err() {
            return;
        }
    }
}

impl Quic {
    /// A transport whose endpoints are made of `configs`, and that takes in the sockets of `adopted`.
    pub(crate) fn new(configs: Configs, adopted: Arc<Adopted>) -> Self {
        let configs = Arc::new(configs);
        let (report, arrivals) = mpsc::channel(ARRIVALS);
        adopted.attach(Arc::clone(&configs), report.clone());
        Self {
            configs,
            adopted,
            listeners: Vec::new(),
            dialers: [None, None],
            arrivals,
            report,
            events: VecDeque::new(),
            handshakes: Arc::default(),
            waker: None,
        }
    }

    #[cfg(test)]
    pub(super) fn listeners(&self) -> impl Iterator<Item = ListenerId> + '_ {
        self.listeners.iter().map(|listener| listener.id)
    }

    fn tell(&mut self, event: Event) {
        self.events.push_back(event);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Where a dial leaves.
    fn endpoint(&mut self, remote: SocketAddr, port: PortUse) -> Result<Endpoint, QuicError> {
        if let Some(endpoint) = self.adopted.endpoint(remote) {
            return Ok(endpoint);
        }
        if port == PortUse::New {
            return self.dialer(remote);
        }
        if let Some(listener) = self.listeners.iter().find(|listener| listener.reaches(remote)) {
            return Ok(listener.endpoint.clone());
        }
        let family = usize::from(remote.is_ipv6());
        if let Some(endpoint) = &self.dialers[family] {
            return Ok(endpoint.clone());
        }
        let endpoint = self.dialer(remote)?;
        self.dialers[family] = Some(endpoint.clone());
        Ok(endpoint)
    }

    /// An endpoint at a port of its own.
    fn dialer(&self, remote: SocketAddr) -> Result<Endpoint, QuicError> {
        let any: IpAddr =
            if remote.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let at = SocketAddr::new(any, 0);
        let made = config::socket(at).and_then(|socket| self.configs.endpoint(socket, false));
        made.map_err(|reason| QuicError::Socket { address: at, reason })
    }

    /// Answers a first packet, unless it makes no sense.
    fn answer(&self, arrival: Arrival) -> Option<Event> {
        let Arrival { listener: listener_id, local, incoming } = arrival;
        let remote = incoming.remote_address();
        let under_way = Arc::strong_count(&self.handshakes) - 1;
        if under_way >= HANDSHAKES && !incoming.remote_address_validated() {
            // Dropped where it may not be asked again.
            let _ = incoming.retry();
            return None;
        }
        if under_way >= HANDSHAKES_MAX {
            incoming.refuse();
            return None;
        }
        let connecting = match incoming.accept_with(self.configs.server(remote)) {
            Ok(connecting) => connecting,
            Err(error) => {
                tracing::debug!(%remote, %error, "not answered");
                return None;
            }
        };
        let handshake = establish(connecting, self.configs.handshake, self.configs.streams);
        let place = Arc::clone(&self.handshakes);
        let upgrade = async move {
            let _place = place;
            handshake.await
        };
        Some(TransportEvent::Incoming {
            listener_id,
            upgrade: upgrade.boxed(),
            local_addr: address::multiaddr(local),
            send_back_addr: address::multiaddr(remote),
        })
    }
}

impl Transport for Quic {
    type Output = (PeerId, Connection);
    type Error = QuicError;
    type ListenerUpgrade = Handshake;
    type Dial = Handshake;

    fn listen_on(&mut self, id: ListenerId, at: Multiaddr) -> Result<(), TransportError<QuicError>> {
        let socket = address::socket(&at).ok_or(TransportError::MultiaddrNotSupported(at))?;
        let listener = Listener::new(id, socket, &self.configs, self.report.clone());
        let listener = listener.map_err(TransportError::Other)?;
        // From now on dials leave from there. Connections keep the endpoint that they have.
        self.dialers[usize::from(listener.local.is_ipv6())] = None;
        let reported = listener.watcher.is_none().then(|| address::multiaddr(listener.local));
        self.listeners.push(listener);
        match reported {
            Some(listen_addr) => self.tell(TransportEvent::NewAddress { listener_id: id, listen_addr }),
            None => {
                if let Some(waker) = self.waker.take() {
                    waker.wake();
                }
            }
        }
        Ok(())
    }

    fn remove_listener(&mut self, id: ListenerId) -> bool {
        let Some(at) = self.listeners.iter().position(|listener| listener.id == id) else { return false };
        drop(self.listeners.remove(at));
        self.tell(TransportEvent::ListenerClosed { listener_id: id, reason: Ok(()) });
        true
    }

    /// Both roles dial: of two dials that cross, both may become connections.
    fn dial(&mut self, to: Multiaddr, options: DialOpts) -> Result<Handshake, TransportError<QuicError>> {
        let usable = |remote: &SocketAddr| remote.port() != 0 && !remote.ip().is_unspecified();
        let Some(remote) = address::socket(&to).filter(usable) else {
            return Err(TransportError::MultiaddrNotSupported(to));
        };
        let endpoint = self.endpoint(remote, options.port_use).map_err(TransportError::Other)?;
        let configs = Arc::clone(&self.configs);
        let dial = async move {
            let connecting = endpoint.connect_with(configs.client(remote), remote, NAME)?;
            drop(endpoint);
            establish(connecting, configs.handshake, configs.streams).await
        };
        Ok(dial.boxed())
    }

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Event> {
        let this = &mut *self;
        if let Some(event) = this.events.pop_front() {
            return Poll::Ready(event);
        }
        for listener in &mut this.listeners {
            if let Poll::Ready(event) = listener.poll(cx) {
                return Poll::Ready(event);
            }
        }
        while let Poll::Ready(Some(arrival)) = this.arrivals.poll_recv(cx) {
            if let Some(event) = this.answer(arrival) {
                return Poll::Ready(event);
            }
        }
        this.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}
