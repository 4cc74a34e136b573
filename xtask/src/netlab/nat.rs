//! The kinds of NAT that the lab builds, as text for `nft`.
//!
//! A mapping that does not depend on the destination is a map from port to host, filled by outgoing packets: plain masquerade
//! hands out another port when two conversations would collide, and so is no such NAT. The prerouting chain must exist even
//! when it is empty, and what nobody asked for is dropped silently: a reset from the router would end a simultaneous open.

use clap::ValueEnum;

/// How a site is cut off from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum NatKind {
    /// A public address, no filter.
    None,
    /// One outside port per inside port, open to everybody once it is used (full cone).
    Open,
    /// One outside port per inside port, open only to addresses and ports that were sent to.
    PortRestricted,
    /// A random outside port for each destination, open only to that destination.
    Symmetric,
}

impl NatKind {
    /// Every kind, the easiest first.
    pub(crate) const ALL: [Self; 4] = [Self::None, Self::Open, Self::PortRestricted, Self::Symmetric];

    /// As reports name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Open => "open",
            Self::PortRestricted => "port-restricted",
            Self::Symmetric => "symmetric",
        }
    }

    /// The router's rules between the interfaces `lan` and `wan`; `None` where there is no router.
    pub(crate) fn rules(self) -> Option<String> {
        match self {
            Self::None => None,
            Self::Open => Some(ruleset(MAPPED, "")),
            Self::PortRestricted => Some(ruleset(MAPPED, FILTER)),
            Self::Symmetric => Some(ruleset(RANDOM, FILTER)),
        }
    }
}

/// Inside port = outside port, for every destination.
const MAPPED: &str = r#"
    map udp_ports {
        type inet_service : ipv4_addr . inet_service
        flags dynamic,timeout
        timeout 5m
    }
    map tcp_ports {
        type inet_service : ipv4_addr . inet_service
        flags dynamic,timeout
        timeout 5m
    }
    chain prerouting {
        type nat hook prerouting priority dstnat
        iifname "wan" dnat ip to udp dport map @udp_ports
        iifname "wan" dnat ip to tcp dport map @tcp_ports
    }
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname "wan" update @udp_ports { udp sport : ip saddr . udp sport }
        oifname "wan" update @tcp_ports { tcp sport : ip saddr . tcp sport }
        oifname "wan" masquerade
    }
"#;

/// A random outside port for every destination.
const RANDOM: &str = r#"
    chain prerouting {
        type nat hook prerouting priority dstnat
    }
    chain postrouting {
        type nat hook postrouting priority srcnat
        oifname "wan" masquerade fully-random
    }
"#;

/// Only answers come in.
const FILTER: &str = r#"
    chain forward {
        type filter hook forward priority filter
        iifname "wan" ct state != { established, related } drop
    }
"#;

/// The router itself answers nobody outside.
const ROUTER: &str = r#"
    chain input {
        type filter hook input priority filter
        iifname "wan" ct state != { established, related } drop
    }
"#;

fn ruleset(translation: &str, filter: &str) -> String {
    format!("table ip lab {{{translation}{filter}{ROUTER}}}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(kind: NatKind) -> String {
        kind.rules().unwrap()
    }

    #[test]
    fn every_kind_has_the_rules_that_make_it_what_it_is() {
        assert_eq!(NatKind::None.rules(), None);
        let (open, restricted, symmetric) =
            (rules(NatKind::Open), rules(NatKind::PortRestricted), rules(NatKind::Symmetric));
        assert!(open.contains("map @udp_ports") && !open.contains("hook forward"));
        assert!(restricted.contains("map @tcp_ports") && restricted.contains("hook forward"));
        assert!(symmetric.contains("fully-random") && symmetric.contains("hook forward"));
        assert!(!symmetric.contains("@udp_ports"));
        for rules in [open, restricted, symmetric] {
            assert!(rules.contains("hook prerouting"), "translation of answers needs the chain");
            assert!(rules.contains("hook input"), "the router would answer strangers");
            assert_eq!(rules.matches('{').count(), rules.matches('}').count());
        }
    }

    #[test]
    fn names_are_those_of_the_command_line() {
        for kind in NatKind::ALL {
            assert_eq!(kind.to_possible_value().unwrap().get_name(), kind.name());
        }
    }
}
