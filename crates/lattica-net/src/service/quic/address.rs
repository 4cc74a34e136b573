//! The addresses of this transport.

use std::net::SocketAddr;

use libp2p::core::Multiaddr;
use libp2p::core::multiaddr::Protocol;

/// The socket of `/ip4|ip6/IP/udp/PORT/quic-v1`, whether or not a peer is named behind it; nothing for any other address.
pub(super) fn socket(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => ip.into(),
        Protocol::Ip6(ip) => ip.into(),
        _ => return None,
    };
    let (Protocol::Udp(port), Protocol::QuicV1) = (parts.next()?, parts.next()?) else { return None };
    match (parts.next(), parts.next()) {
        (None | Some(Protocol::P2p(_)), None) => Some(SocketAddr::new(ip, port)),
        _ => None,
    }
}

/// The address of a socket.
pub(super) fn multiaddr(socket: SocketAddr) -> Multiaddr {
    Multiaddr::empty().with(socket.ip().into()).with(Protocol::Udp(socket.port())).with(Protocol::QuicV1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_transport_and_no_others() {
        let peer = "12D3KooWDpJ7As7BWAwRMfu1VU2WCqNjvq387JEYKDBj4kx6nXTN";
        for (text, expected) in [
            ("/ip4/127.0.0.1/udp/7/quic-v1".to_owned(), Some("127.0.0.1:7")),
            (format!("/ip4/127.0.0.1/udp/7/quic-v1/p2p/{peer}"), Some("127.0.0.1:7")),
            ("/ip6/::1/udp/7/quic-v1".to_owned(), Some("[::1]:7")),
            ("/ip4/127.0.0.1/udp/7".to_owned(), None),
            ("/ip4/127.0.0.1/udp/7/quic".to_owned(), None),
            ("/ip4/127.0.0.1/tcp/7".to_owned(), None),
            ("/dns/example.org/udp/7/quic-v1".to_owned(), None),
            ("/ip4/127.0.0.1/udp/7/quic-v1/webtransport".to_owned(), None),
            (format!("/ip4/127.0.0.1/udp/7/quic-v1/p2p/{peer}/p2p-circuit"), None),
        ] {
            let found = socket(&text.parse().unwrap());
            assert_eq!(found, expected.map(|address| address.parse().unwrap()), "{text}");
            if let Some(found) = found {
                assert!(text.starts_with(&multiaddr(found).to_string()));
            }
        }
    }
}
