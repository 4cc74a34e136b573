//! The tokenizer inside a GGUF file, rebuilt as the tokenizer.json it was converted from.
//!
//! GGUF keeps vocabulary, token kinds and merges, but of the pre-tokenizer only a name (`tokenizer.ggml.pre`);
//! the splitting rules behind each name are the ones that the model families publish. Vocabularies of SentencePiece
//! (`llama`) have scores instead of merges: the pair that makes the token of the highest score is joined first, so the
//! scores say the order of the merges.

use std::collections::HashMap;

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
    scores: Vec<f32>,
    merges: Vec<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    /// SentencePiece: a text begins as if after a space.
    add_space_prefix: bool,
    template: Option<String>,
}

/// Values of `tokenizer.ggml.token_type`; control and user-defined tokens are matched whole, before splitting.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
/// `tokenizer.ggml.model` of vocabularies with scores.
const SENTENCEPIECE: &str = "llama";
/// Longest token that is made of two others: every way to cut it is looked at.
const MAX_PIECE_BYTES: usize = 512;
/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same with marks as parts of words.
const QWEN35_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// o200k: words are cut where small letters end and capitals begin.
const GPT4O_SPLIT: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Nearly the same: Chinese characters by themselves, and no slashes behind punctuation.
const KIMI_SPLIT: &str = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// DeepSeek-V3's, one after the other.
const DEEPSEEK3_SPLITS: [&str; 3] = [
    r"\p{N}{1,3}",
    r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

/// DeepSeek-V2's, one after the other: lines, words of alphabets with two cases, punctuation, blanks at the end, Chinese,
/// Japanese and Korean, digits.
const DEEPSEEK_SPLITS: [&str; 6] = [
    r"[\r\n]",
    r"\s?[A-Za-z\x{b5}\x{c0}-\x{d6}\x{d8}-\x{f6}\x{f8}-\x{1ba}\x{1bc}-\x{1bf}\x{1c4}-\x{293}\x{295}-\x{2af}\x{370}-\x{373}\x{376}\x{377}\x{37b}-\x{37d}\x{37f}\x{386}\x{388}-\x{38a}\x{38c}\x{38e}-\x{3a1}\x{3a3}-\x{3f5}\x{3f7}-\x{481}\x{48a}-\x{52f}\x{531}-\x{556}\x{10a0}-\x{10c5}\x{13a0}-\x{13f5}\x{13f8}-\x{13fd}\x{1c90}-\x{1cba}\x{1cbd}-\x{1cbf}\x{1d00}-\x{1d2b}\x{1d6b}-\x{1d77}\x{1d79}-\x{1d9a}\x{1e00}-\x{1f15}\x{1f18}-\x{1f1d}\x{1f20}-\x{1f45}\x{1f48}-\x{1f4d}\x{1f50}-\x{1f57}\x{1f59}\x{1f5b}\x{1f5d}\x{1f5f}-\x{1f7d}\x{1f80}-\x{1fb4}\x{1fb6}-\x{1fbc}\x{1fbe}\x{1fc2}-\x{1fc4}\x{1fc6}-\x{1fcc}\x{1fd0}-\x{1fd3}\x{1fd6}-\x{1fdb}\x{1fe0}-\x{1fec}\x{1ff2}-\x{1ff4}\x{1ff6}-\x{1ffc}\x{2102}\x{2107}\x{210a}-\x{2113}\x{2115}\x{2119}-\x{211d}\x{2124}\x{2126}\x{2128}\x{212a}-\x{212d}\x{212f}-\x{2134}\x{2139}\x{213c}-\x{213f}\x{2145}-\x{2149}\x{214e}\x{2183}\x{2184}\x{2c00}-\x{2c7b}\x{2c7e}-\x{2ce4}\x{2ceb}-\x{2cee}\x{2cf2}\x{2cf3}\x{a640}-\x{a66d}\x{a680}-\x{a69b}\x{a722}-\x{a76f}\x{a771}-\x{a787}\x{a78b}-\x{a78e}\x{ab70}-\x{abbf}\x{fb00}-\x{fb06}\x{fb13}-\x{fb17}\x{ff21}-\x{ff3a}\x{ff41}-\x{ff5a}\x{10400}-\x{1044f}\x{104b0}-\x{104d3}\x{104d8}-\x{104fb}\x{10c80}-\x{10cb2}\x{10cc0}-\x{10cf2}\x{118a0}-\x{118df}\x{1e900}-\x{1e943}]+",
    r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
    r"\s+$",
    r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+",
    r"\p{N}",
];

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
}

fn split_then_bytes(patterns: &[&str]) -> Value {
    let split =
        |p: &&str| json!({"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": false});
    let steps: Vec<Value> = patterns.iter().map(split).chain([byte_level(false)]).collect();
    json!({"type": "Sequence", "pretokenizers": steps})
}

/// How Kimi cuts words, as a pre-tokenizer.
pub(super) fn kimi_splitting() -> Value {
    split_then_bytes(&[KIMI_SPLIT])
}

/// `tokenizer.ggml.pre` of the splittings there are, for a message.
const SPLITTINGS: &str = "llama; gpt2 with smollm, gpt-2, llama-bpe, qwen2, qwen35, gpt-4o, minimax-m2, glm4, deepseek-llm, deepseek-v3, kimi-k2";

impl GgufVocabulary {
    pub(crate) fn read(file: &GgufFile) -> Self {
        let text = |key: &str| file.string(key).unwrap_or_default().to_owned();
        let id = |key: &str| file.unsigned(key).and_then(|v| u32::try_from(v).ok());
        let strings = |key: &str| {
            file.strings(key).unwrap_or_default().into_iter().map(str::to_owned).collect::<Vec<_>>()
        };
        let model = text("tokenizer.ggml.model");
        Self {
            add_bos: file.bool("tokenizer.ggml.add_bos_token").unwrap_or(model == SENTENCEPIECE),
            add_space_prefix: file.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true),
            model,
            pre: text("tokenizer.ggml.pre"),
            tokens: strings("tokenizer.ggml.tokens"),
            kinds: file.integers("tokenizer.ggml.token_type").unwrap_or_default(),
            scores: file.floats("tokenizer.ggml.scores").unwrap_or_default(),
            merges: strings("tokenizer.ggml.merges"),
            bos: id("tokenizer.ggml.bos_token_id"),
            eos: id("tokenizer.ggml.eos_token_id"),
            template: file.string("tokenizer.chat_template").map(str::to_owned),
        }
    }

    /// Whether the file has no vocabulary.
    pub(crate) fn is_empty(&self) -> bool {
        self.model.is_empty()
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
                Ok((Value::Null, split_then_bytes(&[LLAMA3_SPLIT]), true))
            }
            ("gpt2", "qwen2" | "deepseek-r1-qwen") => {
                Ok((json!({"type": "NFC"}), split_then_bytes(&[QWEN2_SPLIT]), false))
            }
            ("gpt2", "qwen35") => Ok((json!({"type": "NFC"}), split_then_bytes(&[QWEN35_SPLIT]), false)),
            ("gpt2", "gpt-4o" | "minimax-m2") => Ok((Value::Null, split_then_bytes(&[GPT4O_SPLIT]), false)),
            ("gpt2", "glm4" | "chatglm-bpe") => Ok((Value::Null, split_then_bytes(&[LLAMA3_SPLIT]), false)),
            ("gpt2", "deepseek-v3" | "deepseek-r1") => {
                Ok((Value::Null, split_then_bytes(&DEEPSEEK3_SPLITS), false))
            }
            ("gpt2", "deepseek-llm") => Ok((Value::Null, split_then_bytes(&DEEPSEEK_SPLITS), false)),
            ("gpt2", "kimi-k2") => Ok((Value::Null, kimi_splitting(), false)),
            (model, pre) => Err(TokenizerError::Unsupported {
                model: model.to_owned(),
                pre: pre.to_owned(),
                supported: SPLITTINGS.to_owned(),
            }),
        }
    }

    /// Tokens that are matched whole. SentencePiece's own are matched behind the normaliser, which writes their spaces.
    fn added(&self) -> Vec<Value> {
        (0..self.tokens.len().min(self.kinds.len()))
            .filter(|i| matches!(self.kinds[*i], CONTROL | USER_DEFINED))
            .map(|i| {
                let normalized = self.model == SENTENCEPIECE && self.kinds[i] == USER_DEFINED;
                json!({"id": i, "content": self.tokens[i], "single_word": false, "lstrip": false,
                    "rstrip": false, "normalized": normalized, "special": self.kinds[i] == CONTROL})
            })
            .collect()
    }

    fn vocab(&self) -> serde_json::Map<String, Value> {
        self.tokens.iter().enumerate().map(|(i, t)| (t.clone(), Value::from(i))).collect()
    }

    pub(crate) fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        if self.model == SENTENCEPIECE {
            return self.built(self.sentencepiece()?);
        }
        let (normalizer, pre_tokenizer, ignore_merges) = self.splitting()?;
        let merges: Vec<Value> = self
            .merges
            .iter()
            .map(|m| m.split_once(' ').map(|(a, b)| json!([a, b])))
            .collect::<Option<_>>()
            .ok_or_else(|| TokenizerError::Invalid("a merge in the GGUF file is no pair".to_owned()))?;
        let definition = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added(),
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                "ignore_merges": ignore_merges, "vocab": self.vocab(), "merges": merges},
        });
        self.built(definition)
    }

    fn built(&self, definition: Value) -> Result<Tokenizer, TokenizerError> {
        let inner: tokenizers::Tokenizer = serde_json::from_value(definition)
            .map_err(|e| TokenizerError::Invalid(format!("GGUF vocabulary: {e}")))?;
        Ok(Tokenizer::of(inner, self.bos.filter(|_| self.add_bos)))
    }
}

impl GgufVocabulary {
    /// A definition that joins as SentencePiece does.
    fn sentencepiece(&self) -> Result<Value, TokenizerError> {
        if self.scores.len() != self.tokens.len() || self.kinds.len() != self.tokens.len() {
            let counts = (self.tokens.len(), self.scores.len(), self.kinds.len());
            let why =
                format!("the GGUF file has {} tokens, {} scores and {} kinds", counts.0, counts.1, counts.2);
            return Err(TokenizerError::Invalid(why));
        }
        let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE});
        let text = json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "});
        let mut normalizers = vec![space];
        let mut decoders = vec![text, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
        if self.add_space_prefix {
            normalizers.insert(0, json!({"type": "Prepend", "prepend": SPACE}));
            decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        let unknown = self.kinds.iter().position(|kind| *kind == UNKNOWN).map(|i| &self.tokens[i]);
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added(),
            "normalizer": {"type": "Sequence", "normalizers": normalizers}, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {"type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
                "vocab": self.vocab(), "merges": self.merges_by_score()},
        }))
    }

    /// Every way to make a token of two, the best tokens first.
    fn merges_by_score(&self) -> Vec<[&str; 2]> {
        let joins = |id: usize| self.kinds[id] == NORMAL && self.tokens[id].len() <= MAX_PIECE_BYTES;
        let ids: HashMap<&str, usize> = self
            .tokens
            .iter()
            .enumerate()
            .filter(|(id, _)| joins(*id))
            .map(|(id, t)| (t.as_str(), id))
            .collect();
        let mut merges = Vec::new();
        for (id, token) in self.tokens.iter().enumerate().filter(|(id, _)| joins(*id)) {
            for (at, _) in token.char_indices().skip(1) {
                let (left, right) = token.split_at(at);
                if let (Some(a), Some(b)) = (ids.get(left), ids.get(right)) {
                    merges.push((self.scores[id], id, *a, *b));
                }
            }
        }
        merges.sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| (x.1, x.2, x.3).cmp(&(y.1, y.2, y.3))));
        merges.into_iter().map(|(_, _, a, b)| [self.tokens[a].as_str(), self.tokens[b].as_str()]).collect()
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
        scores: Vec::new(),
        merges: Vec::new(),
        bos: Some(256),
        eos: Some(256),
        add_bos: true,
        add_space_prefix: true,
        template: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_splitting_round_trips_text() {
        for pre in SPLITTINGS.split_once("with ").unwrap().1.split(", ") {
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

    /// Where a text is cut before words are joined from bytes.
    fn cuts(pre: &str, text: &str) -> Vec<String> {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer as _};
        let tokenizer = byte_vocabulary("gpt2", pre).tokenizer().unwrap();
        let mut pieces = PreTokenizedString::from(text);
        tokenizer.inner.get_pre_tokenizer().unwrap().pre_tokenize(&mut pieces).unwrap();
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        splits.into_iter().map(|(_, (start, end), _)| text[start..end].to_owned()).collect()
    }

    #[test]
    fn texts_are_cut_where_the_families_cut_them() {
        let text = "It's HTTPServer 12345 東京tower: x_y!\n";
        let qwen = "It|'s| HTTPServer| |1|2|3|4|5| 東京tower|:| x|_y|!\n";
        for (pre, pieces) in [
            ("qwen2", qwen),
            ("qwen35", qwen),
            ("glm4", "It|'s| HTTPServer| |123|45| 東京tower|:| x|_y|!\n"),
            ("gpt-4o", "It's| HTTPServer| |123|45| 東京tower|:| x|_y|!\n"),
            ("kimi-k2", "It's| HTTPServer| |123|45| |東京|tower|:| x|_y|!\n"),
            ("deepseek-llm", "It|'|s| HTTPServer| |1|2|3|4|5| |東京|tower|:| x|_|y|!|\n"),
            ("deepseek-v3", "It|'s| HTTPServer| |123|45| |東京|tower|:| x|_y|!\n"),
        ] {
            assert_eq!(cuts(pre, text).join("|"), pieces, "{pre}");
        }
        // A vowel sign belongs to its word.
        assert_eq!(cuts("qwen35", "कि a"), ["कि", " a"]);
        assert_eq!(cuts("qwen2", "कि a"), ["क", "ि", " a"]);
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
        let error = byte_vocabulary("t5", "default").tokenizer().unwrap_err().to_string();
        assert!(error.contains("t5") && error.contains("smollm"), "{error}");
        let error = byte_vocabulary("llama", "default").tokenizer().unwrap_err().to_string();
        assert!(error.contains("257 tokens, 0 scores"), "{error}");
    }

    #[test]
    fn scores_join_as_sentencepiece_does() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/golden-sentencepiece.json");
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for v in golden["vocabularies"].as_array().unwrap() {
            let vocabulary = GgufVocabulary {
                model: SENTENCEPIECE.to_owned(),
                pre: "default".to_owned(),
                tokens: serde_json::from_value(v["tokens"].clone()).unwrap(),
                kinds: serde_json::from_value(v["kinds"].clone()).unwrap(),
                scores: serde_json::from_value(v["scores"].clone()).unwrap(),
                merges: Vec::new(),
                bos: Some(1),
                eos: Some(2),
                add_bos: true,
                add_space_prefix: v["add_space_prefix"] == true,
                template: None,
            };
            let tokenizer = vocabulary.tokenizer().unwrap();
            let table = tokenizer.token_table().unwrap();
            for case in v["cases"].as_array().unwrap() {
                let text = case["text"].as_str().unwrap();
                let ids = tokenizer.encode(text, false).unwrap();
                assert_eq!(serde_json::to_value(&ids).unwrap(), case["ids"], "{}: {text:?}", v["name"]);
                assert_eq!(tokenizer.decode(&ids).unwrap(), case["decoded"], "{}: {text:?}", v["name"]);
                let bytes: Vec<u8> = ids.iter().flat_map(|id| table[*id as usize].bytes.clone()).collect();
                let prefix = if vocabulary.add_space_prefix && !text.is_empty() { " " } else { "" };
                assert_eq!(String::from_utf8(bytes).unwrap(), format!("{prefix}{text}"));
                let mut stream = tokenizer.stream();
                let mut pieces: String = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
                pieces += &stream.finish().unwrap();
                assert_eq!(pieces, text, "{}", v["name"]);
            }
            assert_eq!(tokenizer.encode("a", true).unwrap()[0], 1);
        }
    }
}
