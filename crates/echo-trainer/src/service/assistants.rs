//! The learner's side of assistants: takes those in that the settings name, gives them weights and shares, and computes what does not
//! come back itself.
//!
//! Every assistant has one stream (`connection`). A step waits on a condition variable, because it runs on a thread of its own and
//! computes between waits; who computes what is decided by [`Leader`], under the same lock.

mod connection;
pub(super) mod frames;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lattica_net::{Node, StreamError};
use swarm_wire::{PeerId, PolicyVersion, RunId};
use tokio::sync::{mpsc, oneshot, watch};

use crate::averaging::wire::{PROTOCOL, encode_values};
use crate::averaging::{self, Attempt, Exclusion, Hash, Leader, LeaderConfig, Next, weights_hash};
use crate::config::TrainerConfig;
use crate::error::StepError;
use crate::parameters::Parameter;
use crate::shares::{Answer, Hands, Share, Task};

/// Late so many times in a row, an assistant is out until the learner is started again.
const LATE_AT_MOST: u32 = 3;
/// Orders that wait for one stream: a share, and its end.
const ORDERS: usize = 4;

/// Which run assistants take part in.
#[derive(Debug, Clone, PartialEq)]
pub struct AssistantsConfig {
    /// Who may; the batch is cut for all of them.
    pub peers: Vec<PeerId>,
    /// The run.
    pub run: RunId,
    /// Identity of the base checkpoint; assistants with another one are refused.
    pub base_model_id: String,
    /// The run's settings.
    pub trainer: TrainerConfig,
    /// How long one is waited for, and may take to receive weights.
    pub patience: Duration,
    /// Share of rounds, 0 to 1, in which one answer of an assistant is computed here as well, and compared to the bit. A step has one
    /// round, or two where its loss needs the present weights' log-probabilities first.
    pub check: f64,
    /// Decides which; assistants must not know it.
    pub secret: u64,
}

impl AssistantsConfig {
    /// Which of `n` answers of a round is computed again.
    fn drawn(&self, round: u64, n: usize) -> Option<usize> {
        let mut hasher = blake3::Hasher::new_derive_key("echo-trainer assistants' checks v1");
        let mut bytes = [0; 16];
        hasher.update(&self.secret.to_le_bytes()).update(&round.to_le_bytes());
        hasher.finalize_xof().fill(&mut bytes);
        let draw = u128::from_le_bytes(bytes);
        let (low, high) = ((draw as u64 >> 11) as f64 / (1_u64 << 53) as f64, (draw >> 64) as u64);
        let n = n as u64;
        (n > 0 && low < self.check).then(|| usize::try_from(high % n).unwrap_or(0))
    }
}

/// The assistants of one learner. Clones are handles to the same ones.
#[derive(Debug, Clone)]
pub struct Assistants {
    node: Node,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: AssistantsConfig,
    state: Mutex<State>,
    /// Something came, or somebody went.
    changed: Condvar,
    /// The newest weights.
    weights: watch::Sender<Option<Arc<Weights>>>,
    /// Streams that are open, of those that the settings name: from before they are greeted until the last that is said.
    attended: watch::Sender<usize>,
}

/// Weights as they travel.
#[derive(Debug)]
struct Weights {
    version: PolicyVersion,
    hash: Hash,
    /// Values of each parameter.
    lengths: Arc<[usize]>,
    payload: Bytes,
}

#[derive(Debug)]
struct State {
    /// From when on time is counted.
    began: Instant,
    leader: Leader,
    connections: BTreeMap<PeerId, Connection>,
    n_connections: u64,
    /// Of the present shares, with the assistant that each is of. What was not so is there until it is computed again.
    answers: Vec<Option<(Answer, Option<PeerId>)>>,
    /// Shares of the last gradients that assistants computed, without those that were thrown away.
    assisted: usize,
    finished: bool,
}

#[derive(Debug)]
struct Connection {
    number: u64,
    orders: mpsc::Sender<Order>,
    /// Told that the end is among the orders, so that what is being sent before it does not hold it up for ever.
    ended: oneshot::Sender<()>,
    /// What it was asked for, until it answers.
    job: Option<Job>,
    /// Hashes of weights that were sent and not confirmed.
    sent: VecDeque<Hash>,
}

/// What an answer is compared with. Of the weights only what that needs: one that never answers would keep old ones for ever.
#[derive(Debug)]
struct Job {
    share: Arc<Share>,
    weights: Hash,
    /// Values of each parameter.
    lengths: Arc<[usize]>,
}

/// What a stream's writer is to say.
#[derive(Debug)]
enum Order {
    Work { attempt: Attempt, share: Arc<Share>, weights: Arc<Weights> },
    End { finished: bool, reason: String },
}

impl State {
    /// The connection of `peer`, if it is still the one with this number: what an older stream says does not concern the present one.
    fn connection(&mut self, peer: &PeerId, number: u64) -> Option<&mut Connection> {
        self.connections.get_mut(peer).filter(|connection| connection.number == number)
    }

    /// Ends the stream of `peer`: it is told so, or its orders end.
    fn end(&mut self, peer: &PeerId, finished: bool, reason: String) {
        if let Some(connection) = self.connections.remove(peer) {
            // A full queue belongs to a stream that takes nothing any more.
            let _ = connection.orders.try_send(Order::End { finished, reason });
            let _ = connection.ended.send(());
        }
    }

    /// Ends the streams of those that are out.
    fn end_dismissed(&mut self) {
        let out =
            self.connections.keys().filter_map(|p| Some((p.clone(), self.leader.dismissed(p)?.to_string())));
        for (peer, reason) in out.collect::<Vec<_>>() {
            self.end(&peer, false, reason);
        }
    }

    /// Which of the present shares assistants computed.
    fn assisted(&self) -> Vec<usize> {
        let answers = self.answers.iter().enumerate();
        answers.filter(|(_, answer)| matches!(answer, Some((_, Some(_))))).map(|(share, _)| share).collect()
    }

    /// Compares an assistant's answer with what was computed here. Where they differ this one counts, and the assistant's others of
    /// this round are missing again.
    fn compare(&mut self, share: usize, own: Answer) {
        let liar = match &self.answers[share] {
            Some((told, Some(peer))) if *told != own => peer.clone(),
            _ => return,
        };
        self.answers[share] = Some((own, None));
        self.leader.handle_own(share);
        self.leader.exclude(&liar, Exclusion::Wrong);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Shared {
    fn new(config: AssistantsConfig) -> Self {
        let patience_ms = u64::try_from(config.patience.as_millis()).unwrap_or(u64::MAX);
        let state = State {
            began: Instant::now(),
            leader: Leader::new(LeaderConfig { patience_ms, late_at_most: LATE_AT_MOST }),
            connections: BTreeMap::new(),
            n_connections: 0,
            answers: Vec::new(),
            assisted: 0,
            finished: false,
        };
        Self {
            config,
            state: Mutex::new(state),
            changed: Condvar::new(),
            weights: watch::Sender::new(None),
            attended: watch::Sender::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Assistants {
    /// Takes assistants in that come to `node`.
    ///
    /// # Errors
    /// None that a node of this version gives.
    pub fn start(node: Node, config: AssistantsConfig) -> Result<Self, StreamError> {
        let shared = Arc::new(Shared::new(config));
        let of_streams = Arc::clone(&shared);
        node.handle_stream(PROTOCOL, move |peer, stream| {
            connection::attend(Arc::clone(&of_streams), peer, stream)
        })?;
        Ok(Self { node, shared })
    }

    /// How many have weights and can be given shares.
    pub fn present(&self) -> usize {
        self.shared.state().leader.assistants()
    }

    /// Who was left out since this was asked last, and why.
    pub fn take_news(&self) -> Vec<(PeerId, Exclusion)> {
        self.shared.state().leader.take_news()
    }

    /// Shares of the last step's gradients that assistants computed, without those that were thrown away.
    pub fn assisted(&self) -> usize {
        self.shared.state().assisted
    }

    /// Tells all that the run is over, those too that are just being greeted, and waits until they have heard it, for at most `grace`.
    pub async fn finish(&self, grace: Duration) {
        self.node.unhandle_stream(PROTOCOL);
        {
            let mut state = self.shared.state();
            state.finished = true;
            let peers: Vec<PeerId> = state.connections.keys().cloned().collect();
            peers.iter().for_each(|peer| state.end(peer, true, String::new()));
        }
        let mut attended = self.shared.attended.subscribe();
        let all = attended.wait_for(|streams| *streams == 0);
        // Who does not hear it sees the connection end.
        let _ = tokio::time::timeout(grace, all).await;
    }
}

impl averaging::Assistants for Assistants {
    fn seats(&self) -> usize {
        self.shared.config.peers.len()
    }

    fn hold(&mut self, version: PolicyVersion, weights: &[Parameter]) {
        let known = self.shared.weights.borrow().as_ref().is_some_and(|held| held.version == version);
        if known || self.seats() == 0 {
            return;
        }
        self.shared.weights.send_replace(Some(Arc::new(Weights {
            version,
            hash: weights_hash(weights),
            lengths: weights.iter().map(|p| p.values.len()).collect(),
            payload: encode_values(weights.iter().map(|p| &p.values[..])).into(),
        })));
    }

    fn compute(
        &mut self,
        shares: &[Arc<Share>],
        own: &mut dyn Hands,
    ) -> Result<Option<Vec<Answer>>, StepError> {
        let shared = &self.shared;
        let Some(weights) = shared.weights.borrow().clone() else {
            return own.compute(shares).map(Some);
        };
        let mut state = shared.state();
        state.leader.begin(weights.version.0, shares.len());
        state.answers = vec![None; shares.len()];
        let mut checked = false;
        loop {
            let now_ms = state.now_ms();
            let next = state.leader.next(now_ms, own.width());
            state.end_dismissed();
            match next {
                Next::Ask { peer, attempt } => {
                    let share = &shares[attempt.share];
                    let job = Job {
                        share: Arc::clone(share),
                        weights: weights.hash,
                        lengths: Arc::clone(&weights.lengths),
                    };
                    let work =
                        Order::Work { attempt, share: Arc::clone(share), weights: Arc::clone(&weights) };
                    let asked = state.connections.get_mut(&peer).is_some_and(|connection| {
                        connection.job = Some(job);
                        connection.orders.try_send(work).is_ok()
                    });
                    if !asked {
                        let reason = "its stream takes nothing any more".to_owned();
                        state.leader.exclude(&peer, Exclusion::Gone { reason });
                    }
                }
                Next::Own(mine) => {
                    drop(state);
                    let these: Vec<Arc<Share>> =
                        mine.iter().map(|share| Arc::clone(&shares[*share])).collect();
                    let answers = own.compute(&these)?;
                    state = shared.state();
                    for (share, answer) in mine.into_iter().zip(answers) {
                        // One that is here from an assistant that was taken for lost has the same bits.
                        state.answers[share] = Some((answer, None));
                        state.leader.handle_own(share);
                    }
                }
                Next::Wait { until_ms } => {
                    let wait = Duration::from_millis(until_ms.saturating_sub(now_ms));
                    let waited = shared.changed.wait_timeout(state, wait);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                }
                Next::Again => {
                    state.answers.clear();
                    return Ok(None);
                }
                Next::Done if checked => break,
                Next::Done => {
                    checked = true;
                    let assisted = state.assisted();
                    let Some(drawn) = shared.config.drawn(state.leader.round(), assisted.len()) else {
                        break;
                    };
                    let share = assisted[drawn];
                    drop(state);
                    let again = own.compute(std::slice::from_ref(&shares[share]))?.pop();
                    state = shared.state();
                    state.compare(share, again.expect("one answer for each share"));
                }
            }
        }
        if shares.first().is_some_and(|share| share.task == Task::Gradients) {
            state.assisted = state.assisted().len();
        }
        let answers = std::mem::take(&mut state.answers);
        state.leader.end();
        Ok(Some(answers.into_iter().map(|answer| answer.expect("every share is done").0).collect()))
    }
}
