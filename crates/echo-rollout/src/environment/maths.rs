//! Maths questions from a file, judged by whether the answer is equal, not by whether it is spelt alike.
//!
//! The file is JSON lines with `question` and `answer`; an answer in GSM8K's style ends in `#### 42`, one in MATH's style
//! has a `\boxed{...}`. Broken lines are counted and named, then skipped or refused as the caller says. The version of a
//! set is taken from its content: a worker with another file is refused as one with another environment is.

mod equivalence;
mod value;

pub use equivalence::{equivalent, final_answer};

use serde::{Deserialize, Serialize};

use super::draws::held_out;
use super::{Environment, Episode, HELD_OUT_SEEDS, Reward, RewardError, Task, one_turn};

const CONTEXT: &str = "echo-rollout maths held out v1";
const VERSION: &str = "echo-rollout maths version v1";
/// Most bytes of one line.
pub const MAX_LINE: usize = 64 * 1024;
/// Most questions of one file.
pub const MAX_QUESTIONS: usize = 1_000_000;

/// What is done about lines that cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BrokenLines {
    /// The file is refused.
    #[default]
    Refuse,
    /// They are left out and reported.
    Skip,
}

/// A line that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BrokenLine {
    /// Counted from 1.
    pub line: usize,
    /// Why.
    pub reason: String,
}

/// Why a file is no question set.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MathsError {
    /// It has broken lines and they are not to be skipped.
    #[error(
        "{count} broken lines, the first is line {line}: {reason}; mend the file or have broken lines skipped"
    )]
    Broken {
        /// How many.
        count: usize,
        /// The first, counted from 1.
        line: usize,
        /// Why.
        reason: String,
    },
    /// Nothing is left.
    #[error("no usable question in {lines} lines")]
    Empty {
        /// Lines of the file.
        lines: usize,
    },
    /// More questions than are kept in memory.
    #[error("more than {limit} questions; split the file")]
    TooMany {
        /// The limit.
        limit: usize,
    },
}

#[derive(Debug, Deserialize)]
struct Line {
    #[serde(alias = "problem", alias = "prompt")]
    question: String,
    #[serde(alias = "solution", alias = "target")]
    answer: String,
}

/// A set of questions with final answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Maths {
    train: Vec<(String, String)>,
    held_out: Vec<(String, String)>,
    broken: Vec<BrokenLine>,
    instruction: String,
    version: u32,
}

impl Maths {
    /// Reads a file's text. One question in ten (by its content) is held out for evaluation.
    ///
    /// # Errors
    /// When nothing is usable, there is too much, or lines are broken and `broken_lines` says so.
    pub fn parse(text: &str, broken_lines: BrokenLines) -> Result<Self, MathsError> {
        let (mut train, mut apart, mut broken) = (Vec::new(), Vec::new(), Vec::new());
        let lines = text.lines().count();
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
            match question(line) {
                Ok(pair) if held_out(CONTEXT, pair.0.as_bytes()) => apart.push(pair),
                Ok(pair) => train.push(pair),
                Err(reason) => broken.push(BrokenLine { line: index + 1, reason }),
            }
            if train.len() + apart.len() > MAX_QUESTIONS {
                return Err(MathsError::TooMany { limit: MAX_QUESTIONS });
            }
        }
        if let (BrokenLines::Refuse, Some(first)) = (broken_lines, broken.first()) {
            let (line, reason) = (first.line, first.reason.clone());
            return Err(MathsError::Broken { count: broken.len(), line, reason });
        }
        if train.is_empty() && apart.is_empty() {
            return Err(MathsError::Empty { lines });
        }
        // A set so small that a side is empty serves both sides with all it has.
        if train.is_empty() {
            train.clone_from(&apart);
        } else if apart.is_empty() {
            apart.clone_from(&train);
        }
        let maths = Self { train, held_out: apart, broken, instruction: String::new(), version: 0 };
        Ok(maths.with_instruction("Put your final answer in \\boxed{}."))
    }

    /// Asks with other words for the final answer; empty for none.
    #[must_use]
    pub fn with_instruction(self, instruction: &str) -> Self {
        let mut maths = Self { instruction: instruction.to_owned(), ..self };
        maths.version = maths.content_version();
        maths
    }

    /// Differs between sets that differ in a question, an answer, their order or the instruction.
    fn content_version(&self) -> u32 {
        let mut hasher = blake3::Hasher::new_derive_key(VERSION);
        let mut add = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        add(&self.instruction);
        for side in [&self.train, &self.held_out] {
            add(&side.len().to_string());
            side.iter().for_each(|(question, answer)| [question, answer].into_iter().for_each(|t| add(t)));
        }
        u32::from_le_bytes(hasher.finalize().as_bytes()[..4].try_into().expect("four bytes"))
    }

    /// Lines that were left out.
    pub fn broken(&self) -> &[BrokenLine] {
        &self.broken
    }

    /// Questions to train on and held-out ones.
    pub fn sizes(&self) -> (usize, usize) {
        (self.train.len(), self.held_out.len())
    }
}

fn question(line: &str) -> Result<(String, String), String> {
    if line.len() > MAX_LINE {
        return Err(format!("{} bytes; at most {MAX_LINE} are read", line.len()));
    }
    let line: Line = serde_json::from_str(line).map_err(|e| e.to_string())?;
    if line.question.trim().is_empty() {
        return Err("the question is empty".to_owned());
    }
    // A solution names its final answer; a bare answer is its own.
    let answer = match final_answer(&line.answer) {
        Some(answer) if line.answer.contains("####") || line.answer.contains("\\boxed") => answer,
        _ => line.answer.trim().to_owned(),
    };
    if answer.is_empty() { Err("the answer is empty".to_owned()) } else { Ok((line.question, answer)) }
}

impl Environment for Maths {
    fn name(&self) -> &str {
        "maths"
    }

    fn version(&self) -> u32 {
        self.version
    }

    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let side = if seed >= HELD_OUT_SEEDS { &self.held_out } else { &self.train };
        let (question, answer) = &side[((seed & (HELD_OUT_SEEDS - 1)) % side.len() as u64) as usize];
        let space = if self.instruction.is_empty() { "" } else { "\n" };
        let prompt = format!("{question}{space}{}", self.instruction);
        Ok(Task { seed, prompt, answer: answer.clone() })
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        one_turn(self, task)
    }

    /// 1 when the completion's final answer is equal to the task's, else 0; `answered` says whether there was one.
    fn verify(&self, task: &Task, completion: &str) -> Result<Reward, RewardError> {
        let said = final_answer(completion);
        let correct = said.as_deref().is_some_and(|said| equivalent(said, &task.answer));
        let parts = vec![
            ("correct".to_owned(), f32::from(correct)),
            ("answered".to_owned(), f32::from(said.is_some())),
        ];
        Reward::new(f32::from(correct), parts, &self.reward_range())
    }
}

#[cfg(test)]
mod tests {
    use super::super::held_out_seed;
    use super::*;

    const FILE: &str = concat!(
        "{\"question\": \"Natalia sold 48 and 24 clips. How many?\", \"answer\": \"48+24 = <<48+24=72>>72\\n#### 72\"}\n",
        "not json\n",
        "\n",
        "{\"problem\": \"Half of a half?\", \"solution\": \"It is $\\\\boxed{\\\\frac{1}{4}}$.\"}\n",
        "{\"question\": \" \", \"answer\": \"1\"}\n",
        "{\"question\": \"One?\", \"answer\": \"1,000\"}\n",
    );

    #[test]
    fn broken_lines_are_named_and_skipped_or_refused_as_asked() {
        let error = Maths::parse(FILE, BrokenLines::Refuse).unwrap_err();
        assert!(matches!(error, MathsError::Broken { count: 2, line: 2, .. }), "{error}");
        let maths = Maths::parse(FILE, BrokenLines::Skip).unwrap();
        assert_eq!(maths.broken().iter().map(|b| b.line).collect::<Vec<_>>(), [2, 5]);
        assert!(maths.broken()[1].reason.contains("empty"));
        assert!(matches!(Maths::parse("\n\n", BrokenLines::Skip), Err(MathsError::Empty { lines: 2 })));
    }

    #[test]
    fn another_file_is_another_version() {
        let parse = |text: &str| Maths::parse(text, BrokenLines::Skip).unwrap();
        let version = |text: &str| parse(text).version();
        assert_eq!(version(FILE), version(&format!("\n{FILE}")), "the same questions");
        let swapped: String = FILE.lines().rev().map(|line| format!("{line}\n")).collect();
        for other in [FILE.replace("24", "25"), FILE.replace("#### 72", "#### 73"), swapped] {
            assert_ne!(version(FILE), version(&other));
        }
        assert_ne!(version(FILE), parse(FILE).with_instruction("").version());
    }

    #[test]
    fn answers_are_judged_by_value() {
        let maths = Maths::parse(FILE, BrokenLines::Skip).unwrap();
        let all = (0..8)
            .map(|seed| maths.task(seed).unwrap())
            .chain((0..8).map(|i| maths.task(held_out_seed(i)).unwrap()));
        let mut seen = std::collections::BTreeSet::new();
        for task in all {
            seen.insert(task.answer.clone());
            let said = match task.answer.as_str() {
                "72" => "so the answer is 72 clips.",
                "1,000" => "\\boxed{1000}",
                _ => "It is \\boxed{0.25}",
            };
            assert_eq!(maths.verify(&task, said).unwrap().value(), 1.0, "{task:?}");
            assert_eq!(maths.verify(&task, "\\boxed{3}").unwrap().value(), 0.0);
            assert_eq!(maths.verify(&task, "no idea").unwrap().components()[1].1, 0.0);
        }
        assert_eq!(seen.len(), 3);
    }
}
