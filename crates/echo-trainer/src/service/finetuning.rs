//! Supervised fine-tuning, preference optimisation and reward models from a checkpoint and JSON lines, to an adapter as PEFT
//! writes it or to a model directory.

use std::path::Path;
use std::time::Instant;

use echo_rollout::environment::draws::Draws;
use parallax_model::train::{LoraConfig, MAX_SEQUENCE_TOKENS, TrainModel, TrainOptions};
use parallax_model::{Adapter, Checkpoint};
use serde::Serialize;

use super::checkpoint_dir::{self, CheckpointDirError};
use super::judge::RewardScale;
use crate::config::{ConfigError, FinetuneConfig};
use crate::data::ChatEncoder;
use crate::dataset::{BrokenLine, DatasetError, Reading};
use crate::error::StepError;
use crate::preference::{PairObjective, PairTrainer, judged};
use crate::pretrain::TextTrainer;
use crate::step::Labelled;

/// What the order of the examples is drawn for.
const ORDER: &str = "echo-trainer fine-tuning order v1";
/// The first so many examples give the losses before and after.
const MEASURED: usize = 256;
/// So many broken lines are named in a report.
const NAMED: usize = 20;

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FinetuneReport {
    /// Updates.
    pub steps: u64,
    /// Mean loss over the first 256 examples before learning: nats per learnt token, or the preference loss.
    pub loss_before: f64,
    /// The same after learning.
    pub loss_after: f64,
    /// Wall time.
    pub seconds: f64,
    /// Examples.
    pub examples: usize,
    /// Tokens seen.
    pub tokens: u64,
    /// Lines that were left out.
    pub broken_lines: usize,
    /// The first of them.
    pub broken: Vec<BrokenLine>,
    /// Pairs: share of the measured ones that are ordered right, after learning; by a policy, more clearly than by the reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accuracy_after: Option<f64>,
    /// Pairs: mean margin of the measured ones, after learning; of a policy, over the reference.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin_after: Option<f64>,
}

/// Progress, for people.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// Updates so far.
    pub step: u64,
    /// Updates of the run.
    pub steps: u64,
    /// Loss of the last batch.
    pub loss: f64,
    /// Wall time so far.
    pub seconds: f64,
}

/// Why nothing came out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FinetuneError {
    /// Settings.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The model or the adapter to start from.
    #[error("fine-tuning: {0}")]
    Model(String),
    /// The data.
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    /// A step.
    #[error(transparent)]
    Step(#[from] StepError),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] CheckpointDirError),
}

fn model_error(error: impl std::fmt::Display) -> FinetuneError {
    FinetuneError::Model(error.to_string())
}

/// What is trained and where it goes.
#[derive(Debug, Clone, Copy)]
pub struct Job<'a> {
    /// Settings.
    pub config: &'a FinetuneConfig,
    /// What settings call the model to start from; a reward model remembers it.
    pub model: &'a str,
    /// That model.
    pub checkpoint: &'a Checkpoint,
    /// An adapter to go on with; its rank, scale and modules count instead of the settings'.
    pub adapter: Option<&'a Adapter>,
    /// The data: JSON lines.
    pub lines: &'a [u8],
    /// Directory for what comes out.
    pub out: &'a Path,
}

/// Learns from `{"prompt", "completion"}` or `{"messages"}` lines.
///
/// # Errors
/// A setting out of range, data that cannot be used, a diverging run, a full disk.
pub fn sft(job: &Job<'_>, mut progress: impl FnMut(Progress)) -> Result<FinetuneReport, FinetuneError> {
    let started = Instant::now();
    let (encoder, model) = job.open()?;
    let data = job.reading(&encoder).labelled(job.lines)?;
    let config = job.config;
    let mut trainer = TextTrainer::new(model, config.optim, config.micro_batch_tokens)?;
    let measured = &data.rows[..data.rows.len().min(MEASURED)];
    let mut report = FinetuneReport::new(&data.rows, &data.broken);
    report.loss_before = trainer.loss(measured)?;
    report.steps = job.each_batch(data.rows.len(), |step, steps, batch| {
        let batch: Vec<_> = batch.iter().map(|i| data.rows[*i].clone()).collect();
        report.tokens += batch.iter().map(|l| l.tokens.len() as u64).sum::<u64>();
        let loss = trainer.step(&batch)?.loss;
        progress(Progress { step, steps, loss, seconds: started.elapsed().as_secs_f64() });
        Ok(())
    })?;
    report.loss_after = trainer.loss(measured)?;
    job.save(&trainer.into_policy())?;
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// Learns from `{"prompt", "chosen", "rejected"}` lines. The reference is the policy that the run starts from.
///
/// # Errors
/// As [`sft`].
pub fn dpo(job: &Job<'_>, progress: impl FnMut(Progress)) -> Result<FinetuneReport, FinetuneError> {
    Ok(job.learn_pairs(PairObjective::Preference(job.config.preference), progress)?.0)
}

/// Learns from the same lines to score answers: a reward model, for [`super::judge::Judge`].
///
/// # Errors
/// As [`sft`].
pub fn reward(job: &Job<'_>, progress: impl FnMut(Progress)) -> Result<FinetuneReport, FinetuneError> {
    if job.config.full {
        return Err(model_error(
            "a reward model is an adapter of the model that it judges with: set full = false",
        ));
    }
    let (report, middle) = job.learn_pairs(PairObjective::Reward(job.config.reward), progress)?;
    let base_dtype = job.config.base_dtype;
    RewardScale { model: job.model.to_owned(), middle, base_dtype }.save(job.out)?;
    Ok(report)
}

/// The projections that `adapter` is put on.
pub(super) fn targets(adapter: &Adapter) -> Vec<String> {
    let projection = |module: &String| module.rsplit('.').next().unwrap_or(module).to_owned();
    let mut targets: Vec<String> = adapter.tensors.keys().map(projection).collect();
    targets.sort_unstable();
    targets.dedup();
    targets
}

impl FinetuneReport {
    fn new<T>(rows: &[T], broken: &[BrokenLine]) -> Self {
        Self {
            steps: 0,
            loss_before: 0.0,
            loss_after: 0.0,
            seconds: 0.0,
            examples: rows.len(),
            tokens: 0,
            broken_lines: broken.len(),
            broken: broken.iter().take(NAMED).cloned().collect(),
            accuracy_after: None,
            margin_after: None,
        }
    }
}

impl Job<'_> {
    /// Checks what is cheap to check first, then loads the model.
    fn open(&self) -> Result<(ChatEncoder, TrainModel), FinetuneError> {
        self.config.validate()?;
        checkpoint_dir::create(self.out)?;
        let eos = self.checkpoint.config().eos.first().copied();
        let eos = eos.ok_or_else(|| model_error("the model names no end-of-sequence token"))?;
        let tokenizer = self.checkpoint.tokenizer().map_err(model_error)?;
        let template = self.checkpoint.chat_template().map_err(model_error)?;
        let options = match (self.config.full, self.adapter) {
            (true, None) => TrainOptions { lora: None, full: true },
            (true, Some(_)) => {
                return Err(model_error("an adapter is given but all weights are trained: set full = false"));
            }
            (false, adapter) => TrainOptions { lora: Some(self.lora(adapter)), full: false },
        };
        let mut model = TrainModel::from_checkpoint(self.checkpoint, &options).map_err(model_error)?;
        model.set_activation_checkpointing(self.config.activation_checkpointing);
        if let Some(adapter) = self.adapter {
            model.set_adapter(adapter).map_err(model_error)?;
        }
        Ok((ChatEncoder::new(tokenizer, template, eos), model))
    }

    fn lora(&self, adapter: Option<&Adapter>) -> LoraConfig {
        let config = self.config;
        let (rank, alpha, targets) = match adapter {
            None => (config.lora_rank, config.lora_alpha, config.lora_targets.clone()),
            Some(adapter) => (adapter.rank, adapter.alpha, targets(adapter)),
        };
        LoraConfig { rank, alpha, targets, seed: config.seed, base_dtype: config.base_dtype }
    }

    /// Learns from pairs; the report, and the mean of the measured answers' log-probabilities at the end.
    fn learn_pairs(
        &self,
        objective: PairObjective,
        mut progress: impl FnMut(Progress),
    ) -> Result<(FinetuneReport, f64), FinetuneError> {
        let started = Instant::now();
        let (encoder, model) = self.open()?;
        let mut reading = self.reading(&encoder);
        let judges = matches!(objective, PairObjective::Reward(_));
        // The end that tells a judge's score comes on top.
        reading.max_tokens -= usize::from(judges);
        let mut data = reading.pairs(self.lines)?;
        if judges {
            let scored =
                |line: &mut Labelled| *line = judged(std::mem::take(&mut line.tokens), encoder.eos());
            data.rows.iter_mut().flat_map(|pair| [&mut pair.chosen, &mut pair.rejected]).for_each(scored);
        }
        let config = self.config;
        let mut report = FinetuneReport::new(&data.rows, &data.broken);
        let lengths: Vec<u64> = data.rows.iter().map(|pair| pair.tokens() as u64).collect();
        let mut trainer =
            PairTrainer::new(model, data.rows, objective, config.optim, config.micro_batch_tokens)?;
        let measured: Vec<usize> = (0..lengths.len().min(MEASURED)).collect();
        report.loss_before = trainer.measure(&measured)?.loss;
        report.steps = self.each_batch(lengths.len(), |step, steps, batch| {
            report.tokens += batch.iter().map(|i| lengths[*i]).sum::<u64>();
            let loss = trainer.step(batch)?.loss;
            progress(Progress { step, steps, loss, seconds: started.elapsed().as_secs_f64() });
            Ok(())
        })?;
        let after = trainer.measure(&measured)?;
        report.loss_after = after.loss;
        (report.accuracy_after, report.margin_after) = (Some(after.accuracy), Some(after.margin));
        self.save(&trainer.into_policy())?;
        report.seconds = started.elapsed().as_secs_f64();
        Ok((report, after.middle))
    }

    fn reading<'a>(&self, encoder: &'a ChatEncoder) -> Reading<'a> {
        let c = self.config;
        let max_tokens = c.max_tokens.min(self.checkpoint.config().max_context).min(MAX_SEQUENCE_TOKENS);
        Reading { encoder, max_tokens, learn_prompt: c.learn_prompt, on_broken: c.on_broken }
    }

    /// Calls `with` with the number of each step, of all steps, and the step's examples: pass after pass over `n`, each in
    /// an order of its own. How many steps were made.
    fn each_batch(
        &self,
        n: usize,
        mut with: impl FnMut(u64, u64, &[usize]) -> Result<(), StepError>,
    ) -> Result<u64, StepError> {
        let batch = self.config.batch.min(n);
        let per_epoch = n.div_ceil(batch) as u64;
        let steps = match self.config.steps {
            0 => per_epoch.saturating_mul(self.config.epochs),
            steps => steps,
        };
        let mut order: Vec<usize> = Vec::new();
        for step in 0..steps {
            let at = (step % per_epoch) as usize * batch;
            if at == 0 {
                let epoch = (step / per_epoch).to_le_bytes();
                order = (0..n).collect();
                Draws::keyed(ORDER, self.config.seed, &epoch).shuffle(&mut order);
            }
            with(step + 1, steps, &order[at..(at + batch).min(n)])?;
        }
        Ok(steps)
    }

    fn save(&self, model: &TrainModel) -> Result<(), FinetuneError> {
        match model.adapter() {
            Some(adapter) => adapter.save(self.out).map_err(model_error),
            None => model.save_checkpoint(self.out).map_err(model_error),
        }
    }
}

#[cfg(test)]
mod tests {
    use parallax_model::BaseDtype;
    use serde_json::Value;

    use super::*;
    use crate::config::TrainerConfig;
    use crate::policy::values;

    const PEFT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/peft");

    fn config(steps: u64) -> FinetuneConfig {
        let mut config = FinetuneConfig { steps, batch: 4, max_tokens: 64, ..FinetuneConfig::default() };
        config.optim.learning_rate = 5.0 * TrainerConfig::default().optim.learning_rate;
        config
    }

    fn job<'a>(c: &'a FinetuneConfig, model: &'a Checkpoint, lines: &'a str, out: &'a Path) -> Job<'a> {
        Job { config: c, model: "tiny", checkpoint: model, adapter: None, lines: lines.as_bytes(), out }
    }

    #[test]
    fn an_adapter_of_peft_computes_what_it_does_there_and_goes_back_unchanged() {
        let checkpoint = Checkpoint::tiny().unwrap();
        let expected: Value =
            serde_json::from_slice(&std::fs::read(format!("{PEFT}/expected.json")).unwrap()).unwrap();
        let numbers = |name: &str| -> Vec<f64> {
            expected[name].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect()
        };
        let tokens: Vec<u32> = numbers("tokens").iter().map(|t| *t as u32).collect();
        let adapter = Adapter::load(Path::new(PEFT)).unwrap();
        assert_eq!((adapter.rank, adapter.alpha), (2, 6.0));
        let out = tempfile::tempdir().unwrap();
        let c = config(1);
        let job = Job { adapter: Some(&adapter), ..job(&c, &checkpoint, "", out.path()) };
        let (_, model) = job.open().unwrap();
        let got = values(model.token_logprobs(&tokens, &[0, tokens.len() as u32]).unwrap().into_data());
        let far: f64 =
            numbers("logprobs").iter().zip(numbers("logprobs_without")).map(|(a, b)| (a - b).abs()).sum();
        assert!(far > 1.0, "the adapter changes something: {far}");
        for (got, expected) in got.iter().zip(numbers("logprobs")) {
            assert!((f64::from(*got) - expected).abs() < 2e-4, "{got} {expected}");
        }
        // Out again: the same tensors under the same names, and settings that mean the same.
        job.save(&model).unwrap();
        let tensors = |dir: &Path| {
            let bytes = std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
            let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
            let mut all: Vec<(String, Vec<usize>, Vec<u8>)> =
                file.iter().map(|(n, t)| (n.to_owned(), t.shape().to_vec(), t.data().to_vec())).collect();
            all.sort();
            all
        };
        assert_eq!(tensors(out.path()), tensors(Path::new(PEFT)));
        let settings = |dir: &Path| -> Value {
            serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
        };
        let (ours, theirs) = (settings(out.path()), settings(Path::new(PEFT)));
        for (name, value) in ours.as_object().unwrap() {
            let sorted = |v: &Value| {
                let mut all: Vec<String> = v.as_array().into_iter().flatten().map(Value::to_string).collect();
                all.sort();
                all
            };
            let same = match value {
                Value::Array(_) => sorted(value) == sorted(&theirs[name]),
                Value::Number(n) => n.as_f64() == theirs[name].as_f64(),
                _ => *value == theirs[name],
            };
            assert!(same, "{name}: {value} here, {} there", theirs[name]);
        }
    }

    #[test]
    fn examples_are_learnt_broken_lines_are_counted_and_a_second_run_goes_on() {
        let checkpoint = Checkpoint::tiny().unwrap();
        let lines = r#"{"prompt": "What is 1+1?", "completion": "zebra"}
{"prompt": "What is 2+1?", "completion": "zebra"}
no line
{"prompt": "What is 7+1?", "completion": "zebra"}
"#;
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut c = config(40);
        let refused = sft(&job(&c, &checkpoint, lines, first.path()), |_| ()).unwrap_err();
        assert!(refused.to_string().contains("line 3"), "{refused}");
        c.on_broken = crate::dataset::BrokenLines::Skip;
        let report = sft(&job(&c, &checkpoint, lines, first.path()), |_| ()).unwrap();
        assert_eq!((report.steps, report.examples, report.broken_lines), (40, 3, 1));
        assert_eq!(report.broken[0].line, 3);
        assert!(report.loss_after < 0.2 * report.loss_before, "{report:?}");
        // The same again is the same; and a run from what came out begins where it ended.
        let again = sft(&job(&c, &checkpoint, lines, second.path()), |_| ()).unwrap();
        assert_eq!((again.loss_before, again.loss_after), (report.loss_before, report.loss_after));
        let adapter = Adapter::load(first.path()).unwrap();
        let further = Job { adapter: Some(&adapter), ..job(&c, &checkpoint, lines, second.path()) };
        assert_eq!(sft(&further, |_| ()).unwrap().loss_before, report.loss_after);
    }

    #[test]
    fn a_line_that_is_longer_than_the_context_is_broken() {
        let checkpoint = Checkpoint::tiny().unwrap();
        let long = "7 ".repeat(checkpoint.config().max_context);
        let lines = format!(
            "{{\"prompt\": \"What is 1+1?\", \"completion\": \"{long}\"}}\n{{\"prompt\": \"What is 1+1?\", \"completion\": \"two\"}}\n"
        );
        let on_broken = crate::dataset::BrokenLines::Skip;
        let c = FinetuneConfig { max_tokens: 4096, on_broken, ..config(1) };
        let out = tempfile::tempdir().unwrap();
        let report = sft(&job(&c, &checkpoint, &lines, out.path()), |_| ()).unwrap();
        assert_eq!((report.examples, report.broken_lines), (1, 1));
    }

    #[test]
    fn preferences_are_learnt() {
        let checkpoint = Checkpoint::tiny().unwrap();
        let lines = r#"{"prompt": "What is 1+1?", "chosen": "two", "rejected": "2"}
{"prompt": "What is 2+1?", "chosen": "three", "rejected": "3"}
"#;
        for base_dtype in [BaseDtype::F32, BaseDtype::Bf16] {
            let out = tempfile::tempdir().unwrap();
            let c = FinetuneConfig { base_dtype, ..config(30) };
            let report = dpo(&job(&c, &checkpoint, lines, out.path()), |_| ()).unwrap();
            assert!((report.loss_before - 2f64.ln()).abs() < 1e-5, "{report:?}");
            assert!(report.loss_after < 0.2 && report.accuracy_after == Some(1.0), "{report:?}");
            Adapter::load(out.path()).unwrap();
        }
    }
}
