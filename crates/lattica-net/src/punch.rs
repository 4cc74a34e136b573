//! Direct connections between peers that met over a relay: which addresses each side names, what each dials and how, and when
//! to try again. Pure: addresses are text.
//!
//! Both sides dial at the same moment, each from the port that it listens on, so that each NAT has sent to the other side
//! before the other side's packets come. QUIC dials cross: of two first packets at least one finds the other NAT open already,
//! and that is enough. TCP's crossing packets become one connection, in which one side has to take the listener's part; that
//! side also dials from a fresh port, which finds a peer that everybody can reach even when its own NAT hands out another port
//! for each destination.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::addr::{is_plausible, is_relayed, scope};

pub mod guess;
pub mod reach;

/// Addresses that one side names, and that the other one dials.
pub const CANDIDATES_MAX: usize = 8;
/// A try that has not led to a connection by then has failed.
pub const TRY_TIMEOUT: Duration = Duration::from_millis(2500);
/// A try that has not led to a connection by then probably will not: ports may be guessed (see [`guess`]).
pub const GUESS_AFTER: Duration = Duration::from_millis(400);
/// Pauses after the first tries; then they grow.
const QUICK_PAUSES: [Duration; 3] =
    [Duration::from_millis(250), Duration::from_millis(1000), Duration::from_millis(2000)];
/// The pause after them. A node that is seen elsewhere tries again sooner than its pauses say, but not sooner than this.
pub const FIRST_LONG_PAUSE: Duration = Duration::from_secs(30);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// One dial of a try. The first address that answers wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PunchDial {
    /// Where to.
    pub addresses: Vec<String>,
    /// Take the listener's part in what is agreed upon over the connection.
    pub as_listener: bool,
    /// From a port that nothing else uses.
    pub fresh_port: bool,
}

/// What the side dials that was asked to.
pub fn answerer_dials(addresses: Vec<String>) -> Vec<PunchDial> {
    plan([PunchDial { addresses, as_listener: false, fresh_port: false }])
}

/// What the side dials that asked.
pub fn asker_dials(addresses: Vec<String>) -> Vec<PunchDial> {
    let (quic, tcp): (Vec<_>, Vec<_>) = addresses.into_iter().partition(|a| a.contains("/udp/"));
    plan([
        PunchDial { addresses: quic, as_listener: false, fresh_port: false },
        PunchDial { addresses: tcp.clone(), as_listener: true, fresh_port: false },
        PunchDial { addresses: tcp, as_listener: false, fresh_port: true },
    ])
}

fn plan<const N: usize>(dials: [PunchDial; N]) -> Vec<PunchDial> {
    dials.into_iter().filter(|dial| !dial.addresses.is_empty()).collect()
}

/// The addresses to name, out of those that peers say they see us at (one entry for each who says so): one of each scope, IP
/// version and transport first, since a NAT may show each peer another port; then what most of them see, then what was heard
/// of first.
pub fn candidates<'a>(seen: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut counted: Vec<(&str, usize)> = Vec::new();
    for address in seen.into_iter().filter(|a| !is_relayed(a)) {
        match counted.iter_mut().find(|(known, _)| *known == address) {
            Some((_, n)) => *n += 1,
            None => counted.push((address, 1)),
        }
    }
    counted.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
    let mut kinds = BTreeSet::new();
    let kind = |address: &str| (scope(address), address.starts_with("/ip6/"), address.contains("/udp/"));
    let (one_each, others): (Vec<_>, Vec<_>) =
        counted.into_iter().partition(|&(address, _)| kinds.insert(kind(address)));
    one_each.into_iter().chain(others).take(CANDIDATES_MAX).map(|(address, _)| address.to_owned()).collect()
}

/// Those of the peer's addresses that may be dialled, given the relay's address: none that is nearer than the relay, or a peer
/// could point us at our own machine or network.
pub fn worth_dialling(named: impl IntoIterator<Item = String>, relay: &str) -> Vec<String> {
    let mut chosen: Vec<String> = Vec::new();
    for address in named {
        if chosen.len() < CANDIDATES_MAX
            && !is_relayed(&address)
            && is_plausible(&address, relay)
            && !chosen.contains(&address)
        {
            chosen.push(address);
        }
    }
    chosen
}

/// How long to wait after `failed` tries (at least 1).
pub fn pause_after(failed: u32) -> Duration {
    let index = failed.saturating_sub(1);
    match QUICK_PAUSES.get(index as usize) {
        Some(pause) => *pause,
        None => {
            let doublings = (index - QUICK_PAUSES.len() as u32).min(16);
            (FIRST_LONG_PAUSE * 2u32.pow(doublings)).min(LONGEST_PAUSE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIC: &str = "/ip4/9.9.9.9/udp/1/quic-v1";
    const TCP: &str = "/ip4/9.9.9.9/tcp/1";

    fn owned(addresses: &[&str]) -> Vec<String> {
        addresses.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_most_peers_see_is_named_first_and_never_a_circuit() {
        let seen = [TCP, QUIC, "/ip4/9.9.9.9/tcp/1/p2p/Q/p2p-circuit", QUIC];
        assert_eq!(candidates(seen), owned(&[QUIC, TCP]));
    }

    #[test]
    fn peers_that_each_see_another_port_do_not_crowd_out_what_another_transport_shows() {
        let many: Vec<String> = (0..99).map(|port| format!("/ip4/9.9.9.9/tcp/{port}")).collect();
        let named = candidates(many.iter().map(String::as_str).chain([QUIC]));
        assert_eq!(named.len(), CANDIDATES_MAX);
        assert_eq!(named[..3], owned(&["/ip4/9.9.9.9/tcp/0", QUIC, "/ip4/9.9.9.9/tcp/1"]));
    }

    #[test]
    fn one_side_of_a_tcp_punch_takes_the_listeners_part_and_tries_the_front_door_as_well() {
        let dials = asker_dials(owned(&[TCP, QUIC]));
        assert_eq!(
            dials.iter().map(|d| (d.addresses[0].as_str(), d.as_listener, d.fresh_port)).collect::<Vec<_>>(),
            [(QUIC, false, false), (TCP, true, false), (TCP, false, true)]
        );
        let dials = answerer_dials(owned(&[TCP, QUIC]));
        assert_eq!(
            dials,
            [PunchDial { addresses: owned(&[TCP, QUIC]), as_listener: false, fresh_port: false }]
        );
        assert!(asker_dials(Vec::new()).is_empty() && answerer_dials(Vec::new()).is_empty());
    }

    #[test]
    fn a_peer_cannot_point_us_at_our_own_network() {
        let relay = "/ip4/9.9.9.1/udp/1/quic-v1/p2p/R/p2p-circuit";
        let named = owned(&["/ip4/127.0.0.1/tcp/22", "/ip4/192.168.0.1/tcp/80", QUIC, QUIC, "/memory/1"]);
        assert_eq!(worth_dialling(named, relay), owned(&[QUIC]));
        // Where the relay itself is on the machine, so may the peer be.
        let local = owned(&["/ip4/127.0.0.1/tcp/22"]);
        assert_eq!(worth_dialling(local.clone(), "/ip4/127.0.0.2/tcp/1/p2p/R/p2p-circuit"), local);
        let many = (0..99).map(|port| format!("/ip4/9.9.9.9/tcp/{port}"));
        assert_eq!(worth_dialling(many, relay).len(), CANDIDATES_MAX);
    }

    #[test]
    fn tries_are_quick_at_first_and_rare_later() {
        let pauses: Vec<u128> = (1..=12).map(|n| pause_after(n).as_millis()).collect();
        assert!(pauses.is_sorted());
        assert_eq!((pauses[0], pauses[3], pauses[11]), (250, 30_000, 600_000));
        assert_eq!(pause_after(u32::MAX), LONGEST_PAUSE);
    }
}
