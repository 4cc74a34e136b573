//! The models that clients train: one queue and one worker each, one step of work at a time for all of them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use parallax_model::train::{LoraConfig, TrainModel, TrainOptions};
use prost::Message as _;
use serde_json::json;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Inner;
use super::datum::Batch;
use super::model::{ModelError, Passed, Trained};
use super::order::{Ordered, Place};
use super::promises::Outcome;
use super::proto::{ArrayRecord, BatchedTensor, DType, ForwardBackwardOutput, bytes_of};
use super::sampling::forget;
use super::sessions::Refused;
use super::store::{LoraSpec, SavedPath, StoreError};
use crate::optim::OptimConfig;

/// One thing to do with a model.
#[derive(Debug)]
pub(super) enum Job {
    /// Make it, from this seed.
    Create { seed: u64 },
    /// Take up saved weights, with the optimiser's moments or without; make the model if there is none.
    Load { path: SavedPath, optimiser: bool },
    /// Forward, and backward.
    Pass(Box<Batch>),
    /// Move the weights.
    Step(OptimConfig),
    /// Save weights and moments.
    Save { path: SavedPath, overwrite: bool },
    /// Save an adapter to sample from, under a name or for one sampling session.
    SaveSampler { path: SavedPath, session: Option<String> },
}

#[derive(Debug)]
pub(super) struct Queued {
    pub(super) promise: String,
    pub(super) job: Job,
}

/// A model and what is asked of it.
#[derive(Debug)]
pub(super) struct ModelSlot {
    pub(super) id: String,
    pub(super) session: String,
    pub(super) lora: LoraSpec,
    queue: Mutex<Ordered<Queued>>,
    wake: Notify,
}

impl ModelSlot {
    pub(super) fn new(id: String, session: String, lora: LoraSpec, max_queued: usize) -> Self {
        let queue = Mutex::new(Ordered::new(max_queued));
        Self { id, session, lora, queue, wake: Notify::new() }
    }

    fn queue(&self) -> MutexGuard<'_, Ordered<Queued>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What would become of request `seq`.
    pub(super) fn place(&self, seq: u64) -> Place {
        self.queue().place(seq)
    }

    /// Queues request `seq`; `None` was refused, and those behind it do not wait for it.
    pub(super) fn offer(&self, seq: u64, queued: Option<Queued>) -> Place {
        let place = self.queue().offer(seq, queued);
        self.wake.notify_one();
        place
    }

    /// Nothing more is done; what waits fails.
    pub(super) fn close(&self) {
        self.queue().close();
        self.wake.notify_one();
    }
}

/// What a worker keeps of its model.
#[derive(Default)]
struct State {
    model: Option<Trained<TrainModel>>,
    /// Adapters that were saved for one session each, oldest first.
    unnamed: VecDeque<SavedPath>,
}

/// Why a job failed.
#[derive(Debug, thiserror::Error)]
enum JobError {
    #[error("the model could not be made, or was lost; create it again from saved weights")]
    NoModel,
    #[error("making the model: {reason}")]
    Make { reason: String },
    #[error("{path} was saved with {got:?}, this model has {wanted:?}")]
    OtherLora { path: String, got: LoraSpec, wanted: LoraSpec },
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the sampling session: {0}")]
    Sampler(#[from] Refused),
}

impl JobError {
    fn outcome(&self) -> Outcome {
        let user = match self {
            Self::NoModel | Self::OtherLora { .. } | Self::Sampler(Refused::NoSession) => true,
            Self::Make { .. } | Self::Sampler(Refused::NoRoom) => false,
            Self::Model(error) => error.is_users(),
            Self::Store(error) => error.is_users(),
        };
        Outcome::Failed { message: self.to_string(), user }
    }
}

/// Works for one model until it is closed or the gateway is gone.
pub(super) async fn work(slot: Arc<ModelSlot>, gateway: Weak<Inner>) {
    let mut state = State::default();
    // How long a request that is missing is waited for, whatever else comes meanwhile.
    let mut patience: Option<Instant> = None;
    loop {
        let (next, gap, left) = {
            let mut queue = slot.queue();
            let left = queue.left();
            (if left.is_none() { queue.pop() } else { None }, queue.has_gap(), left)
        };
        let Some(inner) = gateway.upgrade() else { return };
        if let Some(left) = left {
            let message = format!("model {} has ended with its session", slot.id);
            left.into_iter().for_each(|q| {
                inner.promises.keep(&q.promise, Outcome::Failed { message: message.clone(), user: true });
            });
            // Their samplers end with the session.
            let busy = Arc::clone(&inner);
            let tidied = tokio::task::spawn_blocking(move || drop_unnamed(&busy, &mut state, 0));
            return tidied.await.expect("removing files does not panic");
        }
        match next {
            Some(Queued { promise, job }) => {
                patience = None;
                let _turn = inner.training.acquire().await.expect("nobody closes it");
                let (slot, busy) = (Arc::clone(&slot), Arc::clone(&inner));
                let done = tokio::task::spawn_blocking(move || {
                    let outcome = run(&busy, &slot, &mut state, job).unwrap_or_else(|e| e.outcome());
                    (state, outcome)
                });
                let outcome;
                (state, outcome) = done.await.unwrap_or_else(|_| {
                    let message = "this server has a bug: the model was lost".to_owned();
                    (State::default(), Outcome::Failed { message, user: false })
                });
                inner.promises.keep(&promise, outcome);
            }
            None => {
                let until = *patience.get_or_insert_with(|| Instant::now() + inner.config.gap_timeout);
                drop(inner);
                let wake = slot.wake.notified();
                if !gap {
                    patience = None;
                    wake.await;
                } else if tokio::time::timeout_at(until, wake).await.is_err() {
                    tracing::warn!(model = slot.id, "a request was lost on its way; those behind it go on");
                    slot.queue().skip_gap();
                    patience = None;
                }
            }
        }
    }
}

fn make(inner: &Inner, lora: LoraSpec, seed: u64) -> Result<Trained<TrainModel>, JobError> {
    let attention = ["q_proj", "k_proj", "v_proj", "o_proj"].into_iter().filter(|_| lora.attention);
    let mlp = ["gate_proj", "up_proj", "down_proj"].into_iter().filter(|_| lora.mlp);
    // All that there are may be more than these.
    let all = lora.attention && lora.mlp;
    let targets = if all { Vec::new() } else { attention.chain(mlp).map(str::to_owned).collect() };
    let (rank, alpha, base_dtype) = (lora.rank, inner.config.lora_alpha, inner.config.base_dtype);
    let lora = LoraConfig { rank, alpha, targets, seed, base_dtype };
    let made =
        TrainModel::from_checkpoint(&inner.checkpoint, &TrainOptions { lora: Some(lora), full: false });
    let policy = made.map_err(|e| JobError::Make { reason: e.to_string() })?;
    Ok(Trained::new(policy, inner.config.micro_batch_tokens)?)
}

fn run(inner: &Inner, slot: &ModelSlot, state: &mut State, job: Job) -> Result<Outcome, JobError> {
    match job {
        Job::Create { seed } => {
            state.model = Some(make(inner, slot.lora, seed)?);
            return Ok(Outcome::Json(json!({"type": "create_model", "model_id": slot.id})));
        }
        Job::Load { path, optimiser } => {
            let (saved, weights) = inner.store.load_state(&path)?;
            if saved.lora != slot.lora {
                let (path, got, wanted) = (path.to_string(), saved.lora, slot.lora);
                return Err(JobError::OtherLora { path, got, wanted });
            }
            let model = match &mut state.model {
                Some(model) => model,
                none => none.insert(make(inner, slot.lora, 0)?),
            };
            model.restore(&weights, optimiser.then_some(saved.steps))?;
            let path = path.to_string();
            return Ok(Outcome::Json(json!({"type": "load_weights", "path": path, "model_id": slot.id})));
        }
        _ => {}
    }
    let model = state.model.as_mut().ok_or(JobError::NoModel)?;
    match job {
        Job::Pass(batch) => {
            let passed = model.pass(&batch)?;
            Ok(Outcome::Proto(encode(&passed).into()))
        }
        Job::Step(config) => {
            let report = model.step(config)?;
            let metrics = json!({"grad_norm": report.grad_norm, "learning_rate": config.learning_rate});
            Ok(Outcome::Json(json!({"metrics": metrics})))
        }
        Job::Save { path, overwrite } => {
            inner.store.save_state(&path, &model.state()?, slot.lora, model.steps(), overwrite)?;
            Ok(Outcome::Json(json!({"type": "save_weights", "path": path.to_string()})))
        }
        Job::SaveSampler { path, session } => {
            let adapter = model.policy().adapter().ok_or(JobError::NoModel)?;
            inner.store.save_adapter(&path, &adapter, slot.lora)?;
            // What the sampler has under this name is not what is saved now.
            let mut resident = inner.resident.blocking_lock();
            forget(inner, &mut resident, &path);
            drop(resident);
            let Some(session) = session else {
                let path = path.to_string();
                return Ok(Outcome::Json(json!({"type": "save_weights_for_sampler", "path": path})));
            };
            if !state.unnamed.contains(&path) {
                state.unnamed.push_back(path.clone());
            }
            drop_unnamed(inner, state, inner.config.unnamed_kept);
            inner.open_sampler(&slot.session, &session, Some(path))?;
            Ok(Outcome::Json(json!({"type": "save_weights_for_sampler", "sampling_session_id": session})))
        }
        Job::Create { .. } | Job::Load { .. } => unreachable!("made above"),
    }
}

/// Removes the oldest adapters without a name until `kept` are left.
fn drop_unnamed(inner: &Inner, state: &mut State, kept: usize) {
    while state.unnamed.len() > kept {
        let oldest = state.unnamed.pop_front().expect("more than are kept");
        match inner.store.delete(&oldest) {
            // A client may have deleted it.
            Ok(()) | Err(StoreError::Unknown { .. }) => {}
            Err(error) => tracing::warn!(%error, path = %oldest, "an adapter stays on disk"),
        }
    }
}

/// The answer to a pass, in which the rows of all sequences are one after the other.
fn encode(passed: &Passed) -> Vec<u8> {
    let rows = || passed.logprobs.iter();
    let ends = rows().scan(0_i64, |end, logprobs| {
        *end += 4 * logprobs.len() as i64;
        Some(*end)
    });
    let logprobs = BatchedTensor {
        data: bytes_of(rows().flatten().copied(), f32::to_le_bytes),
        offsets: bytes_of(std::iter::once(0).chain(ends), i64::to_le_bytes),
        dtype: DType::Float32.into(),
        trailing_shape: Vec::new(),
    };
    let record = ArrayRecord {
        type_tag: "ArrayRecord".to_owned(),
        fields: [("logprobs".to_owned(), logprobs)].into(),
        num_datums: passed.logprobs.len() as i64,
    };
    let metrics = [("loss:sum", passed.loss), ("trained_tokens:sum", passed.trained_tokens as f64)];
    ForwardBackwardOutput {
        loss_fn_output_type: "ArrayRecord".to_owned(),
        loss_fn_outputs: vec![record],
        metrics: metrics.map(|(name, value)| (name.to_owned(), value)).into(),
    }
    .encode_to_vec()
}
