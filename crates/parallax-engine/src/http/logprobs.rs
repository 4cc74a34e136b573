//! Log-probabilities of tokens, in the shapes of the chat and of the completions API.

use serde_json::{Map, Value, json};

use super::generation::TokenReport;

/// What stands for minus infinity, which JSON cannot say. OpenAI's value.
const IMPOSSIBLE: f32 = -9999.0;

/// Bytes of each token, by id.
pub(super) type Vocabulary = [parallax_model::TokenBytes];

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}

/// The text of a token; bytes that are no character become replacement characters.
pub(super) fn token_text(vocabulary: &Vocabulary, id: u32) -> String {
    String::from_utf8_lossy(token_bytes(vocabulary, id)).into_owned()
}

fn token_bytes(vocabulary: &Vocabulary, id: u32) -> &[u8] {
    vocabulary.get(id as usize).map_or(&[], |token| token.bytes.as_slice())
}

fn one(vocabulary: &Vocabulary, id: u32, logprob: f32) -> Value {
    json!({"token": token_text(vocabulary, id), "logprob": finite(logprob), "bytes": token_bytes(vocabulary, id)})
}

/// An entry of the chat API's `logprobs.content`.
pub(super) fn chat_entry(vocabulary: &Vocabulary, report: &TokenReport) -> Value {
    let mut entry = one(vocabulary, report.id, report.logprob);
    let top: Vec<Value> = report.top.iter().map(|(id, logprob)| one(vocabulary, *id, *logprob)).collect();
    entry["top_logprobs"] = Value::Array(top);
    entry["weights_version"] = report.version.into();
    entry
}

/// vLLM's `prompt_logprobs`: nothing for the first token, then `{"ID": {"logprob", "decoded_token"}}` for each.
pub(super) fn prompt(vocabulary: &Vocabulary, ids: &[u32], known: &[f32]) -> Value {
    let one = |(id, logprob): (&u32, &f32)| {
        let token = json!({"logprob": finite(*logprob), "decoded_token": token_text(vocabulary, *id)});
        Value::Object(Map::from_iter([(id.to_string(), token)]))
    };
    std::iter::once(Value::Null).chain(ids.iter().skip(1).zip(known).map(one)).collect()
}

/// The completions API's `logprobs`. `prompt` comes first when it is echoed: its first token has no probability.
/// `offset`: characters of the text so far.
pub(super) fn completion(
    vocabulary: &Vocabulary,
    prompt: Option<(&[u32], &[f32])>,
    reports: &[TokenReport],
    offset: &mut usize,
) -> Value {
    let (mut tokens, mut logprobs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
    // Of the answer's tokens; those of a prompt were made by nobody.
    let versions: Vec<u64> = reports.iter().map(|report| report.version).collect();
    let mut add = |id: u32, logprob: Option<f32>, top: Option<&[(u32, f32)]>| {
        let text = token_text(vocabulary, id);
        offsets.push(*offset);
        // A character counts where it begins, however many tokens it is made of. Special tokens are not in the text.
        let begins = |byte: &&u8| **byte & 0xc0 != 0x80;
        let token = vocabulary.get(id as usize).filter(|token| !token.special);
        *offset += token.map_or(0, |token| token.bytes.iter().filter(begins).count());
        tops.push(top.map(|top| {
            let alternatives = top.iter().map(|(id, p)| (token_text(vocabulary, *id), json!(finite(*p))));
            Value::Object(alternatives.collect::<Map<_, _>>())
        }));
        tokens.push(text);
        logprobs.push(logprob.map(finite));
    };
    if let Some((ids, known)) = prompt {
        for (i, id) in ids.iter().enumerate() {
            add(*id, i.checked_sub(1).and_then(|i| known.get(i).copied()), None);
        }
    }
    for report in reports {
        add(report.id, Some(report.logprob), Some(&report.top));
    }
    json!({"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets,
           "weights_versions": versions})
}

#[cfg(test)]
mod tests {
    use parallax_model::TokenBytes;

    use super::*;

    #[test]
    fn both_shapes_tell_the_same() {
        let token = |bytes: &[u8]| TokenBytes { bytes: bytes.to_vec(), special: false };
        let vocabulary = [token(b"a"), token("é".as_bytes()), token(&[0xc3])];
        let report = TokenReport {
            id: 1,
            logprob: -0.5,
            version: 3,
            reasoning: false,
            top: vec![(1, -0.5), (2, f32::NEG_INFINITY)],
        };
        let chat = chat_entry(&vocabulary, &report);
        assert_eq!((&chat["token"], &chat["bytes"]), (&json!("é"), &json!([0xc3, 0xa9])));
        assert_eq!(chat["top_logprobs"][1]["logprob"], json!(-9999.0));
        assert_eq!(chat["weights_version"], json!(3));
        let mut offset = 0;
        let plain = completion(&vocabulary, Some((&[0, 1], &[-1.0])), &[report], &mut offset);
        assert_eq!(plain["tokens"], json!(["a", "é", "é"]));
        assert_eq!(plain["token_logprobs"], json!([null, -1.0, -0.5]));
        assert_eq!(plain["weights_versions"], json!([3]));
        assert_eq!((&plain["text_offset"], offset), (&json!([0, 1, 2]), 3));
    }

    #[test]
    fn offsets_are_those_of_the_text() {
        let token = |bytes: &[u8], special| TokenBytes { bytes: bytes.to_vec(), special };
        let vocabulary = [
            token(b"<s>", true),
            token(&[0xc3], false),
            token(&[0xa9, b'!'], false),
            token(b"</s>", true),
            token(b"a", false),
        ];
        let report = |id| TokenReport { id, logprob: -0.5, version: 0, reasoning: false, top: Vec::new() };
        let mut offset = 0;
        let reports = [1, 2, 3, 4].map(report);
        let plain = completion(&vocabulary, Some((&[0, 4], &[-1.0])), &reports, &mut offset);
        // "aé!a", between special tokens.
        assert_eq!((&plain["text_offset"], offset), (&json!([0, 0, 1, 2, 3, 3]), 4));
        assert_eq!(plain["tokens"][0], "<s>");
    }
}
