//! Peer-to-peer network: identity, encrypted connections, discovery, relays, RPC, tensor streams and link measurements.
//!
//! A [`Node`] listens on QUIC and TCP, finds peers through bootstrap nodes, a Kademlia DHT, rendezvous points or mDNS, reaches those behind
//! NATs through relays (calls and streams work there too) and moves to a direct path where one can be punched. Peers call
//! each other's methods and open named streams; every byte that comes from a peer is bounded before it is kept.
//!
//! ```
//! use bytes::Bytes;
//! use lattica_net::{Identity, Node, NodeConfig};
//! # #[cfg(feature = "service")]
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!
//! let alice = Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.91", "doc")).await?;
//! let bob = Node::start(Identity::generate(), NodeConfig::loopback("127.0.0.92", "doc")).await?;
//! bob.handle("greet", |peer, name| async move {
//!     Ok(Bytes::from(format!("hello {}, you are {peer}", String::from_utf8_lossy(&name))))
//! });
//! let peer = alice.dial(&bob.listen_addrs().await[0]).await?;
//! let answer = alice.call(&peer, "greet", Bytes::from_static(b"alice"), std::time::Duration::from_secs(5)).await?;
//! assert_eq!(answer, format!("hello alice, you are {}", alice.peer_id()));
//! # alice.shutdown().await;
//! # bob.shutdown().await;
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "service"))]
//! # fn main() {}
//! ```
//!
//! Map. Core, without sockets or clocks: [`config`] (every limit), [`error`] (one enum per kind of operation), [`status`]
//! (how calls are refused), [`event`], [`gossip`] (announcements), [`wire`] (frames), [`rpc`] (calls under way, admission; `rpc::once`: none runs twice; `rpc::hedge`: when to ask another peer), [`links`] (estimates
//! of each path, the probe schedule, `links::map`: the links of others), [`news`] (what nodes tell each other; `news::record`: signed addresses), [`peers`] (addresses and connections), [`addr`] (which addresses are worth dialling), [`access`] (private
//! swarms), [`relays`] (which relays to keep slots at), [`rendezvous`] (a point's book of who is where), [`dht`] (signed records; `dht::own`: when a node's own are put again), [`punch`] (how two peers behind
//! NATs reach each other; `punch::reach`: what the own NAT does). Shell,
//! feature `service`: [`service`] ([`Node`]) with `service/start` (threads, transports, listeners), `service/driver` (the
//! task that owns the swarm), `service/behaviour` (libp2p's parts), `service/streams` (our own part of it), `service/gate`
//! (nobody unproved gets in), `service/boxed` (connections take less room), `service/quic` (the transport, with its own map), `service/early` (openers of streams that do not wait for an answer), by way of `service/muxer`, `service/shared` (what all tasks see), `service/counters`, `service/connection`, `service/stream`,
//! `service/frames` (bytes to frames), `service/rpc_client` with `service/credit` (what the peer grants),
//! `service/rpc_server` with `service/served` (calls that run, whichever stream they came on), `service/link_probe`, `service/punch`, `service/guess` (ports that
//! nobody knows) with `service/tcp` (libp2p's TCP transport, which takes in what was met),
//! `service/news` with `service/peers_file`, `service/rendezvous`, `service/dht_store` (what is kept for others), `service/records` (signed records, for the application), `service/tensor`, `service/gossip`, `service/identity`, `service/swarm_key_file`, `service/private_file`.
//! Feature `v1-compat`: `v1` and `service/v1` (calls to and from the original Lattica). On the wire: docs/WIRE.md.

pub mod access;
pub mod addr;
pub mod config;
pub mod dht;
pub mod error;
pub mod event;
pub mod gossip;
pub mod links;
pub mod news;
pub mod peers;
pub mod punch;
pub mod relays;
pub mod rendezvous;
pub mod rpc;
pub mod status;
#[cfg(feature = "v1-compat")]
pub mod v1;
pub mod wire;

#[cfg(feature = "service")]
pub mod service;

pub use access::{Access, SwarmKey};
pub use config::{Limits, Liveness, NodeConfig};
pub use dht::SignedRecord;
pub use error::{
    CallError, ConfigError, DhtError, DialError, FrameError, GossipError, IdentityError, StartError,
    StreamError, SwarmKeyFileError,
};
pub use event::NetEvent;
pub use links::map::{Confidence, PairEstimate};
pub use links::{LinkEstimate, PathKind};
pub use peers::{PathInfo, PeerInfo};
pub use punch::reach::{Mapping, NatReport, Reachability};
#[cfg(all(feature = "service", feature = "v1-compat"))]
pub use service::V1;
#[cfg(feature = "service")]
pub use service::{
    CallOptions, Identity, NetCounters, Node, Stream, Subscription, Tensor, TensorReceiver, TensorSender,
    create_swarm_key, load_swarm_key, read_bytes, read_frame, read_length,
};
pub use status::{Status, StatusCode};
