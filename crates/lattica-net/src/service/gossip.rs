//! A listener to a topic, as the application holds it.

use std::sync::Arc;

use libp2p::gossipsub::TopicHash;
use swarm_wire::PeerId;
use tokio::sync::{mpsc, oneshot};

use super::Node;
use super::driver::Command;
use super::shared::Shared;
use crate::error::GossipError;
use crate::gossip::{Announcement, MESSAGE_MAX_BYTES, QUEUE_MAX, Verdict, topic_name};

/// Judges a message of a topic: who made it, and what it says.
pub(crate) type Validator = Arc<dyn Fn(&PeerId, &[u8]) -> Verdict + Send + Sync>;

/// Listens to one topic until it is dropped.
#[derive(Debug)]
pub struct Subscription {
    shared: Arc<Shared>,
    topic: TopicHash,
    queue: mpsc::Receiver<Announcement>,
}

impl Subscription {
    /// The next announcement that was accepted; `None` when the node was shut down. Cancel safe.
    pub async fn recv(&mut self) -> Option<Announcement> {
        self.queue.recv().await
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.queue.close();
        let (shared, topic) = (Arc::clone(&self.shared), self.topic.clone());
        self.shared.network.spawn(async move {
            // A node that has stopped listens to nothing.
            let _ = shared.command(Command::Unsubscribe { topic }).await;
        });
    }
}

impl Node {
    /// Listens to `topic`. `validate` judges every message on the application's runtime before it is delivered here or
    /// passed on to others; it must be quick, and it is given the author, whose signature is checked already. A slow reader
    /// of the subscription loses messages beyond 256. Needs `NodeConfig::gossip`.
    ///
    /// Cancel safe: a subscription that nobody receives ends.
    ///
    /// # Errors
    /// When gossip is off, the topic's name cannot be used, or this node listens to it already.
    pub async fn subscribe(
        &self,
        topic: &str,
        validate: impl Fn(&PeerId, &[u8]) -> Verdict + Send + Sync + 'static,
    ) -> Result<Subscription, GossipError> {
        let shared = Arc::clone(self.shared());
        let topic = self.topic(topic)?;
        let (announcements, queue) = mpsc::channel(QUEUE_MAX);
        // Made first, so that an early end of this future takes the subscription back.
        let subscription = Subscription { shared: Arc::clone(&shared), topic: topic.clone(), queue };
        let (reply, answer) = oneshot::channel();
        let command = Command::Subscribe { topic, validate: Arc::new(validate), announcements, reply };
        shared.command(command).await.map_err(|_| GossipError::ShutDown)?;
        answer.await.unwrap_or(Err(GossipError::ShutDown))?;
        Ok(subscription)
    }

    /// Announces `data`, signed by this node, to everybody who listens to `topic`; this node itself does not hear it.
    ///
    /// Cancel safe: it is announced or not.
    ///
    /// # Errors
    /// When gossip is off, the data is too large, or no listener is known (yet).
    pub async fn publish(&self, topic: &str, data: Vec<u8>) -> Result<(), GossipError> {
        if data.len() > MESSAGE_MAX_BYTES {
            return Err(GossipError::TooLarge { got_bytes: data.len(), limit_bytes: MESSAGE_MAX_BYTES });
        }
        let (reply, answer) = oneshot::channel();
        let command = Command::Publish { topic: self.topic(topic)?, data, reply };
        self.shared().command(command).await.map_err(|_| GossipError::ShutDown)?;
        answer.await.unwrap_or(Err(GossipError::ShutDown))
    }

    fn topic(&self, topic: &str) -> Result<TopicHash, GossipError> {
        if !self.config().gossip {
            return Err(GossipError::Off);
        }
        let name = topic_name(&self.config().network, topic);
        let name = name.ok_or(GossipError::BadTopic { got_bytes: topic.len() })?;
        Ok(TopicHash::from_raw(name))
    }
}
