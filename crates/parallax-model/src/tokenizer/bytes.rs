//! What each token stands for, byte by byte: constrained decoding and per-token reports need it, a decoder does not
//! tell, because it only speaks of whole texts.
//!
//! The vocabulary spells bytes in one of two ways, which the decoder of the definition reveals: GPT-2's 256 printable
//! characters (`ByteLevel`), or text with `▁` for a space and `<0x0A>` for bytes (`Metaspace`, `ByteFallback`).

use std::collections::BTreeMap;

use serde_json::Value;

use super::Tokenizer;
use crate::error::TokenizerError;

/// How the vocabulary spells bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spelling {
    /// One character per byte, GPT-2's table.
    ByteLevel,
    /// Text; `▁` is a space, `<0xHH>` a byte.
    Metaspace,
    /// Text as it is.
    Plain,
}

/// One entry of [`Tokenizer::token_table`].
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct TokenBytes {
    /// What the token adds to a text; its name when it is special; empty for ids that the tokenizer does not have.
    pub bytes: Vec<u8>,
    /// A control token, which decoding leaves out.
    pub special: bool,
}

impl Tokenizer {
    /// Bytes of every token, by id; as long as the highest id asks for. Takes time in the size of the vocabulary: keep it.
    ///
    /// # Errors
    /// The definition cannot be read back.
    pub fn token_table(&self) -> Result<Vec<TokenBytes>, TokenizerError> {
        let definition: Value =
            serde_json::from_str(&self.to_json()?).map_err(|e| TokenizerError::Invalid(e.to_string()))?;
        let spelling = spelling(&definition["decoder"]);
        let characters = byte_characters();
        let added: BTreeMap<u32, bool> =
            self.inner.get_added_tokens_decoder().iter().map(|(id, token)| (*id, token.special)).collect();
        let vocabulary = self.inner.get_vocab(true);
        let length = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
        let mut table = vec![TokenBytes::default(); length];
        for (text, id) in vocabulary {
            let bytes = match (added.get(&id), spelling) {
                (Some(true), _) | (_, Spelling::Plain) | (Some(false), Spelling::ByteLevel) => {
                    text.into_bytes()
                }
                (None, Spelling::ByteLevel) => byte_level(&text, &characters),
                // The decoder does not ask where a token comes from.
                (_, Spelling::Metaspace) => metaspace(&text),
            };
            table[id as usize] = TokenBytes { bytes, special: added.get(&id) == Some(&true) };
        }
        Ok(table)
    }

    /// Ids of all special tokens with their texts.
    pub fn special_tokens(&self) -> BTreeMap<u32, String> {
        let added = self.inner.get_added_tokens_decoder();
        added.into_iter().filter(|(_, t)| t.special).map(|(id, t)| (id, t.content)).collect()
    }
}

fn spelling(decoder: &Value) -> Spelling {
    let mut parts = vec![decoder];
    let mut found = Spelling::Plain;
    while let Some(part) = parts.pop() {
        match part["type"].as_str() {
            Some("ByteLevel") => return Spelling::ByteLevel,
            Some("Metaspace" | "ByteFallback") => found = Spelling::Metaspace,
            Some("Replace") if part["pattern"]["String"] == "\u{2581}" => found = Spelling::Metaspace,
            Some("Sequence") => parts.extend(part["decoders"].as_array().into_iter().flatten()),
            _ => {}
        }
    }
    found
}

/// GPT-2's table: printable Latin-1 stands for itself, the other bytes for the characters from U+0100 on.
pub(super) fn byte_characters() -> BTreeMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    (0..=u8::MAX)
        .map(|byte| {
            let code = if printable(byte) { u32::from(byte) } else { next };
            next += u32::from(!printable(byte));
            (char::from_u32(code).expect("below U+0200 every number is a character"), byte)
        })
        .collect()
}

fn byte_level(text: &str, characters: &BTreeMap<char, u8>) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = text.chars().map(|c| characters.get(&c).copied()).collect();
    // Not of the table: an entry that stands for itself.
    bytes.unwrap_or_else(|| text.as_bytes().to_vec())
}

fn metaspace(text: &str) -> Vec<u8> {
    let hex = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>')).filter(|t| t.len() == 2);
    match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
        Some(byte) => vec![byte],
        None => text.replace('\u{2581}', " ").into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::gguf::byte_tokenizer;
    use super::*;

    proptest! {
        #[test]
        fn the_bytes_of_the_tokens_are_the_text(text in "\\PC{0,40}") {
            let tokenizer = byte_tokenizer();
            let table = tokenizer.token_table().unwrap();
            let ids = tokenizer.encode(&text, false).unwrap();
            let bytes: Vec<u8> = ids.iter().flat_map(|id| table[*id as usize].bytes.clone()).collect();
            prop_assert_eq!(String::from_utf8(bytes).unwrap(), text);
        }
    }

    #[test]
    fn sentencepiece_spelling_is_read() {
        let file = serde_json::json!({"version": "1.0", "truncation": null, "padding": null,
            "added_tokens": [{"id": 4, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false,
                              "normalized": false, "special": true}],
            "normalizer": null, "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "WordLevel", "unk_token": "a",
                      "vocab": {"a": 0, "\u{2581}the": 1, "<0x0A>": 2, "<0xZZ>": 3, "</s>": 4}}});
        let tokenizer = Tokenizer::from_json(file.to_string().as_bytes()).unwrap();
        let table = tokenizer.token_table().unwrap();
        let bytes: Vec<&[u8]> = table.iter().map(|t| t.bytes.as_slice()).collect();
        assert_eq!(bytes, [&b"a"[..], b" the", b"\n", b"<0xZZ>", b"</s>"]);
        assert!(table[4].special && !table[1].special);
        assert_eq!(tokenizer.special_tokens(), BTreeMap::from([(4, "</s>".to_owned())]));
    }

    #[test]
    fn the_byte_table_is_gpt2s() {
        let table = byte_characters();
        assert_eq!(table.len(), 256);
        assert_eq!((table[&'Ġ'], table[&'Ċ'], table[&'a'], table[&'é']), (b' ', b'\n', b'a', 0xe9));
    }
}
