//! Topics that this node listens to. The swarm's task only hands messages over: judging them is the application's work.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use libp2p::PeerId as LibPeerId;
use libp2p::gossipsub::{self, IdentTopic, MessageAcceptance, MessageId, PublishError, TopicHash};
use tokio::sync::{Semaphore, mpsc};

use super::super::behaviour::topic_score;
use super::super::gossip::Validator;
use super::super::wire_peer;
use super::{Command, Driver, Reply};
use crate::error::GossipError;
use crate::gossip::{Announcement, MESSAGE_MAX_BYTES, TOPICS_MAX, Verdict};

/// Messages that are judged at the same time; further ones are ignored.
const JUDGED_MAX: usize = 64;

/// See the module.
pub(super) struct Topics {
    by_name: HashMap<TopicHash, Topic>,
    places: Arc<Semaphore>,
}

struct Topic {
    validate: Validator,
    announcements: mpsc::Sender<Announcement>,
}

impl Default for Topics {
    fn default() -> Self {
        Self { by_name: HashMap::new(), places: Arc::new(Semaphore::new(JUDGED_MAX)) }
    }
}

impl Driver {
    pub(super) fn subscribe(
        &mut self,
        topic: TopicHash,
        validate: Validator,
        announcements: mpsc::Sender<Announcement>,
        reply: Reply<(), GossipError>,
    ) {
        let taken = self.topics.by_name.get(&topic).is_some_and(|t| !t.announcements.is_closed());
        let full = self.topics.by_name.len() >= TOPICS_MAX && !self.topics.by_name.contains_key(&topic);
        let result = match self.swarm.behaviour_mut().gossip.as_mut() {
            None => Err(GossipError::Off),
            Some(_) if taken => Err(GossipError::Subscribed { topic: topic.to_string() }),
            Some(_) if full => Err(GossipError::TooManyTopics { limit: TOPICS_MAX }),
            Some(gossip) => {
                let name = IdentTopic::new(topic.as_str());
                let scored = gossip.set_topic_params(name.clone(), topic_score());
                debug_assert!(scored.is_ok(), "the parameters are valid: {scored:?}");
                gossip.subscribe(&name).map(|_| ()).map_err(|error| GossipError::Refused {
                    topic: topic.to_string(),
                    reason: error.to_string(),
                })
            }
        };
        if result.is_ok() {
            self.topics.by_name.insert(topic, Topic { validate, announcements });
        }
        let _ = reply.send(result);
    }

    /// The listener was dropped; a newer one of the same topic stays.
    pub(super) fn unsubscribe(&mut self, topic: &TopicHash) {
        if self.topics.by_name.get(topic).is_some_and(|t| t.announcements.is_closed()) {
            self.topics.by_name.remove(topic);
            if let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() {
                gossip.unsubscribe(&IdentTopic::new(topic.as_str()));
            }
        }
    }

    pub(super) fn publish(&mut self, topic: &TopicHash, data: Vec<u8>, reply: Reply<(), GossipError>) {
        let refused = |reason: String| GossipError::Refused { topic: topic.to_string(), reason };
        let result = match self.swarm.behaviour_mut().gossip.as_mut() {
            None => Err(GossipError::Off),
            Some(gossip) => match gossip.publish(topic.clone(), data) {
                Ok(_) => Ok(()),
                Err(PublishError::NoPeersSubscribedToTopic) => Err(GossipError::NoListeners),
                Err(error) => Err(refused(error.to_string())),
            },
        };
        let _ = reply.send(result);
    }

    pub(super) fn handle_gossip(&mut self, event: gossipsub::Event) {
        let gossipsub::Event::Message { propagation_source, message_id, message } = event else { return };
        let topic = self.topics.by_name.get(&message.topic);
        let place = Arc::clone(&self.topics.places).try_acquire_owned();
        let (Some(topic), Ok(place)) = (topic, place) else {
            return self.judged(&message_id, &propagation_source, Verdict::Ignore);
        };
        let author = message.source.and_then(|source| wire_peer(&source).ok());
        let (Some(author), Ok(relayed_by)) = (author, wire_peer(&propagation_source)) else {
            return self.judged(&message_id, &propagation_source, Verdict::Reject);
        };
        if message.data.len() > MESSAGE_MAX_BYTES {
            return self.judged(&message_id, &propagation_source, Verdict::Reject);
        }
        let (validate, announcements) = (Arc::clone(&topic.validate), topic.announcements.clone());
        let shared = Arc::clone(&self.shared);
        self.shared.application.spawn(async move {
            let _place = place;
            let judge = AssertUnwindSafe(|| validate(&author, &message.data));
            let verdict = catch_unwind(judge).unwrap_or_else(|_| {
                tracing::error!(topic = %message.topic, "the validator panicked");
                Verdict::Ignore
            });
            if verdict == Verdict::Accept {
                let announcement = Announcement { author, relayed_by, data: message.data.into() };
                if announcements.try_send(announcement).is_err() {
                    tracing::debug!(topic = %message.topic, "the listener is slow or gone: not delivered here");
                }
            }
            let _ = shared.command(Command::Judged { message_id, propagation_source, verdict }).await;
        });
    }

    pub(super) fn judged(&mut self, id: &MessageId, source: &LibPeerId, verdict: Verdict) {
        if verdict == Verdict::Reject {
            tracing::warn!(peer = %source, "an announcement was rejected");
        }
        let acceptance = match verdict {
            Verdict::Accept => MessageAcceptance::Accept,
            Verdict::Reject => MessageAcceptance::Reject,
            Verdict::Ignore => MessageAcceptance::Ignore,
        };
        if let Some(gossip) = self.swarm.behaviour_mut().gossip.as_mut() {
            // `false`: the message has left the cache meanwhile.
            gossip.report_message_validation_result(id, source, acceptance);
        }
    }
}
