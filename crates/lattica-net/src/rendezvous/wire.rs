//! Rendezvous as bytes (`proto/rendezvous/message.proto`): messages become checked types here and nowhere else,
//! their records in `news::record`.

use bytes::Bytes;
use prost::Message as _;
use swarm_wire::DecodeError;
use swarm_wire::generated::rendezvous as pb;
use swarm_wire::generated::rendezvous::message::{MessageType, ResponseStatus};
use swarm_wire::repeated::{self, Element};

use super::{ANSWER_MAX, Found, Refusal, Registration, TTL_DEFAULT_S};

/// Longest question: a record, a name, and what goes with them.
pub const QUESTION_MAX_BYTES: usize = 16 * 1024;
/// Longest answer that is read: of records that are longer than ours, as many.
pub const ANSWER_FRAME_MAX_BYTES: usize = 1024 * 1024;

const WHAT: &str = "rendezvous message";

/// What is asked of a rendezvous point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// Write me down.
    Register {
        /// Under this name.
        namespace: String,
        /// Where I can be reached, signed.
        record: Bytes,
        /// For so long, in seconds.
        ttl_s: Option<u64>,
    },
    /// Strike me out. There is no answer.
    Unregister {
        /// Under this name.
        namespace: String,
    },
    /// Who is there?
    Discover {
        /// Under this name; `None` under any.
        namespace: Option<String>,
        /// So many at most.
        limit: Option<u64>,
        /// Since the answer that it came with.
        cookie: Option<Bytes>,
    },
}

/// What a rendezvous point answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Written down, for so many seconds.
    Registered(Result<u64, Refusal>),
    /// Who is there.
    Discovered(Result<Found, Refusal>),
}

impl Question {
    /// The message, without its length.
    pub fn encode(&self) -> Bytes {
        let message = match self {
            Self::Register { namespace, record, ttl_s } => pb::Message {
                r#type: Some(MessageType::Register.into()),
                register: Some(pb::message::Register {
                    ns: Some(namespace.clone()),
                    signed_peer_record: Some(record.clone()),
                    ttl: *ttl_s,
                }),
                ..pb::Message::default()
            },
            Self::Unregister { namespace } => pb::Message {
                r#type: Some(MessageType::Unregister.into()),
                unregister: Some(pb::message::Unregister { ns: Some(namespace.clone()) }),
                ..pb::Message::default()
            },
            Self::Discover { namespace, limit, cookie } => pb::Message {
                r#type: Some(MessageType::Discover.into()),
                discover: Some(pb::message::Discover {
                    ns: namespace.clone(),
                    limit: *limit,
                    cookie: cookie.clone(),
                }),
                ..pb::Message::default()
            },
        };
        message.encode_to_vec().into()
    }

    /// # Errors
    /// When it is malformed or no question.
    pub fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        let (kind, message) = message(bytes)?;
        match kind {
            MessageType::Register => {
                let register = message.register.ok_or_else(missing)?;
                Ok(Self::Register {
                    namespace: register.ns.unwrap_or_default(),
                    record: register.signed_peer_record.unwrap_or_default(),
                    ttl_s: register.ttl,
                })
            }
            MessageType::Unregister => {
                let unregister = message.unregister.ok_or_else(missing)?;
                Ok(Self::Unregister { namespace: unregister.ns.unwrap_or_default() })
            }
            MessageType::Discover => {
                let discover = message.discover.ok_or_else(missing)?;
                Ok(Self::Discover { namespace: discover.ns, limit: discover.limit, cookie: discover.cookie })
            }
            _ => Err(DecodeError::invalid(WHAT, "it is no question")),
        }
    }
}

impl Answer {
    /// The message, without its length.
    pub fn encode(&self) -> Bytes {
        let message = match self {
            Self::Registered(result) => pb::Message {
                r#type: Some(MessageType::RegisterResponse.into()),
                register_response: Some(pb::message::RegisterResponse {
                    status: Some(status(result.as_ref().err())),
                    status_text: result.as_ref().err().map(ToString::to_string),
                    ttl: result.as_ref().ok().copied(),
                }),
                ..pb::Message::default()
            },
            Self::Discovered(result) => {
                let found = result.as_ref().ok();
                let registration = |found: &Registration| pb::message::Register {
                    ns: Some(found.namespace.clone()),
                    signed_peer_record: Some(found.record.clone()),
                    ttl: Some(found.ttl_s),
                };
                pb::Message {
                    r#type: Some(MessageType::DiscoverResponse.into()),
                    discover_response: Some(pb::message::DiscoverResponse {
                        registrations: found
                            .into_iter()
                            .flat_map(|f| &f.registrations)
                            .map(registration)
                            .collect(),
                        cookie: found.map(|found| found.cookie.clone()),
                        status: Some(status(result.as_ref().err())),
                        status_text: result.as_ref().err().map(ToString::to_string),
                    }),
                    ..pb::Message::default()
                }
            }
        };
        message.encode_to_vec().into()
    }

    /// # Errors
    /// When it is malformed, no answer, or has more registrations than are asked for.
    pub fn decode(bytes: Bytes) -> Result<Self, DecodeError> {
        let (kind, message) = message(bytes)?;
        match kind {
            MessageType::RegisterResponse => {
                let answer = message.register_response.ok_or_else(missing)?;
                let ttl_s = answer.ttl.unwrap_or(TTL_DEFAULT_S);
                Ok(Self::Registered(read_status(answer.status).map(|()| ttl_s)))
            }
            MessageType::DiscoverResponse => {
                let answer = message.discover_response.ok_or_else(missing)?;
                if let Err(refusal) = read_status(answer.status) {
                    return Ok(Self::Discovered(Err(refusal)));
                }
                let registration = |found: pb::message::Register| Registration {
                    namespace: found.ns.unwrap_or_default(),
                    record: found.signed_peer_record.unwrap_or_default(),
                    ttl_s: found.ttl.unwrap_or(TTL_DEFAULT_S),
                };
                Ok(Self::Discovered(Ok(Found {
                    registrations: answer.registrations.into_iter().map(registration).collect(),
                    cookie: answer.cookie.unwrap_or_default(),
                })))
            }
            _ => Err(DecodeError::invalid(WHAT, "it is no answer")),
        }
    }
}

/// What kind of message it is, and its parts. One without a kind, or with a kind that nobody knows, is none.
fn message(bytes: Bytes) -> Result<(MessageType, pb::Message), DecodeError> {
    repeated::check("registrations", &bytes, (&[6, 1], Element::Field), ANSWER_MAX)?;
    let message = pb::Message::decode(bytes).map_err(|error| DecodeError::message(WHAT, &error))?;
    let kind = message.r#type.and_then(|kind| MessageType::try_from(kind).ok());
    Ok((kind.ok_or_else(|| DecodeError::invalid(WHAT, "of no known kind"))?, message))
}

fn missing() -> DecodeError {
    DecodeError::invalid(WHAT, "a part is missing")
}

fn status(refusal: Option<&Refusal>) -> i32 {
    refusal
        .map_or(ResponseStatus::Ok, |refusal| match refusal {
            Refusal::InvalidNamespace => ResponseStatus::EInvalidNamespace,
            Refusal::InvalidRecord => ResponseStatus::EInvalidSignedPeerRecord,
            Refusal::InvalidTtl => ResponseStatus::EInvalidTtl,
            Refusal::InvalidCookie => ResponseStatus::EInvalidCookie,
            Refusal::NotAuthorized => ResponseStatus::ENotAuthorized,
            Refusal::Internal => ResponseStatus::EInternalError,
            Refusal::Unavailable => ResponseStatus::EUnavailable,
        })
        .into()
}

/// Statuses that nobody knows are refusals too.
fn read_status(status: Option<i32>) -> Result<(), Refusal> {
    Err(match ResponseStatus::try_from(status.unwrap_or_default()) {
        Ok(ResponseStatus::Ok) => return Ok(()),
        Ok(ResponseStatus::EInvalidNamespace) => Refusal::InvalidNamespace,
        Ok(ResponseStatus::EInvalidSignedPeerRecord) => Refusal::InvalidRecord,
        Ok(ResponseStatus::EInvalidTtl) => Refusal::InvalidTtl,
        Ok(ResponseStatus::EInvalidCookie) => Refusal::InvalidCookie,
        Ok(ResponseStatus::ENotAuthorized) => Refusal::NotAuthorized,
        Ok(ResponseStatus::EUnavailable) => Refusal::Unavailable,
        Ok(ResponseStatus::EInternalError) | Err(_) => Refusal::Internal,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_back_as_they_were() {
        let (namespace, record) = ("a".to_owned(), Bytes::from_static(b"record"));
        for question in [
            Question::Register { namespace: namespace.clone(), record: record.clone(), ttl_s: Some(9) },
            Question::Unregister { namespace: namespace.clone() },
            Question::Discover { namespace: None, limit: None, cookie: None },
            Question::Discover {
                namespace: Some(namespace.clone()),
                limit: Some(1),
                cookie: Some(record.clone()),
            },
        ] {
            assert_eq!(Question::decode(question.encode()), Ok(question.clone()));
            assert!(Answer::decode(question.encode()).is_err());
        }
        let registration = Registration { namespace, record: record.clone(), ttl_s: 7 };
        let found = Found { registrations: vec![registration; 3], cookie: record };
        for answer in [
            Answer::Registered(Ok(1)),
            Answer::Registered(Err(Refusal::NotAuthorized)),
            Answer::Discovered(Ok(found)),
            Answer::Discovered(Err(Refusal::InvalidCookie)),
        ] {
            assert_eq!(Answer::decode(answer.encode()), Ok(answer.clone()));
            assert!(Question::decode(answer.encode()).is_err());
        }
    }

    #[test]
    fn an_answer_with_more_than_is_asked_for_is_not_read() {
        let registration = Registration { namespace: "a".to_owned(), record: Bytes::new(), ttl_s: 7 };
        let found = |n| Found { registrations: vec![registration.clone(); n], cookie: Bytes::new() };
        assert!(Answer::decode(Answer::Discovered(Ok(found(ANSWER_MAX))).encode()).is_ok());
        assert!(Answer::decode(Answer::Discovered(Ok(found(ANSWER_MAX + 1))).encode()).is_err());
    }

    #[test]
    fn a_message_of_no_known_kind_is_none() {
        let register = pb::message::Register { ns: Some("a".to_owned()), ..Default::default() };
        for kind in [None, Some(5), Some(-1)] {
            let message =
                pb::Message { r#type: kind, register: Some(register.clone()), ..pb::Message::default() };
            let bytes = Bytes::from(message.encode_to_vec());
            assert!(Question::decode(bytes.clone()).is_err() && Answer::decode(bytes).is_err(), "{kind:?}");
        }
    }
}
