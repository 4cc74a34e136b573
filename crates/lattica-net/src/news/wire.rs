//! News as bytes: questions, answers and signed link vectors become checked types here and nowhere else, peer records in
//! `record`.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use swarm_wire::generated::lattica::v1 as pb;
use swarm_wire::generated::lattica::v1::link_neighbour::Path;
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::repeated::{self, Element};
use swarm_wire::signed::{self, Signer};
use swarm_wire::{DecodeError, PeerId};

use super::{AUTHORS_MAX, Item, Known, STATEMENT_MAX_BYTES};
use crate::links::PathKind;
use crate::links::coordinate::Coordinate;
use crate::links::map::{CLAIMS_MAX, Claim, LinkVector};

/// What a link vector is signed as.
pub const LINKS_DOMAIN: &str = "lattica/v1/links";
/// Longer round trips are no measurements.
const RTT_MAX_MS: f64 = 60_000.0;

/// What a node knows, and asks for what it does not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Request {
    /// Link vectors that are here.
    pub vectors: Known,
    /// Peer records that are here.
    pub records: Known,
}

/// News.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reply {
    /// Signed link vectors, unchecked.
    pub vectors: Vec<Item>,
    /// Peer records in their envelopes, unchecked.
    pub records: Vec<Item>,
}

impl Request {
    /// The message.
    pub fn encode(&self) -> Bytes {
        let (vector_tags, vector_times) = self.vectors.iter().copied().unzip();
        let (record_tags, record_times) = self.records.iter().copied().unzip();
        pb::NewsRequest { vector_tags, vector_times, record_tags, record_times }.encode_to_vec().into()
    }

    /// # Errors
    /// When it is malformed or names more authors than anybody remembers.
    pub fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        let request =
            pb::NewsRequest::decode(bytes).map_err(|e| DecodeError::message("question for news", &e))?;
        let known = |tags: Vec<u64>, times: Vec<u64>| {
            if tags.len() > AUTHORS_MAX || tags.len() != times.len() {
                return Err(DecodeError::invalid("number of authors in a question for news", tags.len()));
            }
            Ok(tags.into_iter().zip(times).collect())
        };
        Ok(Self {
            vectors: known(request.vector_tags, request.vector_times)?,
            records: known(request.record_tags, request.record_times)?,
        })
    }
}

impl Reply {
    /// The message.
    pub fn encode(self) -> Bytes {
        let items = |items: Vec<Item>| {
            let item = |(statement, age): Item| pb::NewsItem {
                statement,
                age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
            };
            items.into_iter().map(item).collect()
        };
        pb::NewsReply { vectors: items(self.vectors), records: items(self.records) }.encode_to_vec().into()
    }

    /// # Errors
    /// When it is malformed, or has more or larger statements than there can be.
    pub fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        for path in [&[1][..], &[2]] {
            repeated::check("statements in news", &bytes, (path, Element::Field), AUTHORS_MAX)?;
        }
        let reply = pb::NewsReply::decode(bytes).map_err(|e| DecodeError::message("news", &e))?;
        let items = |items: Vec<pb::NewsItem>| {
            let item = |item: pb::NewsItem| match item.statement.len() {
                // Copied: what is remembered must not hold on to the whole answer that it came in.
                0..=STATEMENT_MAX_BYTES => {
                    Ok((Bytes::copy_from_slice(&item.statement), Duration::from_millis(item.age_ms)))
                }
                got_bytes => Err(DecodeError::TooLarge {
                    what: "statement in news",
                    limit_bytes: STATEMENT_MAX_BYTES,
                    got_bytes,
                }),
            };
            items.into_iter().map(item).collect::<Result<_, _>>()
        };
        Ok(Self { vectors: items(reply.vectors)?, records: items(reply.records)? })
    }
}

/// A vector as `signer` says it.
pub fn encode_vector(vector: &LinkVector, signer: &impl Signer) -> Bytes {
    let [x_ms, y_ms, z_ms] = vector.coordinate.place_ms().map(|x| x as f32);
    let coordinate = pb::Coordinate {
        x_ms,
        y_ms,
        z_ms,
        height_ms: vector.coordinate.height_ms() as f32,
        error: vector.coordinate.error() as f32,
    };
    let neighbour = |(peer, claim): &(PeerId, Claim)| pb::LinkNeighbour {
        peer: Bytes::copy_from_slice(peer.as_bytes()),
        rtt_ms: claim.rtt_ms as f32,
        jitter_ms: claim.jitter_ms as f32,
        loss: claim.loss as f32,
        out_bytes_per_s: claim.out_bytes_per_s.unwrap_or_default() as f32,
        in_bytes_per_s: claim.in_bytes_per_s.unwrap_or_default() as f32,
        relayed: claim.path.is_relayed(),
        failed: (1.0 - claim.reliability) as f32,
        path: match claim.path {
            PathKind::Quic => Path::Quic,
            PathKind::Tcp => Path::Tcp,
            PathKind::Relayed => Path::Relayed,
        }
        .into(),
    };
    let message = pb::LinkVector {
        written_ms: vector.written_ms,
        coordinate: Some(coordinate),
        neighbours: vector.neighbours.iter().map(neighbour).collect(),
    };
    signer.signed(LINKS_DOMAIN, &message.encode_to_vec()).encode_to_vec().into()
}

/// Who says what about its links. `None`, without its signature having been checked, when `wants` does not want a vector of
/// that author and time.
///
/// # Errors
/// When it is malformed, out of range, or the signature is no good.
pub fn decode_vector(
    statement: &Bytes,
    wants: impl FnOnce(&PeerId, u64) -> bool,
) -> Result<Option<(PeerId, LinkVector)>, DecodeError> {
    let what = "link vector";
    let signed = Signed::decode(statement.clone()).map_err(|e| DecodeError::message(what, &e))?;
    let neighbours = (&[3][..], Element::Field);
    repeated::check("neighbours in a link vector", &signed.payload, neighbours, CLAIMS_MAX)?;
    let message =
        pb::LinkVector::decode(signed.payload.clone()).map_err(|e| DecodeError::message(what, &e))?;
    let key = signed::claimed_key(&signed, LINKS_DOMAIN)?;
    if !wants(&PeerId::from_ed25519(&key), message.written_ms) {
        return Ok(None);
    }
    let author = signed::verify(&signed, LINKS_DOMAIN)?;
    let place = message.coordinate.unwrap_or_default();
    let coordinate = Coordinate::checked(
        [place.x_ms, place.y_ms, place.z_ms].map(f64::from),
        place.height_ms.into(),
        // Rounding to f32 must not make an error of 1 more than that.
        f64::from(place.error).min(1.0),
    )
    .ok_or_else(|| DecodeError::invalid("coordinate", format!("{place:?}")))?;
    let neighbours =
        message.neighbours.iter().filter_map(|n| neighbour(n).transpose()).collect::<Result<_, _>>()?;
    Ok(Some((author, LinkVector { written_ms: message.written_ms, coordinate, neighbours })))
}

/// `None` for a kind of path that is not known here yet.
fn neighbour(message: &pb::LinkNeighbour) -> Result<Option<(PeerId, Claim)>, DecodeError> {
    let within = |what: &'static str, value: f32, most: f64| {
        let value = f64::from(value);
        if (0.0..=most).contains(&value) { Ok(value) } else { Err(DecodeError::invalid(what, value)) }
    };
    let rate = |value: f32| {
        let rate = within("rate of a link", value, 1e15)?;
        Ok((rate > 0.0).then_some(rate))
    };
    let path = match Path::try_from(message.path) {
        Ok(Path::Unknown) if message.relayed => PathKind::Relayed,
        Ok(Path::Unknown | Path::Quic) => PathKind::Quic,
        Ok(Path::Tcp) => PathKind::Tcp,
        Ok(Path::Relayed) => PathKind::Relayed,
        Err(_) => return Ok(None),
    };
    let claim = Claim {
        rtt_ms: within("round trip of a link", message.rtt_ms, RTT_MAX_MS)?,
        jitter_ms: within("jitter of a link", message.jitter_ms, RTT_MAX_MS)?,
        loss: within("loss of a link", message.loss, 1.0)?,
        out_bytes_per_s: rate(message.out_bytes_per_s)?,
        in_bytes_per_s: rate(message.in_bytes_per_s)?,
        reliability: 1.0 - within("failures of a link", message.failed, 1.0)?,
        path,
    };
    Ok(Some((PeerId::from_bytes(&message.peer)?, claim)))
}

#[cfg(test)]
mod tests {
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;

    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_ed25519(&[n; 32])
    }

    fn vector(neighbours: u8) -> LinkVector {
        let claim = Claim {
            rtt_ms: 20.5,
            jitter_ms: 0.25,
            loss: 0.125,
            out_bytes_per_s: Some(1e6),
            in_bytes_per_s: None,
            reliability: 0.75,
            path: PathKind::Tcp,
        };
        let coordinate = Coordinate::checked([1.0, -2.0, 3.5], 0.5, 0.25).unwrap();
        let neighbours = (0..neighbours).map(|n| (peer(n), claim)).collect();
        LinkVector { written_ms: 77, coordinate, neighbours }
    }

    #[test]
    fn vectors_round_trip_and_fit() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let full = vector(CLAIMS_MAX as u8);
        let statement = encode_vector(&full, &key);
        assert!(statement.len() <= STATEMENT_MAX_BYTES, "{} bytes", statement.len());
        let author = PeerId::from_ed25519(&key.public_key());
        assert_eq!(decode_vector(&statement, |_, _| true).unwrap(), Some((author.clone(), full)));
        assert_eq!(decode_vector(&statement, |who, time| *who != author || time > 77).unwrap(), None);
    }

    #[test]
    fn forged_and_impossible_vectors_are_refused() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let forged = |change: fn(&mut Signed)| {
            let mut signed = Signed::decode(encode_vector(&vector(2), &key)).unwrap();
            change(&mut signed);
            decode_vector(&signed.encode_to_vec().into(), |_, _| true)
        };
        let other = SigningKey::from_bytes(&[8; 32]).public_key();
        assert!(forged(|_| ()).is_ok());
        assert!(matches!(
            forged(|s| s.signature = vec![1; 64].into()),
            Err(DecodeError::BadSignature { .. })
        ));
        assert!(matches!(forged(|s| s.public_key = vec![1].into()), Err(DecodeError::BadSignature { .. })));
        let mut signed = Signed::decode(encode_vector(&vector(2), &key)).unwrap();
        signed.public_key = other.to_vec().into();
        let claimed = decode_vector(&signed.encode_to_vec().into(), |_, _| true);
        assert!(matches!(claimed, Err(DecodeError::BadSignature { .. })));
        let said = |change: fn(&mut Claim)| {
            let mut vector = vector(2);
            change(&mut vector.neighbours[1].1);
            decode_vector(&encode_vector(&vector, &key), |_, _| true)
        };
        for impossible in [
            said(|c| c.rtt_ms = -1.0),
            said(|c| c.rtt_ms = f64::NAN),
            said(|c| c.jitter_ms = 1e9),
            said(|c| c.loss = 1.5),
            said(|c| c.reliability = -0.5),
            said(|c| c.out_bytes_per_s = Some(f64::INFINITY)),
        ] {
            assert!(impossible.is_err(), "{impossible:?}");
        }
        let many = encode_vector(&vector(CLAIMS_MAX as u8 + 1), &key);
        assert!(decode_vector(&many, |_, _| true).is_err());
    }

    #[test]
    fn older_nodes_and_kinds_of_paths_to_come_are_understood() {
        let key = SigningKey::from_bytes(&[7; 32]);
        let read = |relayed, path| {
            let peer = Bytes::copy_from_slice(peer(1).as_bytes());
            let neighbour = pb::LinkNeighbour { peer, relayed, path, ..pb::LinkNeighbour::default() };
            let vector = pb::LinkVector { neighbours: vec![neighbour], ..pb::LinkVector::default() };
            let statement = key.signed(LINKS_DOMAIN, &vector.encode_to_vec()).encode_to_vec();
            let (_, vector) = decode_vector(&statement.into(), |_, _| true).unwrap().unwrap();
            vector.neighbours.first().map(|(_, claim)| (claim.path, claim.reliability))
        };
        assert_eq!(read(true, 0), Some((PathKind::Relayed, 1.0)));
        assert_eq!(read(false, 0), Some((PathKind::Quic, 1.0)));
        assert_eq!(read(false, 9), None);
    }

    #[test]
    fn questions_and_answers_round_trip_and_are_bounded() {
        let request = Request { vectors: vec![(1, 2), (u64::MAX, 0)], records: vec![(3, 4)] };
        assert_eq!(Request::decode(request.encode()).unwrap(), request);
        let many = Request { vectors: vec![(1, 2); AUTHORS_MAX + 1], ..Request::default() };
        assert!(Request::decode(many.encode()).is_err());
        let uneven = pb::NewsRequest { vector_tags: vec![1], ..pb::NewsRequest::default() };
        assert!(Request::decode(uneven.encode_to_vec().into()).is_err());
        let item = (Bytes::from_static(b"signed"), Duration::from_millis(5));
        let reply = Reply { vectors: vec![item.clone()], records: vec![item.clone(), item.clone()] };
        assert_eq!(Reply::decode(reply.clone().encode()).unwrap(), reply);
        let large = (Bytes::from(vec![0; STATEMENT_MAX_BYTES + 1]), Duration::ZERO);
        assert!(Reply::decode(Reply { vectors: vec![large], ..Reply::default() }.encode()).is_err());
        let many = Reply { records: vec![item; AUTHORS_MAX + 1], ..Reply::default() };
        assert!(Reply::decode(many.encode()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let bytes = Bytes::from(bytes);
            let _ = Request::decode(bytes.clone());
            let _ = Reply::decode(bytes.clone());
            let _ = decode_vector(&bytes, |_, _| true);
        }
    }
}
