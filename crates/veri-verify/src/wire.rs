//! Bytes from a peer become commitments, challenges and openings here and nowhere else.

use swarm_wire::DecodeError;
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::generated::veri::v1 as proto;
use swarm_wire::limits::MESSAGE_MAX_BYTES;
use swarm_wire::prost::Message;
use swarm_wire::repeated::{self, Element};

use crate::challenge::Challenge;
use crate::commitment::{Commitment, SignedCommitment};
use crate::config::{MAX_POSITIONS, MAX_ROWS, MAX_WIDTH};
use crate::merkle::Hash;
use crate::prover::{OpenedRow, Opening};

/// Sibling hashes of one proof: a tree over [`MAX_ROWS`] rows is 20 levels high.
const MAX_PATH: usize = 20;

/// Encodes a commitment's payload, without signature.
pub fn encode_commitment(commitment: &Commitment) -> Vec<u8> {
    proto::Commitment {
        job_id: commitment.job_id.to_vec().into(),
        output_hash: commitment.output_hash.to_vec().into(),
        boundary: commitment.boundary,
        width: commitment.width,
        n_rows: commitment.n_rows,
        root: commitment.root.to_vec().into(),
    }
    .encode_to_vec()
}

/// Decodes a commitment's payload.
///
/// # Errors
/// When the bytes are no commitment or a count is out of range.
pub fn decode_commitment(bytes: &[u8]) -> Result<Commitment, DecodeError> {
    let message = proto::Commitment::decode(capped("commitment", bytes)?)
        .map_err(|e| DecodeError::message("veri.v1.Commitment", &e))?;
    Ok(Commitment {
        job_id: hash("job id", &message.job_id)?,
        output_hash: hash("output hash", &message.output_hash)?,
        boundary: message.boundary,
        width: ranged("row width", message.width, MAX_WIDTH)?,
        n_rows: ranged("row count", message.n_rows, MAX_ROWS)?,
        root: hash("root", &message.root)?,
    })
}

/// Decodes a signed commitment and checks its signature.
///
/// # Errors
/// When the bytes are no signed commitment, or the signature does not match.
pub fn decode_signed_commitment(bytes: &[u8]) -> Result<SignedCommitment, DecodeError> {
    let signed = Signed::decode(capped("signed commitment", bytes)?)
        .map_err(|e| DecodeError::message("swarm.v1.Signed", &e))?;
    SignedCommitment::verify(signed)
}

/// Encodes a challenge.
pub fn encode_challenge(challenge: &Challenge) -> Vec<u8> {
    proto::Challenge {
        commitment_hash: challenge.commitment_hash.to_vec().into(),
        randomness: challenge.randomness.to_vec().into(),
        n_positions: challenge.n_positions,
    }
    .encode_to_vec()
}

/// Decodes a challenge.
///
/// # Errors
/// When the bytes are no challenge, or too many rows are asked for.
pub fn decode_challenge(bytes: &[u8]) -> Result<Challenge, DecodeError> {
    let message = proto::Challenge::decode(capped("challenge", bytes)?)
        .map_err(|e| DecodeError::message("veri.v1.Challenge", &e))?;
    Ok(Challenge {
        commitment_hash: hash("commitment hash", &message.commitment_hash)?,
        randomness: hash("randomness", &message.randomness)?,
        n_positions: ranged("number of positions", message.n_positions, MAX_POSITIONS)?,
    })
}

/// Encodes an opening.
pub fn encode_opening(opening: &Opening) -> Vec<u8> {
    let rows = opening
        .rows
        .iter()
        .map(|row| proto::OpenedRow {
            position: row.position,
            values: row.values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into(),
            path: row.path.iter().map(|h| h.to_vec().into()).collect(),
        })
        .collect();
    proto::Opening { commitment_hash: opening.commitment_hash.to_vec().into(), rows }.encode_to_vec()
}

/// Decodes an opening.
///
/// # Errors
/// When the bytes are no opening or a part is larger than any valid one.
pub fn decode_opening(bytes: &[u8]) -> Result<Opening, DecodeError> {
    let (bytes, rows) = (capped("opening", bytes)?, MAX_POSITIONS as usize);
    for (path, most) in [(&[2][..], rows), (&[2, 3], rows * MAX_PATH)] {
        repeated::check("list in an opening", bytes, (path, Element::Field), most)?;
    }
    let message = proto::Opening::decode(bytes).map_err(|e| DecodeError::message("veri.v1.Opening", &e))?;
    let rows = message.rows.iter().map(decode_row).collect::<Result<_, _>>()?;
    Ok(Opening { commitment_hash: hash("commitment hash", &message.commitment_hash)?, rows })
}

fn decode_row(row: &proto::OpenedRow) -> Result<OpenedRow, DecodeError> {
    if !row.values.len().is_multiple_of(4) || row.values.len() / 4 > MAX_WIDTH as usize {
        return Err(DecodeError::invalid("row bytes", row.values.len()));
    }
    if row.path.len() > MAX_PATH {
        return Err(DecodeError::invalid("proof length", row.path.len()));
    }
    let values = row.values.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let path = row.path.iter().map(|h| hash("sibling hash", h)).collect::<Result<_, _>>()?;
    Ok(OpenedRow { position: row.position, values, path })
}

fn capped<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a [u8], DecodeError> {
    if bytes.len() > MESSAGE_MAX_BYTES {
        return Err(DecodeError::TooLarge { what, limit_bytes: MESSAGE_MAX_BYTES, got_bytes: bytes.len() });
    }
    Ok(bytes)
}

fn hash(what: &'static str, bytes: &[u8]) -> Result<Hash, DecodeError> {
    bytes.try_into().map_err(|_| DecodeError::invalid(what, format!("{} bytes instead of 32", bytes.len())))
}

fn ranged(what: &'static str, value: u32, max: u32) -> Result<u32, DecodeError> {
    if (1..=max).contains(&value) { Ok(value) } else { Err(DecodeError::invalid(what, value)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode_signed_commitment(&bytes);
            let _ = decode_challenge(&bytes);
            let _ = decode_opening(&bytes);
            let _ = decode_commitment(&bytes);
        }

        #[test]
        fn openings_round_trip(rows in proptest::collection::vec((any::<u32>(), proptest::collection::vec(-1e3f32..1e3, 0..5)), 0..4)) {
            let rows = rows.into_iter().map(|(position, values)| OpenedRow { position, values, path: vec![[1; 32]; 3] }).collect();
            let opening = Opening { commitment_hash: [4; 32], rows };
            let bytes = encode_opening(&opening);
            prop_assert_eq!(&decode_opening(&bytes).unwrap(), &opening);
            for cut in 0..bytes.len().min(40) {
                prop_assert!(decode_opening(&bytes[..cut]).as_ref() != Ok(&opening));
            }
        }
    }

    #[test]
    fn commitment_bytes_are_pinned() {
        let commitment = Commitment {
            job_id: [1; 32],
            output_hash: [2; 32],
            boundary: 3,
            width: 4,
            n_rows: 5,
            root: [6; 32],
        };
        let bytes = encode_commitment(&commitment);
        assert_eq!(bytes.len(), 3 * 34 + 6);
        assert_eq!(&bytes[68..74], &[0x18, 3, 0x20, 4, 0x28, 5]);
        assert_eq!(decode_commitment(&bytes).unwrap(), commitment);
    }
}
