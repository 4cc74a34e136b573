//! A card game as an environment: the policy plays one seat, an opponent the other.

use std::collections::VecDeque;
use std::ops::RangeInclusive;

use super::super::draws::Draws;
use super::super::{Environment, Episode, Reward, RewardError, Task, Turn};
use super::game::{Game, Node};
use super::opponent::{Opponent, Said};

const CONTEXT: &str = "echo-rollout card table v2";
/// Most characters that are kept of what an opponent says.
const MOST_SAID: usize = 64;

/// A game at a table. The seed's lowest bit is the policy's seat, the rest of it the deal; rewards are what the policy wins,
/// in antes or big blinds.
#[derive(Debug, Clone)]
pub struct Table<G: Game> {
    name: String,
    start: G,
    opponent: Opponent<G>,
}

impl<G: Game> Table<G> {
    /// A table with this opponent and the usual stakes.
    pub fn new(opponent: Opponent<G>) -> Self {
        Self::named(G::NAME, G::start(), opponent)
    }

    /// A table called `name` on the wire, so that only workers with the same opponent take part.
    pub fn named(name: &str, start: G, opponent: Opponent<G>) -> Self {
        Self { name: name.to_owned(), start, opponent }
    }

    fn seat(seed: u64) -> usize {
        (seed & 1) as usize
    }

    /// Plays chance and the opponent until the policy acts or the game is over.
    fn advance(&self, mut game: G, seed: u64, talk: &mut Talk) -> Result<Stop<G>, RewardError> {
        let (seat, deal) = (Self::seat(seed), seed & !1);
        loop {
            match game.node() {
                Node::End(won) => return Ok(Stop::End(if seat == 0 { won } else { -won })),
                Node::Player(acting) if acting == seat => return Ok(Stop::Act(game)),
                Node::Player(acting) => {
                    let information = game.information(acting);
                    let mut draws = Draws::keyed(CONTEXT, deal, information.as_bytes());
                    let n = game.actions().len();
                    let weights = match &self.opponent {
                        Opponent::Uniform => vec![1.0 / n as f64; n],
                        Opponent::Always(index) => {
                            (0..n).map(|i| f64::from(u8::from(i == (*index).min(n - 1)))).collect()
                        }
                        Opponent::Strategy(strategy) => strategy.probabilities(&game, &information),
                        Opponent::Speaker(speaker) => {
                            let shown = game.describe(acting);
                            let said = match talk.known.pop_front() {
                                Some(said) => said,
                                None => speaker
                                    .say(&talk.turns, &shown, draws.next_u64())
                                    .map_err(|reason| self.failed(reason))?,
                            };
                            let said = one_line(&said);
                            game = game.hear(&said).unwrap_or_else(|| game.act(0));
                            talk.turns.push(Said { shown, said });
                            continue;
                        }
                    };
                    game = game.act(pick(&weights, draws.uniform()));
                }
                Node::Chance(mut outcomes) => {
                    // The deal depends on what was dealt before, not on what was done.
                    let known = [game.information(0), game.information(1)].map(|i| cards(&i));
                    let mut draws = Draws::keyed(CONTEXT, deal, known.concat().as_bytes());
                    if let Some(won) = game.all_in(&mut draws) {
                        return Ok(Stop::End(if seat == 0 { won } else { -won }));
                    }
                    let weights: Vec<f64> = outcomes.iter().map(|(p, _)| *p).collect();
                    game = outcomes.swap_remove(pick(&weights, draws.uniform())).1;
                }
            }
        }
    }

    fn failed(&self, reason: String) -> RewardError {
        RewardError::Verifier { environment: self.name.clone(), reason }
    }
}

/// What the opponent and the table said to each other.
#[derive(Debug, Default)]
struct Talk {
    turns: Vec<Said>,
    /// What the opponent said before the policy could act, from the task: it is not asked twice.
    known: VecDeque<String>,
}

fn cards(information: &str) -> String {
    information.split(':').next().unwrap_or_default().to_owned()
}

/// The beginning of `said` on one line that is not empty, so that a hand's opening can be written down.
fn one_line(said: &str) -> String {
    let words: Vec<&str> = said.split_whitespace().collect();
    let line: String = words.join(" ").chars().take(MOST_SAID).collect();
    if line.is_empty() { "-".to_owned() } else { line }
}

enum Stop<G> {
    Act(G),
    End(f64),
}

/// The index that `draw` in 0..1 falls on.
fn pick(weights: &[f64], mut draw: f64) -> usize {
    for (i, weight) in weights.iter().enumerate() {
        draw -= weight;
        if draw < 0.0 {
            return i;
        }
    }
    weights.iter().rposition(|w| *w > 0.0).unwrap_or(0)
}

struct Hand<'a, G: Game> {
    table: &'a Table<G>,
    seed: u64,
    position: Result<Stop<G>, RewardError>,
    talk: Talk,
    illegal: u32,
}

impl<G: Game> Hand<'_, G> {
    fn reward(&self, won: f64) -> Result<Reward, RewardError> {
        let parts = vec![("won".to_owned(), won as f32), ("illegal".to_owned(), self.illegal as f32)];
        Reward::new(won as f32, parts, &self.table.reward_range())
    }

    /// What was asked for, or the first action (pass, check, fold) when that was none. Says how it goes on.
    fn play(&mut self, said: Option<&str>) -> Result<Turn, RewardError> {
        if let Stop::Act(game) = self.position.as_ref().map_err(Clone::clone)? {
            let wanted = said.and_then(|said| game.hear(said));
            self.illegal += u32::from(wanted.is_none());
            let next = wanted.unwrap_or_else(|| game.act(0));
            self.position = self.table.advance(next, self.seed, &mut self.talk);
        }
        match self.position.as_ref().map_err(Clone::clone)? {
            Stop::End(won) => Ok(Turn::Done(self.reward(*won)?)),
            Stop::Act(game) => Ok(Turn::Continue { observation: game.describe(Table::<G>::seat(self.seed)) }),
        }
    }
}

impl<G: Game> Episode for Hand<'_, G> {
    fn step(&mut self, said: &str) -> Result<Turn, RewardError> {
        self.play(Some(said))
    }

    /// A player who runs out of words passes until the hand is over.
    fn cut(&mut self) -> Result<Reward, RewardError> {
        loop {
            if let Turn::Done(reward) = self.play(None)? {
                return Ok(reward);
            }
        }
    }

    fn options(&self) -> Vec<(&'static str, f64)> {
        match &self.position {
            Ok(Stop::Act(game)) => game.actions().into_iter().zip(game.habits()).collect(),
            _ => Vec::new(),
        }
    }
}

impl<G: Game> Environment for Table<G> {
    fn name(&self) -> &str {
        &self.name
    }

    fn version(&self) -> u32 {
        4
    }

    /// The answer is not part of a game; it is what an opponent who is asked has said before the policy acts.
    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let mut talk = Talk::default();
        let prompt = match self.advance(self.start.clone(), seed, &mut talk)? {
            Stop::Act(game) => game.describe(Self::seat(seed)),
            // The opponent may have folded before the policy could act; nothing is left to say.
            Stop::End(_) => "The hand is over.".to_owned(),
        };
        let said: Vec<String> = talk.turns.into_iter().map(|turn| turn.said).collect();
        Ok(Task { seed, prompt, answer: said.join("\n") })
    }

    fn reward_range(&self) -> RangeInclusive<f32> {
        let most = self.start.most() as f32;
        -most..=most
    }

    fn turns(&self) -> usize {
        self.start.turns()
    }

    fn is_repeatable(&self) -> bool {
        !matches!(self.opponent, Opponent::Speaker(_))
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        let known = task.answer.split('\n').filter(|said| !said.is_empty()).map(str::to_owned).collect();
        let mut talk = Talk { known, turns: Vec::new() };
        let position = self.advance(self.start.clone(), task.seed, &mut talk);
        Box::new(Hand { table: self, seed: task.seed, position, talk, illegal: 0 })
    }
}

#[cfg(test)]
mod tests;
