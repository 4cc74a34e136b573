//! One lease: render the prompt, play the episode with the engine, commit to what was computed.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use parallax_engine::{EngineHandle, FinishReason, Request, SamplingParams};
use swarm_wire::PeerId;

use super::{Committer, Opener, Work};
use crate::environment::{Task, Turn};
use crate::lease::Lease;
use crate::rollout::{Finish, Sample, Step, Trajectory};
use crate::service::referee::Referees;
use crate::text::Text;

/// A trajectory, and what can open its commitment.
pub(super) type Made = (Trajectory, Option<Box<dyn Opener>>);

/// Why there is none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct GivenBack {
    pub(super) reason: String,
    /// Another policy was installed meanwhile, or the worker was asked to stop: nobody's fault.
    pub(super) aborted: bool,
}

impl GivenBack {
    pub(super) fn failed(reason: impl fmt::Display) -> Self {
        Self { reason: reason.to_string(), aborted: false }
    }
}

/// Makes one trajectory, or says why the lease is given back.
pub(super) async fn sample(
    engine: EngineHandle,
    referees: Arc<Referees>,
    text: Arc<dyn Text>,
    committer: Option<Arc<dyn Committer>>,
    (lease, adapter_hash, worker): (Lease, Option<[u8; 32]>, PeerId),
) -> Result<Made, GivenBack> {
    let back = |e: &dyn fmt::Display| GivenBack::failed(e);
    let name = referees.environment().name().to_owned();
    let (task, mut referee) = referees.start(lease.task_seed).await.map_err(|e| back(&e))?;
    let prompt = text.prompt(&task).map_err(|e| back(&e))?;
    let mut play = Play { engine, text, task, lease, steps: Vec::new(), rows: Vec::new() };
    let (reward, finish) = loop {
        let turn = play.turn(&prompt, committer.is_some()).await.map_err(|e| back(&e))?;
        let answer = referee.step(turn.said).await.map_err(|e| back(&e))?;
        match (answer, turn.stopped) {
            (Turn::Done(reward), true) => break (reward, Finish::Stop),
            (Turn::Done(reward), false) => break (reward, Finish::Length),
            (Turn::Continue { observation }, true) if play.hear(&observation).map_err(|e| back(&e))? => {}
            (Turn::Continue { .. }, _) => {
                break (referee.cut().await.map_err(|e| back(&e))?, Finish::Length);
            }
        }
    };
    let Play { steps, rows, .. } = play;
    // A commitment is about one policy.
    if committer.is_some()
        && let Some(other) = steps.iter().find(|s| s.version != lease.version)
    {
        let reason = format!("sampled with {} where {} was committed to", other.version, lease.version);
        return Err(GivenBack { reason, aborted: true });
    }
    let (commitment, opener) = match committer {
        None => (Bytes::new(), None),
        Some(committer) => {
            let work = Work { lease: &lease, prompt: &prompt, steps: &steps, rows: &rows, adapter_hash };
            let (commitment, opener) = committer.commit(&work).map_err(|e| back(&e))?;
            (commitment, Some(opener))
        }
    };
    let sample = Sample { lease, worker, environment: name, prompt, steps, finish, reward, commitment };
    Ok((Trajectory::new(sample).map_err(|e| back(&e))?, opener))
}

/// A transcript in the making.
struct Play {
    engine: EngineHandle,
    text: Arc<dyn Text>,
    task: Task,
    lease: Lease,
    steps: Vec<Step>,
    /// Final-norm rows of the sampled tokens, where a committer asked for them.
    rows: Vec<Vec<f32>>,
}

/// What the policy said in one turn.
struct Said {
    said: String,
    /// By an end-of-sequence token, not for want of room.
    stopped: bool,
}

impl Play {
    /// Samples one turn after `prompt` and all that was said.
    async fn turn(&mut self, prompt: &[u32], capture_hidden: bool) -> Result<Said, String> {
        let s = self.lease.sampling;
        let before = self.steps.len();
        let sampling = SamplingParams {
            temperature: s.temperature,
            top_k: s.top_k as usize,
            top_p: s.top_p,
            seed: s.seed,
            max_tokens: (s.max_tokens as usize).saturating_sub(before),
            stop_ids: self.text.stop_ids().to_vec(),
            ..SamplingParams::default()
        };
        let context = prompt.iter().copied().chain(self.steps.iter().map(|s| s.token)).collect();
        let request = Request { prompt: context, sampling, capture_hidden, ..Request::default() };
        let completion = self.engine.generate(request).await.map_err(|e| e.to_string())?;
        let stopped = match completion.reason {
            FinishReason::Stop => true,
            FinishReason::Length => false,
            FinishReason::Aborted | FinishReason::Error => {
                return Err(completion
                    .error
                    .map_or_else(|| "sampling was aborted".to_owned(), |e| e.to_string()));
            }
        };
        self.steps.extend(completion.tokens.iter().map(step));
        if capture_hidden {
            let rows: Option<Vec<Vec<f32>>> = completion.tokens.into_iter().map(|t| t.hidden).collect();
            self.rows.extend(rows.ok_or("the engine captured no hidden rows")?);
        }
        let tokens: Vec<u32> = self.steps[before..].iter().map(|s| s.token).collect();
        Ok(Said { said: self.text.completion(&tokens), stopped })
    }

    /// Writes down what the environment says; false when there is no room for a word of the policy after it.
    fn hear(&mut self, observation: &str) -> Result<bool, String> {
        let tokens = self.text.observation(&self.task, observation).map_err(|e| e.to_string())?;
        let room = self.steps.len() + tokens.len() < self.lease.sampling.max_tokens as usize;
        if room {
            let version = self.steps.last().map_or(self.lease.version, |s| s.version);
            let foreign = |token| Step { token, logprob: 0.0, version, trainable: false };
            self.steps.extend(tokens.into_iter().map(foreign));
        }
        Ok(room)
    }
}

/// The log-probability is the one under the distribution that was sampled from.
fn step(token: &parallax_engine::Token) -> Step {
    let version = token.version;
    Step { token: token.id, logprob: token.sampled_logprob, version, trainable: true }
}
