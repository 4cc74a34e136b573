//! Sockets that were made elsewhere and lead to a peer: holes that were punched. Each becomes an endpoint of its own, which the
//! peer may dial and through which dials to that address leave. It ends when it has had no connection for a while.

use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::net::{SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use libp2p::core::Multiaddr;
use libp2p::core::transport::ListenerId;
use quinn::Endpoint;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::super::shared::lock;
use super::{Configs, address};

/// Endpoints of this kind at the same time.
const ENDPOINTS_MAX: usize = 64;
/// An endpoint without a connection is looked at this often, and given up the first time.
const IDLE: Duration = Duration::from_secs(15);

/// A first packet of a peer that connects.
pub(super) struct Arrival {
    /// Who listened; each adopted socket has a name of its own, whether or not the node listens anywhere.
    pub(super) listener: ListenerId,
    /// Where.
    pub(super) local: SocketAddr,
    pub(super) incoming: quinn::Incoming,
}

/// The adopted sockets by the address that each leads to.
#[derive(Default)]
pub(crate) struct Adopted {
    transport: OnceLock<(Arc<Configs>, mpsc::Sender<Arrival>)>,
    endpoints: Mutex<HashMap<SocketAddr, Endpoint>>,
    /// One more than there are endpoints, replaced ones included: they live on as long as they have connections.
    living: Arc<()>,
}

impl Adopted {
    /// Says what endpoints are made of, and where to report who arrives. Only the first transport counts.
    pub(super) fn attach(&self, configs: Arc<Configs>, arrivals: mpsc::Sender<Arrival>) {
        let _ = self.transport.set((configs, arrivals));
    }

    /// Takes in a socket that leads to `remote`: connections with that address go through it from now on.
    ///
    /// # Errors
    /// When there are too many, or the system refuses.
    pub(crate) fn adopt(self: &Arc<Self>, socket: UdpSocket, remote: SocketAddrV4) -> Result<()> {
        let Some((configs, arrivals)) = self.transport.get() else {
            return Err(ErrorKind::NotConnected.into());
        };
        let remote = SocketAddr::from(remote);
        let mut endpoints = lock(&self.endpoints);
        if Arc::strong_count(&self.living) > ENDPOINTS_MAX {
            return Err(Error::new(ErrorKind::QuotaExceeded, "too many sockets were adopted"));
        }
        let endpoint = configs.endpoint(socket, true)?;
        let local = endpoint.local_addr()?;
        endpoints.insert(remote, endpoint.clone());
        let (table, arrivals, place) = (Arc::clone(self), arrivals.clone(), Arc::clone(&self.living));
        tokio::spawn(async move {
            hear(&endpoint, remote, local, &arrivals).await;
            let mut endpoints = lock(&table.endpoints);
            // A later socket may lead to the same address.
            if endpoints.get(&remote).is_some_and(|now| now.local_addr().ok() == Some(local)) {
                endpoints.remove(&remote);
            }
            drop(place);
        });
        Ok(())
    }

    pub(super) fn endpoint(&self, remote: SocketAddr) -> Option<Endpoint> {
        lock(&self.endpoints).get(&remote).cloned()
    }

    /// Whether a connection to or from this address goes through an adopted socket.
    pub(crate) fn leads_to(&self, remote: &Multiaddr) -> bool {
        address::socket(remote).is_some_and(|remote| lock(&self.endpoints).contains_key(&remote))
    }
}

/// Reports who arrives until there is no connection, or nobody to report to.
async fn hear(endpoint: &Endpoint, remote: SocketAddr, local: SocketAddr, arrivals: &mpsc::Sender<Arrival>) {
    let listener = ListenerId::next();
    let mut looks = interval_at(Instant::now() + IDLE, IDLE);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            incoming = endpoint.accept() => match incoming {
                // The hole is for one.
                Some(incoming) if incoming.remote_address() != remote => incoming.ignore(),
                Some(incoming) => {
                    if arrivals.send(Arrival { listener, local, incoming }).await.is_err() {
                        return;
                    }
                }
                None => return,
            },
            _ = looks.tick() => if endpoint.open_connections() == 0 { return },
            () = arrivals.closed() => return,
        }
    }
}
