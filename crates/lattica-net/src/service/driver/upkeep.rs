//! Keeps a node where it belongs: bootstrap peers are dialled again while they are away, with growing pauses, and a lost
//! relay slot is replaced by one at another relay.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use libp2p::PeerId as LibPeerId;
use libp2p::core::transport::ListenerId;
use libp2p::core::{Multiaddr, multiaddr::Protocol};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};

use super::super::wire_peer;
use super::Driver;
use crate::addr::without_peer;
use crate::config::NodeConfig;
use crate::relays::RelayPlan;

/// Pause after the first vain try; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Answers of a peer that left are kept this long for its return; numbers of its calls are remembered all the same.
const ANSWERS_KEPT: Duration = Duration::from_secs(30);
/// Addresses that are kept of each relay.
const RELAY_ADDRESSES_MAX: usize = 4;

/// See the module.
pub(super) struct Upkeep {
    bootstrap: Vec<Contact>,
    relays: RelayPlan<LibPeerId>,
    /// Where each relay is dialled.
    relay_addresses: HashMap<LibPeerId, Vec<Multiaddr>>,
    /// The listeners that stand for our slots.
    listeners: HashMap<ListenerId, LibPeerId>,
    dht_joined: bool,
}

struct Contact {
    peer: LibPeerId,
    address: Multiaddr,
    try_at: Duration,
    pause: Duration,
    /// The operator knows that it does not answer.
    told: bool,
}

impl Contact {
    fn failed(&mut self, now: Duration) {
        self.try_at = now + self.pause;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

impl Upkeep {
    pub(super) fn new(config: &NodeConfig) -> Self {
        let mut upkeep = Self {
            bootstrap: contacts(&config.bootstrap),
            relays: RelayPlan::new(if config.relays.is_empty() { 0 } else { config.relay_slots }),
            relay_addresses: HashMap::new(),
            listeners: HashMap::new(),
            dht_joined: false,
        };
        for relay in contacts(&config.relays) {
            upkeep.handle_relay(relay.peer, relay.address);
        }
        upkeep
    }

    /// A relay is known at an address.
    pub(super) fn handle_relay(&mut self, relay: LibPeerId, address: Multiaddr) {
        if self.relays.add(relay) {
            let known = self.relay_addresses.entry(relay).or_default();
            if !known.contains(&address) && known.len() < RELAY_ADDRESSES_MAX {
                known.push(address);
            }
        }
    }

    /// The address of a relay for the next try; the one after it is first the next time.
    fn relay_address(&mut self, relay: &LibPeerId) -> Option<Multiaddr> {
        let known = self.relay_addresses.get_mut(relay)?;
        let address = known.first().cloned();
        let n = 1.min(known.len());
        known.rotate_left(n);
        address
    }

    pub(super) fn handle_established(&mut self, peer: LibPeerId) {
        for contact in self.bootstrap.iter_mut().filter(|c| c.peer == peer) {
            contact.pause = FIRST_PAUSE;
            contact.told = false;
        }
    }

    /// Dialling a peer failed. Where it is a bootstrap peer of which that is news: its address.
    pub(super) fn handle_unreachable(&mut self, peer: LibPeerId) -> Option<String> {
        let contact = self.bootstrap.iter_mut().find(|c| c.peer == peer && !c.told)?;
        contact.told = true;
        Some(contact.address.to_string())
    }

    /// Whether the listener that stands now is a relay slot.
    pub(super) fn handle_listening(&mut self, listener: ListenerId) -> bool {
        let Some(relay) = self.listeners.get(&listener) else { return false };
        self.relays.handle_held(relay);
        true
    }

    pub(super) fn handle_listener_closed(&mut self, listener: ListenerId, now: Duration) {
        if let Some(relay) = self.listeners.remove(&listener) {
            self.relays.handle_lost(&relay, now);
        }
    }
}

fn contacts(addresses: &[String]) -> Vec<Contact> {
    let contact = |address: &String| {
        let address: Multiaddr = address.parse().ok()?;
        let Some(Protocol::P2p(peer)) = address.iter().last() else { return None };
        let address = without_peer(&address);
        Some(Contact { peer, address, try_at: Duration::ZERO, pause: FIRST_PAUSE, told: false })
    };
    addresses.iter().filter_map(contact).collect()
}

impl Driver {
    pub(super) fn handle_tick(&mut self) {
        self.make_waiting();
        self.put_due();
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
        let shared = Arc::clone(&self.shared);
        let rtt = |relay: &LibPeerId| {
            let state = shared.table().known_state(&wire_peer(relay).ok()?)?;
            let rtt_ms = state.links().estimate(now, None)?.rtt_ms;
            Duration::try_from_secs_f64(rtt_ms / 1e3).ok()
        };
        while let Some(relay) = self.upkeep.relays.next(now, rtt) {
            let Some(address) = self.upkeep.relay_address(&relay) else { break };
            let slot = address.with(Protocol::P2p(relay)).with(Protocol::P2pCircuit);
            match self.swarm.listen_on(slot) {
                Ok(listener) => {
                    self.upkeep.listeners.insert(listener, relay);
                }
                Err(error) => {
                    tracing::warn!(%relay, %error, "no slot at relay");
                    self.upkeep.relays.handle_lost(&relay, now);
                }
            }
        }
        for state in self.shared.table().absent(now, ANSWERS_KEPT) {
            state.served().forget_answers();
        }
        // Fill the routing table once the first peer is there; kad repeats it by itself from then on.
        let kad = &mut self.swarm.behaviour_mut().kad;
        if !self.upkeep.dht_joined && kad.bootstrap().is_ok() {
            self.upkeep.dht_joined = true;
        }
    }
}
