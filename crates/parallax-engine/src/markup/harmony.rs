//! GPT-OSS's answers: messages on channels, each `<|channel|>NAME [to=functions.TOOL]<|message|>TEXT<|end|>`.
//!
//! The channel `analysis` is reasoning, `final` is content, `commentary` is content unless it is addressed to a tool: then
//! it is a call. The prompt ends with `<|start|>assistant`, so that an answer begins with a channel.

use super::calls::named;
use super::{MarkupOptions, Part, cut, text};

const MESSAGE: &str = "<|message|>";
const STARTS: [&str; 2] = ["<|channel|>", "<|start|>"];
const ENDS: [&str; 5] = ["<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>"];

#[derive(Debug, Clone)]
pub(super) struct Harmony {
    options: MarkupOptions,
    state: State,
    held: String,
}

#[derive(Debug, Clone, PartialEq)]
enum State {
    /// Between messages: text here belongs to no message and counts as content.
    Outside,
    /// After a `<|channel|>` or `<|start|>`: who speaks to whom, up to `<|message|>`.
    Header,
    Reasoning,
    Content,
    /// A call of this tool: its text is held.
    Call(String),
}

impl Harmony {
    pub(super) fn new(options: MarkupOptions) -> Self {
        let state = if options.in_reasoning { State::Reasoning } else { State::Outside };
        Self { options, state, held: String::new() }
    }

    pub(super) fn is_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    pub(super) fn push(&mut self, piece: &str, parts: &mut Vec<Part>) {
        self.held.push_str(piece);
        while self.advance(parts) {}
    }

    fn advance(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.state.clone() {
            State::Outside => {
                let markers: Vec<&str> = STARTS.iter().chain(&ENDS[..3]).copied().collect();
                let (shown, met) = cut(&mut self.held, &markers);
                text(parts, Part::Content, shown);
                let Some(met) = met else { return false };
                self.held.drain(..markers[met].len());
                if met < STARTS.len() {
                    self.state = State::Header;
                }
                true
            }
            State::Header => {
                let Some(at) = self.held.find(MESSAGE) else { return false };
                let header: String = self.held.drain(..at + MESSAGE.len()).collect();
                self.state = self.channel(&header);
                true
            }
            State::Reasoning => self.message(parts, Part::Reasoning),
            State::Content => self.message(parts, Part::Content),
            State::Call(tool) => {
                let end = ENDS.iter().filter_map(|end| self.held.find(end).map(|at| (at, *end))).min();
                let Some((at, end)) = end else { return false };
                let arguments: String = self.held.drain(..at).collect();
                self.leave(end);
                call(parts, &tool, arguments);
                true
            }
        }
    }

    fn message(&mut self, parts: &mut Vec<Part>, kind: fn(String) -> Part) -> bool {
        let (shown, met) = cut(&mut self.held, &ENDS);
        text(parts, kind, shown);
        if let Some(met) = met {
            self.leave(ENDS[met]);
        }
        met.is_some()
    }

    /// Behind an ending marker, which `held` begins with.
    fn leave(&mut self, end: &str) {
        self.held.drain(..end.len());
        self.state = if STARTS.contains(&end) { State::Header } else { State::Outside };
    }

    fn channel(&self, header: &str) -> State {
        let tool = header.split_once("to=").map(|(_, to)| {
            let to = to.split([' ', '<']).next().unwrap_or_default();
            to.strip_prefix("functions.").unwrap_or(to).to_owned()
        });
        match tool {
            Some(tool) if self.options.tools && !tool.is_empty() => State::Call(tool),
            _ if header.contains("analysis") && self.options.reasoning => State::Reasoning,
            _ => State::Content,
        }
    }

    pub(super) fn finish(&mut self, parts: &mut Vec<Part>) {
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Outside) {
            State::Outside | State::Content => text(parts, Part::Content, held),
            State::Reasoning => text(parts, Part::Reasoning, held),
            // A header that never became a message says nothing.
            State::Header => {}
            State::Call(tool) => call(parts, &tool, held),
        }
    }
}

fn call(parts: &mut Vec<Part>, tool: &str, arguments: String) {
    match named(tool, &arguments) {
        Some(call) => parts.push(Part::Call(call)),
        None => text(parts, Part::Content, arguments),
    }
}
