//! What a node is told at its start. Every limit has a unit, a default and a reason here and nowhere else.

use std::path::PathBuf;
use std::time::Duration;

use swarm_wire::limits::{NAME_MAX_BYTES, RPC_BODY_MAX_BYTES};

use crate::access::Access;
use crate::addr::last_peer;
use crate::dht::NETWORK_MAX_BYTES;
use crate::error::ConfigError;
use crate::relays::CANDIDATES_MAX;

/// Rendezvous points of one node: each is visited by a task of its own.
const RENDEZVOUS_MAX: usize = 16;

/// How a node listens, whom it looks for, and what it allows others.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// Multiaddresses to listen on. Default: QUIC and TCP on 127.0.0.1, free ports.
    pub listen: Vec<String>,
    /// Addresses (with `/p2p/` part) of peers that are dialled at the start and again while they are not connected.
    pub bootstrap: Vec<String>,
    /// Relays (with `/p2p/` part) at which this node may reserve slots, so that peers reach it through them. Not empty: relays
    /// that it meets otherwise are used as well when these are lost.
    pub relays: Vec<String>,
    /// Rendezvous points (with `/p2p/` part): the node registers there under the name of its network, and connects to others
    /// who did while it has few peers. At most 16. A point may belong to another
    /// network, but not where there is a swarm key: proofs name the network.
    pub rendezvous: Vec<String>,
    /// Be such a point for others. Default: off.
    pub rendezvous_point: bool,
    /// Slots kept at the same time, at the nearest relays; a lost one is replaced by one elsewhere. Default: 2.
    pub relay_slots: usize,
    /// Addresses under which this node is known to be reachable, when the operator knows them.
    pub external: Vec<String>,
    /// Name of the network. Nodes of other networks are neither found through the DHT nor kept when mDNS finds them.
    pub network: String,
    /// Protocol id of the DHT. Default: one of the network's own, `/lattica/kad/2.0.0/<network>`. Another one, such as
    /// `/ipfs/kad/1.0.0`, joins the DHT of other programs; nodes that are to find each other there need the same one.
    pub dht_protocol: Option<String>,
    /// The protocol version in our identify message. Nobody is refused for theirs here; nodes of the original Lattica drop
    /// everybody who does not have their own. Default: `lattica/2.0.0`.
    pub identify_version: String,
    /// Whom this node talks to. Default: everybody. With a key or a list, every connection is checked before anything is
    /// said on it.
    pub access: Access,
    /// Look for peers on the local network. Default: off.
    pub mdns: bool,
    /// Take part in gossip, for `Node::subscribe` and `Node::publish`. Default: off. Streams of gossip keep a spare connection
    /// to a peer open.
    pub gossip: bool,
    /// Ask the local network's router for a port (UPnP), so that peers outside reach this node. Default: off.
    pub upnp: bool,
    /// Answer DHT queries. Default: on. A client-only node still stores and finds records at others.
    pub dht_server: bool,
    /// Carry other peers' connections. Such a node also announces its listen addresses as reachable.
    pub relay_server: bool,
    /// Try to turn relayed connections into direct ones. Default: on.
    pub hole_punching: bool,
    /// Ask peers whether our addresses can be reached, and answer such questions (AutoNAT v2). Default: on.
    pub autonat: bool,
    /// How often one peer is asked for news: links that others measured, and where peers can be reached. Default: 5 s.
    pub news_interval: Duration,
    /// While fewer peers are connected, the node connects to others that it heard of. Default: 4.
    pub keep_peers: usize,
    /// Where peers are remembered over a restart. Default: nowhere.
    pub peers_file: Option<PathBuf>,
    /// Bounds on what peers may make us hold.
    pub limits: Limits,
    /// When a silent connection counts as dead.
    pub liveness: Liveness,
    /// Threads that move bytes, beside the one of the swarm. Default: 2. They belong to the node, so that an
    /// application that blocks its own runtime does not make its peers believe that it died.
    pub io_threads: usize,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Self {
            listen: vec!["/ip4/127.0.0.1/udp/0/quic-v1".to_owned(), "/ip4/127.0.0.1/tcp/0".to_owned()],
            bootstrap: Vec::new(),
            relays: Vec::new(),
            rendezvous: Vec::new(),
            rendezvous_point: false,
            relay_slots: 2,
            external: Vec::new(),
            network: "default".to_owned(),
            dht_protocol: None,
            identify_version: "lattica/2.0.0".to_owned(),
            access: Access::default(),
            mdns: false,
            gossip: false,
            upnp: false,
            dht_server: true,
            relay_server: false,
            hole_punching: true,
            autonat: true,
            news_interval: Duration::from_secs(5),
            keep_peers: 4,
            peers_file: None,
            limits: Limits::default(),
            liveness: Liveness::default(),
            io_threads: 2,
        }
    }
}

/// Bounds per peer and per node. Everything that a peer can make us hold is the product of some of these.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Established connections of the node. Default: 512.
    pub connections: u32,
    /// Established connections with one peer. Default: 8 (direct and relayed, both directions, dial-backs).
    pub connections_per_peer: u32,
    /// Addresses remembered per peer. Default: 16.
    pub addresses_per_peer: usize,
    /// Peers remembered; the longest unseen ones that are not connected are forgotten first. Default: 4096.
    pub peers: usize,
    /// Incoming streams of one connection that run at the same time. Default: 256.
    pub streams_per_connection: usize,
    /// Incoming streams of one connection that wait for a place. Further ones are reset at once. Default: 64.
    pub waiting_streams_per_connection: usize,
    /// Calls of one peer that run here at the same time; further ones are answered RESOURCE_EXHAUSTED. Default: 256.
    pub calls_per_peer: usize,
    /// Bytes of call bodies of one peer held here; beyond, calls are answered RESOURCE_EXHAUSTED. Default: 32 MiB.
    pub call_bytes_per_peer: usize,
    /// Our own calls that wait for answers of one peer; further ones wait for a place. Default: 4096.
    pub outgoing_calls_per_peer: usize,
    /// Largest body of a call or an answer. Default and maximum: 8 MiB (`RPC_BODY_MAX_BYTES`).
    pub body_bytes: usize,
    /// Relayed connections (circuits) carried for others at the same time. Default: 128.
    pub relay_circuits: usize,
    /// Slots kept for peers that want to be reached through us. Default: 256.
    pub relay_reservations: usize,
    /// Bytes that one circuit may carry; 0 is no limit. Default: 0.
    pub relay_circuit_bytes: u64,
    /// How long one circuit may live. Default: 24 h.
    pub relay_circuit_duration: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 512,
            connections_per_peer: 8,
            addresses_per_peer: 16,
            peers: 4096,
            streams_per_connection: 256,
            waiting_streams_per_connection: 64,
            calls_per_peer: 256,
            call_bytes_per_peer: 32 * 1024 * 1024,
            outgoing_calls_per_peer: 4096,
            body_bytes: RPC_BODY_MAX_BYTES,
            relay_circuits: 128,
            relay_reservations: 256,
            relay_circuit_bytes: 0,
            relay_circuit_duration: Duration::from_secs(24 * 3600),
        }
    }
}

/// When a connection counts as dead.
#[derive(Debug, Clone)]
pub struct Liveness {
    /// A QUIC connection that hears nothing for this long is lost. Default: 1.5 s, the smaller of both sides counts.
    pub quic_idle: Duration,
    /// A quiet QUIC connection sends a packet this often. Default: 250 ms, six chances per idle time.
    pub quic_keep_alive: Duration,
    /// Round trips are measured this often on each connection. Default: 1 s.
    pub probe_interval: Duration,
    /// A connection whose probes stay unanswered for this long is closed. It is what finds a machine that vanished
    /// behind TCP (a process that dies is found at once there, by the reset). Default: 5 s.
    pub probe_timeout: Duration,
    /// How long a dial may take. Default: 10 s.
    pub dial_timeout: Duration,
}

impl Default for Liveness {
    fn default() -> Self {
        Self {
            quic_idle: Duration::from_millis(1500),
            quic_keep_alive: Duration::from_millis(250),
            probe_interval: Duration::from_secs(1),
            probe_timeout: Duration::from_secs(5),
            dial_timeout: Duration::from_secs(10),
        }
    }
}

impl NodeConfig {
    /// A node of `network` that listens on one machine only, with free ports on `ip`.
    pub fn loopback(ip: &str, network: &str) -> Self {
        Self {
            listen: vec![format!("/ip4/{ip}/udp/0/quic-v1"), format!("/ip4/{ip}/tcp/0")],
            network: network.to_owned(),
            ..Self::default()
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// Names the first field that is out of range, and the range.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let bad = |field: &'static str, value: String, allowed: &'static str| {
            Err(ConfigError { field, value, allowed })
        };
        let network_ok = (1..=NETWORK_MAX_BYTES).contains(&self.network.len())
            && self.network.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
        if !network_ok {
            return bad("network", self.network.clone(), "1 to 64 letters, digits, '-', '_' or '.'");
        }
        if let Some(name) = self.dht_protocol.as_ref().filter(|n| !n.starts_with('/') || n.len() > 140) {
            return bad("dht_protocol", name.clone(), "1 to 140 bytes that begin with '/'");
        }
        if !(1..=NAME_MAX_BYTES).contains(&self.identify_version.len()) {
            return bad("identify_version", self.identify_version.clone(), "1 to 256 bytes");
        }
        for (field, addresses) in [
            ("listen", &self.listen),
            ("bootstrap", &self.bootstrap),
            ("relays", &self.relays),
            ("rendezvous", &self.rendezvous),
            ("external", &self.external),
        ] {
            if addresses.len() > 64 {
                return bad(field, format!("{} addresses", addresses.len()), "at most 64 addresses");
            }
            if let Some(address) = addresses.iter().find(|a| !a.starts_with('/') || a.len() > NAME_MAX_BYTES)
            {
                return bad(field, address.clone(), "a multiaddress such as /ip4/127.0.0.1/tcp/4001");
            }
        }
        for (field, addresses) in
            [("bootstrap", &self.bootstrap), ("relays", &self.relays), ("rendezvous", &self.rendezvous)]
        {
            if let Some(address) = addresses.iter().find(|a| last_peer(a).is_none()) {
                return bad(field, address.clone(), "an address that ends with /p2p/PEER_ID");
            }
        }
        if self.relays.len() > CANDIDATES_MAX {
            return bad("relays", format!("{} addresses", self.relays.len()), "at most 32 addresses");
        }
        if self.rendezvous.len() > RENDEZVOUS_MAX {
            return bad("rendezvous", format!("{} addresses", self.rendezvous.len()), "at most 16 addresses");
        }
        if !(1..=16).contains(&self.relay_slots) {
            return bad("relay_slots", self.relay_slots.to_string(), "1 to 16");
        }
        if !(1..=64).contains(&self.io_threads) {
            return bad("io_threads", self.io_threads.to_string(), "1 to 64");
        }
        if !(Duration::from_millis(10)..=Duration::from_secs(3600)).contains(&self.news_interval) {
            return bad("news_interval", format!("{:?}", self.news_interval), "10 ms to 1 h");
        }
        if self.keep_peers > 64 {
            return bad("keep_peers", self.keep_peers.to_string(), "0 to 64");
        }
        self.limits.validate()?;
        self.liveness.validate()
    }
}

impl Limits {
    fn validate(&self) -> Result<(), ConfigError> {
        let counts = [
            ("limits.connections", self.connections as usize),
            ("limits.connections_per_peer", self.connections_per_peer as usize),
            ("limits.addresses_per_peer", self.addresses_per_peer),
            ("limits.peers", self.peers),
            ("limits.streams_per_connection", self.streams_per_connection),
            ("limits.waiting_streams_per_connection", self.waiting_streams_per_connection),
            ("limits.calls_per_peer", self.calls_per_peer),
            ("limits.outgoing_calls_per_peer", self.outgoing_calls_per_peer),
        ];
        for (field, value) in counts {
            if !(1..=1_000_000).contains(&value) {
                return Err(ConfigError { field, value: value.to_string(), allowed: "1 to 1000000" });
            }
        }
        if self.body_bytes == 0 || self.body_bytes > RPC_BODY_MAX_BYTES {
            return Err(ConfigError {
                field: "limits.body_bytes",
                value: self.body_bytes.to_string(),
                allowed: "1 to 8388608",
            });
        }
        if self.call_bytes_per_peer < self.body_bytes {
            return Err(ConfigError {
                field: "limits.call_bytes_per_peer",
                value: self.call_bytes_per_peer.to_string(),
                allowed: "at least limits.body_bytes",
            });
        }
        Ok(())
    }
}

impl Liveness {
    fn validate(&self) -> Result<(), ConfigError> {
        let times = [
            ("liveness.quic_idle", self.quic_idle),
            ("liveness.quic_keep_alive", self.quic_keep_alive),
            ("liveness.probe_interval", self.probe_interval),
            ("liveness.probe_timeout", self.probe_timeout),
            ("liveness.dial_timeout", self.dial_timeout),
        ];
        for (field, value) in times {
            if !(Duration::from_millis(10)..=Duration::from_secs(3600)).contains(&value) {
                return Err(ConfigError { field, value: format!("{value:?}"), allowed: "10 ms to 1 h" });
            }
        }
        if self.quic_keep_alive * 2 > self.quic_idle {
            return Err(ConfigError {
                field: "liveness.quic_keep_alive",
                value: format!("{:?}", self.quic_keep_alive),
                allowed: "at most half of liveness.quic_idle",
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        NodeConfig::default().validate().unwrap();
        NodeConfig::loopback("127.0.0.7", "test").validate().unwrap();
    }

    #[test]
    fn the_error_names_the_field_and_the_range() {
        let config = NodeConfig { network: "with space".to_owned(), ..NodeConfig::default() };
        let text = config.validate().unwrap_err().to_string();
        assert!(
            text.contains("network") && text.contains("with space") && text.contains("letters"),
            "{text}"
        );
    }

    #[test]
    fn every_kind_of_bad_value_is_refused() {
        let good = NodeConfig::default;
        let limits = Limits::default;
        let peer = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
        let at = |tail: String| format!("/ip4/127.0.0.1/tcp/1{tail}");
        let relay = at(format!("/p2p/{peer}"));
        NodeConfig { relays: vec![relay.clone(); 32], rendezvous: vec![relay.clone(); 16], ..good() }
            .validate()
            .unwrap();
        let bad = [
            NodeConfig { listen: vec!["127.0.0.1:80".to_owned()], ..good() },
            NodeConfig { bootstrap: vec![at(String::new())], ..good() },
            NodeConfig { bootstrap: vec![at("/p2p/nobody".to_owned())], ..good() },
            NodeConfig { bootstrap: vec![at(format!("/p2p/{peer}/p2p-circuit"))], ..good() },
            NodeConfig { io_threads: 0, ..good() },
            NodeConfig { relay_slots: 0, ..good() },
            NodeConfig { news_interval: Duration::ZERO, ..good() },
            NodeConfig { keep_peers: 65, ..good() },
            NodeConfig { relays: vec![relay.clone(); 33], ..good() },
            NodeConfig { rendezvous: vec![at(String::new())], ..good() },
            NodeConfig { rendezvous: vec![relay; 17], ..good() },
            NodeConfig { limits: Limits { calls_per_peer: 0, ..limits() }, ..good() },
            NodeConfig { limits: Limits { body_bytes: RPC_BODY_MAX_BYTES + 1, ..limits() }, ..good() },
            NodeConfig { limits: Limits { call_bytes_per_peer: 1, ..limits() }, ..good() },
            NodeConfig {
                liveness: Liveness { quic_keep_alive: Duration::from_secs(1), ..Liveness::default() },
                ..good()
            },
        ];
        for (i, config) in bad.iter().enumerate() {
            assert!(config.validate().is_err(), "case {i}");
        }
    }
}
