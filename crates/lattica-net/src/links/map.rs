//! The links of the whole network as one node knows them: what it measured itself, what others say that they measured, and
//! predictions for the rest. Pure: time is an argument.
//!
//! Nobody's word changes what was measured here. Of two ends that disagree the slower is believed, so a liar makes its own
//! links look slow and nobody's fast, unless both ends lie.

use std::time::Duration;

use serde::Serialize;
use swarm_wire::PeerId;

use super::coordinate::Coordinate;
use super::{LinkEstimate, PathKind};
use crate::news::{AUTHORS_MAX, Newest};

/// Claims in one vector: of the nearest neighbours the paths in use, then, where there is room, spare ones.
pub const CLAIMS_MAX: usize = 64;
/// A vector that was not renewed for this long is forgotten.
pub const VECTOR_EXPIRES: Duration = Duration::from_secs(600);
/// Coordinates with a larger error predict nothing.
const USABLE_ERROR: f64 = 0.5;

/// What one node says of its links.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkVector {
    /// Unix time in milliseconds at which it was made.
    pub written_ms: u64,
    /// Where the node is.
    pub coordinate: Coordinate,
    /// Its links, by peer; of several to one peer the first is in use.
    pub neighbours: Vec<(PeerId, Claim)>,
}

/// What one end says of a path.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Claim {
    /// Smoothed round trip.
    pub rtt_ms: f64,
    /// Smoothed deviation from it.
    pub jitter_ms: f64,
    /// Share of probes that were not answered in time, 0 to 1.
    pub loss: f64,
    /// Towards the neighbour.
    pub out_bytes_per_s: Option<f64>,
    /// From the neighbour.
    pub in_bytes_per_s: Option<f64>,
    /// Share of probes that were answered over hours, 0 to 1.
    pub reliability: f64,
    /// Which path it is.
    pub path: PathKind,
}

impl From<&LinkEstimate> for Claim {
    fn from(link: &LinkEstimate) -> Self {
        Self {
            rtt_ms: link.rtt_ms,
            jitter_ms: link.jitter_ms,
            loss: link.loss,
            out_bytes_per_s: link.goodput_out_bytes_per_s,
            in_bytes_per_s: link.goodput_in_bytes_per_s,
            reliability: link.reliability,
            path: link.path,
        }
    }
}

impl Claim {
    /// The same path as the other end would say it.
    fn turned(self) -> Self {
        Self { out_bytes_per_s: self.in_bytes_per_s, in_bytes_per_s: self.out_bytes_per_s, ..self }
    }

    /// The worse of two claims about one path, seen from the same end. Of two that do not agree which path is in use, the worse
    /// kind.
    fn worse(self, other: Self) -> Self {
        let slower = |a: Option<f64>, b: Option<f64>| a.into_iter().chain(b).min_by(f64::total_cmp);
        Self {
            rtt_ms: self.rtt_ms.max(other.rtt_ms),
            jitter_ms: self.jitter_ms.max(other.jitter_ms).max((self.rtt_ms - other.rtt_ms).abs()),
            loss: self.loss.max(other.loss),
            out_bytes_per_s: slower(self.out_bytes_per_s, other.out_bytes_per_s),
            in_bytes_per_s: slower(self.in_bytes_per_s, other.in_bytes_per_s),
            reliability: self.reliability.min(other.reliability),
            path: self.path.max(other.path),
        }
    }
}

/// Where knowledge of a pair comes from, the best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Confidence {
    /// This node is one end and measured it.
    Measured,
    /// One end, or both, said so.
    Heard,
    /// From coordinates: only the round trip, with its usual error.
    Predicted,
}

/// What is known about a path from one peer to another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PairEstimate {
    /// Round trip.
    pub rtt_ms: f64,
    /// How far off that may well be: the deviation that was measured, or the usual error of predictions.
    pub rtt_error_ms: f64,
    /// Smoothed deviation of round trips; `None` when it is only predicted.
    pub jitter_ms: Option<f64>,
    /// Share of probes that were not answered in time; `None` when it is only predicted.
    pub loss: Option<f64>,
    /// Share of probes that were answered over hours, see [`LinkEstimate::reliability`]; `None` when it is only predicted.
    pub reliability: Option<f64>,
    /// From the first of the pair to the second, where a transfer was large enough to tell.
    pub bytes_per_s: Option<f64>,
    /// Which path it is; `None` when it is only predicted.
    pub path: Option<PathKind>,
    /// How old the knowledge is.
    pub age: Duration,
    /// Where it comes from.
    pub confidence: Confidence,
}

impl PairEstimate {
    fn new(claim: &Claim, age: Duration, confidence: Confidence) -> Self {
        Self {
            rtt_ms: claim.rtt_ms,
            rtt_error_ms: claim.jitter_ms,
            jitter_ms: Some(claim.jitter_ms),
            loss: Some(claim.loss),
            reliability: Some(claim.reliability),
            bytes_per_s: claim.out_bytes_per_s,
            path: Some(claim.path),
            age,
            confidence,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct LinkMap {
    own: PeerId,
    coordinate: Coordinate,
    vectors: Newest<LinkVector>,
}

impl LinkMap {
    /// The map of the node `own`, which knows nothing yet.
    pub fn new(own: PeerId) -> Self {
        let vectors = Newest::new(AUTHORS_MAX, VECTOR_EXPIRES);
        Self { own, coordinate: Coordinate::default(), vectors }
    }

    /// What everybody said last. Statements of this node itself are in it, to be passed on.
    pub fn vectors(&self) -> &Newest<LinkVector> {
        &self.vectors
    }

    /// As [`LinkMap::vectors`], to add checked ones.
    pub fn vectors_mut(&mut self) -> &mut Newest<LinkVector> {
        &mut self.vectors
    }

    /// Measured round trips over the paths in use move this node's coordinate, where the other end's is known. `seed` draws
    /// directions.
    pub fn handle_links(&mut self, now: Duration, links: &[(PeerId, Vec<LinkEstimate>)], seed: u64) {
        for (n, (peer, paths)) in links.iter().enumerate() {
            if let (Some((vector, _)), Some(link)) = (self.vectors.get(now, peer), paths.first()) {
                self.coordinate.handle_rtt(&vector.coordinate, link.rtt_ms, seed.wrapping_add(n as u64));
            }
        }
    }

    /// What this node says of its links now: each peer's path in use first. The nearest of them, spare paths after all
    /// others.
    pub fn own_vector(&self, written_ms: u64, links: &[(PeerId, Vec<LinkEstimate>)]) -> LinkVector {
        let mut claims: Vec<(bool, &PeerId, Claim)> = links
            .iter()
            .flat_map(|(peer, paths)| {
                paths.iter().enumerate().map(move |(i, link)| (i > 0, peer, link.into()))
            })
            .collect();
        claims.sort_by(|(spare, _, a), (other, _, b)| spare.cmp(other).then(a.rtt_ms.total_cmp(&b.rtt_ms)));
        claims.truncate(CLAIMS_MAX);
        let neighbours = claims.into_iter().map(|(_, peer, claim)| (peer.clone(), claim)).collect();
        LinkVector { written_ms, coordinate: self.coordinate, neighbours }
    }

    /// What is known of the paths from `a` to `b`, the one in use first. `measured` is what this node measured itself, when it
    /// is one of them.
    pub fn paths(
        &self,
        now: Duration,
        a: &PeerId,
        b: &PeerId,
        measured: &[LinkEstimate],
    ) -> Vec<PairEstimate> {
        if a == b {
            return Vec::new();
        }
        let estimate = |link: &LinkEstimate| {
            let claim = Claim::from(link);
            let claim = if *a == self.own { claim } else { claim.turned() };
            PairEstimate::new(&claim, link.age, Confidence::Measured)
        };
        if !measured.is_empty() {
            return measured.iter().map(estimate).collect();
        }
        let (from_a, age) = self.claims(now, a, b);
        let (from_b, other_age) = self.claims(now, b, a);
        let from_b: Vec<Claim> = from_b.into_iter().map(Claim::turned).collect();
        let heard = match (from_a.first(), from_b.first()) {
            (Some(one), Some(other)) => {
                // A path in use that the other end knows nothing of may be a lie; a spare one needs both to name it.
                let used = one.worse(*other);
                let both = from_a[1..].iter().filter(|spare| spare.path != used.path).filter_map(|spare| {
                    Some(spare.worse(*from_b.iter().find(|other| other.path == spare.path)?))
                });
                [used].into_iter().chain(both).collect()
            }
            (Some(_), None) => from_a,
            (None, _) => from_b,
        };
        if heard.is_empty() {
            return self.predicted(now, a, b).into_iter().collect();
        }
        let age = age.max(other_age);
        heard.iter().map(|claim| PairEstimate::new(claim, age, Confidence::Heard)).collect()
    }

    /// What coordinates say of the link from `a` to `b`.
    fn predicted(&self, now: Duration, a: &PeerId, b: &PeerId) -> Option<PairEstimate> {
        let ((here, age), (there, other_age)) = (self.coordinate_of(now, a)?, self.coordinate_of(now, b)?);
        let error = here.error().hypot(there.error());
        let rtt_ms = here.rtt_ms(&there);
        (here.error().max(there.error()) <= USABLE_ERROR).then_some(PairEstimate {
            rtt_ms,
            rtt_error_ms: rtt_ms * error,
            jitter_ms: None,
            loss: None,
            reliability: None,
            bytes_per_s: None,
            path: None,
            age: age.max(other_age),
            confidence: Confidence::Predicted,
        })
    }

    /// What `author` says of its paths to `peer`, at most one claim for each, and how long ago.
    fn claims(&self, now: Duration, author: &PeerId, peer: &PeerId) -> (Vec<Claim>, Duration) {
        let Some((vector, age)) = self.vectors.get(now, author) else { return (Vec::new(), Duration::ZERO) };
        let mut claims: Vec<Claim> = Vec::new();
        for (_, claim) in vector.neighbours.iter().filter(|(neighbour, _)| neighbour == peer) {
            if claims.iter().all(|known| known.path != claim.path) {
                claims.push(*claim);
            }
        }
        let age = if claims.is_empty() { Duration::ZERO } else { age };
        (claims, age)
    }

    fn coordinate_of(&self, now: Duration, peer: &PeerId) -> Option<(Coordinate, Duration)> {
        if *peer == self.own {
            return Some((self.coordinate, Duration::ZERO));
        }
        self.vectors.get(now, peer).map(|(vector, age)| (vector.coordinate, age))
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn peer(n: u8) -> PeerId {
        PeerId::from_ed25519(&[n; 32])
    }

    fn claim(rtt_ms: f64, out: f64, incoming: f64) -> Claim {
        let (out_bytes_per_s, in_bytes_per_s) = (Some(out), Some(incoming));
        let (reliability, path) = (1.0, PathKind::Quic);
        Claim { rtt_ms, jitter_ms: 1.0, loss: 0.0, out_bytes_per_s, in_bytes_per_s, reliability, path }
    }

    fn measured(rtt_ms: f64) -> LinkEstimate {
        let mut estimator = crate::links::LinkEstimator::default();
        for second in 0..50 {
            estimator.handle_answer(second * S, Duration::from_secs_f64(rtt_ms / 1e3));
        }
        estimator.estimate(50 * S, PathKind::Quic).unwrap()
    }

    fn between(map: &LinkMap, now: Duration, a: &PeerId, b: &PeerId) -> Option<PairEstimate> {
        map.paths(now, a, b, &[]).into_iter().next()
    }

    fn say(map: &mut LinkMap, author: u8, coordinate: Coordinate, neighbours: Vec<(PeerId, Claim)>) {
        let time = map.vectors().get(S, &peer(author)).map_or(0, |(v, _)| v.written_ms) + 1;
        let vector = LinkVector { written_ms: time, coordinate, neighbours };
        assert!(map.vectors_mut().insert(S, &peer(author), time, (Bytes::new(), Duration::ZERO), vector));
    }

    #[test]
    fn measured_before_heard_before_predicted() {
        let mut map = LinkMap::new(peer(0));
        assert_eq!(between(&map, S, &peer(1), &peer(2)), None);
        let at = |x: f64| Coordinate::checked([x, 0.0, 0.0], 1.0, 0.1).unwrap();
        say(&mut map, 1, at(0.0), vec![]);
        say(&mut map, 2, at(30.0), vec![]);
        let predicted = between(&map, S, &peer(1), &peer(2)).unwrap();
        assert_eq!(predicted.confidence, Confidence::Predicted);
        assert!((predicted.rtt_ms - 32.0).abs() < 1e-9 && (predicted.rtt_error_ms - 4.5).abs() < 0.1);
        say(&mut map, 1, at(0.0), vec![(peer(2), claim(20.0, 5e6, 9e6))]);
        say(&mut map, 2, at(30.0), vec![(peer(1), claim(24.0, 8e6, 4e6))]);
        let heard = between(&map, 3 * S, &peer(1), &peer(2)).unwrap();
        // The slower of both: 1 says that it sends 5 MB/s, 2 that it gets 4.
        assert_eq!((heard.rtt_ms, heard.bytes_per_s, heard.age), (24.0, Some(4e6), 2 * S));
        assert_eq!((heard.rtt_error_ms, heard.confidence), (4.0, Confidence::Heard));
        assert_eq!(between(&map, S, &peer(2), &peer(1)).unwrap().bytes_per_s, Some(8e6));
        let own = map.paths(S, &peer(0), &peer(1), &[measured(7.0)]).remove(0);
        assert!(own.confidence == Confidence::Measured && (own.rtt_ms - 7.0).abs() < 1e-6);
    }

    #[test]
    fn what_both_ends_say_is_as_old_as_the_older_word() {
        let mut map = LinkMap::new(peer(0));
        for (author, other, age) in [(1, 2, 300 * S), (2, 1, S)] {
            let neighbours = vec![(peer(other), claim(20.0, 5e6, 9e6))];
            let vector = LinkVector { written_ms: 1, coordinate: Coordinate::default(), neighbours };
            assert!(map.vectors_mut().insert(400 * S, &peer(author), 1, (Bytes::new(), age), vector));
        }
        assert_eq!(between(&map, 400 * S, &peer(1), &peer(2)).unwrap().age, 300 * S);
    }

    #[test]
    fn a_coordinate_that_knows_nothing_predicts_nothing() {
        let mut map = LinkMap::new(peer(0));
        say(&mut map, 1, Coordinate::default(), vec![]);
        say(&mut map, 2, Coordinate::checked([9.0; 3], 0.0, 0.1).unwrap(), vec![]);
        assert_eq!(between(&map, S, &peer(1), &peer(2)), None);
    }

    #[test]
    fn a_vector_names_the_nearest() {
        let mut links: Vec<(PeerId, Vec<LinkEstimate>)> =
            (1..=100).map(|n| (peer(n), vec![measured(f64::from(200 - u32::from(n)))])).collect();
        // The nearest has a spare path, for which there is no room.
        links[99].1.push(LinkEstimate { path: PathKind::Relayed, ..measured(1.0) });
        let vector = LinkMap::new(peer(0)).own_vector(1, &links);
        assert_eq!(vector.neighbours.len(), CLAIMS_MAX);
        assert!(vector.neighbours.iter().all(|(p, _)| *p >= peer(37)));
    }

    #[test]
    fn each_path_is_known_for_itself_and_a_spare_one_only_when_both_ends_name_it() {
        let mut map = LinkMap::new(peer(0));
        let over = |path, rtt_ms| Claim { path, ..claim(rtt_ms, 5e6, 5e6) };
        let (quic, tcp, relayed) = (PathKind::Quic, PathKind::Tcp, PathKind::Relayed);
        let place = Coordinate::default;
        let known = |map: &LinkMap| -> Vec<(Option<PathKind>, f64)> {
            map.paths(S, &peer(1), &peer(2), &[]).iter().map(|pair| (pair.path, pair.rtt_ms)).collect()
        };
        let of_1 =
            vec![(peer(2), over(quic, 20.0)), (peer(2), over(tcp, 22.0)), (peer(2), over(relayed, 80.0))];
        say(&mut map, 1, place(), of_1);
        // One end alone is believed until the other one says something.
        assert_eq!(known(&map), [(Some(quic), 20.0), (Some(tcp), 22.0), (Some(relayed), 80.0)]);
        say(&mut map, 2, place(), vec![(peer(1), over(quic, 21.0)), (peer(1), over(relayed, 70.0))]);
        assert_eq!(known(&map), [(Some(quic), 21.0), (Some(relayed), 80.0)]);
        // They do not agree which path is in use: the worse kind, with the worse numbers.
        say(&mut map, 2, place(), vec![(peer(1), over(relayed, 70.0)), (peer(1), over(quic, 1.0))]);
        assert_eq!(known(&map), [(Some(relayed), 70.0)]);
    }

    #[test]
    fn spare_paths_are_told_after_those_in_use() {
        let links: Vec<(PeerId, Vec<LinkEstimate>)> = (1..=3u8)
            .map(|n| {
                let spare = LinkEstimate { path: PathKind::Relayed, ..measured(1.0) };
                (peer(n), vec![measured(f64::from(n) * 10.0), spare])
            })
            .collect();
        let vector = LinkMap::new(peer(0)).own_vector(1, &links);
        let told: Vec<PathKind> = vector.neighbours.iter().map(|(_, claim)| claim.path).collect();
        assert_eq!(told, [[PathKind::Quic; 3], [PathKind::Relayed; 3]].concat());
    }

    proptest! {
        // Peer 9 says whatever it likes; 0 is this node, 1 and 2 are honest.
        #[test]
        fn a_liar_moves_no_measurement_and_makes_no_honest_link_look_better(
            lies in proptest::collection::vec((0u8..10, 0.0f64..1e4, 1.0f64..1e9, 1.0f64..1e9, -1e4f64..1e4), 1..20)
        ) {
            let mut map = LinkMap::new(peer(0));
            let mine = measured(12.0);
            let at = |x: f64| Coordinate::checked([x, 0.0, 0.0], 1.0, 0.1).unwrap();
            say(&mut map, 1, at(0.0), vec![(peer(2), claim(20.0, 5e6, 9e6)), (peer(9), claim(40.0, 1e6, 1e6))]);
            say(&mut map, 2, at(30.0), vec![(peer(1), claim(24.0, 8e6, 4e6))]);
            let pairs = |map: &LinkMap| {
                let own = map.paths(S, &peer(0), &peer(9), std::slice::from_ref(&mine));
                (own, between(map, S, &peer(1), &peer(2)), between(map, S, &peer(2), &peer(1)))
            };
            let before = pairs(&map);
            for (about, rtt, out, incoming, x) in lies {
                say(&mut map, 9, Coordinate::checked([x, x, 0.0], 0.0, 0.0).unwrap(), vec![(peer(about), claim(rtt, out, incoming))]);
                map.handle_links(S, &[(peer(9), vec![mine.clone()])], 1);
                prop_assert_eq!(&pairs(&map), &before);
                let its_own = between(&map, S, &peer(1), &peer(9)).unwrap();
                prop_assert!(its_own.rtt_ms >= 40.0 && its_own.bytes_per_s.unwrap() <= 1e6, "{its_own:?}");
            }
        }
    }
}
