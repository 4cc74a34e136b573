//! A small card game as an environment: the policy plays one seat, an opponent the other.

use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::sync::Arc;

use super::super::draws::Draws;
use super::super::{Environment, Episode, Reward, RewardError, Task, Turn};
use super::game::{Game, Node, Profile, Strategy};

const CONTEXT: &str = "echo-rollout card table v1";

/// Who plays the other seat. A past self or a remote model is a [`Strategy`] of the caller's own.
#[derive(Clone)]
pub enum Opponent<G: Game> {
    /// Every legal action alike.
    Uniform,
    /// The action of this number where there is one, else the last; 0 passes, checks or folds.
    Always(usize),
    /// A table.
    Profile(Arc<Profile>),
    /// Anything else.
    Strategy(Arc<dyn Strategy<G> + Send + Sync>),
}

impl<G: Game> std::fmt::Debug for Opponent<G> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Uniform => "Uniform",
            Self::Always(_) => "Always",
            Self::Profile(_) => "Profile",
            Self::Strategy(_) => "Strategy",
        })
    }
}

impl<G: Game> Opponent<G> {
    fn probabilities(&self, game: &G, information: &str) -> Vec<f64> {
        let n = game.actions().len();
        match self {
            Self::Uniform => vec![1.0 / n as f64; n],
            Self::Always(index) => (0..n).map(|i| f64::from(u8::from(i == (*index).min(n - 1)))).collect(),
            Self::Profile(profile) => profile.probabilities(game, information),
            Self::Strategy(strategy) => strategy.probabilities(game, information),
        }
    }
}

/// A game at a table. The seed's lowest bit is the policy's seat; rewards are what it wins, in antes.
#[derive(Debug, Clone)]
pub struct Table<G: Game> {
    /// The other seat.
    pub opponent: Opponent<G>,
    game: PhantomData<fn() -> G>,
}

impl<G: Game> Table<G> {
    /// A table with this opponent.
    pub fn new(opponent: Opponent<G>) -> Self {
        Self { opponent, game: PhantomData }
    }

    fn seat(seed: u64) -> usize {
        (seed & 1) as usize
    }

    /// Plays chance and the opponent until the policy acts or the game is over.
    fn advance(&self, mut game: G, seed: u64) -> Stop<G> {
        let seat = Self::seat(seed);
        loop {
            match game.node() {
                Node::End(won) => return Stop::End(if seat == 0 { won } else { -won }),
                Node::Player(acting) if acting == seat => return Stop::Act(game),
                Node::Player(acting) => {
                    let information = game.information(acting);
                    let weights = self.opponent.probabilities(&game, &information);
                    let mut draws = Draws::keyed(CONTEXT, seed, information.as_bytes());
                    game = game.act(pick(&weights, draws.uniform()));
                }
                Node::Chance(mut outcomes) => {
                    // The deal depends on what was dealt before, not on what was done.
                    let known = [game.information(0), game.information(1)].map(|i| cards(&i));
                    let mut draws = Draws::keyed(CONTEXT, seed, known.concat().as_bytes());
                    let weights: Vec<f64> = outcomes.iter().map(|(p, _)| *p).collect();
                    game = outcomes.swap_remove(pick(&weights, draws.uniform())).1;
                }
            }
        }
    }
}

fn cards(information: &str) -> String {
    information.split(':').next().unwrap_or_default().to_owned()
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

/// The legal action that a text names last.
pub(super) fn named(text: &str, actions: &[&str]) -> Option<usize> {
    let lower = text.to_lowercase();
    let last = |word: &str| lower.rfind(word);
    let found = (0..actions.len()).filter_map(|i| last(actions[i]).map(|at| (at, i)));
    found.max().map(|(_, i)| i)
}

fn describe<G: Game>(game: &G, seat: usize) -> String {
    let information = game.information(seat);
    let (cards, history) = information.split_once(':').unwrap_or((&information, ""));
    let history = if history.is_empty() { "-" } else { history };
    format!("Cards {cards}. So far {history}. {}?", game.actions().join(" or "))
}

struct Hand<'a, G: Game> {
    table: &'a Table<G>,
    seed: u64,
    position: Stop<G>,
    illegal: u32,
}

impl<G: Game> Hand<'_, G> {
    fn reward(&self, won: f64) -> Result<Reward, RewardError> {
        let parts = vec![("won".to_owned(), won as f32), ("illegal".to_owned(), self.illegal as f32)];
        Reward::new(won as f32, parts, &self.table.reward_range())
    }

    /// What was asked for, or the first action (pass, check, fold) when that was none.
    fn play(&mut self, wanted: Option<usize>) {
        let Stop::Act(game) = &self.position else { return };
        self.illegal += u32::from(wanted.is_none());
        self.position = self.table.advance(game.act(wanted.unwrap_or(0)), self.seed);
    }
}

impl<G: Game> Episode for Hand<'_, G> {
    fn step(&mut self, said: &str) -> Result<Turn, RewardError> {
        let wanted = match &self.position {
            Stop::Act(game) => named(said, &game.actions()),
            Stop::End(_) => None,
        };
        self.play(wanted);
        match &self.position {
            Stop::End(won) => Ok(Turn::Done(self.reward(*won)?)),
            Stop::Act(game) => {
                Ok(Turn::Continue { observation: describe(game, Table::<G>::seat(self.seed)) })
            }
        }
    }

    /// A player who runs out of words passes until the hand is over.
    fn cut(&mut self) -> Result<Reward, RewardError> {
        loop {
            match self.position {
                Stop::End(won) => return self.reward(won),
                Stop::Act(_) => self.play(None),
            }
        }
    }
}

impl<G: Game> Environment for Table<G> {
    fn name(&self) -> &str {
        G::NAME
    }

    /// The answer is not part of a game: it is empty.
    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let prompt = match self.advance(G::start(), seed) {
            Stop::Act(game) => describe(&game, Self::seat(seed)),
            // The opponent may have folded before the policy could act; nothing is left to say.
            Stop::End(_) => "The hand is over.".to_owned(),
        };
        Ok(Task { seed, prompt, answer: String::new() })
    }

    fn reward_range(&self) -> RangeInclusive<f32> {
        -(G::MOST as f32)..=G::MOST as f32
    }

    fn turns(&self) -> usize {
        8
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        let position = self.advance(G::start(), task.seed);
        Box::new(Hand { table: self, seed: task.seed, position, illegal: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::super::game::value;
    use super::super::{Kuhn, Leduc};
    use super::*;

    /// The mean reward of a fixed strategy over many seeds.
    fn played<G: Game>(table: &Table<G>, me: &Profile, hands: u64) -> f64 {
        let mut total = 0.0;
        for seed in 0..hands {
            let task = table.task(seed).unwrap();
            let mut position = table.advance(G::start(), seed);
            let mut hand = table.episode(&task);
            let mut draws = Draws::new("test", seed);
            total += loop {
                let Stop::Act(game) = &position else { break f64::from(hand.cut().unwrap().value()) };
                let weights = me.probabilities(game, &game.information((seed & 1) as usize));
                let action = pick(&weights, draws.uniform());
                let turn = hand.step(game.actions()[action]).unwrap();
                position = table.advance(game.act(action), seed);
                if let Turn::Done(reward) = turn {
                    break f64::from(reward.value());
                }
            };
        }
        total / hands as f64
    }

    #[test]
    fn hands_win_what_the_exact_values_say() {
        let uniform = Profile::default();
        let me = Kuhn::equilibrium(0.2);
        let table = Table::new(Opponent::<Kuhn>::Uniform);
        let exact = (value(&Kuhn::start(), [&me, &uniform]) - value(&Kuhn::start(), [&uniform, &me])) / 2.0;
        let mean = played(&table, &me, 20_000);
        // A hand's standard deviation is below 1.6, so 0.05 is more than four standard errors.
        assert!((mean - exact).abs() < 0.05, "{mean} {exact}");
        let leduc = Table::new(Opponent::<Leduc>::Profile(Arc::new(uniform.clone())));
        let mean = played(&leduc, &uniform, 4000);
        assert!(mean.abs() < 0.4, "uniform against uniform over both seats is even: {mean}");
    }

    #[test]
    fn words_that_are_no_action_pass_and_are_counted() {
        let table = Table::new(Opponent::<Kuhn>::Always(1));
        let task = table.task(0).unwrap();
        assert!(task.prompt.starts_with("Cards "), "{}", task.prompt);
        let mut hand = table.episode(&task);
        let Turn::Continue { observation } = hand.step("hmm").unwrap() else { panic!("the opponent bets") };
        assert!(observation.contains("pb"), "{observation}");
        let Turn::Done(reward) = hand.step("I pass").unwrap() else { panic!("a fold ends it") };
        assert_eq!(reward.value(), -1.0);
        assert_eq!(reward.components()[1], ("illegal".to_owned(), 1.0));
        assert_eq!(named("not pass, bet!", &["pass", "bet"]), Some(1));
    }

    #[test]
    fn a_cut_hand_is_passed_to_its_end() {
        let table = Table::new(Opponent::<Leduc>::Always(1));
        let task = table.task(2).unwrap();
        let reward = table.episode(&task).cut().unwrap();
        assert!(table.reward_range().contains(&reward.value()));
    }
}
