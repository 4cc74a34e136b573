//! How good a policy is on held-out tasks, sampled as in training and greedily.
//!
//! The engine that samples belongs to whoever wires a learner: this crate imports none.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use echo_rollout::environment::{RewardError, Turn, held_out_seed};
use echo_rollout::text::{Text, TextError};
use echo_rollout::{Environment, Weights};
use serde::Serialize;
use swarm_wire::PolicyVersion;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// A future of a trait object.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One answer to sample.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleRequest {
    /// The tokens to continue.
    pub prompt: Vec<u32>,
    /// Most tokens of the answer.
    pub max_tokens: u32,
    /// 0 is greedy.
    pub temperature: f32,
    /// Seed of the draw.
    pub seed: u64,
}

/// What was sampled.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Sampled {
    /// The answer, its end-of-sequence token included.
    pub tokens: Vec<u32>,
    /// Log-probability of each token under the distribution that it was drawn from.
    pub logprobs: Vec<f32>,
}

/// An inference engine with the policy's base checkpoint.
pub trait Sampler: Send + Sync {
    /// Samples with `version` from now on.
    fn install(&self, version: PolicyVersion, weights: Weights) -> BoxFuture<'_, Result<(), String>>;

    /// Samples one answer. Many are asked for at once.
    fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Sampled, String>>;
}

/// What plays episodes.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "engines and tokenizers have none")]
pub struct Player {
    /// The policy.
    pub sampler: Arc<dyn Sampler>,
    /// Its tokenizer and chat template.
    pub text: Arc<dyn Text>,
    /// What is played.
    pub environment: Arc<dyn Environment>,
}

/// An episode that was played.
#[derive(Debug, Clone, PartialEq)]
pub struct Played {
    /// The prompt.
    pub prompt: Vec<u32>,
    /// What followed it: the policy's words and the environment's between them.
    pub tokens: Vec<u32>,
    /// Log-probability of each of these as sampled; 0 for the environment's.
    pub logprobs: Vec<f32>,
    /// Which of them are the policy's.
    pub trainable: Vec<bool>,
    /// What it got.
    pub reward: f32,
}

/// Mean rewards over held-out tasks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Of which version.
    pub version: PolicyVersion,
    /// Sampled at temperature 1, as in training.
    pub eval: f64,
    /// Greedily.
    pub eval_greedy: f64,
    /// Between which values `eval` lies with 95 % confidence. Tasks are taken in pairs, because games have the same deal with
    /// the seats swapped there.
    pub eval_ci95: [f64; 2],
    /// The same for `eval_greedy`.
    pub eval_greedy_ci95: [f64; 2],
}

/// Episodes that are played at the same time.
const AT_ONCE: usize = 256;
/// Before an episode that the environment could not judge is played again: a program is started again at once, a server takes its
/// time.
const PAUSES: [Duration; 3] = [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(5)];

/// Why there is no evaluation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluationError {
    /// A task that cannot be asked.
    #[error(transparent)]
    Text(#[from] TextError),
    /// An answer that cannot be judged.
    #[error(transparent)]
    Reward(#[from] RewardError),
    /// The engine.
    #[error("sampling answers: {reason}")]
    Sampler {
        /// The engine's own words.
        reason: String,
    },
}

/// Asks the first `n_tasks` held-out tasks twice each, with answers of at most `max_tokens`.
///
/// # Errors
/// When a task cannot be asked, sampled or judged.
pub async fn evaluate(
    player: &Player,
    version: PolicyVersion,
    n_tasks: u64,
    max_tokens: u32,
) -> Result<Evaluation, EvaluationError> {
    let mut figures = [(0.0, [0.0; 2]); 2];
    for (figure, temperature) in figures.iter_mut().zip([1.0, 0.0]) {
        let settings = |seed| SampleRequest { prompt: Vec::new(), max_tokens, temperature, seed };
        let played = play_all(player, (0..n_tasks).map(|i| (held_out_seed(i), settings(i)))).await?;
        let rewards: Vec<f64> = played.iter().map(|p| f64::from(p.reward)).collect();
        *figure = mean_in_pairs(&rewards);
    }
    let [(eval, eval_ci95), (eval_greedy, eval_greedy_ci95)] = figures;
    Ok(Evaluation { version, eval, eval_greedy, eval_ci95, eval_greedy_ci95 })
}

/// The mean and its 95 % confidence interval from the spread of the means of pairs (a last one alone is its own).
fn mean_in_pairs(rewards: &[f64]) -> (f64, [f64; 2]) {
    let mean = |r: &[f64]| r.iter().sum::<f64>() / r.len().max(1) as f64;
    let all = mean(rewards);
    let pairs: Vec<f64> = rewards.chunks(2).map(mean).collect();
    let n = pairs.len() as f64;
    let variance = pairs.iter().map(|p| (p - all) * (p - all)).sum::<f64>() / (n - 1.0).max(1.0);
    let half = 1.96 * (variance / n.max(1.0)).sqrt();
    (all, [all - half, all + half])
}

/// Plays an episode of each task seed, many at the same time; the settings' prompts are not read. Results are in order. Where the
/// environment answers fewer questions at a time, these wait for each other and the sampling goes on. An episode that it cannot
/// judge is played again a few times.
///
/// # Errors
/// When a task cannot be asked, sampled or judged.
pub async fn play_all(
    player: &Player,
    episodes: impl IntoIterator<Item = (u64, SampleRequest)>,
) -> Result<Vec<Played>, EvaluationError> {
    play_all_with(player, episodes, PAUSES).await
}

async fn play_all_with(
    player: &Player,
    episodes: impl IntoIterator<Item = (u64, SampleRequest)>,
    pauses: [Duration; 3],
) -> Result<Vec<Played>, EvaluationError> {
    // Waited for here and not in the environment, where every question that waits would keep a thread.
    let places = player.environment.concurrency().clamp(1, Semaphore::MAX_PERMITS);
    let places = Arc::new(Semaphore::new(places));
    // Tasks of their own, because an environment may keep a thread waiting; they end with the set.
    let mut tasks = JoinSet::new();
    let mut played = BTreeMap::new();
    let mut episodes = episodes.into_iter().enumerate();
    loop {
        for (i, (seed, settings)) in episodes.by_ref().take(AT_ONCE - tasks.len()) {
            let (player, places) = (player.clone(), Arc::clone(&places));
            let played = async move { persist(&player, &places, seed, &settings, pauses).await };
            tasks.spawn(async move { played.await.map(|played| (i, played)) });
        }
        let Some(done) = tasks.join_next().await else { return Ok(played.into_values().collect()) };
        let (i, one) = done.map_err(|e| EvaluationError::Sampler { reason: e.to_string() })??;
        played.insert(i, one);
    }
}

/// Plays one episode, again after each of these pauses when the environment cannot judge it.
async fn persist(
    player: &Player,
    places: &Semaphore,
    seed: u64,
    settings: &SampleRequest,
    pauses: [Duration; 3],
) -> Result<Played, EvaluationError> {
    for pause in pauses {
        match play(player, places, seed, settings).await {
            Err(EvaluationError::Reward(error @ RewardError::Verifier { .. })) => {
                tracing::warn!(%error, seed, "an episode is played again");
                tokio::time::sleep(pause).await;
            }
            played => return played,
        }
    }
    play(player, places, seed, settings).await
}

/// Plays one episode to its end, or to where there is no room for another word; as workers do.
async fn play(
    player: &Player,
    places: &Semaphore,
    seed: u64,
    settings: &SampleRequest,
) -> Result<Played, EvaluationError> {
    let Player { sampler, text, environment } = player;
    let task = asked(places, || environment.task(seed)).await?;
    let prompt = text.prompt(&task)?;
    let room = settings.max_tokens as usize;
    let mut episode = environment.episode(&task);
    let (mut tokens, mut logprobs, mut trainable) = (Vec::new(), Vec::new(), Vec::new());
    let reward = loop {
        let context = [&prompt[..], &tokens].concat();
        let max_tokens = u32::try_from(room - tokens.len()).unwrap_or(u32::MAX);
        let said = sampler.sample(SampleRequest { prompt: context, max_tokens, ..settings.clone() }).await;
        let said = said.map_err(|reason| EvaluationError::Sampler { reason })?;
        let stopped = said.tokens.last().is_some_and(|last| text.stop_ids().contains(last));
        let turn = asked(places, || episode.step(&text.completion(&said.tokens))).await?;
        trainable.resize(tokens.len() + said.tokens.len(), true);
        tokens.extend(said.tokens);
        logprobs.extend(said.logprobs);
        let heard = match turn {
            Turn::Done(reward) => break reward,
            Turn::Continue { observation } if stopped => text.observation(&task, &observation)?,
            Turn::Continue { .. } => break asked(places, || episode.cut()).await?,
        };
        if tokens.len() + heard.len() >= room {
            break asked(places, || episode.cut()).await?;
        }
        tokens.extend(heard);
        trainable.resize(tokens.len(), false);
        logprobs.resize(tokens.len(), 0.0);
    };
    Ok(Played { prompt, tokens, logprobs, trainable, reward: reward.value() })
}

/// Asks the environment as soon as there is a place. It may wait for another program; where the runtime has other threads, they
/// take over meanwhile.
async fn asked<T>(places: &Semaphore, question: impl FnOnce() -> T) -> T {
    let _place = places.acquire().await;
    match tokio::runtime::Handle::current().runtime_flavor() {
        tokio::runtime::RuntimeFlavor::MultiThread => tokio::task::block_in_place(question),
        _ => question(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use echo_rollout::environment::{Calculator, Episode, Reward, one_turn};
    use echo_rollout::{Arithmetic, Task};

    use super::*;

    fn said(tokens: Vec<u32>) -> Sampled {
        Sampled { logprobs: vec![-1.0; tokens.len()], tokens }
    }

    fn player(
        sampler: impl Sampler + 'static,
        text: impl Text + 'static,
        environment: impl Environment + 'static,
    ) -> Player {
        Player { sampler: Arc::new(sampler), text: Arc::new(text), environment: Arc::new(environment) }
    }

    /// Bytes are tokens.
    struct Bytes;

    impl Text for Bytes {
        fn prompt(&self, task: &Task) -> Result<Vec<u32>, TextError> {
            Ok(task.answer.bytes().map(u32::from).collect())
        }

        fn completion(&self, tokens: &[u32]) -> String {
            tokens.iter().map(|t| char::from_u32(*t).unwrap()).collect()
        }

        fn stop_ids(&self) -> &[u32] {
            &[]
        }
    }

    /// Knows every answer when greedy, and every second one when it samples.
    struct Oracle;

    impl Sampler for Oracle {
        fn install(&self, _: PolicyVersion, _: Weights) -> BoxFuture<'_, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Sampled, String>> {
            let right = request.temperature == 0.0 || request.seed.is_multiple_of(2);
            let tokens = if right { request.prompt } else { vec![u32::from(b'?')] };
            Box::pin(std::future::ready(Ok(said(tokens))))
        }
    }

    /// Calls the calculator with what was asked, then repeats what it said.
    struct Caller;

    impl Text for Caller {
        fn prompt(&self, task: &Task) -> Result<Vec<u32>, TextError> {
            Ok(task.prompt.bytes().map(u32::from).collect())
        }

        fn observation(&self, _: &Task, said: &str) -> Result<Vec<u32>, TextError> {
            Ok(format!("[{said}]").bytes().map(u32::from).collect())
        }

        fn completion(&self, tokens: &[u32]) -> String {
            tokens.iter().filter(|t| **t != 0).map(|t| char::from_u32(*t).unwrap()).collect()
        }

        fn stop_ids(&self) -> &[u32] {
            &[0]
        }
    }

    impl Sampler for Caller {
        fn install(&self, _: PolicyVersion, _: Weights) -> BoxFuture<'_, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Sampled, String>> {
            let context = self.completion(&request.prompt);
            let answer = match context.rsplit_once('[') {
                Some((_, tool)) => tool.trim_end_matches(']').to_owned(),
                None => {
                    let asked = context.strip_prefix("Compute ").unwrap().split_once(". To").unwrap().0;
                    format!("<calc>{asked}</calc>")
                }
            };
            let tokens = answer.bytes().map(u32::from).chain([0]).take(request.max_tokens as usize).collect();
            Box::pin(std::future::ready(Ok(said(tokens))))
        }
    }

    #[tokio::test]
    async fn episodes_of_several_turns_are_played_to_their_end_or_as_far_as_there_is_room() {
        let version = PolicyVersion(1);
        let player = player(Caller, Caller, Calculator::default());
        let got = evaluate(&player, version, 5, 200).await.unwrap();
        assert_eq!((got.eval, got.eval_greedy), (1.0, 1.0));
        let cut = evaluate(&player, version, 5, 8).await.unwrap();
        assert_eq!((cut.eval, cut.eval_greedy), (0.0, 0.0));
        let settings = SampleRequest { prompt: Vec::new(), max_tokens: 200, temperature: 1.0, seed: 0 };
        let played = play_all(&player, [(7, settings)]).await.unwrap().remove(0);
        let n = played.tokens.len();
        assert_eq!((played.logprobs.len(), played.trainable.len()), (n, n));
        let heard: Vec<u32> = (0..n).filter(|i| !played.trainable[*i]).map(|i| played.tokens[i]).collect();
        assert!(Caller.completion(&heard).starts_with('['), "the tool's words are not the policy's");
        assert!((0..n).all(|i| (played.logprobs[i] == 0.0) != played.trainable[i]));
    }

    /// Fails for one prompt, and never answers the others.
    struct Stuck(Arc<AtomicUsize>);

    /// Counts what is in the making.
    struct Waiting(Arc<AtomicUsize>);

    impl Drop for Waiting {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    impl Sampler for Stuck {
        fn install(&self, _: PolicyVersion, _: Weights) -> BoxFuture<'_, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Sampled, String>> {
            if request.seed == 7 {
                return Box::pin(std::future::ready(Err("broken".to_owned())));
            }
            self.0.fetch_add(1, Ordering::SeqCst);
            let waiting = Waiting(Arc::clone(&self.0));
            Box::pin(async move {
                let _waiting = waiting;
                std::future::pending().await
            })
        }
    }

    #[tokio::test]
    async fn episodes_end_with_the_evaluation_that_failed() {
        let waiting = Arc::new(AtomicUsize::new(0));
        let player = player(Stuck(Arc::clone(&waiting)), Bytes, Arithmetic::default());
        let settings = |seed| SampleRequest { prompt: Vec::new(), max_tokens: 8, temperature: 1.0, seed };
        let error = play_all(&player, (0..8).map(|seed| (seed, settings(seed)))).await.unwrap_err();
        assert!(error.to_string().contains("broken"), "{error}");
        while waiting.load(Ordering::SeqCst) > 0 {
            tokio::task::yield_now().await;
        }
    }

    /// Arithmetic that answers two questions at a time and counts them; some of the first ones fail.
    struct Busy {
        sums: Arithmetic,
        asked: AtomicUsize,
        most: Arc<AtomicUsize>,
        failures: AtomicUsize,
    }

    impl Busy {
        fn new(failures: usize) -> Self {
            let (sums, failures) = (Arithmetic::default(), AtomicUsize::new(failures));
            Self { sums, asked: AtomicUsize::new(0), most: Arc::default(), failures }
        }

        fn ask<T>(&self, question: impl FnOnce() -> Result<T, RewardError>) -> Result<T, RewardError> {
            let asked = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
            self.most.fetch_max(asked, Ordering::SeqCst);
            // Others that may come do.
            (0..100).for_each(|_| std::thread::yield_now());
            self.asked.fetch_sub(1, Ordering::SeqCst);
            let fails = |left: usize| left.checked_sub(1);
            if self.failures.fetch_update(Ordering::SeqCst, Ordering::SeqCst, fails).is_ok() {
                return Err(RewardError::Verifier {
                    environment: "busy".into(),
                    reason: "restarting".into(),
                });
            }
            question()
        }
    }

    impl Environment for Busy {
        fn name(&self) -> &str {
            "busy"
        }

        fn task(&self, seed: u64) -> Result<Task, RewardError> {
            self.ask(|| self.sums.task(seed))
        }

        fn concurrency(&self) -> usize {
            2
        }

        fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
            one_turn(self, task)
        }

        fn verify(&self, task: &Task, said: &str) -> Result<Reward, RewardError> {
            self.ask(|| self.sums.verify(task, said))
        }
    }

    /// Knows every answer, and gives them when all are asked for.
    struct Together(tokio::sync::Barrier);

    impl Sampler for Together {
        fn install(&self, _: PolicyVersion, _: Weights) -> BoxFuture<'_, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Sampled, String>> {
            Box::pin(async move {
                self.0.wait().await;
                Ok(said(request.prompt))
            })
        }
    }

    fn greedy(n: u64) -> impl Iterator<Item = (u64, SampleRequest)> {
        (0..n).map(|seed| (seed, SampleRequest { prompt: Vec::new(), max_tokens: 8, temperature: 0.0, seed }))
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn the_environment_is_asked_as_much_as_it_answers_and_the_sampler_more() {
        let busy = Busy::new(0);
        let most = Arc::clone(&busy.most);
        let player = player(Together(tokio::sync::Barrier::new(32)), Bytes, busy);
        let played = tokio::time::timeout(Duration::from_secs(60), play_all(&player, greedy(32))).await;
        let played = played.expect("all are sampled together").unwrap();
        assert!(played.iter().all(|p| p.reward == 1.0));
        assert_eq!(most.load(Ordering::SeqCst), 2);
    }

    #[tokio::test]
    async fn episodes_that_cannot_be_judged_are_played_again_a_few_times() {
        let at_once = [Duration::ZERO; 3];
        let first = player(Oracle, Bytes, Arithmetic::default());
        let first = play_all(&first, greedy(4)).await.unwrap();
        let flaky = player(Oracle, Bytes, Busy::new(3));
        assert_eq!(play_all_with(&flaky, greedy(4), at_once).await.unwrap(), first, "as if nothing had been");
        let broken = player(Oracle, Bytes, Busy::new(100));
        let error = play_all_with(&broken, greedy(4), at_once).await.unwrap_err();
        assert!(error.to_string().contains("restarting"), "{error}");
    }

    #[tokio::test]
    async fn both_means_are_over_all_tasks() {
        let version = PolicyVersion(4);
        let got = evaluate(&player(Oracle, Bytes, Arithmetic::default()), version, 10, 8).await.unwrap();
        // Every pair has one right answer, so the means of pairs do not differ.
        let [eval_ci95, eval_greedy_ci95] = [[0.5; 2], [1.0; 2]];
        assert_eq!(got, Evaluation { version, eval: 0.5, eval_greedy: 1.0, eval_ci95, eval_greedy_ci95 });
    }

    #[test]
    fn an_interval_is_that_of_the_means_of_pairs() {
        assert_eq!(mean_in_pairs(&[2.0, -2.0, 1.0, -1.0]), (0.0, [0.0, 0.0]));
        let (mean, [low, high]) = mean_in_pairs(&[1.0, 3.0, -1.0, 1.0]);
        // Means of pairs 2 and 0: standard deviation sqrt 2, error 1.
        assert!((mean - 1.0).abs() < 1e-12 && (low + 0.96).abs() < 1e-12 && (high - 2.96).abs() < 1e-12);
    }
}
