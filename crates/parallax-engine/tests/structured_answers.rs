//! A thousand structured answers of a small model that knows nothing of their schemas, each under a schema of its own that
//! a seed draws: all are valid, says an independent validator.
#![cfg(all(feature = "structured", feature = "local", feature = "service"))]

use std::collections::BTreeSet;

use parallax_engine::local::LocalStage;
use parallax_engine::structured::{GrammarSpec, Grammars};
use parallax_engine::{EngineConfig, EngineHandle, FinishReason, Request, SamplingParams};
use parallax_model::{Checkpoint, LoadOptions};
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};

const ANSWERS: u64 = 1000;
/// Answers in the making at the same time.
const TOGETHER: u64 = 50;

/// A schema whose answers are bounded: a model that knows nothing never ends a list or a text that may go on for ever.
fn schema(random: &mut ChaCha8Rng, depth: usize) -> Value {
    let kinds = if depth == 0 { 9 } else { 13 };
    match random.random_range(0..kinds) {
        0 => json!({"type": "boolean"}),
        1 => {
            let least = random.random_range(-500..500);
            json!({"type": "integer", "minimum": least, "maximum": least + random.random_range(0..900)})
        }
        2 => {
            let least = f64::from(random.random_range(-40..40)) / 4.0;
            json!({"type": "number", "minimum": least, "maximum": least + 2.5})
        }
        3 => {
            let least = random.random_range(0..4);
            json!({"type": "string", "minLength": least, "maxLength": least + random.random_range(0..8)})
        }
        4 => {
            let pattern = ["^[a-z]{2,5}$", "^(north|south)-[0-9]{1,3}$", "^[A-F0-9]{4}(:[A-F0-9]{4}){0,2}$"];
            json!({"type": "string", "pattern": pattern.choose(random)})
        }
        5 => {
            let formats = ["date", "time", "date-time", "uuid", "ipv4"];
            json!({"type": "string", "format": formats.choose(random)})
        }
        6 => {
            let all = [json!("red"), json!("blé \"ok\""), json!(7), json!(null), json!(true), json!(-2.5)];
            json!({"enum": &all[..random.random_range(1..=all.len())]})
        }
        7 => {
            let texts = ["circle", "a\nb", "日本"];
            json!({"const": texts.choose(random)})
        }
        8 => json!({"type": ["integer", "null"], "minimum": 0, "maximum": 9}),
        9 => {
            let most = random.random_range(0..3);
            let least = random.random_range(0..=most);
            json!({"type": "array", "minItems": least, "maxItems": most, "items": schema(random, depth - 1)})
        }
        10 => json!({"anyOf": [schema(random, depth - 1), schema(random, depth - 1)]}),
        _ => object(random, depth),
    }
}

fn object(random: &mut ChaCha8Rng, depth: usize) -> Value {
    let names = ["name", "größe", "point x"];
    let used = &names[..random.random_range(1..=1 + depth)];
    let properties: Map<String, Value> =
        used.iter().map(|name| ((*name).to_owned(), schema(random, depth - 1))).collect();
    let required: Vec<&&str> = used.iter().filter(|_| random.random_bool(0.6)).collect();
    json!({"type": "object", "additionalProperties": false, "properties": properties, "required": required})
}

#[test]
fn a_thousand_of_a_thousand_answers_are_valid() {
    let checkpoint = Checkpoint::tiny().unwrap();
    let options = LoadOptions { kv_pages: 2048, ..LoadOptions::whole(&checkpoint) };
    let stage = LocalStage::load(&checkpoint, &options).unwrap();
    let engine = EngineHandle::start(Box::new(stage), EngineConfig::default()).unwrap();
    let tokenizer = checkpoint.tokenizer().unwrap();
    let vocabulary = tokenizer.token_table().unwrap();
    let ends = checkpoint.config().eos.clone();
    let grammars =
        Grammars::new(vocabulary.into_iter().map(|t| (t.bytes, t.special)).collect(), ends.clone()).unwrap();
    let prompt = tokenizer.encode("<bos><user>any<assistant>", false).unwrap();

    let (mut different, mut shapes) = (BTreeSet::new(), BTreeSet::new());
    for batch in 0..ANSWERS / TOGETHER {
        let asked: Vec<_> = (batch * TOGETHER..(batch + 1) * TOGETHER)
            .map(|seed| {
                let mut schema = object(&mut ChaCha8Rng::seed_from_u64(seed), 2);
                // The tiny model has a short context, which white space alone would fill.
                schema["x-guidance"] = json!({"whitespace_pattern": "[ \\n]?"});
                let constraint = grammars
                    .compile(&GrammarSpec::JsonSchema(schema.clone()))
                    .unwrap_or_else(|e| panic!("schema {seed}: {e}: {schema}"));
                let sampling = SamplingParams {
                    temperature: 1.5,
                    seed,
                    max_tokens: 500,
                    stop_ids: ends.clone(),
                    ..SamplingParams::default()
                };
                let request = Request {
                    prompt: prompt.clone(),
                    sampling,
                    constraint: Some(constraint),
                    ..Request::default()
                };
                (seed, schema, engine.submit(request).unwrap())
            })
            .collect();
        for (seed, schema, mut stream) in asked {
            let mut completion = parallax_engine::Completion::default();
            while let Some(event) = stream.next_blocking() {
                completion.take(event);
            }
            assert_eq!(completion.reason, FinishReason::Stop, "answer {seed} to {schema}");
            let text = tokenizer.decode(&completion.token_ids()).unwrap();
            let value: Value = serde_json::from_str(&text)
                .unwrap_or_else(|e| panic!("answer {seed} is no JSON: {e}: {text}"));
            let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
            let faults: Vec<String> = validator.iter_errors(&value).map(|e| e.to_string()).collect();
            assert!(faults.is_empty(), "answer {seed}: {value} under {schema}: {faults:?}");
            different.insert(text);
            shapes.insert(schema.to_string());
        }
    }
    println!("{ANSWERS} answers are valid, under {} schemas", shapes.len());
    // They are not one and the same.
    assert!(
        shapes.len() > 800 && different.len() > 800,
        "{} schemas, {} answers",
        shapes.len(),
        different.len()
    );
}
