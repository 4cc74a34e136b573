//! Structured output by llguidance: JSON schemas, regular expressions and grammars become constraints on tokens.
//! Feature `structured`.
//!
//! A grammar is compiled once per request; every answer follows a copy of the compiled state. White space between the
//! elements of JSON is limited, because a model that may write spaces for ever sometimes does.

mod calls;
mod finite;
mod formats;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, InferenceCapabilities, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::constraint::{Constraint, ConstraintState};
use crate::markup::{Dialect, ToolSchema};

/// White space that may stand between two elements of a JSON text.
const JSON_SPACE: &str = "[ \\n]{0,16}";
/// Longest description of a grammar in bytes.
const MAX_GRAMMAR_BYTES: usize = 256 * 1024;

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum GrammarSpec {
    /// JSON that is valid under this schema.
    JsonSchema(Value),
    /// A JSON object.
    JsonObject,
    /// A text that matches this regular expression as a whole.
    Regex(String),
    /// A text of this grammar, in llguidance's variant of Lark.
    Grammar(String),
    /// One of these texts.
    Choice(Vec<String>),
}

/// A grammar that cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// It is too long.
    #[error("the grammar has {bytes} bytes, at most {limit} are taken")]
    TooLarge {
        /// Bytes of the description.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// It is broken, contradicts itself, or uses something that is not supported.
    #[error("the grammar cannot be followed: {reason}")]
    Invalid {
        /// The compiler's words.
        reason: String,
    },
    /// The vocabulary cannot be used.
    #[error("this vocabulary cannot be constrained: {reason}")]
    Vocabulary {
        /// Why.
        reason: String,
    },
}

/// One token of a vocabulary: what it adds to a text, and whether it is a control token instead.
pub type VocabularyToken = (Vec<u8>, bool);

/// Compiles grammars for one vocabulary.
pub struct Grammars {
    factory: ParserFactory,
    ends: Arc<Ends>,
}

/// How an answer may end.
#[derive(Debug)]
struct Ends {
    /// The grammar's own end token: one behind the vocabulary, so that it can be no ordinary token.
    id: usize,
    stop_ids: Vec<u32>,
}

impl fmt::Debug for Grammars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammars").field("ends", &self.ends).finish_non_exhaustive()
    }
}

impl Grammars {
    /// A compiler for this vocabulary, by token id, whose answers end with one of `stop_ids`.
    ///
    /// # Errors
    /// An empty vocabulary.
    pub fn new(vocabulary: Vec<VocabularyToken>, stop_ids: Vec<u32>) -> Result<Self, GrammarError> {
        let vocabulary_fault = |reason: String| GrammarError::Vocabulary { reason };
        let id = vocabulary.len();
        let end = u32::try_from(id).map_err(|e| vocabulary_fault(e.to_string()))?;
        let mut words: Vec<Vec<u8>> = vocabulary
            .into_iter()
            .map(|(bytes, special)| {
                // Byte 0xFF, which is never part of a text, marks control tokens.
                if special { [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes.as_slice()].concat() } else { bytes }
            })
            .collect();
        words.push([&[TokTrie::SPECIAL_TOKEN_MARKER], b"<|end of the answer|>".as_slice()].concat());
        let trie = TokTrie::from(&TokRxInfo::new(end + 1, end), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let mut factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices)
            .map_err(|e| vocabulary_fault(e.to_string()))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Self { factory, ends: Arc::new(Ends { id, stop_ids }) })
    }

    /// Compiles a grammar.
    ///
    /// # Errors
    /// A grammar that is too large, broken or contradictory.
    pub fn compile(&self, spec: &GrammarSpec) -> Result<Arc<dyn Constraint>, GrammarError> {
        let grammar = match spec {
            GrammarSpec::JsonSchema(schema) => {
                ends(schema)?;
                TopLevelGrammar::from_json_schema(with_space(schema))
            }
            GrammarSpec::JsonObject => {
                TopLevelGrammar::from_json_schema(with_space(&json!({"type": "object"})))
            }
            GrammarSpec::Regex(regex) => TopLevelGrammar::from_regex(regex),
            GrammarSpec::Grammar(lark) => TopLevelGrammar::from_lark(lark.clone()),
            GrammarSpec::Choice(choices) => {
                let alternatives: Vec<String> =
                    choices.iter().map(|c| Value::from(c.as_str()).to_string()).collect();
                TopLevelGrammar::from_lark(format!("start: {}", alternatives.join(" | ")))
            }
        };
        let bytes = serde_json::to_string(&grammar).map_or(usize::MAX, |text| text.len());
        if bytes > MAX_GRAMMAR_BYTES {
            return Err(GrammarError::TooLarge { bytes, limit: MAX_GRAMMAR_BYTES });
        }
        let invalid = |reason: String| GrammarError::Invalid { reason: first_line(&reason) };
        let parser = self.factory.create_parser(grammar).map_err(|e| invalid(format!("{e:#}")))?;
        let mut matcher = Matcher::new(Ok(parser));
        // The first mask shows what compiling alone does not: that nothing can be said at all.
        let mask = matcher.compute_mask_or_eos().map_err(|e| invalid(e.to_string()))?;
        if mask.is_zero() {
            return Err(invalid("no text can be made of this vocabulary".to_owned()));
        }
        Ok(Arc::new(Compiled { matcher: Mutex::new(matcher), ends: Arc::clone(&self.ends) }))
    }
}

impl Grammars {
    /// A constraint that begins behind the first `marker`: what comes before is free, but must not end the answer.
    pub fn after(&self, constraint: Arc<dyn Constraint>, marker: &str) -> Arc<dyn Constraint> {
        self.marked(constraint, marker, false)
    }

    /// A constraint to one call of one of these tools, as an object `{"name", "arguments"}`.
    ///
    /// # Errors
    /// A schema that cannot be followed.
    pub fn call(&self, tools: &[ToolSchema]) -> Result<Arc<dyn Constraint>, GrammarError> {
        tools.iter().try_for_each(|tool| ends(&tool.arguments))?;
        self.compile(&GrammarSpec::Grammar(calls::object_grammar(tools)))
    }

    /// A constraint on every call that an answer makes of these tools, as `dialect` writes calls; what comes before, between
    /// and behind them is free.
    ///
    /// # Errors
    /// A schema that cannot be followed.
    pub fn calls(&self, dialect: Dialect, tools: &[ToolSchema]) -> Result<Arc<dyn Constraint>, GrammarError> {
        tools.iter().try_for_each(|tool| ends(&tool.arguments))?;
        let trie = self.factory.tok_env().tok_trie();
        let grammar = calls::grammar(dialect, tools, |text| trie.get_special_token(text));
        let compiled = self.compile(&GrammarSpec::Grammar(grammar.lark))?;
        Ok(match grammar.marker {
            Some(marker) => self.marked(compiled, marker, true),
            None => compiled,
        })
    }

    fn marked(&self, constraint: Arc<dyn Constraint>, marker: &str, repeats: bool) -> Arc<dyn Constraint> {
        let environment = self.factory.tok_env().clone();
        let (marker, ends) = (marker.as_bytes().to_vec(), Arc::clone(&self.ends));
        Arc::new(Marked(Arc::new(Marker { constraint, marker, repeats, environment, ends })))
    }
}

/// A constraint that waits for a marker.
struct Marked(Arc<Marker>);

struct Marker {
    constraint: Arc<dyn Constraint>,
    marker: Vec<u8>,
    repeats: bool,
    environment: TokEnv,
    ends: Arc<Ends>,
}

impl fmt::Debug for Marked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Marked").field("constraint", &self.0.constraint).finish_non_exhaustive()
    }
}

impl Constraint for Marked {
    fn start(&self) -> Box<dyn ConstraintState> {
        Box::new(Watching { marker: Arc::clone(&self.0), follows: None, seen: Vec::new() })
    }
}

/// One answer before, behind, or between its markers.
struct Watching {
    marker: Arc<Marker>,
    /// Behind a marker.
    follows: Option<Box<dyn ConstraintState>>,
    /// Else the last bytes: perhaps the beginning of one.
    seen: Vec<u8>,
}

impl fmt::Debug for Watching {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watching").field("follows", &self.follows).finish_non_exhaustive()
    }
}

impl Watching {
    fn watch(&mut self, id: u32) -> Result<(), String> {
        let marker = Arc::clone(&self.marker);
        let (trie, wanted) = (marker.environment.tok_trie(), marker.marker.as_slice());
        let bytes = trie.token(id);
        // The marker may be a control token of its own.
        self.seen.extend_from_slice(bytes.strip_prefix(&[TokTrie::SPECIAL_TOKEN_MARKER]).unwrap_or(bytes));
        let Some(at) = self.seen.windows(wanted.len()).position(|window| window == wanted) else {
            let keep = self.seen.len().saturating_sub(wanted.len() - 1);
            self.seen.drain(..keep);
            return Ok(());
        };
        let mut follows = marker.constraint.start();
        // A token may end behind the marker: what it says there counts.
        for id in trie.greedy_tokenize(self.seen[at + wanted.len()..].trim_ascii_start()) {
            follows.accept(id)?;
        }
        self.seen.clear();
        self.follows = Some(follows);
        Ok(())
    }
}

impl ConstraintState for Watching {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        if let Some(follows) = &mut self.follows {
            return follows.mask(logits);
        }
        if !self.marker.repeats {
            for id in &self.marker.ends.stop_ids {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    fn is_free(&self) -> bool {
        self.follows.as_ref().map_or(self.marker.repeats, |follows| follows.is_free())
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        match &mut self.follows {
            Some(follows) => follows.accept(id)?,
            None => self.watch(id)?,
        }
        if self.marker.repeats {
            self.follows.take_if(|follows| follows.is_complete());
        }
        Ok(())
    }

    fn is_complete(&self) -> bool {
        self.follows.as_ref().is_some_and(|follows| follows.is_complete())
    }
}

fn ends(schema: &Value) -> Result<(), GrammarError> {
    if finite::has_end(schema) {
        return Ok(());
    }
    let reason = "whatever fits the schema holds another value of its own kind, without end";
    Err(GrammarError::Invalid { reason: reason.to_owned() })
}

/// The schema with exact formats and limits on white space, unless it sets some itself.
fn with_space(schema: &Value) -> Value {
    let mut schema = match schema {
        // `true` allows everything.
        Value::Bool(true) => json!({}),
        schema => schema.clone(),
    };
    formats::sharpen(&mut schema);
    if let Some(fields) = schema.as_object_mut() {
        fields.entry("x-guidance").or_insert_with(|| json!({"whitespace_pattern": JSON_SPACE}));
    }
    schema
}

/// The compiler's words without what it shows of the grammar: the first line, and of an expression's fault the last, which
/// names it. That nothing can follow, it says in a word of its own.
fn first_line(text: &str) -> String {
    if text.starts_with("NoExtensionBias") {
        return "its rules lead in circles, or nothing that this vocabulary can say fits them".to_owned();
    }
    let fault = text.lines().skip(1).filter_map(|line| line.trim().strip_prefix("error: ")).last();
    let first = text.lines().next().unwrap_or_default();
    fault.map_or_else(|| first.to_owned(), |fault| format!("{first} {fault}"))
}

struct Compiled {
    matcher: Mutex<Matcher>,
    ends: Arc<Ends>,
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Compiled grammar")
    }
}

impl Constraint for Compiled {
    fn start(&self) -> Box<dyn ConstraintState> {
        let matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner).deep_clone();
        Box::new(Following { matcher, ends: Arc::clone(&self.ends), ended: false })
    }
}

/// One answer's way through a grammar.
struct Following {
    matcher: Matcher,
    ends: Arc<Ends>,
    /// A stop token was taken.
    ended: bool,
}

impl fmt::Debug for Following {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Following").field("ended", &self.ended).finish_non_exhaustive()
    }
}

impl ConstraintState for Following {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = self.matcher.compute_mask_or_eos().map_err(|e| first_line(&e.to_string()))?;
        let may_end = mask.get(self.ends.id);
        let mut left = false;
        for (id, logit) in logits.iter_mut().enumerate() {
            let is_stop = u32::try_from(id).is_ok_and(|id| self.ends.stop_ids.contains(&id));
            let allowed = if is_stop { may_end } else { id < self.ends.id && mask.get(id) };
            if allowed {
                left = true;
            } else {
                *logit = f32::NEG_INFINITY;
            }
        }
        if left { Ok(()) } else { Err("the grammar allows no token of this vocabulary here".to_owned()) }
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        if self.ended || self.ends.stop_ids.contains(&id) {
            self.ended = true;
            return Ok(());
        }
        self.matcher.consume_token(id).map_err(|e| first_line(&e.to_string()))
    }

    fn is_complete(&self) -> bool {
        self.ended || self.matcher.is_stopped()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One token per byte, and id 256 to stop.
    fn bytes() -> Grammars {
        let mut vocabulary: Vec<VocabularyToken> = (0..=u8::MAX).map(|b| (vec![b], false)).collect();
        vocabulary.push((b"<end>".to_vec(), true));
        Grammars::new(vocabulary, vec![256]).unwrap()
    }

    /// Walks through the grammar choosing the allowed token that `pick` finds; ends with the stop token or completion.
    fn walk(grammar: &Arc<dyn Constraint>, mut pick: impl FnMut(&[u32]) -> u32) -> String {
        let mut state = grammar.start();
        let mut text = Vec::new();
        while !state.is_complete() && text.len() < 1000 {
            let mut logits = vec![0.0; 257];
            state.mask(&mut logits).unwrap();
            let allowed: Vec<u32> = (0..257u32).filter(|id| logits[*id as usize] == 0.0).collect();
            let id = pick(&allowed);
            state.accept(id).unwrap();
            text.extend(u8::try_from(id));
        }
        String::from_utf8(text).unwrap()
    }

    fn pseudo_random(seed: u64) -> impl FnMut(&[u32]) -> u32 {
        let mut state = seed;
        move |allowed| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            allowed[(state >> 33) as usize % allowed.len()]
        }
    }

    #[test]
    fn answers_follow_regexes_choices_and_grammars() {
        let grammars = bytes();
        for seed in 0..40 {
            let regex = grammars.compile(&GrammarSpec::Regex("[a-c]{2}-[0-9]{3}".into())).unwrap();
            let text = walk(&regex, pseudo_random(seed));
            assert_eq!((text.len(), &text[2..3]), (6, "-"), "{text}");
            let choice =
                grammars.compile(&GrammarSpec::Choice(vec!["yes\n".into(), "no \"x\"".into()])).unwrap();
            let text = walk(&choice, pseudo_random(seed));
            assert!(text == "yes\n" || text == "no \"x\"", "{text:?}");
            let lark = grammars.compile(&GrammarSpec::Grammar("start: \"(\" /[ab]/ \")\"".into())).unwrap();
            assert!(["(a)", "(b)"].contains(&walk(&lark, pseudo_random(seed)).as_str()));
        }
    }

    #[test]
    fn answers_follow_schemas_and_end() {
        let schema = json!({"type": "object", "additionalProperties": false, "required": ["n", "kind"],
            "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 12}, "kind": {"enum": ["a", "b"]}}});
        let grammar = bytes().compile(&GrammarSpec::JsonSchema(schema)).unwrap();
        for seed in 0..40 {
            let text = walk(&grammar, pseudo_random(seed));
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            assert!((3..=12).contains(&value["n"].as_i64().unwrap()), "{value}");
            assert!(value["kind"] == "a" || value["kind"] == "b");
        }
    }

    #[test]
    fn days_and_seconds_exist() {
        let grammars = bytes();
        let allows = |format: &str, text: &str| {
            let schema = json!({"type": ["string", "null"], "format": format});
            let mut state = grammars.compile(&GrammarSpec::JsonSchema(schema)).unwrap().start();
            let said = format!("\"{text}\"");
            said.bytes().all(|byte| {
                let mut logits = vec![0.0; 257];
                state.mask(&mut logits).unwrap();
                logits[usize::from(byte)] == 0.0 && state.accept(u32::from(byte)).is_ok()
            })
        };
        for (format, yes, no) in [
            ("date", ["2024-02-29", "2000-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-02-30"]),
            (
                "time",
                ["23:59:59Z", "00:00:00.5+01:00", "12:30:09-23:59"],
                ["23:59:60Z", "24:00:00Z", "1:00:00Z"],
            ),
            (
                "date-time",
                ["2024-02-29T00:00:00Z", "2023-02-28t23:59:59.25-01:00", "2023-11-30T12:00:00Z"],
                ["2023-02-29T00:00:00Z", "2024-06-30T23:59:60Z", "2023-11-31T12:00:00Z"],
            ),
        ] {
            assert!(yes.iter().all(|text| allows(format, text)), "{format}");
            assert!(!no.iter().any(|text| allows(format, text)), "{format}");
        }
    }

    #[test]
    fn what_cannot_be_followed_is_refused() {
        let grammars = bytes();
        for spec in [
            GrammarSpec::JsonSchema(json!({"type": "string", "minLength": 5, "maxLength": 2})),
            GrammarSpec::JsonSchema(json!({"type": "nonsense"})),
            GrammarSpec::JsonSchema(json!(false)),
            GrammarSpec::JsonSchema(json!({"$ref": "#"})),
            GrammarSpec::Regex("(".into()),
            GrammarSpec::Grammar("start: nothing".into()),
            GrammarSpec::Grammar(String::new()),
        ] {
            let error = grammars.compile(&spec).expect_err(&format!("{spec:?}"));
            assert!(matches!(error, GrammarError::Invalid { .. }), "{error}");
        }
        let endless = json!({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]});
        let tool = ToolSchema { name: "f".into(), arguments: endless };
        assert!(grammars.call(std::slice::from_ref(&tool)).is_err());
        assert!(grammars.calls(Dialect::Hermes, &[tool]).is_err());
        let unclosed = grammars.compile(&GrammarSpec::Regex("a(b".into())).expect_err("a( is open");
        assert!(unclosed.to_string().contains("unclosed group"), "the fault is named: {unclosed}");
        let long = GrammarSpec::Regex("a".repeat(MAX_GRAMMAR_BYTES));
        assert!(matches!(grammars.compile(&long), Err(GrammarError::TooLarge { .. })));
    }

    #[test]
    fn a_delayed_form_begins_behind_its_marker() {
        let grammars = bytes();
        let grammar = grammars.after(grammars.compile(&GrammarSpec::Regex("ab".into())).unwrap(), "</t>");
        let mut state = grammar.start();
        let mut logits = vec![0.0; 257];
        state.mask(&mut logits).unwrap();
        assert_eq!(logits.iter().filter(|l| **l == 0.0).count(), 256, "everything but the end");
        for byte in b"x</</t>" {
            state.accept(u32::from(*byte)).unwrap();
        }
        let mut logits = vec![0.0; 257];
        state.mask(&mut logits).unwrap();
        let allowed: Vec<usize> = (0..257).filter(|id| logits[*id] == 0.0).collect();
        assert_eq!(allowed, [usize::from(b'a')]);
        for byte in b"ab" {
            assert!(!state.is_complete());
            state.accept(u32::from(*byte)).unwrap();
        }
        assert!(state.is_complete());
    }

    #[test]
    fn calls_are_held_each_time_and_the_rest_is_free() {
        let grammars = bytes();
        let arguments = json!({"type": "object", "required": ["a"], "additionalProperties": false,
                               "properties": {"a": {"enum": [1]}}});
        let tool = ToolSchema { name: "f".into(), arguments };
        let mut state = grammars.calls(Dialect::Hermes, &[tool]).unwrap().start();
        let allowed = |state: &mut Box<dyn ConstraintState>| {
            let mut logits = vec![0.0; 257];
            state.mask(&mut logits).unwrap();
            assert_eq!(state.is_free(), logits.iter().all(|logit| *logit == 0.0));
            (0..257).filter(|id| logits[*id] == 0.0).collect::<Vec<_>>()
        };
        for _ in 0..2 {
            for byte in b"free <tool_call" {
                assert_eq!(allowed(&mut state).len(), 257, "anything, and the end too");
                state.accept(u32::from(*byte)).unwrap();
            }
            for byte in b">\n{\"name\": \"f\", \"arguments\": {\"a\":1}" {
                assert!(allowed(&mut state).contains(&usize::from(*byte)), "{}", char::from(*byte));
                state.accept(u32::from(*byte)).unwrap();
            }
            let ends = allowed(&mut state);
            assert!(
                ends.contains(&usize::from(b'}'))
                    && !ends.contains(&256)
                    && !ends.contains(&usize::from(b'2'))
            );
            state.accept(u32::from(b'}')).unwrap();
            assert!(!state.is_complete());
        }
        assert!(state.accept(u32::from(b'x')).is_ok());
    }

    #[test]
    fn what_a_token_says_behind_the_marker_counts() {
        let mut vocabulary: Vec<VocabularyToken> = (0..=u8::MAX).map(|b| (vec![b], false)).collect();
        vocabulary.extend([(b"c>\n a".to_vec(), false), (b"<end>".to_vec(), true)]);
        let grammars = Grammars::new(vocabulary, vec![257]).unwrap();
        let form = grammars.compile(&GrammarSpec::Regex("ab".into())).unwrap();
        let mut state = grammars.after(form, "<c>").start();
        state.accept(u32::from(b'<')).unwrap();
        state.accept(256).unwrap();
        state.accept(u32::from(b'b')).unwrap();
        assert!(state.is_complete());
    }

    #[test]
    fn several_answers_follow_one_grammar_apart() {
        let grammar = bytes().compile(&GrammarSpec::Regex("ab".into())).unwrap();
        let (mut first, mut second) = (grammar.start(), grammar.start());
        first.accept(u32::from(b'a')).unwrap();
        first.accept(u32::from(b'b')).unwrap();
        second.accept(u32::from(b'a')).unwrap();
        assert!(first.is_complete() && !second.is_complete());
    }
}
