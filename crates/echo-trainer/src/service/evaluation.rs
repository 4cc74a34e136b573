//! How good a policy is on held-out tasks, sampled as in training and greedily.
//!
//! The engine that samples belongs to whoever wires a learner: this crate imports none.

use std::future::Future;
use std::pin::Pin;

use echo_rollout::Environment;
use echo_rollout::environment::{RewardError, held_out_seed};
use echo_rollout::text::{Text, TextError};
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
        let mut answers = Vec::with_capacity(tasks.len());
        for (task, seed) in tasks.iter().zip(0..) {
            let prompt = text.prompt(task)?;
            answers.push(sampler.sample(SampleRequest { prompt, max_tokens, temperature, seed }));
        }
        let answers = futures::future::join_all(answers).await;
        for (task, answer) in tasks.iter().zip(answers) {
            let tokens = answer.map_err(|reason| EvaluationError::Sampler { reason })?;
            *mean += f64::from(environment.verify(task, &text.completion(&tokens))?.value());
        }
        *mean /= n_tasks.max(1) as f64;
    }
    Ok(Evaluation { version, eval: means[0], eval_greedy: means[1] })
}

#[cfg(test)]
mod tests {
    use echo_rollout::{Arithmetic, Task};

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

    #[tokio::test]
    async fn both_means_are_over_all_tasks() {
        let arithmetic = Arithmetic::default();
        let version = PolicyVersion(4);
        let got = evaluate(&Oracle, &Bytes, &arithmetic, version, 10, 8).await.unwrap();
        assert_eq!(got, Evaluation { version, eval: 0.5, eval_greedy: 1.0 });
    }
}
