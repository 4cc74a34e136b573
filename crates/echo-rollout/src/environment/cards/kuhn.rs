//! Kuhn poker: three cards, one ante each, one bet of one. Its value is -1/18 for the player who acts first.

use std::collections::BTreeMap;

use super::game::{Game, Node, Profile};

/// A position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kuhn {
    /// The players' cards, 0 for jack to 2 for king; `None` before the deal.
    cards: Option<[u8; 2]>,
    /// `p` and `b` for what was done.
    history: String,
}

impl Kuhn {
    /// The equilibrium of one parameter: the first player bets a jack with probability `alpha`, at most 1/3.
    pub fn equilibrium(alpha: f64) -> Profile {
        let alpha = alpha.clamp(0.0, 1.0 / 3.0);
        let bet = |p: f64| vec![1.0 - p, p];
        let table = [
            ("J:", alpha),
            ("Q:", 0.0),
            ("K:", 3.0 * alpha),
            ("J:pb", 0.0),
            ("Q:pb", alpha + 1.0 / 3.0),
            ("K:pb", 1.0),
            ("J:p", 1.0 / 3.0),
            ("Q:p", 0.0),
            ("K:p", 1.0),
            ("J:b", 0.0),
            ("Q:b", 1.0 / 3.0),
            ("K:b", 1.0),
        ];
        Profile(table.into_iter().map(|(key, p)| (key.to_owned(), bet(p))).collect::<BTreeMap<_, _>>())
    }
}

fn letter(card: u8) -> char {
    ['J', 'Q', 'K'][usize::from(card.min(2))]
}

impl Game for Kuhn {
    const NAME: &'static str = "kuhn";

    fn start() -> Self {
        Self { cards: None, history: String::new() }
    }

    fn most(&self) -> f64 {
        2.0
    }

    fn node(&self) -> Node<Self> {
        let Some([first, second]) = self.cards else {
            let deals = (0..3_u8).flat_map(|a| (0..3).filter(move |b| a != *b).map(move |b| [a, b]));
            let deal = |cards| (1.0 / 6.0, Self { cards: Some(cards), history: String::new() });
            return Node::Chance(deals.map(deal).collect());
        };
        let showdown = |stake: f64| if first > second { stake } else { -stake };
        match self.history.as_str() {
            "pp" => Node::End(showdown(1.0)),
            "bp" => Node::End(1.0),
            "pbp" => Node::End(-1.0),
            "bb" | "pbb" => Node::End(showdown(2.0)),
            history => Node::Player(history.len() % 2),
        }
    }

    fn actions(&self) -> Vec<&'static str> {
        vec!["pass", "bet"]
    }

    fn act(&self, index: usize) -> Self {
        let sign = if index == 1 { 'b' } else { 'p' };
        Self { cards: self.cards, history: format!("{}{sign}", self.history) }
    }

    /// Bets the more the better the card, and thinks twice before it matches a bet. Its exploitability is 0.25 antes.
    fn habits(&self) -> Vec<f64> {
        let Node::Player(player) = self.node() else { return Vec::new() };
        let card = usize::from(self.cards.map_or(0, |cards| cards[player]).min(2));
        let bet = if self.history.ends_with('b') { [0.2, 0.4, 0.7] } else { [0.35, 0.5, 0.65] }[card];
        vec![1.0 - bet, bet]
    }

    fn information(&self, player: usize) -> String {
        let card = self.cards.map_or('?', |cards| letter(cards[player]));
        format!("{card}:{}", self.history)
    }
}

#[cfg(test)]
mod tests {
    use super::super::game::{best_responses, nash_conv, solve, value};
    use super::*;

    #[test]
    fn every_member_of_the_equilibrium_family_has_the_known_value_and_cannot_be_exploited() {
        for alpha in [0.0, 0.1, 0.2, 1.0 / 3.0] {
            let e = Kuhn::equilibrium(alpha);
            assert!((value(&Kuhn::start(), [&e, &e]) + 1.0 / 18.0).abs() < 1e-12);
            assert!(nash_conv::<Kuhn>(&e).abs() < 1e-12);
            assert!((best_responses::<Kuhn>(&e).0[1] - 1.0 / 18.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_uniform_player_is_exploitable_by_the_known_amount() {
        // OpenSpiel's figure for the uniform policy: NashConv 11/12.
        assert!((nash_conv::<Kuhn>(&Profile::default()) - 11.0 / 12.0).abs() < 1e-12);
        let off = Profile([("K:b".to_owned(), vec![1.0, 0.0])].into());
        assert!(nash_conv::<Kuhn>(&off) > nash_conv::<Kuhn>(&Profile::default()));
    }

    #[test]
    fn a_beginner_plays_by_its_cards_and_gives_much_away() {
        let mut beginner = Profile::default();
        let mut open = vec![Kuhn::start()];
        while let Some(game) = open.pop() {
            match game.node() {
                Node::End(_) => {}
                Node::Chance(deals) => open.extend(deals.into_iter().map(|(_, deal)| deal)),
                Node::Player(player) => {
                    beginner.0.insert(game.information(player), game.habits());
                    open.extend([game.act(0), game.act(1)]);
                }
            }
        }
        assert_eq!(beginner.0.len(), 12);
        assert!((nash_conv::<Kuhn>(&beginner) / 2.0 - 0.249_166_666).abs() < 1e-6);
    }

    #[test]
    fn regret_minimisation_finds_the_value() {
        let solved = solve::<Kuhn>(2000);
        assert!(nash_conv::<Kuhn>(&solved) < 2e-3, "{}", nash_conv::<Kuhn>(&solved));
        assert!((value(&Kuhn::start(), [&solved, &solved]) + 1.0 / 18.0).abs() < 1e-3);
    }
}
