//! Scripted hold'em players: fixed opponents to measure against. They look at their own cards and the board only.

use aya_poker::PokerRankCategory;

use super::super::game::{Game, Strategy};
use super::{Holdem, card_at};

/// A calling station: it never folds and never raises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Station;

impl Strategy<Holdem> for Station {
    fn probabilities(&self, game: &Holdem, _: &str) -> Vec<f64> {
        only(game, &["call", "check"])
    }
}

/// A tight and aggressive player: few hands, played by raising. Before the flop Bill Chen's count decides: 8 points raise, 6
/// go along, less gives up; afterwards two pairs and better bet the pot, a pair goes along, the rest gives up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tight;

impl Strategy<Holdem> for Tight {
    fn probabilities(&self, game: &Holdem, _: &str) -> Vec<f64> {
        match strength(game) {
            None => Vec::new(),
            Some(Strength::Strong) => only(game, &["pot", "raise", "shove", "call", "check"]),
            Some(Strength::Fair) => only(game, &["call", "check"]),
            Some(Strength::Weak) => only(game, &["check", "fold"]),
        }
    }
}

/// How often a beginner does just anything.
const WHIM: f64 = 0.1;

/// A beginner: it gives up what looks weak and raises by the least with what looks strong.
pub(super) fn timid(game: &Holdem) -> Vec<f64> {
    let chosen = match strength(game) {
        None => return Vec::new(),
        Some(Strength::Strong) => only(game, &["raise", "call", "check"]),
        Some(Strength::Fair) => only(game, &["call", "check"]),
        Some(Strength::Weak) => only(game, &["check", "fold"]),
    };
    let n = chosen.len() as f64;
    chosen.into_iter().map(|p| (1.0 - WHIM) * p + WHIM / n).collect()
}

/// What the acting player's cards are worth at a glance.
fn strength(game: &Holdem) -> Option<Strength> {
    let player = game.to_act?;
    Some(if game.board().is_empty() { opening(game.private(player)) } else { made(game, player) })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Strength {
    Weak,
    Fair,
    Strong,
}

/// Two cards before the flop, by Bill Chen's count: points for the higher card, a pair doubles them, suits and closeness
/// add.
fn opening(cards: &[u8]) -> Strength {
    let [one, two] = [cards[0], cards[1]].map(card_at);
    let [high, low] = {
        let (a, b) = (one.rank() as u8, two.rank() as u8);
        [a.max(b), a.min(b)]
    };
    // Ranks count from 0 for a two to 12 for an ace.
    let points = match high {
        12 => 10.0,
        11 => 8.0,
        10 => 7.0,
        9 => 6.0,
        other => f64::from(other + 2) / 2.0,
    };
    let count = if high == low {
        (2.0 * points).max(5.0)
    } else {
        let gap = match high - low {
            1 => 0.0,
            2 => 1.0,
            3 => 2.0,
            4 => 4.0,
            _ => 5.0,
        };
        let suited = if one.suit() == two.suit() { 2.0 } else { 0.0 };
        points - gap + suited
    };
    match count {
        c if c >= 8.0 => Strength::Strong,
        c if c >= 6.0 => Strength::Fair,
        _ => Strength::Weak,
    }
}

/// Own cards with the board; what the board makes by itself counts as nothing.
fn made(game: &Holdem, player: usize) -> Strength {
    let board = game.board().iter().map(|card| card_at(*card)).collect();
    let category = |rank: PokerRankCategory| rank as u8;
    let (own, common) = (
        category(game.rank(player).rank_category()),
        category(aya_poker::poker_rank(&board).rank_category()),
    );
    if own <= common {
        Strength::Weak
    } else if own >= category(PokerRankCategory::TwoPair) {
        Strength::Strong
    } else {
        Strength::Fair
    }
}

/// The first of `wanted` that is on the menu, for certain.
fn only(game: &Holdem, wanted: &[&str]) -> Vec<f64> {
    let actions = game.actions();
    let chosen = wanted.iter().find_map(|word| actions.iter().position(|a| a == word)).unwrap_or(0);
    (0..actions.len()).map(|i| f64::from(u8::from(i == chosen))).collect()
}
