//! One stage behind the network: takes batches from the stage before (or the head), computes its layers in order, and
//! sends the hidden rows straight on to the next stage, or the logits back to the head.
//!
//! One assignment is active at a time. A stream that belongs to another epoch, or comes from a peer that is not the one
//! before us, is refused: that is what keeps results of an older pipeline out of a newer one.

mod compute;
pub mod frame;
pub mod steps;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lattica_net::{Node, Stream, StreamError};
use swarm_wire::generated::parallax::v1::{Assignment, StageHello, stage_frame};
use swarm_wire::{DecodeError, LayerRange, PeerId};
use tokio::io::{AsyncReadExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};

use crate::stage::StageRunner;
use compute::Job;
pub(crate) use compute::hidden_frame;
use frame::{EncodedFrame, STAGE_PROTOCOL, read_frame};

/// Batches that wait for the compute thread; the stream stops being read beyond.
const QUEUE: usize = 4;
/// How long the first frame of a stream, or the activation that it waits for, may take.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Counters of one stage, for heartbeats and reports.
#[derive(Debug, Default)]
pub struct StageStats {
    sent_bytes: AtomicU64,
    sent_payload_bytes: AtomicU64,
    sent_tokens: AtomicU64,
    /// Nanoseconds of one layer for one token, smoothed; 0 before the first measurement.
    decode_ns_per_layer: AtomicU64,
}

impl StageStats {
    /// Bytes of frames with hidden rows that were sent on so far, with all headers.
    pub fn sent_bytes(&self) -> u64 {
        self.sent_bytes.load(Ordering::Relaxed)
    }

    /// Of these, the rows themselves.
    pub fn sent_payload_bytes(&self) -> u64 {
        self.sent_payload_bytes.load(Ordering::Relaxed)
    }

    /// Rows in these frames.
    pub fn sent_tokens(&self) -> u64 {
        self.sent_tokens.load(Ordering::Relaxed)
    }

    /// Milliseconds of one layer for one token, measured in steps of one row.
    pub fn decode_ms_per_layer(&self) -> Option<f64> {
        let ns = self.decode_ns_per_layer.load(Ordering::Relaxed);
        (ns > 0).then(|| ns as f64 / 1e6)
    }

    /// Counts a frame that carries hidden rows to another process.
    pub fn count_sent(&self, frame: &EncodedFrame, n_tokens: usize) {
        self.sent_bytes.fetch_add(frame.wire_bytes() as u64, Ordering::Relaxed);
        self.sent_payload_bytes.fetch_add(frame.payload_bytes as u64, Ordering::Relaxed);
        self.sent_tokens.fetch_add(n_tokens as u64, Ordering::Relaxed);
    }

    /// Takes in the duration of a step of one row over this many layers.
    pub fn measure_decode(&self, step: Duration, n_layers: u32) {
        let ns = (step.as_nanos() / u128::from(n_layers.max(1))).min(u128::from(u64::MAX)) as u64;
        let old = self.decode_ns_per_layer.load(Ordering::Relaxed);
        let new = if old == 0 { ns } else { old - old / 8 + ns / 8 };
        self.decode_ns_per_layer.store(new.max(1), Ordering::Relaxed);
    }
}

/// What is active: who may send, where results go, and the thread that computes.
#[derive(Clone)]
struct Active {
    epoch: u64,
    stage_index: u32,
    previous: PeerId,
    next: PeerId,
    next_addrs: Vec<String>,
    next_index: u32,
    jobs: mpsc::Sender<Job>,
}

/// Hosts one stage on a node. A cheap handle.
#[derive(Clone)]
pub struct StageServer {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for StageServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StageServer").field("node", &self.inner.node.peer_id()).finish_non_exhaustive()
    }
}

struct Inner {
    node: Node,
    active: watch::Sender<Option<Active>>,
    thread: Mutex<Option<std::thread::JoinHandle<Box<dyn StageRunner>>>>,
    stats: Arc<StageStats>,
    next_stream: AtomicU64,
}

impl StageServer {
    /// Accepts streams of stages on `node` from now on; they wait until a stage is activated.
    ///
    /// # Errors
    /// When the node refuses the protocol.
    pub fn start(node: &Node) -> Result<Self, StreamError> {
        let inner = Arc::new(Inner {
            node: node.clone(),
            active: watch::Sender::new(None),
            thread: Mutex::new(None),
            stats: Arc::default(),
            next_stream: AtomicU64::new(0),
        });
        let weak = Arc::downgrade(&inner);
        node.handle_stream(STAGE_PROTOCOL, move |peer, stream| {
            let weak = weak.clone();
            async move {
                if let Some(inner) = weak.upgrade()
                    && let Err(error) = inner.serve(&peer, stream).await
                {
                    tracing::warn!(peer = %peer.short(), %error, "stage stream ended");
                }
            }
        })?;
        Ok(Self { inner })
    }

    /// Counters.
    pub fn stats(&self) -> Arc<StageStats> {
        Arc::clone(&self.inner.stats)
    }

    /// Runs `runner` as `assignment` says, until [`StageServer::deactivate`].
    ///
    /// # Errors
    /// When the assignment names no valid peers or other layers than the runner holds, or no thread can be had.
    pub fn activate(
        &self,
        assignment: &Assignment,
        runner: Box<dyn StageRunner>,
    ) -> Result<(), StageServerError> {
        let layers = LayerRange::new(assignment.layers_start, assignment.layers_end)?;
        if runner.shape().layers != layers {
            return Err(StageServerError::WrongLayers { assigned: layers, loaded: runner.shape().layers });
        }
        let next_index =
            if assignment.next_is_head { assignment.n_stages } else { assignment.stage_index + 1 };
        let (jobs, queue) = mpsc::channel(QUEUE);
        let active = Active {
            epoch: assignment.epoch,
            stage_index: assignment.stage_index,
            previous: PeerId::from_bytes(&assignment.previous_peer)?,
            next: PeerId::from_bytes(&assignment.next_peer)?,
            next_addrs: assignment.next_addrs.clone(),
            next_index,
            jobs,
        };
        let worker = compute::Worker::new(
            runner,
            self.inner.node.peer_id(),
            assignment.next_is_head,
            (assignment.kv_pages, assignment.kv_page_tokens),
            self.stats(),
        );
        let thread = std::thread::Builder::new()
            .name("stage".to_owned())
            .spawn(move || worker.run(queue))
            .map_err(StageServerError::Thread)?;
        *self.thread() = Some(thread);
        self.inner.active.send_replace(Some(active));
        Ok(())
    }

    /// Ends the active stage, if any, and gives its runner back; streams of that stage break.
    pub async fn deactivate(&self) -> Option<Box<dyn StageRunner>> {
        let active = self.inner.active.send_replace(None)?;
        // A thread that is gone already needs no word.
        let _ = active.jobs.send(Job::Stop).await;
        let thread = self.thread().take()?;
        tokio::task::spawn_blocking(move || thread.join().ok()).await.ok()?
    }

    fn thread(&self) -> std::sync::MutexGuard<'_, Option<std::thread::JoinHandle<Box<dyn StageRunner>>>> {
        self.inner.thread.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a stage could not be activated or a stream not be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StageServerError {
    /// The peer sent something that makes no sense.
    #[error(transparent)]
    Malformed(#[from] DecodeError),
    /// The stream to or from a neighbour broke.
    #[error(transparent)]
    Frame(#[from] frame::FrameError),
    /// The next stage cannot be reached.
    #[error("next stage {next} with index {index}: {source}")]
    Next {
        /// Who.
        next: PeerId,
        /// Its place in the pipeline.
        index: u32,
        /// Why.
        source: StreamError,
    },
    /// The next stage closed its stream.
    #[error("next stage {next} with index {index} is gone: {reason}")]
    NextGone {
        /// Who.
        next: PeerId,
        /// Its place in the pipeline.
        index: u32,
        /// How that was noticed.
        reason: String,
    },
    /// The sender is not the stage before this one, or speaks of another epoch.
    #[error("peer {peer} is not the stage before this one in epoch {epoch}")]
    NotOurs {
        /// Who.
        peer: PeerId,
        /// What it claimed.
        epoch: u64,
    },
    /// No first frame in time.
    #[error("peer {peer} opened a stage stream and said nothing")]
    Silent {
        /// Who.
        peer: PeerId,
    },
    /// The runner holds other layers than were assigned.
    #[error("layers {assigned} are assigned but {loaded} are loaded")]
    WrongLayers {
        /// What the head wants.
        assigned: LayerRange,
        /// What is there.
        loaded: LayerRange,
    },
    /// The operating system gave no thread.
    #[error("no thread for the stage: {0}")]
    Thread(std::io::Error),
}

impl Inner {
    async fn serve(&self, peer: &PeerId, stream: Stream) -> Result<(), StageServerError> {
        let (read, _write) = tokio::io::split(stream);
        let mut reader = BufReader::new(read);
        let silent = |_| StageServerError::Silent { peer: peer.clone() };
        let first = tokio::time::timeout(HELLO_TIMEOUT, read_frame(&mut reader)).await.map_err(silent)??;
        let Some(stage_frame::Kind::Hello(hello)) = first.map(|f| f.kind) else {
            return Err(DecodeError::invalid("first frame", "not a hello").into());
        };
        let mut active = self.active.subscribe();
        let mine = active.wait_for(|a| a.as_ref().is_some_and(|a| a.epoch >= hello.epoch));
        let mine = tokio::time::timeout(HELLO_TIMEOUT, mine).await;
        let mine = mine.ok().and_then(|a| a.ok().and_then(|a| a.clone()));
        let Some(mine) = mine
            .filter(|a| a.epoch == hello.epoch && a.stage_index == hello.stage_index && a.previous == *peer)
        else {
            return Err(StageServerError::NotOurs { peer: peer.clone(), epoch: hello.epoch });
        };
        let (back, down) = self.open_next(&mine).await?;
        tokio::select! {
            result = self.pump(&mine, &mut reader, down) => result,
            gone = next_is_gone(&mine, back) => Err(gone),
            _ = active.wait_for(|a| a.as_ref().is_none_or(|a| a.epoch != mine.epoch)) => Ok(()),
        }
    }

    /// Opens the stream onwards and introduces us.
    async fn open_next(
        &self,
        mine: &Active,
    ) -> Result<(ReadHalf<Stream>, WriteHalf<Stream>), StageServerError> {
        let failed =
            |source| StageServerError::Next { next: mine.next.clone(), index: mine.next_index, source };
        let connected = self.node.peers().iter().any(|p| p.peer == mine.next && p.connected);
        if !connected {
            for addr in &mine.next_addrs {
                match self.node.dial(addr).await {
                    Ok(_) => break,
                    Err(error) => tracing::debug!(%addr, %error, "next stage does not answer here"),
                }
            }
        }
        let stream = self.node.open_stream(&mine.next, STAGE_PROTOCOL).await.map_err(failed)?;
        let (back, mut down) = tokio::io::split(stream);
        let hello = StageHello { epoch: mine.epoch, stage_index: mine.next_index };
        let hello = EncodedFrame::new(stage_frame::Kind::Hello(hello));
        hello.write(&mut down).await.map_err(frame::FrameError::from)?;
        Ok((back, down))
    }

    /// Frames in, jobs to the thread, frames out, until either side ends.
    async fn pump(
        &self,
        mine: &Active,
        reader: &mut BufReader<ReadHalf<Stream>>,
        mut down: WriteHalf<Stream>,
    ) -> Result<(), StageServerError> {
        let stream_id = self.next_stream.fetch_add(1, Ordering::Relaxed);
        let (out, mut results) = mpsc::channel::<EncodedFrame>(QUEUE);
        // The thread is gone only when the stage was deactivated: then this stream ends, too.
        if mine.jobs.send(Job::Open { stream_id, out }).await.is_err() {
            return Ok(());
        }
        let write = async {
            while let Some(frame) = results.recv().await {
                frame.write(&mut down).await.map_err(frame::FrameError::from)?;
            }
            Ok(())
        };
        let read = async {
            while let Some(frame) = read_frame(reader).await? {
                if mine.jobs.send(Job::Frame { stream_id, frame }).await.is_err() {
                    break;
                }
            }
            Ok(())
        };
        tokio::select! { done = write => done, done = read => done }
    }
}

/// Nothing ever comes back on the stream onwards: its end is how a dead neighbour shows.
async fn next_is_gone(mine: &Active, mut back: ReadHalf<Stream>) -> StageServerError {
    let mut byte = [0u8; 1];
    let reason = match back.read(&mut byte).await {
        Ok(0) => "it closed the stream".to_owned(),
        Ok(_) => "it sent bytes against the direction of the pipeline".to_owned(),
        Err(error) => error.to_string(),
    };
    StageServerError::NextGone { next: mine.next.clone(), index: mine.next_index, reason }
}
