//! Knights and knaves: who always tells the truth and who always lies, from what they say about each other.
//!
//! A puzzle is drawn until exactly one of all assignments fits, which is checked by trying every one.

use super::draws::{Draws, draw_on_side};
use super::{Environment, Episode, MAX_CANDIDATES, Reward, RewardError, Task, no_task, one_turn};

const CONTEXT: &str = "echo-rollout knights task v1";
const NAMES: [&str; 6] = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn"];

/// Puzzles with a unique solution.
#[derive(Debug, Clone, PartialEq)]
pub struct Knights {
    /// Fewest people. Default: 2.
    pub min_people: usize,
    /// Most people, at most 6. Default: 4.
    pub max_people: usize,
    /// Reward for each share of right names when not all are right. Default: 0.
    pub partial: f32,
}

impl Default for Knights {
    fn default() -> Self {
        Self { min_people: 2, max_people: 4, partial: 0.0 }
    }
}

/// What somebody says; numbers are people.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Claim {
    Is(usize, bool),
    Same(usize, usize),
    And(Box<Claim>, Box<Claim>),
    Or(Box<Claim>, Box<Claim>),
    If(Box<Claim>, Box<Claim>),
}

impl Claim {
    /// Whether it is true when bit `i` of `world` says that person `i` is a knight.
    fn holds(&self, world: u32) -> bool {
        let knight = |i: usize| world >> i & 1 == 1;
        match self {
            Self::Is(who, what) => knight(*who) == *what,
            Self::Same(a, b) => knight(*a) == knight(*b),
            Self::And(a, b) => a.holds(world) && b.holds(world),
            Self::Or(a, b) => a.holds(world) || b.holds(world),
            Self::If(a, b) => !a.holds(world) || b.holds(world),
        }
    }

    fn draw(draws: &mut Draws, people: usize, depth: usize) -> Self {
        let person = |draws: &mut Draws| draws.below(people);
        match draws.below(if depth == 0 { 3 } else { 6 }) {
            0 | 1 => Self::Is(person(draws), draws.below(2) == 1),
            2 => {
                let a = person(draws);
                Self::Same(a, (a + 1 + draws.below(people - 1)) % people)
            }
            kind => {
                let a = Box::new(Self::draw(draws, people, depth - 1));
                let b = Box::new(Self::draw(draws, people, depth - 1));
                match kind {
                    3 => Self::And(a, b),
                    4 => Self::Or(a, b),
                    _ => Self::If(a, b),
                }
            }
        }
    }

    fn words(&self) -> String {
        match self {
            Self::Is(who, true) => format!("{} is a knight", NAMES[*who]),
            Self::Is(who, false) => format!("{} is a knave", NAMES[*who]),
            Self::Same(a, b) => format!("{} and {} are of the same kind", NAMES[*a], NAMES[*b]),
            Self::And(a, b) => format!("{} and {}", a.words(), b.words()),
            Self::Or(a, b) => format!("{} or {}", a.words(), b.words()),
            Self::If(a, b) => format!("if {} then {}", a.words(), b.words()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Puzzle {
    claims: Vec<Claim>,
    /// Bit `i`: person `i` is a knight.
    solution: u32,
}

/// Every world in which knights' claims are true and knaves' false.
fn worlds(claims: &[Claim]) -> Vec<u32> {
    let fits = |world: &u32| (0..claims.len()).all(|i| claims[i].holds(*world) == (world >> i & 1 == 1));
    (0..1_u32 << claims.len()).filter(fits).collect()
}

impl Knights {
    fn people(&self) -> std::ops::RangeInclusive<usize> {
        let low = self.min_people.clamp(2, NAMES.len());
        low..=self.max_people.clamp(low, NAMES.len())
    }

    fn draw(&self, draws: &mut Draws) -> Option<Puzzle> {
        let range = self.people();
        for _ in 0..MAX_CANDIDATES {
            let n = range.start() + draws.below(range.end() - range.start() + 1);
            let claims: Vec<Claim> = (0..n).map(|_| Claim::draw(draws, n, 1)).collect();
            if let [solution] = worlds(&claims)[..] {
                return Some(Puzzle { claims, solution });
            }
        }
        None
    }

    fn puzzle(&self, seed: u64) -> Option<Puzzle> {
        draw_on_side(CONTEXT, seed, 1000, |d| self.draw(d), |p| format!("{:?}", p.claims).into_bytes())
    }
}

/// What a text says about `name`: the last "NAME: knight" or "NAME is a knave" in it.
fn said_of(text: &str, name: &str) -> Option<bool> {
    let lower = text.to_lowercase();
    let name = name.to_lowercase();
    let mut said = None;
    for (at, _) in lower.match_indices(&name) {
        let before = lower[..at].chars().next_back();
        let rest = lower[at + name.len()..].trim_start_matches([' ', ':', '=', '-', '*']);
        let rest = rest.strip_prefix("is ").unwrap_or(rest);
        let rest = rest.strip_prefix("a ").unwrap_or(rest);
        if before.is_some_and(char::is_alphanumeric) {
            continue;
        }
        if rest.starts_with("knight") {
            said = Some(true);
        } else if rest.starts_with("knave") {
            said = Some(false);
        }
    }
    said
}

impl Environment for Knights {
    fn name(&self) -> &str {
        "knights"
    }

    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let puzzle = self.puzzle(seed).ok_or_else(|| no_task(self.name()))?;
        let n = puzzle.claims.len();
        let lines: Vec<String> = puzzle
            .claims
            .iter()
            .enumerate()
            .map(|(i, c)| format!("{} says: {}.", NAMES[i], c.words()))
            .collect();
        let kind = |i: usize| if puzzle.solution >> i & 1 == 1 { "knight" } else { "knave" };
        let answer: Vec<String> = (0..n).map(|i| format!("{}: {}", NAMES[i], kind(i))).collect();
        Ok(Task {
            seed,
            prompt: format!(
                "Knights always tell the truth, knaves always lie. {} Who is what? Answer as {}: knight or knave for each.",
                lines.join(" "),
                NAMES[0]
            ),
            answer: answer.join(", "),
        })
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        one_turn(self, task)
    }

    /// 1 when everybody's kind is right, else [`Knights::partial`] times the share that is.
    fn verify(&self, task: &Task, completion: &str) -> Result<Reward, RewardError> {
        let kinds: Vec<&str> = task.answer.split(", ").collect();
        let n = kinds.len();
        let right = kinds.iter().zip(NAMES).filter(|(kind, name)| {
            let said = said_of(completion, name);
            said.is_some() && said == said_of(kind, name)
        });
        let right = right.count();
        let share = right as f32 / n as f32;
        let value = if right == n { 1.0 } else { self.partial * share };
        let parts = vec![("correct".to_owned(), f32::from(right == n)), ("share".to_owned(), share)];
        Reward::new(value, parts, &self.reward_range())
    }
}

#[cfg(test)]
mod tests {
    use super::super::held_out_seed;
    use super::*;

    #[test]
    fn the_solution_is_unique_and_is_what_is_accepted() {
        let env = Knights { max_people: 6, ..Knights::default() };
        for seed in (0..200).chain((0..50).map(held_out_seed)) {
            let (task, puzzle) = (env.task(seed).unwrap(), env.puzzle(seed).unwrap());
            // Again by brute force, written another way: a speaker's claim is as true as the speaker.
            let n = puzzle.claims.len();
            let mut fitting = Vec::new();
            'worlds: for world in 0..1_u32 << n {
                for (i, claim) in puzzle.claims.iter().enumerate() {
                    if (world >> i & 1 == 1) ^ claim.holds(world) {
                        continue 'worlds;
                    }
                }
                fitting.push(world);
            }
            assert_eq!(fitting, [puzzle.solution]);
            assert_eq!(env.verify(&task, &task.answer).unwrap().value(), 1.0);
            let wrong = task.answer.replacen("knight", "knave", 1);
            let wrong = if wrong == task.answer { task.answer.replacen("knave", "knight", 1) } else { wrong };
            assert_eq!(env.verify(&task, &wrong).unwrap().value(), 0.0);
            assert_eq!(env.verify(&task, "").unwrap().value(), 0.0);
        }
    }

    #[test]
    fn the_last_word_about_a_person_counts() {
        assert_eq!(said_of("Ada is a knight. No: Ada is a knave", "Ada"), Some(false));
        assert_eq!(said_of("**Ada**: Knight", "Ada"), Some(true));
        assert_eq!(said_of("Canada: knight", "Ada"), None);
    }
}
