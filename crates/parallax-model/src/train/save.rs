//! A fully trained model as an HF directory.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView, serialize};

use super::{Mode, TrainModel, init};
use crate::{error::SaveError, files};

impl TrainModel {
    /// Puts a file beside the weights that [`Self::save_checkpoint`] writes, e.g. `tokenizer.json`; one of the
    /// same name is replaced.
    pub fn set_text_file(&mut self, name: &str, content: Vec<u8>) {
        self.text_files.retain(|(other, _)| other != name);
        self.text_files.push((name.to_owned(), content));
    }

    /// Writes config.json, model.safetensors (f32) and the tokenizer of a fully trained model.
    ///
    /// # Errors
    /// The model trains an adapter, or the directory cannot be written.
    pub fn save_checkpoint(&self, dir: &Path) -> Result<(), SaveError> {
        let bytes = self.to_safetensors()?;
        self.save_companions(dir)?;
        // Last: a directory with weights is complete.
        files::write(&dir.join("model.safetensors"), &bytes)
    }

    /// Writes config.json and the tokenizer: all of a checkpoint but its weights.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn save_companions(&self, dir: &Path) -> Result<(), SaveError> {
        for (name, content) in &self.text_files {
            files::write(&dir.join(name), content)?;
        }
        let config = format!("{:#}\n", self.config.to_hf_json());
        files::write(&dir.join("config.json"), config.as_bytes())
    }

    /// All weights of a fully trained model, as model.safetensors has them (f32).
    ///
    /// # Errors
    /// The model trains an adapter.
    pub fn to_safetensors(&self) -> Result<Vec<u8>, SaveError> {
        if !matches!(self.mode, Mode::Full) {
            return Err(SaveError::NotFull);
        }
        let encode = |e: &dyn std::fmt::Display| SaveError::Encode {
            path: "model.safetensors".into(),
            reason: e.to_string(),
        };
        let mut tensors = Vec::new();
        for (p, (_, tensor)) in init::full_parameters(&self.config).iter().zip(&self.parameters) {
            let values: Vec<f32> =
                tensor.clone().inner().into_data().try_to_vec().expect("parameters are f32");
            let mut first = 0;
            for (name, rows) in &p.parts {
                let shape = p.shape(*rows);
                let part = &values[first..first + shape.iter().product::<usize>()];
                first += part.len();
                let bytes: Vec<u8> = part.iter().flat_map(|v| v.to_le_bytes()).collect();
                tensors.push((name.clone(), shape, bytes));
            }
        }
        let mut views = Vec::with_capacity(tensors.len());
        for (name, shape, bytes) in &tensors {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes).map_err(|e| encode(&e))?;
            views.push((name.as_str(), view));
        }
        serialize(views, None).map_err(|e| encode(&e))
    }
}
