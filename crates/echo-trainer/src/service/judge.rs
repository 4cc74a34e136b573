//! A trained reward model as a verifier: an environment whose tasks are another one's, and whose rewards are its scores.
//!
//! An answer's score is the log-probability of a second end of the sequence after it
//! ([`crate::preference::judged`]); its reward is `sigmoid(score - middle)`, 0 to 1, where the middle is the mean score of the
//! pairs that the judge learnt from. It is rounded to thousandths, so that what trainer and workers compute on processors of
//! different kinds is the same but for the rarest of cases, which cost a lease.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use echo_rollout::environment::{Environment, Episode, Reward, RewardError, Task, one_turn};
use parallax_model::train::{LoraConfig, TrainModel, TrainOptions};
use parallax_model::{Adapter, BaseDtype, Checkpoint};
use serde::{Deserialize, Serialize};

use super::checkpoint_dir::{self, CheckpointDirError};
use super::finetuning::targets;
use crate::data::ChatEncoder;
use crate::policy::values;
use crate::preference::judged;

/// What makes a reward model of it, beside the adapter.
const SCALE: &str = "reward_model.json";
/// Rewards are multiples of one over this.
const ROUNDED: f64 = 1000.0;

/// What makes a reward model of an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardScale {
    /// The model under the adapter, as settings name it.
    pub model: String,
    /// The score that is worth one half.
    pub middle: f64,
    /// Format of the model's weights in which the adapter was trained.
    #[serde(default)]
    pub base_dtype: BaseDtype,
}

impl RewardScale {
    /// Writes it beside the adapter in `dir`.
    ///
    /// # Errors
    /// When the disk refuses.
    pub fn save(&self, dir: &Path) -> Result<(), CheckpointDirError> {
        let text = serde_json::to_vec(self).expect("a number becomes JSON");
        checkpoint_dir::write(&dir.join(SCALE), &text)
    }
}

/// Why there is no judge.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JudgeError {
    /// No reward model is there.
    #[error("{}: {reason}; is it what training-swarm reward made?", path.display())]
    Absent {
        /// Where it should be.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The model that it is of.
    #[error("the judge's model: {reason}")]
    Model {
        /// The model's own words.
        reason: String,
    },
    /// Tasks that cannot be judged by their one answer.
    #[error("{environment} has {turns} turns; a reward model judges the one answer to a prompt")]
    Turns {
        /// What was to be judged.
        environment: String,
        /// How often the policy speaks there.
        turns: usize,
    },
}

/// A reward model.
pub struct Judge {
    /// One answer is scored at a time.
    model: Mutex<TrainModel>,
    encoder: ChatEncoder,
    scale: RewardScale,
    /// Names its adapter, the model under it and its scale.
    version: u32,
}

impl std::fmt::Debug for Judge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Judge({:08x})", self.version)
    }
}

impl Judge {
    /// The reward model in `dir`.
    ///
    /// # Errors
    /// Nothing of the kind in `dir`, or its model is not here.
    pub fn load(dir: &Path) -> Result<Self, JudgeError> {
        let absent = |file: &str, reason: &dyn std::fmt::Display| JudgeError::Absent {
            path: dir.join(file),
            reason: reason.to_string(),
        };
        let model_error = |e: &dyn std::fmt::Display| JudgeError::Model { reason: e.to_string() };
        let text = std::fs::read(dir.join(SCALE)).map_err(|e| absent(SCALE, &e))?;
        let scale: RewardScale = serde_json::from_slice(&text).map_err(|e| absent(SCALE, &e))?;
        if !scale.middle.is_finite() {
            return Err(absent(SCALE, &"middle is not a finite number"));
        }
        let checkpoint = Checkpoint::resolve(&scale.model).map_err(|e| model_error(&e))?;
        let adapter = Adapter::load(dir).map_err(|e| absent("adapter_model.safetensors", &e))?;
        let lora = LoraConfig {
            rank: adapter.rank,
            alpha: adapter.alpha,
            targets: targets(&adapter),
            seed: 0,
            base_dtype: scale.base_dtype,
        };
        let options = TrainOptions { lora: Some(lora), full: false };
        let mut model = TrainModel::from_checkpoint(&checkpoint, &options).map_err(|e| model_error(&e))?;
        model.set_adapter(&adapter).map_err(|e| model_error(&e))?;
        let eos = checkpoint.config().eos.first().copied();
        let eos = eos.ok_or_else(|| model_error(&"it names no end-of-sequence token"))?;
        let tokenizer = checkpoint.tokenizer().map_err(|e| model_error(&e))?;
        let template = checkpoint.chat_template().map_err(|e| model_error(&e))?;
        let mut hasher = blake3::Hasher::new_derive_key("echo-trainer judge v1");
        hasher.update(&adapter.to_bytes().map_err(|e| model_error(&e))?);
        hasher.update(&scale.middle.to_le_bytes());
        // Other weights may stand under the same name elsewhere.
        let id = checkpoint.id().map_err(|e| model_error(&e))?;
        hasher.update(scale.base_dtype.model_id(&id).as_bytes());
        let version = u32::from_le_bytes(hasher.finalize().as_bytes()[..4].try_into().expect("four bytes"));
        let encoder = ChatEncoder::new(tokenizer, template, eos);
        Ok(Self { model: Mutex::new(model), encoder, scale, version })
    }

    /// What `answer` to `question` is worth: 0 to 1, one half for an answer that is neither good nor bad.
    ///
    /// # Errors
    /// The model's own words, when they are too long for it.
    pub fn reward(&self, question: &str, answer: &str) -> Result<f32, String> {
        let line = self.encoder.line(question, answer, false).map_err(|e| e.to_string())?;
        let line = judged(line.tokens, self.encoder.eos());
        let n = u32::try_from(line.tokens.len()).map_err(|e| e.to_string())?;
        let model = self.model.lock().unwrap_or_else(PoisonError::into_inner);
        let logprobs = model.token_logprobs(&line.tokens, &[0, n]).map_err(|e| e.to_string())?;
        let score = values(logprobs.into_data()).last().copied().unwrap_or_default();
        let reward = 1.0 / (1.0 + (self.scale.middle - f64::from(score)).exp());
        Ok(((reward * ROUNDED).round() / ROUNDED) as f32)
    }
}

/// Tasks of one environment, rewards of a judge.
#[derive(Debug)]
pub struct Judged {
    name: String,
    tasks: Box<dyn Environment>,
    judge: Judge,
}

impl Judged {
    /// `judge` takes the place of the verifier of `tasks`.
    ///
    /// # Errors
    /// When a task is more than a prompt and one answer.
    pub fn new(tasks: Box<dyn Environment>, judge: Judge) -> Result<Self, JudgeError> {
        if tasks.turns() != 1 {
            return Err(JudgeError::Turns { environment: tasks.name().to_owned(), turns: tasks.turns() });
        }
        Ok(Self { name: format!("judged@{}", tasks.name()), tasks, judge })
    }
}

impl Environment for Judged {
    fn name(&self) -> &str {
        &self.name
    }

    /// Another judge gives other rewards.
    fn version(&self) -> u32 {
        self.tasks.version() ^ self.judge.version
    }

    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        self.tasks.task(seed)
    }

    fn concurrency(&self) -> usize {
        1
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        one_turn(self, task)
    }

    fn verify(&self, task: &Task, completion: &str) -> Result<Reward, RewardError> {
        let value = self.judge.reward(&task.prompt, completion);
        let value =
            value.map_err(|reason| RewardError::Verifier { environment: self.name.clone(), reason })?;
        Reward::new(value, Vec::new(), &self.reward_range())
    }
}

#[cfg(test)]
mod tests {
    use echo_rollout::environment::by_name;

    use super::super::finetuning::{Job, reward};
    use super::*;
    use crate::config::FinetuneConfig;

    #[test]
    fn a_judge_learns_from_pairs_and_its_scores_are_rewards() {
        let checkpoint = Checkpoint::tiny().unwrap();
        // Of two numbers the larger one is better, whatever is asked.
        let pair = |a: u32, b: u32| {
            format!("{{\"prompt\": \"What is {a}+{b}?\", \"chosen\": \"9{b}\", \"rejected\": \"1{b}\"}}")
        };
        let lines: Vec<String> = (0..8).map(|i| pair(i + 2, i)).collect();
        let lines = lines.join("\n");
        let out = tempfile::tempdir().unwrap();
        let mut config = FinetuneConfig { steps: 30, batch: 8, max_tokens: 64, ..FinetuneConfig::default() };
        config.optim.learning_rate = 1e-2;
        let (config, lines) = (&config, lines.as_bytes());
        let (model, out_dir) = ("tiny", out.path());
        let job = Job { config, model, checkpoint: &checkpoint, adapter: None, lines, out: out_dir };
        let report = reward(&job, |_| ()).unwrap();
        assert!(report.loss_after < 0.3 && report.accuracy_after == Some(1.0), "{report:?}");

        let judge = Judge::load;
        let judged = Judged::new(by_name("arithmetic").unwrap(), judge(out.path()).unwrap()).unwrap();
        assert_eq!(judged.name(), "judged@arithmetic");
        let task = judged.task(3).unwrap();
        let worth = |answer: &str| judged.verify(&task, answer).unwrap().value();
        assert!(worth("93") > 0.6 && worth("13") < 0.4, "{} {}", worth("93"), worth("13"));
        assert_eq!(worth("93"), worth("93"));
        let thousandths = f64::from(worth("93")) * ROUNDED;
        assert!((thousandths - thousandths.round()).abs() < 1e-3, "{thousandths}");
        assert!(matches!(judged.verify(&task, &"9".repeat(5000)), Err(RewardError::Verifier { .. })));
        // Another judge is another environment, so that workers with it are refused.
        let saved = |model: &str, base_dtype| {
            RewardScale { model: model.to_owned(), middle: -1.0, base_dtype }.save(out.path()).unwrap();
        };
        saved("tiny", BaseDtype::F32);
        let other = Judged::new(by_name("arithmetic").unwrap(), judge(out.path()).unwrap()).unwrap();
        assert_ne!(other.version(), judged.version());
        // Or the same weights in another format.
        saved("tiny", BaseDtype::Bf16);
        let thin = Judged::new(by_name("arithmetic").unwrap(), judge(out.path()).unwrap()).unwrap();
        assert_ne!(thin.version(), other.version());
        // And so is one with other weights under the adapter: those of the tiny model but for the last bit of one.
        let base = tempfile::tempdir().unwrap();
        let full =
            TrainModel::from_checkpoint(&checkpoint, &TrainOptions { lora: None, full: true }).unwrap();
        full.save_companions(base.path()).unwrap();
        let mut weights = full.to_safetensors().unwrap();
        let model = base.path().display().to_string();
        let mut version = |last_bit: u8| {
            *weights.iter_mut().nth_back(3).unwrap() ^= last_bit;
            std::fs::write(base.path().join("model.safetensors"), &weights).unwrap();
            saved(&model, BaseDtype::F32);
            Judged::new(by_name("arithmetic").unwrap(), judge(out.path()).unwrap()).unwrap().version()
        };
        assert_ne!(version(0), version(1), "with the same adapter and the same scale");

        let game = Judged::new(by_name("kuhn:uniform").unwrap(), judge(out.path()).unwrap()).unwrap_err();
        assert!(game.to_string().contains("turns"), "{game}");
        let nothing = judge(Path::new("no/such/dir")).unwrap_err().to_string();
        assert!(
            nothing.contains("reward_model.json") && nothing.contains("training-swarm reward"),
            "{nothing}"
        );
    }
}
