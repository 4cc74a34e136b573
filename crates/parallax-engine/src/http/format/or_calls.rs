//! An answer that is calls of tools or has a form, as its beginning shows.
//!
//! Both are followed side by side as long as both allow what was said: Llama's calls, for instance, begin as other objects
//! do. What no longer fits one of them is the other's.

use std::fmt;
use std::sync::Arc;

use parallax_model::TokenBytes;

use crate::constraint::{Constraint, ConstraintState};
use crate::markup::{Dialect, ToolSchema};

/// White space that may stand in front of a call.
const MAX_SPACE_BYTES: usize = 16;

/// Calls, or a form.
#[derive(Debug)]
pub(in crate::http) struct CallsOrForm {
    calls: Arc<dyn Constraint>,
    form: Arc<dyn Constraint>,
    beginning: Arc<Beginning>,
}

/// How calls begin.
struct Beginning {
    openings: Vec<String>,
    /// The constraint on calls knows them from their first character on; else from behind the opening on.
    is_known: bool,
    /// Bytes of every token.
    vocabulary: Arc<[TokenBytes]>,
}

impl fmt::Debug for Beginning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Beginning").field("openings", &self.openings).finish_non_exhaustive()
    }
}

impl CallsOrForm {
    /// `calls` holds what a dialect's answers call of these tools and leaves the rest free; `form` rules answers without.
    pub(in crate::http) fn new(
        dialect: Dialect,
        tools: &[ToolSchema],
        calls: Arc<dyn Constraint>,
        form: Arc<dyn Constraint>,
        vocabulary: Arc<[TokenBytes]>,
    ) -> Self {
        let is_known = matches!(dialect, Dialect::Llama3 | Dialect::Glm4);
        let beginning = Beginning { openings: openings(dialect, tools), is_known, vocabulary };
        Self { calls, form, beginning: Arc::new(beginning) }
    }
}

/// What an answer that is calls begins with.
fn openings(dialect: Dialect, tools: &[ToolSchema]) -> Vec<String> {
    let fixed: &[&str] = match dialect {
        Dialect::Hermes | Dialect::Glm | Dialect::QwenXml => &["<tool_call>"],
        Dialect::MiniMax => &["<minimax:tool_call>"],
        Dialect::Mistral => &["[TOOL_CALLS]"],
        Dialect::Phi4 => &["<|tool_call|>"],
        Dialect::DeepSeek => &["<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"],
        Dialect::Kimi => &["<|tool_calls_section_begin|><|tool_call_begin|>"],
        Dialect::Harmony => &["<|channel|>commentary to=functions."],
        Dialect::Llama3 => &["<|python_tag|>", "{"],
        Dialect::Glm4 => return tools.iter().map(|tool| format!("{}\n", tool.name)).collect(),
    };
    fixed.iter().map(|text| (*text).to_owned()).collect()
}

impl Beginning {
    /// Whether calls begin like this. `None`: more must be seen.
    fn opens(&self, said: &[u8]) -> Option<bool> {
        // Llama's calls are told from free text by their first character.
        let begun = if self.is_known { said } else { said.trim_ascii_start() };
        if said.len() - begun.len() > MAX_SPACE_BYTES {
            return Some(false);
        }
        match self.openings.iter().find_map(|opening| begun.strip_prefix(opening.as_bytes())) {
            // Of a token that goes on behind the opening, nobody has looked at the rest.
            Some(rest) => Some(self.is_known || rest.trim_ascii_start().is_empty()),
            None if self.openings.iter().any(|opening| opening.as_bytes().starts_with(begun)) => None,
            None => Some(false),
        }
    }

    fn bytes(&self, id: usize) -> &[u8] {
        self.vocabulary.get(id).map_or(&[], |token| token.bytes.as_slice())
    }

    /// Leaves the tokens that open calls, or go on opening them, behind what was said.
    fn mask(&self, said: &[u8], logits: &mut [f32]) {
        let mut text = said.to_vec();
        for (id, logit) in logits.iter_mut().enumerate() {
            text.truncate(said.len());
            text.extend_from_slice(self.bytes(id));
            if text.len() == said.len() || self.opens(&text) == Some(false) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

impl Constraint for CallsOrForm {
    fn start(&self) -> Box<dyn ConstraintState> {
        Box::new(Both {
            calls: Some(self.calls.start()),
            form: Some(self.form.start()),
            said: Some(Vec::new()),
            beginning: Arc::clone(&self.beginning),
        })
    }
}

/// One answer.
#[derive(Debug)]
struct Both {
    /// `None`: they do not fit any more.
    calls: Option<Box<dyn ConstraintState>>,
    form: Option<Box<dyn ConstraintState>>,
    /// What was said, until calls have begun.
    said: Option<Vec<u8>>,
    beginning: Arc<Beginning>,
}

impl ConstraintState for Both {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let Some(calls) = &mut self.calls else {
            return self.form.as_mut().map_or(Ok(()), |form| form.mask(logits));
        };
        let formed = self.form.as_mut().map(|form| {
            let mut logits = logits.to_vec();
            form.mask(&mut logits).map(|()| logits)
        });
        let called = calls.mask(logits);
        if let Some(said) = &self.said {
            self.beginning.mask(said, logits);
        }
        match (formed, called) {
            (None, called) => called,
            (Some(Ok(formed)), Ok(())) => {
                logits.iter_mut().zip(formed).for_each(|(logit, formed)| *logit = (*logit).max(formed));
                Ok(())
            }
            (Some(Ok(formed)), Err(_)) => {
                logits.copy_from_slice(&formed);
                Ok(())
            }
            (Some(Err(_)), called) => called,
        }
    }

    fn is_free(&self) -> bool {
        self.said.is_none() && self.form.is_none() && self.calls.as_ref().is_some_and(|calls| calls.is_free())
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        if let Some(said) = &mut self.said {
            said.extend_from_slice(self.beginning.bytes(id as usize));
            match self.beginning.opens(said) {
                None => {}
                Some(true) => self.said = None,
                Some(false) => (self.said, self.calls) = (None, None),
            }
        }
        let mut fault = "neither calls nor the form go on like this".to_owned();
        for way in [&mut self.calls, &mut self.form] {
            if let Some(Err(why)) = way.as_mut().map(|state| state.accept(id)) {
                (*way, fault) = (None, why);
            }
        }
        if self.calls.is_none() && self.form.is_none() { Err(fault) } else { Ok(()) }
    }

    fn is_complete(&self) -> bool {
        [&self.calls, &self.form].into_iter().flatten().all(|state| state.is_complete())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::structured::{GrammarSpec, Grammars, VocabularyToken};

    /// Behind one token for each byte.
    const MORE: [(&str, bool); 4] =
        [("<end>", true), ("<tool_call>", true), ("{\"", false), ("<tool_call>x", false)];
    const END: u32 = 256;

    fn either(dialect: Dialect) -> CallsOrForm {
        let bytes = (0..=u8::MAX).map(|byte| (vec![byte], false));
        let more = MORE.into_iter().map(|(text, special)| (text.as_bytes().to_vec(), special));
        let tokens: Vec<VocabularyToken> = bytes.chain(more).collect();
        let vocabulary =
            tokens.iter().map(|(bytes, special)| TokenBytes { bytes: bytes.clone(), special: *special });
        let vocabulary = vocabulary.collect();
        let grammars = Grammars::new(tokens, vec![END]).unwrap();
        let one = |name: &str| json!({"type": "object", "required": [name], "additionalProperties": false, "properties": {name: {"const": 1}}});
        let tools = [ToolSchema { name: "f".into(), arguments: one("a") }];
        let form = grammars.compile(&GrammarSpec::JsonSchema(one("x"))).unwrap();
        let calls = grammars.calls(dialect, &tools).unwrap();
        CallsOrForm::new(dialect, &tools, calls, form, vocabulary)
    }

    /// How much of a text may be said, and whether the answer may end behind it.
    fn said(either: &CallsOrForm, text: &str) -> (usize, bool) {
        let mut state = either.start();
        let allows = |state: &mut Box<dyn ConstraintState>, id: u32| {
            let mut logits = vec![0.5; 256 + MORE.len()];
            state.mask(&mut logits).unwrap();
            assert!(!state.is_free() || logits.iter().all(|logit| *logit == 0.5));
            logits[id as usize] == 0.5
        };
        let mut at = 0;
        while at < text.len() {
            let longer =
                MORE.iter().position(|(token, _)| text.as_bytes()[at..].starts_with(token.as_bytes()));
            let (id, length) = match longer {
                Some(more) => (END + u32::try_from(more).unwrap(), MORE[more].0.len()),
                None => (u32::from(text.as_bytes()[at]), 1),
            };
            if state.is_complete() || !allows(&mut state, id) {
                return (at, false);
            }
            state.accept(id).unwrap();
            at += length;
        }
        (at, state.is_complete() || allows(&mut state, END))
    }

    #[test]
    fn an_answer_is_calls_or_has_the_form_and_nothing_else() {
        for (dialect, call) in [
            (Dialect::Hermes, "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": DAYS}}\n</tool_call>"),
            (Dialect::Hermes, "\n\n<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":DAYS}}</tool_call>"),
            (
                Dialect::QwenXml,
                "<tool_call>\n<function=f>\n<parameter=a>\nDAYS\n</parameter>\n</function>\n</tool_call>",
            ),
            (Dialect::Glm, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>DAYS</arg_value>\n</tool_call>"),
            (
                Dialect::MiniMax,
                "<minimax:tool_call>\n<invoke name=\"f\">\n<parameter name=\"a\">DAYS</parameter>\n</invoke>\n</minimax:tool_call>",
            ),
            (Dialect::Mistral, "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": DAYS}}]"),
            (Dialect::Phi4, "<|tool_call|>[{\"name\": \"f\", \"arguments\": {\"a\": DAYS}}]<|/tool_call|>"),
            (
                Dialect::DeepSeek,
                "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{\"a\": DAYS}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            ),
            (
                Dialect::Kimi,
                "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"a\": DAYS}<|tool_call_end|><|tool_calls_section_end|>",
            ),
            (Dialect::Llama3, "{\"name\": \"f\", \"parameters\": {\"a\": DAYS}}"),
            (Dialect::Glm4, "f\n{\"a\": DAYS}"),
            (
                Dialect::Harmony,
                "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": DAYS}",
            ),
        ] {
            let either = either(dialect);
            let good = call.replace("DAYS", "1");
            assert_eq!(said(&either, &good), (good.len(), true), "{dialect:?}: {good}");
            let bad = call.replace("DAYS", "2");
            let at = call.find("DAYS").unwrap();
            assert_eq!(said(&either, &bad), (at, false), "{dialect:?}: {bad}");
            for form in ["{\"x\": 1}", "{ \"x\":1\n}"] {
                assert_eq!(said(&either, form), (form.len(), true), "{dialect:?}: {form}");
            }
            for neither in ["so: {\"x\": 1}", "Let me see. <tool_call>", "g\n{}", "", "[1]"] {
                let (taken, may_end) = said(&either, neither);
                assert!(!may_end && taken <= 1, "{dialect:?}: {neither}");
            }
            let (taken, _) = said(&either, "{\"y\": 1}");
            assert!(taken < 4, "{dialect:?}");
        }
    }

    #[test]
    fn white_space_in_front_of_calls_is_bounded_and_openings_end_with_a_token() {
        let either = either(Dialect::Hermes);
        let spaces = " ".repeat(MAX_SPACE_BYTES + 1);
        assert_eq!(said(&either, &spaces), (MAX_SPACE_BYTES, false));
        let mut state = either.start();
        let mut logits = vec![0.5; 256 + MORE.len()];
        state.mask(&mut logits).unwrap();
        let left: Vec<usize> = (0..logits.len()).filter(|id| logits[*id].is_finite()).collect();
        let open = |id: usize| {
            either.beginning.bytes(id).first().is_some_and(|first| b"\t\n\x0c\r <{".contains(first))
        };
        assert!(left.contains(&257) && !left.contains(&259), "{left:?}");
        assert!(left.iter().all(|id| open(*id)), "{left:?}");
    }
}
