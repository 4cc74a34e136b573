//! Everything that a run needs to go on as if it had not stopped, as bytes: one safetensors payload and one JSON
//! manifest that names the payload's hash. Writing them to disk is the service's work.
//!
//! Parameters, both moments, the step counters, the version and the consumed leases travel together, so that a lease is
//! consumed exactly when its gradient is in the weights.
//!
//! Trajectories that were received and not yet trained on are not in it: they are in the collector's journal, which was
//! written before they were acknowledged. The version is the place in that journal: the step that made it, and all before,
//! are consumed when the journal is read again, and the groups that a later step had go to the same step once more. Nothing
//! is drawn from a generator with a state, so there is none to keep. `interruptions` kills a run at every write.

#[cfg(test)]
mod interruptions;

use std::borrow::Cow;

use safetensors::tensor::{Dtype, SafeTensors, View, serialize};
use serde::{Deserialize, Serialize};
use swarm_wire::{PolicyVersion, RunId};

use crate::config::TrainerConfig;
use crate::error::StepError;
use crate::lease_set::LeaseSet;
use crate::optim::{AdamW, Moments};
use crate::parameters::{Parameter, Parameters};
use crate::policy::Policy;
use crate::trainer::Trainer;

/// Version of the manifest's format.
pub const FORMAT: u32 = 1;

/// The manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointManifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The run.
    pub run: RunId,
    /// Identity of the base checkpoint.
    pub base_model_id: String,
    /// Version of the weights inside.
    pub version: PolicyVersion,
    /// Optimiser updates so far.
    pub optimiser_steps: u64,
    /// Leases whose gradients are in the weights.
    pub consumed: LeaseSet,
    /// The run's settings.
    pub config: TrainerConfig,
    /// BLAKE3 of the payload, in hexadecimal.
    pub payload_blake3: String,
    /// Bytes of the payload.
    pub payload_bytes: u64,
    /// Parameter names in their order.
    pub parameters: Vec<String>,
}

/// A checkpoint in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainerCheckpoint {
    /// The manifest.
    pub manifest: CheckpointManifest,
    /// The payload: `NAME`, `NAME.first` and `NAME.second` for each parameter, f32.
    pub payload: Vec<u8>,
}

/// Why a checkpoint cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The manifest is not JSON of this format.
    #[error("checkpoint manifest: {0}")]
    Manifest(#[from] serde_json::Error),
    /// A format of another program version.
    #[error("checkpoint format {got} is not {FORMAT}; it was written by another version of this program")]
    Format {
        /// The format.
        got: u32,
    },
    /// Bytes that are not those of the manifest.
    #[error("checkpoint payload of {got_bytes} bytes does not match its manifest; use an older checkpoint")]
    Payload {
        /// How many bytes there are.
        got_bytes: usize,
    },
    /// Not readable as safetensors, or a tensor is missing or of another shape.
    #[error("checkpoint payload: {reason}")]
    Tensors {
        /// What is wrong.
        reason: String,
    },
    /// Made for another base checkpoint or run.
    #[error("checkpoint is of {what} {got}, this run is of {wanted}; name the right directory or start anew")]
    Mismatch {
        /// What differs.
        what: &'static str,
        /// In the checkpoint.
        got: String,
        /// Here.
        wanted: String,
    },
    /// The model or the optimiser refused the state.
    #[error(transparent)]
    Step(#[from] StepError),
}

fn tensors_error(reason: impl std::fmt::Display) -> CheckpointError {
    CheckpointError::Tensors { reason: reason.to_string() }
}

impl TrainerCheckpoint {
    /// Joins a manifest with its payload.
    ///
    /// # Errors
    /// When the format is another one or the payload is not the one that was written.
    pub fn decode(manifest: CheckpointManifest, payload: Vec<u8>) -> Result<Self, CheckpointError> {
        if manifest.format != FORMAT {
            return Err(CheckpointError::Format { got: manifest.format });
        }
        let hash = blake3::hash(&payload).to_hex();
        if payload.len() as u64 != manifest.payload_bytes || hash.as_str() != manifest.payload_blake3 {
            return Err(CheckpointError::Payload { got_bytes: payload.len() });
        }
        Ok(Self { manifest, payload })
    }

    /// The manifest's text.
    ///
    /// # Errors
    /// When a setting cannot be written as JSON.
    pub fn manifest_json(&self) -> Result<Vec<u8>, CheckpointError> {
        Ok(serde_json::to_vec_pretty(&self.manifest)?)
    }
}

impl<P: Policy + Send> Trainer<P> {
    /// The state between two steps. Groups that wait are not part of it: their leases are not consumed, so they are
    /// delivered again.
    ///
    /// # Errors
    /// When the payload cannot be encoded.
    pub fn checkpoint(&self, run: RunId, base_model_id: &str) -> Result<TrainerCheckpoint, CheckpointError> {
        let payload = encode_state(&self.masters, self.optimiser.moments())?;
        let manifest = CheckpointManifest {
            format: FORMAT,
            run,
            base_model_id: base_model_id.to_owned(),
            version: self.version,
            optimiser_steps: self.optimiser.steps(),
            consumed: self.consumed.clone(),
            config: self.config.clone(),
            payload_blake3: blake3::hash(&payload).to_hex().to_string(),
            payload_bytes: payload.len() as u64,
            parameters: self.masters.iter().map(|p| p.name.clone()).collect(),
        };
        Ok(TrainerCheckpoint { manifest, payload })
    }

    /// Goes on from `checkpoint` with a freshly loaded `policy` of the same base checkpoint.
    ///
    /// # Errors
    /// When run, base checkpoint or shapes differ.
    pub fn resume(
        policy: P,
        checkpoint: &TrainerCheckpoint,
        run: RunId,
        base_model_id: &str,
    ) -> Result<Self, CheckpointError> {
        let m = &checkpoint.manifest;
        let same = |what, got: String, wanted: String| {
            if got == wanted { Ok(()) } else { Err(CheckpointError::Mismatch { what, got, wanted }) }
        };
        same("run", m.run.to_string(), run.to_string())?;
        same("base model", m.base_model_id.clone(), base_model_id.to_owned())?;
        let leaves = policy.leaves().into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        same("parameters", m.parameters.join(" "), leaves.join(" "))?;
        let (masters, moments) = decode_state(&m.parameters, &checkpoint.payload)?;
        // Made first, from the values that version 0 has, too.
        let mut trainer = Self::new(policy, m.config.clone())?;
        trainer.optimiser =
            AdamW::resume(m.config.optim, &masters, m.optimiser_steps, moments).map_err(StepError::from)?;
        trainer.set_masters(masters)?;
        trainer.version = m.version;
        trainer.consumed = m.consumed.clone();
        Ok(trainer)
    }
}

/// An f32 matrix, whose bytes are made when they are written: all of them at once would be the whole state once more.
struct Matrix<'a> {
    shape: [usize; 2],
    values: &'a [f32],
}

impl View for Matrix<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }

    fn data_len(&self) -> usize {
        size_of_val(self.values)
    }
}

/// Parameters and both of their moments as safetensors.
pub(crate) fn encode_state(masters: &[Parameter], moments: &[Moments]) -> Result<Vec<u8>, CheckpointError> {
    let mut matrices = Vec::with_capacity(3 * masters.len());
    for (p, m) in masters.iter().zip(moments) {
        let matrix = |values| Matrix { shape: p.shape, values };
        matrices.push((p.name.clone(), matrix(&p.values[..])));
        matrices.push((format!("{}.first", p.name), matrix(&m.first)));
        matrices.push((format!("{}.second", p.name), matrix(&m.second)));
    }
    serialize(matrices, None).map_err(tensors_error)
}

/// The parameters of these names, in this order, with their moments.
pub(crate) fn decode_state(
    names: &[String],
    payload: &[u8],
) -> Result<(Parameters, Vec<Moments>), CheckpointError> {
    let tensors = SafeTensors::deserialize(payload).map_err(tensors_error)?;
    let (mut masters, mut moments) = (Parameters::new(), Vec::new());
    for name in names {
        let (shape, values) = read(&tensors, name)?;
        let first = read(&tensors, &format!("{name}.first"))?.1;
        let second = read(&tensors, &format!("{name}.second"))?.1;
        masters.push(Parameter { name: name.clone(), shape, values });
        moments.push(Moments { first, second });
    }
    Ok((masters, moments))
}

fn read(tensors: &SafeTensors<'_>, name: &str) -> Result<([usize; 2], Vec<f32>), CheckpointError> {
    let view = tensors.tensor(name).map_err(tensors_error)?;
    let &[rows, columns] = view.shape() else {
        return Err(tensors_error(format!("{name} is not a matrix")));
    };
    if view.dtype() != Dtype::F32 {
        return Err(tensors_error(format!("{name} is not f32")));
    }
    let floats = view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    Ok(([rows, columns], floats.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::kl::KlTerm;
    use crate::policy::read_parameters;
    use crate::step::tests::Bigram;
    use crate::trainer::tests::{config, round};

    /// A run that is held near its beginning, which a resumed one has to know too.
    fn saved() -> (Trainer<Bigram>, TrainerCheckpoint) {
        let mut config = config();
        config.loss.kl = Some(KlTerm::trl(0.1));
        let mut trainer = Trainer::new(Bigram::new(4), config).unwrap();
        for _ in 0..3 {
            round(&mut trainer);
        }
        let checkpoint = trainer.checkpoint(RunId(7), "base").unwrap();
        (trainer, checkpoint)
    }

    #[test]
    fn a_resumed_run_equals_an_uninterrupted_one_bit_for_bit() {
        let (mut whole, checkpoint) = saved();
        let manifest = serde_json::from_slice(&checkpoint.manifest_json().unwrap()).unwrap();
        let back = TrainerCheckpoint::decode(manifest, checkpoint.payload.clone()).unwrap();
        assert_eq!(back, checkpoint);
        let mut resumed = Trainer::resume(Bigram::new(4), &back, RunId(7), "base").unwrap();
        for _ in 0..4 {
            assert_eq!(round(&mut whole), round(&mut resumed));
        }
        assert_eq!(read_parameters(whole.policy()), read_parameters(resumed.policy()));
        assert_eq!(
            whole.checkpoint(RunId(7), "base").unwrap(),
            resumed.checkpoint(RunId(7), "base").unwrap()
        );
    }

    #[test]
    fn other_runs_models_and_damaged_payloads_are_refused() {
        let (_, checkpoint) = saved();
        let resume = |run, base| Trainer::resume(Bigram::new(4), &checkpoint, RunId(run), base).map(|_| ());
        assert!(matches!(resume(8, "base"), Err(CheckpointError::Mismatch { what: "run", .. })));
        assert!(matches!(resume(7, "other"), Err(CheckpointError::Mismatch { what: "base model", .. })));
        for at in [0, 20, checkpoint.payload.len() - 1] {
            let mut payload = checkpoint.payload.clone();
            payload[at] ^= 1;
            assert!(matches!(
                TrainerCheckpoint::decode(checkpoint.manifest.clone(), payload),
                Err(CheckpointError::Payload { .. })
            ));
        }
        let other = CheckpointManifest { format: FORMAT + 1, ..checkpoint.manifest.clone() };
        let refused = TrainerCheckpoint::decode(other, checkpoint.payload.clone());
        assert!(matches!(refused, Err(CheckpointError::Format { .. })));
    }
}
