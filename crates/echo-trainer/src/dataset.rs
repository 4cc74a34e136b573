//! Examples to fine-tune on, from JSON lines.
//!
//! A line for supervised learning is `{"prompt": P, "completion": A}` or `{"messages": [...]}` whose last message is the
//! assistant's; for preferences `{"prompt": P, "chosen": A, "rejected": A}`. P is a text (one user message) or a list of
//! `{"role", "content"}`; A is a text or a list of one assistant message. Other fields are ignored. A line that is no
//! such example is a [`BrokenLine`] with its number; what happens then is the caller's choice ([`BrokenLines`]).

pub use echo_rollout::environment::maths::{BrokenLine, BrokenLines};
use parallax_model::ChatMessage;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::data::ChatEncoder;
use crate::preference::Pair;
use crate::step::Labelled;

/// Why there is nothing to train on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// Broken lines, which are not to be skipped.
    #[error(
        "{count} of {lines} lines cannot be used, the first is line {}: {}; mend them, or set on_broken = \"skip\"",
        first.line, first.reason
    )]
    Broken {
        /// How many.
        count: usize,
        /// Of how many.
        lines: usize,
        /// The first of them.
        first: BrokenLine,
    },
    /// No line is left.
    #[error("no usable line among {lines}{}", first.as_ref().map(|f| format!(", the first is line {}: {}", f.line, f.reason)).unwrap_or_default())]
    Empty {
        /// How many lines there were.
        lines: usize,
        /// What is wrong with the first of them.
        first: Option<BrokenLine>,
    },
}

/// Examples, and the lines that are none.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset<T> {
    /// The examples, in the order of their lines.
    pub rows: Vec<T>,
    /// What is wrong with the others.
    pub broken: Vec<BrokenLine>,
}

/// How lines become tokens.
#[derive(Debug, Clone, Copy)]
pub struct Reading<'a> {
    /// Tokenizer and template.
    pub encoder: &'a ChatEncoder,
    /// Most tokens of one example; a longer one is broken.
    pub max_tokens: usize,
    /// Learn the prompt's tokens too.
    pub learn_prompt: bool,
    /// What to do about broken lines.
    pub on_broken: BrokenLines,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a text or a list of {role, content}")]
enum Said {
    Text(String),
    Chat(Vec<ChatMessage>),
}

#[derive(Deserialize)]
struct Line {
    prompt: Option<Said>,
    completion: Option<Said>,
    messages: Option<Vec<ChatMessage>>,
}

#[derive(Deserialize)]
struct PairLine {
    prompt: Said,
    chosen: Said,
    rejected: Said,
}

impl Said {
    fn prompt(self) -> Result<Vec<ChatMessage>, String> {
        match self {
            Self::Text(text) => Ok(vec![ChatMessage::new("user", text)]),
            Self::Chat(messages) if messages.is_empty() => Err("the prompt has no message".to_owned()),
            Self::Chat(messages) => Ok(messages),
        }
    }

    fn answer(self, name: &str) -> Result<String, String> {
        match self {
            Self::Text(text) => Ok(text),
            Self::Chat(mut messages) => match messages.pop() {
                Some(only) if messages.is_empty() && only.role == "assistant" => Ok(only.content),
                _ => Err(format!("{name} must be a text or one message of the assistant")),
            },
        }
    }
}

impl Line {
    fn parts(self) -> Result<(Vec<ChatMessage>, String), String> {
        match (self.prompt, self.completion, self.messages) {
            (Some(prompt), Some(completion), None) => {
                Ok((prompt.prompt()?, completion.answer("completion")?))
            }
            (None, None, Some(mut messages)) => match messages.pop() {
                Some(last) if last.role == "assistant" && !messages.is_empty() => {
                    Ok((messages, last.content))
                }
                _ => Err("messages must end with the assistant's answer to something".to_owned()),
            },
            _ => Err("neither prompt and completion nor messages".to_owned()),
        }
    }
}

impl Reading<'_> {
    /// Reads lines for supervised learning.
    ///
    /// # Errors
    /// Broken lines that are not to be skipped, or no usable line.
    pub fn labelled(&self, bytes: &[u8]) -> Result<Dataset<Labelled>, DatasetError> {
        self.read(bytes, |line: Line| {
            let (messages, answer) = line.parts()?;
            self.example(&messages, &answer, self.learn_prompt)
        })
    }

    /// Reads lines of preferences.
    ///
    /// # Errors
    /// As [`Reading::labelled`].
    pub fn pairs(&self, bytes: &[u8]) -> Result<Dataset<Pair>, DatasetError> {
        self.read(bytes, |line: PairLine| {
            let (chosen, rejected) = (line.chosen.answer("chosen")?, line.rejected.answer("rejected")?);
            if chosen == rejected {
                return Err("chosen and rejected are the same".to_owned());
            }
            let messages = line.prompt.prompt()?;
            Ok(Pair {
                chosen: self.example(&messages, &chosen, false)?,
                rejected: self.example(&messages, &rejected, false)?,
            })
        })
    }

    fn example(
        &self,
        messages: &[ChatMessage],
        answer: &str,
        learn_prompt: bool,
    ) -> Result<Labelled, String> {
        if answer.is_empty() {
            return Err("the answer is empty".to_owned());
        }
        let line = self.encoder.dialogue(messages, answer, learn_prompt).map_err(|e| e.to_string())?;
        let (tokens, most) = (line.tokens.len(), self.max_tokens);
        if tokens > most {
            return Err(format!("{tokens} tokens, and max_tokens is {most}"));
        }
        Ok(line)
    }

    fn read<L: DeserializeOwned, T>(
        &self,
        bytes: &[u8],
        make: impl Fn(L) -> Result<T, String>,
    ) -> Result<Dataset<T>, DatasetError> {
        let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
        let mut data = Dataset { rows: Vec::new(), broken: Vec::new() };
        for (index, line) in bytes.split(|b| *b == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let row = serde_json::from_slice(line).map_err(|e| e.to_string()).and_then(&make);
            match row {
                Ok(row) => data.rows.push(row),
                Err(reason) => data.broken.push(BrokenLine { line: index + 1, reason }),
            }
        }
        let lines = data.rows.len() + data.broken.len();
        let first = data.broken.first().cloned();
        match first {
            Some(first) if self.on_broken == BrokenLines::Refuse => {
                Err(DatasetError::Broken { count: data.broken.len(), lines, first })
            }
            first if data.rows.is_empty() => Err(DatasetError::Empty { lines, first }),
            _ => Ok(data),
        }
    }
}

#[cfg(test)]
mod tests {
    use parallax_model::ChatTemplate;
    use parallax_model::tokenizer::Tokenizer;

    use super::*;
    use crate::vocabulary;

    fn encoder() -> ChatEncoder {
        let tokenizer = Tokenizer::from_json(vocabulary::tokenizer_json().as_bytes()).unwrap();
        let template = ChatTemplate::new(vocabulary::CHAT_TEMPLATE, "<bos>", "<eos>").unwrap();
        ChatEncoder::new(tokenizer, Some(template), vocabulary::EOS)
    }

    fn reading(encoder: &ChatEncoder, on_broken: BrokenLines) -> Reading<'_> {
        Reading { encoder, max_tokens: 40, learn_prompt: false, on_broken }
    }

    const LINES: &str = r#"{"prompt": "1+1?", "completion": "2", "source": "ignored"}
{"prompt": [{"role": "user", "content": "1+1?"}], "completion": [{"role": "assistant", "content": "2"}]}
{"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}

{"prompt": "1+1?"
{"prompt": "1+1?"}
{"messages": [{"role": "user", "content": "1+1?"}]}
{"prompt": "1+1?", "completion": ""}
{"prompt": 7, "completion": "2"}
{"prompt": "1234567890123456789012345678901234567890", "completion": "2"}
"#;

    #[test]
    fn all_forms_of_a_line_are_the_same_example_and_broken_ones_are_named() {
        let encoder = encoder();
        let data = reading(&encoder, BrokenLines::Skip).labelled(LINES.as_bytes()).unwrap();
        assert_eq!(data.rows.len(), 3);
        assert!(data.rows.iter().all(|row| *row == encoder.line("1+1?", "2", false).unwrap()));
        assert_eq!(data.rows[0].learnt(), 2, "the answer and its end");
        let broken: Vec<usize> = data.broken.iter().map(|f| f.line).collect();
        assert_eq!(broken, [5, 6, 7, 8, 9, 10]);
        for (line, said) in
            data.broken.iter().zip(["EOF", "neither", "must end", "empty", "a text or", "tokens"])
        {
            assert!(line.reason.contains(said), "{line:?}");
        }
        let refused = reading(&encoder, BrokenLines::Refuse).labelled(LINES.as_bytes()).unwrap_err();
        assert!(
            refused.to_string().starts_with("6 of 9 lines cannot be used, the first is line 5"),
            "{refused}"
        );
        let not_utf8 = reading(&encoder, BrokenLines::Skip).labelled(b"\xff\n").unwrap_err();
        assert!(not_utf8.to_string().contains("line 1"), "{not_utf8}");
        assert!(reading(&encoder, BrokenLines::Skip).labelled(b"").is_err());
    }

    #[test]
    fn pairs_differ_in_the_answer_only() {
        let encoder = encoder();
        let lines = r#"{"prompt": "1+1?", "chosen": "2", "rejected": [{"role": "assistant", "content": "3"}]}
{"prompt": "1+1?", "chosen": "2", "rejected": "2"}
{"prompt": "1+1?", "chosen": "2"}"#;
        let data = reading(&encoder, BrokenLines::Skip).pairs(lines.as_bytes()).unwrap();
        let line = |answer| encoder.line("1+1?", answer, false).unwrap();
        assert_eq!(data.rows, [Pair { chosen: line("2"), rejected: line("3") }]);
        assert_eq!(data.broken.len(), 2);
        assert!(data.broken[1].reason.contains("rejected"), "{:?}", data.broken);
    }
}
