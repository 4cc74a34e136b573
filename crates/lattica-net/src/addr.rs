//! Multiaddresses as text: which are worth dialling first, and which of those that a stranger names are worth keeping.

use std::net::{Ipv4Addr, Ipv6Addr};

#[cfg(feature = "records")]
use libp2p_core::{Multiaddr, multiaddr::Protocol};
use swarm_wire::PeerId;

/// Longest address that is kept.
pub const ADDRESS_MAX_BYTES: usize = 256;

/// How far away the first hop of an address is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// The machine itself.
    Loopback,
    /// A local network.
    Private,
    /// The internet, or a name that has to be looked up.
    Global,
}

/// Whether the address leads through a relay.
pub fn is_relayed(address: &str) -> bool {
    address.split('/').any(|part| part == "p2p-circuit")
}

/// The peer that an address ends with.
pub fn last_peer(address: &str) -> Option<PeerId> {
    address.rsplit_once("/p2p/").and_then(|(_, peer)| peer.parse().ok())
}

/// The address without the peer at its end. In `/p2p/RELAY/p2p-circuit/p2p/PEER` only the last one goes.
#[cfg(feature = "records")]
pub fn without_peer(address: &Multiaddr) -> Multiaddr {
    let mut address = address.clone();
    if matches!(address.iter().last(), Some(Protocol::P2p(_))) {
        address.pop();
    }
    address
}

/// The scope of an address; `None` when it does not begin with an IP address or a name.
pub fn scope(address: &str) -> Option<Scope> {
    let mut parts = address.strip_prefix('/')?.split('/');
    let (kind, host) = (parts.next()?, parts.next()?);
    Some(match kind {
        "ip4" => {
            let ip: Ipv4Addr = host.parse().ok()?;
            if ip.is_loopback() {
                Scope::Loopback
            } else if ip.is_private() || ip.is_link_local() {
                Scope::Private
            } else {
                Scope::Global
            }
        }
        "ip6" => {
            let ip: Ipv6Addr = host.parse().ok()?;
            if ip.is_loopback() {
                Scope::Loopback
            } else if ip.is_unique_local() || ip.is_unicast_link_local() {
                Scope::Private
            } else {
                Scope::Global
            }
        }
        "dns" | "dns4" | "dns6" | "dnsaddr" => Scope::Global,
        _ => return None,
    })
}

/// Whether an address that a peer claims for itself is worth keeping, given the address that we reach it at: a peer on
/// the internet that names loopback or private addresses names our own machines, not its own.
pub fn is_plausible(claimed: &str, seen_at: &str) -> bool {
    claimed.len() <= ADDRESS_MAX_BYTES
        && match (scope(claimed), scope(seen_at)) {
            (Some(claimed), Some(seen_at)) => claimed >= seen_at,
            (Some(_), None) => true,
            (None, _) => false,
        }
}

/// Which of its own addresses a node tells: the most promising, and loopback ones only where there are no others (several
/// nodes of one machine). Who hears of them judges by [`is_plausible`].
pub fn worth_telling(mut addresses: Vec<String>, limit: usize) -> Vec<String> {
    let is_loopback = |address: &String| scope(address) == Some(Scope::Loopback);
    if !addresses.iter().all(is_loopback) {
        addresses.retain(|address| !is_loopback(address));
    }
    addresses.sort_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| a.cmp(b)));
    addresses.dedup();
    addresses.truncate(limit);
    addresses
}

/// Dialling order, the smallest first: direct before relayed, near before far, QUIC (fewer round trips) before TCP.
pub fn rank(address: &str) -> (bool, Option<Scope>, bool) {
    (is_relayed(address), scope(address), !address.contains("/quic-v1"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_told_only_where_there_is_nothing_else() {
        let told = |addresses: &[&str], limit| {
            worth_telling(addresses.iter().map(|a| (*a).to_owned()).collect(), limit)
        };
        let (near, far, nearer) =
            ("/ip4/10.0.0.2/tcp/1", "/ip4/9.9.9.9/udp/1/quic-v1", "/ip4/127.0.0.1/tcp/1");
        assert_eq!(told(&[nearer, far, near, far], 9), [near, far]);
        assert_eq!(told(&[nearer], 9), [nearer]);
        assert_eq!(told(&[far, near], 1), [near]);
    }

    #[test]
    fn the_nearest_direct_quic_address_is_dialled_first() {
        let mut addresses = [
            "/ip4/9.9.9.9/tcp/1/p2p/Q/p2p-circuit",
            "/ip4/9.9.9.9/tcp/1",
            "/ip4/192.168.1.2/tcp/1",
            "/ip4/192.168.1.2/udp/1/quic-v1",
            "/ip4/127.0.0.1/tcp/1",
        ];
        addresses.sort_by_key(|a| rank(a));
        assert_eq!(
            addresses,
            [
                "/ip4/127.0.0.1/tcp/1",
                "/ip4/192.168.1.2/udp/1/quic-v1",
                "/ip4/192.168.1.2/tcp/1",
                "/ip4/9.9.9.9/tcp/1",
                "/ip4/9.9.9.9/tcp/1/p2p/Q/p2p-circuit",
            ]
        );
    }

    #[test]
    fn strangers_cannot_point_us_at_our_own_machine() {
        assert!(!is_plausible("/ip4/127.0.0.1/tcp/22", "/ip4/9.9.9.9/tcp/4001"));
        assert!(!is_plausible("/ip4/192.168.0.1/tcp/22", "/ip4/9.9.9.9/tcp/4001"));
        assert!(!is_plausible("/ip4/127.0.0.1/tcp/22", "/ip4/192.168.0.7/tcp/4001"));
        assert!(is_plausible("/ip4/127.0.0.1/tcp/22", "/ip4/127.0.0.5/udp/1/quic-v1"));
        assert!(is_plausible("/ip4/9.9.9.9/tcp/4001", "/ip4/192.168.0.7/tcp/4001"));
        assert!(!is_plausible("/memory/7", "/ip4/9.9.9.9/tcp/4001"));
        assert!(!is_plausible(&format!("/dns/{}/tcp/1", "a".repeat(300)), "/ip4/9.9.9.9/tcp/4001"));
    }
}
