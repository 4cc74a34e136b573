//! Two-player zero-sum card games as trees, and their exact solution: value, best response, NashConv, and CFR+ for an
//! equilibrium.
//!
//! A best response is computed over sets of positions that the player cannot tell apart, which is exact for games of
//! perfect recall and linear in the tree. Games too large for that (hold'em) are played by the same trait, move by move.

use std::collections::BTreeMap;

use super::super::draws::Draws;

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
pub trait Game: Clone + Send + Sync + 'static {
    /// The game's name.
    const NAME: &'static str;

    /// Before the deal, with the usual stakes.
    fn start() -> Self;

    /// Most that a player can win or lose.
    fn most(&self) -> f64;

    /// How often one player acts at most.
    fn turns(&self) -> usize {
        8
    }

    /// What happens here.
    fn node(&self) -> Node<Self>;

    /// What player 0 wins on average where only cards are to come, for games that can say so: their luck is taken out of what
    /// is won. Drawn from `draws` where there are too many cards to try them all. `None`: they are dealt.
    fn all_in(&self, _draws: &mut Draws) -> Option<f64> {
        None
    }

    /// What the acting player may do, as words; never empty where a player acts.
    fn actions(&self) -> Vec<&'static str>;

    /// How a beginner who looks at its cards chooses: a share for each of [`Game::actions`], all alike unless a game knows
    /// better. A model that imitates it has learnt where the cards are written; it is not meant to be good.
    fn habits(&self) -> Vec<f64> {
        let n = self.actions().len();
        vec![1.0 / n as f64; n]
    }

    /// After the acting player's action `index` of [`Game::actions`].
    #[must_use]
    fn act(&self, index: usize) -> Self;

    /// All that `player` knows: its cards and the common ones, a colon, what was done. Equal exactly for positions that it
    /// cannot tell apart.
    fn information(&self, player: usize) -> String;

    /// What the acting `player` is shown.
    fn describe(&self, player: usize) -> String {
        let information = self.information(player);
        let (cards, history) = information.split_once(':').unwrap_or((&information, ""));
        let history = if history.is_empty() { "-" } else { history };
        format!("Cards {cards}. So far {history}. {}?", self.actions().join(" or "))
    }

    /// After what the acting player says; `None` when that names no legal action.
    fn hear(&self, said: &str) -> Option<Self> {
        named(said, &self.actions()).map(|index| self.act(index))
    }
}

/// The legal action that a text names last.
pub(super) fn named(text: &str, actions: &[&str]) -> Option<usize> {
    let lower = text.to_lowercase();
    let found = (0..actions.len()).filter_map(|i| lower.rfind(actions[i]).map(|at| (at, i)));
    found.max().map(|(_, i)| i)
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

/// The best answers of both players to `strategy`: what each wins with it on average, and what each would do at its
/// information sets.
pub fn best_responses<G: Game>(strategy: &dyn Strategy<G>) -> ([f64; 2], Profile) {
    let mut both = Profile::default();
    let won = [0, 1].map(|player| {
        let mut responder = Responder { player, opponent: strategy, choices: Profile::default() };
        let won = responder.best_of(vec![(1.0, G::start())]);
        both.0.append(&mut responder.choices.0);
        won
    });
    (won, both)
}

struct Responder<'a, G: Game> {
    player: usize,
    opponent: &'a dyn Strategy<G>,
    /// The best action at each information set met.
    choices: Profile,
}

impl<G: Game> Responder<'_, G> {
    /// The best value over positions, each with the probability that chance and the opponent lead there.
    fn best_of(&mut self, positions: Vec<(f64, G)>) -> f64 {
        let (mut total, mut open) = (0.0, positions);
        let mut mine: BTreeMap<String, Vec<(f64, G)>> = BTreeMap::new();
        while let Some((reach, game)) = open.pop() {
            match game.node() {
                Node::End(won) => total += reach * if self.player == 0 { won } else { -won },
                Node::Chance(outcomes) => open.extend(outcomes.into_iter().map(|(p, g)| (reach * p, g))),
                Node::Player(acting) if acting == self.player => {
                    mine.entry(game.information(acting)).or_default().push((reach, game));
                }
                Node::Player(acting) => {
                    let probabilities = self.opponent.probabilities(&game, &game.information(acting));
                    let reached = probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0);
                    open.extend(reached.map(|(i, p)| (reach * p, game.act(i))));
                }
            }
        }
        for (information, positions) in mine {
            let n = positions.first().map_or(0, |(_, g)| g.actions().len());
            let (mut best, mut chosen) = (f64::NEG_INFINITY, 0);
            for i in 0..n {
                let value = self.best_of(positions.iter().map(|(p, g)| (*p, g.act(i))).collect());
                if value > best {
                    (best, chosen) = (value, i);
                }
            }
            self.choices.0.insert(information, (0..n).map(|i| f64::from(u8::from(i == chosen))).collect());
            total += best;
        }
        total
    }
}

/// How much both players together could gain by answering `strategy` best; 0 in an equilibrium.
pub fn nash_conv<G: Game>(strategy: &dyn Strategy<G>) -> f64 {
    best_responses::<G>(strategy).0.iter().sum()
}

/// A position at which somebody acts, as it comes about in a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// The acting player's information.
    pub information: String,
    /// What the player was shown and did before, in order.
    pub before: Vec<(String, &'static str)>,
    /// What it is shown now.
    pub shown: String,
    /// What it may do.
    pub actions: Vec<&'static str>,
}

/// Every information set of both players, by its information.
pub fn decisions<G: Game>() -> Vec<Decision> {
    let mut found = BTreeMap::new();
    let mut open = vec![(G::start(), [Vec::new(), Vec::new()])];
    while let Some((game, before)) = open.pop() {
        match game.node() {
            Node::End(_) => {}
            Node::Chance(outcomes) => open.extend(outcomes.into_iter().map(|(_, g)| (g, before.clone()))),
            Node::Player(acting) => {
                let (shown, actions) = (game.describe(acting), game.actions());
                for (i, word) in actions.iter().enumerate() {
                    let mut before = before.clone();
                    before[acting].push((shown.clone(), *word));
                    open.push((game.act(i), before));
                }
                let [first, second] = before;
                let before = if acting == 0 { first } else { second };
                let information = game.information(acting);
                found.entry(information.clone()).or_insert(Decision { information, before, shown, actions });
            }
        }
    }
    found.into_values().collect()
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
