//! The tokenizer inside a GGUF file, rebuilt as the tokenizer.json it was converted from.
//!
//! GGUF keeps vocabulary, token kinds and merges, but of the pre-tokenizer only a name (`tokenizer.ggml.pre`);
//! the splitting rules behind each name are the ones that the model families publish.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Tokenizer;
use crate::{
    chat_template::ChatTemplate,
    error::{TemplateError, TokenizerError},
    weights::gguf::GgufFile,
};

/// What a GGUF header says about text.
#[derive(Debug)]
pub(crate) struct GgufVocabulary {
    model: String,
    pre: String,
    tokens: Vec<String>,
    kinds: Vec<i64>,
    merges: Vec<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    template: Option<String>,
}

/// `tokenizer.ggml.token_type`: control and user-defined tokens are matched whole, before splitting.
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn split_then_bytes(pattern: &str) -> Value {
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        byte_level(false),
    ]})
}

impl GgufVocabulary {
    pub(crate) fn read(file: &GgufFile) -> Self {
        let text = |key: &str| file.string(key).unwrap_or_default().to_owned();
        let id = |key: &str| file.unsigned(key).and_then(|v| u32::try_from(v).ok());
        let strings = |key: &str| {
            file.strings(key).unwrap_or_default().into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        Self {
            model: text("tokenizer.ggml.model"),
            pre: text("tokenizer.ggml.pre"),
            tokens: strings("tokenizer.ggml.tokens"),
            kinds: file.integers("tokenizer.ggml.token_type").unwrap_or_default(),
            merges: strings("tokenizer.ggml.merges"),
            bos: id("tokenizer.ggml.bos_token_id"),
            eos: id("tokenizer.ggml.eos_token_id"),
            add_bos: file.bool("tokenizer.ggml.add_bos_token").unwrap_or(false),
            template: file.string("tokenizer.chat_template").map(str::to_owned),
        }
    }

    fn token(&self, id: Option<u32>) -> &str {
        id.and_then(|id| self.tokens.get(id as usize)).map_or("", String::as_str)
    }

    pub(crate) fn chat_template(&self) -> Result<Option<ChatTemplate>, TemplateError> {
        let compile = |t: &String| ChatTemplate::new(t, self.token(self.bos), self.token(self.eos));
        self.template.as_ref().map(compile).transpose()
    }

    /// Source of the chat template, begin and end token.
    pub(crate) fn template(&self) -> (Option<&str>, &str, &str) {
        (self.template.as_deref(), self.token(self.bos), self.token(self.eos))
    }

    /// Normaliser, pre-tokenizer and whether whole-word vocabulary entries win over merges.
    fn splitting(&self) -> Result<(Value, Value, bool), TokenizerError> {
        match (self.model.as_str(), self.pre.as_str()) {
            ("gpt2", "smollm") => {
                let parts = [json!({"type": "Digits", "individual_digits": true}), byte_level(true)];
                Ok((Value::Null, json!({"type": "Sequence", "pretokenizers": parts}), false))
            }
            ("gpt2", "gpt-2" | "gpt2" | "default" | "") => Ok((Value::Null, byte_level(true), false)),
            ("gpt2", "llama-bpe" | "llama3" | "llama-v3") => {
                Ok((Value::Null, split_then_bytes(LLAMA3_SPLIT), true))
            }
            ("gpt2", "qwen2" | "deepseek-r1-qwen") => {
                Ok((json!({"type": "NFC"}), split_then_bytes(QWEN2_SPLIT), false))
            }
            (model, pre) => Err(TokenizerError::Unsupported {
                model: model.to_owned(),
                pre: pre.to_owned(),
                supported: "gpt2 with smollm, gpt-2, llama-bpe, qwen2".to_owned(),
            }),
        }
    }

    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        let (normalizer, pre_tokenizer, ignore_merges) = self.splitting()?;
        let added: Vec<Value> = (0..self.tokens.len().min(self.kinds.len()))
            .filter(|i| matches!(self.kinds[*i], CONTROL | USER_DEFINED))
            .map(|i| {
                json!({"id": i, "content": self.tokens[i], "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": false, "special": self.kinds[i] == CONTROL})
            })
            .collect();
        let vocab: serde_json::Map<String, Value> =
            self.tokens.iter().enumerate().map(|(i, t)| (t.clone(), Value::from(i))).collect();
        let merges: Vec<Value> = self
            .merges
            .iter()
            .map(|m| m.split_once(' ').map(|(a, b)| json!([a, b])))
            .collect::<Option<_>>()
            .ok_or_else(|| TokenizerError::Invalid("a merge in the GGUF file is no pair".to_owned()))?;
        let definition = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": ignore_merges, "vocab": vocab, "merges": merges},
        });
        let inner: tokenizers::Tokenizer = serde_json::from_value(definition)
            .map_err(|e| TokenizerError::Invalid(format!("GGUF vocabulary: {e}")))?;
        Ok(Tokenizer { inner: Arc::new(inner), bos: self.bos.filter(|_| self.add_bos) })
    }
}

/// A tokenizer of the 256 bytes and nothing else, for tests.
#[cfg(test)]
pub(crate) fn byte_tokenizer() -> Tokenizer {
    byte_vocabulary("gpt2", "gpt-2").tokenizer().unwrap()
}

#[cfg(test)]
fn byte_vocabulary(model: &str, pre: &str) -> GgufVocabulary {
    let mut tokens: Vec<String> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
        .into_iter()
        .map(|c| c.to_string())
        .collect();
    tokens.sort();
    tokens.push("<|end|>".to_owned());
    let mut kinds = vec![1; 256];
    kinds.push(CONTROL);
    GgufVocabulary {
        model: model.to_owned(),
        pre: pre.to_owned(),
        tokens,
        kinds,
        merges: Vec::new(),
        bos: Some(256),
        eos: Some(256),
        add_bos: true,
        template: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_splitting_round_trips_text() {
        for pre in ["smollm", "gpt-2", "llama-bpe", "qwen2"] {
            let t = byte_vocabulary("gpt2", pre).tokenizer().unwrap();
            let text = "In 2024, it's 東京 \n\n  x";
            let ids = t.encode(text, false).unwrap();
            assert_eq!(t.decode(&ids).unwrap(), text, "{pre}");
            assert_eq!(
                Tokenizer::from_json(t.to_json().unwrap().as_bytes()).unwrap().encode(text, false).unwrap(),
                ids
            );
        }
    }

    #[test]
    fn special_tokens_are_matched_whole_and_bos_added_on_request() {
        let t = byte_tokenizer();
        assert_eq!(t.encode("<|end|>", false).unwrap(), [256]);
        assert_eq!(t.encode("a", true).unwrap().first(), Some(&256));
        assert_eq!(t.encode("<|end|>a", true).unwrap().len(), 2);
        assert_eq!(t.decode_with_special(&[256]).unwrap(), "<|end|>");
        assert_eq!(t.decode(&[256]).unwrap(), "");
    }

    #[test]
    fn unknown_splitting_is_named() {
        let error = byte_vocabulary("llama", "default").tokenizer().unwrap_err().to_string();
        assert!(error.contains("llama") && error.contains("smollm"), "{error}");
    }
}
