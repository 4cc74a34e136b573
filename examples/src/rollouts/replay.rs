//! An auditor's own copy of the model: the base checkpoint, with an adapter on it, or all weights of a policy version.
//!
//! One version is in memory at a time: where all weights change, those before go first, and the base checkpoint is read again when a
//! version needs it.

use echo_rollout::Weights;
use echo_rollout::service::Replay;
use parallax_engine::SamplingParams;
use parallax_engine::sampler::{Place, uniform};
use parallax_model::{Adapter, BaseDtype, Checkpoint, LoadOptions, Stage, logprob};
use veri_verify::config::DRAW_SLACK;
use veri_verify::service::Auditor;
use veri_verify::{Answer, Job};

use super::load_options;
use crate::program;

/// Recomputes answers with a model of its own.
#[derive(Debug)]
pub struct ModelReplay {
    /// Where the base checkpoint is.
    location: String,
    options: LoadOptions,
    /// The checkpoint, with the format of its weights.
    model_id: String,
    /// None after weights that could not be read.
    loaded: Option<Loaded>,
    sampler: parallax_engine::Sampler,
}

/// A model in memory.
#[derive(Debug)]
struct Loaded {
    auditor: Auditor,
    /// Its weights are not the base checkpoint's.
    replaced: bool,
    /// Of the adapter, or of all weights.
    hash: Option<[u8; 32]>,
}

impl ModelReplay {
    /// Loads the whole model, in the format of the run's learner, for answers of up to `max_tokens`, prompt included.
    ///
    /// # Errors
    /// Weights that cannot be read.
    pub fn load(checkpoint: &Checkpoint, base_dtype: BaseDtype, max_tokens: usize) -> anyhow::Result<Self> {
        let mut replay = Self {
            location: checkpoint.location().to_string_lossy().into_owned(),
            options: load_options(checkpoint, base_dtype.weights(), max_tokens),
            model_id: base_dtype.model_id(&checkpoint.id()?),
            loaded: None,
            sampler: parallax_engine::Sampler::new(logprob::log_softmax),
        };
        replay.loaded = Some(Loaded::read(checkpoint, &replay.options, false)?);
        Ok(replay)
    }

    /// The model with these weights; what is in memory goes before it is read, or has the adapter put on it.
    fn changed_to(&mut self, weights: Weights) -> anyhow::Result<Loaded> {
        // All weights are of no use once others come, and two models may be too much.
        let base = self.loaded.take().filter(|loaded| !loaded.replaced);
        let adapter = match weights {
            Weights::Full(file) => {
                drop(base);
                // A copy only when somebody else has the bytes too.
                let model = Checkpoint::resolve(&self.location)?.with_weights(file.into())?;
                return Loaded::read(&model, &self.options, true);
            }
            Weights::Lora(file) => Some(Adapter::from_bytes(&file)?),
            Weights::Base => None,
        };
        let mut base = match base {
            Some(base) => base,
            None => Loaded::read(&Checkpoint::resolve(&self.location)?, &self.options, false)?,
        };
        base.auditor.set_adapter(adapter.as_ref())?;
        Ok(base)
    }
}

impl Loaded {
    fn read(model: &Checkpoint, options: &LoadOptions, replaced: bool) -> anyhow::Result<Self> {
        let auditor = Auditor::new(Stage::load(model, options)?, model.config().n_layers)?;
        Ok(Self { auditor, replaced, hash: None })
    }
}

impl Replay for ModelReplay {
    fn holds(&self, hash: Option<[u8; 32]>) -> bool {
        self.loaded.as_ref().is_some_and(|loaded| loaded.hash == hash)
    }

    fn install(&mut self, hash: Option<[u8; 32]>, weights: Weights) -> Result<(), String> {
        let loaded = self.changed_to(weights).map_err(|error| program::sentence(&error))?;
        self.loaded = Some(Loaded { hash, ..loaded });
        Ok(())
    }

    fn replay(&mut self, job: &Job, answer: &Answer) -> Result<veri_verify::Replay, String> {
        // In another format honest work has other bits.
        if self.model_id != job.model_id {
            return Err(format!("this auditor has model {}, not {}", self.model_id, job.model_id));
        }
        let Some(loaded) = self.loaded.as_mut().filter(|loaded| loaded.hash == job.adapter_hash) else {
            return Err(format!("the weights of version {} are not installed", job.policy_version));
        };
        let params = SamplingParams {
            temperature: job.sampling.temperature,
            top_k: job.sampling.top_k as usize,
            top_p: job.sampling.top_p,
            seed: job.sampling.seed,
            ..SamplingParams::default()
        };
        let sampler = self.sampler;
        let mut draw = |i: usize, logits: &[f32]| {
            let position = (job.prompt.len() + i) as u64;
            drawn(&sampler, logits, &params, position, answer.tokens[i])
        };
        loaded.auditor.replay(job, answer, Some(&mut draw)).map_err(|e| e.to_string())
    }
}

/// What a sampler draws at `position`: `claimed`, when the random number lies in its share of the probabilities or so
/// near to it that another order of summation moves it there.
fn drawn(
    sampler: &parallax_engine::Sampler,
    logits: &[f32],
    params: &SamplingParams,
    position: u64,
    claimed: u32,
) -> u32 {
    // Without a constraint every token may be drawn, so that there is always one.
    let place = Place { position, generated: usize::MAX, history: None };
    let sampled = sampler.sample(logits, params, place, None).map_or(u32::MAX, |sampled| sampled.id);
    if sampled == claimed || params.temperature == 0.0 {
        return sampled;
    }
    let distribution = sampler.distribution(logits, params, place, None).unwrap_or_default();
    let shares: Vec<f64> = distribution.iter().map(|l| f64::from(*l).exp()).collect();
    let Some(share) = shares.get(claimed as usize).filter(|share| **share > 0.0) else { return sampled };
    let total: f64 = shares.iter().sum();
    let begin = shares[..claimed as usize].iter().sum::<f64>() / total;
    let near = begin - DRAW_SLACK..=begin + share / total + DRAW_SLACK;
    let random = uniform(params.seed, params.stream, position);
    if near.contains(&random) { claimed } else { sampled }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use echo_trainer::policy::{Policy as _, read_parameters};
    use parallax_engine::{EngineHandle, Request};
    use parallax_model::WeightDtype;
    use parallax_model::train::{TrainModel, TrainOptions};
    use swarm_wire::PolicyVersion;
    use veri_verify::Sampling;

    use super::super::{engine, policy_engine};
    use super::*;

    /// What the engine samples after `prompt` under `seed`, with what an auditor needs to know of it.
    async fn sampled(engine: &EngineHandle, prompt: &[u32], seed: u64, temperature: f32) -> (Job, Answer) {
        let sampling = SamplingParams { temperature, seed, max_tokens: 24, ..SamplingParams::default() };
        let request = Request { prompt: prompt.to_vec(), sampling, ..Request::default() };
        let completion = engine.generate(request).await.unwrap();
        let logprobs = completion.tokens.iter().map(|t| t.logprob).collect();
        let answer = Answer::new(completion.token_ids(), logprobs);
        let job = Job {
            model_id: Checkpoint::resolve("tiny").unwrap().id().unwrap(),
            policy_version: 0,
            adapter_hash: None,
            prompt: prompt.to_vec(),
            sampling: Sampling { temperature, seed, ..Sampling::default() },
            nonce: 1,
        };
        (job, answer)
    }

    fn agreeing(replay: &veri_verify::Replay, answer: &Answer) -> usize {
        replay.tokens.as_ref().unwrap().iter().zip(&answer.tokens).filter(|(a, b)| a == b).count()
    }

    #[tokio::test]
    async fn honest_draws_are_repeated_and_chosen_tokens_are_not() {
        let checkpoint = Checkpoint::resolve("tiny").unwrap();
        let engine = engine(&checkpoint, WeightDtype::F32, 256).unwrap();
        let mut auditor = ModelReplay::load(&checkpoint, BaseDtype::F32, 256).unwrap();
        let prompt: Vec<u32> = (40..150).collect();
        for (seed, temperature) in [(1, 1.0), (2, 1.0), (3, 0.7), (4, 0.0)] {
            let (job, answer) = sampled(&engine, &prompt, seed, temperature).await;
            let replay = auditor.replay(&job, &answer).unwrap();
            assert_eq!(agreeing(&replay, &answer), answer.tokens.len(), "seed {seed} at {temperature}");
            assert_eq!(replay.logprobs, answer.logprobs, "the same bits");
        }
        // A worker that takes the tokens of another seed and reports their true log-probabilities.
        let (_, chosen) = sampled(&engine, &prompt, 9, 1.0).await;
        let (job, _) = sampled(&engine, &prompt, 1, 1.0).await;
        let replay = auditor.replay(&job, &chosen).unwrap();
        assert_eq!(replay.logprobs, chosen.logprobs);
        assert!(agreeing(&replay, &chosen) * 10 < chosen.tokens.len() * 9, "{replay:?}");
        // An auditor with weights in another format convicts nobody.
        let mut other = ModelReplay::load(&checkpoint, BaseDtype::Q8_0, 256).unwrap();
        assert!(other.replay(&job, &chosen).unwrap_err().contains("with weights in q8_0"));
        let job = Job { model_id: BaseDtype::Q8_0.model_id(&job.model_id), ..job };
        assert_ne!(other.replay(&job, &chosen).unwrap().logprobs, chosen.logprobs);
    }

    #[tokio::test]
    async fn each_version_is_recomputed_with_its_own_weights_whatever_came_before_it() {
        let checkpoint = Checkpoint::resolve("tiny").unwrap();
        let options = TrainOptions { lora: None, full: true };
        let mut model = TrainModel::from_checkpoint(&checkpoint, &options).unwrap();
        let mut next = |scale: f32| {
            let mut parameters = read_parameters(&model);
            parameters[0].values.iter_mut().for_each(|value| *value *= scale);
            model.assign(&parameters).unwrap();
            Weights::Full(model.to_safetensors().unwrap().into())
        };
        let versions = [Weights::Base, next(1.05), next(0.9), Weights::Base];
        let engine = policy_engine(&checkpoint, WeightDtype::F32, 256).unwrap();
        let mut auditor = ModelReplay::load(&checkpoint, BaseDtype::F32, 256).unwrap();
        let (prompt, mut seen): (Vec<u32>, Vec<Vec<f32>>) = ((40..60).collect(), Vec::new());
        for (number, weights) in (1..).zip(versions) {
            let hash = match &weights {
                Weights::Full(file) => Some(*blake3::hash(file).as_bytes()),
                _ => None,
            };
            engine.install(PolicyVersion(number), weights.clone()).await.unwrap();
            let (job, answer) = sampled(engine.engine(), &prompt, 1, 1.0).await;
            let job = Job { policy_version: number, adapter_hash: hash, ..job };
            if !auditor.holds(hash) {
                assert!(auditor.replay(&job, &answer).unwrap_err().contains("not installed"));
                auditor.install(hash, weights).unwrap();
            }
            let replay = auditor.replay(&job, &answer).unwrap();
            assert_eq!(replay.logprobs, answer.logprobs, "version {number}: the same bits");
            assert_eq!(agreeing(&replay, &answer), answer.tokens.len());
            seen.push(answer.logprobs);
        }
        assert_eq!(seen[0], seen[3], "the base checkpoint was read again");
        assert!(seen[0] != seen[1] && seen[1] != seen[2], "three policies");
        // Weights that are none leave nothing behind that could be taken for them.
        let junk = Bytes::from_static(b"no weights");
        auditor.install(Some([1; 32]), Weights::Full(junk)).unwrap_err();
        assert!(!auditor.holds(Some([1; 32])) && !auditor.holds(None));
        auditor.install(None, Weights::Base).unwrap();
        assert!(auditor.holds(None));
    }

    #[test]
    fn a_draw_on_the_edge_agrees_with_both_sides() {
        let sampler = parallax_engine::Sampler::new(logprob::log_softmax);
        let (params, position) =
            (SamplingParams { seed: 5, temperature: 1.0, ..SamplingParams::default() }, 7);
        // Token 0's share ends where the random number lies, give or take.
        let random = uniform(params.seed, params.stream, position);
        let logits = |share: f64| {
            [share.ln() as f32, ((1.0 - share) / 2.0).ln() as f32, ((1.0 - share) / 2.0).ln() as f32]
        };
        for share in [random - DRAW_SLACK / 2.0, random + DRAW_SLACK / 2.0] {
            for claimed in [0, 1] {
                assert_eq!(drawn(&sampler, &logits(share), &params, position, claimed), claimed);
            }
            assert_ne!(drawn(&sampler, &logits(share), &params, position, 2), 2);
        }
        assert_eq!(drawn(&sampler, &logits(random + 0.01), &params, position, 1), 0);
    }
}
