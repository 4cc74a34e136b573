//! Architectures: one short file each says what is special, as data.
//!
//! A file gives the names under which the architecture is known, reads config.json into layers ([`describe`](
//! Architecture::describe)), and says how GGUF files of it differ from the rule (`weights/names.rs` and
//! `config/from_gguf.rs` have the rule). Nothing else in this crate asks which architecture it runs.

mod deepseek;
mod gemma2;
mod gemma3;
mod glm4;
mod glm4_moe;
mod gpt_oss;
mod llama;
mod minimax_m2;
mod mistral;
mod mixtral;
mod phi3;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod qwen3_next;
mod smollm3;
mod standard;

use serde_json::{Map, Value};

use crate::{
    config::{Family, ModelConfig, fields::Fields},
    error::ConfigError,
    weights::gguf::GgufFile,
};

/// What is special about an architecture.
#[derive(Debug)]
pub(crate) struct Architecture {
    pub(crate) family: Family,
    /// `model_type` in config.json.
    pub(crate) name: &'static str,
    /// Class names in config.json; the first is written.
    pub(crate) classes: &'static [&'static str],
    /// `general.architecture` in GGUF files; `None` where they go under another architecture's name.
    pub(crate) gguf: Option<&'static str>,
    /// The model that the fields of a config.json describe.
    pub(crate) describe: fn(&Fields<'_>) -> Result<ModelConfig, ConfigError>,
    /// Adds the fields of config.json that only this architecture has, from GGUF metadata.
    pub(crate) gguf_fields: fn(&GgufFile, &mut Map<String, Value>),
    /// GGUF names of a layer's tensors and ours, where they differ from the rule: of modules, without `.weight` and
    /// `.bias`, or of whole tensors.
    pub(crate) gguf_names: &'static [(&'static str, &'static str)],
    /// Queries and keys are stored in llama.cpp's order of pairs in GGUF files.
    pub(crate) gguf_pairs: bool,
}

/// All of them.
pub(crate) const ALL: [&Architecture; Family::ALL.len()] = [
    &llama::ARCHITECTURE,
    &smollm3::ARCHITECTURE,
    &mistral::ARCHITECTURE,
    &qwen2::ARCHITECTURE,
    &qwen3::ARCHITECTURE,
    &gemma2::ARCHITECTURE,
    &gemma3::ARCHITECTURE,
    &phi3::ARCHITECTURE,
    &glm4::ARCHITECTURE,
    &mixtral::ARCHITECTURE,
    &qwen3_moe::ARCHITECTURE,
    &gpt_oss::ARCHITECTURE,
    &deepseek::V2,
    &deepseek::V3,
    &glm4_moe::ARCHITECTURE,
    &minimax_m2::ARCHITECTURE,
    &qwen3_next::NEXT,
    &qwen3_next::DENSE,
    &qwen3_next::MOE,
];

/// That of a family.
pub(crate) fn of(family: Family) -> &'static Architecture {
    ALL.into_iter().find(|a| a.family == family).expect("every family has its architecture in the list")
}

/// By class name or `model_type`.
///
/// # Errors
/// It is not supported; the message lists those that are.
pub(crate) fn by_name(name: &str) -> Result<&'static Architecture, ConfigError> {
    ALL.into_iter().find(|a| a.name == name || a.classes.contains(&name)).ok_or_else(|| {
        let supported: Vec<String> = ALL.iter().map(|a| format!("{} ({})", a.name, a.classes[0])).collect();
        ConfigError::UnknownArchitecture { architecture: name.to_owned(), supported: supported.join(", ") }
    })
}

/// By `general.architecture` of a GGUF file.
///
/// # Errors
/// It is not supported; the message lists those that are.
pub(crate) fn by_gguf_name(name: &str) -> Result<&'static Architecture, ConfigError> {
    ALL.into_iter().find(|a| a.gguf == Some(name)).ok_or_else(|| {
        let supported: Vec<&str> = ALL.iter().filter_map(|a| a.gguf).collect();
        ConfigError::UnknownArchitecture { architecture: name.to_owned(), supported: supported.join(", ") }
    })
}

/// For architectures whose metadata has nothing of its own.
fn no_more_fields(_: &GgufFile, _: &mut Map<String, Value>) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_is_listed_once_under_its_own_names() {
        for family in Family::ALL {
            assert_eq!(of(family).family, family);
            assert_eq!(by_name(of(family).name).unwrap().family, family);
            for class in of(family).classes {
                assert_eq!(by_name(class).unwrap().family, family);
            }
        }
    }
}
