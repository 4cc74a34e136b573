//! Counts how often a protobuf message repeats a field, before the message is decoded.
//!
//! An empty element takes two bytes on the wire and some fifty in memory, so that a message within its size limit could
//! still become a hundred times as large. Counting reads the bytes once and allocates nothing.

use crate::DecodeError;

/// How an element of a list is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// Each one is a field: messages, bytes and strings.
    Field,
    /// Numbers that may be packed into one field: `uint32`, `uint64`, `int32`, `bool`, enumerations.
    Varint,
}

/// Refuses a message that has more than `most` elements, summed over the whole message, at `path`: the numbers of the
/// fields that lead to the list, the list's own number last.
///
/// # Errors
/// When there are more, or the bytes are no protobuf message as far as they were read. Groups, which no message of the
/// stack has, are refused.
pub fn check(
    what: &'static str,
    message: &[u8],
    (path, element): (&[u32], Element),
    most: usize,
) -> Result<(), DecodeError> {
    let mut n = 0;
    count(what, message, path, element, most, &mut n)
}

fn count(
    what: &'static str,
    mut bytes: &[u8],
    path: &[u32],
    element: Element,
    most: usize,
    n: &mut usize,
) -> Result<(), DecodeError> {
    let malformed = |reason: &str| DecodeError::Message { what, reason: reason.to_owned() };
    let Some((&next, below)) = path.split_first() else { return Ok(()) };
    while !bytes.is_empty() {
        let key = varint(&mut bytes).ok_or_else(|| malformed("a field's key is cut off"))?;
        let found = key >> 3 == u64::from(next);
        let n_bytes = match key & 7 {
            0 => {
                varint(&mut bytes).ok_or_else(|| malformed("a number is cut off"))?;
                0
            }
            1 => 8,
            2 => {
                let length = varint(&mut bytes).ok_or_else(|| malformed("a length is cut off"))?;
                usize::try_from(length).unwrap_or(usize::MAX)
            }
            5 => 4,
            kind => return Err(malformed(&format!("a field of the wire type {kind}"))),
        };
        let (content, rest) =
            bytes.split_at_checked(n_bytes).ok_or_else(|| malformed("a field is cut off"))?;
        bytes = rest;
        if !found {
            continue;
        }
        if below.is_empty() {
            *n += match (element, key & 7) {
                (Element::Varint, 2) => content.iter().filter(|byte| **byte < 0x80).count(),
                _ => 1,
            };
            if *n > most {
                return Err(DecodeError::invalid(what, format!("more than {most} elements")));
            }
        } else if key & 7 == 2 {
            count(what, content, below, element, most, n)?;
        }
    }
    Ok(())
}

/// The number at the front of `bytes`, which are moved behind it; `None` when it does not end.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for (i, &byte) in bytes.iter().enumerate().take(10) {
        number |= u64::from(byte & 0x7f).checked_shl(7 * i as u32)?;
        if byte < 0x80 {
            *bytes = &bytes[i + 1..];
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::generated::bitswap::{Message, message::Wantlist, message::wantlist::Entry};
    use crate::generated::lattica::v1::{SpreadChunks, SpreadFrame, spread_frame::Body};

    const ENTRIES: (&[u32], Element) = (&[1, 1], Element::Field);
    const INDICES: (&[u32], Element) = (&[5, 1], Element::Varint);

    fn allows(bytes: &[u8], list: (&[u32], Element), most: usize) -> bool {
        check("test", bytes, list, most).is_ok()
    }

    proptest! {
        #[test]
        fn the_count_is_what_decoding_gives(n in 0usize..40, priority in any::<i32>(), full in any::<bool>(), pending in any::<i32>()) {
            let entries = vec![Entry { priority, ..Entry::default() }; n];
            let wantlist = Some(Wantlist { entries, full });
            let mut bytes = Message { wantlist, pending_bytes: pending, ..Message::default() }.encode_to_vec();
            prop_assert!(allows(&bytes, ENTRIES, n));
            prop_assert!(n == 0 || !allows(&bytes, ENTRIES, n - 1));
            // A field that is not repeated may come twice: both parts count.
            bytes.extend(bytes.clone());
            let n = Message::decode(&bytes[..]).unwrap().wantlist.map_or(0, |w| w.entries.len());
            prop_assert!(allows(&bytes, ENTRIES, n));
            prop_assert!(n == 0 || !allows(&bytes, ENTRIES, n - 1));
        }

        #[test]
        fn packed_numbers_are_counted_one_by_one(indices in proptest::collection::vec(any::<u32>(), 0..50)) {
            let n = indices.len();
            let bytes = SpreadFrame { body: Some(Body::Have(SpreadChunks { indices })) }.encode_to_vec();
            prop_assert!(allows(&bytes, INDICES, n));
            prop_assert!(n == 0 || !allows(&bytes, INDICES, n - 1));
        }

        #[test]
        fn what_decodes_is_counted_and_nothing_panics(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let counted = check("test", &bytes, ENTRIES, usize::MAX);
            let groups = |e: &DecodeError| e.to_string().contains("wire type 3");
            if Message::decode(&bytes[..]).is_ok() {
                prop_assert!(counted.as_ref().is_ok() || counted.as_ref().is_err_and(groups), "{counted:?}");
            }
        }
    }

    #[test]
    fn numbers_that_are_not_packed_count_as_well() {
        // Field 5 holding field 1 three times: 7, 8, and a packed pair.
        let bytes = [0x2a, 8, 0x08, 7, 0x08, 8, 0x0a, 2, 1, 2];
        assert!(allows(&bytes, INDICES, 4) && !allows(&bytes, INDICES, 3));
    }

    #[test]
    fn lengths_beyond_the_end_are_refused() {
        assert!(!allows(&[0x0a, 5, 1], ENTRIES, 9));
        assert!(!allows(&[0x0a, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1], ENTRIES, 9));
        assert!(!allows(&[0x80; 11], ENTRIES, 9));
        assert!(!allows(&[0x0b], ENTRIES, 9), "a group");
    }
}
