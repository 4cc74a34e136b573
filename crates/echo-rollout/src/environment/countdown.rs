//! Countdown: reach a number with given numbers, each used once, and `+ - * /`.
//!
//! Every task is solvable because its target is computed from the numbers. The verifier does not compare with that
//! solution: any expression that uses exactly the numbers and has exactly the value is right.

use super::draws::{Draws, draw_on_side};
use super::exact::{Fraction, evaluate};
use super::{Environment, Episode, MAX_CANDIDATES, Reward, RewardError, Task, no_task, one_turn};

const CONTEXT: &str = "echo-rollout countdown task v1";

/// "Make 24 from 4, 6, 8."
#[derive(Debug, Clone, PartialEq)]
pub struct Countdown {
    /// Fewest numbers. Default: 3.
    pub min_numbers: usize,
    /// Most numbers. Default: 4.
    pub max_numbers: usize,
    /// Largest given number; the smallest is 1. Default: 20.
    pub max_number: i64,
    /// Largest target; the smallest is 1. Default: 100.
    pub max_target: i64,
    /// Whether `*` and `/` occur in solutions. Default: true. They are always allowed in answers.
    pub products: bool,
    /// Reward of a well-formed expression of the right numbers with the wrong value. Default: 0.1.
    pub partial: f32,
}

impl Default for Countdown {
    fn default() -> Self {
        Self { min_numbers: 3, max_numbers: 4, max_number: 20, max_target: 100, products: true, partial: 0.1 }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Problem {
    numbers: Vec<i64>,
    target: i64,
    solution: String,
}

impl Countdown {
    /// Two or three numbers up to 9 and sums only: within reach of a model of a million parameters.
    pub fn tiny() -> Self {
        Self::sums(9)
    }

    /// Two or three numbers up to `max_number` and sums only. What one range holds out, a wider one does.
    pub fn sums(max_number: i64) -> Self {
        let max_target = max_number.saturating_mul(3);
        Self { min_numbers: 2, max_numbers: 3, max_number, max_target, products: false, partial: 0.1 }
    }

    fn problem(&self, seed: u64) -> Option<Problem> {
        let key = |p: &Problem| {
            let mut numbers = p.numbers.clone();
            numbers.sort_unstable();
            format!("{numbers:?} {}", p.target).into_bytes()
        };
        draw_on_side(CONTEXT, seed, 1000, |draws| self.draw(draws), key)
    }

    /// Combines the numbers until one is left, redrawing while that is no target.
    fn draw(&self, draws: &mut Draws) -> Option<Problem> {
        for _ in 0..MAX_CANDIDATES {
            let low = self.min_numbers.max(1);
            let n = low + draws.below(self.max_numbers.saturating_sub(low) + 1);
            let numbers: Vec<i64> = (0..n).map(|_| draws.between(1, self.max_number.max(1))).collect();
            let mut parts: Vec<Part> = numbers.iter().copied().map(Part::of).collect();
            while parts.len() > 1 {
                let a = parts.swap_remove(draws.below(parts.len()));
                let b = parts.swap_remove(draws.below(parts.len()));
                parts.push(combine(a, b, draws, self.products));
            }
            let Some(Part { value: target, text, signs }) = parts.pop() else { continue };
            if (1..=self.max_target.max(1)).contains(&target) {
                let solution = if self.products { text } else { by_size(signs) };
                return Some(Problem { numbers, target, solution });
            }
        }
        None
    }
}

/// Some of the numbers, combined.
struct Part {
    value: i64,
    text: String,
    /// Its numbers, and whether each is added in the end or taken off. Means something where there are only sums.
    signs: Vec<(i64, bool)>,
}

impl Part {
    fn of(number: i64) -> Self {
        Self { value: number, text: number.to_string(), signs: vec![(number, true)] }
    }
}

fn combine(a: Part, b: Part, draws: &mut Draws, products: bool) -> Part {
    let (more, less) = if a.value >= b.value { (a, b) } else { (b, a) };
    let joined = |value, sign| {
        let text = format!("({}{sign}{})", more.text, less.text);
        let others = less.signs.iter().map(|(number, added)| (*number, *added != (sign == '-')));
        Part { value, text, signs: more.signs.iter().copied().chain(others).collect() }
    };
    match draws.below(if products { 4 } else { 2 }) {
        1 if more.value > less.value => joined(more.value - less.value, '-'),
        2 => joined(more.value.saturating_mul(less.value), '*'),
        3 if less.value > 1 && more.value % less.value == 0 => joined(more.value / less.value, '/'),
        _ => joined(more.value.saturating_add(less.value), '+'),
    }
}

/// The numbers from the largest on, each with its sign: one way to write what could be written in many, so that whoever learns
/// from answers sees the same thing every time. In this order a sign mostly says whether the target is larger or smaller than
/// what stands so far, which is easier to learn than which sum it is exactly.
fn by_size(mut signs: Vec<(i64, bool)>) -> String {
    signs.sort_unstable_by(|a, b| b.cmp(a));
    let sign = |added, first| match (added, first) {
        (false, _) => "-",
        (true, true) => "",
        (true, false) => "+",
    };
    let written = signs.into_iter().enumerate();
    written.map(|(at, (number, added))| format!("{}{number}", sign(added, at == 0))).collect()
}

/// Target and numbers of a prompt, which spares the verifier the search for them.
fn asked(prompt: &str) -> Option<(i64, Vec<i64>)> {
    let (target, numbers) = prompt.strip_prefix("Make ")?.strip_suffix('.')?.split_once(" from ")?;
    let numbers: Result<Vec<i64>, _> = numbers.split(", ").map(str::parse).collect();
    Some((target.parse().ok()?, numbers.ok()?))
}

/// The expression in a completion: inside `<answer>` where that is used, else all of it, without what follows an `=`.
pub(super) fn answer_of(completion: &str) -> &str {
    let inner = match completion.rsplit_once("<answer>") {
        Some((_, rest)) => rest.split_once("</answer>").map_or(rest, |(inner, _)| inner),
        None => completion,
    };
    inner.split_once('=').map_or(inner, |(left, _)| left).trim()
}

impl Environment for Countdown {
    fn name(&self) -> &str {
        if self.products { "countdown" } else { "countdown-sums" }
    }

    /// The answers of sums were written in other ways before.
    fn version(&self) -> u32 {
        if self.products { 1 } else { 3 }
    }

    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let problem = self.problem(seed).ok_or_else(|| no_task(self.name()))?;
        let numbers: Vec<String> = problem.numbers.iter().map(ToString::to_string).collect();
        let solution = problem.solution.as_str();
        let answer = solution.strip_prefix('(').and_then(|s| s.strip_suffix(')')).unwrap_or(solution);
        let prompt = format!("Make {} from {}.", problem.target, numbers.join(", "));
        Ok(Task { seed, prompt, answer: answer.to_owned() })
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        one_turn(self, task)
    }

    /// 1 for the value with exactly the numbers, [`Countdown::partial`] for the numbers only, else 0.
    fn verify(&self, task: &Task, completion: &str) -> Result<Reward, RewardError> {
        let (target, numbers) = asked(&task.prompt)
            .ok_or_else(|| RewardError::OtherTask { environment: self.name().to_owned(), seed: task.seed })?;
        let evaluated = evaluate(answer_of(completion)).ok();
        let sorted = |mut numbers: Vec<Fraction>| {
            numbers.sort_unstable_by_key(|f| (f.numerator(), f.denominator()));
            numbers
        };
        let given = sorted(numbers.into_iter().map(Fraction::whole).collect());
        let (valid, correct) = match evaluated {
            Some(e) => {
                let valid = sorted(e.numbers) == given;
                (valid, valid && e.value == Fraction::whole(target))
            }
            None => (false, false),
        };
        let value = match (valid, correct) {
            (_, true) => 1.0,
            (true, false) => self.partial,
            (false, false) => 0.0,
        };
        let parts = vec![("correct".to_owned(), f32::from(correct)), ("valid".to_owned(), f32::from(valid))];
        Reward::new(value, parts, &self.reward_range())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::held_out_seed;
    use super::*;

    #[test]
    fn every_task_has_a_solution_and_only_its_numbers_count() {
        for env in [Countdown::default(), Countdown::tiny()] {
            for seed in 0..300 {
                let task = env.task(seed).unwrap();
                let reward = |text: &str| env.verify(&task, text).unwrap().value();
                assert_eq!(reward(&task.answer), 1.0, "{task:?}");
                assert_eq!(reward(&format!("I think <answer> {} = x </answer>", task.answer)), 1.0);
                assert_eq!(reward(&format!("{}+0", task.answer)), 0.0, "a number that was not given");
                assert_eq!(reward("hello"), 0.0);
                let problem = env.problem(seed).unwrap();
                assert_eq!(reward(&problem.target.to_string()), 0.0, "{task:?}");
            }
        }
    }

    #[test]
    fn answers_of_sums_take_the_largest_number_first() {
        for seed in 0..300 {
            let task = Countdown::tiny().task(seed).unwrap();
            let mut given = asked(&task.prompt).unwrap().1;
            given.sort_unstable_by(|a, b| b.cmp(a));
            let written = task.answer.split(['+', '-']).filter(|n| !n.is_empty());
            assert_eq!(written.map(|n| n.parse::<i64>().unwrap()).collect::<Vec<_>>(), given, "{task:?}");
        }
        assert_eq!(by_size(vec![(4, true), (2, false), (7, true)]), "7+4-2");
        assert_eq!(by_size(vec![(4, true), (3, true), (6, false)]), "-6+4+3");
        assert_eq!(by_size(vec![(5, false), (2, true), (5, true)]), "5-5+2");
    }

    #[test]
    fn the_numbers_with_a_wrong_value_earn_a_part() {
        let env = Countdown::default();
        let task = (0..).map(|seed| env.task(seed).unwrap()).find(|t| !t.answer.contains('+')).unwrap();
        let sums: Vec<String> =
            env.problem(task.seed).unwrap().numbers.iter().map(ToString::to_string).collect();
        assert_eq!(env.verify(&task, &sums.join("+")).unwrap().value(), 0.1);
    }

    #[test]
    fn a_task_of_another_environment_is_an_error_and_no_reward() {
        let other = Task { seed: 3, prompt: "What is 1+1?".to_owned(), answer: "2".to_owned() };
        let error = Countdown::default().verify(&other, "2").unwrap_err();
        assert!(matches!(error, RewardError::OtherTask { seed: 3, .. }), "{error}");
    }

    #[test]
    fn held_out_problems_are_never_trained_on() {
        let key = |env: &Countdown, seed| {
            let mut p = env.problem(seed).unwrap();
            p.numbers.sort_unstable();
            (p.numbers, p.target)
        };
        for (env, wider) in
            [(Countdown::default(), Countdown::default()), (Countdown::tiny(), Countdown::sums(12))]
        {
            let train: BTreeSet<_> = (0..3000).map(|seed| key(&wider, seed)).collect();
            assert!((0..100).all(|i| !train.contains(&key(&env, held_out_seed(i)))));
            assert!((0..100).any(|seed| train.contains(&key(&env, seed))), "they overlap otherwise");
            assert_eq!(env.task(5).unwrap(), env.task(5).unwrap());
        }
    }
}
