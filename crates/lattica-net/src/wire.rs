//! Bytes from a peer become calls, answers and probes here and nowhere else; past this file every field is in range.
//!
//! A frame is: varint length, a prost header of that length, then the raw body that the header announces. The body is
//! never inside the protobuf message, so it is neither copied nor scanned when it is decoded.

use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use swarm_wire::generated::dcutr::{HolePunch, hole_punch::Type};
use swarm_wire::generated::lattica::v1::{
    self as pb, LinkEcho, LinkProbe, RpcCancel, RpcFrame, RpcHello, RpcRequest, RpcResponse, RpcStatus,
    guess_frame::Body, rpc_frame::Kind,
};
use swarm_wire::limits::{NAME_MAX_BYTES, RPC_HEADER_MAX_BYTES};
use swarm_wire::{DecodeError, frame};

use crate::punch::guess::{GuessMessage, GuessOffer};
use crate::status::{Status, code_from_wire};

/// A link probe or echo: two numbers and room for what later versions add.
pub const LINK_FRAME_MAX_BYTES: usize = 256;
/// A message about a hole to be punched, as libp2p bounds it.
pub const PUNCH_MAX_BYTES: usize = 4096;
/// A message about ports to be guessed: a nonce, an address, and room for what later versions add.
pub const GUESS_MAX_BYTES: usize = 64;
/// No call waits longer than this, whatever its header says.
pub const DEADLINE_MAX: Duration = Duration::from_secs(3600);
/// Longer messages of a [`Status`] are cut: the header has to fit its limit.
const STATUS_MESSAGE_MAX_BYTES: usize = 8 * 1024;

/// The header of a frame on an RPC stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Header {
    /// A call; `body_bytes` raw bytes follow.
    Request {
        /// Chosen by the caller, unique for its incarnation at this peer.
        call_id: u64,
        /// What is called.
        method: String,
        /// How long the caller will still wait.
        deadline: Duration,
        /// Length of the body.
        body_bytes: usize,
        /// Calls with smaller numbers are over for the caller.
        done_below: u64,
        /// How often the call was sent before.
        attempt: u32,
    },
    /// The answer to a call; `body_bytes` raw bytes follow.
    Answer {
        /// The call's number.
        call_id: u64,
        /// `None` when the call was done.
        refusal: Option<Status>,
        /// Length of the body.
        body_bytes: usize,
    },
    /// The caller does not want the answer any more.
    Cancel {
        /// The call's number.
        call_id: u64,
    },
    /// Who speaks on the stream, and what it grants.
    Hello(Hello),
}

/// The first frame of each side on an RPC stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// Random for each start of a node, never 0.
    pub incarnation: u64,
    /// Calls that the other side may have under way; 0 grants nothing new.
    pub calls: usize,
    /// Bytes of their bodies.
    pub body_bytes: usize,
}

impl Header {
    /// Length of the body that follows.
    pub fn body_bytes(&self) -> usize {
        match self {
            Self::Request { body_bytes, .. } | Self::Answer { body_bytes, .. } => *body_bytes,
            Self::Cancel { .. } | Self::Hello(_) => 0,
        }
    }

    /// The bytes of the header with its length in front.
    pub fn encode(self) -> Vec<u8> {
        let kind = match self {
            Self::Request { call_id, method, deadline, body_bytes, done_below, attempt } => {
                Kind::Request(RpcRequest {
                    call_id,
                    method,
                    deadline_ms: u32::try_from(deadline.min(DEADLINE_MAX).as_millis()).expect("an hour fits"),
                    body_bytes: wire_length(body_bytes),
                    done_below,
                    attempt,
                })
            }
            Self::Answer { call_id, refusal, body_bytes } => Kind::Response(RpcResponse {
                call_id,
                status: refusal.as_ref().map_or(RpcStatus::Ok, |s| s.code.into()) as i32,
                message: refusal.as_ref().map_or_else(String::new, |s| cut(&s.message).to_owned()),
                body_bytes: wire_length(body_bytes),
            }),
            Self::Cancel { call_id } => Kind::Cancel(RpcCancel { call_id }),
            Self::Hello(hello) => Kind::Hello(RpcHello {
                incarnation: hello.incarnation,
                calls: u32::try_from(hello.calls).unwrap_or(u32::MAX),
                body_bytes: hello.body_bytes as u64,
            }),
        };
        frame::encode_message(&RpcFrame { kind: Some(kind) }, 0)
    }

    /// Reads a header from the front of `bytes`: `Ok(None)` when more bytes are needed, else the header and how many
    /// bytes it took. Nothing is allocated for a body here.
    ///
    /// # Errors
    /// When the header is too long, not one of ours, or announces a body of more than `body_limit_bytes`.
    pub fn decode(bytes: &[u8], body_limit_bytes: usize) -> Result<Option<(Self, usize)>, DecodeError> {
        let Some((payload, rest)) = frame::decode("rpc header", bytes, RPC_HEADER_MAX_BYTES)? else {
            return Ok(None);
        };
        let message =
            RpcFrame::decode(payload).map_err(|error| DecodeError::message("rpc header", &error))?;
        let header = Self::try_from(message)?;
        if header.body_bytes() > body_limit_bytes {
            return Err(DecodeError::TooLarge {
                what: "rpc body",
                limit_bytes: body_limit_bytes,
                got_bytes: header.body_bytes(),
            });
        }
        Ok(Some((header, bytes.len() - rest.len())))
    }
}

impl TryFrom<RpcFrame> for Header {
    type Error = DecodeError;

    fn try_from(message: RpcFrame) -> Result<Self, DecodeError> {
        Ok(match message.kind {
            Some(Kind::Request(request)) => {
                if !method_is_valid(&request.method) {
                    return Err(DecodeError::invalid(
                        "rpc method",
                        format!("{} bytes", request.method.len()),
                    ));
                }
                Self::Request {
                    call_id: request.call_id,
                    method: request.method,
                    deadline: Duration::from_millis(request.deadline_ms.into()).min(DEADLINE_MAX),
                    body_bytes: request.body_bytes as usize,
                    done_below: request.done_below,
                    attempt: request.attempt,
                }
            }
            Some(Kind::Response(response)) => Self::Answer {
                call_id: response.call_id,
                refusal: code_from_wire(response.status)
                    .map(|code| Status { code, message: response.message }),
                body_bytes: response.body_bytes as usize,
            },
            Some(Kind::Cancel(cancel)) => Self::Cancel { call_id: cancel.call_id },
            Some(Kind::Hello(hello)) => {
                if hello.incarnation == 0 {
                    return Err(DecodeError::invalid("rpc hello", "no incarnation"));
                }
                Self::Hello(Hello {
                    incarnation: hello.incarnation,
                    calls: hello.calls as usize,
                    body_bytes: usize::try_from(hello.body_bytes).unwrap_or(usize::MAX),
                })
            }
            None => return Err(DecodeError::invalid("rpc header", "no kind")),
        })
    }
}

/// Whether a method name can be sent: 1 to 256 bytes.
pub fn method_is_valid(method: &str) -> bool {
    (1..=NAME_MAX_BYTES).contains(&method.len())
}

/// A link probe with its length in front.
pub fn encode_probe(sequence: u64) -> Vec<u8> {
    frame::encode_message(&LinkProbe { sequence }, 0)
}

/// Reads a probe from the front of `bytes`: its number and how many bytes it took.
///
/// # Errors
/// When the frame is too long or not a probe.
pub fn decode_probe(bytes: &[u8]) -> Result<Option<(u64, usize)>, DecodeError> {
    decode_message("link probe", bytes, LINK_FRAME_MAX_BYTES)
        .map(|found| found.map(|(m, n): (LinkProbe, usize)| (m.sequence, n)))
}

/// The answer to a probe with its length in front.
pub fn encode_echo(sequence: u64, received_bytes_per_s: Option<f64>) -> Vec<u8> {
    let received_bytes_per_s = received_bytes_per_s.unwrap_or(0.0);
    frame::encode_message(&LinkEcho { sequence, received_bytes_per_s }, 0)
}

/// Reads an echo from the front of `bytes`: the probe's number, the peer's receive rate (0 when it has none), and how
/// many bytes it took.
///
/// # Errors
/// When the frame is too long or not an echo.
pub fn decode_echo(bytes: &[u8]) -> Result<Option<(u64, f64, usize)>, DecodeError> {
    decode_message("link echo", bytes, LINK_FRAME_MAX_BYTES)
        .map(|found| found.map(|(m, n): (LinkEcho, usize)| (m.sequence, m.received_bytes_per_s, n)))
}

/// What two peers tell each other before they dial at the same moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PunchMessage {
    /// Where the sender is seen: multiaddresses in their binary form.
    Connect(Vec<Bytes>),
    /// Now.
    Sync,
}

/// A message about a hole to be punched with its length in front.
pub fn encode_punch(message: PunchMessage) -> Vec<u8> {
    let (kind, obs_addrs) = match message {
        PunchMessage::Connect(addresses) => (Type::Connect, addresses),
        PunchMessage::Sync => (Type::Sync, Vec::new()),
    };
    frame::encode_message(&HolePunch { r#type: kind as i32, obs_addrs }, 0)
}

/// Reads such a message from the front of `bytes`, and how many bytes it took.
///
/// # Errors
/// When it is too long or no such message.
pub fn decode_punch(bytes: &[u8]) -> Result<Option<(PunchMessage, usize)>, DecodeError> {
    let Some((message, n_bytes)) = decode_message::<HolePunch>("hole punch", bytes, PUNCH_MAX_BYTES)? else {
        return Ok(None);
    };
    let message = match Type::try_from(message.r#type) {
        Ok(Type::Connect) => PunchMessage::Connect(message.obs_addrs),
        Ok(Type::Sync) => PunchMessage::Sync,
        _ => return Err(DecodeError::invalid("hole punch", format!("type {}", message.r#type))),
    };
    Ok(Some((message, n_bytes)))
}

/// A message about ports to be guessed with its length in front.
pub fn encode_guess(message: GuessMessage) -> Vec<u8> {
    let body = match message {
        GuessMessage::Offer(offer) => Body::Offer(pb::GuessOffer {
            nonce: Bytes::copy_from_slice(&offer.nonce),
            ip4: offer.ip.to_bits(),
            port: offer.port.unwrap_or(0).into(),
        }),
        GuessMessage::Open => Body::Open(true),
        GuessMessage::No => Body::No(true),
    };
    frame::encode_message(&pb::GuessFrame { body: Some(body) }, 0)
}

/// Reads such a message from the front of `bytes`, and how many bytes it took.
///
/// # Errors
/// When it is too long, out of range, or no such message.
pub fn decode_guess(bytes: &[u8]) -> Result<Option<(GuessMessage, usize)>, DecodeError> {
    let what = "guess";
    let Some((frame, n_bytes)) = decode_message::<pb::GuessFrame>(what, bytes, GUESS_MAX_BYTES)? else {
        return Ok(None);
    };
    let message = match frame.body.ok_or_else(|| DecodeError::invalid(what, "without a body"))? {
        Body::Offer(offer) => GuessMessage::Offer(GuessOffer {
            nonce: offer.nonce[..].try_into().map_err(|_| {
                DecodeError::invalid("nonce of a guess", format!("{} bytes", offer.nonce.len()))
            })?,
            ip: Ipv4Addr::from_bits(offer.ip4),
            port: match u16::try_from(offer.port) {
                Ok(port) => Some(port).filter(|port| *port != 0),
                Err(_) => return Err(DecodeError::invalid("port of a guess", offer.port)),
            },
        }),
        Body::Open(_) => GuessMessage::Open,
        Body::No(_) => GuessMessage::No,
    };
    Ok(Some((message, n_bytes)))
}

fn decode_message<M: Message + Default>(
    what: &'static str,
    bytes: &[u8],
    limit_bytes: usize,
) -> Result<Option<(M, usize)>, DecodeError> {
    let Some((payload, rest)) = frame::decode(what, bytes, limit_bytes)? else { return Ok(None) };
    let message = M::decode(payload).map_err(|error| DecodeError::message(what, &error))?;
    Ok(Some((message, bytes.len() - rest.len())))
}

fn wire_length(n_bytes: usize) -> u32 {
    u32::try_from(n_bytes).expect("bodies are checked against their limit before they are sent")
}

/// The longest start of `message` that fits and does not end inside a character.
fn cut(message: &str) -> &str {
    let mut end = message.len().min(STATUS_MESSAGE_MAX_BYTES);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    &message[..end]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::status::StatusCode;

    const LIMIT: usize = 1 << 20;

    fn headers() -> impl Strategy<Value = Header> {
        prop_oneof![
            (any::<u64>(), "[a-z/.]{1,40}", 0u64..3_600_000, 0usize..=LIMIT, any::<u64>(), any::<u32>())
                .prop_map(|(call_id, method, ms, body_bytes, done_below, attempt)| {
                    let deadline = Duration::from_millis(ms);
                    Header::Request { call_id, method, deadline, body_bytes, done_below, attempt }
                }),
            (1u64.., any::<u32>(), any::<u64>()).prop_map(|(incarnation, calls, body_bytes)| {
                Header::Hello(Hello { incarnation, calls: calls as usize, body_bytes: body_bytes as usize })
            }),
            (any::<u64>(), proptest::option::of(".{0,60}"), 0usize..=LIMIT).prop_map(
                |(call_id, text, body_bytes)| {
                    let refusal = text.map(|t| Status::new(StatusCode::Unavailable, t));
                    Header::Answer { call_id, refusal, body_bytes }
                }
            ),
            any::<u64>().prop_map(|call_id| Header::Cancel { call_id }),
        ]
    }

    proptest! {
        #[test]
        fn headers_round_trip_and_every_prefix_asks_for_more(header in headers(), tail in proptest::collection::vec(any::<u8>(), 0..9)) {
            let mut bytes = header.clone().encode();
            let length = bytes.len();
            for cut in 0..length {
                prop_assert_eq!(Header::decode(&bytes[..cut], LIMIT).unwrap(), None);
            }
            bytes.extend(tail);
            prop_assert_eq!(Header::decode(&bytes, LIMIT).unwrap(), Some((header, length)));
        }

        #[test]
        fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Header::decode(&bytes, LIMIT);
            let _ = decode_probe(&bytes);
            let _ = decode_echo(&bytes);
            let _ = decode_punch(&bytes);
            let _ = decode_guess(&bytes);
        }

        #[test]
        fn punch_messages_round_trip(addresses in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..60), 0..9)) {
            for message in [PunchMessage::Connect(addresses.into_iter().map(Bytes::from).collect()), PunchMessage::Sync] {
                let bytes = encode_punch(message.clone());
                prop_assert_eq!(decode_punch(&bytes).unwrap(), Some((message, bytes.len())));
            }
        }

        #[test]
        fn guesses_round_trip(nonce in any::<[u8; 16]>(), ip in any::<u32>(), port in any::<u16>()) {
            let port = Some(port).filter(|port| *port != 0);
            let offer = GuessOffer { nonce, ip: Ipv4Addr::from_bits(ip), port };
            for message in [GuessMessage::Offer(offer), GuessMessage::Open, GuessMessage::No] {
                let bytes = encode_guess(message);
                prop_assert_eq!(decode_guess(&bytes).unwrap(), Some((message, bytes.len())));
            }
        }

        #[test]
        fn probes_and_echoes_round_trip(sequence in any::<u64>(), rate in proptest::option::of(1.0f64..1e12)) {
            let probe = encode_probe(sequence);
            prop_assert_eq!(decode_probe(&probe).unwrap(), Some((sequence, probe.len())));
            let echo = encode_echo(sequence, rate);
            prop_assert_eq!(decode_echo(&echo).unwrap(), Some((sequence, rate.unwrap_or(0.0), echo.len())));
        }
    }

    #[test]
    fn request_bytes_are_pinned() {
        let header = Header::Request {
            call_id: 7,
            method: "echo".to_owned(),
            deadline: Duration::from_millis(1000),
            body_bytes: 300,
            done_below: 0,
            attempt: 0,
        };
        let expected =
            [16, 0x0a, 14, 0x08, 7, 0x12, 4, b'e', b'c', b'h', b'o', 0x18, 0xe8, 0x07, 0x20, 0xac, 0x02];
        assert_eq!(header.encode(), expected);
    }

    #[test]
    fn punch_messages_are_those_of_libp2p() {
        // Type is field 1 (CONNECT 100, SYNC 300), the addresses are field 2.
        let connect = PunchMessage::Connect(vec![Bytes::from_static(&[4, 9, 9, 9, 9])]);
        assert_eq!(encode_punch(connect), [9, 0x08, 100, 0x12, 5, 4, 9, 9, 9, 9]);
        assert_eq!(encode_punch(PunchMessage::Sync), [3, 0x08, 0xac, 0x02]);
        assert!(decode_punch(&[2, 0x08, 7]).is_err(), "there is no type 7");
        assert!(matches!(decode_punch(&[0x80, 0x40]), Err(DecodeError::TooLarge { .. })));
    }

    #[test]
    fn guesses_are_pinned_and_bounded() {
        let offer = GuessOffer { nonce: [7; 16], ip: Ipv4Addr::new(1, 2, 3, 4), port: Some(300) };
        let expected =
            [&[0x1c, 0x0a, 26, 0x0a, 16][..], &[7; 16], &[0x15, 4, 3, 2, 1, 0x18, 0xac, 0x02]].concat();
        assert_eq!(encode_guess(GuessMessage::Offer(offer)), expected);
        let mut short = expected.clone();
        (short[0], short[2], short[4]) = (0x1b, 25, 15);
        short.remove(5);
        assert!(decode_guess(&short).is_err(), "a nonce of 15 bytes");
        let mut port = expected;
        *port.last_mut().unwrap() = 0x7f;
        assert!(decode_guess(&port).is_ok());
        let wide =
            [&[0x1d, 0x0a, 27, 0x0a, 16][..], &[7; 16], &[0x15, 4, 3, 2, 1, 0x18, 0x80, 0x80, 0x04]].concat();
        assert!(decode_guess(&wide).is_err(), "port 65536");
        assert!(matches!(decode_guess(&[0x7f]), Err(DecodeError::TooLarge { .. })));
    }

    #[test]
    fn oversized_headers_and_bodies_are_refused_before_they_arrive() {
        assert!(matches!(
            Header::decode(&[0xff, 0xff, 0xff, 0x7f], LIMIT),
            Err(DecodeError::TooLarge { what: "rpc header", .. })
        ));
        let header = Header::Answer { call_id: 1, refusal: None, body_bytes: LIMIT + 1 };
        assert!(matches!(
            Header::decode(&header.encode(), LIMIT),
            Err(DecodeError::TooLarge { what: "rpc body", .. })
        ));
    }

    #[test]
    fn endless_length_prefixes_and_empty_frames_are_refused() {
        assert!(Header::decode(&[0x80; 5], LIMIT).is_err());
        assert!(Header::decode(&[0], LIMIT).is_err());
    }

    #[test]
    fn long_refusals_are_cut_at_a_character_and_still_fit() {
        let status = Status::internal("é".repeat(10_000));
        let bytes = Header::Answer { call_id: 1, refusal: Some(status), body_bytes: 0 }.encode();
        let (header, _) = Header::decode(&bytes, LIMIT).unwrap().unwrap();
        let Header::Answer { refusal: Some(status), .. } = header else { panic!("{header:?}") };
        assert_eq!(status.message.len(), STATUS_MESSAGE_MAX_BYTES);
    }
}
