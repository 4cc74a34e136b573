//! A model's raw text taken apart: reasoning, content, tool calls, as each model family writes them.
//!
//! [`Markup`] is a state machine over text that arrives in pieces. However the text is cut, the parts are the same once
//! neighbours of one kind are joined: text that may be the beginning of a marker is held back until that is decided. Calls of
//! tools on offer are given out while they are written ([`Markup::offering`]), others whole. What looks like a call but cannot
//! be read is content, markers included: nothing that a model said is lost.

mod calls;
mod dialect;
mod harmony;
mod running;

use std::collections::BTreeSet;

use calls::CallSyntax;
pub use calls::ToolCall;
pub use dialect::Dialect;
#[cfg(feature = "http")]
pub(crate) use dialect::{MAX_NAME_BYTES, is_of_name};
use harmony::Harmony;
use running::{Layout, Running};

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Thoughts before the answer.
    Reasoning(String),
    /// The answer.
    Content(String),
    /// A call of a tool, whole.
    Call(ToolCall),
    /// A call of this tool begins: its arguments follow.
    CallBegun(String),
    /// More of the arguments of the call that began last, as the model writes them.
    Arguments(String),
    /// Those arguments are complete. Missing where the model broke off.
    CallEnded,
}

/// A tool as calls are held to it.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolSchema {
    /// Its name.
    pub name: String,
    /// JSON schema of its arguments.
    pub arguments: serde_json::Value,
}

/// What to look for in an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MarkupOptions {
    /// How the model writes calls and thoughts.
    pub dialect: Dialect,
    /// Calls are looked for; else their markers are content.
    pub tools: bool,
    /// Thoughts are looked for; else their markers are content.
    pub reasoning: bool,
    /// The prompt has opened the thoughts already.
    pub in_reasoning: bool,
    /// The whole answer is one JSON object `{"name", "arguments"}`: sampling was held to that.
    pub forced_call: bool,
}

/// The state machine.
#[derive(Debug, Clone)]
pub struct Markup {
    options: MarkupOptions,
    /// Tools on offer, whose calls are given out while they are written. Empty: unknown, all calls are given out whole.
    offered: BTreeSet<String>,
    state: State,
    /// Text that is not decided yet.
    held: String,
}

#[derive(Debug, Clone)]
enum State {
    /// Nothing but white space so far.
    Start,
    Reasoning,
    /// After the thoughts: white space is dropped until the answer begins.
    AfterReasoning,
    /// After a call: white space is dropped until the next call or content.
    AfterCall,
    Content,
    /// Inside a call's markers; the text since the opening marker, which it includes, is held.
    Call(CallSyntax, Running),
    /// The answer as a whole may be calls; all of it is held.
    WholeCall(Running),
    /// Its own machine: everything is markers there.
    Harmony(Harmony),
}

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";

impl Markup {
    /// A machine at the beginning of an answer. It does not know which tools are on offer: calls are given out whole, whatever
    /// they name, until [`Markup::offering`] tells it.
    pub fn new(options: MarkupOptions) -> Self {
        let state = match (options.forced_call, options.dialect, options.in_reasoning && options.reasoning) {
            (_, Dialect::Harmony, _) if !options.forced_call => State::Harmony(Harmony::new(options)),
            (_, _, true) => State::Reasoning,
            (true, _, false) => whole_call(options),
            _ => State::Start,
        };
        Self { options, offered: BTreeSet::new(), state, held: String::new() }
    }

    /// Calls of these tools are given out while the model writes them, where its family writes arguments as JSON: as
    /// [`Part::CallBegun`], [`Part::Arguments`].. and [`Part::CallEnded`]. An object that nothing marks as a call (Llama 3 writes
    /// them so) is one only if it names one of them and has arguments.
    #[must_use]
    pub fn offering(mut self, tools: impl IntoIterator<Item = String>) -> Self {
        self.offered.extend(tools);
        self
    }

    /// Takes a piece of text; returns the parts that it decides.
    pub fn push(&mut self, piece: &str) -> Vec<Part> {
        let mut parts = Vec::new();
        if let State::Harmony(machine) = &mut self.state {
            machine.push(piece, &self.offered, &mut parts);
        } else {
            self.held.push_str(piece);
            while self.advance(&mut parts) {}
        }
        parts
    }

    /// Whether what comes next is a thought, unless it ends them.
    pub fn is_reasoning(&self) -> bool {
        match &self.state {
            State::Reasoning => true,
            State::Harmony(machine) => machine.is_reasoning(),
            _ => false,
        }
    }

    /// The parts that were still undecided when the answer ended.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        self.call(true, &mut parts);
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Content) {
            State::Harmony(mut machine) => machine.finish(&self.offered, &mut parts),
            State::Reasoning => text(&mut parts, Part::Reasoning, held),
            State::WholeCall(mut running) => {
                running.advance(&held, true, &self.offered, &mut parts);
                let read = self.options.read_whole(&held, &self.offered);
                let rest = running.settle(&held, read, &mut parts).to_owned();
                text(&mut parts, Part::Content, rest);
            }
            State::AfterReasoning | State::AfterCall => {}
            State::Start | State::Content | State::Call(..) => text(&mut parts, Part::Content, held),
        }
        parts
    }

    /// One decision; false when more text is needed.
    fn advance(&mut self, parts: &mut Vec<Part>) -> bool {
        match &mut self.state {
            State::Start => self.start(),
            State::Reasoning => {
                let (shown, met) = cut(&mut self.held, &[THINK_END]);
                text(parts, Part::Reasoning, shown);
                if met.is_some() {
                    self.held.drain(..THINK_END.len());
                    self.state = State::AfterReasoning;
                }
                met.is_some()
            }
            State::AfterReasoning | State::AfterCall => {
                let blank = self.held.len() - self.held.trim_start().len();
                self.held.drain(..blank);
                if self.held.is_empty() {
                    return false;
                }
                self.state = match self.state {
                    State::AfterCall => State::Content,
                    _ if self.options.forced_call => whole_call(self.options),
                    _ => State::Start,
                };
                true
            }
            State::Content => self.content(parts),
            State::Call(..) => self.call(false, parts),
            State::WholeCall(running) => {
                running.advance(&self.held, false, &self.offered, parts);
                false
            }
            State::Harmony(_) => false,
        }
    }

    /// Thoughts and whole-answer calls can only begin where the answer begins.
    fn start(&mut self) -> bool {
        let begun = self.held.trim_start();
        if begun.is_empty() {
            return false;
        }
        if self.options.reasoning {
            if begun.starts_with(THINK) {
                let at = self.held.len() - begun.len() + THINK.len();
                self.held.drain(..at);
                self.state = State::Reasoning;
                // Thoughts begin only once.
                self.options.reasoning = false;
                return true;
            }
            if THINK.starts_with(begun) {
                return false;
            }
        }
        let whole = if self.options.tools { self.options.dialect.is_whole_call(begun) } else { Some(false) };
        let Some(whole) = whole else { return false };
        self.state = if whole { whole_call(self.options) } else { State::Content };
        true
    }

    fn content(&mut self, parts: &mut Vec<Part>) -> bool {
        let syntaxes = if self.options.tools { self.options.dialect.call_syntaxes() } else { &[] };
        let openings: Vec<&str> = syntaxes.iter().map(|s| s.opening()).collect();
        let (shown, met) = cut(&mut self.held, &openings);
        text(parts, Part::Content, shown);
        let Some(met) = met else { return false };
        self.state = State::Call(syntaxes[met], Running::new(syntaxes[met].layout()));
        true
    }

    /// Goes on with the call whose opening marker `held` begins with; false when more text is needed.
    fn call(&mut self, ended: bool, parts: &mut Vec<Part>) -> bool {
        let State::Call(syntax, running) = &mut self.state else { return false };
        let opening = syntax.opening().len();
        let inside = &self.held[opening..];
        let closing = syntax.closing_in(inside, running.seen());
        let ended = ended || closing.is_some();
        let shown = match &closing {
            Some(closing) => closing.start,
            None if ended => inside.len(),
            None => inside.len() - syntax.undecided(inside),
        };
        let body = &inside[..shown];
        running.advance(body, ended, &self.offered, parts);
        let decided = ended || (running.is_silent() && syntax.is_hopeless(inside));
        if !decided {
            return false;
        }
        let read = if ended { syntax.read(body) } else { None };
        if read.is_none() && running.is_silent() {
            // Not a call after all: its opening marker is content, what follows is looked at again.
            let rest = self.held.split_off(opening);
            text(parts, Part::Content, std::mem::replace(&mut self.held, rest));
            self.state = State::Content;
            return true;
        }
        let end = closing.map_or(shown, |closing| closing.end);
        let mut rest = running.settle(body, read, parts).to_owned();
        if !rest.is_empty() {
            rest.push_str(&inside[shown..end]);
        }
        self.held.drain(..opening + end);
        self.state = if rest.is_empty() { State::AfterCall } else { State::Content };
        text(parts, Part::Content, rest);
        true
    }
}

impl MarkupOptions {
    /// The calls of an answer that is nothing else: one that was forced is the same object in every dialect.
    fn read_whole(self, text: &str, offered: &BTreeSet<String>) -> Option<Vec<ToolCall>> {
        if self.forced_call { calls::whole(text) } else { self.dialect.whole_answer(text, offered) }
    }
}

fn whole_call(options: MarkupOptions) -> State {
    let is_line = options.dialect == Dialect::Glm4 && !options.forced_call;
    State::WholeCall(Running::new(if is_line { Layout::Line } else { Layout::Objects }))
}

/// Adds a text part unless it is empty.
fn text(parts: &mut Vec<Part>, kind: impl FnOnce(String) -> Part, text: String) {
    if !text.is_empty() {
        parts.push(kind(text));
    }
}

/// Takes from `held` the text before the first marker, or what cannot be the beginning of one; with the marker's index,
/// which `held` then begins with. Of markers at one place the longest counts.
pub(crate) fn cut(held: &mut String, markers: &[impl AsRef<str>]) -> (String, Option<usize>) {
    let texts = || markers.iter().map(AsRef::as_ref);
    let found = texts()
        .enumerate()
        .filter_map(|(i, marker): (usize, &str)| {
            held.find(marker).map(|at| (at, usize::MAX - marker.len(), i))
        })
        .min();
    // One that was found counts even if one that is still undecided began before it: waiting could hold text back for
    // nothing.
    if let Some((at, _, index)) = found {
        let rest = held.split_off(at);
        return (std::mem::replace(held, rest), Some(index));
    }
    let undecided = texts().map(|marker| overlap(held, marker)).max().unwrap_or(0);
    let rest = held.split_off(held.len() - undecided);
    (std::mem::replace(held, rest), None)
}

/// Bytes at the end of `text` that are a proper beginning of `marker`.
fn overlap(text: &str, marker: &str) -> usize {
    marker.char_indices().map(|(i, _)| i).rev().find(|&i| text.ends_with(&marker[..i])).unwrap_or(0)
}

#[cfg(test)]
mod tests;
