//! Peer-to-peer network: identity, encrypted connections, discovery, relays, RPC, tensor streams and link measurements.
pub mod addr;
pub mod config;
pub mod error;
pub mod event;
pub mod links;
pub mod peers;
pub mod rpc;
pub mod status;
pub mod wire;

#[cfg(feature = "service")]
pub mod service;

pub use config::{Limits, Liveness, NodeConfig};
pub use error::{CallError, ConfigError, DhtError, DialError, IdentityError, StartError, StreamError};
pub use event::NetEvent;
pub use links::LinkEstimate;
pub use peers::PeerInfo;
#[cfg(feature = "service")]
pub use service::{Identity, Node, Stream, Tensor, TensorReceiver, TensorSender, verify};
pub use status::{Status, StatusCode};
