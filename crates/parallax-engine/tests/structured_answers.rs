//! A thousand structured answers of a model that knows nothing: each is valid under its schema, says an independent
//! validator.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]
#![cfg(feature = "structured")]

use parallax_engine::constraint::Constraint;
use parallax_engine::structured::{GrammarSpec, Grammars};
use serde_json::{Value, json};

/// Schemas with bounded answers: a random model never ends a list or a text that may go on for ever.
fn schemas() -> Vec<Value> {
    let text = json!({"type": "string", "maxLength": 12});
    vec![
        json!({"type": "object", "additionalProperties": false, "required": ["name", "age"],
               "properties": {"name": text, "age": {"type": "integer", "minimum": 0, "maximum": 120}}}),
        json!({"type": "array", "minItems": 1, "maxItems": 4, "items": {"enum": ["red", "green", "blue", 7, null, true]}}),
        json!({"type": "object", "additionalProperties": false, "required": ["point", "tags"], "properties": {
               "point": {"type": "object", "additionalProperties": false, "required": ["x", "y"],
                         "properties": {"x": {"type": "number", "minimum": -5, "maximum": 5}, "y": {"type": "number", "minimum": -1, "maximum": 1}}},
               "tags": {"type": "array", "maxItems": 3, "items": {"type": "string", "pattern": "^[a-z]{2,5}$"}},
               "note": text}}),
        json!({"anyOf": [{"type": "object", "additionalProperties": false, "required": ["kind", "radius"],
                          "properties": {"kind": {"const": "circle"}, "radius": {"type": "integer", "minimum": 1, "maximum": 99}}},
                         {"type": "object", "additionalProperties": false, "required": ["kind", "sides"],
                          "properties": {"kind": {"const": "polygon"}, "sides": {"type": "integer", "minimum": 3, "maximum": 12}}}]}),
        json!({"$defs": {"leaf": {"type": "object", "additionalProperties": false, "required": ["v"], "properties": {"v": {"type": "boolean"}}}},
               "type": "object", "additionalProperties": false, "required": ["left", "right"],
               "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]}}}),
        json!({"type": "object", "additionalProperties": false, "required": ["day", "id"], "properties": {
               "day": {"type": "string", "format": "date"}, "id": {"type": "string", "format": "uuid"},
               "state": {"type": ["string", "null"], "enum": ["on", "off", null]}}}),
    ]
}

/// Tokens of one byte, some of several, and an end token: like a real vocabulary they cut the text anywhere.
fn vocabulary() -> Vec<(Vec<u8>, bool)> {
    let mut tokens: Vec<(Vec<u8>, bool)> = (0..=u8::MAX).map(|b| (vec![b], false)).collect();
    for word in
        ["{\"", "\":", "\",\"", "\"}", "true", "false", "null", "circle", "poly", "12", " ", "é", "},", "]}"]
    {
        tokens.push((word.as_bytes().to_vec(), false));
    }
    tokens.push((b"<end>".to_vec(), true));
    tokens
}

/// Draws among the allowed tokens with logits that are a hash of seed and position.
fn answer(grammar: &dyn Constraint, vocabulary: &[(Vec<u8>, bool)], seed: u64) -> Vec<u8> {
    let end = vocabulary.len() - 1;
    let (mut state, mut text) = (grammar.start(), Vec::new());
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while !state.is_complete() {
        let mut logits = vec![0.0f32; vocabulary.len()];
        for logit in &mut logits {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            *logit = (random >> 40) as f32;
        }
        state.mask(&mut logits).unwrap();
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        state.accept(u32::try_from(best).unwrap()).unwrap();
        if best != end {
            text.extend_from_slice(&vocabulary[best].0);
        }
        assert!(text.len() < 4000, "an answer that does not end: {}", String::from_utf8_lossy(&text));
    }
    text
}

#[test]
fn a_thousand_of_a_thousand_answers_are_valid() {
    let vocabulary = vocabulary();
    let end = u32::try_from(vocabulary.len() - 1).unwrap();
    let grammars = Grammars::new(vocabulary.clone(), vec![end]).unwrap();
    let schemas: Vec<_> = schemas()
        .into_iter()
        .map(|schema| {
            let grammar = grammars.compile(&GrammarSpec::JsonSchema(schema.clone())).unwrap();
            let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
            (grammar, validator, std::collections::BTreeSet::new())
        })
        .collect();
    let mut schemas = schemas;
    let n_schemas = schemas.len();
    let mut valid = 0;
    for seed in 0..1000 {
        let (grammar, validator, different) = &mut schemas[seed % n_schemas];
        let text = answer(grammar.as_ref(), &vocabulary, seed as u64);
        let value: Value = serde_json::from_slice(&text)
            .unwrap_or_else(|e| panic!("answer {seed} is no JSON: {e}: {}", String::from_utf8_lossy(&text)));
        let faults: Vec<String> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
        assert!(faults.is_empty(), "answer {seed}: {value}: {faults:?}");
        different.insert(text);
        valid += 1;
    }
    assert_eq!(valid, 1000);
    // The answers are not one and the same.
    assert!(schemas.iter().all(|(_, _, different)| different.len() >= 5));
}
