//! The behaviour that hands streams out and takes them in. Its handlers never touch a byte: each stream goes to a task of
//! its own at once, so that nothing a peer sends can hold up the swarm.
//!
//! An incoming stream always finds a place or an end that its opener sees: up to a limit it runs, up to a second limit it
//! waits, beyond it is reset.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use libp2p::PeerId as LibPeerId;
use libp2p::core::transport::PortUse;
use libp2p::core::{Endpoint, Multiaddr, multiaddr::Protocol};
use libp2p::swarm::{
    ConnectionDenied, ConnectionError, ConnectionId, FromSwarm, NetworkBehaviour, THandler, THandlerInEvent,
    THandlerOutEvent, ToSwarm,
};

use super::connection::Connection;
use super::shared::Shared;
use super::{link_probe, punch, wire_peer};
use crate::event::NetEvent;
use crate::peers::{Change, Rank};

mod handler;

use handler::Handler;

/// See the module.
pub(crate) struct Behaviour {
    shared: Arc<Shared>,
    next_key: u64,
    /// Connections whose handler was made but which another behaviour may still refuse.
    pending: HashMap<ConnectionId, Arc<Connection>>,
    established: HashMap<ConnectionId, Arc<Connection>>,
}

impl Behaviour {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, next_key: 1, pending: HashMap::new(), established: HashMap::new() }
    }

    fn handler(
        &mut self,
        id: ConnectionId,
        peer: LibPeerId,
        address: &Multiaddr,
        dialled: bool,
    ) -> Result<Handler, ConnectionDenied> {
        let peer = wire_peer(&peer).map_err(ConnectionDenied::new)?;
        let state = self.shared.table().state(self.shared.now(), &peer);
        let key = self.next_key;
        self.next_key += 1;
        let (made, leads) = (self.shared.now(), (dialled, address.to_string()));
        let limits = &self.shared.config.limits;
        let (connection, requests) = Connection::new(key, id, peer, made, leads, state, limits);
        self.pending.insert(id, Arc::clone(&connection));
        Ok(Handler::new(Arc::clone(&self.shared), connection, requests))
    }

    fn handle_established(&mut self, id: ConnectionId) {
        let Some(connection) = self.pending.remove(&id) else { return };
        let peer = connection.peer.clone();
        let now = self.shared.now();
        let change = {
            let rank = Rank {
                relayed: connection.is_relayed(),
                dialled_by_larger: connection.dialled == (self.shared.local > peer),
            };
            self.shared.table().handle_connected(now, &peer, connection.key, rank, Arc::clone(&connection))
        };
        self.established.insert(id, Arc::clone(&connection));
        // Who was dialled over a relay asks for a direct connection.
        if connection.is_relayed() && !connection.dialled && self.shared.config.hole_punching {
            self.shared.network.spawn(punch::keep_direct(Arc::clone(&self.shared), Arc::clone(&connection)));
        }
        self.shared.network.spawn(link_probe::measure(Arc::clone(&self.shared), connection));
        match change {
            Change::Connected => self.shared.emit(NetEvent::Connected(peer)),
            Change::BecameDirect => self.shared.emit(NetEvent::DirectPath(peer)),
            Change::Disconnected | Change::Nothing => {}
        }
    }

    /// `broke`: this end neither closed the connection nor let it go for being idle. Whether the other end did cannot be told.
    fn handle_closed(&mut self, id: ConnectionId, broke: bool) {
        let Some(connection) = self.established.remove(&id) else { return };
        let now = self.shared.now();
        // Of two dials at once one goes before anybody has looked; a spare is the best one left when the other has just gone.
        let in_use =
            !connection.is_redundant() && self.shared.table().is_best(&connection.peer, connection.key);
        if broke && in_use {
            connection.measured(|link| link.handle_break(now));
        }
        let change = self.shared.table().handle_disconnected(now, &connection.peer, connection.key);
        connection.fail();
        if change == Change::Disconnected {
            self.shared.emit(NetEvent::Disconnected(connection.peer.clone()));
        }
    }
}

impl NetworkBehaviour for Behaviour {
    type ConnectionHandler = Handler;
    type ToSwarm = Infallible;

    fn handle_established_inbound_connection(
        &mut self,
        id: ConnectionId,
        peer: LibPeerId,
        local: &Multiaddr,
        remote: &Multiaddr,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        // The remote address of a relayed connection is only a name; the relay's is in the local one.
        let leads = if local.iter().any(|part| part == Protocol::P2pCircuit) { local } else { remote };
        self.handler(id, peer, leads, false)
    }

    fn handle_established_outbound_connection(
        &mut self,
        id: ConnectionId,
        peer: LibPeerId,
        address: &Multiaddr,
        role: Endpoint,
        _: PortUse,
    ) -> Result<THandler<Self>, ConnectionDenied> {
        // In a punched hole both ends have dialled and one plays the listener.
        self.handler(id, peer, address, role == Endpoint::Dialer)
    }

    fn on_swarm_event(&mut self, event: FromSwarm<'_>) {
        match event {
            FromSwarm::ConnectionEstablished(event) => self.handle_established(event.connection_id),
            FromSwarm::ConnectionClosed(event) => {
                let broke = matches!(event.cause, Some(ConnectionError::IO(_)));
                self.handle_closed(event.connection_id, broke);
            }
            FromSwarm::DialFailure(event) => {
                self.pending.remove(&event.connection_id);
            }
            FromSwarm::ListenFailure(event) => {
                self.pending.remove(&event.connection_id);
            }
            _ => {}
        }
    }

    fn on_connection_handler_event(&mut self, _: LibPeerId, _: ConnectionId, event: THandlerOutEvent<Self>) {
        match event {}
    }

    fn poll(&mut self, _: &mut Context<'_>) -> Poll<ToSwarm<Infallible, THandlerInEvent<Self>>> {
        Poll::Pending
    }
}
