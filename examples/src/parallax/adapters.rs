//! Adapters that a server has from its start, and whether clients may change what it serves.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use parallax_engine::EngineHandle;
use parallax_engine::http::{Updates, WeightLoader};
use parallax_model::{Adapter, Checkpoint};

/// Options about adapters and changes of the weights.
#[derive(Debug, Clone, Args)]
pub struct AdapterArgs {
    /// LoRA adapter (a PEFT directory or file) that requests choose by NAME as their model; may be given several times [default
    /// NAME: the last part of PATH]
    #[arg(long, value_name = "[NAME=]PATH")]
    adapter: Vec<String>,
    /// Let clients load and unload adapters, and replace the weights (in a swarm on all its machines), from paths on this machine
    /// (POST /v1/load_lora_adapter, /v1/unload_lora_adapter, /v1/update_weights)
    #[arg(long)]
    allow_weight_updates: bool,
}

/// Adapters in the form that engines take: name and bytes.
pub type Named = Vec<(String, Vec<u8>)>;

impl AdapterArgs {
    /// Reads the adapters of `checkpoint`, which is served as `model`.
    ///
    /// # Errors
    /// A name that is taken, an adapter that cannot be read or does not fit the model.
    pub fn read(&self, checkpoint: &Checkpoint, model: &str) -> anyhow::Result<Named> {
        let mut named = Named::new();
        for given in &self.adapter {
            let (name, path) = split(given);
            ensure!(!name.is_empty(), "--adapter {given} has no name; give NAME=PATH");
            if name == model || named.iter().any(|(other, _)| *other == name) {
                bail!("--adapter {given}: the name {name:?} is taken; give another NAME=PATH");
            }
            let adapter = Adapter::load(&path).with_context(|| format!("--adapter {given}"))?;
            adapter.check(checkpoint.config()).with_context(|| format!("--adapter {given}"))?;
            named.push((name, adapter.to_bytes()?));
        }
        Ok(named)
    }

    /// What clients may change; `loader` reads other weights.
    pub fn updates(&self, loader: Option<WeightLoader>) -> Option<Updates> {
        self.allow_weight_updates.then_some(Updates { loader })
    }
}

/// Makes adapters resident.
///
/// # Errors
/// One that the engine refuses, by name.
pub async fn load(engine: &EngineHandle, adapters: Named) -> anyhow::Result<()> {
    for (name, bytes) in adapters {
        engine.add_adapter(&name, bytes).await.with_context(|| format!("--adapter {name}"))?;
    }
    Ok(())
}

fn split(given: &str) -> (String, PathBuf) {
    match given.split_once('=') {
        Some((name, path)) if !name.contains('/') && !Path::new(given).exists() => {
            (name.to_owned(), path.into())
        }
        _ => {
            let path = Path::new(given);
            // Its own file name says nothing: PEFT calls every adapter the same.
            let named = if path.file_name().is_some_and(|n| n == "adapter_model.safetensors") {
                path.parent().unwrap_or(path)
            } else {
                path
            };
            let name = named.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            (name.strip_suffix(".safetensors").unwrap_or(&name).to_owned(), path.to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_are_called_as_said_or_as_they_lie() {
        for (given, name, path) in [
            ("pirate=out/a.safetensors", "pirate", "out/a.safetensors"),
            ("out/pirate.safetensors", "pirate", "out/pirate.safetensors"),
            ("out/pirate/adapter_model.safetensors", "pirate", "out/pirate/adapter_model.safetensors"),
            ("out/pirate/", "pirate", "out/pirate/"),
            ("out/a=b/pirate", "pirate", "out/a=b/pirate"),
        ] {
            assert_eq!(split(given), (name.to_owned(), PathBuf::from(path)), "{given}");
        }
    }

    #[test]
    fn settings_beside_an_adapter_count_and_names_are_unique() {
        let checkpoint = Checkpoint::resolve("tiny").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = checkpoint.config();
        let (h, q) = (config.hidden, config.hidden);
        let tensors =
            parallax_model::LoraTensors { a: vec![0.5; 2 * h], b: vec![0.5; 2 * q], inputs: h, outputs: q };
        let adapter =
            Adapter { rank: 2, alpha: 2.0, tensors: [("layers.0.q_proj".to_owned(), tensors)].into() };
        let path = dir.path().join("pirate");
        adapter.save(&path).unwrap();
        let settings = path.join("adapter_config.json");
        let text =
            std::fs::read_to_string(&settings).unwrap().replace("\"lora_alpha\": 2.0", "\"lora_alpha\": 64");
        std::fs::write(settings, text).unwrap();
        let args = |given: &[&str]| AdapterArgs {
            adapter: given.iter().map(|g| (*g).to_owned()).collect(),
            allow_weight_updates: false,
        };
        let path = path.to_str().unwrap();
        let read = args(&[path]).read(&checkpoint, "tiny").unwrap();
        assert_eq!(read[0].0, "pirate");
        assert_eq!(Adapter::from_bytes(&read[0].1).unwrap().scale(), 32.0, "as adapter_config.json says");
        let twice = args(&[path, path]).read(&checkpoint, "tiny").unwrap_err();
        assert!(twice.to_string().contains("taken"), "{twice}");
        assert!(args(&[path]).read(&checkpoint, "pirate").is_err());
        let missing = args(&["x=nowhere"]).read(&checkpoint, "tiny").unwrap_err();
        assert!(format!("{missing:#}").contains("nowhere"), "{missing:#}");
    }
}
