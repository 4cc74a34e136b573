//! The tiny model's tokenizer: one token for each byte, and a few markers. No merges, so nothing is ever unknown and
//! digits stay apart.

use serde_json::{Map, Value, json};

/// Markers, in the order of their ids from 0.
pub const MARKERS: &[&str] = &["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>"];
/// Number of tokens: markers and bytes.
pub const TOKENS: usize = MARKERS.len() + 256;
/// Id of the token that ends an answer.
pub const EOS: u32 = 2;

/// The template that `tokenizer_config.json` carries.
pub const CHAT_TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'assistant' %}<assistant>{{ message['content'] }}<eos>\
{% elif message['role'] == 'system' %}<system>{{ message['content'] }}\
{% else %}<user>{{ message['content'] }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}<assistant>{% endif %}";

/// How GPT-2's byte-level scheme writes a byte: printable ones as they are, the others from U+0100 on.
fn byte_characters() -> Vec<char> {
    let printable = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut next = 0x100;
    let write = |b: u32| {
        let code = if printable(b) {
            b
        } else {
            next += 1;
            next - 1
        };
        char::from_u32(code).expect("codes below U+0200 are characters")
    };
    (0..256).map(write).collect()
}

/// The content of `tokenizer.json`.
pub fn tokenizer_json() -> String {
    let mut vocabulary = Map::new();
    let mut added = Vec::new();
    for (id, marker) in MARKERS.iter().enumerate() {
        vocabulary.insert((*marker).to_owned(), json!(id));
        added.push(json!({
            "id": id, "content": marker, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true
        }));
    }
    for (byte, character) in byte_characters().into_iter().enumerate() {
        vocabulary.insert(character.to_string(), json!(MARKERS.len() + byte));
    }
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": Value::Object(vocabulary), "merges": []
        }
    });
    format!("{tokenizer:#}\n")
}

/// The content of `tokenizer_config.json`.
pub fn tokenizer_config_json(max_context: usize) -> String {
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>",
        "add_bos_token": false, "model_max_length": max_context, "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE
    });
    format!("{config:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_text_comes_back_and_digits_are_single_tokens() {
        let tokenizer = tokenizers::Tokenizer::from_bytes(tokenizer_json()).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), TOKENS);
        for text in ["What is 12+34?", "naïve — 数字 \u{1F600}\n\ttab"] {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(ids.get_ids().len(), text.len());
            assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), text);
        }
        let ids = tokenizer.encode("<bos><user>1<assistant>", false).unwrap();
        let one = MARKERS.len() as u32 + u32::from(b'1');
        assert_eq!(ids.get_ids(), [1, 3, one, 4]);
    }
}
