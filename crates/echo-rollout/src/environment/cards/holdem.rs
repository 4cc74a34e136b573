//! Heads-up no-limit Texas hold'em: blinds, four rounds of betting, all-ins, showdown.
//!
//! Player 0 is the button: it posts the small blind, acts first before the flop and last after it. Any raise of at least the
//! last one's size is legal, and an all-in of any size; what the other cannot match goes back. With two players there is
//! one pot, and an all-in below a full raise reopens nothing, because nobody who could raise again is left. The menu of
//! words offers the smallest raise, the pot and everything; `raise 24` raises to 24 chips of this round.
//!
//! At a table an all-in before the last card wins what it is worth: the mean over the boards that may come, as in the "all-in
//! adjusted" winnings of poker trackers. That is the same on average, with much less luck in it.

mod players;

use aya_poker::base::{CARDS, Card, Hand};
use aya_poker::{PokerHandRank, poker_rank};

use super::super::draws::Draws;
use super::game::{Game, Node, named};
pub use players::{Station, Tight};

/// Cards of a full deal: two each and the board.
const ALL_CARDS: usize = 9;
/// Boards that are drawn for an all-in before the flop; the mean over them is off by a twentieth of the stake or so.
const BOARDS: u32 = 500;
const SMALL_BLIND: u32 = 1;
const BIG_BLIND: u32 = 2;

/// One action; a check is a call of nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// Gives the pot away.
    Fold,
    /// Matches the bet as far as the stack goes; checks where there is none.
    Call,
    /// Makes the player's own bet of this round so many chips; all that is left is all-in.
    RaiseTo(u32),
}

/// A position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holdem {
    /// Chips at the beginning.
    stacks: [u32; 2],
    /// In the order of the deal: two of player 0, two of player 1, the board. Indices into the deck.
    cards: Vec<u8>,
    /// Chips paid in, this round included.
    paid: [u32; 2],
    /// Chips paid in this round.
    bets: [u32; 2],
    /// Size of the last full raise of this round.
    last_raise: u32,
    /// Who acts; nobody between rounds and once nobody can.
    to_act: Option<usize>,
    /// How many have acted since the last raise.
    acted: u8,
    folded: Option<usize>,
    /// `f`, `k` (check), `c`, `r24` for what was done, `/` between rounds.
    history: String,
}

impl Holdem {
    /// Most big blinds of a stack.
    pub const MOST_BIG_BLINDS: u32 = 200;

    /// Both players begin with `n` big blinds; none outside of 2 to [`Self::MOST_BIG_BLINDS`].
    pub fn with_big_blinds(n: u32) -> Option<Self> {
        (2..=Self::MOST_BIG_BLINDS).contains(&n).then(|| Self::with_stacks([n * BIG_BLIND; 2]))
    }

    /// A hand with these stacks, in chips; the blinds are 1 and 2.
    fn with_stacks(stacks: [u32; 2]) -> Self {
        let blinds = [SMALL_BLIND.min(stacks[0]), BIG_BLIND.min(stacks[1])];
        Self {
            stacks,
            cards: Vec::with_capacity(ALL_CARDS),
            paid: blinds,
            bets: blinds,
            last_raise: BIG_BLIND,
            to_act: None,
            acted: 0,
            folded: None,
            history: String::new(),
        }
    }

    /// What `player` has left.
    pub fn left(&self, player: usize) -> u32 {
        self.stacks[player] - self.paid[player]
    }

    /// All that was paid in.
    pub fn pot(&self) -> u32 {
        self.paid[0] + self.paid[1]
    }

    /// What `player` must pay to go on, as far as its stack goes.
    pub fn to_call(&self, player: usize) -> u32 {
        self.bets[1 - player].saturating_sub(self.bets[player]).min(self.left(player))
    }

    /// Between which bets of this round the acting player may raise: the smallest raise and all-in, which may be smaller.
    /// `None` when the other is all-in or calling takes everything.
    pub fn raise_range(&self) -> Option<(u32, u32)> {
        let player = self.to_act?;
        let most = self.bets[player] + self.left(player);
        let highest = self.bets[0].max(self.bets[1]);
        let least = (highest + self.last_raise).min(most);
        (self.left(1 - player) > 0 && most > highest).then_some((least, most))
    }

    /// `player`'s own cards.
    fn private(&self, player: usize) -> &[u8] {
        self.cards.get(2 * player..(2 * player + 2).min(self.cards.len())).unwrap_or_default()
    }

    /// The cards that may still come.
    fn free(&self) -> Vec<u8> {
        (0..52).filter(|card| !self.cards.contains(card)).collect()
    }

    fn board(&self) -> &[u8] {
        self.cards.get(4..).unwrap_or_default()
    }

    /// After `action` of the acting player; `None` when it is not legal.
    #[must_use]
    pub fn after(&self, action: Move) -> Option<Self> {
        let player = self.to_act?;
        let facing = self.bets[1 - player] > self.bets[player];
        let mut next = self.clone();
        match action {
            Move::Fold if !facing => return None,
            Move::Fold => {
                next.folded = Some(player);
                next.history.push('f');
            }
            Move::Call => {
                next.pay(player, self.to_call(player));
                next.history.push(if facing { 'c' } else { 'k' });
                next.acted += 1;
            }
            Move::RaiseTo(bet) => {
                let (least, most) = self.raise_range()?;
                if bet < least || bet > most {
                    return None;
                }
                let raise = bet - self.bets[0].max(self.bets[1]);
                next.pay(player, bet - self.bets[player]);
                next.last_raise = self.last_raise.max(raise);
                next.history.push_str(&format!("r{bet}"));
                next.acted = 1;
            }
        }
        // Whoever is all-in is asked nothing; the other only while there is something to call.
        let other = 1 - player;
        let over = next.folded.is_some()
            || next.acted >= 2
            || next.left(other) == 0
            || (next.left(player) == 0 && next.to_call(other) == 0);
        next.to_act = (!over).then_some(other);
        Some(next)
    }

    fn pay(&mut self, player: usize, chips: u32) {
        self.paid[player] += chips;
        self.bets[player] += chips;
    }

    /// After one more card.
    fn dealt(&self, card: u8) -> Self {
        let mut next = self.clone();
        next.cards.push(card);
        match next.cards.len() {
            4 => {
                // A blind may be all that a player had.
                let waits = next.left(0) > 0 && (next.left(1) > 0 || next.to_call(0) > 0);
                next.to_act = if waits { Some(0) } else { (next.to_call(1) > 0).then_some(1) };
            }
            7..=9 => {
                (next.bets, next.last_raise, next.acted) = ([0; 2], BIG_BLIND, 0);
                next.history.push('/');
                next.to_act = (next.left(0) > 0 && next.left(1) > 0).then_some(1);
            }
            _ => {}
        }
        next
    }

    /// The value of `player`'s best five of seven cards, or of fewer while there are fewer.
    pub fn rank(&self, player: usize) -> PokerHandRank {
        self.rank_with(player, &[])
    }

    /// The same once the cards `more` have come.
    fn rank_with(&self, player: usize, more: &[u8]) -> PokerHandRank {
        let cards = self.private(player).iter().chain(self.board()).chain(more);
        poker_rank(&cards.map(|card| card_at(*card)).collect::<Hand>())
    }

    /// 1 where player 0 has the better hand once the cards `more` have come, -1 where player 1 has, 0 where they tie.
    fn better(&self, more: &[u8]) -> i32 {
        self.rank_with(0, more).cmp(&self.rank_with(1, more)) as i32
    }

    /// What player 0 has won, in chips, once nobody acts any more and no card is to come.
    fn won(&self) -> Option<i64> {
        // What the other did not match goes back.
        let matched = i64::from(self.paid[0].min(self.paid[1]));
        if let Some(folded) = self.folded {
            return Some(if folded == 0 { -matched } else { matched });
        }
        if self.to_act.is_some() || self.cards.len() < ALL_CARDS {
            return None;
        }
        Some(i64::from(self.better(&[])) * matched)
    }

    /// The menu: each word with what it does.
    fn menu(&self) -> Vec<(&'static str, Move)> {
        let Some(player) = self.to_act else { return Vec::new() };
        let call = self.to_call(player);
        let mut menu = if call > 0 {
            vec![("fold", Move::Fold), ("call", Move::Call)]
        } else {
            vec![("check", Move::Call)]
        };
        if let Some((least, most)) = self.raise_range() {
            let pot = self.bets[player] + call + self.pot() + call;
            if least < most {
                menu.push(("raise", Move::RaiseTo(least)));
            }
            if (least + 1..most).contains(&pot) {
                menu.push(("pot", Move::RaiseTo(pot)));
            }
            menu.push(("shove", Move::RaiseTo(most)));
        }
        menu
    }

    fn written(&self, player: usize) -> (String, String) {
        let mut own = self.private(player).to_vec();
        // The order in which two cards came means nothing; the deck is ordered by rank.
        own.sort_unstable_by(|a, b| b.cmp(a));
        (text_of(&own), text_of(self.board()))
    }
}

fn card_at(index: u8) -> Card {
    CARDS[usize::from(index)]
}

/// `As` for the ace of spades; the deck is ordered by rank, then suit.
fn text_of(cards: &[u8]) -> String {
    let letters = |card: &u8| {
        let (rank, suit) = (usize::from(card / 4), usize::from(card % 4));
        [b"23456789TJQKA"[rank % 13], b"cdhs"[suit]].map(char::from)
    };
    cards.iter().flat_map(letters).collect()
}

/// The number after the last word that begins a raise.
fn amount(said: &str) -> Option<u32> {
    let lower = said.to_lowercase();
    let at = ["raise", "bet"].iter().filter_map(|word| lower.rfind(word).map(|at| at + word.len())).max()?;
    let rest = lower[at..].trim_start();
    let rest = rest.strip_prefix("to ").unwrap_or(rest).trim_start();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

impl Game for Holdem {
    const NAME: &'static str = "holdem";

    /// Twenty big blinds each.
    fn start() -> Self {
        Self::with_stacks([20 * BIG_BLIND; 2])
    }

    /// In big blinds.
    fn most(&self) -> f64 {
        f64::from(self.stacks[0].min(self.stacks[1])) / f64::from(BIG_BLIND)
    }

    /// A raise puts in at least a big blind, and there are two other turns in a round at most.
    fn turns(&self) -> usize {
        (self.stacks[0].max(self.stacks[1]) / BIG_BLIND) as usize + 8
    }

    fn node(&self) -> Node<Self> {
        if let Some(won) = self.won() {
            return Node::End(won as f64 / f64::from(BIG_BLIND));
        }
        if let Some(player) = self.to_act {
            return Node::Player(player);
        }
        let free = self.free();
        let chance = 1.0 / free.len() as f64;
        Node::Chance(free.into_iter().map(|card| (chance, self.dealt(card))).collect())
    }

    /// Every board from the flop on, `BOARDS` before it.
    fn all_in(&self, draws: &mut Draws) -> Option<f64> {
        let nobody_left = self.to_act.is_none() && (self.left(0) == 0 || self.left(1) == 0);
        if self.folded.is_some() || !nobody_left || !(4..ALL_CARDS).contains(&self.cards.len()) {
            return None;
        }
        let mut free = self.free();
        let (mut sum, mut boards) = (0_i32, 0_u32);
        let mut count = |more: &[u8]| {
            sum += self.better(more);
            boards += 1;
        };
        match ALL_CARDS - self.cards.len() {
            1 => free.iter().for_each(|card| count(&[*card])),
            2 => {
                for (i, one) in free.iter().enumerate() {
                    free[..i].iter().for_each(|other| count(&[*one, *other]));
                }
            }
            missing => {
                for _ in 0..BOARDS {
                    for i in 0..missing {
                        let drawn = i + draws.below(free.len() - i);
                        free.swap(i, drawn);
                    }
                    count(&free[..missing]);
                }
            }
        }
        let stake = f64::from(self.paid[0].min(self.paid[1])) / f64::from(BIG_BLIND);
        Some(stake * f64::from(sum) / f64::from(boards))
    }

    fn actions(&self) -> Vec<&'static str> {
        self.menu().into_iter().map(|(word, _)| word).collect()
    }

    /// Plays few hands, and those timidly; now and then it does just anything.
    fn habits(&self) -> Vec<f64> {
        players::timid(self)
    }

    fn act(&self, index: usize) -> Self {
        let action = self.menu().get(index).map(|(_, action)| *action);
        action.and_then(|action| self.after(action)).unwrap_or_else(|| self.clone())
    }

    fn information(&self, player: usize) -> String {
        let (own, board) = self.written(player);
        format!("{own} {board}:{}", self.history)
    }

    /// The cards stand last: a small model reads what is near to its answer.
    fn describe(&self, player: usize) -> String {
        let (own, board) = self.written(player);
        let or = |text: String| if text.is_empty() { "-".to_owned() } else { text };
        format!(
            "{} pot {} call {} left {}: {}? {} {own}",
            or(self.history.clone()),
            self.pot(),
            self.to_call(player),
            self.left(player),
            self.actions().join(" "),
            or(board)
        )
    }

    fn hear(&self, said: &str) -> Option<Self> {
        match amount(said) {
            Some(bet) => self.after(Move::RaiseTo(bet)),
            None => named(said, &self.actions()).map(|index| self.act(index)),
        }
    }
}

#[cfg(test)]
mod tests;
