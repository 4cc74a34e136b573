//! Additions and subtractions with an exact answer: the smallest task on which a policy can visibly improve.
//!
//! A problem is held out by its content, not only by its seed: one problem in ten (by hash) is drawn by held-out seeds
//! only, so that the evaluation never shows a sum that was trained on.

use super::draws::held_out;
use super::{Environment, Episode, HELD_OUT_SEEDS, Reward, RewardError, Task, one_turn};

/// "What is A+B?" and "What is A-B?", answered by exactly one non-negative integer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arithmetic {
    /// Largest operand; both lie in `0..=max_operand`. Default: 49, so that answers have at most two digits.
    pub max_operand: u32,
    /// Whether differences are asked as well. Default: true. The larger operand comes first.
    pub subtraction: bool,
}

impl Default for Arithmetic {
    fn default() -> Self {
        Self { max_operand: 49, subtraction: true }
    }
}

/// The larger operand comes first in a difference, so that every answer is a non-negative integer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Problem {
    a: u32,
    b: u32,
    plus: bool,
}

impl Arithmetic {
    /// Problems with operands up to `max_operand`.
    pub fn new(max_operand: u32, subtraction: bool) -> Self {
        Self { max_operand, subtraction }
    }

    /// Draws until the problem belongs to the seed's side. One draw in ten is held out, so the bound is never met in
    /// practice; with operands so small that a side is empty, the last draw stands.
    fn problem(&self, seed: u64) -> Problem {
        let mut draws = blake3::Hasher::new_derive_key("echo-rollout arithmetic task v1")
            .update(&seed.to_le_bytes())
            .finalize_xof();
        let mut problem = Problem { a: 0, b: 0, plus: true };
        for _ in 0..1000 {
            let mut bytes = [0; 16];
            draws.fill(&mut bytes);
            let word = |i: usize| u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().expect("four bytes"));
            let operand = |i: usize| (u64::from(word(i)) % (u64::from(self.max_operand) + 1)) as u32;
            let (a, b, plus) = (operand(0), operand(1), !self.subtraction || word(2) & 1 == 0);
            let (a, b) = if plus { (a, b) } else { (a.max(b), a.min(b)) };
            problem = Problem { a, b, plus };
            if problem.held_out() == (seed >= HELD_OUT_SEEDS) {
                break;
            }
        }
        problem
    }
}

impl Problem {
    fn held_out(self) -> bool {
        let content = [&self.a.to_le_bytes()[..], &self.b.to_le_bytes(), &[u8::from(self.plus)]].concat();
        held_out("echo-rollout arithmetic held out v1", &content)
    }

    fn answer(self) -> u64 {
        let (a, b) = (u64::from(self.a), u64::from(self.b));
        if self.plus { a + b } else { a - b }
    }
}

impl Environment for Arithmetic {
    fn name(&self) -> &str {
        "arithmetic"
    }

    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let problem = self.problem(seed);
        let sign = if problem.plus { '+' } else { '-' };
        let prompt = format!("What is {}{sign}{}?", problem.a, problem.b);
        Ok(Task { seed, prompt, answer: problem.answer().to_string() })
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        one_turn(self, task)
    }

    /// 1 when the completion, without surrounding white space, is exactly the integer; else 0. The part `integer` says
    /// whether it was an integer at all.
    fn verify(&self, task: &Task, completion: &str) -> Result<Reward, RewardError> {
        let said = completion.trim();
        let integer = !said.is_empty() && said.len() <= 20 && said.bytes().all(|b| b.is_ascii_digit());
        let correct = said == task.answer;
        let parts =
            vec![("correct".to_owned(), f32::from(correct)), ("integer".to_owned(), f32::from(integer))];
        Reward::new(f32::from(correct), parts, &self.reward_range())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::held_out_seed;
    use super::*;

    #[test]
    fn the_answer_is_right_and_exactly_the_integer_is_asked_for() {
        let env = Arithmetic::default();
        for seed in 0..500 {
            let task = env.task(seed).unwrap();
            let body = task.prompt.strip_prefix("What is ").unwrap().strip_suffix('?').unwrap();
            let (a, b, plus) = match body.split_once('+') {
                Some((a, b)) => (a, b, true),
                None => body.split_once('-').map(|(a, b)| (a, b, false)).unwrap(),
            };
            let (a, b): (i64, i64) = (a.parse().unwrap(), b.parse().unwrap());
            let expected = if plus { a + b } else { a - b };
            assert!(expected >= 0 && a <= 49 && b <= 49);
            let reward = |text: &str| env.verify(&task, text).unwrap().value();
            assert_eq!(reward(&format!(" {expected}\n")), 1.0);
            assert_eq!(reward(&format!("{}", expected + 1)), 0.0);
            assert_eq!(reward(&format!("{expected}.")), 0.0);
            assert_eq!(reward(&format!("+{expected}")), 0.0);
            assert_eq!(reward(""), 0.0);
        }
    }

    #[test]
    fn held_out_problems_are_never_trained_on() {
        let env = Arithmetic::new(20, true);
        let held_out: BTreeSet<String> =
            (0..400).map(|i| env.task(held_out_seed(i)).unwrap().prompt).collect();
        let trained: BTreeSet<String> = (0..4000).map(|seed| env.task(seed).unwrap().prompt).collect();
        assert!(held_out.len() > 20 && trained.len() > 200, "{} {}", held_out.len(), trained.len());
        assert_eq!(held_out.intersection(&trained).count(), 0);
    }

    #[test]
    fn a_seed_names_one_task_for_ever() {
        let env = Arithmetic::default();
        assert_eq!(env.task(7).unwrap(), env.task(7).unwrap());
        let pinned: Vec<String> = (0..4).map(|seed| env.task(seed).unwrap().prompt).collect();
        assert_eq!(pinned, ["What is 42+8?", "What is 49-2?", "What is 19-7?", "What is 12+9?"]);
    }

    #[test]
    fn without_subtraction_only_sums_are_asked() {
        let env = Arithmetic::new(9, false);
        assert!((0..200).all(|seed| env.task(seed).unwrap().prompt.contains('+')));
    }
}
