//! Keeps a node where it belongs: bootstrap peers are dialled again while they are away, and relay slots are renewed
//! when they are lost, each with growing pauses.

use std::collections::HashMap;
use std::time::Duration;

use libp2p::PeerId as LibPeerId;
use libp2p::core::transport::ListenerId;
use libp2p::core::{Multiaddr, multiaddr::Protocol};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};

use super::{Driver, without_peer};
use crate::config::NodeConfig;

/// Pause after the first vain try; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// See the module.
pub(super) struct Upkeep {
    bootstrap: Vec<Contact>,
    relays: Vec<Contact>,
    listeners: HashMap<ListenerId, usize>,
    dht_joined: bool,
}

struct Contact {
    peer: LibPeerId,
    address: Multiaddr,
    /// For relays: the listener that stands for our slot.
    listening: bool,
    try_at: Duration,
    pause: Duration,
}

impl Contact {
    fn failed(&mut self, now: Duration) {
        self.try_at = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

impl Upkeep {
    pub(super) fn new(config: &NodeConfig) -> Self {
        Self {
            bootstrap: contacts(&config.bootstrap),
            relays: contacts(&config.relays),
            listeners: HashMap::new(),
            dht_joined: false,
        }
    }

    pub(super) fn handle_established(&mut self, peer: LibPeerId) {
        for contact in self.bootstrap.iter_mut().filter(|c| c.peer == peer) {
            contact.pause = FIRST_PAUSE;
        }
    }

    /// Whether the listener that stands now is a relay slot.
    pub(super) fn handle_listening(&mut self, listener: ListenerId, _now: Duration) -> bool {
        let Some(relay) = self.listeners.get(&listener).and_then(|i| self.relays.get_mut(*i)) else {
            return false;
        };
        relay.pause = FIRST_PAUSE;
        true
    }

    pub(super) fn handle_listener_closed(&mut self, listener: ListenerId, now: Duration) {
        let index = self.listeners.remove(&listener);
        if let Some(relay) = index.and_then(|i| self.relays.get_mut(i)) {
            relay.listening = false;
            relay.failed(now);
        }
    }
}

fn contacts(addresses: &[String]) -> Vec<Contact> {
    let contact = |address: &String| {
        let address: Multiaddr = address.parse().ok()?;
        let Some(Protocol::P2p(peer)) = address.iter().last() else { return None };
        let address = without_peer(&address);
        Some(Contact { peer, address, listening: false, try_at: Duration::ZERO, pause: FIRST_PAUSE })
    };
    addresses.iter().filter_map(contact).collect()
}

impl Driver {
    pub(super) fn handle_tick(&mut self) {
        let now = self.shared.now();
        for contact in &mut self.upkeep.bootstrap {
            if now < contact.try_at || self.swarm.is_connected(&contact.peer) {
                continue;
            }
            let options = DialOpts::peer_id(contact.peer)
                .condition(PeerCondition::DisconnectedAndNotDialing)
                .addresses(vec![contact.address.clone()])
                .build();
            if let Err(error) = self.swarm.dial(options) {
                tracing::debug!(address = %contact.address, %error, "bootstrap peer not dialled");
            }
            contact.failed(now);
        }
        for (i, relay) in self.upkeep.relays.iter_mut().enumerate() {
            if relay.listening || now < relay.try_at {
                continue;
            }
            let slot = relay.address.clone().with(Protocol::P2p(relay.peer)).with(Protocol::P2pCircuit);
            match self.swarm.listen_on(slot) {
                Ok(listener) => {
                    relay.listening = true;
                    self.upkeep.listeners.insert(listener, i);
                }
                Err(error) => {
                    tracing::warn!(relay = %relay.peer, %error, "no slot at relay");
                    relay.failed(now);
                }
            }
        }
        // Fill the routing table once the first peer is there; kad repeats it by itself from then on.
        let kad = &mut self.swarm.behaviour_mut().kad;
        if !self.upkeep.dht_joined && kad.bootstrap().is_ok() {
            self.upkeep.dht_joined = true;
        }
    }
}
