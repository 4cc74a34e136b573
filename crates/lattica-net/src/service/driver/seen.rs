//! Where peers see this node: what they tell on connections whose port means something, for punching holes.
//!
//! libp2p's own candidates are not used: where a NAT changes the port, identify replaces the port that was seen by the one that
//! is listened on, and then nobody finds the hole.

use std::collections::BTreeMap;

use libp2p::core::transport::PortUse;
use libp2p::core::{ConnectedPoint, Multiaddr};
use libp2p::swarm::ConnectionId;

use super::Driver;
use crate::addr::{is_relayed, without_peer};
use crate::links::PathKind;
use crate::punch::candidates;
use crate::punch::reach::{Reachability, report};

/// See the module. At most one entry for each connection.
#[derive(Default)]
pub(super) struct Seen {
    /// In the order of the connections, those that tell nothing with `None`.
    by_connection: BTreeMap<ConnectionId, Option<String>>,
}

impl Seen {
    /// A connection that leaves from the port that we listen on, or comes to it, will tell.
    pub(super) fn handle_established(&mut self, id: ConnectionId, endpoint: &ConnectedPoint) {
        let fresh_port = matches!(endpoint, ConnectedPoint::Dialer { port_use: PortUse::New, .. });
        if !fresh_port && !endpoint.is_relayed() {
            self.by_connection.insert(id, None);
        }
    }
}

impl Driver {
    /// The peer at the other end of a connection says where it sees us.
    pub(super) fn handle_seen(&mut self, id: ConnectionId, observed: &Multiaddr) {
        if let Some(seen) = self.seen.by_connection.get_mut(&id) {
            *seen = Some(without_peer(observed).to_string());
            self.tell_seen();
        }
    }

    /// A connection is gone.
    pub(super) fn handle_unseen(&mut self, id: ConnectionId) {
        if self.seen.by_connection.remove(&id).is_some() {
            self.tell_seen();
        }
    }

    /// How this node can be reached, as far as peers have told.
    pub(super) fn reachability(&self) -> Reachability {
        let listened: Vec<String> = self.swarm.listeners().map(ToString::to_string).collect();
        let observed: Vec<(String, &str)> = self
            .seen
            .by_connection
            .iter()
            .filter_map(|(id, seen)| Some((self.remotes.get(id)?.to_string(), seen.as_deref()?)))
            .collect();
        let of = |path| {
            let seen = observed.iter().map(|(observer, seen)| (observer.as_str(), *seen));
            report(path, listened.iter().map(String::as_str), seen)
        };
        // libp2p counts slots at relays among them.
        let external = self.swarm.external_addresses().map(|a| without_peer(a).to_string());
        let confirmed = external.filter(|address| !is_relayed(address)).collect();
        Reachability { confirmed, quic: of(PathKind::Quic), tcp: of(PathKind::Tcp) }
    }

    fn tell_seen(&self) {
        let known: Vec<String> =
            self.swarm.external_addresses().map(|a| without_peer(a).to_string()).collect();
        let seen = self.seen.by_connection.values().flatten().chain(&known);
        let next = candidates(seen.map(String::as_str));
        self.shared.seen_at.send_if_modified(|now| {
            let changed = *now != next;
            *now = next;
            changed
        });
    }
}
