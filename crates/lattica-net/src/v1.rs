//! What nodes of the original Lattica (wheel 1.0.21) say to each other: calls on `/rpc/req-resp/1.0.0`, one message each way
//! on a stream of its own, in bincode 2's standard encoding. Feature `v1-compat`. Pure: bytes to messages and back.
//!
//! Numbers are one byte up to 250, else 251, 252 or 253 and two, four or eight little-endian bytes; text and bytes have their
//! length in front; a variant is a number, an option a byte.

use bytes::Bytes;
use swarm_wire::DecodeError;
use swarm_wire::limits::{NAME_MAX_BYTES, RPC_BODY_MAX_BYTES};

/// The protocol of calls.
pub const RPC_PROTOCOL: &str = "/rpc/req-resp/1.0.0";
/// Longest message that is read: a body, its names and what surrounds them.
pub const MESSAGE_MAX_BYTES: usize = RPC_BODY_MAX_BYTES + 16 * 1024;
/// Longest text of an error that is kept.
const ERROR_MAX_BYTES: usize = 8 * 1024;

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A call.
    Request {
        /// Chosen by the caller.
        id: String,
        /// `Service.method`.
        method: String,
        /// The argument. The wheel's are pickled or protobuf: here they are bytes.
        data: Bytes,
    },
    /// Its answer.
    Response {
        /// The call's.
        id: String,
        /// The result.
        data: Bytes,
    },
    /// Its failure.
    Error {
        /// The call's.
        id: String,
        /// What went wrong.
        error: String,
    },
}

impl Message {
    /// Reads a message.
    ///
    /// # Errors
    /// When it is malformed, too large, or its data is compressed.
    pub fn decode(bytes: &Bytes) -> Result<Self, DecodeError> {
        if bytes.len() > MESSAGE_MAX_BYTES {
            let got_bytes = bytes.len();
            return Err(DecodeError::TooLarge {
                what: "v1 message",
                limit_bytes: MESSAGE_MAX_BYTES,
                got_bytes,
            });
        }
        let mut reader = Reader { bytes, at: 0 };
        let variant = reader.number()?;
        let id = reader.text("v1 call id", NAME_MAX_BYTES)?;
        let message = match variant {
            0 => {
                let method = reader.text("v1 method", NAME_MAX_BYTES)?;
                Self::Request { id, method, data: reader.data()? }
            }
            1 => Self::Response { id, data: reader.data()? },
            2 => Self::Error { id, error: reader.text("v1 error", ERROR_MAX_BYTES)? },
            other => return Err(DecodeError::invalid("v1 message", other)),
        };
        if reader.at != bytes.len() {
            return Err(DecodeError::invalid("v1 message", "bytes behind its end"));
        }
        Ok(message)
    }

    /// The bytes of this message.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Request { id, method, data } => {
                number(&mut out, 0);
                bytes(&mut out, id.as_bytes());
                bytes(&mut out, method.as_bytes());
                bytes(&mut out, data);
                out.push(0);
            }
            Self::Response { id, data } => {
                number(&mut out, 1);
                bytes(&mut out, id.as_bytes());
                bytes(&mut out, data);
                out.push(0);
            }
            Self::Error { id, error } => {
                number(&mut out, 2);
                bytes(&mut out, id.as_bytes());
                bytes(&mut out, error.as_bytes());
            }
        }
        out
    }
}

struct Reader<'a> {
    bytes: &'a Bytes,
    at: usize,
}

impl Reader<'_> {
    fn take(&mut self, n_bytes: usize) -> Result<Bytes, DecodeError> {
        let left = self.bytes.len() - self.at;
        if n_bytes > left {
            return Err(DecodeError::Truncated {
                what: "v1 message",
                needed_bytes: n_bytes,
                got_bytes: left,
            });
        }
        self.at += n_bytes;
        Ok(self.bytes.slice(self.at - n_bytes..self.at))
    }

    fn number(&mut self) -> Result<u64, DecodeError> {
        let first = self.take(1)?[0];
        let width = match first {
            251 => 2,
            252 => 4,
            253 => 8,
            small if small < 251 => return Ok(u64::from(small)),
            other => return Err(DecodeError::invalid("v1 number", other)),
        };
        Ok(self.take(width)?.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)))
    }

    fn field(&mut self, what: &'static str, limit_bytes: usize) -> Result<Bytes, DecodeError> {
        let length = usize::try_from(self.number()?).unwrap_or(usize::MAX);
        if length > limit_bytes {
            return Err(DecodeError::TooLarge { what, limit_bytes, got_bytes: length });
        }
        self.take(length)
    }

    fn text(&mut self, what: &'static str, limit_bytes: usize) -> Result<String, DecodeError> {
        let bytes = self.field(what, limit_bytes)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| DecodeError::invalid(what, "no UTF-8"))
    }

    /// A body, and whether it is compressed: `None`, or an algorithm, of which the first one is none.
    fn data(&mut self) -> Result<Bytes, DecodeError> {
        let data = self.field("v1 body", RPC_BODY_MAX_BYTES)?;
        let algorithm = match self.number()? {
            0 => 0,
            1 => self.number()?,
            other => return Err(DecodeError::invalid("v1 compression", other)),
        };
        if algorithm != 0 {
            return Err(DecodeError::invalid("v1 compression, which is not read here:", algorithm));
        }
        Ok(data)
    }
}

fn number(out: &mut Vec<u8>, number: u64) {
    match number {
        0..=250 => out.push(number as u8),
        251..=0xffff => {
            out.push(251);
            out.extend_from_slice(&(number as u16).to_le_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            out.push(252);
            out.extend_from_slice(&(number as u32).to_le_bytes());
        }
        _ => {
            out.push(253);
            out.extend_from_slice(&number.to_le_bytes());
        }
    }
}

fn bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    number(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_message() -> impl Strategy<Value = Message> {
        let data = proptest::collection::vec(any::<u8>(), 0..70_000).prop_map(Bytes::from);
        ("[a-z]{0,20}", "[a-zA-Z.]{0,256}", data, 0..3).prop_map(|(id, method, data, kind)| match kind {
            0 => Message::Request { id, method, data },
            1 => Message::Response { id, data },
            _ => Message::Error { id, error: method },
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn messages_round_trip_and_shorter_ones_are_refused(message in any_message(), cut in 0.0f64..1.0) {
            let bytes = Bytes::from(message.encode());
            prop_assert_eq!(Message::decode(&bytes).unwrap(), message);
            let short = bytes.slice(..(bytes.len() as f64 * cut) as usize);
            prop_assert!(Message::decode(&short).is_err());
        }

        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Message::decode(&Bytes::from(bytes));
        }
    }

    #[test]
    fn what_bincode_writes_is_pinned() {
        // bincode 2.0.1, config::standard(), of RpcMessage::Request { id: "7", method: "S.m", data: 300 x 1, compression: None }.
        let mut expected = vec![0, 1, b'7', 3, b'S', b'.', b'm', 251, 44, 1];
        expected.extend([1; 300]);
        expected.push(0);
        let request =
            Message::Request { id: "7".into(), method: "S.m".into(), data: Bytes::from(vec![1; 300]) };
        assert_eq!(request.encode(), expected);
        // The same with Some(CompressionAlgorithm::None), then with Some(Zstd).
        expected.pop();
        let with = |tail: &[u8]| Message::decode(&Bytes::from([&expected[..], tail].concat()));
        assert_eq!(with(&[1, 0]).unwrap(), request);
        assert!(with(&[1, 2]).is_err());
        assert!(with(&[2]).is_err());
        assert!(with(&[0, 0]).is_err(), "something follows");
        for huge in [&[0u8, 253, 255, 255, 255, 255, 255, 255, 255, 255][..], &[9, 0], &[0, 254]] {
            assert!(Message::decode(&Bytes::copy_from_slice(huge)).is_err());
        }
    }
}
