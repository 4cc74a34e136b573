//! How a node can be reached, and what its NAT does to the ports that it listens on, as far as peers tell where they see it.
//! Pure: addresses are text.
//!
//! The words are those of RFC 4787, section 4: a mapping that is the same for all destinations (endpoint-independent) can be
//! punched; one that differs needs ports to be guessed (`guess`), for which the range that they come from matters.

use std::collections::BTreeSet;
use std::net::IpAddr;

use serde::Serialize;

use crate::links::PathKind;

/// How a node can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Reachability {
    /// Addresses that peers have tested, that a router opened, or that the operator named.
    pub confirmed: Vec<String>,
    /// What peers see of its QUIC port; `None` when no peer has told.
    pub quic: Option<NatReport>,
    /// The same of its TCP port.
    pub tcp: Option<NatReport>,
}

/// What peers see of one port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NatReport {
    /// How the port is mapped.
    pub mapping: Mapping,
    /// Whether some peer sees the very port that is listened on.
    pub keeps_port: bool,
    /// The smallest and the largest port that was seen.
    pub ports: (u16, u16),
    /// The addresses that were seen.
    pub ips: Vec<IpAddr>,
    /// Different places from which it was seen; one alone tells nothing of the mapping.
    pub n_observers: usize,
}

/// What stands between a port and those who see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mapping {
    /// Nothing: it is seen at an address of this machine.
    None,
    /// One place for all who see it.
    EndpointIndependent,
    /// Another one for some of them.
    EndpointDependent,
    /// Only one has seen it.
    Unknown,
}

/// What observers (where each is, and at which address it sees this node) tell of the ports of `path`, listened on at `own`.
pub fn report<'a>(
    path: PathKind,
    own: impl IntoIterator<Item = &'a str>,
    seen: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Option<NatReport> {
    let of_path = |address: &str| place(address).filter(|_| PathKind::of(address) == path);
    let own: BTreeSet<(IpAddr, u16)> = own.into_iter().filter_map(of_path).collect();
    let (mut observers, mut places) = (BTreeSet::new(), BTreeSet::new());
    for (observer, address) in seen {
        if let (Some(observer), Some(seen_at)) = (place(observer), of_path(address)) {
            observers.insert(observer);
            places.insert(seen_at);
        }
    }
    let ports = || places.iter().map(|(_, port)| *port);
    let ports_seen = (ports().min()?, ports().max()?);
    let mapping = if places.iter().all(|place| own.contains(place)) {
        Mapping::None
    } else if places.len() > 1 {
        Mapping::EndpointDependent
    } else if observers.len() > 1 {
        Mapping::EndpointIndependent
    } else {
        Mapping::Unknown
    };
    let ips: BTreeSet<IpAddr> = places.iter().map(|(ip, _)| *ip).collect();
    Some(NatReport {
        mapping,
        keeps_port: ports().any(|port| own.iter().any(|(_, listened)| *listened == port)),
        ports: ports_seen,
        ips: ips.into_iter().collect(),
        n_observers: observers.len(),
    })
}

/// The socket address at the beginning of an address.
fn place(address: &str) -> Option<(IpAddr, u16)> {
    let mut parts = address.strip_prefix('/')?.split('/');
    let ip = match (parts.next()?, parts.next()?) {
        ("ip4", ip) => IpAddr::V4(ip.parse().ok()?),
        ("ip6", ip) => IpAddr::V6(ip.parse().ok()?),
        _ => return None,
    };
    matches!(parts.next()?, "udp" | "tcp").then_some(())?;
    Some((ip, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [&str; 2] = ["/ip4/10.0.0.2/udp/4001/quic-v1", "/ip4/10.0.0.2/tcp/4001"];

    fn quic(seen: &[(&str, &str)]) -> Option<NatReport> {
        report(PathKind::Quic, OWN, seen.iter().copied())
    }

    #[test]
    fn mappings_are_told_apart_by_what_several_observers_see() {
        let (one, two) = ("/ip4/9.9.9.1/udp/1/quic-v1", "/ip4/9.9.9.2/tcp/1");
        let at = |port: u16| format!("/ip4/8.8.8.8/udp/{port}/quic-v1");
        let (kept, other, third) = (at(4001), at(20_000), at(20_400));
        assert_eq!(quic(&[]), None);
        assert_eq!(quic(&[(one, "/ip4/8.8.8.8/tcp/4001")]), None, "that is TCP's");
        let found = |seen: &[(&str, &str)]| {
            let report = quic(seen).unwrap();
            (report.mapping, report.keeps_port, report.ports, report.n_observers)
        };
        assert_eq!(found(&[(one, OWN[0])]), (Mapping::None, true, (4001, 4001), 1));
        assert_eq!(found(&[(one, &kept)]), (Mapping::Unknown, true, (4001, 4001), 1));
        // The same observer twice is one.
        assert_eq!(found(&[(one, &kept), (one, &kept)]).0, Mapping::Unknown);
        assert_eq!(
            found(&[(one, &kept), (two, &kept)]),
            (Mapping::EndpointIndependent, true, (4001, 4001), 2)
        );
        assert_eq!(
            found(&[(one, &other), (two, &third)]),
            (Mapping::EndpointDependent, false, (20_000, 20_400), 2)
        );
    }

    #[test]
    fn what_is_no_address_is_passed_over() {
        let seen = [
            ("nowhere", "/ip4/8.8.8.8/udp/1/quic-v1"),
            ("/ip4/9.9.9.1/tcp/1", "/dns/x/udp/1/quic-v1"),
            ("/ip4/9.9.9.1/tcp/1", "/ip4/8.8.8.8/udp/70000/quic-v1"),
            ("/ip4/9.9.9.1/tcp/1", "/ip4/8.8.8.8/udp/1/quic-v1/p2p/Q/p2p-circuit"),
        ];
        assert_eq!(quic(&seen), None);
    }
}
