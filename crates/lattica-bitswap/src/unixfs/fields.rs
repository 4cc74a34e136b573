//! Protobuf, as far as dag-pb and UnixFS need it. prost writes fields in the order of their numbers; a dag-pb node has its
//! links (field 2) before its data (field 1), and another order is another name.

use swarm_wire::DecodeError;

use crate::varint;

/// A field's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    /// Of four or eight bytes: nothing here reads one.
    Fixed,
}

/// Takes the next field off the front: its number and value. `None` at the end.
pub(super) fn next<'a>(bytes: &mut &'a [u8]) -> Result<Option<(u64, Value<'a>)>, DecodeError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let malformed = || DecodeError::invalid("protobuf field", "malformed");
    let tag = varint::read(bytes).ok_or_else(malformed)?;
    let value = match tag & 7 {
        0 => Value::Number(varint::read(bytes).ok_or_else(malformed)?),
        2 => {
            let length = varint::read(bytes).ok_or_else(malformed)?;
            Value::Bytes(take(bytes, length)?)
        }
        1 => take(bytes, 8).map(|_| Value::Fixed)?,
        5 => take(bytes, 4).map(|_| Value::Fixed)?,
        _ => return Err(malformed()),
    };
    Ok(Some((tag >> 3, value)))
}

fn take<'a>(bytes: &mut &'a [u8], length: u64) -> Result<&'a [u8], DecodeError> {
    let (taken, rest) =
        usize::try_from(length).ok().and_then(|n| bytes.split_at_checked(n)).ok_or_else(|| {
            DecodeError::Truncated {
                what: "protobuf field",
                needed_bytes: usize::try_from(length).unwrap_or(usize::MAX),
                got_bytes: bytes.len(),
            }
        })?;
    *bytes = rest;
    Ok(taken)
}

/// Appends a number.
pub(super) fn put_number(out: &mut Vec<u8>, field: u64, number: u64) {
    varint::write(out, field << 3);
    varint::write(out, number);
}

/// Appends bytes, also when there are none.
pub(super) fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    varint::write(out, field << 3 | 2);
    varint::write(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}
