//! The libp2p behaviours that make up a node, and how they are set.

use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::gossipsub::{AllowAllSubscriptionFilter, MaxCountSubscriptionFilter};
use libp2p::identity::Keypair;
use libp2p::kad::{self, store::MemoryStore, store::MemoryStoreConfig};
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{StreamProtocol, autonat, gossipsub, identify, mdns, ping, relay, upnp};

use super::boxed::Boxed;
use super::dht_store::CheckedStore;
use super::shared::Shared;
use super::streams;
use crate::config::NodeConfig;

/// Records and provider entries that one node keeps for the network.
const DHT_RECORDS: usize = 16 * 1024;
/// Largest value of a DHT record.
pub(crate) const DHT_VALUE_MAX_BYTES: usize = 64 * 1024;

/// Topics that one peer may listen to, and that it may name at once.
const TOPICS_OF_A_PEER: usize = 256;

/// Gossip that remembers a bounded number of topics of each peer.
type Gossip = gossipsub::Behaviour<
    gossipsub::IdentityTransform,
    MaxCountSubscriptionFilter<AllowAllSubscriptionFilter>,
>;

/// The order matters: limits refuse before anybody else spends something on a connection. What is off unless it is asked for is
/// boxed, so that it takes no room of a connection's.
#[derive(NetworkBehaviour)]
pub(crate) struct Behaviour {
    pub(crate) limits: connection_limits::Behaviour,
    pub(crate) relay_client: relay::client::Behaviour,
    pub(crate) relay_server: Toggle<Boxed<relay::Behaviour>>,
    pub(crate) autonat_client: Toggle<autonat::v2::client::Behaviour>,
    pub(crate) autonat_server: Toggle<autonat::v2::server::Behaviour>,
    pub(crate) identify: identify::Behaviour,
    pub(crate) ping: ping::Behaviour,
    pub(crate) kad: kad::Behaviour<CheckedStore>,
    pub(crate) mdns: Toggle<mdns::tokio::Behaviour>,
    pub(crate) upnp: Toggle<upnp::tokio::Behaviour>,
    pub(crate) gossip: Toggle<Boxed<Gossip>>,
    pub(crate) streams: streams::Behaviour,
}

/// The DHT's protocol id: one per network, so that networks never mix, unless the operator joins another DHT.
pub(crate) fn kad_protocol(config: &NodeConfig) -> StreamProtocol {
    let ours = || format!("/lattica/kad/2.0.0/{}", config.network);
    let name = config.dht_protocol.clone().unwrap_or_else(ours);
    StreamProtocol::try_from_owned(name).expect("validated: it begins with a slash")
}

impl Behaviour {
    pub(crate) fn new(
        keypair: &Keypair,
        relay_client: relay::client::Behaviour,
        shared: Arc<Shared>,
    ) -> Result<Self, Box<dyn std::error::Error + Send + Sync>> {
        let config = &shared.config;
        let peer = keypair.public().to_peer_id();
        let limits = &config.limits;
        // A quarter of the connections is kept for those that we want to make ourselves.
        let incoming = (limits.connections - limits.connections / 4).max(1);
        let connections = ConnectionLimits::default()
            .with_max_established(Some(limits.connections))
            .with_max_established_incoming(Some(incoming))
            .with_max_established_per_peer(Some(limits.connections_per_peer))
            .with_max_pending_incoming(Some(incoming.min(128)))
            .with_max_pending_outgoing(Some(limits.connections.min(128)));
        let identify = identify::Config::new(config.identify_version.clone(), keypair.public())
            .with_agent_version(concat!("lattica-net/", env!("CARGO_PKG_VERSION")).to_owned())
            .with_push_listen_addr_updates(true)
            .with_cache_size(0);
        let mdns = if config.mdns {
            Some(mdns::tokio::Behaviour::new(mdns::Config::default(), peer)?)
        } else {
            None
        };
        Ok(Self {
            limits: connection_limits::Behaviour::new(connections),
            relay_client,
            relay_server: config
                .relay_server
                .then(|| Boxed(relay::Behaviour::new(peer, relay_config(config))))
                .into(),
            // Who listens nowhere needs not ask where it can be reached: others would dial in vain, for ten seconds each.
            autonat_client: (config.autonat && !config.listen.is_empty())
                .then(autonat::v2::client::Behaviour::default)
                .into(),
            autonat_server: config.autonat.then(autonat::v2::server::Behaviour::default).into(),
            identify: identify::Behaviour::new(identify),
            ping: ping::Behaviour::new(ping::Config::new()),
            kad: kad(keypair, config),
            mdns: mdns.into(),
            upnp: config.upnp.then(upnp::tokio::Behaviour::default).into(),
            gossip: if config.gossip { Some(Boxed(gossip(keypair)?)) } else { None }.into(),
            streams: streams::Behaviour::new(shared),
        })
    }
}

fn relay_config(config: &NodeConfig) -> relay::Config {
    let limits = &config.limits;
    relay::Config {
        max_reservations: limits.relay_reservations,
        max_reservations_per_peer: 4,
        max_circuits: limits.relay_circuits,
        max_circuits_per_peer: limits.relay_circuits.min(32),
        max_circuit_bytes: limits.relay_circuit_bytes,
        max_circuit_duration: limits.relay_circuit_duration,
        reservation_rate_limiters: Vec::new(),
        circuit_src_rate_limiters: Vec::new(),
        ..relay::Config::default()
    }
    .reservation_rate_per_peer(at_once(60), again_after(60))
    .reservation_rate_per_ip(at_once(600), again_after(600))
    .circuit_src_per_peer(at_once(120), again_after(120))
    .circuit_src_per_ip(at_once(1200), again_after(1200))
}

/// What is allowed in one minute is allowed at once ..
fn at_once(per_minute: u32) -> NonZeroU32 {
    NonZeroU32::new(per_minute).expect("not zero")
}

/// .. and comes back one by one, each after this time.
fn again_after(per_minute: u32) -> Duration {
    Duration::from_secs(60) / per_minute
}

fn kad(keypair: &Keypair, config: &NodeConfig) -> kad::Behaviour<CheckedStore> {
    let peer = keypair.public().to_peer_id();
    let store = MemoryStoreConfig {
        max_records: DHT_RECORDS,
        max_value_bytes: DHT_VALUE_MAX_BYTES,
        max_provided_keys: DHT_RECORDS,
        ..MemoryStoreConfig::default()
    };
    let mut settings = kad::Config::new(kad_protocol(config));
    settings.set_query_timeout(Duration::from_secs(10)).set_max_packet_size(2 * DHT_VALUE_MAX_BYTES);
    let store = CheckedStore::new(MemoryStore::with_config(peer, store));
    let mut kad = kad::Behaviour::with_config(peer, store, settings);
    kad.set_mode(Some(if config.dht_server { kad::Mode::Server } else { kad::Mode::Client }));
    kad
}

/// How a peer's standing in a topic is counted: what was rejected counts, how much it delivers does not (topics are quiet).
pub(crate) fn topic_score() -> gossipsub::TopicScoreParams {
    gossipsub::TopicScoreParams {
        mesh_message_deliveries_weight: 0.0,
        mesh_failure_penalty_weight: 0.0,
        ..gossipsub::TopicScoreParams::default()
    }
}

fn gossip(keypair: &Keypair) -> Result<Gossip, Box<dyn std::error::Error + Send + Sync>> {
    let settings = gossipsub::ConfigBuilder::default()
        .validation_mode(gossipsub::ValidationMode::Strict)
        // Nothing is passed on before it was judged here.
        .validate_messages()
        .build()?;
    let filter = MaxCountSubscriptionFilter {
        filter: AllowAllSubscriptionFilter {},
        max_subscribed_topics: TOPICS_OF_A_PEER,
        max_subscriptions_per_request: TOPICS_OF_A_PEER,
    };
    let signed = gossipsub::MessageAuthenticity::Signed(keypair.clone());
    let mut gossip = Gossip::new_with_subscription_filter(signed, settings, filter)?;
    // Many honest nodes may sit behind one address.
    let score = gossipsub::PeerScoreParams {
        ip_colocation_factor_weight: 0.0,
        ..gossipsub::PeerScoreParams::default()
    };
    gossip.with_peer_score(score, gossipsub::PeerScoreThresholds::default())?;
    Ok(gossip)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_relay_allows_its_rate_every_minute_and_not_only_the_first() {
        let mut config = relay_config(&NodeConfig::default());
        let (peer, address) = (libp2p::PeerId::random(), "/ip4/9.9.9.9/tcp/1".parse().unwrap());
        let start = Instant::now();
        let mut allowed = |minute: u32| {
            let mut ask = |i: u32| {
                let now = start + Duration::from_secs(60) * minute + Duration::from_millis(100) * i;
                config.circuit_src_rate_limiters.iter_mut().all(|limit| limit.try_next(peer, &address, now))
            };
            (0..600).filter(|i| ask(*i)).count()
        };
        let minutes = [allowed(0), allowed(1), allowed(2)];
        assert!((200..=240).contains(&minutes[0]), "the burst and what came back since: {minutes:?}");
        assert!(minutes[1..].iter().all(|n| (110..=120).contains(n)), "{minutes:?}");
    }
}
