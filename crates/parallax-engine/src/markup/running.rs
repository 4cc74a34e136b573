//! Calls whose arguments are JSON, given out while the model writes them: the name as soon as arguments have begun behind it,
//! then their text as it comes.
//!
//! The least text that shows a name and the beginning of its arguments decides, so that it does not matter how a text is cut.
//! Arguments end where their brackets close. Whether they are JSON is not asked: what was given out cannot be taken back.

use std::collections::BTreeSet;

use serde_json::value::RawValue;

use super::calls::{self, ToolCall};
use super::dialect::{ASSISTANT, PYTHON_TAG, is_named_call};
use super::{Part, overlap};

/// Text in front of arguments; a call with more of it is given out whole.
const MAX_HEAD_BYTES: usize = 1024;
/// What JSON has between its elements.
const SPACE: [char; 4] = [' ', '\n', '\r', '\t'];

/// How a text of calls is laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Layout {
    /// An object with a name and, behind it, arguments.
    Object,
    /// Such objects one after the other, or lists of them.
    Objects,
    /// A list of objects, or names: the beginning tells.
    Mistral,
    /// Names, each with `[ARGS]` or nothing in front of its arguments.
    Named,
    DeepSeek,
    Kimi,
    /// Names on lines of their own.
    Line,
    /// The arguments of a call of this tool and nothing else.
    Body(String),
    /// Arguments are no JSON: calls are given out whole.
    Elements,
}

/// The calls in one text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Running {
    layout: Layout,
    stage: Stage,
    /// Bytes of the text that are given out or passed over.
    at: usize,
    /// Bytes of the text as it was when it was seen last.
    seen: usize,
    n_calls: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Stage {
    /// In front of arguments.
    Head,
    Arguments(Brackets),
    /// Nothing more is given out before the text has ended.
    Waiting,
}

impl Running {
    pub(super) fn new(layout: Layout) -> Self {
        Self { layout, stage: Stage::Head, at: 0, seen: 0, n_calls: 0 }
    }

    /// Bytes of the text as [`Running::advance`] saw it last. No marker that ends the text begins in them: who looks for one need
    /// not look there again.
    pub(super) fn seen(&self) -> usize {
        self.seen
    }

    /// Nothing was given out.
    pub(super) fn is_silent(&self) -> bool {
        self.n_calls == 0
    }

    /// Gives out what has become certain of calls of `offered` tools. `text` is all of it so far; `ended`: no more comes.
    pub(super) fn advance(
        &mut self,
        text: &str,
        ended: bool,
        offered: &BTreeSet<String>,
        parts: &mut Vec<Part>,
    ) {
        self.seen = text.len();
        loop {
            let rest = &text[self.at..];
            match &mut self.stage {
                Stage::Waiting => return,
                Stage::Head => match self.head(rest) {
                    Ok(head) if head.seen <= MAX_HEAD_BYTES && offered.contains(&head.name) => {
                        parts.push(Part::CallBegun(head.name));
                        self.at += head.arguments;
                        self.n_calls += 1;
                        self.stage = Stage::Arguments(Brackets::default());
                    }
                    Err(Stop::More) if rest.len() <= MAX_HEAD_BYTES => return,
                    _ => self.stage = Stage::Waiting,
                },
                Stage::Arguments(brackets) => {
                    let marker = self.layout.end_of_call();
                    let met = marker.and_then(|marker| rest.find(marker));
                    let certain = match (met, marker) {
                        (Some(at), _) => at,
                        (None, Some(marker)) if !ended => rest.len() - overlap(rest, marker),
                        (None, _) => rest.len(),
                    };
                    let closed = brackets.close(&rest[..certain]);
                    let taken = closed.unwrap_or(certain);
                    if taken > 0 {
                        parts.push(Part::Arguments(rest[..taken].to_owned()));
                    }
                    self.at += taken;
                    if closed.is_some() {
                        parts.push(Part::CallEnded);
                    } else if met.is_none() {
                        return;
                    }
                    self.stage = Stage::Head;
                }
            }
        }
    }

    /// Of a text that has ended: gives out the calls that were not yet, `read` being all that are in it if it can be read as
    /// calls; returns what of it is no call.
    pub(super) fn settle<'a>(
        &self,
        text: &'a str,
        read: Option<Vec<ToolCall>>,
        parts: &mut Vec<Part>,
    ) -> &'a str {
        match read {
            Some(calls) => {
                parts.extend(calls.into_iter().skip(self.n_calls).map(Part::Call));
                ""
            }
            None if self.is_silent() => text,
            None => behind_call(&text[self.at..]),
        }
    }

    fn head(&mut self, rest: &str) -> Result<Head, Stop> {
        if self.layout == Layout::Mistral {
            match rest.trim_start().chars().next() {
                None => return Err(Stop::More),
                Some('[' | '{') => self.layout = Layout::Objects,
                Some(_) => self.layout = Layout::Named,
            }
        }
        self.layout.head(rest, self.n_calls > 0)
    }
}

/// Without the punctuation between a call's arguments and what comes next.
fn behind_call(mut text: &str) -> &str {
    let ends = [calls::DEEPSEEK_CALL_END, calls::KIMI_CALL_END];
    loop {
        let rest = text.trim_start_matches(|c: char| c.is_whitespace() || "}],;`".contains(c));
        let rest = ends.iter().find_map(|end| rest.strip_prefix(end)).unwrap_or(rest);
        if rest.len() == text.len() {
            return rest;
        }
        text = rest;
    }
}

/// A name with arguments that begin behind it.
struct Head {
    name: String,
    /// Where the arguments begin.
    arguments: usize,
    /// Bytes without which this was not certain.
    seen: usize,
}

/// Why there is no head.
enum Stop {
    /// More text is needed.
    More,
    /// None begins like this.
    No,
}

impl Layout {
    /// What ends a call's arguments even if their brackets are open.
    fn end_of_call(&self) -> Option<&'static str> {
        match self {
            Self::DeepSeek => Some(calls::DEEPSEEK_CALL_END),
            Self::Kimi => Some(calls::KIMI_CALL_END),
            Self::Named => Some(calls::MISTRAL_CALL),
            _ => None,
        }
    }

    /// The head that a text begins with; `behind`: it begins behind the arguments of another call.
    fn head(&self, text: &str, behind: bool) -> Result<Head, Stop> {
        let mut cursor = Cursor { text, at: 0 };
        match self {
            Self::Object | Self::Body(_) if behind => Err(Stop::No),
            Self::Object => cursor.object(),
            Self::Objects => {
                if behind {
                    cursor.end_of_object()?;
                    while matches!(cursor.peek()?, b'[' | b']' | b',' | b';') {
                        cursor.at += 1;
                    }
                } else {
                    if cursor.peek()? == b'<' {
                        cursor.skip(PYTHON_TAG)?;
                    }
                    if cursor.peek()? == b'[' {
                        cursor.at += 1;
                    }
                }
                cursor.object()
            }
            Self::Named => {
                if behind {
                    cursor.peek()?;
                    cursor.skip(calls::MISTRAL_CALL)?;
                }
                let (name, arguments) = calls::mistral_parts(cursor.rest()).ok_or(Stop::More)?;
                cursor.at = text.len() - arguments.len();
                cursor.arguments(name)
            }
            Self::DeepSeek => {
                cursor.until(calls::DEEPSEEK_CALL)?;
                let before = cursor.until(calls::DEEPSEEK_SEPARATOR)?;
                let name = if cursor.peek()? == b'{' { before } else { cursor.until(calls::FENCE)? };
                cursor.arguments(name.trim())
            }
            Self::Kimi => {
                cursor.until(calls::KIMI_CALL)?;
                let id = cursor.until(calls::KIMI_ARGUMENTS)?;
                cursor.arguments(calls::kimi_name(id))
            }
            Self::Line => {
                if cursor.peek()? == b'<' && behind {
                    cursor.skip(ASSISTANT)?;
                    cursor.peek()?;
                }
                match is_named_call(cursor.rest()) {
                    None => return Err(Stop::More),
                    Some(false) => return Err(Stop::No),
                    Some(true) => {}
                }
                let name = cursor.until("\n")?;
                cursor.arguments(name.trim())
            }
            Self::Body(tool) => cursor.arguments(tool),
            Self::Mistral | Self::Elements => Err(Stop::No),
        }
    }
}

/// A place in a text that may not be complete yet.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// Moves to the next byte that is no white space.
    fn peek(&mut self) -> Result<u8, Stop> {
        self.at = self.text.len() - self.rest().trim_start_matches(SPACE).len();
        self.rest().bytes().next().ok_or(Stop::More)
    }

    /// Moves behind what must come next.
    fn skip(&mut self, marker: &str) -> Result<(), Stop> {
        let rest = self.rest();
        if rest.starts_with(marker) {
            self.at += marker.len();
            return Ok(());
        }
        Err(if marker.starts_with(rest) { Stop::More } else { Stop::No })
    }

    /// Moves behind the next `marker`; what stands in front of it.
    fn until(&mut self, marker: &str) -> Result<&'a str, Stop> {
        let rest = self.rest();
        let at = rest.find(marker).ok_or(Stop::More)?;
        self.at += at + marker.len();
        Ok(&rest[..at])
    }

    /// The head of an object that has a name in front of its arguments.
    fn object(&mut self) -> Result<Head, Stop> {
        if self.peek()? != b'{' {
            return Err(Stop::No);
        }
        self.at += 1;
        let mut name = None;
        loop {
            match self.key()?.as_str() {
                "name" => name = Some(self.string()?),
                "arguments" | "parameters" => return self.arguments(name.as_deref().ok_or(Stop::No)?),
                "function" => return Err(Stop::No),
                _ => self.value()?,
            }
            if self.peek()? != b',' {
                return Err(Stop::No);
            }
            self.at += 1;
        }
    }

    /// Arguments begin with a key, or have none: other text in brackets is not taken for them.
    fn arguments(&mut self, name: &str) -> Result<Head, Stop> {
        if self.peek()? != b'{' {
            return Err(Stop::No);
        }
        let arguments = self.at;
        self.at += 1;
        match self.peek()? {
            b'"' | b'}' => Ok(Head { name: name.to_owned(), arguments, seen: self.at + 1 }),
            _ => Err(Stop::No),
        }
    }

    /// Moves behind an object, from behind one of its values.
    fn end_of_object(&mut self) -> Result<(), Stop> {
        loop {
            let next = self.peek()?;
            self.at += 1;
            match next {
                b'}' => return Ok(()),
                b',' => {
                    self.key()?;
                    self.value()?;
                }
                _ => return Err(Stop::No),
            }
        }
    }

    /// A key; moves behind its colon.
    fn key(&mut self) -> Result<String, Stop> {
        let key = self.string()?;
        if self.peek()? != b':' {
            return Err(Stop::No);
        }
        self.at += 1;
        Ok(key)
    }

    fn string(&mut self) -> Result<String, Stop> {
        if self.peek()? != b'"' {
            return Err(Stop::No);
        }
        let (rest, mut escaped) = (self.rest(), false);
        for (i, byte) in rest.bytes().enumerate().skip(1) {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => {
                    self.at += i + 1;
                    return serde_json::from_str(&rest[..=i]).map_err(|_| Stop::No);
                }
                _ => {}
            }
        }
        Err(Stop::More)
    }

    fn value(&mut self) -> Result<(), Stop> {
        let length = match self.peek()? {
            b'"' => {
                self.string()?;
                return Ok(());
            }
            b'{' | b'[' => Brackets::default().close(self.rest()),
            _ => self.rest().find([',', '}', ']']),
        };
        let value = &self.rest()[..length.ok_or(Stop::More)?];
        self.at += value.len();
        if serde_json::from_str::<&RawValue>(value).is_ok() { Ok(()) } else { Err(Stop::No) }
    }
}

/// Brackets that are open in a JSON text that begins with one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Brackets {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Brackets {
    /// Goes on with a piece of the text: bytes up to behind the bracket that closes the first, if it is closed.
    fn close(&mut self, piece: &str) -> Option<usize> {
        for (i, byte) in piece.bytes().enumerate() {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_string => self.escaped = true,
                b'"' => self.in_string = !self.in_string,
                _ if self.in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(i + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }
}
