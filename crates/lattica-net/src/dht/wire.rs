//! Signed DHT records as bytes (`proto/lattica/v1/dht.proto`): they become checked values here and nowhere else.

use prost::Message as _;
use swarm_wire::generated::lattica::v1 as pb;
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::signed::{self, Signer};
use swarm_wire::{DecodeError, PeerId};

use super::{NETWORK_MAX_BYTES, Refusal, STATEMENT_MAX_BYTES, SignedRecord, check_name, check_value};

/// What a record is signed as.
pub const RECORD_DOMAIN: &str = "lattica/v1/record";

const WHAT: &str = "DHT record";

/// A record as its publisher signs it.
///
/// # Panics
/// When `signer` is not its publisher.
pub fn encode(record: &SignedRecord, signer: &impl Signer) -> Vec<u8> {
    let author = PeerId::from_ed25519(&signer.public_key());
    assert_eq!(record.publisher, author, "a record is signed by its publisher");
    let message = pb::DhtRecord {
        network: record.network.clone(),
        name: record.name.clone(),
        sequence: record.sequence,
        expires_s: record.expires_s,
        value: record.value.clone(),
    };
    signer.signed(RECORD_DOMAIN, &message.encode_to_vec()).encode_to_vec()
}

/// Reads a record that somebody sent. Its signature is looked at last, when `check` has found nothing against it.
///
/// # Errors
/// When it is malformed, `check` refuses it, or its publisher did not sign it.
pub fn decode(
    statement: &[u8],
    check: impl FnOnce(&SignedRecord) -> Result<(), Refusal>,
) -> Result<SignedRecord, Refusal> {
    let (signed, record) = read(statement)?;
    check_name(&record.name)?;
    check_value(&record.value)?;
    check(&record)?;
    signed::verify(&signed, RECORD_DOMAIN)?;
    Ok(record)
}

/// Reads a record whose signature was looked at before it was kept.
///
/// # Errors
/// When it is malformed.
pub fn decode_kept(statement: &[u8]) -> Result<SignedRecord, DecodeError> {
    read(statement).map(|(_, record)| record)
}

fn read(statement: &[u8]) -> Result<(Signed, SignedRecord), DecodeError> {
    let got_bytes = statement.len();
    if got_bytes > STATEMENT_MAX_BYTES {
        return Err(DecodeError::TooLarge { what: WHAT, limit_bytes: STATEMENT_MAX_BYTES, got_bytes });
    }
    let signed = Signed::decode(statement).map_err(|e| DecodeError::message(WHAT, &e))?;
    let message =
        pb::DhtRecord::decode(signed.payload.clone()).map_err(|e| DecodeError::message(WHAT, &e))?;
    let key = signed::claimed_key(&signed, RECORD_DOMAIN)?;
    if message.network.len() > NETWORK_MAX_BYTES {
        let got = format!("{} bytes", message.network.len());
        return Err(DecodeError::invalid("network of a DHT record", got));
    }
    let record = SignedRecord {
        publisher: PeerId::from_ed25519(&key),
        network: message.network,
        name: message.name,
        sequence: message.sequence,
        expires_s: message.expires_s,
        value: message.value,
    };
    Ok((signed, record))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use ed25519_dalek::SigningKey;
    use proptest::prelude::*;

    use super::super::{NAME_MAX_BYTES, VALUE_MAX_BYTES};
    use super::*;

    fn key() -> SigningKey {
        SigningKey::from_bytes(&[7; 32])
    }

    fn record(name_bytes: usize, value_bytes: usize) -> SignedRecord {
        SignedRecord {
            publisher: PeerId::from_ed25519(&key().public_key()),
            network: "n".repeat(NETWORK_MAX_BYTES),
            name: "x".repeat(name_bytes),
            sequence: u64::MAX,
            expires_s: u64::MAX,
            value: vec![9; value_bytes].into(),
        }
    }

    fn back(record: &SignedRecord) -> Result<SignedRecord, Refusal> {
        decode(&encode(record, &key()), |_| Ok(()))
    }

    #[test]
    fn records_come_back_as_they_were_up_to_the_largest() {
        let largest = record(NAME_MAX_BYTES, VALUE_MAX_BYTES);
        let bytes = encode(&largest, &key());
        assert!(bytes.len() <= STATEMENT_MAX_BYTES, "{} bytes", bytes.len());
        assert_eq!(decode_kept(&bytes), Ok(largest.clone()));
        for record in [largest, record(1, 0)] {
            assert_eq!(back(&record), Ok(record.clone()));
        }
    }

    #[test]
    fn what_is_too_long_or_has_no_name_is_refused() {
        assert_eq!(back(&record(0, 1)), Err(Refusal::Name { got_bytes: 0 }));
        assert_eq!(back(&record(256, 1)), Err(Refusal::Name { got_bytes: 256 }));
        let got_bytes = VALUE_MAX_BYTES + 1;
        assert_eq!(back(&record(1, got_bytes)), Err(Refusal::Value { got_bytes }));
        let refused = back(&record(1, STATEMENT_MAX_BYTES));
        assert!(matches!(refused, Err(Refusal::Malformed(DecodeError::TooLarge { .. }))), "{refused:?}");
        let refused = back(&SignedRecord { network: "n".repeat(NETWORK_MAX_BYTES + 1), ..record(1, 1) });
        assert!(matches!(refused, Err(Refusal::Malformed(DecodeError::Invalid { .. }))), "{refused:?}");
    }

    #[test]
    fn what_was_signed_for_another_purpose_is_no_record() {
        let payload = Signed::decode(&encode(&record(1, 1), &key())[..]).unwrap().payload;
        let statement = key().signed("lattica/v1/links", &payload).encode_to_vec();
        let refused = decode(&statement, |_| Ok(()));
        assert!(matches!(refused, Err(Refusal::Malformed(DecodeError::Invalid { .. }))), "{refused:?}");
    }

    #[test]
    fn nothing_is_verified_that_is_refused_anyway() {
        let mut statement = encode(&record(1, 1), &key());
        *statement.last_mut().unwrap() ^= 1;
        assert_eq!(decode(&statement, |_| Err(Refusal::WrongKey)), Err(Refusal::WrongKey));
        let refused = decode(&statement, |_| Ok(()));
        assert!(matches!(refused, Err(Refusal::Malformed(DecodeError::BadSignature { .. }))), "{refused:?}");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes, |_| Ok(()));
            let _ = decode_kept(&bytes);
            // Behind a good signature, where no random bytes get.
            let signed = key().signed(RECORD_DOMAIN, &Bytes::from(bytes)).encode_to_vec();
            let _ = decode(&signed, |_| Ok(()));
        }
    }
}
