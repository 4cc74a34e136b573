//! The one task that owns the swarm. It awaits nothing but the swarm, a bounded queue of commands and a clock tick, and
//! it never moves the bytes of a stream: a slow peer or handler cannot hold it up.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use libp2p::core::{ConnectedPoint, Multiaddr};
use libp2p::gossipsub::{MessageId, TopicHash};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{PeerId as LibPeerId, Swarm, autonat, identify, mdns, ping, relay, upnp};
use swarm_wire::PeerId;
use tokio::sync::{mpsc, oneshot};

use super::behaviour::{Behaviour, BehaviourEvent, kad_protocol};
use super::boxed::Boxed;
use super::counters;
use super::gossip::Validator;
use super::identity::Identity;
use super::shared::Shared;
use super::{libp2p_peer, wire_peer};
use crate::addr::{is_plausible, without_peer};
use crate::dht::SignedRecord;
use crate::error::{DhtError, DialError, GossipError};
use crate::event::NetEvent;
use crate::gossip::{Announcement, Verdict};
use crate::links::PathKind;
use crate::punch::PunchDial;
use crate::punch::reach::Reachability;

mod dht;
mod dial;
mod gossip;
mod seen;
mod upkeep;

use dht::Queries;
use dial::Dials;
pub(crate) use dial::root_cause;
use gossip::Topics;
use seen::Seen;
use upkeep::Upkeep;

/// How often bootstrap peers and relays are looked after.
const TICK: Duration = Duration::from_millis(250);
/// How long a shutdown waits for connections to close properly.
pub(super) const GOODBYE: Duration = Duration::from_millis(500);

pub(crate) type Reply<T, E> = oneshot::Sender<Result<T, E>>;

/// What other tasks ask of the swarm.
pub(crate) enum Command {
    /// Connect to an address.
    Dial { address: Multiaddr, reply: Reply<PeerId, DialError> },
    /// Connect to a peer at any address that is known or can be found.
    Connect { peer: PeerId, reply: Reply<PeerId, DialError> },
    /// Connect to a peer directly that is connected over a relay.
    Punch { peer: PeerId, dials: Vec<PunchDial> },
    /// Close a connection.
    Close { id: ConnectionId },
    /// Close every connection to a peer.
    Disconnect { peer: PeerId },
    /// Tell the addresses that this node listens on.
    ListenAddrs { reply: oneshot::Sender<Vec<Multiaddr>> },
    /// Tell the addresses at which this node may be reached, without its peer id.
    OwnAddrs { reply: oneshot::Sender<Vec<Multiaddr>> },
    /// Tell how this node can be reached.
    Reachability { reply: oneshot::Sender<Reachability> },
    /// Listen to a topic.
    Subscribe {
        topic: TopicHash,
        validate: Validator,
        announcements: mpsc::Sender<Announcement>,
        reply: Reply<(), GossipError>,
    },
    /// A listener is gone.
    Unsubscribe { topic: TopicHash },
    /// Announce something to a topic.
    Publish { topic: TopicHash, data: Vec<u8>, reply: Reply<(), GossipError> },
    /// A message was judged.
    Judged { message_id: MessageId, propagation_source: LibPeerId, verdict: Verdict },
    /// Announce a key.
    Provide { key: Vec<u8>, reply: Reply<(), DhtError> },
    /// Take an announcement back.
    StopProviding { key: Vec<u8> },
    /// Find who announced a key.
    Providers { key: Vec<u8>, reply: Reply<Vec<PeerId>, DhtError> },
    /// Store a record.
    PutRecord { key: Vec<u8>, value: Vec<u8>, reply: Reply<(), DhtError> },
    /// Find a record.
    GetRecord { key: Vec<u8>, reply: Reply<Option<Vec<u8>>, DhtError> },
    /// Sign a record and keep it stored.
    PublishRecord { name: String, value: Bytes, ttl: Duration, reply: Reply<(), DhtError> },
    /// Put a record no more.
    UnpublishRecord { name: String },
    /// Find a peer's newest record.
    PublishedRecord { publisher: PeerId, name: String, reply: Reply<Option<SignedRecord>, DhtError> },
}

/// See the module.
pub(crate) struct Driver {
    swarm: Swarm<Boxed<Behaviour>>,
    shared: Arc<Shared>,
    /// Signs the records that this node publishes.
    identity: Identity,
    commands: mpsc::Receiver<Command>,
    dials: Dials,
    queries: Queries,
    topics: Topics,
    upkeep: Upkeep,
    seen: Seen,
    /// Where each connection leads, for judging the addresses that its peer claims.
    remotes: HashMap<ConnectionId, Multiaddr>,
    /// Connections that this end dialled.
    dialled: HashSet<ConnectionId>,
    /// Connections whose peer has not said yet what it is.
    unidentified: HashSet<ConnectionId>,
    /// Peers that we dialled because mDNS saw them; they may belong to another network.
    from_mdns: HashSet<LibPeerId>,
}

impl Driver {
    pub(crate) fn new(
        swarm: Swarm<Boxed<Behaviour>>,
        shared: Arc<Shared>,
        identity: Identity,
        commands: mpsc::Receiver<Command>,
    ) -> Self {
        let upkeep = Upkeep::new(&shared.config);
        Self {
            swarm,
            shared,
            identity,
            commands,
            dials: Dials::default(),
            queries: Queries::default(),
            topics: Topics::default(),
            upkeep,
            seen: Seen::default(),
            remotes: HashMap::new(),
            dialled: HashSet::new(),
            unidentified: HashSet::new(),
            from_mdns: HashSet::new(),
        }
    }

    /// Runs until the node is stopped, then says goodbye to every peer.
    pub(crate) async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let stopped = self.shared.stopped.clone();
        loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.handle_event(event),
                Some(command) = self.commands.recv() => self.handle_command(command),
                _ = tick.tick() => self.handle_tick(),
                () = stopped.cancelled() => break,
            }
        }
        self.commands.close();
        let peers: Vec<LibPeerId> = self.swarm.connected_peers().copied().collect();
        for peer in peers {
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let closed = async {
            while self.swarm.connected_peers().next().is_some() {
                let event = self.swarm.select_next_some().await;
                self.handle_event(event);
            }
        };
        if tokio::time::timeout(GOODBYE, closed).await.is_err() {
            tracing::debug!("some connections did not close in time");
        }
    }

    fn handle_command(&mut self, command: Command) {
        match command {
            Command::Dial { address, reply } => self.dial_address(address, reply),
            Command::Connect { peer, reply } => self.connect(&peer, reply),
            Command::Punch { peer, dials } => self.punch(&peer, dials),
            Command::Close { id } => {
                self.swarm.close_connection(id);
            }
            Command::Disconnect { peer } => {
                if let Ok(peer) = libp2p_peer(&peer) {
                    let _ = self.swarm.disconnect_peer_id(peer);
                }
            }
            Command::ListenAddrs { reply } => {
                let _ = reply.send(self.listen_addrs());
            }
            Command::OwnAddrs { reply } => {
                let own = self.swarm.listeners().chain(self.swarm.external_addresses());
                let _ = reply.send(own.map(without_peer).collect());
            }
            Command::Reachability { reply } => {
                let _ = reply.send(self.reachability());
            }
            Command::Subscribe { topic, validate, announcements, reply } => {
                self.subscribe(topic, validate, announcements, reply);
            }
            Command::Unsubscribe { topic } => self.unsubscribe(&topic),
            Command::Publish { topic, data, reply } => self.publish(&topic, data, reply),
            Command::Judged { message_id, propagation_source, verdict } => {
                self.judged(&message_id, &propagation_source, verdict);
            }
            Command::Provide { key, reply } => self.provide(key, reply),
            Command::StopProviding { key } => self.stop_providing(key),
            Command::Providers { key, reply } => self.providers(key, reply),
            Command::PutRecord { key, value, reply } => self.put_record(key, value, reply),
            Command::GetRecord { key, reply } => self.get_record(key, reply),
            Command::PublishRecord { name, value, ttl, reply } => {
                self.publish_record(&name, value, ttl, reply);
            }
            Command::UnpublishRecord { name } => self.unpublish_record(&name),
            Command::PublishedRecord { publisher, name, reply } => {
                self.published_record(&publisher, &name, reply);
            }
        }
    }

    fn listen_addrs(&self) -> Vec<Multiaddr> {
        let local = *self.swarm.local_peer_id();
        let mut addresses: Vec<Multiaddr> =
            self.swarm.listeners().filter_map(|a| a.clone().with_p2p(local).ok()).collect();
        addresses.sort_by_key(|a| crate::addr::rank(&a.to_string()));
        addresses
    }

    fn handle_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.handle_behaviour_event(event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                counters::add(&self.shared.counters.connections_opened);
                let remote = leads_to(&endpoint);
                // A socket that was adopted is seen at a port where no other connection will come from.
                if !self.shared.adopted.leads_to(&remote) {
                    self.seen.handle_established(connection_id, &endpoint);
                }
                if let (ConnectedPoint::Dialer { address, .. }, Ok(peer)) = (&endpoint, wire_peer(&peer_id)) {
                    self.shared.table().handle_address(
                        self.shared.now(),
                        &peer,
                        &without_peer(address).to_string(),
                    );
                }
                if endpoint.is_dialer() {
                    self.dialled.insert(connection_id);
                }
                self.unidentified.insert(connection_id);
                self.remotes.insert(connection_id, remote);
                self.dials.handle_established(connection_id, peer_id);
                self.upkeep.handle_established(peer_id);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, cause, num_established, .. } => {
                tracing::debug!(peer = %peer_id, ?cause, "connection closed");
                counters::add(&self.shared.counters.connections_closed);
                self.remotes.remove(&connection_id);
                self.handle_unseen(connection_id);
                self.dialled.remove(&connection_id);
                self.handle_identified(connection_id);
                if num_established == 0 {
                    self.from_mdns.remove(&peer_id);
                }
            }
            SwarmEvent::OutgoingConnectionError { peer_id, connection_id, error } => {
                if let Some(peer) = peer_id.filter(|peer| !self.swarm.is_connected(peer)) {
                    self.from_mdns.remove(&peer);
                }
                self.handle_dial_error(connection_id, peer_id, &error);
            }
            SwarmEvent::NewListenAddr { address, listener_id } => {
                if self.upkeep.handle_listening(listener_id) {
                    tracing::info!(%address, "reachable through a relay");
                } else if self.shared.config.relay_server && self.shared.config.external.is_empty() {
                    // A relay is of use only where it is reachable; its operator listens on such addresses.
                    self.swarm.add_external_address(address.clone());
                }
                let local = *self.swarm.local_peer_id();
                let text = address.clone().with_p2p(local).unwrap_or(address).to_string();
                self.shared.emit(NetEvent::Listening(text));
            }
            SwarmEvent::ListenerClosed { listener_id, reason, .. } => {
                self.upkeep.handle_listener_closed(listener_id, self.shared.now());
                if let Err(error) = reason {
                    tracing::warn!(%error, "listener closed");
                }
            }
            SwarmEvent::ListenerError { error, .. } => tracing::warn!(%error, "listener error"),
            SwarmEvent::ExternalAddrConfirmed { address } => {
                self.shared.emit(NetEvent::Reachable(address.to_string()));
            }
            _ => {}
        }
    }

    fn handle_behaviour_event(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Identify(identify::Event::Received { peer_id, connection_id, info }) => {
                self.handle_identify(peer_id, connection_id, &info);
                self.handle_identified(connection_id);
            }
            BehaviourEvent::Identify(identify::Event::Error { connection_id, .. }) => {
                self.handle_identified(connection_id);
            }
            BehaviourEvent::Ping(ping::Event { peer, connection, result: Ok(rtt) }) => {
                self.handle_ping(peer, connection, rtt);
            }
            BehaviourEvent::Kad(event) => self.handle_kad_event(event),
            BehaviourEvent::Gossip(event) => self.handle_gossip(event),
            BehaviourEvent::Upnp(upnp::Event::GatewayNotFound | upnp::Event::NonRoutableGateway) => {
                tracing::info!("no router here opens ports (UPnP)");
            }
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => {
                for (peer, address) in found {
                    self.handle_mdns(peer, &address);
                }
            }
            BehaviourEvent::RelayClient(relay::client::Event::ReservationReqAccepted {
                relay_peer_id,
                renewal: false,
                ..
            }) => {
                if let Ok(peer) = wire_peer(&relay_peer_id) {
                    self.shared.emit(NetEvent::RelayReserved(peer));
                }
            }
            BehaviourEvent::RelayServer(event) => self.shared.counters.handle_relay(&event),
            BehaviourEvent::AutonatClient(autonat::v2::client::Event { tested_addr, result, .. }) => {
                tracing::debug!(address = %tested_addr, reachable = result.is_ok(), "reachability tested");
            }
            _ => {}
        }
    }

    /// What a peer says about itself: its addresses are kept when they are plausible, for us and for the DHT.
    fn handle_identify(&mut self, peer_id: LibPeerId, connection_id: ConnectionId, info: &identify::Info) {
        let Ok(peer) = wire_peer(&peer_id) else { return };
        let in_our_network = info.protocols.contains(&kad_protocol(&self.shared.config));
        // Known from here on, whatever it is: it makes room for the next one that mDNS sees.
        let from_mdns = self.from_mdns.remove(&peer_id);
        if !in_our_network && from_mdns {
            tracing::debug!(%peer_id, "closing: mDNS found it, but it belongs to another network");
            let _ = self.swarm.disconnect_peer_id(peer_id);
            return;
        }
        self.handle_seen(connection_id, &info.observed_addr);
        let Some(seen_at) = self.remotes.get(&connection_id).map(ToString::to_string) else { return };
        if let (true, Some(address)) =
            (info.protocols.contains(&relay::HOP_PROTOCOL_NAME), self.remotes.get(&connection_id))
        {
            let address = without_peer(address);
            // A relay behind a relay is of no use, and where an incoming connection came from nobody listens.
            if self.dialled.contains(&connection_id) && !crate::addr::is_relayed(&address.to_string()) {
                self.upkeep.handle_relay(peer_id, address);
            }
        }
        let limit = self.shared.config.limits.addresses_per_peer;
        for address in info.listen_addrs.iter().map(without_peer).take(limit) {
            let text = address.to_string();
            if !is_plausible(&text, &seen_at) {
                tracing::debug!(peer = %peer.short(), address = text, "address not kept: it is nearer than the peer");
                continue;
            }
            self.shared.table().handle_address(self.shared.now(), &peer, &text);
            if in_our_network {
                self.swarm.behaviour_mut().kad.add_address(&peer_id, address);
            }
        }
        if in_our_network {
            // It may listen nowhere that we could reach, but here it answers.
            let alone = self.dht_is_empty();
            let dialled = self.remotes.get(&connection_id).filter(|_| self.dialled.contains(&connection_id));
            if let Some(address) = dialled.map(without_peer).filter(|_| alone) {
                self.swarm.behaviour_mut().kad.add_address(&peer_id, address);
            }
        }
    }

    /// What a peer is, is known now, or will not be learnt on this connection.
    fn handle_identified(&mut self, connection_id: ConnectionId) {
        self.unidentified.remove(&connection_id);
        self.make_waiting();
    }

    /// Pings measure peers that have no link protocol of ours, such as stock libp2p nodes.
    fn handle_ping(&mut self, peer: LibPeerId, connection: ConnectionId, rtt: Duration) {
        let (Ok(peer), Some(leads_to)) = (wire_peer(&peer), self.remotes.get(&connection)) else { return };
        let state = self.shared.table().known_state(&peer);
        if let Some(state) = state {
            let (now, path) = (self.shared.now(), PathKind::of(&leads_to.to_string()));
            let mut links = state.links();
            let link = links.path(path);
            let unprobed = 5 * self.shared.config.liveness.probe_interval;
            if link.estimate(now, path).is_none_or(|known| known.age > unprobed) {
                link.handle_answer(now, rtt);
            }
        }
    }

    fn handle_mdns(&mut self, peer_id: LibPeerId, address: &Multiaddr) {
        let Ok(peer) = wire_peer(&peer_id) else { return };
        let address = without_peer(address);
        self.shared.table().handle_address(self.shared.now(), &peer, &address.to_string());
        if self.swarm.is_connected(&peer_id) || self.from_mdns.len() >= self.shared.config.limits.peers {
            return;
        }
        let options = DialOpts::peer_id(peer_id)
            .condition(PeerCondition::DisconnectedAndNotDialing)
            .addresses(vec![address])
            .build();
        if self.swarm.dial(options).is_ok() {
            self.from_mdns.insert(peer_id);
        }
    }
}

/// Where a connection leads; over a relay, which one.
fn leads_to(endpoint: &ConnectedPoint) -> Multiaddr {
    match endpoint {
        // The remote address is only a name then.
        ConnectedPoint::Listener { local_addr, .. } if endpoint.is_relayed() => local_addr.clone(),
        _ => endpoint.get_remote_address().clone(),
    }
}
