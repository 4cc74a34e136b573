//! The asynchronous mode: lease, learn and publish side by side, as the coordinator says. Trajectories are taken in by the
//! collector's own handlers.

use std::future::pending;
use std::time::{Duration, Instant};

use echo_rollout::Weights;
use echo_rollout::asynchronous::AsyncCoordinator;
use echo_rollout::sync::Action;
use swarm_wire::PolicyVersion;
use tokio::task::JoinHandle;

use super::super::evaluation::BoxFuture;
use super::super::publisher::Update;
use super::{Learned, Learner, LearnerError, LearnerEvent, Loops};

/// How often the time is looked at when nothing happens.
const TICK: Duration = Duration::from_millis(100);

/// A step in the making.
struct Training {
    handle: JoinHandle<Result<Learned, LearnerError>>,
    began: Instant,
    waited: Duration,
}

/// Makes the steps that are left; the newest weights.
pub(super) async fn run<P: Update + Send + 'static>(
    learner: &Learner<P>,
    loops: &mut Loops<impl FnMut(LearnerEvent)>,
) -> Result<(PolicyVersion, Weights), LearnerError> {
    let collector = &learner.collector;
    let first = learner.version().0;
    let config = learner.config.asynchronous();
    let mut coordinator = AsyncCoordinator::new(config, first, collector.now_ms())?
        .resumed(learner.published, collector.reached().1);
    let mut changed = collector.changes();
    let mut newest = learner.newest.clone();
    let mut training: Option<Training> = None;
    let mut trained: Option<(Learned, [Duration; 3])> = None;
    let mut publishing: Option<BoxFuture<'_, Result<(), LearnerError>>> = None;
    let mut waiting = Instant::now();
    loop {
        if loops.is_late() {
            coordinator.stop();
        }
        while let Some(action) = coordinator.poll(&collector.view()) {
            match action {
                Action::OpenGroups { up_to } => collector.open_groups(up_to).await?,
                Action::Train { step, groups } => {
                    let batch = collector.take(step, groups).await?;
                    if batch.is_empty() {
                        break;
                    }
                    if learner.gave_back(step, &batch).await? {
                        continue;
                    }
                    coordinator.handle_training(collector.now_ms(), collector.view().ready_groups)?;
                    let handle = learner.learn(&batch);
                    training = Some(Training { handle, began: Instant::now(), waited: waiting.elapsed() });
                }
                Action::Commit { step } => {
                    collector.commit_step(step).await?;
                    coordinator.handle_committed(collector.now_ms())?;
                    if let Some((learned, times)) = trained.take() {
                        loops.tell_step(&learned, coordinator.ahead(), learner.workers().len(), times);
                    }
                    waiting = Instant::now();
                }
                Action::Publish(version) => {
                    coordinator.handle_publishing(version)?;
                    let weights = newest.clone();
                    publishing = Some(Box::pin(async move {
                        Ok(collector.publish(&learner.snapshot(&weights).await?).await?)
                    }));
                }
            }
        }
        loops.tell_convicted(collector);
        if coordinator.is_done() {
            return Ok(newest);
        }
        tokio::select! {
            learned = done(training.as_mut()) => {
                let learned = learned?;
                coordinator.handle_trained(collector.now_ms())?;
                newest = (learned.report.version, learned.weights.clone());
                if let Some(Training { began, waited, .. }) = training.take() {
                    let train = began.elapsed();
                    trained = Some((learned, [waited, train, waited + train]));
                }
            }
            out = published(publishing.as_mut()) => {
                out?;
                publishing = None;
                coordinator.handle_published()?;
            }
            _ = tokio::time::timeout(TICK, changed.changed()) => {}
        }
    }
}

async fn done(training: Option<&mut Training>) -> Result<Learned, LearnerError> {
    match training {
        Some(training) => (&mut training.handle).await.expect("a training step does not panic"),
        None => pending().await,
    }
}

async fn published(
    publishing: Option<&mut BoxFuture<'_, Result<(), LearnerError>>>,
) -> Result<(), LearnerError> {
    match publishing {
        Some(publishing) => publishing.await,
        None => pending().await,
    }
}
