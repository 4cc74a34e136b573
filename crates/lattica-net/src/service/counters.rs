//! What a node has done so far, for those who watch over it.

use std::sync::atomic::{AtomicU64, Ordering};

use libp2p::relay;
use serde::Serialize;

/// Numbers since the start of a node, and how many relayed peers and connections it carries now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct NetCounters {
    /// Connections that came to stand, whoever dialled.
    pub connections_opened: u64,
    /// Connections that ended.
    pub connections_closed: u64,
    /// Calls of peers that were let in.
    pub calls_admitted: u64,
    /// Peers that this relay keeps a slot for now.
    pub relay_slots: u64,
    /// Connections that this relay carries now.
    pub relay_circuits: u64,
    /// Connections that it has carried.
    pub relay_circuits_opened: u64,
    /// Slots and connections that it refused.
    pub relay_refusals: u64,
}

/// The same, counted by the tasks of a node.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) connections_opened: AtomicU64,
    pub(crate) connections_closed: AtomicU64,
    pub(crate) calls_admitted: AtomicU64,
    relay_slots: AtomicU64,
    relay_circuits: AtomicU64,
    relay_circuits_opened: AtomicU64,
    relay_refusals: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// An end whose beginning was not told changes nothing.
fn subtract(counter: &AtomicU64) {
    let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
}

impl Counters {
    pub(crate) fn read(&self) -> NetCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        NetCounters {
            connections_opened: read(&self.connections_opened),
            connections_closed: read(&self.connections_closed),
            calls_admitted: read(&self.calls_admitted),
            relay_slots: read(&self.relay_slots),
            relay_circuits: read(&self.relay_circuits),
            relay_circuits_opened: read(&self.relay_circuits_opened),
            relay_refusals: read(&self.relay_refusals),
        }
    }

    pub(crate) fn handle_relay(&self, event: &relay::Event) {
        match event {
            relay::Event::ReservationReqAccepted { renewed: false, .. } => add(&self.relay_slots),
            relay::Event::ReservationClosed { .. } | relay::Event::ReservationTimedOut { .. } => {
                subtract(&self.relay_slots);
            }
            relay::Event::CircuitReqAccepted { .. } => {
                add(&self.relay_circuits);
                add(&self.relay_circuits_opened);
            }
            relay::Event::CircuitClosed { .. } => subtract(&self.relay_circuits),
            relay::Event::ReservationReqDenied { .. } | relay::Event::CircuitReqDenied { .. } => {
                add(&self.relay_refusals);
            }
            _ => {}
        }
    }
}
