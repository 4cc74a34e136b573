//! What connections and sockets are set to: the one place for windows, clocks and the control of congestion.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use libp2p::identity::Keypair;
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{
    ClientConfig, Endpoint, EndpointConfig, MtuDiscoveryConfig, NoneTokenStore, ServerConfig,
    TransportConfig, VarInt,
};
use sha2::Sha256;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::congestion::TolerantConfig;
use super::{QuicError, tls};

/// Unread bytes of one stream that the peer may send: at 63 ms, 1.2 Gbit/s.
const STREAM_WINDOW_BYTES: u32 = 10_000_000;
/// Unread bytes of all streams of a connection, so that one slow reader does not stop the others.
const CONNECTION_WINDOW_BYTES: u32 = 15_000_000;
/// Incoming streams that a peer may open from the start. Each takes places in two tables even while there is none; more are
/// allowed as they are used.
pub(super) const FIRST_STREAMS: u32 = 16;
/// What the system is asked to hold of a socket's datagrams; it may hold less.
const SOCKET_BUFFER_BYTES: usize = 2 << 20;
/// First packets that wait to be looked at, and bytes that came behind one and behind all of them.
const INCOMING_MAX: usize = 1024;
const INCOMING_BYTES: u64 = 32 * 1024;
const INCOMING_ALL_BYTES: u64 = 4 << 20;

/// Datagrams between two nodes on one machine, where the line takes more than Ethernet's 1500 bytes. quinn hands the system ten
/// at a time, which takes 64 KiB.
const LOOPBACK_DATAGRAM_BYTES: u16 = 6500;

/// What the node's own configuration says.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// A connection that hears nothing for this long is lost.
    pub(crate) idle: Duration,
    /// A quiet connection sends this often.
    pub(crate) keep_alive: Duration,
    /// How long a handshake may take.
    pub(crate) handshake: Duration,
    /// Incoming streams of one connection at the same time.
    pub(crate) streams: u32,
}

/// What endpoints are made of.
pub(crate) struct Configs {
    pub(super) handshake: Duration,
    pub(super) streams: u32,
    /// For peers elsewhere, and on this machine.
    clients: [ClientConfig; 2],
    servers: [Arc<ServerConfig>; 2],
    endpoint: EndpointConfig,
}

impl Configs {
    /// For the node with this key.
    ///
    /// # Errors
    /// When no certificate can be made.
    pub(crate) fn new(keypair: &Keypair, settings: &Settings) -> Result<Self, QuicError> {
        let (client, server) = tls::configs(keypair)?;
        let (client, server) = (Arc::new(client), Arc::new(server));
        let lines = [false, true].map(|loopback| Arc::new(transport(settings, loopback)));
        let clients = lines.clone().map(|transport| {
            let mut client = ClientConfig::new(client.clone());
            client.transport_config(transport);
            // Kept by name, and all peers go by the same one: what one gave out would be shown to the next.
            client.token_store(Arc::new(NoneTokenStore));
            client
        });
        let servers = lines.map(|transport| {
            let mut server = ServerConfig::with_crypto(server.clone());
            server.transport_config(transport);
            // The swarm knows no connection whose addresses change.
            server.migration(false);
            server.max_incoming(INCOMING_MAX);
            server.incoming_buffer_size(INCOMING_BYTES).incoming_buffer_size_total(INCOMING_ALL_BYTES);
            Arc::new(server)
        });
        // The same after a restart: a peer that still speaks to the node that was is told at once.
        let secret = keypair.derive_secret(b"libp2p quic stateless reset key").unwrap_or_else(rand::random);
        let mut endpoint = EndpointConfig::new(Arc::new(ResetKey(secret)));
        endpoint.supported_versions(vec![1]);
        let datagram = LOOPBACK_DATAGRAM_BYTES;
        endpoint.max_udp_payload_size(datagram).expect("between 1200 and 65527");
        let &Settings { handshake, streams, .. } = settings;
        Ok(Self { handshake, streams, clients, servers, endpoint })
    }

    /// For a dial to `remote`.
    pub(super) fn client(&self, remote: SocketAddr) -> ClientConfig {
        self.clients[usize::from(remote.ip().is_loopback())].clone()
    }

    /// For a connection from `remote`.
    pub(super) fn server(&self, remote: SocketAddr) -> Arc<ServerConfig> {
        Arc::clone(&self.servers[usize::from(remote.ip().is_loopback())])
    }

    /// An endpoint at a socket: one that also listens, or one that only dials.
    pub(super) fn endpoint(&self, socket: UdpSocket, listens: bool) -> io::Result<Endpoint> {
        // Whoever gets less works on with it.
        let _ = SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER_BYTES);
        let _ = SockRef::from(&socket).set_send_buffer_size(SOCKET_BUFFER_BYTES);
        let server = listens.then(|| ServerConfig::clone(&self.servers[0]));
        Endpoint::new(self.endpoint.clone(), server, socket, Arc::new(quinn::TokioRuntime))
    }
}

/// A socket for QUIC.
pub(super) fn socket(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        // The wildcard of IPv4 has a listener of its own.
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn transport(settings: &Settings, loopback: bool) -> TransportConfig {
    let mut transport = TransportConfig::default();
    if loopback {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(LOOPBACK_DATAGRAM_BYTES);
        transport.mtu_discovery_config(Some(discovery));
    }
    let idle = u32::try_from(settings.idle.as_millis()).expect("validated: at most an hour");
    transport
        .max_idle_timeout(Some(VarInt::from_u32(idle).into()))
        .keep_alive_interval(Some(settings.keep_alive))
        .max_concurrent_bidi_streams(FIRST_STREAMS.min(settings.streams).into())
        .max_concurrent_uni_streams(0u32.into())
        .datagram_receive_buffer_size(None)
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .allow_spin(false)
        .congestion_controller_factory(Arc::new(TolerantConfig));
    transport
}

/// Signs resets of connections that this node knows nothing about.
struct ResetKey([u8; 32]);

impl ResetKey {
    fn mac(&self, data: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(data);
        mac
    }
}

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature: &mut [u8]) {
        signature.copy_from_slice(&self.mac(data).finalize().into_bytes());
    }

    fn signature_len(&self) -> usize {
        32
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        self.mac(data).verify_slice(signature).map_err(|_| CryptoError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_signed_alike_after_a_restart() {
        let keypair = Keypair::generate_ed25519();
        let key = || ResetKey(keypair.derive_secret(b"x").unwrap());
        let mut signature = vec![0; key().signature_len()];
        key().sign(b"a connection", &mut signature);
        assert!(key().verify(b"a connection", &signature).is_ok());
        assert!(key().verify(b"another one", &signature).is_err());
    }
}
