//! One assistant's stream, from its first frame to its end.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use lattica_net::{FrameError, Stream};
use swarm_wire::PeerId;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use super::frames::{payload, receive, send};
use super::{Connection, ORDERS, Order, Shared, Weights};
use crate::averaging::wire::{Answered, Frame, encode_share};
use crate::averaging::{Exclusion, answer_values, check};

/// How long the first frame, and the last one's writing, may take.
const GREETING: Duration = Duration::from_secs(10);
/// Weights that may be on their way to one assistant that has not confirmed them.
const SENT_MAX: usize = 8;

/// Serves the assistant at the other end until one of both has enough.
pub(super) async fn attend(shared: Arc<Shared>, peer: PeerId, stream: Stream) {
    let (reader, mut writer) = tokio::io::split(stream);
    let mut reader = BufReader::new(reader);
    if let Err(reason) = greet(&shared, &peer, &mut reader, &mut writer).await {
        tracing::info!(%peer, reason, "an assistant was refused");
        let end = Frame::End { finished: shared.state().finished, reason };
        let _ = timeout(GREETING, last(&mut writer, &end)).await;
        return;
    }
    shared.attended.send_modify(|streams| *streams += 1);
    let (orders, todo) = mpsc::channel(ORDERS);
    let number = register(&shared, &peer, orders.clone());
    let weights = shared.weights.subscribe();
    let mut writing = Box::pin(write(&shared, &peer, &mut writer, todo, weights));
    let (why, silent) = tokio::select! {
        gone = &mut writing => (gone, true),
        why = read(&shared, &peer, &mut reader) => (why, false),
    };
    tracing::info!(%peer, %why, "an assistant's stream ends");
    {
        let mut state = shared.state();
        // Otherwise the peer has a newer stream, or is out.
        if state.connections.get(&peer).is_some_and(|connection| connection.number == number) {
            state.connections.remove(&peer);
            state.leader.exclude(&peer, why.clone());
        }
    }
    shared.changed.notify_all();
    if !silent {
        let _ = orders.try_send(Order::End { finished: false, reason: why.to_string() });
        let _ = timeout(GREETING, writing).await;
    }
    shared.attended.send_modify(|streams| *streams -= 1);
}

/// Lets the peer in, or says why not.
async fn greet(
    shared: &Shared,
    peer: &PeerId,
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<(), String> {
    let greeting = timeout(GREETING, receive(reader)).await;
    let base_model_id = match greeting.map_err(|_| "it says nothing".to_owned())? {
        Ok(Some((Frame::Hello { base_model_id }, 0))) => base_model_id,
        Ok(_) => return Err("its first frame is no greeting".to_owned()),
        Err(error) => return Err(error.to_string()),
    };
    let config = &shared.config;
    if !config.peers.contains(peer) {
        return Err(format!("the learner's settings do not name {peer} in run.assistants"));
    }
    if base_model_id != config.base_model_id {
        return Err(format!(
            "the learner trains another model: {}, not {base_model_id}",
            config.base_model_id
        ));
    }
    let dismissed = shared.state().leader.dismissed(peer).map(ToString::to_string);
    if let Some(why) = dismissed {
        return Err(format!("it is out for this run: {why}"));
    }
    let settings = serde_json::to_vec(&config.trainer).map_err(|e| e.to_string())?;
    let welcome = Frame::Welcome { run: config.run, settings };
    send(writer, &welcome, &[]).await.map_err(|e| e.to_string())
}

/// From now on orders go to this stream; an older one of the same peer ends.
fn register(shared: &Shared, peer: &PeerId, orders: mpsc::Sender<Order>) -> u64 {
    let mut state = shared.state();
    state.end(peer, false, "it joined again".to_owned());
    state.leader.exclude(peer, Exclusion::Gone { reason: "it joined again".to_owned() });
    state.n_connections += 1;
    let number = state.n_connections;
    let connection = Connection { number, orders, job: None, sent: VecDeque::new() };
    state.connections.insert(peer.clone(), connection);
    number
}

/// Says what is ordered, and the newest weights; why it stopped.
async fn write(
    shared: &Shared,
    peer: &PeerId,
    writer: &mut (impl AsyncWrite + Unpin),
    mut orders: mpsc::Receiver<Order>,
    mut newest: watch::Receiver<Option<Arc<Weights>>>,
) -> Exclusion {
    let gone = |reason: String| Exclusion::Gone { reason };
    let mut sent = None;
    newest.mark_changed();
    loop {
        let (weights, work) = tokio::select! {
            order = orders.recv() => match order {
                Some(Order::Work { attempt, share, weights }) => (Some(weights), Some((attempt, share))),
                Some(Order::End { finished, reason }) => {
                    let said = last(writer, &Frame::End { finished, reason: reason.clone() }).await;
                    return gone(said.map_or_else(|e| e.to_string(), |()| reason));
                }
                None => return gone("nobody needs it".to_owned()),
            },
            changed = newest.changed() => match changed {
                Ok(()) => (newest.borrow_and_update().clone(), None),
                Err(_) => return gone("the learner has ended".to_owned()),
            },
        };
        if let Some(weights) = weights.filter(|weights| sent != Some(weights.hash)) {
            sent = Some(weights.hash);
            if !announce(shared, peer, &weights) {
                return Exclusion::Protocol { reason: "it does not confirm weights".to_owned() };
            }
            let frame = Frame::Weights { version: weights.version, hash: weights.hash };
            if let Err(error) = send(writer, &frame, &weights.payload).await {
                return gone(error.to_string());
            }
        }
        if let Some((attempt, share)) = work {
            let bytes = match encode_share(&share) {
                Ok(bytes) => bytes,
                Err(error) => return gone(format!("its share cannot be sent: {error}")),
            };
            if let Err(error) = send(writer, &Frame::Work(attempt), &bytes).await {
                return gone(error.to_string());
            }
        }
    }
}

/// Notes that weights are sent; false when too many are not confirmed.
fn announce(shared: &Shared, peer: &PeerId, weights: &Weights) -> bool {
    let mut state = shared.state();
    let Some(connection) = state.connections.get_mut(peer) else { return true };
    connection.sent.push_back(weights.hash);
    connection.sent.len() <= SENT_MAX
}

/// A frame that nothing follows.
async fn last(writer: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> std::io::Result<()> {
    send(writer, frame, &[]).await?;
    writer.shutdown().await
}

/// Takes what the assistant says; why it is no longer listened to.
async fn read(shared: &Shared, peer: &PeerId, reader: &mut (impl AsyncRead + Unpin)) -> Exclusion {
    let protocol = |reason: &str| Exclusion::Protocol { reason: reason.to_owned() };
    loop {
        let frame = match receive(reader).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Exclusion::Gone { reason: "it hung up".to_owned() },
            Err(error) => return broken(&error),
        };
        let outcome = match frame {
            (Frame::Held { hash }, 0) => {
                let mut state = shared.state();
                let confirmed = state.connections.get_mut(peer).and_then(|c| c.sent.pop_front());
                match confirmed {
                    Some(sent) if sent == hash => {
                        // Those that were there before hold newer weights now and go on as they were.
                        if state.leader.knows(peer) { Ok(()) } else { state.leader.join(peer) }
                    }
                    Some(_) => Err(Exclusion::OtherWeights),
                    None => Err(protocol("it holds weights that nobody sent")),
                }
            }
            (Frame::Answer(answered), announced) => answer(shared, peer, reader, answered, announced).await,
            (Frame::End { reason, .. }, 0) => Err(Exclusion::Gone { reason }),
            _ => Err(protocol("a frame that is the learner's")),
        };
        shared.changed.notify_all();
        if let Err(why) = outcome {
            return why;
        }
    }
}

fn broken(error: &FrameError) -> Exclusion {
    match error {
        FrameError::Io(error) => Exclusion::Gone { reason: error.to_string() },
        error => Exclusion::Protocol { reason: error.to_string() },
    }
}

/// Takes an answer in, when it is one.
async fn answer(
    shared: &Shared,
    peer: &PeerId,
    reader: &mut (impl AsyncRead + Unpin),
    answered: Answered,
    announced: u64,
) -> Result<(), Exclusion> {
    let asked = {
        let state = shared.state();
        let job = state.connections.get(peer).and_then(|connection| connection.job.clone());
        state.leader.asked(peer).zip(job)
    };
    let Some((asked, (share, weights))) = asked else {
        return Err(Exclusion::Protocol { reason: "an answer that nobody asked for".to_owned() });
    };
    let needed = 4 * answer_values(&share, &weights.lengths);
    if announced != needed as u64 {
        return Err(Exclusion::Size { got: announced, needed: needed as u64 });
    }
    let bytes = payload(reader, announced, needed).await.map_err(|error| broken(&error))?;
    // Millions of numbers, of a whole model.
    let checked = tokio::task::spawn_blocking(move || {
        let reply = answered.with(&bytes)?;
        check(reply, asked, &share, weights.hash, &weights.lengths)
    });
    let answer = checked.await.expect("a check does not panic")?;
    let mut state = shared.state();
    if state.leader.handle_answer(peer, asked) {
        state.answers[asked.share] = Some((answer, Some(peer.clone())));
    }
    Ok(())
}
