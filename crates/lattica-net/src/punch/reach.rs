//! How a node can be reached, and what its NAT does to the ports that it listens on, as far as peers tell where they see it.
//! Pure: addresses are text.
//!
//! The words are those of RFC 4787, section 4: a mapping that is the same for all destinations (endpoint-independent) can be
//! punched; one that differs needs ports to be guessed (`guess`), for which the range that they come from matters.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::Serialize;

use crate::links::PathKind;

type Place = (IpAddr, u16);

/// How a node can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Reachability {
    /// Addresses that peers have tested, that a router opened, that the operator named, or, of a relay, that it listens on.
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
    /// One place, of one address family, for all who see it from outside.
    EndpointIndependent,
    /// Another one for some of them.
    EndpointDependent,
    /// Only one has seen it from outside.
    Unknown,
}

/// What observers (where each is, and at which address it sees this node) tell of the ports of `path`, listened on at `own`.
pub fn report<'a>(
    path: PathKind,
    own: impl IntoIterator<Item = &'a str>,
    seen: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Option<NatReport> {
    let of_path = |address: &str| place(address).filter(|_| PathKind::of(address) == path);
    let own: BTreeSet<Place> = own.into_iter().filter_map(of_path).collect();
    // Each place with those who see the node there.
    let mut places: BTreeMap<Place, BTreeSet<Place>> = BTreeMap::new();
    for (observer, address) in seen {
        if let (Some(observer), Some(seen_at)) = (place(observer), of_path(address)) {
            places.entry(seen_at).or_default().insert(observer);
        }
    }
    let ports = || places.keys().map(|(_, port)| *port);
    let ports_seen = (ports().min()?, ports().max()?);
    // Some see the node without a NAT between: its neighbours, and over IPv6 often everybody.
    let outside = || places.iter().filter(|(place, _)| !own.contains(place));
    let n_outside = |v4: bool| outside().filter(|((ip, _), _)| ip.is_ipv4() == v4).count();
    let mapping = if outside().next().is_none() {
        Mapping::None
    } else if n_outside(true).max(n_outside(false)) > 1 {
        Mapping::EndpointDependent
    } else if outside().any(|(_, observers)| observers.len() > 1) {
        Mapping::EndpointIndependent
    } else {
        Mapping::Unknown
    };
    let ips: BTreeSet<IpAddr> = places.keys().map(|(ip, _)| *ip).collect();
    let observers: BTreeSet<&Place> = places.values().flatten().collect();
    Some(NatReport {
        mapping,
        keeps_port: ports().any(|port| own.iter().any(|(_, listened)| *listened == port)),
        ports: ports_seen,
        ips: ips.into_iter().collect(),
        n_observers: observers.len(),
    })
}

/// The socket address at the beginning of an address.
fn place(address: &str) -> Option<Place> {
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
    fn who_sees_the_node_without_a_nat_tells_nothing_of_the_nat() {
        let own_v6 = "/ip6/fd00::2/udp/4001/quic-v1";
        let mapping = |seen: &[(&str, &str)]| {
            let own = OWN.into_iter().chain([own_v6]);
            report(PathKind::Quic, own, seen.iter().copied()).unwrap().mapping
        };
        let (lan, one, two) = ("/ip4/10.0.0.3/udp/1/quic-v1", "/ip4/9.9.9.1/tcp/1", "/ip4/9.9.9.2/tcp/1");
        let (far_v6, at) = ("/ip6/fd00::9/tcp/1", "/ip4/8.8.8.8/udp/20000/quic-v1");
        assert_eq!(mapping(&[(lan, OWN[0]), (far_v6, own_v6)]), Mapping::None);
        // One observer from outside, whoever else there is.
        assert_eq!(mapping(&[(lan, OWN[0]), (one, at), (far_v6, own_v6)]), Mapping::Unknown);
        assert_eq!(mapping(&[(lan, OWN[0]), (one, at), (two, at)]), Mapping::EndpointIndependent);
        // Two families are two mappings.
        let at_v6 = "/ip6/fd00:1::8/udp/4001/quic-v1";
        assert_eq!(mapping(&[(one, at), (two, at), (far_v6, at_v6)]), Mapping::EndpointIndependent);
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
