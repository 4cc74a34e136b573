//! How good a policy is on held-out tasks, sampled as in training and greedily.
//!
//! The engine that samples belongs to whoever wires a learner: this crate imports none.

use std::future::Future;
use std::pin::Pin;

use echo_rollout::environment::{RewardError, Turn, held_out_seed};
use echo_rollout::text::{Text, TextError};
use echo_rollout::{Environment, Task};
use serde::Serialize;
use swarm_wire::PolicyVersion;

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

/// An inference engine with the policy's base checkpoint.
pub trait Sampler: Send + Sync {
    /// Samples with `version` from now on: the base checkpoint, or an adapter over it.
    fn install(&self, version: PolicyVersion, adapter: Option<Vec<u8>>) -> BoxFuture<'_, Result<(), String>>;

    /// Samples one answer's tokens. Many are asked for at once.
    fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Vec<u32>, String>>;
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
}

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
    #[error("sampling held-out answers: {reason}")]
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
    sampler: &dyn Sampler,
    text: &dyn Text,
    environment: &dyn Environment,
    version: PolicyVersion,
    n_tasks: u64,
    max_tokens: u32,
) -> Result<Evaluation, EvaluationError> {
    let tasks: Vec<_> =
        (0..n_tasks).map(|index| environment.task(held_out_seed(index))).collect::<Result<_, _>>()?;
    let mut means = [0.0_f64; 2];
    for (mean, temperature) in means.iter_mut().zip([1.0, 0.0]) {
        let plays = tasks.iter().zip(0..).map(|(task, seed)| {
            let settings = SampleRequest { prompt: Vec::new(), max_tokens, temperature, seed };
            play(sampler, text, environment, task, settings)
        });
        for reward in futures::future::join_all(plays).await {
            *mean += f64::from(reward?);
        }
        *mean /= n_tasks.max(1) as f64;
    }
    Ok(Evaluation { version, eval: means[0], eval_greedy: means[1] })
}

/// Plays one episode to its end, or to where there is no room for another word; as workers do.
async fn play(
    sampler: &dyn Sampler,
    text: &dyn Text,
    environment: &dyn Environment,
    task: &Task,
    settings: SampleRequest,
) -> Result<f32, EvaluationError> {
    let prompt = text.prompt(task)?;
    let room = settings.max_tokens as usize;
    let mut episode = environment.episode(task);
    let mut said: Vec<u32> = Vec::new();
    loop {
        let context = [&prompt[..], &said].concat();
        let max_tokens = u32::try_from(room - said.len()).unwrap_or(u32::MAX);
        let tokens = sampler.sample(SampleRequest { prompt: context, max_tokens, ..settings.clone() }).await;
        let tokens = tokens.map_err(|reason| EvaluationError::Sampler { reason })?;
        let stopped = tokens.last().is_some_and(|last| text.stop_ids().contains(last));
        let turn = blocking(|| episode.step(&text.completion(&tokens)))?;
        said.extend(tokens);
        let heard = match turn {
            Turn::Done(reward) => return Ok(reward.value()),
            Turn::Continue { observation } if stopped => text.observation(task, &observation)?,
            Turn::Continue { .. } => return Ok(blocking(|| episode.cut())?.value()),
        };
        if said.len() + heard.len() >= room {
            return Ok(blocking(|| episode.cut())?.value());
        }
        said.extend(heard);
    }
}

/// An environment may wait for another program; where the runtime has other threads, they take over meanwhile.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::current().runtime_flavor() {
        tokio::runtime::RuntimeFlavor::MultiThread => tokio::task::block_in_place(work),
        _ => work(),
    }
}

#[cfg(test)]
mod tests {
    use echo_rollout::Arithmetic;
    use echo_rollout::environment::Calculator;

    use super::*;

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
        fn install(&self, _: PolicyVersion, _: Option<Vec<u8>>) -> BoxFuture<'_, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Vec<u32>, String>> {
            let right = request.temperature == 0.0 || request.seed.is_multiple_of(2);
            Box::pin(std::future::ready(Ok(if right { request.prompt } else { vec![u32::from(b'?')] })))
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
        fn install(&self, _: PolicyVersion, _: Option<Vec<u8>>) -> BoxFuture<'_, Result<(), String>> {
            Box::pin(std::future::ready(Ok(())))
        }

        fn sample(&self, request: SampleRequest) -> BoxFuture<'_, Result<Vec<u32>, String>> {
            let context = self.completion(&request.prompt);
            let answer = match context.rsplit_once('[') {
                Some((_, tool)) => tool.trim_end_matches(']').to_owned(),
                None => {
                    let asked = context.strip_prefix("Compute ").unwrap().split_once(". To").unwrap().0;
                    format!("<calc>{asked}</calc>")
                }
            };
            let tokens = answer.bytes().map(u32::from).chain([0]).take(request.max_tokens as usize).collect();
            Box::pin(std::future::ready(Ok(tokens)))
        }
    }

    #[tokio::test]
    async fn episodes_of_several_turns_are_played_to_their_end_or_as_far_as_there_is_room() {
        let version = PolicyVersion(1);
        let calculator = Calculator::default();
        let got = evaluate(&Caller, &Caller, &calculator, version, 5, 200).await.unwrap();
        assert_eq!((got.eval, got.eval_greedy), (1.0, 1.0));
        let cut = evaluate(&Caller, &Caller, &calculator, version, 5, 8).await.unwrap();
        assert_eq!((cut.eval, cut.eval_greedy), (0.0, 0.0));
    }

    #[tokio::test]
    async fn both_means_are_over_all_tasks() {
        let arithmetic = Arithmetic::default();
        let version = PolicyVersion(4);
        let got = evaluate(&Oracle, &Bytes, &arithmetic, version, 10, 8).await.unwrap();
        assert_eq!(got, Evaluation { version, eval: 0.5, eval_greedy: 1.0 });
    }
}
