//! GPT-OSS's answers: messages on channels, each `<|channel|>NAME [to=functions.TOOL]<|message|>TEXT<|end|>`.
//!
//! The channel `analysis` is reasoning, `final` is content, `commentary` is content unless it is addressed to a tool: then
//! it is a call. The prompt ends with `<|start|>assistant`, so that an answer begins with a channel.

use std::collections::BTreeSet;

use super::calls::named;
use super::running::{Layout, Running};
use super::{MarkupOptions, Part, cut, overlap, text};

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
    Call(String, Running),
}

impl Harmony {
    pub(super) fn new(options: MarkupOptions) -> Self {
        let state = if options.in_reasoning { State::Reasoning } else { State::Outside };
        Self { options, state, held: String::new() }
    }

    pub(super) fn is_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    pub(super) fn push(&mut self, piece: &str, offered: &BTreeSet<String>, parts: &mut Vec<Part>) {
        self.held.push_str(piece);
        while self.advance(offered, parts) {}
    }

    fn advance(&mut self, offered: &BTreeSet<String>, parts: &mut Vec<Part>) -> bool {
        match &self.state {
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
            State::Call(..) => self.call(false, offered, parts),
        }
    }

    /// Goes on with a call; false when more text is needed.
    fn call(&mut self, ended: bool, offered: &BTreeSet<String>, parts: &mut Vec<Part>) -> bool {
        let State::Call(tool, running) = &mut self.state else { return false };
        let from = running.seen();
        let unread = &self.held[from..];
        let end = ENDS.iter().filter_map(|end| unread.find(end).map(|at| (from + at, *end))).min();
        let ended = ended || end.is_some();
        let shown = match end {
            Some((at, _)) => at,
            None if ended => self.held.len(),
            None => self.held.len() - ENDS.iter().map(|end| overlap(unread, end)).max().unwrap_or(0),
        };
        let body = &self.held[..shown];
        running.advance(body, ended, offered, parts);
        if !ended {
            return false;
        }
        let read = named(tool, body).map(|call| vec![call]);
        let rest = running.settle(body, read, parts).to_owned();
        text(parts, Part::Content, rest);
        self.held.drain(..shown);
        match end {
            Some((_, end)) => self.leave(end),
            None => self.state = State::Outside,
        }
        true
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
            Some(tool) if self.options.tools && !tool.is_empty() => {
                let running = Running::new(Layout::Body(tool.clone()));
                State::Call(tool, running)
            }
            _ if header.contains("analysis") && self.options.reasoning => State::Reasoning,
            _ => State::Content,
        }
    }

    pub(super) fn finish(&mut self, offered: &BTreeSet<String>, parts: &mut Vec<Part>) {
        self.call(true, offered, parts);
        let held = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Outside) {
            State::Outside | State::Content | State::Call(..) => text(parts, Part::Content, held),
            State::Reasoning => text(parts, Part::Reasoning, held),
            // A header that never became a message says nothing.
            State::Header => {}
        }
    }
}
