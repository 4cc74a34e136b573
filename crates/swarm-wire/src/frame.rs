//! Length-delimited framing over byte slices: an unsigned LEB128 length, then that many bytes.

use crate::DecodeError;

/// A length prefix never takes more bytes than this (five groups of seven bits hold a u32).
pub const LENGTH_MAX_BYTES: usize = 5;

/// Appends `payload` with its length prefix to `out`.
pub fn encode(payload: &[u8], out: &mut Vec<u8>) {
    encode_length(payload.len(), out);
    out.extend_from_slice(payload);
}

/// A message with its length before it, with room for `tail_bytes` behind it.
pub fn encode_message(message: &impl prost::Message, tail_bytes: usize) -> Vec<u8> {
    let length = message.encoded_len();
    let mut out = Vec::with_capacity(length + LENGTH_MAX_BYTES + tail_bytes);
    encode_length(length, &mut out);
    message.encode(&mut out).expect("a vector grows");
    out
}

/// Appends a length prefix.
pub fn encode_length(length: usize, out: &mut Vec<u8>) {
    let mut rest = u32::try_from(length).expect("frames are limited far below 4 GiB");
    while rest >= 0x80 {
        out.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    out.push(rest as u8);
}

/// Reads a length prefix from the front of `bytes`: `Ok(None)` when more bytes are needed, else the length and the
/// number of prefix bytes.
///
/// # Errors
/// When the prefix is malformed or the length exceeds `limit_bytes`; nothing is allocated before.
pub fn decode_length(
    what: &'static str,
    bytes: &[u8],
    limit_bytes: usize,
) -> Result<Option<(usize, usize)>, DecodeError> {
    let mut length: u64 = 0;
    for (i, &byte) in bytes.iter().enumerate().take(LENGTH_MAX_BYTES) {
        length |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            let length = usize::try_from(length).unwrap_or(usize::MAX);
            if length > limit_bytes {
                return Err(DecodeError::TooLarge { what, limit_bytes, got_bytes: length });
            }
            return Ok(Some((length, i + 1)));
        }
    }
    if bytes.len() >= LENGTH_MAX_BYTES {
        return Err(DecodeError::invalid("length prefix", "longer than five bytes"));
    }
    Ok(None)
}

/// A payload and the bytes after its frame.
pub type Split<'a> = (&'a [u8], &'a [u8]);

/// Splits one frame off the front of `bytes`: `Ok(None)` when more bytes are needed, else the payload and the rest.
///
/// # Errors
/// As [`decode_length`].
pub fn decode<'a>(
    what: &'static str,
    bytes: &'a [u8],
    limit_bytes: usize,
) -> Result<Option<Split<'a>>, DecodeError> {
    let Some((length, prefix)) = decode_length(what, bytes, limit_bytes)? else { return Ok(None) };
    Ok(bytes[prefix..].split_at_checked(length))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_round_trip_and_every_prefix_asks_for_more(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = Vec::new();
            encode(&payload, &mut bytes);
            prop_assert_eq!(decode("test", &bytes, 300).unwrap(), Some((&payload[..], &[][..])));
            for cut in 0..bytes.len() {
                prop_assert_eq!(decode("test", &bytes[..cut], 300).unwrap(), None);
            }
        }

        #[test]
        fn any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..16)) {
            let _ = decode("test", &bytes, 64);
        }
    }

    #[test]
    fn oversized_and_endless_lengths_are_refused() {
        assert!(matches!(
            decode("test", &[0xff, 0x7f], 100),
            Err(DecodeError::TooLarge { got_bytes: 16383, .. })
        ));
        assert!(decode("test", &[0xff; 10], 100).is_err());
    }
}
