//! The member's side: finds the head, joins, sends heartbeats, and hands out what the head assigns.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lattica_net::{CallError, CallOptions, Node};
use prost::Message;
use swarm_wire::generated::parallax::v1 as pb;
use swarm_wire::{DecodeError, PeerId};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{CALL_TIMEOUT, DESCRIBE, HEARTBEAT, JOIN, LEAVE, SwarmError, head_key};
use crate::{Incarnation, NodeProfile, Report, wire};

/// A search asks all connected peers again this often.
const SEARCH_INTERVAL: Duration = Duration::from_millis(200);
/// How long a peer may take to say whether it is the head.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// Who joins, and where.
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// The swarm's name.
    pub swarm: String,
    /// The head, from [`find_head`].
    pub head: PeerId,
    /// Addresses that lead to the head when the connection is gone.
    pub head_addrs: Vec<String>,
    /// Memory and speed.
    pub profile: NodeProfile,
    /// Grows with every start of this process.
    pub incarnation: Incarnation,
    /// For people.
    pub device: String,
}

/// Looks for the head of `swarm` among connected peers and in the DHT; returns it with the model it serves. Dropping the
/// future ends the search.
///
/// # Errors
/// When nobody answered as head within `patience`.
pub async fn find_head(
    node: &Node,
    swarm: &str,
    bootstrap: &[String],
    patience: Duration,
) -> Result<(PeerId, pb::ModelDescription), SwarmError> {
    let started = Instant::now();
    let body = Bytes::from(pb::DescribeRequest { swarm: swarm.to_owned() }.encode_to_vec());
    let mut asked = HashSet::new();
    let mut last_dial: Option<Instant> = None;
    loop {
        let mut candidates: Vec<PeerId> =
            node.peers().into_iter().filter(|p| p.connected).map(|p| p.peer).collect();
        if last_dial.is_none_or(|at| at.elapsed() > Duration::from_secs(2)) {
            last_dial = Some(Instant::now());
            for addr in bootstrap {
                match node.dial(addr).await {
                    Ok(peer) => candidates.push(peer),
                    Err(error) => tracing::debug!(%addr, %error, "bootstrap address does not answer"),
                }
            }
            if let Ok(Ok(providers)) =
                tokio::time::timeout(ASK_TIMEOUT, node.providers(&head_key(swarm))).await
            {
                candidates.extend(providers);
            }
        }
        for peer in candidates.into_iter().filter(|p| *p != node.peer_id()) {
            asked.insert(peer.clone());
            match node.call(&peer, DESCRIBE, body.clone(), ASK_TIMEOUT).await {
                Ok(reply) => {
                    let model =
                        pb::ModelDescription::decode(&reply[..]).map_err(|e| SwarmError::Malformed {
                            head: peer.clone(),
                            source: DecodeError::message("ModelDescription", &e),
                        })?;
                    return Ok((peer, model));
                }
                Err(error) => tracing::debug!(peer = %peer.short(), %error, "not the head"),
            }
        }
        if started.elapsed() >= patience {
            return Err(SwarmError::NoHead { swarm: swarm.to_owned(), waited: patience, asked: asked.len() });
        }
        tokio::time::sleep(SEARCH_INTERVAL).await;
    }
}

/// A member that keeps itself known to its head until it is dropped or leaves.
#[derive(Debug)]
pub struct MemberClient {
    node: Node,
    options: Arc<JoinOptions>,
    report: watch::Sender<Report>,
    orders: Orders,
    task: JoinHandle<()>,
}

/// What the head wants of a member.
type Orders = (watch::Receiver<Option<pb::Assignment>>, watch::Receiver<Option<pb::NextWeights>>);

impl MemberClient {
    /// Joins, then sends heartbeats in the background; a head that went away is looked for at its addresses.
    ///
    /// # Errors
    /// When the head cannot be reached or refuses.
    pub async fn join(node: &Node, options: JoinOptions) -> Result<Self, SwarmError> {
        let options = Arc::new(options);
        let reply = send_join(node, &options).await?;
        let report = watch::Sender::new(Report::default());
        let ((assignments, assignment), (nexts, next)) = (watch::channel(None), watch::channel(None));
        let heartbeat = Duration::from_millis(u64::from(reply.heartbeat_ms.clamp(10, 60_000)));
        let task = tokio::spawn(run(
            node.clone(),
            Arc::clone(&options),
            report.subscribe(),
            (assignments, nexts),
            heartbeat,
        ));
        Ok(Self { node: node.clone(), options, report, orders: (assignment, next), task })
    }

    /// What the head wants run; the newest assignment only. `None` until the first one.
    pub fn assignments(&self) -> watch::Receiver<Option<pb::Assignment>> {
        self.orders.0.clone()
    }

    /// Weights that the head wants read beside those that serve; an assignment that takes them into service comes before they
    /// are wanted no more.
    pub fn next_weights(&self) -> watch::Receiver<Option<pb::NextWeights>> {
        self.orders.1.clone()
    }

    /// What the next heartbeats report; a change is sent at once.
    pub fn report(&self, report: Report) {
        self.report.send_replace(report);
    }

    /// A handle for [`MemberClient::report`] from another task.
    pub fn reporter(&self) -> watch::Sender<Report> {
        self.report.clone()
    }

    /// The head.
    pub fn head(&self) -> &PeerId {
        &self.options.head
    }

    /// Says goodbye, so that the head need not wait for a timeout.
    pub async fn leave(self) {
        self.task.abort();
        let body = pb::LeaveRequest { incarnation: self.options.incarnation }.encode_to_vec();
        // A head that is gone needs no goodbye.
        let _ = self.node.call(&self.options.head, LEAVE, body.into(), Duration::from_secs(1)).await;
    }
}

impl Drop for MemberClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn send_join(node: &Node, options: &JoinOptions) -> Result<pb::JoinReply, SwarmError> {
    let request = pb::JoinRequest {
        swarm: options.swarm.clone(),
        incarnation: options.incarnation,
        profile: Some(wire::node_profile_message(&options.profile)),
        addrs: node.listen_addrs().await.into_iter().take(wire::MAX_ADDRS).collect(),
        device: options.device.clone(),
    };
    let reply = node
        .call(&options.head, JOIN, request.encode_to_vec().into(), CALL_TIMEOUT)
        .await
        .map_err(|source| SwarmError::Call { head: options.head.clone(), source })?;
    pb::JoinReply::decode(&reply[..]).map_err(|e| SwarmError::Malformed {
        head: options.head.clone(),
        source: DecodeError::message("JoinReply", &e),
    })
}

async fn run(
    node: Node,
    options: Arc<JoinOptions>,
    mut report: watch::Receiver<Report>,
    (assignments, nexts): (watch::Sender<Option<pb::Assignment>>, watch::Sender<Option<pb::NextWeights>>),
    heartbeat: Duration,
) {
    loop {
        let current = report.borrow_and_update().clone();
        match beat(&node, &options, &current, heartbeat * 4).await {
            Ok(reply) if !reply.known => {
                tracing::info!(head = %options.head.short(), "the head does not know this member any more: joining again");
                if let Err(error) = send_join(&node, &options).await {
                    tracing::warn!(%error, "could not join again");
                }
            }
            Ok(reply) => {
                if let Some(new) = reply.assignment {
                    let known = assignments.borrow().as_ref().is_some_and(|old| old.epoch == new.epoch);
                    if !known {
                        assignments.send_replace(Some(new));
                    }
                }
                nexts.send_if_modified(|next| {
                    let is_news = is_news(next.as_ref(), reply.next.as_ref());
                    if is_news {
                        *next = reply.next;
                    }
                    is_news
                });
            }
            Err(error) => {
                tracing::warn!(%error, "no answer to a heartbeat");
                for addr in &options.head_addrs {
                    if node.dial(addr).await.is_ok() {
                        break;
                    }
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(heartbeat) => {}
            changed = report.changed() => if changed.is_err() { return },
        }
    }
}

/// Whether the head wants something else than it did; it sends the list of files only until it hears that they are here.
fn is_news(before: Option<&pb::NextWeights>, now: Option<&pb::NextWeights>) -> bool {
    match (before, now) {
        (Some(before), Some(now)) => {
            (before.epoch, &before.model) != (now.epoch, &now.model)
                || (before.files.is_empty() && !now.files.is_empty())
        }
        (before, now) => before.is_some() != now.is_some(),
    }
}

async fn beat(
    node: &Node,
    options: &JoinOptions,
    report: &Report,
    timeout: Duration,
) -> Result<pb::HeartbeatReply, SwarmError> {
    let body = wire::heartbeat(options.incarnation, report).encode_to_vec();
    // Reports replace each other: a head that restarted may be told twice.
    let again = CallOptions { idempotent: true, ..CallOptions::new(timeout.max(Duration::from_secs(1))) };
    let reply = node
        .call_with(&options.head, HEARTBEAT, body.into(), &again)
        .await
        .map_err(|source: CallError| SwarmError::Call { head: options.head.clone(), source })?;
    pb::HeartbeatReply::decode(&reply[..]).map_err(|e| SwarmError::Malformed {
        head: options.head.clone(),
        source: DecodeError::message("HeartbeatReply", &e),
    })
}
