//! Unsigned LEB128 numbers, as multiformats and protobuf have them.

/// Appends a number.
pub(crate) fn write(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

/// Takes a number off the front; `None` when there is none, or one above 64 bits.
pub(crate) fn read(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for (i, &byte) in bytes.iter().enumerate().take(10) {
        if i == 9 && byte > 1 {
            return None;
        }
        number |= u64::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            *bytes = &bytes[i + 1..];
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_round_trip_as_prost_writes_them(number: u64, shift in 0u32..64, tail in proptest::collection::vec(any::<u8>(), 0..4)) {
            let number = number >> shift;
            let mut bytes = Vec::new();
            write(&mut bytes, number);
            let mut theirs = Vec::new();
            prost::encoding::encode_varint(number, &mut theirs);
            prop_assert_eq!(&bytes, &theirs);
            bytes.extend_from_slice(&tail);
            let mut rest = &bytes[..];
            prop_assert_eq!(read(&mut rest), Some(number));
            prop_assert_eq!(rest, &tail[..]);
        }
    }

    #[test]
    fn what_does_not_end_or_does_not_fit_is_no_number() {
        for bytes in
            [&[][..], &[0x80], &[0xff; 10], &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2]]
        {
            let mut rest = bytes;
            assert_eq!(read(&mut rest), None);
            assert_eq!(rest, bytes);
        }
    }
}
