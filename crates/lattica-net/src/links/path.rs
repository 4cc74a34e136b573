//! The ways to one peer, each measured for itself: a spare path is no better for the one in use being good. Pure.

use std::time::Duration;

use serde::Serialize;

use super::{LinkEstimate, LinkEstimator};
use crate::addr::is_relayed;

/// A way to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PathKind {
    /// Directly, over QUIC.
    Quic,
    /// Directly, over TCP.
    Tcp,
    /// Through a relay, over whatever leads there.
    Relayed,
}

impl PathKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Quic, Self::Tcp, Self::Relayed];

    /// The kind of path that leads to an address.
    pub fn of(address: &str) -> Self {
        if is_relayed(address) {
            Self::Relayed
        } else if address.split('/').any(|part| part == "quic-v1") {
            Self::Quic
        } else {
            Self::Tcp
        }
    }

    /// Whether it goes through a relay.
    pub fn is_relayed(self) -> bool {
        self == Self::Relayed
    }
}

/// What is measured of every path to one peer.
#[derive(Debug, Clone, Default)]
pub struct PeerLinks {
    paths: [LinkEstimator; PathKind::ALL.len()],
}

impl PeerLinks {
    /// The measurements of one path.
    pub fn path(&mut self, kind: PathKind) -> &mut LinkEstimator {
        &mut self.paths[kind as usize]
    }

    /// What is known of every path that was measured: first of the one `in_use`, then of those that answered last.
    pub fn estimates(&self, now: Duration, in_use: Option<PathKind>) -> Vec<LinkEstimate> {
        let measured = PathKind::ALL.into_iter().zip(&self.paths);
        let mut estimates: Vec<LinkEstimate> =
            measured.filter_map(|(kind, estimator)| estimator.estimate(now, kind)).collect();
        estimates.sort_by_key(|link| (Some(link.path) != in_use, link.age));
        estimates
    }

    /// What is known of the path `in_use`; where it was not measured yet, of the one that answered last.
    pub fn estimate(&self, now: Duration, in_use: Option<PathKind>) -> Option<LinkEstimate> {
        let used = in_use.and_then(|kind| self.paths[kind as usize].estimate(now, kind));
        used.or_else(|| self.estimates(now, None).into_iter().next())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn addresses_tell_the_kind_of_path() {
        for (address, kind) in [
            ("/ip4/9.9.9.9/udp/1/quic-v1", PathKind::Quic),
            ("/ip4/9.9.9.9/tcp/1", PathKind::Tcp),
            ("/ip4/9.9.9.9/udp/1/quic-v1/p2p/Q/p2p-circuit", PathKind::Relayed),
        ] {
            assert_eq!(PathKind::of(address), kind);
        }
    }

    #[test]
    fn each_path_is_measured_for_itself_and_the_one_in_use_comes_first() {
        let mut links = PeerLinks::default();
        assert_eq!(links.estimate(S, Some(PathKind::Quic)), None);
        for (at, kind, rtt_ms) in
            [(1, PathKind::Relayed, 80), (2, PathKind::Tcp, 30), (3, PathKind::Quic, 20)]
        {
            links.path(kind).handle_answer(at * S, Duration::from_millis(rtt_ms));
        }
        let known = |links: &PeerLinks, in_use| -> Vec<(PathKind, f64)> {
            links.estimates(4 * S, in_use).iter().map(|link| (link.path, link.rtt_ms)).collect()
        };
        let (quic, tcp, relayed) = ((PathKind::Quic, 20.0), (PathKind::Tcp, 30.0), (PathKind::Relayed, 80.0));
        assert_eq!(known(&links, Some(PathKind::Relayed)), [relayed, quic, tcp]);
        assert_eq!(known(&links, None), [quic, tcp, relayed]);
        // The path in use changes: no number of another one blurs its own.
        links.path(PathKind::Tcp).handle_loss(4 * S);
        assert_eq!(links.estimate(4 * S, Some(PathKind::Quic)).unwrap().loss, 0.0);
    }
}
