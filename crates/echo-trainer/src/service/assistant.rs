//! An assistant: holds a learner's weights and computes shares of its steps.
//!
//! ```no_run
//! # async fn example(node: lattica_net::Node, learner: swarm_wire::PeerId, policy: parallax_model::train::TrainModel)
//! # -> Result<(), Box<dyn std::error::Error>> {
//! let assistant = echo_trainer::service::Assistant::join(&node, &learner, "the base model's id").await?;
//! // Here a policy is made that has the run's adapter: assistant.trainer() has its settings.
//! assistant.serve(policy, |event| println!("{event:?}")).await?;
//! # Ok(())
//! # }
//! ```

use std::time::Instant;

use lattica_net::{FrameError, Node, Stream, StreamError};
use serde::Serialize;
use swarm_wire::{DecodeError, PeerId, PolicyVersion, RunId};
use tokio::io::{BufReader, ReadHalf, WriteHalf};

use super::assistants::frames::{payload, receive, send};
use crate::averaging::wire::{Frame, PROTOCOL, WORK_MAX_BYTES, decode_share, decode_values, encode_reply};
use crate::averaging::{Attempt, Hash, Reply, weights_hash};
use crate::config::TrainerConfig;
use crate::error::StepError;
use crate::parameters::Parameters;
use crate::policy::{Policy, read_parameters};

/// Why an assistant stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AssistantError {
    /// The learner cannot be reached, or takes no assistants.
    #[error("the learner takes no assistant: {0}")]
    Stream(#[from] StreamError),
    /// The learner ended it.
    #[error("the learner ends it: {reason}")]
    Ended {
        /// Its own words.
        reason: String,
    },
    /// The connection is gone. The learner may come back.
    #[error("the connection to the learner is lost: {reason}")]
    Lost {
        /// How.
        reason: String,
    },
    /// The learner says something that the protocol forbids.
    #[error("the learner does not keep to the protocol: {reason}")]
    Protocol {
        /// What is wrong.
        reason: String,
    },
    /// Settings of another version of the program.
    #[error("the run's settings cannot be read: {reason}; the learner may be of another version")]
    Settings {
        /// Why.
        reason: String,
    },
    /// The model is not the learner's.
    #[error("the weights of {version} do not fit the model, or are other ones than were sent")]
    Weights {
        /// Which.
        version: PolicyVersion,
    },
    /// A share that cannot be computed.
    #[error(transparent)]
    Step(#[from] StepError),
}

impl AssistantError {
    /// Whether the same learner may take it later: it is gone, or not ready yet.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Lost { .. } | Self::Stream(_))
    }
}

impl From<FrameError> for AssistantError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Io(error) => error.into(),
            error => Self::Protocol { reason: error.to_string() },
        }
    }
}

impl From<DecodeError> for AssistantError {
    fn from(error: DecodeError) -> Self {
        Self::Protocol { reason: error.to_string() }
    }
}

impl From<std::io::Error> for AssistantError {
    fn from(error: std::io::Error) -> Self {
        Self::Lost { reason: error.to_string() }
    }
}

/// What an assistant tells of its work.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
#[non_exhaustive]
pub enum AssistantEvent {
    /// It holds the weights of this version; their hash is the learner's.
    Holds {
        /// The version.
        version: PolicyVersion,
        /// The hash, of the values in the model.
        #[serde(serialize_with = "hexadecimal")]
        hash: Hash,
    },
    /// It answered for a share.
    Share {
        /// The version that the step began with.
        step: u64,
        /// Which one.
        share: usize,
        /// Seconds of computing.
        seconds: f64,
    },
}

fn hexadecimal<S: serde::Serializer>(hash: &Hash, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&blake3::Hash::from_bytes(*hash))
}

/// An assistant that the learner has let in.
#[derive(Debug)]
pub struct Assistant {
    reader: BufReader<ReadHalf<Stream>>,
    writer: WriteHalf<Stream>,
    run: RunId,
    trainer: TrainerConfig,
}

impl Assistant {
    /// Asks `learner` to be let in, with a model of this identity.
    ///
    /// # Errors
    /// It cannot be reached, takes no assistants, or not this one.
    pub async fn join(node: &Node, learner: &PeerId, base_model_id: &str) -> Result<Self, AssistantError> {
        let (reader, mut writer) = tokio::io::split(node.open_stream(learner, PROTOCOL).await?);
        let mut reader = BufReader::new(reader);
        send(&mut writer, &Frame::Hello { base_model_id: base_model_id.to_owned() }, &[]).await?;
        let (Frame::Welcome { run, settings }, 0) = next(&mut reader).await? else {
            return Err(AssistantError::Protocol { reason: "its first frame is no welcome".to_owned() });
        };
        let trainer = serde_json::from_slice(&settings);
        let trainer = trainer.map_err(|e| AssistantError::Settings { reason: e.to_string() })?;
        Ok(Self { reader, writer, run, trainer })
    }

    /// The run.
    pub fn run(&self) -> RunId {
        self.run
    }

    /// The run's settings, for a policy of the same shape.
    pub fn trainer(&self) -> &TrainerConfig {
        &self.trainer
    }

    /// Computes with `policy` until the run is over.
    ///
    /// # Errors
    /// The learner is gone or wants it no longer; weights or shares that the model refuses, which the learner is told.
    pub async fn serve<P: Policy + Send + 'static>(
        mut self,
        policy: P,
        mut tell: impl FnMut(AssistantEvent),
    ) -> Result<(), AssistantError> {
        let mut served = Served { parameters: read_parameters(&policy), policy, hash: None };
        loop {
            match self.turn(served, &mut tell).await {
                Ok(Some(next)) => served = next,
                Ok(None) => return Ok(()),
                Err(error) => {
                    // A learner that is gone does not hear it.
                    let end = Frame::End { finished: false, reason: error.to_string() };
                    let _ = send(&mut self.writer, &end, &[]).await;
                    return Err(error);
                }
            }
        }
    }

    /// One frame of the learner's, and what follows from it; nothing once the run is over.
    async fn turn<P: Policy + Send + 'static>(
        &mut self,
        served: Served<P>,
        tell: &mut impl FnMut(AssistantEvent),
    ) -> Result<Option<Served<P>>, AssistantError> {
        let (frame, announced) = match next(&mut self.reader).await {
            Err(AssistantError::Ended { reason }) if reason.is_empty() => return Ok(None),
            frame => frame?,
        };
        match frame {
            Frame::Weights { version, hash } => {
                let needed: usize = served.parameters.iter().map(|p| 4 * p.values.len()).sum();
                if announced != needed as u64 {
                    return Err(AssistantError::Weights { version });
                }
                let bytes = payload(&mut self.reader, announced, needed).await?;
                let served = blocking(move || served.hold(version, hash, &bytes)).await?;
                send(&mut self.writer, &Frame::Held { hash }, &[]).await?;
                tell(AssistantEvent::Holds { version, hash });
                Ok(Some(served))
            }
            Frame::Work(attempt) => {
                let bytes = payload(&mut self.reader, announced, WORK_MAX_BYTES).await?;
                let loss = self.trainer.loss;
                let began = Instant::now();
                let (served, frame, bytes) = blocking(move || {
                    let reply = served.answer(attempt, &bytes, &loss)?;
                    let (frame, bytes) = encode_reply(&reply);
                    Ok((served, frame, bytes))
                })
                .await?;
                let seconds = began.elapsed().as_secs_f64();
                send(&mut self.writer, &frame, &bytes).await?;
                tell(AssistantEvent::Share { step: attempt.step, share: attempt.share, seconds });
                Ok(Some(served))
            }
            _ => Err(AssistantError::Protocol { reason: "a frame that is an assistant's".to_owned() }),
        }
    }
}

/// The next frame that is not an end.
async fn next(reader: &mut BufReader<ReadHalf<Stream>>) -> Result<(Frame, u64), AssistantError> {
    match receive(reader).await? {
        Some((Frame::End { finished: true, .. }, _)) => Err(AssistantError::Ended { reason: String::new() }),
        Some((Frame::End { reason, .. }, _)) => Err(AssistantError::Ended { reason }),
        Some(frame) => Ok(frame),
        None => Err(AssistantError::Lost { reason: "it hung up".to_owned() }),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, AssistantError> + Send + 'static,
) -> Result<T, AssistantError> {
    tokio::task::spawn_blocking(work).await.expect("a share does not panic")
}

/// The model at work.
struct Served<P> {
    policy: P,
    parameters: Parameters,
    /// Of the weights that it holds.
    hash: Option<Hash>,
}

impl<P: Policy> Served<P> {
    /// Takes these weights, and looks what the model has then.
    fn hold(mut self, version: PolicyVersion, hash: Hash, bytes: &[u8]) -> Result<Self, AssistantError> {
        let values = decode_values(bytes)?;
        let mut rest = &values[..];
        for parameter in &mut self.parameters {
            let (own, after) = rest.split_at(parameter.values.len());
            parameter.values.copy_from_slice(own);
            rest = after;
        }
        self.policy.assign(&self.parameters)?;
        if weights_hash(&read_parameters(&self.policy)) != hash {
            return Err(AssistantError::Weights { version });
        }
        self.hash = Some(hash);
        Ok(self)
    }

    fn answer(
        &self,
        attempt: Attempt,
        bytes: &[u8],
        loss: &crate::loss::LossConfig,
    ) -> Result<Reply, AssistantError> {
        let Some(weights) = self.hash else {
            return Err(AssistantError::Protocol { reason: "a share before any weights".to_owned() });
        };
        let answer = decode_share(bytes)?.compute(&self.policy, loss)?;
        Ok(Reply::new(attempt, weights, answer))
    }
}
