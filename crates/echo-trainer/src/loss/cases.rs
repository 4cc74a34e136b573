//! Loss cases as JSON (the shape of `tests/golden/golden-rl-losses.json`): read inputs, compute losses and gradients.
//!
//! A case names its loss in TRL's words (`loss_type`, `beta`, `lo`, `hi`, `delta`, `level`) or as a whole [`LossConfig`].
//! Rectangular there, ragged here: a row of the file keeps the tokens that its mask marks, and gradients come back as
//! rectangles with zeros. Expected numbers in the file are not read by [`CaseFile::run`].

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::config::{LossConfig, RatioLevel};
use super::kl::KlTerm;
use super::{LossError, LossKind, PolicyTargets, reference, tensor};

/// A file of loss cases over one batch `[B][T]`.
#[derive(Debug, Clone, Deserialize)]
pub struct CaseFile {
    /// 1 for trainable tokens.
    pub mask: Vec<Vec<f64>>,
    /// Current log-probabilities.
    pub logprobs: Vec<Vec<f64>>,
    /// As sampled.
    pub old_logprobs: Vec<Vec<f64>>,
    /// Under the reference policy.
    pub ref_logprobs: Vec<Vec<f64>>,
    /// Under the proximal policy, for losses that are anchored there.
    #[serde(default)]
    pub proximal_logprobs: Option<Vec<Vec<f64>>>,
    /// Advantages `[B]` by name.
    pub advantages: std::collections::BTreeMap<String, Vec<f64>>,
    /// The cases.
    pub cases: Vec<Case>,
}

/// One case: which loss, with which settings.
#[derive(Debug, Clone, Deserialize)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// Which entry of [`CaseFile::advantages`].
    pub advantages: String,
    /// The loss in TRL's words, with the fields below.
    #[serde(default)]
    pub loss_type: Option<LossKind>,
    /// The loss with all of its parts; the fields below are not read then.
    #[serde(default)]
    pub config: Option<LossConfig>,
    /// Where the ratio is taken.
    #[serde(default)]
    pub level: RatioLevel,
    /// Weight of the divergence.
    #[serde(default)]
    pub beta: f64,
    /// Lower clip.
    #[serde(default = "default_clip")]
    pub lo: f64,
    /// Upper clip.
    #[serde(default = "default_clip")]
    pub hi: f64,
    /// Two-sided clip.
    #[serde(default)]
    pub delta: Option<f64>,
    /// False: the current log-probabilities are the sampled ones.
    #[serde(default = "default_old")]
    pub oldlp: bool,
}

fn default_clip() -> f64 {
    0.2
}

fn default_old() -> bool {
    true
}

/// One case's outcome.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseResult {
    /// The case's name.
    pub name: String,
    /// The loss, from the tensor version.
    pub loss: f64,
    /// `d loss / d logprob` `[B][T]`, from the tensor version.
    pub grad: Vec<Vec<f64>>,
    /// Largest absolute difference of loss and gradient from the f64 version.
    pub reference_difference_max: f64,
}

/// Why a case file could not be evaluated.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaseError {
    /// Not JSON of that shape.
    #[error("loss cases: {0}")]
    Json(#[from] serde_json::Error),
    /// A row or list of the wrong length.
    #[error("loss cases: {what} does not have the shape of the mask")]
    Shape {
        /// Which list.
        what: &'static str,
    },
    /// A case names advantages that the file does not have.
    #[error("loss case {case} names the advantages {name}, which the file does not have")]
    Advantages {
        /// The case.
        case: String,
        /// The name.
        name: String,
    },
    /// A case without a loss.
    #[error("loss case {case} has neither loss_type nor config")]
    NoLoss {
        /// The case.
        case: String,
    },
    /// The loss refused its input.
    #[error("loss case {case}: {source}")]
    Loss {
        /// The case.
        case: String,
        /// Why.
        source: LossError,
    },
    /// Gradients could not be read back.
    #[error("loss case {case}: no gradient came back")]
    NoGradient {
        /// The case.
        case: String,
    },
}

impl CaseFile {
    /// Reads a file's text.
    ///
    /// # Errors
    /// When it is not JSON of the expected shape.
    pub fn parse(json: &str) -> Result<Self, CaseError> {
        let file: Self = serde_json::from_str(json)?;
        let shape = |rows: &[Vec<f64>]| rows.iter().map(Vec::len).collect::<Vec<_>>();
        let mask = shape(&file.mask);
        for (what, rows) in [
            ("logprobs", &file.logprobs),
            ("old_logprobs", &file.old_logprobs),
            ("ref_logprobs", &file.ref_logprobs),
            ("proximal_logprobs", file.proximal_logprobs.as_ref().unwrap_or(&file.logprobs)),
        ] {
            if shape(rows) != mask {
                return Err(CaseError::Shape { what });
            }
        }
        if file.advantages.values().any(|a| a.len() != mask.len()) {
            return Err(CaseError::Shape { what: "advantages" });
        }
        Ok(file)
    }

    /// Every case through both versions.
    ///
    /// # Errors
    /// At the first case that cannot be computed.
    pub fn run(&self, device: &Device) -> Result<Vec<CaseResult>, CaseError> {
        self.cases.iter().map(|case| self.run_case(case, device)).collect()
    }

    fn run_case(&self, case: &Case, device: &Device) -> Result<CaseResult, CaseError> {
        let Some(advantages) = self.advantages.get(&case.advantages) else {
            return Err(CaseError::Advantages { case: case.name.clone(), name: case.advantages.clone() });
        };
        let width = self.mask.iter().map(Vec::len).max().unwrap_or(0);
        let mut offsets = vec![0];
        for row in &self.mask {
            offsets.push(offsets[offsets.len() - 1] + row.len());
        }
        let config = match (case.config, case.loss_type) {
            (Some(config), _) => config,
            (None, Some(kind)) => {
                let length = u32::try_from(width).unwrap_or(u32::MAX);
                let trl = LossConfig::trl(kind, case.lo, case.hi, case.delta, length);
                LossConfig { level: case.level, ..trl }.with_kl(KlTerm::trl(case.beta))
            }
            (None, None) => return Err(CaseError::NoLoss { case: case.name.clone() }),
        };
        let targets = PolicyTargets {
            mask: self.mask.iter().flatten().map(|m| *m > 0.5).collect(),
            sampled: case.oldlp.then(|| self.old_logprobs.concat()),
            proximal: self.proximal_logprobs.as_ref().map(|rows| rows.concat()),
            reference: Some(self.ref_logprobs.concat()),
            advantages: PolicyTargets::spread(&offsets, advantages),
            offsets,
        };
        let fault = |source| CaseError::Loss { case: case.name.clone(), source };
        let logprobs = self.logprobs.concat();
        let by_hand = reference::policy_loss(&logprobs, &targets, &config).map_err(fault)?;

        let narrow: Vec<f32> = logprobs.iter().map(|v| *v as f32).collect();
        let leaf = Tensor::<1>::from_data(TensorData::new(narrow, [logprobs.len()]), device).require_grad();
        let loss = tensor::policy_loss(&leaf, &targets, &config).map_err(fault)?;
        let gradients = loss.backward();
        let no_gradient = || CaseError::NoGradient { case: case.name.clone() };
        let flat = leaf.grad(&gradients).ok_or_else(no_gradient)?.into_data();
        let flat: Vec<f64> = flat.iter::<f64>().collect();
        let loss = loss.into_data().iter::<f64>().next().ok_or_else(no_gradient)?;

        let differences = flat.iter().zip(&by_hand.gradient).map(|(a, b)| (a - b).abs());
        let reference_difference_max = differences.fold((loss - by_hand.loss).abs(), f64::max);
        let grad = self.mask.iter().enumerate().map(|(i, row)| {
            let start = targets.offsets[i];
            flat[start..start + row.len()].to_vec()
        });
        Ok(CaseResult { name: case.name.clone(), loss, grad: grad.collect(), reference_difference_max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = include_str!("../../../../tests/golden/golden-rl-losses.json");

    const VERL: &str = include_str!("../../../../tests/golden/golden-rl-verl.json");

    fn reproduces(golden: &str, cases: usize) {
        let file = CaseFile::parse(golden).unwrap();
        let expected: serde_json::Value = serde_json::from_str(golden).unwrap();
        let results = file.run(&Device::flex().autodiff()).unwrap();
        assert_eq!(results.len(), cases);
        for (result, want) in results.iter().zip(expected["cases"].as_array().unwrap()) {
            assert_eq!(result.name, want["name"].as_str().unwrap());
            let loss = want["loss"].as_f64().unwrap();
            assert!((result.loss - loss).abs() < 1e-5 * loss.abs().max(1.0), "{} {loss}", result.name);
            assert!(result.reference_difference_max < 1e-5 * loss.abs().max(1.0), "{}", result.name);
            for (got, row) in result.grad.iter().zip(want["grad"].as_array().unwrap()) {
                for (g, w) in got.iter().zip(row.as_array().unwrap()) {
                    let w = w.as_f64().unwrap();
                    assert!((g - w).abs() < 1e-5, "{}: {g} {w}", result.name);
                    assert!((g - w).abs() <= 2e-4 * w.abs() + 1e-7, "{}: {g} {w}", result.name);
                }
            }
        }
    }

    #[test]
    fn every_golden_case_of_trl_is_reproduced_to_1e_minus_5() {
        reproduces(GOLDEN, 12);
    }

    #[test]
    fn every_golden_case_of_verl_is_reproduced_to_1e_minus_5() {
        reproduces(VERL, 27);
    }

    #[test]
    fn a_case_without_a_loss_is_named() {
        let mut file = CaseFile::parse(GOLDEN).unwrap();
        file.cases[3].loss_type = None;
        let error = file.run(&Device::flex().autodiff()).unwrap_err();
        assert!(error.to_string().contains(&file.cases[3].name), "{error}");
    }

    #[test]
    fn a_case_with_unknown_advantages_is_named() {
        let mut file = CaseFile::parse(GOLDEN).unwrap();
        file.cases[0].advantages = "none".to_owned();
        let error = file.run(&Device::flex().autodiff()).unwrap_err();
        assert!(error.to_string().contains("grpo") && error.to_string().contains("none"), "{error}");
    }
}
