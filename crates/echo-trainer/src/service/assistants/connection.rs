//! One assistant's stream, from its first frame to its end.

use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use lattica_net::{FrameError, Stream};
use swarm_wire::PeerId;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::frames::{payload, receive, send};
use super::{Connection, ORDERS, Order, Shared, Weights};
use crate::averaging::wire::{Answered, Frame, encode_share};
use crate::averaging::{Exclusion, Hash, answer_values, check};

/// How long the first frame may take, and the last one's writing, with what is on its way before it.
const GREETING: Duration = Duration::from_secs(10);
/// Weights that may be on their way to one assistant that has not confirmed them. The last place is kept for those that a share needs.
const SENT_MAX: usize = 8;

/// A stream that the end of the run waits for.
struct Attended(Arc<Shared>);

impl Attended {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.attended.send_modify(|streams| *streams += 1);
        Self(Arc::clone(shared))
    }
}

impl Drop for Attended {
    fn drop(&mut self) {
        self.0.attended.send_modify(|streams| *streams -= 1);
    }
}

/// Serves the assistant at the other end until one of both has enough. Counted at once, so that the run does not end before one that
/// is being greeted was told so; strangers are not waited for.
pub(super) fn attend(shared: Arc<Shared>, peer: PeerId, stream: Stream) -> impl Future<Output = ()> + Send {
    let attended = shared.config.peers.contains(&peer).then(|| Attended::new(&shared));
    async move {
        let _attended = attended;
        let (reader, mut writer) = tokio::io::split(stream);
        let mut reader = BufReader::new(reader);
        if let Err(reason) = greet(&shared, &peer, &mut reader, &mut writer).await {
            tracing::info!(%peer, reason, "an assistant was refused");
            let end = Frame::End { finished: shared.state().finished, reason };
            let _ = timeout(GREETING, last(&mut writer, &end)).await;
            return;
        }
        serve(&shared, &peer, &mut reader, &mut writer, GREETING).await;
    }
}

/// Serves an assistant that was let in. Once its end is ordered, it has `grace` to take what is on its way, and the end.
async fn serve(
    shared: &Shared,
    peer: &PeerId,
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    grace: Duration,
) {
    let (number, todo, ended) = register(shared, peer);
    let weights = shared.weights.subscribe();
    let mut writing = Box::pin(write(shared, peer, number, writer, todo, weights));
    let overdue = async {
        let _ = ended.await;
        tokio::time::sleep(grace).await;
    };
    let (why, silent) = tokio::select! {
        why = &mut writing => (why, true),
        why = read(shared, peer, number, reader) => (why, false),
        () = overdue => (gone("it does not take its end".to_owned()), true),
    };
    tracing::info!(%peer, %why, "an assistant's stream ends");
    {
        let mut state = shared.state();
        // Otherwise the peer has a newer stream, or is out, and this stream's end is ordered.
        if state.connection(peer, number).is_some() {
            state.end(peer, false, why.to_string());
            state.leader.exclude(peer, why);
        }
    }
    shared.changed.notify_all();
    if !silent {
        let _ = timeout(grace, writing).await;
    }
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
        return Err(format!("it is out until the learner is started again: {why}"));
    }
    let settings = serde_json::to_vec(&config.trainer).map_err(|e| e.to_string())?;
    let welcome = Frame::Welcome { run: config.run, settings };
    send(writer, &welcome, &[]).await.map_err(|e| e.to_string())
}

/// From now on orders go to this stream; an older one of the same peer ends. When the run is over, so does this one. Its number, what
/// is ordered of it, and when its end is.
fn register(shared: &Shared, peer: &PeerId) -> (u64, mpsc::Receiver<Order>, oneshot::Receiver<()>) {
    let (orders, todo) = mpsc::channel(ORDERS);
    let (ended, when_ended) = oneshot::channel();
    let mut state = shared.state();
    state.end(peer, false, "it joined again".to_owned());
    state.leader.exclude(peer, gone("it joined again".to_owned()));
    state.n_connections += 1;
    let number = state.n_connections;
    let connection = Connection { number, orders, ended, job: None, sent: VecDeque::new() };
    state.connections.insert(peer.clone(), connection);
    if state.finished {
        // The others were told while it was being greeted.
        state.end(peer, true, String::new());
    }
    (number, todo, when_ended)
}

/// Says what is ordered, and the newest weights; why it stopped.
async fn write(
    shared: &Shared,
    peer: &PeerId,
    number: u64,
    writer: &mut (impl AsyncWrite + Unpin),
    mut orders: mpsc::Receiver<Order>,
    mut newest: watch::Receiver<Option<Arc<Weights>>>,
) -> Exclusion {
    let mut sent = None;
    newest.mark_changed();
    loop {
        let (weights, work) = tokio::select! {
            // An end comes before weights that nobody needs any more, and a share before newer ones than its own.
            biased;
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
            match announce(shared, peer, number, &weights, work.is_some()) {
                Ok(true) => sent = Some(weights.hash),
                Ok(false) => continue,
                Err(why) => return why,
            }
            let frame = Frame::Weights { version: weights.version, hash: weights.hash };
            if let Err(why) = send_in_time(shared, writer, &frame, &weights.payload).await {
                return why;
            }
        }
        if let Some((attempt, share)) = work {
            let bytes = match encode_share(&share) {
                Ok(bytes) => bytes,
                Err(error) => return gone(format!("its share cannot be sent: {error}")),
            };
            if let Err(why) = send_in_time(shared, writer, &Frame::Work(attempt), &bytes).await {
                return why;
            }
        }
    }
}

/// Says what must be taken in the time that an answer may take: who takes nothing keeps old weights here. Not cancel safe.
async fn send_in_time(
    shared: &Shared,
    writer: &mut (impl AsyncWrite + Unpin),
    frame: &Frame,
    payload: &[u8],
) -> Result<(), Exclusion> {
    let patience = shared.config.patience;
    match timeout(patience, send(writer, frame, payload)).await {
        Ok(sent) => sent.map_err(|error| gone(error.to_string())),
        Err(_) => Err(gone(format!("it did not take {} bytes within {patience:?}", payload.len()))),
    }
}

/// Notes that weights are sent, because a share needs them or because they are new. False when they are not to be sent: new ones wait
/// until a share needs them where many are not confirmed, and on a stream whose end is ordered nothing matters but that.
///
/// # Errors
/// Too many are not confirmed.
fn announce(
    shared: &Shared,
    peer: &PeerId,
    number: u64,
    weights: &Weights,
    needed: bool,
) -> Result<bool, Exclusion> {
    let mut state = shared.state();
    let Some(connection) = state.connection(peer, number) else { return Ok(false) };
    let places = if needed { SENT_MAX } else { SENT_MAX - 1 };
    if connection.sent.len() < places {
        connection.sent.push_back(weights.hash);
        return Ok(true);
    }
    // It need not be more than slow.
    if needed { Err(gone("it does not confirm weights".to_owned())) } else { Ok(false) }
}

fn gone(reason: String) -> Exclusion {
    Exclusion::Gone { reason }
}

/// Of a stream that has lost its place: what it says does not count.
fn replaced() -> Exclusion {
    gone("another stream took its place, or it is out".to_owned())
}

fn protocol(reason: &str) -> Exclusion {
    Exclusion::Protocol { reason: reason.to_owned() }
}

/// A frame that nothing follows.
async fn last(writer: &mut (impl AsyncWrite + Unpin), frame: &Frame) -> std::io::Result<()> {
    send(writer, frame, &[]).await?;
    writer.shutdown().await
}

/// Takes what the assistant says; why it is no longer listened to.
async fn read(
    shared: &Shared,
    peer: &PeerId,
    number: u64,
    reader: &mut (impl AsyncRead + Unpin),
) -> Exclusion {
    loop {
        let frame = match receive(reader).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return gone("it hung up".to_owned()),
            Err(error) => return broken(&error),
        };
        let outcome = match frame {
            (Frame::Held { hash }, 0) => held(shared, peer, number, hash),
            (Frame::Answer(answered), announced) => {
                answer(shared, peer, number, reader, answered, announced).await
            }
            (Frame::End { reason, .. }, 0) => Err(gone(reason)),
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
        FrameError::Io(error) => gone(error.to_string()),
        error => protocol(&error.to_string()),
    }
}

/// Compares the weights that the assistant holds with those that it was sent; from then on it can be asked.
fn held(shared: &Shared, peer: &PeerId, number: u64, hash: Hash) -> Result<(), Exclusion> {
    let mut state = shared.state();
    let connection = state.connection(peer, number).ok_or_else(replaced)?;
    match connection.sent.pop_front() {
        Some(sent) if sent != hash => Err(Exclusion::OtherWeights),
        // Those that were there before hold newer weights now and go on as they were.
        Some(_) if state.leader.knows(peer) => Ok(()),
        Some(_) => state.leader.join(peer),
        None => Err(protocol("it holds weights that nobody sent")),
    }
}

/// Takes an answer in, when it is one.
async fn answer(
    shared: &Shared,
    peer: &PeerId,
    number: u64,
    reader: &mut (impl AsyncRead + Unpin),
    answered: Answered,
    announced: u64,
) -> Result<(), Exclusion> {
    let (asked, job) = {
        let mut state = shared.state();
        let job = state.connection(peer, number).ok_or_else(replaced)?.job.take();
        let asked = state.leader.asked(peer).zip(job);
        asked.ok_or_else(|| protocol("an answer that nobody asked for"))?
    };
    let needed = 4 * answer_values(&job.share, &job.lengths);
    if announced != needed as u64 {
        return Err(Exclusion::Size { got: announced, needed: needed as u64 });
    }
    let bytes = payload(reader, announced, needed).await.map_err(|error| broken(&error))?;
    // Millions of numbers, of a whole model.
    let checked = tokio::task::spawn_blocking(move || {
        let reply = answered.with(&bytes)?;
        check(reply, asked, &job.share, job.weights, &job.lengths)
    });
    let answer = checked.await.expect("a check does not panic")?;
    let mut state = shared.state();
    // In the meantime the peer may have come with another stream, and been asked for the same share there.
    state.connection(peer, number).ok_or_else(replaced)?;
    if state.leader.handle_answer(peer, asked) {
        state.answers[asked.share] = Some((answer, Some(peer.clone())));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use swarm_wire::{PolicyVersion, RunId};

    use super::super::{AssistantsConfig, Job};
    use super::*;
    use crate::averaging::wire::encode_reply;
    use crate::averaging::{Attempt, Next, Reply};
    use crate::config::TrainerConfig;
    use crate::packing::pack;
    use crate::shares::{Answer, Part, Share, Task};
    use crate::step::tests::sample;

    fn shared() -> Shared {
        Shared::new(AssistantsConfig {
            peers: Vec::new(),
            run: RunId(1),
            base_model_id: String::new(),
            trainer: TrainerConfig::default(),
            patience: Duration::from_secs(60),
            check: 0.0,
            secret: 0,
        })
    }

    fn peer() -> PeerId {
        PeerId::from_ed25519(&[1; 32])
    }

    fn weights(version: u8) -> Arc<Weights> {
        Arc::new(Weights {
            version: PolicyVersion(version.into()),
            hash: [version; 32],
            lengths: [1_usize].into(),
            payload: Bytes::new(),
        })
    }

    /// Two rows.
    fn share() -> Arc<Share> {
        let batch = pack(&[sample(&[0, 1, 2], 1, 0.5)]).unwrap();
        Arc::new(Share { task: Task::Logprobs, parts: vec![Part { batch, plan: None }], total_tokens: 2 })
    }

    /// Another stream of the peer's, and what is ordered of it.
    fn stream(shared: &Shared) -> (u64, mpsc::Receiver<Order>) {
        let (number, todo, _) = register(shared, &peer());
        (number, todo)
    }

    /// More than the other end's buffers take.
    fn large() -> Arc<Weights> {
        let payload = Bytes::from(vec![0; 1 << 16]);
        Arc::new(Weights {
            version: PolicyVersion(1),
            hash: [1; 32],
            lengths: [1_usize << 14].into(),
            payload,
        })
    }

    #[tokio::test]
    async fn a_stream_that_was_replaced_confirms_nothing_for_the_new_one() {
        let (shared, peer, held) = (shared(), peer(), weights(1));
        let (old, _old_todo) = stream(&shared);
        let (new, _new_todo) = stream(&shared);
        assert_eq!(announce(&shared, &peer, new, &held, false), Ok(true));
        assert_eq!(announce(&shared, &peer, old, &weights(2), true), Ok(false), "only its end is said");
        let mut said: Vec<u8> = Vec::new();
        send(&mut said, &Frame::Held { hash: held.hash }, &[]).await.unwrap();
        assert_eq!(read(&shared, &peer, old, &mut &said[..]).await, replaced());
        assert!(!shared.state().leader.knows(&peer));
        assert_eq!(read(&shared, &peer, new, &mut &said[..]).await, gone("it hung up".to_owned()));
        assert!(shared.state().leader.knows(&peer), "what it was sent is what it confirms");
    }

    #[tokio::test]
    async fn an_answer_on_a_stream_that_was_replaced_does_not_count_for_the_new_one() {
        let (shared, peer, share, held) = (shared(), peer(), share(), weights(1));
        {
            let mut state = shared.state();
            state.leader.begin(0, 2);
            state.answers = vec![None; 2];
        }
        let ask = |number: u64| {
            let mut state = shared.state();
            state.leader.join(&peer).unwrap();
            let lengths = Arc::clone(&held.lengths);
            let job = Job { share: Arc::clone(&share), weights: held.hash, lengths };
            state.connection(&peer, number).unwrap().job = Some(job);
            let Next::Ask { attempt, .. } = state.leader.next(0, 1) else { panic!("it is not asked") };
            attempt
        };
        let (old, _old_todo) = stream(&shared);
        let asked = ask(old);
        let answer = Answer::Logprobs(vec![-1.0, -2.0]);
        let (frame, values) = encode_reply(&Reply::new(asked, held.hash, answer.clone()));
        let mut said: Vec<u8> = Vec::new();
        send(&mut said, &frame, &values).await.unwrap();

        // The peer comes again in the middle of its answer, and is asked for the same share.
        let (mut here, mut there) = tokio::io::duplex(1024);
        let again = async {
            let (begun, rest) = said.split_at(said.len() - 3);
            there.write_all(begun).await.unwrap();
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            let taken = shared.state().connection(&peer, old).unwrap().job.is_none();
            assert!(taken, "the answer has begun");
            let new = stream(&shared);
            assert_eq!(ask(new.0), asked);
            there.write_all(rest).await.unwrap();
            new
        };
        let (why, (new, _new_todo)) = tokio::join!(read(&shared, &peer, old, &mut here), again);
        assert_eq!(why, replaced());
        {
            let state = shared.state();
            assert_eq!(state.leader.asked(&peer), Some(asked), "the new stream still owes it");
            assert!(state.answers[1].is_none());
        }
        assert_eq!(read(&shared, &peer, new, &mut &said[..]).await, gone("it hung up".to_owned()));
        let mut state = shared.state();
        assert_eq!(state.answers[1], Some((answer, Some(peer.clone()))));
        assert!(state.connection(&peer, new).unwrap().job.is_none(), "nothing is kept for it");
    }

    #[tokio::test]
    async fn who_is_slow_to_confirm_weights_is_sent_them_only_for_a_share() {
        let (shared, peer) = (shared(), peer());
        let (number, todo) = stream(&shared);
        for version in 1..8 {
            assert_eq!(announce(&shared, &peer, number, &weights(version), false), Ok(true));
        }
        shared.weights.send_replace(Some(weights(8)));
        let mut written: Vec<u8> = Vec::new();
        let newest = shared.weights.subscribe();
        let mut writing = Box::pin(write(&shared, &peer, number, &mut written, todo, newest));
        tokio::select! {
            biased;
            why = &mut writing => panic!("new weights end it: {why}"),
            () = std::future::ready(()) => {}
        }
        let attempt = |step| Attempt { step, round: step, share: 1 };
        for version in [8_u8, 9] {
            let attempt = attempt(version.into());
            let work = Order::Work { attempt, share: share(), weights: weights(version) };
            shared.state().connections[&peer].orders.try_send(work).unwrap();
        }
        let why = timeout(GREETING, writing).await.expect("it ends");
        assert_eq!(why, gone("it does not confirm weights".to_owned()));
        // The first share, and its weights.
        let mut reader = &written[..];
        let first = receive(&mut reader).await.unwrap();
        assert_eq!(first, Some((Frame::Weights { version: PolicyVersion(8), hash: [8; 32] }, 0)));
        let (second, n_bytes) = receive(&mut reader).await.unwrap().unwrap();
        assert_eq!((second, n_bytes), (Frame::Work(attempt(8)), reader.len() as u64));
    }

    #[tokio::test]
    async fn whose_end_is_ordered_does_not_keep_weights_here_by_taking_nothing() {
        let (shared, peer, held) = (shared(), peer(), large());
        shared.weights.send_replace(Some(Arc::clone(&held)));
        let (here, _there) = tokio::io::duplex(64);
        let (mut reader, mut writer) = tokio::io::split(here);
        let ending = async {
            let sending = || shared.state().connections.get(&peer).is_some_and(|c| !c.sent.is_empty());
            while !sending() {
                tokio::task::yield_now().await;
            }
            shared.state().end(&peer, false, "it is slow".to_owned());
        };
        let serving = serve(&shared, &peer, &mut reader, &mut writer, Duration::ZERO);
        let both = async { tokio::join!(serving, ending) };
        timeout(GREETING, both).await.expect("it ends");
        assert_eq!(Arc::strong_count(&held), 2, "held here, and the newest");
    }

    #[tokio::test]
    async fn who_does_not_take_weights_in_time_is_gone() {
        let (mut shared, peer) = (shared(), peer());
        shared.config.patience = Duration::ZERO;
        shared.weights.send_replace(Some(large()));
        let (number, todo) = stream(&shared);
        let (mut here, _there) = tokio::io::duplex(64);
        let newest = shared.weights.subscribe();
        let writing = write(&shared, &peer, number, &mut here, todo, newest);
        let why = timeout(GREETING, writing).await.expect("it is given up");
        assert_eq!(why, gone("it did not take 65536 bytes within 0ns".to_owned()));
    }

    #[tokio::test]
    async fn who_is_let_in_when_the_run_is_over_is_told_so() {
        let (shared, peer) = (shared(), peer());
        shared.state().finished = true;
        shared.weights.send_replace(Some(weights(1)));
        let (number, todo) = stream(&shared);
        let mut written: Vec<u8> = Vec::new();
        let newest = shared.weights.subscribe();
        let writing = write(&shared, &peer, number, &mut written, todo, newest);
        timeout(GREETING, writing).await.expect("it ends");
        let said = receive(&mut &written[..]).await.unwrap();
        assert_eq!(said, Some((Frame::End { finished: true, reason: String::new() }, 0)));
        assert!(shared.state().connections.is_empty());
    }
}
