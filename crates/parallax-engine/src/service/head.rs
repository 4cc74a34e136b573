//! The head's end of a pipeline over peers: a [`StageRunner`] whose layers run elsewhere.
//!
//! [`Head`] keeps a pipeline formed: for every plan of the membership it loads its own layers (if it has any), waits
//! until all stages are ready, and opens the streams to the first remote stage and from the last. [`PipelineRunner`] is
//! what the engine drives: it runs the head's own layers, sends the rows on, and waits for the logits. When a stage dies
//! the plan's epoch changes, which ends the wait at once with an error that names the peer and its layers; until a new
//! pipeline stands, every batch is refused with what is missing.

mod adapters;
mod forming;
mod link;
mod own_stage;
mod staging;
mod status;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lattica_net::{Node, StreamError};
use parallax_sched::service::MembershipServer;
use swarm_wire::generated::parallax::v1::{StageStep, stage_frame};
use swarm_wire::{Cid, DType, LayerRange, PolicyVersion, RequestId};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::adapter_file::AdapterFile;
use crate::batch::{Batch, StageOutput, Tensor};
use crate::error::StageError;
use crate::service::EngineHandle;
use crate::service::stage_server::StageStats;
use crate::service::stage_server::frame::{EncodedFrame, ReceivedFrame};
use crate::service::stage_server::steps::StepEncoder;
use crate::stage::{LogSoftmax, Recovery, StageRunner, StageShape};
use forming::{form_forever, watch_idleness};
use link::Link;
use own_stage::OwnStage;
use staging::Next;
pub use staging::StageWeightsError;

/// Loads the runner of a range of layers at the head itself; blocking.
pub type StageLoader = Arc<dyn Fn(LayerRange) -> Result<Box<dyn StageRunner>, String> + Send + Sync>;

/// How long a broken stream waits for the membership to say who died, before everybody starts over.
const BLAME_WAIT: Duration = Duration::from_millis(1600);

/// What the head needs to know beside the membership.
#[derive(Clone)]
pub struct HeadOptions {
    /// The whole model: layers `0..n_layers`, and the cache pages that every stage has.
    pub shape: StageShape,
    /// The model's log-softmax.
    pub log_softmax: LogSoftmax,
    /// Loads the head's own layers; `None` when it takes part with none.
    pub local: Option<StageLoader>,
    /// How long one step may take before the pipeline counts as stuck.
    pub step_timeout: Duration,
}

impl std::fmt::Debug for HeadOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeadOptions").field("shape", &self.shape).finish_non_exhaustive()
    }
}

/// Keeps a pipeline formed; dropping it ends that.
#[derive(Debug)]
pub struct Head {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

/// A version and its adapter; none is the base model.
type WantedAdapter = (PolicyVersion, Option<AdapterFile>);

#[derive(Clone)]
enum State {
    Forming(String),
    Ready(Arc<Link>),
}

struct Shared {
    node: Node,
    membership: MembershipServer,
    shape: StageShape,
    log_softmax: LogSoftmax,
    step_timeout: Duration,
    state: watch::Sender<State>,
    /// A pipeline has stood before.
    formed: AtomicBool,
    own: Arc<OwnStage>,
    /// Held by whoever replaces the weights.
    staging: Arc<tokio::sync::Mutex<()>>,
    /// The adapter that stages must have, once one was asked for.
    adapter: Mutex<Option<WantedAdapter>>,
    stats: Arc<StageStats>,
    expected_return: Mutex<Option<link::ExpectedReturn>>,
    /// Milliseconds since `started` of the newest batch.
    last_batch_ms: AtomicU64,
    started: Instant,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("shape", &self.shape).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Head {
    /// Forms pipelines for the plans of `membership` from now on; the runner is for the engine.
    ///
    /// # Errors
    /// When the node refuses the stage protocol.
    pub fn start(
        node: &Node,
        membership: MembershipServer,
        options: HeadOptions,
    ) -> Result<(Self, PipelineRunner), StreamError> {
        let HeadOptions { shape, log_softmax, local, step_timeout } = options;
        let shared = Arc::new(Shared {
            node: node.clone(),
            membership,
            shape,
            log_softmax,
            step_timeout,
            state: watch::Sender::new(State::Forming("the swarm has just started".to_owned())),
            formed: AtomicBool::new(false),
            own: Arc::new(OwnStage::new(local)),
            staging: Arc::default(),
            adapter: Mutex::new(None),
            stats: Arc::default(),
            expected_return: Mutex::new(None),
            last_batch_ms: AtomicU64::new(0),
            started: Instant::now(),
        });
        link::accept_returns(&shared)?;
        let tasks = vec![
            tokio::spawn(form_forever(Arc::clone(&shared))),
            tokio::spawn(watch_idleness(Arc::clone(&shared))),
        ];
        let runner = PipelineRunner::new(Arc::clone(&shared), None);
        Ok((Self { shared, tasks }, runner))
    }

    /// Whether requests can be served, perhaps once others have taken the place of a lost stage; otherwise what is missing.
    ///
    /// # Errors
    /// The reason, for people.
    pub fn ready(&self) -> Result<(), String> {
        self.shared.ready()
    }

    /// A function for [`Head::ready`] that outlives this handle.
    pub fn readiness(&self) -> Arc<dyn Fn() -> Result<(), String> + Send + Sync> {
        let shared = Arc::clone(&self.shared);
        Arc::new(move || shared.ready())
    }

    /// Waits until requests can be served. Safe to drop.
    pub async fn until_ready(&self) {
        let mut state = self.shared.state.subscribe();
        // The sender lives in `shared`, so this ends with the state wanted.
        let _ = state.wait_for(|state| matches!(state, State::Ready(_))).await;
    }

    /// The layers that the head runs itself at the moment.
    pub fn own_layers(&self) -> Option<LayerRange> {
        self.shared.own.layers()
    }

    /// The root of the published weights that are served, if they are published.
    pub fn weights_root(&self) -> Option<Cid> {
        swarm_wire::cid::decode(&self.shared.membership.description().weights_root).ok()
    }

    /// The report of `parallax status`: nodes, pipelines, and why it does or does not serve. `engine` drives the runner of this head
    /// and knows which pages are free; they are the same on every stage.
    pub fn status(&self, engine: &EngineHandle) -> serde_json::Value {
        status::status(&self.shared, engine)
    }

    /// A function for [`Head::status`] that outlives this handle.
    pub fn status_source(&self, engine: &EngineHandle) -> Arc<dyn Fn() -> serde_json::Value + Send + Sync> {
        let (shared, engine) = (Arc::clone(&self.shared), engine.clone());
        Arc::new(move || status::status(&shared, &engine))
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Shared {
    fn ready(&self) -> Result<(), String> {
        match &*self.state.borrow() {
            State::Ready(_) => Ok(()),
            State::Forming(_) if self.formed.load(Ordering::Relaxed) && self.has_plan() => Ok(()),
            State::Forming(why) => Err(why.clone()),
        }
    }

    fn has_plan(&self) -> bool {
        self.membership.read(|c| c.view().plan.is_ok())
    }

    fn forming(&self) {
        self.state.send_replace(State::Forming(self.membership.read(parallax_sched::Coordinator::why)));
    }
}

/// The whole model as one runner; its layers run at the head and at peers.
#[derive(Debug)]
pub struct PipelineRunner {
    shared: Arc<Shared>,
    runtime: tokio::runtime::Handle,
    /// What it serves once it has taken over.
    next: Option<Next>,
    /// The epoch whose stages know what the encoder says they know.
    link_epoch: Option<u64>,
    adapter_sent: Option<PolicyVersion>,
    /// The resident adapters, for stages that come later.
    residents: BTreeMap<u32, AdapterFile>,
    /// Those that the stages of this epoch have.
    residents_sent: BTreeSet<u32>,
    /// Those that some of them may still have.
    residents_gone: BTreeSet<u32>,
    /// The epoch in whose stages the cached pages are.
    pages_epoch: Option<u64>,
    encoder: StepEncoder,
    next_step: u64,
}

impl StageRunner for PipelineRunner {
    fn shape(&self) -> StageShape {
        self.shared.shape
    }

    fn forward(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
        let now_ms = u64::try_from(self.shared.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.shared.last_batch_ms.store(now_ms.max(1), Ordering::Relaxed);
        let link = self.link()?;
        let continues = batch.sequences.iter().any(|s| s.start > 0) || !batch.copies.is_empty();
        if self.pages_epoch.replace(link.epoch) != Some(link.epoch) && continues {
            return Err(self.lost(&link, "the pipeline was rebuilt, its cached pages are gone"));
        }
        let (rows, n_layers) = match link.local {
            Some(layers) => (self.run_local(batch, input)?, Some(layers)),
            None => (StageOutput { hidden: Some(input), logits: None }, None),
        };
        if link.remote.is_none() {
            return Ok(rows);
        }
        let tensor = rows.hidden.ok_or_else(|| StageError::Forward {
            layers: n_layers.map_or_else(String::new, |l| l.to_string()),
            reason: "the head's own stage returned no hidden rows".to_owned(),
        })?;
        self.next_step += 1;
        let step_id = self.next_step;
        let step = self.encoder.encode(step_id, batch);
        let frame = crate::service::stage_server::hidden_frame(step, &tensor)
            .map_err(|reason| StageError::Forward { layers: "head".to_owned(), reason })?;
        if n_layers.is_some() {
            self.shared.stats.count_sent(&frame, batch.n_rows());
        }
        let reply = self.exchange(&link, frame, step_id)?;
        self.output(batch, &reply)
    }

    fn set_adapter(
        &mut self,
        version: PolicyVersion,
        adapter: Option<&AdapterFile>,
    ) -> Result<(), StageError> {
        adapters::check_size(adapter.map_or(0, |file| file.len()))
            .map_err(|reason| StageError::Adapter { version, reason })?;
        let wanted = (version, adapter.cloned());
        let old = lock(&self.shared.adapter).replace(wanted);
        self.adapter_sent = None;
        // Taking up the link brings its stages to the wanted adapter.
        let sent = self.link().map(|_| ());
        if sent.is_err() {
            // Some stages may have taken it up: the next step brings all of them back, at first to the base model.
            *lock(&self.shared.adapter) = Some(old.unwrap_or((PolicyVersion(0), None)));
        }
        sent
    }

    fn add_adapter(&mut self, id: u32, adapter: &AdapterFile) -> Result<(), StageError> {
        let fits = if adapter.is_empty() {
            Err("it is empty".to_owned())
        } else {
            adapters::check_size(adapter.len())
        };
        fits.map_err(|reason| StageError::Unfit { reason: format!("the adapter does not fit: {reason}") })?;
        self.residents.insert(id, adapter.clone());
        if self.next.is_some() {
            // The stages of the pipeline to come get it with their first link.
            return Ok(());
        }
        // Taking up the link brings it to the stages.
        let sent = self.link().map(|_| ());
        if sent.is_err() {
            self.remove_adapter(id);
        }
        sent
    }

    /// The stages hear of it before the next step.
    fn remove_adapter(&mut self, id: u32) {
        self.residents.remove(&id);
        self.residents_sent.remove(&id);
        self.residents_gone.insert(id);
    }

    fn remove_adapters(&mut self) {
        for id in self.residents.keys().copied().collect::<Vec<_>>() {
            self.remove_adapter(id);
        }
    }

    fn take_over(&mut self) {
        if let Some(next) = self.next.take() {
            self.runtime.block_on(next.adopt());
        }
    }

    fn generation(&self) -> u64 {
        match &*self.shared.state.borrow() {
            State::Ready(link) => link.epoch,
            State::Forming(_) => self.pages_epoch.unwrap_or_default(),
        }
    }

    fn recovery(&self) -> Recovery {
        match &*self.shared.state.borrow() {
            _ if !self.shared.has_plan() => Recovery::None,
            State::Forming(_) => Recovery::Pending,
            State::Ready(_) => Recovery::Done,
        }
    }

    fn log_softmax(&self) -> LogSoftmax {
        self.shared.log_softmax
    }

    fn close(&mut self, request: RequestId) {
        self.encoder.release(request);
    }
}

impl PipelineRunner {
    fn new(shared: Arc<Shared>, next: Option<Next>) -> Self {
        Self {
            shared,
            runtime: tokio::runtime::Handle::current(),
            next,
            link_epoch: None,
            adapter_sent: None,
            residents: BTreeMap::new(),
            residents_sent: BTreeSet::new(),
            residents_gone: BTreeSet::new(),
            pages_epoch: None,
            encoder: StepEncoder::default(),
            next_step: 0,
        }
    }

    /// The pipeline that stands, with stages that have the right adapter and know no old sequence.
    fn link(&mut self) -> Result<Arc<Link>, StageError> {
        let link = match &*self.shared.state.borrow() {
            State::Ready(link) => Arc::clone(link),
            State::Forming(why) => return Err(StageError::NotReady { reason: why.clone() }),
        };
        if self.link_epoch != Some(link.epoch) {
            self.encoder = StepEncoder::default();
            self.link_epoch = Some(link.epoch);
            self.adapter_sent = None;
            // Members begin an epoch without adapters; so does the head's own stage.
            if let Some(runner) = self.shared.own.runner().as_mut() {
                runner.remove_adapters();
            }
            self.residents_sent.clear();
            self.residents_gone.clear();
        }
        let wanted = lock(&self.shared.adapter).clone();
        if let Some(wanted) = wanted.filter(|wanted| self.adapter_sent != Some(wanted.0)) {
            self.send_adapter(&link, &wanted)?;
        }
        while let Some(&id) = self.residents_gone.first() {
            self.send_resident(&link, id, None)?;
            self.residents_gone.remove(&id);
        }
        let unsent = |(id, _): &(&u32, &AdapterFile)| !self.residents_sent.contains(id);
        let missing: Vec<(u32, AdapterFile)> =
            self.residents.iter().filter(unsent).map(|(id, file)| (*id, file.clone())).collect();
        for (id, file) in missing {
            self.send_resident(&link, id, Some(&file))?;
            self.residents_sent.insert(id);
        }
        Ok(link)
    }

    fn run_local(&mut self, batch: &Batch, input: Tensor) -> Result<StageOutput, StageError> {
        let mut own = self.shared.own.runner();
        let runner =
            own.as_mut().ok_or_else(|| StageError::NotReady { reason: "the head is loading".to_owned() })?;
        let started = Instant::now();
        let output = runner.forward(batch, input)?;
        if batch.n_rows() == 1 {
            self.shared.stats.measure_decode(started.elapsed(), runner.shape().layers.len());
        }
        Ok(output)
    }

    /// Sends a frame and waits for its answer, for a loss, or for the deadline.
    fn exchange(
        &self,
        link: &Arc<Link>,
        frame: EncodedFrame,
        step_id: u64,
    ) -> Result<ReceivedFrame, StageError> {
        let mut state = self.shared.state.subscribe();
        let timeout = self.shared.step_timeout;
        self.runtime.block_on(async {
            let over = state.wait_for(|state| !matches!(state, State::Ready(now) if now.epoch == link.epoch));
            tokio::select! {
                biased;
                answer = link.exchange(frame, step_id) => match answer {
                    Ok(answer) => Ok(answer),
                    Err(link::ExchangeError::Stage(error)) => Err(error),
                    Err(link::ExchangeError::Broken(reason)) => Err(self.blame(link, reason).await),
                },
                _ = over => Err(self.lost(link, "the pipeline was taken down")),
                () = tokio::time::sleep(timeout) => {
                    let reason = format!("no answer within {timeout:?}");
                    self.shared.membership.rebuild(&reason);
                    Err(self.lost(link, &reason))
                }
            }
        })
    }

    /// A stream broke: the membership soon knows whose.
    async fn blame(&self, link: &Arc<Link>, reason: String) -> StageError {
        let mut plans = self.shared.membership.watch();
        let changed = plans.wait_for(|view| view.epoch != link.epoch);
        let _ = tokio::time::timeout(BLAME_WAIT, changed).await;
        self.lost(link, &reason)
    }

    /// Names the stage of this link's pipeline that is no longer a member, if that is the cause.
    fn lost(&self, link: &Arc<Link>, reason: &str) -> StageError {
        let gone = self.shared.membership.read(|coordinator| {
            let gone = link.stages.iter().find(|stage| coordinator.member(&stage.node).is_none())?;
            Some((gone.clone(), coordinator.last_loss().unwrap_or(reason).to_owned()))
        });
        match gone {
            Some((stage, reason)) => {
                StageError::Lost { peer: stage.node.to_string(), layers: stage.layers.to_string(), reason }
            }
            None => StageError::Lost {
                peer: "unknown".to_owned(),
                layers: link.remote_layers(),
                reason: reason.to_owned(),
            },
        }
    }

    /// Logits [W, V] and final-norm rows [W, H] out of the flat tensor of the last stage.
    fn output(&self, batch: &Batch, reply: &ReceivedFrame) -> Result<StageOutput, StageError> {
        let shape = self.shared.shape;
        let bad = |reason: String| StageError::Forward { layers: "last stage".to_owned(), reason };
        let stage_frame::Kind::Step(StageStep { hidden_rows, .. }) = reply.kind else {
            return Err(bad("answered with another kind of frame".to_owned()));
        };
        let (header, payload) = reply.tensor().map_err(|e| bad(e.to_string()))?;
        let n_wanted = batch.n_wanted();
        let hidden_bytes = hidden_rows as usize * shape.hidden * 4;
        let expected = hidden_bytes + n_wanted * shape.vocab * 4;
        let rows_fit = hidden_rows == 0 || hidden_rows as usize == n_wanted;
        if header.dtype() != DType::F32 || !rows_fit || payload.len() != expected {
            let got = payload.len();
            return Err(bad(format!("answered with {got} bytes where {expected} were expected")));
        }
        let hidden = (hidden_rows > 0)
            .then(|| Tensor::new(DType::F32, &[n_wanted, shape.hidden], payload.slice(..hidden_bytes)))
            .transpose()?;
        let logits = (n_wanted > 0)
            .then(|| Tensor::new(DType::F32, &[n_wanted, shape.vocab], payload.slice(hidden_bytes..)))
            .transpose()?;
        Ok(StageOutput { hidden, logits })
    }
}

#[cfg(test)]
mod tests;
