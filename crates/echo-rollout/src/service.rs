//! The async shell: workers, the trainer's collector and auditors on a lattica-net node. Clocks, sockets and files live
//! below here. A trainer needs feature `collector` only, which brings no engine; the rest is feature `service`.

#[cfg(feature = "service")]
pub mod auditor;
pub mod collector;
#[cfg(feature = "endpoint")]
pub mod endpoint;
#[cfg(feature = "service")]
pub mod external;
pub mod journal;
#[cfg(feature = "service")]
pub mod payload_source;
#[cfg(feature = "service")]
pub mod policy_engine;
#[cfg(feature = "endpoint")]
pub mod post;
#[cfg(feature = "service")]
pub mod referee;
#[cfg(feature = "service")]
pub mod snapshot_watcher;
#[cfg(feature = "service")]
pub mod veri;
#[cfg(feature = "service")]
pub mod worker;

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use lattica_net::{CallError, Node};
use swarm_wire::prost::Message;
use swarm_wire::{DecodeError, PeerId};

#[cfg(feature = "service")]
pub use auditor::{Audited, AuditorConfig, AuditorError, Replay, run_auditor};
pub use collector::{Collector, CollectorConfig, CollectorError};
#[cfg(feature = "endpoint")]
pub use endpoint::{Endpoint, EndpointConfig, EndpointError};
#[cfg(feature = "service")]
pub use external::{External, ExternalConfig, ExternalError};
pub use journal::{Journal, JournalError};
#[cfg(feature = "service")]
pub use payload_source::{PayloadSource, Spreads};
#[cfg(feature = "service")]
pub use policy_engine::{InstallError, PolicyEngine, ReadWeights};
#[cfg(feature = "endpoint")]
pub use post::HttpError;
#[cfg(feature = "service")]
pub use referee::{Referee, RefereeError, Referees};
#[cfg(feature = "service")]
pub use snapshot_watcher::{SnapshotError, SnapshotWatcher};
#[cfg(feature = "service")]
pub use veri::VeriCommitter;
#[cfg(feature = "service")]
pub use worker::{
    CommitError, Committer, InFlight, Opener, Stopper, Work, Worker, WorkerConfig, WorkerError, WorkerStats,
};

/// Worker to trainer: I am here.
pub const REGISTER: &str = "echo/register";
/// Worker to trainer: what shall I make? Also the heartbeat.
pub const LEASE: &str = "echo/lease";
/// Worker to trainer: here it is.
pub const SUBMIT: &str = "echo/submit";
/// Trainer to worker: open your commitment.
pub const OPEN: &str = "echo/open";
/// Auditor to trainer: what is to be audited?
pub const AUDIT_NEXT: &str = "echo/audit/next";
/// Auditor to trainer: pass this challenge on.
pub const AUDIT_OPEN: &str = "echo/audit/open";
/// Auditor to trainer: a signed verdict.
pub const AUDIT_VERDICT: &str = "echo/audit/verdict";
/// Domain of signed verdicts.
pub const VERDICT_DOMAIN: &str = "echo/v1/verdict";

/// How long a trainer keeps a question for work open before it answers that there is none, unless configured otherwise.
pub const LONG_POLL: Duration = Duration::from_millis(1500);

/// A future of a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Why a call gave no usable answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AskError {
    /// The call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// The answer is malformed.
    #[error("answer of {peer}: {source}")]
    Answer {
        /// Who answered.
        peer: PeerId,
        /// What is wrong with it.
        source: DecodeError,
    },
}

#[cfg(feature = "service")]
/// Calls `method` with a message and decodes the answer.
async fn ask<A: Message + Default>(
    node: &Node,
    peer: &PeerId,
    method: &'static str,
    question: &impl Message,
    timeout: Duration,
) -> Result<A, AskError> {
    let answer = node.call(peer, method, question.encode_to_vec().into(), timeout).await?;
    crate::wire::message(method, &answer).map_err(|source| AskError::Answer { peer: peer.clone(), source })
}

fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}
