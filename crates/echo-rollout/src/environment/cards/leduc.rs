//! Leduc hold'em: six cards (two each of jack, queen, king), one private and one public card, two rounds of bets of 2 and
//! 4 with at most two raises each, an ante of 1. Its value is about -0.0856 for the player who acts first.

use super::game::{Game, Node};

/// A position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leduc {
    /// Ranks, 0 for jack to 2 for king; `None` before the deal.
    private: [Option<u8>; 2],
    public: Option<u8>,
    /// What both have paid in.
    paid: [i32; 2],
    /// Raises of this round, and how many players in a row have not raised.
    raises: u8,
    passed: u8,
    /// Who acts, or acted last.
    player: usize,
    folded: Option<usize>,
    /// `c`, `r` and `f` for what was done, `/` between the rounds.
    history: String,
}

impl Leduc {
    fn round_over(&self) -> bool {
        self.passed == 2
    }

    fn bet(&self) -> i32 {
        if self.public.is_none() { 2 } else { 4 }
    }

    /// The cards that are left, each with its probability.
    fn deal(&self) -> Vec<(f64, u8)> {
        let gone = |rank: u8| self.private.iter().chain([&self.public]).filter(|c| **c == Some(rank)).count();
        let left: Vec<usize> = (0..3).map(|rank| 2 - gone(rank)).collect();
        let total: usize = left.iter().sum();
        let chance = |rank: u8| (left[usize::from(rank)] as f64 / total as f64, rank);
        (0..3).map(chance).filter(|(p, _)| *p > 0.0).collect()
    }

    fn strength(&self, player: usize) -> Option<(bool, u8)> {
        let card = self.private[player]?;
        Some((self.public == Some(card), card))
    }
}

impl Game for Leduc {
    const NAME: &'static str = "leduc";

    fn start() -> Self {
        Self {
            private: [None; 2],
            public: None,
            paid: [1; 2],
            raises: 0,
            passed: 0,
            player: 0,
            folded: None,
            history: String::new(),
        }
    }

    fn most(&self) -> f64 {
        13.0
    }

    fn node(&self) -> Node<Self> {
        if let Some(folded) = self.folded {
            let lost = f64::from(self.paid[folded]);
            return Node::End(if folded == 0 { -lost } else { lost });
        }
        if let Some(missing) = self.private.iter().position(Option::is_none) {
            let with = |(p, rank)| {
                let mut next = self.clone();
                next.private[missing] = Some(rank);
                (p, next)
            };
            return Node::Chance(self.deal().into_iter().map(with).collect());
        }
        if !self.round_over() {
            return Node::Player(self.player);
        }
        if self.public.is_some() {
            let won = match self.strength(0).cmp(&self.strength(1)) {
                std::cmp::Ordering::Greater => self.paid[1],
                std::cmp::Ordering::Less => -self.paid[0],
                std::cmp::Ordering::Equal => 0,
            };
            return Node::End(f64::from(won));
        }
        let with = |(p, rank)| {
            let history = format!("{}/", self.history);
            (p, Self { public: Some(rank), raises: 0, passed: 0, player: 0, history, ..self.clone() })
        };
        Node::Chance(self.deal().into_iter().map(with).collect())
    }

    fn actions(&self) -> Vec<&'static str> {
        let facing = self.paid[0] != self.paid[1];
        let mut actions = if facing { vec!["fold", "call"] } else { vec!["check"] };
        if self.raises < 2 {
            actions.push("raise");
        }
        actions
    }

    fn act(&self, index: usize) -> Self {
        let mut next = self.clone();
        let (me, other) = (self.player, 1 - self.player);
        match self.actions().get(index).copied() {
            Some("fold") => {
                next.folded = Some(me);
                next.history.push('f');
            }
            Some("raise") => {
                next.paid[me] = self.paid[other] + self.bet();
                (next.raises, next.passed) = (self.raises + 1, 1);
                next.history.push('r');
            }
            _ => {
                next.paid[me] = self.paid[other];
                next.passed += 1;
                next.history.push('c');
            }
        }
        next.player = other;
        next
    }

    fn information(&self, player: usize) -> String {
        let letter = |card: Option<u8>| card.map_or('?', |c| ['J', 'Q', 'K'][usize::from(c.min(2))]);
        format!("{}{}:{}", letter(self.private[player]), letter(self.public), self.history)
    }
}

#[cfg(test)]
mod tests {
    use super::super::game::{Profile, nash_conv, solve, value};
    use super::*;

    #[test]
    fn the_tree_is_leducs() {
        // OpenSpiel's figure for the uniform policy.
        let conv = nash_conv::<Leduc>(&Profile::default());
        assert!((conv - 4.747_222_222_222_222).abs() < 1e-9, "{conv}");
    }

    #[test]
    fn regret_minimisation_finds_the_value() {
        let solved = solve::<Leduc>(200);
        let conv = nash_conv::<Leduc>(&solved);
        assert!(conv < 0.03, "{conv}");
        let v = value(&Leduc::start(), [&solved, &solved]);
        assert!((v + 0.0856).abs() < 5e-3, "{v}");
    }

    #[test]
    fn chips_are_conserved_at_every_end() {
        fn walk(game: &Leduc, ends: &mut usize) {
            match game.node() {
                Node::End(won) => {
                    *ends += 1;
                    assert!(
                        won.abs() <= f64::from(game.paid[0].max(game.paid[1]))
                            && won.abs() <= Leduc::start().most()
                    );
                }
                Node::Chance(next) => {
                    assert!((next.iter().map(|(p, _)| p).sum::<f64>() - 1.0).abs() < 1e-12);
                    next.iter().for_each(|(_, g)| walk(g, ends));
                }
                Node::Player(_) => (0..game.actions().len()).for_each(|i| walk(&game.act(i), ends)),
            }
        }
        let mut ends = 0;
        walk(&Leduc::start(), &mut ends);
        assert!(ends > 1000, "{ends}");
    }
}
