//! A member's life: find the head, join, and run whatever is assigned, until it is told to stop.

mod staging;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use lattica_net::{Node, StreamError};
use parallax_model::{Checkpoint, DeviceKind, KvFormat, LoadOptions};
use parallax_sched::profile::roofline;
use parallax_sched::service::{JoinOptions as SchedJoin, MemberClient, SwarmError, find_head};
use parallax_sched::{MemberState, NodeId, NodeProfile, Report, Staged as StagedReport, wire};
use swarm_wire::generated::parallax::v1 as pb;
use swarm_wire::{DecodeError, LayerRange, PeerId, PolicyVersion};
use tokio::task::JoinHandle;

use super::updates::NoRoom;
use super::{bandwidth_gbps, incarnation_now, load_stage};
use crate::service::stage_server::{StageServer, StageServerError};
use crate::service::weights::{self, WeightExchange, WeightsError};
use crate::stage::StageRunner;
use staging::{Staged, Staging, checkpoint_id, outcome, stage};

/// Reports carry fresh counters at least this often.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// How a member takes part.
#[derive(Debug, Clone)]
pub struct JoinOptions {
    /// Name of the swarm.
    pub swarm: String,
    /// Addresses to look for the head at; otherwise whoever mDNS and the DHT find.
    pub bootstrap: Vec<String>,
    /// Memory for weights and cache.
    pub memory_bytes: u64,
    /// Where to compute.
    pub device: DeviceKind,
    /// Exactly these layers, or none.
    pub pinned: Option<LayerRange>,
    /// A local copy of the model, when there is one.
    pub model: Option<String>,
    /// Where weights from peers are kept.
    pub cache_dir: PathBuf,
    /// How long to look for the head.
    pub patience: Duration,
}

/// What a member tells its operator.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum MemberNews {
    /// The head was found.
    Joined {
        /// Who.
        head: PeerId,
        /// What it serves.
        model: String,
    },
    /// Bytes of weights that have arrived.
    Fetching {
        /// So far.
        done_bytes: u64,
        /// In all.
        total_bytes: u64,
    },
    /// Weights are being loaded.
    Loading {
        /// These layers.
        layers: LayerRange,
        /// From here.
        from: String,
    },
    /// Other weights are being read beside those that serve.
    Staging {
        /// For these layers.
        layers: LayerRange,
    },
    /// They wait to be taken into service, or cannot.
    Staged {
        /// Why not.
        failure: Option<String>,
    },
    /// The stage answers.
    Ready {
        /// With these layers.
        layers: LayerRange,
    },
    /// Nothing to run at the moment.
    Standby,
    /// The stage could not be brought up; the head leaves this member out until it is started again.
    Failed {
        /// Why.
        reason: String,
    },
}

/// Why a member gave up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemberError {
    /// No head, or it refused.
    #[error(transparent)]
    Swarm(#[from] SwarmError),
    /// The head sent something that makes no sense.
    #[error("the head sent a malformed message: {0}")]
    Malformed(#[from] DecodeError),
    /// Weights could not be had.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The local copy is another model.
    #[error(
        "{model} is not the model that the swarm serves ({served}): pass the right one, or none to fetch it from peers"
    )]
    OtherModel {
        /// The local copy.
        model: String,
        /// What the head serves.
        served: String,
    },
    /// Weights could not be loaded.
    #[error("cannot load layers {layers}: {reason}")]
    Load {
        /// Which.
        layers: LayerRange,
        /// Why.
        reason: String,
    },
    /// Other weights have no room beside those that serve.
    #[error(transparent)]
    Room(#[from] NoRoom),
    /// The stage could not be hosted.
    #[error(transparent)]
    Stage(#[from] StageServerError),
    /// The node refused.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Takes part until `stop`, then says goodbye to the head, which goes on without this member at once; tells `news` what
/// happens. Dropping the future ends it without goodbye.
///
/// # Errors
/// When there is no head, the local copy is another model, or weights cannot be had or loaded.
pub async fn join(
    node: &Node,
    exchange: Option<&impl WeightExchange>,
    options: &JoinOptions,
    stop: impl Future<Output = ()>,
    mut news: impl FnMut(MemberNews) + Send,
) -> Result<(), MemberError> {
    let stage = StageServer::start(node)?;
    let mut stop = std::pin::pin!(stop);
    for round in 0.. {
        let found = tokio::select! {
            found = look(node, options, round > 0, &mut news) => found?,
            () = &mut stop => return Ok(()),
        };
        // To its end: a head that has let this member in must hear the goodbye.
        let mut member = Member::join(node, exchange, options, &stage, found).await?;
        let followed = tokio::select! {
            followed = member.run(&mut news) => Some(followed),
            () = &mut stop => None,
        };
        let Some(followed) = followed else {
            member.client.leave().await;
            return Ok(());
        };
        followed?;
        // The head serves another model now: look at it afresh.
    }
    Ok(())
}

/// A head that was not joined yet.
struct Found {
    head: PeerId,
    model: pb::ModelDescription,
    own_copy: Option<Arc<Checkpoint>>,
}

/// Finds the head, and the local copy of what it serves.
async fn look(
    node: &Node,
    options: &JoinOptions,
    again: bool,
    news: &mut (impl FnMut(MemberNews) + Send),
) -> Result<Found, MemberError> {
    let (head, model) = find_head(node, &options.swarm, &options.bootstrap, options.patience).await?;
    news(MemberNews::Joined { head: head.clone(), model: model.name.clone() });
    let own_copy = match own_copy(options, &model).await {
        // It was the right one once; the swarm has had other weights since.
        Err(MemberError::OtherModel { .. }) if again && !model.weights_root.is_empty() => None,
        own_copy => own_copy?,
    };
    Ok(Found { head, model, own_copy })
}

fn profile(node: &Node, options: &JoinOptions, model: &pb::ModelDescription) -> NodeProfile {
    let (decode_ms_per_layer, head_ms) = roofline(&wire::model_profile(model), bandwidth_gbps(), 0.0);
    NodeProfile {
        id: NodeId::from(&node.peer_id()),
        memory_bytes: options.memory_bytes,
        decode_ms_per_layer,
        head_ms,
        prefill_ms_per_layer_token: 0.0,
        overhead_ms: 0.0,
        pinned: options.pinned,
    }
}

/// The local copy, if it is the model that is served: named by the operator, or built into the program.
async fn own_copy(
    options: &JoinOptions,
    model: &pb::ModelDescription,
) -> Result<Option<Arc<Checkpoint>>, MemberError> {
    let named = options.model.clone();
    let Some(name) = named.clone().or_else(|| model.weights_root.is_empty().then(|| model.name.clone()))
    else {
        return Ok(None);
    };
    let opened = tokio::task::spawn_blocking({
        let name = name.clone();
        move || Checkpoint::resolve(&name).and_then(|c| Ok((c.id()?, c)))
    })
    .await;
    match opened {
        Ok(Ok((id, checkpoint))) if id == model.checkpoint_id => Ok(Some(Arc::new(checkpoint))),
        Ok(Ok(_)) => Err(MemberError::OtherModel { model: name, served: model.name.clone() }),
        Ok(Err(error)) if named.is_some() => {
            Err(MemberError::OtherModel { model: format!("{name} ({error})"), served: model.name.clone() })
        }
        _ => Err(WeightsError::NotPublished { model: model.name.clone() }.into()),
    }
}

type Loading = JoinHandle<Result<Box<dyn StageRunner>, String>>;

struct Member<'a, X> {
    exchange: Option<&'a X>,
    options: &'a JoinOptions,
    model: pb::ModelDescription,
    own_copy: Option<Arc<Checkpoint>>,
    stage: &'a StageServer,
    client: MemberClient,
    /// The stage of the last assignment: the next one often has the same layers.
    spare: Option<Box<dyn StageRunner>>,
    /// A load that goes on though its assignment is over: it cannot be stopped, and two at once would take the memory of
    /// two.
    loading: Option<Loading>,
    /// What is to replace the weights that serve.
    staged: Option<Staged>,
}

impl<'a, X: WeightExchange> Member<'a, X> {
    async fn join(
        node: &Node,
        exchange: Option<&'a X>,
        options: &'a JoinOptions,
        stage: &'a StageServer,
        Found { head, model, own_copy }: Found,
    ) -> Result<Self, MemberError> {
        let head_addrs =
            node.peers().into_iter().find(|p| p.peer == head).map(|p| p.addrs).unwrap_or_default();
        let client = SchedJoin {
            swarm: options.swarm.clone(),
            head,
            head_addrs: options.bootstrap.iter().cloned().chain(head_addrs).collect(),
            profile: profile(node, options, &model),
            incarnation: incarnation_now(),
            device: options.device.to_string(),
        };
        let client = MemberClient::join(node, client).await?;
        Ok(Self {
            exchange,
            options,
            model,
            own_copy,
            stage,
            client,
            spare: None,
            loading: None,
            staged: None,
        })
    }

    /// Follows assignments until the head serves another model.
    async fn run(&mut self, news: &mut (impl FnMut(MemberNews) + Send)) -> Result<(), MemberError> {
        let (mut assignments, mut next) = (self.client.assignments(), self.client.next_weights());
        let mut current = pb::Assignment::default();
        let (mut report, mut staging) = (Report::default(), None::<Staging<'a>>);
        let mut interval = tokio::time::interval(REPORT_EVERY);
        loop {
            tokio::select! {
                changed = assignments.changed() => {
                    let new = if changed.is_ok() { assignments.borrow_and_update().clone() } else { None };
                    let Some(assignment) = new else { continue };
                    let nothing = assignment.layers_start == assignment.layers_end;
                    let other = !nothing && assignment.checkpoint_id != self.model.checkpoint_id;
                    let is_new = |staged: &mut Staged| staged.model.checkpoint_id == assignment.checkpoint_id;
                    if other && let Some(staged) = self.staged.take_if(is_new) {
                        self.adopt(staged).await;
                    } else if other {
                        self.stage.deactivate().await;
                        if let Some(loading) = self.loading.take() {
                            // Whatever came of it is of the model before.
                            let _ = loading.await;
                        }
                        return Ok(());
                    }
                    let mut changed = assignments.clone();
                    report = tokio::select! {
                        report = self.take_up(&assignment, news) => report,
                        // A newer assignment makes this one pointless; what was fetched so far is kept.
                        _ = changed.changed() => continue,
                    };
                    current = assignment;
                    staging = self.restage(next.borrow().as_ref(), &current, &mut report, news);
                    self.client.report(report.clone());
                }
                Ok(()) = next.changed() => {
                    let wanted = next.borrow_and_update().clone();
                    // Wanted no more because an assignment takes it into service?
                    let coming = assignments.borrow().as_ref().map(|a| a.checkpoint_id.clone());
                    if wanted.is_some() || self.staged.as_ref().is_none_or(|s| Some(&s.model.checkpoint_id) != coming.as_ref()) {
                        staging = self.restage(wanted.as_ref(), &current, &mut report, news);
                        self.client.report(report.clone());
                    }
                }
                staged = outcome(&mut staging) => {
                    let failure = staged.as_ref().err().map(ToString::to_string);
                    self.staged = staged.ok();
                    if let Some(next) = next.borrow().as_ref() {
                        let checkpoint_id = checkpoint_id(next).to_owned();
                        report.staged = Some(StagedReport { checkpoint_id, failure: failure.clone() });
                    }
                    news(MemberNews::Staged { failure });
                    self.client.report(report.clone());
                }
                _ = interval.tick() => {
                    self.count(&mut report);
                    self.client.report(report.clone());
                }
            }
        }
    }

    /// Looks at what the head wants staged for an assignment: begins with it, unless it is here, and forgets what is not wanted.
    fn restage(
        &mut self,
        next: Option<&pb::NextWeights>,
        assignment: &pb::Assignment,
        report: &mut Report,
        news: &mut (impl FnMut(MemberNews) + Send),
    ) -> Option<Staging<'a>> {
        self.staged.take_if(|staged| !next.is_some_and(|next| staged.is(next, assignment)));
        report.staged = self
            .staged
            .as_ref()
            .map(|staged| StagedReport { checkpoint_id: staged.model.checkpoint_id.clone(), failure: None });
        let published =
            |next: &pb::NextWeights| next.model.as_ref().is_some_and(|m| !m.weights_root.is_empty());
        let next = next.filter(|_| self.staged.is_none()).filter(|next| next.epoch == assignment.epoch)?;
        if published(next) && next.files.is_empty() {
            // The head heard that they are here, and will hear that they are not.
            return None;
        }
        if let Ok(layers) = LayerRange::new(assignment.layers_start, assignment.layers_end) {
            news(MemberNews::Staging { layers });
        }
        let head = self.client.head().clone();
        Some(Box::pin(stage(self.exchange, self.options, head, next.clone(), assignment.clone())))
    }

    /// The staged weights take the place of those that served, whose copy goes.
    async fn adopt(&mut self, staged: Staged) {
        drop(self.stage.deactivate().await);
        self.spare = Some(staged.runner);
        let old = std::mem::replace(&mut self.model, staged.model);
        let copied = self.own_copy.take().is_none();
        let roots = swarm_wire::cid::decode(&old.weights_root).ok().filter(|_| copied);
        if let (Some(root), Some(exchange)) = (roots, self.exchange) {
            weights::remove_copy(&self.options.cache_dir, &root, staged.layers).await;
            let kept: Vec<_> = swarm_wire::cid::decode(&self.model.weights_root).into_iter().collect();
            if let Err(error) = exchange.unpublish(&root, &kept).await {
                tracing::warn!(%root, %error, "replaced weights stay in the store");
            }
        }
    }

    fn count(&self, report: &mut Report) {
        let stats = self.stage.stats();
        report.decode_ms_per_layer = stats.decode_ms_per_layer();
        report.sent_bytes = stats.sent_bytes();
        report.sent_payload_bytes = stats.sent_payload_bytes();
        report.sent_tokens = stats.sent_tokens();
    }

    /// Brings the assignment up and says how that went.
    async fn take_up(
        &mut self,
        assignment: &pb::Assignment,
        news: &mut (impl FnMut(MemberNews) + Send),
    ) -> Report {
        let epoch = assignment.epoch;
        if let Some(runner) = self.stage.deactivate().await {
            self.spare = Some(runner);
        }
        if assignment.layers_start == assignment.layers_end {
            news(MemberNews::Standby);
            return Report { epoch, state: MemberState::Standby, ..Report::default() };
        }
        let outcome = self.activate(assignment, news).await;
        match outcome {
            Ok(layers) => {
                news(MemberNews::Ready { layers });
                Report { epoch, state: MemberState::Ready, ..Report::default() }
            }
            Err(error) => {
                let reason = error.to_string();
                news(MemberNews::Failed { reason: reason.clone() });
                Report { epoch, state: MemberState::Failed, detail: reason, ..Report::default() }
            }
        }
    }

    async fn activate(
        &mut self,
        assignment: &pb::Assignment,
        news: &mut (impl FnMut(MemberNews) + Send),
    ) -> Result<LayerRange, MemberError> {
        let layers = LayerRange::new(assignment.layers_start, assignment.layers_end)?;
        let pages = (assignment.kv_page_tokens as usize, assignment.kv_pages as usize);
        let fits = |runner: &dyn StageRunner| {
            let shape = runner.shape();
            shape.layers == layers && (shape.page_tokens, shape.n_pages) == pages
        };
        if let Some(loading) = &mut self.loading {
            let loaded = loading.await;
            self.loading = None;
            if let Ok(Ok(runner)) = loaded {
                self.spare = Some(runner);
            }
        }
        let spare = self.spare.take().filter(|runner| fits(runner.as_ref()));
        let runner = match spare {
            Some(mut runner) => {
                let base = runner.set_adapter(PolicyVersion(0), None);
                base.map_err(|e| MemberError::Load { layers, reason: e.to_string() })?;
                runner.remove_adapters();
                runner
            }
            None => self.load(assignment, layers, news).await?,
        };
        self.stage.activate(assignment, runner)?;
        Ok(layers)
    }

    async fn load(
        &mut self,
        assignment: &pb::Assignment,
        layers: LayerRange,
        news: &mut (impl FnMut(MemberNews) + Send),
    ) -> Result<Box<dyn StageRunner>, MemberError> {
        let loading = |detail: String| Report {
            epoch: assignment.epoch,
            state: MemberState::Loading,
            detail,
            ..Report::default()
        };
        self.client.report(loading("getting weights".to_owned()));
        let checkpoint = match &self.own_copy {
            Some(copy) => Arc::clone(copy),
            None => {
                let wanted = (&assignment.files[..], layers);
                let progress =
                    |done_bytes, total_bytes| news(MemberNews::Fetching { done_bytes, total_bytes });
                let head = self.client.head();
                fetched(self.exchange, self.options, head, &self.model, wanted, progress).await?
            }
        };
        news(MemberNews::Loading { layers, from: checkpoint.location().display().to_string() });
        self.client.report(loading("loading weights".to_owned()));
        let options = load_options(self.options, &self.model, layers, assignment)?;
        let load = tokio::task::spawn_blocking(move || load_stage(&checkpoint, &options));
        let loaded = self.loading.insert(load).await;
        self.loading = None;
        let failed = |reason: String| MemberError::Load { layers, reason };
        loaded.map_err(|e| failed(e.to_string()))?.map_err(failed)
    }
}

/// How the stage of an assignment is loaded.
fn load_options(
    options: &JoinOptions,
    model: &pb::ModelDescription,
    layers: LayerRange,
    assignment: &pb::Assignment,
) -> Result<LoadOptions, MemberError> {
    let failed = |reason: String| MemberError::Load { layers, reason };
    Ok(LoadOptions {
        layers: layers.as_range(),
        dtype: model.weight_dtype.parse().map_err(failed)?,
        device: options.device,
        kv_page_tokens: assignment.kv_page_tokens as usize,
        kv_pages: assignment.kv_pages as usize,
        kv_format: match model.kv_format.as_str() {
            "" => KvFormat::F32,
            name => name.parse().map_err(failed)?,
        },
    })
}

/// A sparse copy of these files for these layers, from the head.
async fn fetched<X: WeightExchange>(
    exchange: Option<&X>,
    options: &JoinOptions,
    head: &PeerId,
    model: &pb::ModelDescription,
    (files, layers): (&[pb::FileSpans], LayerRange),
    progress: impl FnMut(u64, u64) + Send,
) -> Result<Arc<Checkpoint>, MemberError> {
    let missing = || WeightsError::NotPublished { model: model.name.clone() };
    let exchange = exchange.filter(|_| !model.weights_root.is_empty()).ok_or_else(missing)?;
    let root = swarm_wire::cid::decode(&model.weights_root)?;
    let (from, cache) = ([head.clone()], &options.cache_dir);
    let path = weights::fetch(exchange, &root, files, layers, &from, cache, progress).await?;
    let failed = |reason: String| MemberError::Load { layers, reason };
    let opened = tokio::task::spawn_blocking(move || Checkpoint::open(&path)).await;
    Ok(Arc::new(opened.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?))
}

#[cfg(test)]
mod tests;
