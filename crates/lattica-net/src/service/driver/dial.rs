//! Dials under way and who waits for them.

use std::collections::HashMap;
use std::fmt::Write as _;

use libp2p::PeerId as LibPeerId;
use libp2p::core::{Multiaddr, multiaddr::Protocol};
use libp2p::swarm::ConnectionId;
use libp2p::swarm::DialError as SwarmDialError;
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use swarm_wire::PeerId;

use super::super::gate::PeerRefused;
use super::super::{libp2p_peer, wire_peer};
use super::{Driver, Reply};
use crate::addr::{is_relayed, last_peer, without_peer};
use crate::error::DialError;
use crate::punch::PunchDial;

/// Callers that wait for one peer; beyond, they are refused.
const WAITERS_MAX: usize = 4096;

type Waiter = Reply<PeerId, DialError>;

/// See the module.
#[derive(Default)]
pub(super) struct Dials {
    by_connection: HashMap<ConnectionId, Dial>,
    by_peer: HashMap<LibPeerId, Vec<Waiter>>,
}

struct Dial {
    target: String,
    waiter: Option<Waiter>,
    /// Set when callers in `by_peer` wait for this dial.
    peer: Option<LibPeerId>,
}

impl Dials {
    pub(super) fn handle_established(&mut self, id: ConnectionId, peer: LibPeerId) {
        let Ok(found) = wire_peer(&peer) else { return };
        let dialled = self.by_connection.remove(&id).and_then(|d| d.waiter);
        let waiting = self.by_peer.remove(&peer).unwrap_or_default();
        for waiter in dialled.into_iter().chain(waiting) {
            let _ = waiter.send(Ok(found.clone()));
        }
    }
}

impl Driver {
    /// Connects to one address.
    pub(super) fn dial_address(&mut self, address: Multiaddr, reply: Waiter) {
        let expected = match address.iter().last() {
            Some(Protocol::P2p(peer)) => Some(peer),
            _ => None,
        };
        let target = address.to_string();
        if let Some(found) = expected.and_then(|p| wire_peer(&p).ok()) {
            let connected = self.shared.table().connected(&found);
            // A relayed connection is no reason not to try a direct address.
            if connected.is_some_and(|relayed| !relayed.0 || is_relayed(&target)) {
                let _ = reply.send(Ok(found));
                return;
            }
        }
        let options = match expected {
            Some(peer) => DialOpts::peer_id(peer)
                .condition(PeerCondition::Always)
                .addresses(vec![without_peer(&address)])
                .build(),
            None => DialOpts::unknown_peer_id().address(address).build(),
        };
        let id = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.by_connection.insert(id, Dial { target, waiter: Some(reply), peer: None });
            }
            Err(error) => {
                let _ = reply.send(Err(explain(&target, &error)));
            }
        }
    }

    /// Connects to a peer wherever it can be found: known addresses first, then the DHT.
    pub(super) fn connect(&mut self, peer: &PeerId, reply: Waiter) {
        if self.shared.table().best(peer).is_some() {
            let _ = reply.send(Ok(peer.clone()));
            return;
        }
        let Ok(peer_id) = libp2p_peer(peer) else {
            let _ = reply.send(Err(DialError::NoAddress { peer: peer.clone() }));
            return;
        };
        let waiters = self.dials.by_peer.entry(peer_id).or_default();
        let first = waiters.is_empty();
        waiters.retain(|w| !w.is_closed());
        if waiters.len() >= WAITERS_MAX {
            let reason = "too many callers wait for it already".to_owned();
            let _ = reply.send(Err(DialError::Unreachable { target: format!("peer {peer}"), reason }));
            return;
        }
        waiters.push(reply);
        if !first {
            return;
        }
        let known: Vec<Multiaddr> =
            self.shared.table().addresses(peer).iter().filter_map(|a| a.parse().ok()).collect();
        if known.is_empty() && self.find_peer(peer_id) {
            return;
        }
        self.dial_found(peer_id, known);
    }

    /// Dials `addresses` of a peer that somebody waits for, and whatever the behaviours know.
    pub(super) fn dial_found(&mut self, peer_id: LibPeerId, addresses: Vec<Multiaddr>) {
        let options = DialOpts::peer_id(peer_id)
            .condition(PeerCondition::Always)
            .addresses(addresses)
            .extend_addresses_through_behaviour()
            .build();
        let id = options.connection_id();
        let target = format!("peer {peer_id}");
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.by_connection.insert(id, Dial { target, waiter: None, peer: Some(peer_id) });
            }
            Err(error) => self.refuse_waiters(peer_id, &explain(&target, &error)),
        }
    }

    /// Dials a peer from here while it dials us.
    pub(super) fn punch(&mut self, peer: &PeerId, dials: Vec<PunchDial>) {
        let Ok(peer_id) = libp2p_peer(peer) else { return };
        for dial in dials {
            let addresses = dial.addresses.iter().filter_map(|a| a.parse().ok()).collect();
            let mut options =
                DialOpts::peer_id(peer_id).condition(PeerCondition::Always).addresses(addresses);
            if dial.as_listener {
                options = options.override_role();
            }
            if dial.fresh_port {
                options = options.allocate_new_port();
            }
            if let Err(error) = self.swarm.dial(options.build()) {
                tracing::debug!(%peer, %error, "no punch");
            }
        }
    }

    pub(super) fn handle_dial_error(
        &mut self,
        id: ConnectionId,
        peer: Option<LibPeerId>,
        error: &SwarmDialError,
    ) {
        tracing::debug!(?peer, %error, "dial ended");
        if let (Some(peer), SwarmDialError::WrongPeerId { address, .. }) =
            (peer.and_then(|p| wire_peer(&p).ok()), error)
        {
            tracing::warn!(peer = %peer.short(), %error, "somebody else answers there: the address is forgotten");
            self.shared.table().handle_dead_address(&peer, &without_peer(address).to_string());
        }
        let Some(dial) = self.dials.by_connection.remove(&id) else {
            if let Some(address) = peer.and_then(|peer| self.upkeep.handle_unreachable(peer)) {
                let reason = explain(&address, error);
                tracing::warn!(%reason, "a bootstrap peer does not answer; it is tried again and again");
            }
            return;
        };
        let explained = explain(&dial.target, error);
        if let Some(waiter) = dial.waiter {
            let _ = waiter.send(Err(explained));
        } else if let Some(peer) = dial.peer {
            self.refuse_waiters(peer, &explained);
        }
    }

    fn refuse_waiters(&mut self, peer: LibPeerId, error: &DialError) {
        for waiter in self.dials.by_peer.remove(&peer).unwrap_or_default() {
            let _ = waiter.send(Err(error.clone()));
        }
    }
}

fn explain(target: &str, error: &SwarmDialError) -> DialError {
    let unreachable = |reason: String| DialError::Unreachable { target: target.to_owned(), reason };
    match error {
        SwarmDialError::WrongPeerId { obtained, address } => match last_peer(target) {
            Some(expected) => DialError::WrongPeer {
                address: without_peer(address).to_string(),
                expected,
                got: obtained.to_string(),
            },
            None => unreachable(format!("{address} is peer {obtained}")),
        },
        SwarmDialError::NoAddresses => {
            match target.strip_prefix("peer ").and_then(|text| text.parse().ok()) {
                Some(peer) => DialError::NoAddress { peer },
                None => unreachable("it is an address of this node itself".to_owned()),
            }
        }
        SwarmDialError::LocalPeerId { .. } => unreachable("it is this node itself".to_owned()),
        SwarmDialError::Transport(errors) => {
            if let Some(refused) = errors.iter().find_map(|(_, error)| refusal(error)) {
                return DialError::Refused { peer: refused.peer.clone(), refusal: refused.refusal };
            }
            let mut reason = String::new();
            for (address, error) in errors.iter().take(4) {
                let separator = if reason.is_empty() { "" } else { "; " };
                let _ = write!(reason, "{separator}{}: {}", without_peer(address), root_cause(error));
            }
            unreachable(reason)
        }
        other => unreachable(root_cause(other)),
    }
}

/// What the gate said, when it was the gate.
fn refusal<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a PeerRefused> {
    let mut cause = error;
    loop {
        if let Some(refused) = cause.downcast_ref::<PeerRefused>() {
            return Some(refused);
        }
        cause = cause.source()?;
    }
}

/// The innermost message of an error: the layers above it say nothing that helps.
pub(crate) fn root_cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}
