//! The two streams of one epoch's pipeline: to the first remote stage, and from the last.

use std::sync::{Arc, Weak};
use std::time::Duration;

use lattica_net::{Node, Stream, StreamError};
use parallax_sched::{NodeId, Pipeline, StagePlan};
use swarm_wire::generated::parallax::v1::{StageHello, stage_frame};
use swarm_wire::{LayerRange, PeerId};
use tokio::io::{AsyncReadExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::{Shared, lock};
use crate::error::StageError;
use crate::service::stage_server::frame::{EncodedFrame, ReceivedFrame, STAGE_PROTOCOL, read_frame};

/// Frames that wait to be written, and answers that wait to be taken.
const QUEUE: usize = 8;
/// How long the stream back may take after the stream forth was opened: every stage in between opens one.
const RETURN_TIMEOUT: Duration = Duration::from_secs(10);

/// The stream from the last stage that is being waited for.
pub(super) struct ExpectedReturn {
    epoch: u64,
    n_stages: u32,
    last: PeerId,
    arrived: oneshot::Sender<ReturnStream>,
}

type ReturnStream = (BufReader<ReadHalf<Stream>>, WriteHalf<Stream>);

/// One epoch's pipeline.
pub(super) struct Link {
    pub(super) epoch: u64,
    pub(super) stages: Vec<StagePlan>,
    /// Layers of the head itself.
    pub(super) local: Option<LayerRange>,
    pub(super) remote: Option<Remote>,
}

pub(super) struct Remote {
    to_first: mpsc::Sender<EncodedFrame>,
    answers: Mutex<mpsc::Receiver<ReceivedFrame>>,
    broken: watch::Receiver<Option<String>>,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Remote {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

pub(super) enum ExchangeError {
    /// A stage said that it could not do the step.
    Stage(StageError),
    /// A stream ended.
    Broken(String),
}

/// Takes streams of last stages from now on.
pub(super) fn accept_returns(shared: &Arc<Shared>) -> Result<(), StreamError> {
    let weak: Weak<Shared> = Arc::downgrade(shared);
    shared.node.handle_stream(STAGE_PROTOCOL, move |peer, stream| {
        let weak = weak.clone();
        async move {
            let (read, write) = tokio::io::split(stream);
            let mut reader = BufReader::new(read);
            let first = tokio::time::timeout(RETURN_TIMEOUT, read_frame(&mut reader)).await;
            let Ok(Ok(Some(ReceivedFrame { kind: stage_frame::Kind::Hello(hello), .. }))) = first else {
                tracing::warn!(peer = %peer.short(), "a stage stream began with something else than a hello");
                return;
            };
            let Some(shared) = weak.upgrade() else { return };
            let mut expected = lock(&shared.expected_return);
            let ours = |e: &ExpectedReturn| {
                e.epoch == hello.epoch && e.n_stages == hello.stage_index && e.last == peer
            };
            if !expected.as_ref().is_some_and(ours) {
                tracing::warn!(peer = %peer.short(), epoch = hello.epoch, "a stage stream that nobody waits for");
                return;
            }
            if let Some(expected) = expected.take() {
                // Whoever waited may have given up; then the stream ends here.
                let _ = expected.arrived.send((reader, write));
            }
        }
    })
}

impl Link {
    /// Opens the streams of this pipeline, whose members are all ready.
    pub(super) async fn open(shared: &Arc<Shared>, epoch: u64, pipeline: &Pipeline) -> Result<Self, String> {
        let me = NodeId::from(&shared.node.peer_id());
        let local = pipeline.stage_of(&me).map(|(_, stage)| stage.layers);
        let n_local = usize::from(local.is_some());
        let stages = pipeline.stages.clone();
        let (Some(first), Some(last)) = (stages.get(n_local), stages.last()) else {
            return Ok(Self { epoch, stages, local, remote: None });
        };
        let (first, last) = (peer(&first.node)?, peer(&last.node)?);
        let (arrived, arrival) = oneshot::channel();
        let n_stages = u32::try_from(stages.len()).map_err(|e| e.to_string())?;
        *lock(&shared.expected_return) = Some(ExpectedReturn { epoch, n_stages, last, arrived });
        let forth = open_first(&shared.node, &first, epoch, n_local).await?;
        let back = tokio::time::timeout(RETURN_TIMEOUT, arrival)
            .await
            .map_err(|_| "the last stage opened no stream back".to_owned())?
            .map_err(|_| "another pipeline is being formed".to_owned())?;
        Ok(Self { epoch, stages, local, remote: Some(Remote::start(forth, back)) })
    }

    /// Waits until a stream ends and says which; for ever without remote stages.
    pub(super) async fn until_broken(&self) -> String {
        match &self.remote {
            Some(remote) => remote.until_broken().await,
            None => std::future::pending().await,
        }
    }

    /// Sends a frame and waits for the answer to this step.
    pub(super) async fn exchange(
        &self,
        frame: EncodedFrame,
        step_id: u64,
    ) -> Result<ReceivedFrame, ExchangeError> {
        let remote =
            self.remote.as_ref().ok_or_else(|| ExchangeError::Broken("no remote stage".to_owned()))?;
        if remote.to_first.send(frame).await.is_err() {
            return Err(ExchangeError::Broken(remote.until_broken().await));
        }
        let mut answers = remote.answers.lock().await;
        while let Some(answer) = answers.recv().await {
            match &answer.kind {
                stage_frame::Kind::Error(error) if error.step_id == step_id => {
                    let layers = format!("{}..{}", error.layers_start, error.layers_end);
                    let peer =
                        PeerId::from_bytes(&error.peer).map_or_else(|_| "unknown".to_owned(), |p| p.short());
                    let reason = format!("peer {peer}: {}", error.message);
                    return Err(ExchangeError::Stage(StageError::Forward { layers, reason }));
                }
                stage_frame::Kind::Step(step) if step.step_id == step_id => return Ok(answer),
                stage_frame::Kind::AdapterDone(done) if done.step_id == step_id => return Ok(answer),
                // An answer to a step that was given up.
                _ => {}
            }
        }
        Err(ExchangeError::Broken(remote.until_broken().await))
    }

    /// The layers that run elsewhere, for errors that cannot name one stage.
    pub(super) fn remote_layers(&self) -> String {
        let start = self.local.map_or(0, LayerRange::end);
        self.stages.last().map_or_else(String::new, |last| format!("{start}..{}", last.layers.end()))
    }
}

fn peer(id: &NodeId) -> Result<PeerId, String> {
    id.as_str().parse().map_err(|_| format!("{id} is not a peer id"))
}

async fn open_first(
    node: &Node,
    first: &PeerId,
    epoch: u64,
    index: usize,
) -> Result<(ReadHalf<Stream>, WriteHalf<Stream>), String> {
    let stream = node.open_stream(first, STAGE_PROTOCOL).await.map_err(|e| e.to_string())?;
    let (back, mut forth) = tokio::io::split(stream);
    let stage_index = u32::try_from(index).map_err(|e| e.to_string())?;
    let hello = EncodedFrame::new(stage_frame::Kind::Hello(StageHello { epoch, stage_index }));
    hello.write(&mut forth).await.map_err(|e| e.to_string())?;
    Ok((back, forth))
}

impl Remote {
    fn start((mut forth_back, mut forth): (ReadHalf<Stream>, WriteHalf<Stream>), back: ReturnStream) -> Self {
        let (to_first, mut frames) = mpsc::channel::<EncodedFrame>(QUEUE);
        let (answered, answers) = mpsc::channel(QUEUE);
        let (break_forth, broken) = watch::channel(None);
        let break_back = break_forth.clone();
        let writer = tokio::spawn(async move {
            let mut byte = [0u8; 1];
            let reason = loop {
                tokio::select! {
                    frame = frames.recv() => match frame {
                        None => return,
                        Some(frame) => if let Err(error) = frame.write(&mut forth).await {
                            break format!("stream to the first stage: {error}");
                        },
                    },
                    // Nothing ever comes back here: this is how a dead first stage shows.
                    end = forth_back.read(&mut byte) => break match end {
                        Ok(_) => "the first stage closed its stream".to_owned(),
                        Err(error) => format!("stream to the first stage: {error}"),
                    },
                }
            };
            break_forth.send_replace(Some(reason));
        });
        let reader = tokio::spawn(async move {
            let (mut back, _keep_open) = back;
            let reason = loop {
                match read_frame(&mut back).await {
                    Ok(Some(frame)) => {
                        if answered.send(frame).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => break "the last stage closed its stream".to_owned(),
                    Err(error) => break format!("stream from the last stage: {error}"),
                }
            };
            break_back.send_replace(Some(reason));
        });
        Self { to_first, answers: Mutex::new(answers), broken, tasks: vec![writer, reader] }
    }

    async fn until_broken(&self) -> String {
        let mut broken = self.broken.clone();
        match broken.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or_default(),
            Err(_) => "the streams of the pipeline were closed".to_owned(),
        }
    }
}
