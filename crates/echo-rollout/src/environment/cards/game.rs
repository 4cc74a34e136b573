//! Two-player zero-sum card games as trees, and their exact solution: value, best response, NashConv, and CFR+ for an
//! equilibrium.
//!
//! A best response is computed over sets of positions that the player cannot tell apart, which is exact for games of
//! perfect recall and linear in the tree.

use std::collections::BTreeMap;

/// What happens at a position.
#[derive(Debug, Clone)]
pub enum Node<G> {
    /// Cards are dealt: each outcome with its probability.
    Chance(Vec<(f64, G)>),
    /// Player 0 or 1 acts.
    Player(usize),
    /// The game is over; what player 0 wins.
    End(f64),
}

/// A two-player zero-sum game with perfect recall.
pub trait Game: Clone + Send + Sync {
    /// The game's name.
    const NAME: &'static str;

    /// Most that a player can win or lose.
    const MOST: f64;

    /// Before the deal.
    fn start() -> Self;

    /// What happens here.
    fn node(&self) -> Node<Self>;

    /// What the acting player may do, as words; never empty where a player acts.
    fn actions(&self) -> Vec<&'static str>;

    /// After the acting player's action `index` of [`Game::actions`].
    #[must_use]
    fn act(&self, index: usize) -> Self;

    /// All that `player` knows; equal exactly for positions that it cannot tell apart.
    fn information(&self, player: usize) -> String;
}

/// Probabilities of the actions at each information set.
pub trait Strategy<G: Game> {
    /// One probability for each of `game.actions()`, summing to 1; `information` is the acting player's.
    fn probabilities(&self, game: &G, information: &str) -> Vec<f64>;
}

/// A strategy as a table; what is not in it is played uniformly.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Profile(pub BTreeMap<String, Vec<f64>>);

impl<G: Game> Strategy<G> for Profile {
    fn probabilities(&self, game: &G, information: &str) -> Vec<f64> {
        let n = game.actions().len();
        self.0.get(information).filter(|p| p.len() == n).cloned().unwrap_or_else(|| vec![1.0 / n as f64; n])
    }
}

/// What player 0 wins on average.
pub fn value<G: Game>(game: &G, players: [&dyn Strategy<G>; 2]) -> f64 {
    match game.node() {
        Node::End(won) => won,
        Node::Chance(outcomes) => outcomes.iter().map(|(p, g)| p * value(g, players)).sum(),
        Node::Player(player) => {
            let probabilities = players[player].probabilities(game, &game.information(player));
            let reached = probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0);
            reached.map(|(i, p)| p * value(&game.act(i), players)).sum()
        }
    }
}

/// What `player` wins on average with the best answer to `opponent`.
pub fn best_response<G: Game>(player: usize, opponent: &dyn Strategy<G>) -> f64 {
    best_of(vec![(1.0, G::start())], player, opponent)
}

/// The best value over positions, each with the probability that chance and the opponent lead there.
fn best_of<G: Game>(positions: Vec<(f64, G)>, player: usize, opponent: &dyn Strategy<G>) -> f64 {
    let (mut total, mut open) = (0.0, positions);
    let mut mine: BTreeMap<String, Vec<(f64, G)>> = BTreeMap::new();
    while let Some((reach, game)) = open.pop() {
        match game.node() {
            Node::End(won) => total += reach * if player == 0 { won } else { -won },
            Node::Chance(outcomes) => open.extend(outcomes.into_iter().map(|(p, g)| (reach * p, g))),
            Node::Player(acting) if acting == player => {
                mine.entry(game.information(player)).or_default().push((reach, game));
            }
            Node::Player(acting) => {
                let probabilities = opponent.probabilities(&game, &game.information(acting));
                let reached = probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0);
                open.extend(reached.map(|(i, p)| (reach * p, game.act(i))));
            }
        }
    }
    let best = |positions: Vec<(f64, G)>| {
        let n = positions.first().map_or(0, |(_, g)| g.actions().len());
        let after = |i: usize| positions.iter().map(|(p, g)| (*p, g.act(i))).collect();
        (0..n).map(|i| best_of(after(i), player, opponent)).fold(f64::NEG_INFINITY, f64::max)
    };
    total + mine.into_values().map(best).sum::<f64>()
}

/// How much both players together could gain by answering `strategy` best; 0 in an equilibrium. Exploitability is half
/// of it.
pub fn nash_conv<G: Game>(strategy: &dyn Strategy<G>) -> f64 {
    best_response::<G>(0, strategy) + best_response::<G>(1, strategy)
}

/// An approximate equilibrium after `iterations` of CFR+ (arXiv 1407.5042) with linear averaging.
pub fn solve<G: Game>(iterations: u32) -> Profile {
    let mut tables = Tables::default();
    for i in 1..=iterations {
        for player in 0..2 {
            tables.walk(&G::start(), player, [1.0, 1.0], f64::from(i));
            tables.settle();
        }
    }
    let normalised = |sums: Vec<f64>| {
        let total: f64 = sums.iter().sum();
        let n = sums.len() as f64;
        sums.into_iter().map(|s| if total > 0.0 { s / total } else { 1.0 / n }).collect()
    };
    Profile(tables.sums.into_iter().map(|(key, sums)| (key, normalised(sums))).collect())
}

#[derive(Default)]
struct Tables {
    regrets: BTreeMap<String, Vec<f64>>,
    /// What this walk adds to the regrets; an information set is met many times and plays the same each time.
    found: BTreeMap<String, Vec<f64>>,
    sums: BTreeMap<String, Vec<f64>>,
}

impl Tables {
    /// Ends a walk: regrets never fall below zero.
    fn settle(&mut self) {
        for (key, found) in std::mem::take(&mut self.found) {
            let regrets = self.regrets.entry(key).or_insert_with(|| vec![0.0; found.len()]);
            regrets.iter_mut().zip(found).for_each(|(r, f)| *r = (*r + f).max(0.0));
        }
    }

    /// Updates `player`'s tables below `game` and returns what it wins there; `reach` are both players' probabilities,
    /// chance counted with the opponent's.
    fn walk<G: Game>(&mut self, game: &G, player: usize, reach: [f64; 2], weight: f64) -> f64 {
        let acting = match game.node() {
            Node::End(won) => return if player == 0 { won } else { -won },
            Node::Chance(outcomes) => {
                let mut total = 0.0;
                for (p, next) in outcomes {
                    let mut reach = reach;
                    reach[1 - player] *= p;
                    total += p * self.walk(&next, player, reach, weight);
                }
                return total;
            }
            Node::Player(acting) => acting,
        };
        let key = game.information(acting);
        let n = game.actions().len();
        let regrets = self.regrets.get(&key).cloned().unwrap_or_else(|| vec![0.0; n]);
        let positive: f64 = regrets.iter().map(|r| r.max(0.0)).sum();
        let strategy: Vec<f64> = regrets
            .iter()
            .map(|r| if positive > 0.0 { r.max(0.0) / positive } else { 1.0 / n as f64 })
            .collect();
        let mut values = Vec::with_capacity(n);
        for (i, p) in strategy.iter().enumerate() {
            let mut reach = reach;
            reach[acting] *= p;
            values.push(self.walk(&game.act(i), player, reach, weight));
        }
        let mean: f64 = strategy.iter().zip(&values).map(|(p, v)| p * v).sum();
        if acting == player {
            let found = self.found.entry(key.clone()).or_insert_with(|| vec![0.0; n]);
            found.iter_mut().zip(&values).for_each(|(r, v)| *r += reach[1 - player] * (v - mean));
            let sums = self.sums.entry(key).or_insert_with(|| vec![0.0; n]);
            sums.iter_mut().zip(&strategy).for_each(|(s, p)| *s += weight * reach[player] * p);
        }
        mean
    }
}
