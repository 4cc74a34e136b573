//! The QUIC transport, on quinn: libp2p's addresses (`/udp/PORT/quic-v1`), its handshake and one QUIC stream for each stream.
//! What libp2p's own transport on the same library fixes is chosen here (`config`), and a socket that was made elsewhere,
//! because a hole was punched with it, becomes an endpoint like any other (`adopted`).

mod address;
mod adopted;
mod config;
mod congestion;
mod connection;
mod stream;
#[cfg(test)]
mod tests;
mod tls;
mod transport;

pub(crate) use adopted::Adopted;
pub(crate) use config::{Configs, Settings};
pub(crate) use transport::Quic;

/// Why a connection or a listener did not come about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum QuicError {
    #[error("the socket at {address}: {reason}")]
    Socket {
        address: std::net::SocketAddr,
        #[source]
        reason: std::io::Error,
    },
    #[error("the addresses of this machine")]
    Interfaces(#[source] std::io::Error),
    #[error("the dial")]
    Dial(#[from] quinn::ConnectError),
    #[error("the connection")]
    Connection(#[from] quinn::ConnectionError),
    #[error("the handshake took longer than {limit:?}")]
    Timeout { limit: std::time::Duration },
    #[error("the peer's certificate")]
    Certificate(#[from] quinn::rustls::Error),
}
