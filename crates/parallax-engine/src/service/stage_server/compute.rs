//! The thread that owns the runner: one job after the other, in the order of arrival.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use swarm_wire::generated::parallax::v1::{
    StageAdapter, StageAdapterDone, StageError as WireError, StageStep, stage_frame,
};
use swarm_wire::{DType, DecodeError, PeerId, PolicyVersion, TensorHeader};
use tokio::sync::mpsc;

use super::StageStats;
use super::frame::{EncodedFrame, ReceivedFrame};
use super::steps::StepDecoder;
use crate::adapter_file::AdapterFile;
use crate::batch::{StageOutput, Tensor};
use crate::stage::StageRunner;

/// What the thread is asked to do.
pub(super) enum Job {
    /// A stream from the stage before begins: its page tables are new, its results go to `out`.
    Open { stream_id: u64, out: mpsc::Sender<EncodedFrame> },
    /// A frame of that stream.
    Frame { stream_id: u64, frame: ReceivedFrame },
    /// Give the runner back.
    Stop,
}

pub(super) struct Worker {
    runner: Box<dyn StageRunner>,
    peer: PeerId,
    /// Results are logits for the head.
    last: bool,
    kv: (u32, u32),
    stats: Arc<StageStats>,
}

struct OpenStream {
    stream_id: u64,
    out: mpsc::Sender<EncodedFrame>,
    tables: StepDecoder,
}

/// What went wrong with a step, as text for the head.
type StepResult = Result<EncodedFrame, String>;

impl Worker {
    pub(super) fn new(
        runner: Box<dyn StageRunner>,
        peer: PeerId,
        last: bool,
        kv: (u32, u32),
        stats: Arc<StageStats>,
    ) -> Self {
        Self { runner, peer, last, kv, stats }
    }

    pub(super) fn run(mut self, mut queue: mpsc::Receiver<Job>) -> Box<dyn StageRunner> {
        let mut current: Option<OpenStream> = None;
        while let Some(job) = queue.blocking_recv() {
            match job {
                Job::Stop => break,
                Job::Open { stream_id, out } => {
                    let tables = StepDecoder::new(self.kv.0, self.kv.1);
                    current = Some(OpenStream { stream_id, out, tables });
                }
                Job::Frame { stream_id, frame } => {
                    // Frames of a stream that was replaced have nobody who waits for them.
                    let Some(open) = current.as_mut().filter(|open| open.stream_id == stream_id) else {
                        continue;
                    };
                    let result = self.frame(&mut open.tables, &frame);
                    if open.out.blocking_send(result).is_err() {
                        current = None;
                    }
                }
            }
        }
        self.runner
    }

    fn frame(&mut self, tables: &mut StepDecoder, frame: &ReceivedFrame) -> EncodedFrame {
        let (step_id, result) = match &frame.kind {
            stage_frame::Kind::Step(step) => (step.step_id, self.step(tables, step, frame)),
            stage_frame::Kind::Adapter(adapter) => (adapter.step_id, self.adapter(*adapter, frame)),
            // An earlier stage failed: the head wants to know.
            stage_frame::Kind::Error(error) => {
                return EncodedFrame::new(stage_frame::Kind::Error(error.clone()));
            }
            other => (0, Err(format!("unexpected frame {other:?}"))),
        };
        result.unwrap_or_else(|message| {
            let layers = self.runner.shape().layers;
            EncodedFrame::new(stage_frame::Kind::Error(WireError {
                step_id,
                peer: self.peer.as_bytes().to_vec().into(),
                layers_start: layers.start(),
                layers_end: layers.end(),
                message,
            }))
        })
    }

    fn step(&mut self, tables: &mut StepDecoder, step: &StageStep, frame: &ReceivedFrame) -> StepResult {
        let text = |e: DecodeError| e.to_string();
        let batch = tables.decode(step).map_err(text)?;
        let (header, payload) = frame.tensor().map_err(text)?;
        let n_rows = batch.n_rows();
        let rows = header.shape().first().copied().unwrap_or(0);
        if rows != n_rows {
            return Err(format!("the tensor has {rows} rows but the step has {n_rows}"));
        }
        let input = Tensor::new(header.dtype(), header.shape(), payload).map_err(|e| e.to_string())?;
        let started = Instant::now();
        let output = self.runner.forward(&batch, input).map_err(|e| e.to_string())?;
        if n_rows == 1 {
            self.stats.measure_decode(started.elapsed(), self.runner.shape().layers.len());
        }
        if self.last { answer(step, batch.n_wanted(), &output) } else { self.pass_on(step, n_rows, &output) }
    }

    /// The same step with this stage's rows, for the next stage.
    fn pass_on(&self, step: &StageStep, n_rows: usize, output: &StageOutput) -> StepResult {
        let hidden = output.hidden.as_ref().ok_or("the stage returned no hidden rows")?;
        let frame = hidden_frame(step.clone(), hidden)?;
        self.stats.count_sent(&frame, n_rows);
        Ok(frame)
    }

    fn adapter(&mut self, adapter: StageAdapter, frame: &ReceivedFrame) -> StepResult {
        let file = (!frame.tail.is_empty()).then(|| AdapterFile::new(&frame.tail[..]));
        let StageAdapter { step_id, version, resident } = adapter;
        match (resident, &file) {
            (0, file) => {
                self.runner.set_adapter(PolicyVersion(version), file.as_ref()).map_err(|e| e.to_string())?;
            }
            (id, Some(file)) => self.runner.add_adapter(id, file).map_err(|e| e.to_string())?,
            (id, None) => self.runner.remove_adapter(id),
        }
        Ok(if self.last {
            EncodedFrame::new(stage_frame::Kind::AdapterDone(StageAdapterDone { step_id, version }))
        } else {
            EncodedFrame::with_bytes(stage_frame::Kind::Adapter(adapter), &frame.tail)
        })
    }
}

/// A step with a tensor of T rows behind it.
pub(crate) fn hidden_frame(step: StageStep, rows: &Tensor) -> StepResult {
    let header = TensorHeader::new(rows.dtype(), rows.shape()).map_err(|e| e.to_string())?;
    Ok(EncodedFrame::with_tensor(stage_frame::Kind::Step(step), &header, &rows.data()))
}

/// The answer of the last stage: final-norm rows [W, H] (where wanted) and then logits [W, V], as one flat tensor.
fn answer(step: &StageStep, n_wanted: usize, output: &StageOutput) -> StepResult {
    let bytes = |tensor: Option<&Tensor>| tensor.map(Tensor::data).unwrap_or_default();
    let hidden = if step.want_hidden { bytes(output.hidden.as_ref()) } else { Bytes::new() };
    let logits = bytes(output.logits.as_ref());
    let hidden_rows = if hidden.is_empty() { 0 } else { u32::try_from(n_wanted).unwrap_or(u32::MAX) };
    let payload = [hidden, logits].concat();
    let header = TensorHeader::new(DType::F32, &[payload.len() / 4]).map_err(|e| e.to_string())?;
    let reply = StageStep { step_id: step.step_id, hidden_rows, ..StageStep::default() };
    Ok(EncodedFrame::with_tensor(stage_frame::Kind::Step(reply), &header, &payload))
}
