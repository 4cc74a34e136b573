//! The tokenizer beside Kimi's weights, rebuilt as a tokenizer.json: `tiktoken.model` has every token in base64 with its rank,
//! which is its id, one a line; the special tokens are in tokenizer_config.json.
//!
//! Tiktoken joins the neighbours whose union has the lowest rank, and a word that is a token as a whole stays whole. A token is
//! therefore only ever made of the two parts that the tokens before it leave of its own bytes: these are the merges.

use std::collections::HashMap;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Value, json};

use super::{Tokenizer, bytes::byte_characters, gguf};
use crate::error::TokenizerError;

/// `tokenizer_class` of the only vocabularies of this form whose way to cut words is known here.
const CLASS: &str = "TikTokenTokenizer";
/// Longest token that is joined from others: how long finding its parts takes rises with the square.
const MAX_JOINED_BYTES: usize = 512;
/// Most ids behind those of the ranks.
const MAX_ADDED: usize = 1 << 16;

/// The tokenizer of a `tiktoken.model` with the tokenizer_config.json beside it.
///
/// # Errors
/// Files that are broken, or of another class.
pub(crate) fn tokenizer(model: &[u8], settings: &[u8]) -> Result<Tokenizer, TokenizerError> {
    let settings: Value =
        serde_json::from_slice(settings).map_err(|e| fault(format!("tokenizer_config.json: {e}")))?;
    if settings["tokenizer_class"] != CLASS {
        let class = &settings["tokenizer_class"];
        return Err(fault(format!("a tiktoken.model is read of the class {CLASS}, not {class}")));
    }
    let tokens = tokens(model)?;
    let ranks: HashMap<&[u8], usize> =
        tokens.iter().enumerate().map(|(rank, t)| (t.as_slice(), rank)).collect();
    if ranks.len() < tokens.len() {
        return Err(fault("tiktoken.model has a token twice"));
    }
    if let Some(byte) = (0..=u8::MAX).find(|byte| !ranks.contains_key([*byte].as_slice())) {
        return Err(fault(format!("tiktoken.model has no token for the byte {byte:#04x}")));
    }
    let mut spelling = [' '; 256];
    byte_characters().into_iter().for_each(|(c, byte)| spelling[usize::from(byte)] = c);
    let spelt = |bytes: &[u8]| -> String { bytes.iter().map(|b| spelling[usize::from(*b)]).collect() };
    let merges: Vec<Value> = tokens
        .iter()
        .enumerate()
        .filter_map(|(rank, token)| parts(token, rank, &ranks))
        .map(|(left, right)| json!([spelt(left), spelt(right)]))
        .collect();
    let mut vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(rank, token)| (spelt(token), Value::from(rank))).collect();
    let added = added(&settings, tokens.len())?;
    for token in &added {
        // Where a token has its id from: others are counted through.
        let content = token["content"].as_str().unwrap_or_default();
        if vocab.insert(content.to_owned(), token["id"].clone()).is_some() {
            return Err(fault(format!(
                "the token {content:?} is both ordinary and special, or special twice"
            )));
        }
    }
    let definition = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": null, "pre_tokenizer": gguf::kimi_splitting(), "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
            "vocab": vocab, "merges": merges},
    });
    let inner = serde_json::from_value(definition).map_err(|e| fault(format!("tiktoken.model: {e}")))?;
    Ok(Tokenizer::of(inner, None))
}

fn fault(why: impl Into<String>) -> TokenizerError {
    TokenizerError::Invalid(why.into())
}

/// The tokens by rank, of which none may be missing.
fn tokens(model: &[u8]) -> Result<Vec<Vec<u8>>, TokenizerError> {
    let lines = model.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii).enumerate();
    let lines: Vec<(usize, &[u8])> = lines.filter(|(_, line)| !line.is_empty()).collect();
    let mut tokens = vec![Vec::new(); lines.len()];
    for (i, line) in lines {
        let broken = |what: &str| fault(format!("tiktoken.model: line {} {what}", i + 1));
        let split = line.iter().position(|byte| *byte == b' ').map(|at| line.split_at(at));
        let read = split.and_then(|(token, rank)| {
            let rank = std::str::from_utf8(&rank[1..]).ok()?.parse::<usize>().ok()?;
            Some((STANDARD.decode(token).ok().filter(|token| !token.is_empty())?, rank))
        });
        let (token, rank) = read.ok_or_else(|| broken("is no token with its rank"))?;
        let place = tokens.get_mut(rank).ok_or_else(|| broken("has a higher rank than there are tokens"))?;
        if !std::mem::replace(place, token).is_empty() {
            return Err(broken("has the rank of another"));
        }
    }
    Ok(tokens)
}

/// The two parts that the tokens of lower ranks leave of this one; none if they leave more, or it is a byte.
fn parts<'a>(token: &'a [u8], rank: usize, ranks: &HashMap<&[u8], usize>) -> Option<(&'a [u8], &'a [u8])> {
    if token.len() > MAX_JOINED_BYTES {
        return None;
    }
    // Where the parts begin, and the end.
    let mut cuts: Vec<usize> = (0..=token.len()).collect();
    while cuts.len() > 3 {
        let joined = |i: usize| ranks.get(&token[cuts[i - 1]..cuts[i + 1]]).map(|rank| (*rank, i));
        // Of equal ranks the leftmost.
        let (lowest, cut) = (1..cuts.len() - 1).filter_map(joined).min()?;
        if lowest >= rank {
            return None;
        }
        cuts.remove(cut);
    }
    (cuts.len() == 3).then(|| token.split_at(cuts[1]))
}

/// `added_tokens_decoder`: tokens behind the others, which are matched whole.
fn added(settings: &Value, n_tokens: usize) -> Result<Vec<Value>, TokenizerError> {
    let mut added: Vec<Value> = Vec::new();
    for (id, token) in settings["added_tokens_decoder"].as_object().into_iter().flatten() {
        let place = id.parse::<usize>().ok().filter(|id| (n_tokens..n_tokens + MAX_ADDED).contains(id));
        let (Some(id), Some(content)) = (place, token["content"].as_str().filter(|c| !c.is_empty())) else {
            return Err(fault(format!(
                "tokenizer_config.json: added_tokens_decoder.{id} is no token of its own"
            )));
        };
        added.push(json!({"id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": token["special"] != false}));
    }
    Ok(added)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::Checkpoint;

    /// The joined tokens of the vocabulary below, by rank behind the bytes.
    const JOINED: [&str; 16] = [
        "th", "he", "in", " t", "the", "ing", " the", "aa", "aaa", "aaaa", "ab", "ba", "日", "日本", "qxyz",
        "th ing",
    ];

    /// All bytes from the last to the first, so that ids are not byte values, then the joined tokens.
    fn vocabulary() -> Vec<Vec<u8>> {
        let bytes = (0..=u8::MAX).rev().map(|byte| vec![byte]);
        bytes.chain(JOINED.iter().map(|token| token.as_bytes().to_vec())).collect()
    }

    fn model() -> String {
        let line = |(rank, token): (usize, &Vec<u8>)| format!("{} {rank}\n", STANDARD.encode(token));
        vocabulary().iter().enumerate().map(line).collect()
    }

    fn settings() -> Value {
        json!({"tokenizer_class": CLASS, "added_tokens_decoder": {
            "280": {"content": "<|tool_call_begin|>", "special": false},
            "272": {"content": "[BOS]", "special": true},
            "274": {"content": "<|im_end|>", "special": true}}})
    }

    fn read(model: &str, settings: &Value) -> Result<Tokenizer, TokenizerError> {
        tokenizer(model.as_bytes(), settings.to_string().as_bytes())
    }

    /// What tiktoken does with one word, written down naively.
    fn tiktoken(word: &[u8]) -> Vec<u32> {
        let vocabulary = vocabulary();
        let rank = |bytes: &[u8]| vocabulary.iter().position(|token| token == bytes);
        if let Some(whole) = rank(word) {
            return vec![u32::try_from(whole).unwrap()];
        }
        let mut parts: Vec<Vec<u8>> = word.iter().map(|byte| vec![*byte]).collect();
        loop {
            let best = (1..parts.len()).filter_map(|i| Some((rank(&parts[i - 1..=i].concat())?, i))).min();
            let Some((_, i)) = best else { break };
            let right = parts.remove(i);
            parts[i - 1].extend(right);
        }
        parts.iter().map(|part| u32::try_from(rank(part).unwrap()).unwrap()).collect()
    }

    proptest! {
        #[test]
        fn words_are_joined_as_tiktoken_joins_them(word in " ?[abtheinqxyz]{1,16}|[日本]{1,6}") {
            let tokenizer = read(&model(), &settings()).unwrap();
            prop_assert_eq!(tokenizer.encode(&word, false).unwrap(), tiktoken(word.as_bytes()));
        }
    }

    #[test]
    fn texts_are_cut_joined_and_put_together_again() {
        let tokenizer = read(&model(), &settings()).unwrap();
        let id = |token: &str| u32::try_from(256 + JOINED.iter().position(|t| *t == token).unwrap()).unwrap();
        for (text, ids) in [
            // `th` is older than ` t`.
            ("the thing", vec![id("the"), 255 - u32::from(b' '), id("th"), id("ing")]),
            // No two tokens make this one, but a word that is a token stays whole.
            ("qxyz", vec![id("qxyz")]),
            ("日本[BOS]aaaa", vec![id("日本"), 272, id("aaaa")]),
            ("<|im_end|>ab", vec![274, id("ab")]),
            ("ba<|tool_call_begin|>", vec![id("ba"), 280]),
        ] {
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids, "{text}");
            assert_eq!(tokenizer.decode_with_special(&ids).unwrap(), text);
        }
        assert_eq!(tokenizer.decode(&[id("ab"), 274, 280]).unwrap(), "ab<|tool_call_begin|>");
        let special = tokenizer.special_tokens();
        assert_eq!(special, [(272, "[BOS]".to_owned()), (274, "<|im_end|>".to_owned())].into());
        let table = tokenizer.token_table().unwrap();
        let plain = |id: usize| (table[id].bytes.as_slice(), table[id].special);
        assert_eq!(
            (plain(0), plain(258), plain(274)),
            ((&[0xff][..], false), (&b"in"[..], false), (&b"<|im_end|>"[..], true))
        );
        let again = Tokenizer::from_json(tokenizer.to_json().unwrap().as_bytes()).unwrap();
        let text = "It's the 日本 thing: 12345 aaa\n\n[EOS]";
        assert_eq!(again.encode(text, false).unwrap(), tokenizer.encode(text, false).unwrap());
        assert_eq!(again.decode(&again.encode(text, false).unwrap()).unwrap(), text);
    }

    #[test]
    fn a_checkpoint_without_tokenizer_json_has_this_one() {
        let tiny = std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets/tiny"));
        let dir = tempfile::tempdir().unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(tiny.join(file), dir.path().join(file)).unwrap();
        }
        std::fs::write(dir.path().join("tiktoken.model"), model()).unwrap();
        let unsure = Checkpoint::open(dir.path()).unwrap().tokenizer().unwrap_err().to_string();
        assert!(unsure.contains(CLASS), "{unsure}");
        std::fs::write(dir.path().join("tokenizer_config.json"), settings().to_string()).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let tokenizer = checkpoint.tokenizer().unwrap();
        assert_eq!(tokenizer.encode("[BOS]qxyz", false).unwrap(), [272, 270]);
        let companions: Vec<_> =
            checkpoint.companion_files().iter().filter_map(|path| path.file_name()).collect();
        assert!(
            companions.contains(&"tiktoken.model".as_ref()),
            "it goes where the weights go: {companions:?}"
        );
        let files = checkpoint.text_files().unwrap();
        let saved = files.into_iter().find(|(name, _)| name == "tokenizer.json").unwrap();
        assert_eq!(saved.1, tokenizer.to_json().unwrap().into_bytes());
        std::fs::copy(tiny.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let tokenizer = Checkpoint::open(dir.path()).unwrap().tokenizer().unwrap();
        assert_ne!(tokenizer.encode("[BOS]qxyz", false).unwrap(), [272, 270], "tokenizer.json comes first");
    }

    #[test]
    fn what_is_broken_is_named() {
        let good = model();
        for (model, words) in [
            (good.replacen("/w== 0\n", "", 1), "line 271 has a higher rank"),
            (good.replacen("/w== 0\n", "/w==\n", 1), "line 1"),
            (good.replacen("/w== 0\n", "/w 0\n", 1), "line 1"),
            (good.replacen("/w== 0\n", "/w== 99999999999\n", 1), "line 1 has a higher rank"),
            (good.replacen("/w== 0\n", "/w== 1\n", 1), "line 2 has the rank of another"),
            (good.replacen("/w== 0\n", "dGg= 0\n", 1), "a token twice"),
            (good.replacen("/w== 0\n", "dGhl4Q== 0\n", 1), "no token for the byte 0xff"),
        ] {
            let error = read(&model, &settings()).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
        let with = |id: &str, content: &str| json!({"tokenizer_class": CLASS, "added_tokens_decoder": {id: {"content": content}}});
        for (settings, words) in [
            (json!({}), "of the class TikTokenTokenizer, not null"),
            (json!({"tokenizer_class": "QWenTokenizer"}), "QWenTokenizer"),
            (with("7", "[BOS]"), "added_tokens_decoder.7"),
            (with("x", "[BOS]"), "added_tokens_decoder.x"),
            (with("272", ""), "added_tokens_decoder.272"),
            (with("99999999", "[BOS]"), "added_tokens_decoder.99999999"),
            (with("272", "the"), "both ordinary and special"),
        ] {
            let error = read(&good, &settings).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(words), "{words}: {error}");
        }
    }
}
