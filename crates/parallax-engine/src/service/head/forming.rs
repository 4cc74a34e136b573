//! Keeps a pipeline formed: the head's own layers, the members' readiness, the streams; anew for every plan.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parallax_sched::{MemberState, NodeId, Pipeline, PlanView, Report};

use super::link::Link;
use super::{BLAME_WAIT, Shared, State};

/// How often readiness of the members is looked at while a pipeline forms.
pub(super) const FORM_POLL: Duration = Duration::from_millis(20);
/// Without batches for this long, better plans may be adopted.
const IDLE_AFTER: Duration = Duration::from_millis(500);

pub(super) async fn watch_idleness(shared: Arc<Shared>) {
    let mut interval = tokio::time::interval(IDLE_AFTER / 4);
    loop {
        interval.tick().await;
        let last = Duration::from_millis(shared.last_batch_ms.load(Ordering::Relaxed));
        let busy = !last.is_zero() && shared.started.elapsed().saturating_sub(last) < IDLE_AFTER;
        shared.membership.set_busy(busy);
    }
}

pub(super) async fn form_forever(shared: Arc<Shared>) {
    let mut plans = shared.membership.watch();
    loop {
        let view = plans.borrow_and_update().clone();
        shared.forming();
        tokio::select! {
            changed = plans.changed() => if changed.is_err() { return },
            () = serve_plan(&shared, &view) => {}
        }
    }
}

/// Brings the plan's pipeline up and stays until it breaks without the membership noticing.
async fn serve_plan(shared: &Arc<Shared>, view: &PlanView) {
    let pipeline = view.plan.as_ref().ok().and_then(|plan| plan.pipelines.first());
    let Some(pipeline) = pipeline else {
        // Whoever asks wants to know what is missing now.
        loop {
            shared.forming();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    if let Err(reason) = load_local(shared, view.epoch, pipeline).await {
        let report =
            Report { epoch: view.epoch, state: MemberState::Failed, detail: reason, ..Report::default() };
        shared.membership.report_local(report);
        return std::future::pending().await;
    }
    while !shared.membership.read(|c| c.is_ready(pipeline)) {
        shared.forming();
        tokio::time::sleep(FORM_POLL).await;
    }
    let link = match Link::open(shared, view.epoch, pipeline).await {
        Ok(link) => Arc::new(link),
        Err(reason) => {
            tokio::time::sleep(BLAME_WAIT).await;
            return shared.membership.rebuild(&reason);
        }
    };
    shared.formed.store(true, Ordering::Relaxed);
    // With the state locked, so that whoever begins an epoch and then takes the pipeline down has the last word.
    let is_current = shared.state.send_if_modified(|state| {
        let is_current = shared.membership.read(|c| c.view().epoch) == view.epoch;
        if is_current {
            *state = State::Ready(Arc::clone(&link));
        }
        is_current
    });
    if !is_current {
        return;
    }
    tracing::info!(epoch = view.epoch, stages = pipeline.stages.len(), "pipeline is ready");
    let reason = link.until_broken().await;
    // If a member died, its epoch is over in a moment and this future is dropped.
    tokio::time::sleep(BLAME_WAIT).await;
    shared.membership.rebuild(&reason);
}

/// The head's own layers, loaded or kept.
async fn load_local(shared: &Arc<Shared>, epoch: u64, pipeline: &Pipeline) -> Result<(), String> {
    let me = NodeId::from(&shared.node.peer_id());
    let Some((index, stage)) = pipeline.stage_of(&me) else { return Ok(()) };
    if index != 0 {
        return Err(format!("the head was given stage {index}, it can only be the first"));
    }
    let layers = stage.layers;
    let report = |state, detail: &str| {
        let (detail, decode_ms_per_layer) = (detail.to_owned(), shared.stats.decode_ms_per_layer());
        shared.membership.report_local(Report {
            epoch,
            state,
            detail,
            decode_ms_per_layer,
            ..Report::default()
        });
    };
    shared.own.bring(layers, || report(MemberState::Loading, "loading weights")).await?;
    report(MemberState::Ready, "");
    Ok(())
}
