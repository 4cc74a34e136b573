//! Rules by hand, and random play against a naive evaluator and the books.

use proptest::prelude::*;

use super::super::super::draws::Draws;
use super::super::game::{Game, Node, Strategy};
use super::*;

fn card(text: &str) -> u8 {
    (0..52).find(|c| text_of(&[*c]) == text).unwrap()
}

/// A hand in which these cards are dealt, with nobody having acted.
fn dealt(stacks: [u32; 2], cards: &str) -> Holdem {
    let cards: Vec<u8> = cards.split(' ').map(card).collect();
    cards.iter().fold(Holdem::with_stacks(stacks), |hand, c| hand.dealt(*c))
}

/// Plays words, dealing `board` when it is time; what player 0 wins in chips.
fn played(mut hand: Holdem, words: &[&str], board: &str) -> i64 {
    let (mut words, mut board) = (words.iter(), board.split(' '));
    loop {
        match hand.node() {
            Node::End(won) => return (won * f64::from(BIG_BLIND)) as i64,
            Node::Player(_) => {
                hand = hand.hear(words.next().expect("somebody acts")).expect("a legal action")
            }
            Node::Chance(_) => hand = hand.dealt(card(board.next().expect("a card comes"))),
        }
    }
}

const HANDS: &str = "As Kd Qh Qc";
const BOARD: &str = "2c 7d 9h 3s Ad";

#[test]
fn blinds_are_posted_and_the_button_acts_first_only_before_the_flop() {
    let hand = dealt([40; 2], HANDS);
    assert!(matches!(hand.node(), Node::Player(0)));
    assert_eq!((hand.pot(), hand.to_call(0), hand.left(0), hand.left(1)), (3, 1, 39, 38));
    assert_eq!(hand.actions(), ["fold", "call", "raise", "pot", "shove"]);
    assert_eq!(hand.describe(0), "- pot 3 call 1 left 39: fold call raise pot shove? - AsKd");
    // The small blind gives up: it loses just that.
    assert_eq!(played(hand.clone(), &["fold"], ""), -1);
    let limped = hand.hear("call").unwrap();
    assert!(matches!(limped.node(), Node::Player(1)), "the big blind has its option");
    assert_eq!(limped.actions(), ["check", "raise", "pot", "shove"]);
    let flop = ["2c", "7d", "9h"].iter().fold(limped.hear("check").unwrap(), |h, c| h.dealt(card(c)));
    assert!(matches!(flop.node(), Node::Player(1)), "after the flop the big blind acts first");
    assert!(flop.hear("fold").is_none(), "nobody folds for nothing");
}

#[test]
fn a_raise_is_at_least_the_last_one_and_at_most_everything() {
    let hand = dealt([40; 2], HANDS);
    assert_eq!(hand.raise_range(), Some((4, 40)));
    assert!(hand.hear("raise 3").is_none() && hand.hear("raise to 41").is_none());
    let raised = hand.hear("I raise to 10").unwrap();
    // It was a raise by 8, so the next goes to 18 at least.
    assert_eq!(raised.raise_range(), Some((18, 40)));
    assert!(raised.hear("raise 17").is_none());
    let again = raised.hear("bet 18").unwrap();
    assert_eq!(again.raise_range(), Some((26, 40)));
    // The pot-sized raise: call 8, then the pot of 36.
    assert_eq!(again.menu().iter().find(|(w, _)| *w == "pot"), None, "it would be more than everything");
    assert_eq!(hand.menu()[3], ("pot", Move::RaiseTo(6)));
    // A short all-in is allowed, and nothing but fold or call answers it.
    let short = dealt([40, 12], HANDS).hear("raise 10").unwrap();
    assert_eq!(short.raise_range(), Some((12, 12)));
    let shoved = short.hear("shove").unwrap();
    assert_eq!(shoved.actions(), ["fold", "call"]);
    assert_eq!(shoved.to_call(0), 2);
}

#[test]
fn pots_go_to_the_better_hand_ties_are_split_and_what_is_not_matched_goes_back() {
    let hand = || dealt([40; 2], HANDS);
    // A pair of aces against a pair of queens, all in before the flop.
    assert_eq!(played(hand(), &["shove", "call"], BOARD), 40);
    assert_eq!(played(hand(), &["shove", "fold"], ""), 2);
    assert_eq!(
        played(hand(), &["call", "check", "check", "check", "check", "check", "check", "check"], BOARD),
        2
    );
    assert_eq!(
        played(hand(), &["call", "check", "check", "pot", "call", "check", "check", "check", "check"], BOARD),
        6
    );
    // The board plays: a royal flush for both.
    assert_eq!(played(dealt([40; 2], "2s 2d 3h 3c"), &["shove", "call"], "As Ks Qs Js Ts"), 0);
    // Forty against six: six are at stake.
    assert_eq!(played(dealt([40, 6], HANDS), &["shove", "call"], BOARD), 6);
    assert_eq!(played(dealt([6, 40], HANDS), &["call", "shove", "call"], "2c 7d 9h 3s 4d"), -6);
    // Blinds that are all somebody has.
    assert_eq!(played(dealt([1, 40], HANDS), &[], BOARD), 1);
    assert_eq!(played(dealt([40, 1], HANDS), &[], BOARD), 1);
    assert_eq!(played(dealt([40, 2], HANDS), &["call"], BOARD), 2);
}

#[test]
fn after_an_all_in_the_board_is_dealt_without_questions() {
    let mut hand = dealt([40; 2], HANDS).hear("shove").unwrap().hear("call").unwrap();
    for c in BOARD.split(' ') {
        assert!(matches!(hand.node(), Node::Chance(_)), "{hand:?}");
        hand = hand.dealt(card(c));
    }
    assert!(matches!(hand.node(), Node::End(won) if won == 20.0));
}

/// All-in with the board so far.
fn all_in(cards: &str, seed: u64) -> f64 {
    let (private, board) = cards.split_at(11);
    let mut hand = dealt([40; 2], private).hear("call").unwrap();
    if board.is_empty() {
        hand = hand.hear("shove").unwrap().hear("call").unwrap();
    } else {
        hand = hand.hear("check").unwrap();
        let mut board = board.trim().split(' ').map(card);
        hand = board.by_ref().take(3).fold(hand, |h, c| h.dealt(c));
        for c in board {
            hand = hand.hear("check").unwrap().hear("check").unwrap().dealt(c);
        }
        assert_eq!(hand.all_in(&mut Draws::new("all in", seed)), None, "somebody acts");
        hand = hand.hear("shove").unwrap().hear("call").unwrap();
    }
    hand.all_in(&mut Draws::new("all in", seed)).unwrap()
}

#[test]
fn an_all_in_is_worth_the_mean_over_the_boards_to_come() {
    // Of 44 cards three aces and three kings win for the first player.
    assert!((all_in("As Kd Qh Qc 2c 7d 9h 3s", 1) - 20.0 * (6.0 - 38.0) / 44.0).abs() < 1e-9);
    // Drawing dead, and the board plays whatever comes.
    assert_eq!(all_in("As Kd Qh Qc Qs Qd 9h", 1), -20.0);
    assert_eq!(all_in("2d 3d 2h 3c As Ks Qs Js", 1), 0.0);
    // Queens win against ace and king of other suits in 0.568 of all boards, and lose in 0.428 (any odds calculator).
    let values: Vec<f64> = (0..20).map(|seed| all_in("As Kd Qh Qc", seed)).collect();
    let mean = values.iter().sum::<f64>() / 20.0 / 20.0;
    assert!((mean + 0.14).abs() < 0.03, "{mean}");
    assert_ne!(values[0], values[1]);
    assert_eq!(all_in("As Kd Qh Qc", 0), values[0], "the same seed draws the same boards");
}

#[test]
fn hands_that_go_on_or_are_over_are_not_settled_early() {
    let mut draws = Draws::new("all in", 1);
    let hand = dealt([40; 2], HANDS);
    assert_eq!(hand.all_in(&mut draws), None);
    assert_eq!(
        hand.hear("call").unwrap().hear("check").unwrap().all_in(&mut draws),
        None,
        "the flop is bet on"
    );
    assert_eq!(hand.hear("shove").unwrap().all_in(&mut draws), None, "it may be folded to");
    assert_eq!(hand.hear("shove").unwrap().hear("fold").unwrap().all_in(&mut draws), None);
    // Forty against six: six are at stake.
    let uneven = dealt([40, 6], HANDS).hear("shove").unwrap().hear("call").unwrap();
    assert!(uneven.all_in(&mut draws).unwrap().abs() <= 3.0);
}

#[test]
fn scripted_players_do_what_their_names_say() {
    let acts = |player: &dyn Strategy<Holdem>, hand: &Holdem| {
        let p = player.probabilities(hand, "");
        hand.actions()[p.iter().position(|p| *p == 1.0).unwrap()]
    };
    let facing = |cards| dealt([40; 2], cards).hear("pot").unwrap();
    assert_eq!(acts(&Station, &facing("As Kd 7h 2c")), "call");
    assert_eq!(acts(&Station, &dealt([40; 2], "7h 2c As Kd")), "call");
    assert_eq!(acts(&Tight, &facing("As Kd 7h 2c")), "fold");
    assert_eq!(acts(&Tight, &facing("As Kd Qh Qc")), "pot");
    assert_eq!(acts(&Tight, &facing("As Kd 9h 9c")), "pot");
    assert_eq!(acts(&Tight, &facing("As Kd Kh Tc")), "call");
    let checked = dealt([40; 2], "As Kd 7h 2c").hear("call").unwrap();
    assert_eq!(acts(&Tight, &checked), "check");
    let flop = |cards, board: &str| {
        let preflop = dealt([40; 2], cards).hear("call").unwrap().hear("check").unwrap();
        board.split(' ').fold(preflop, |h, c| h.dealt(card(c)))
    };
    assert_eq!(acts(&Tight, &flop("As Kd Qh Jc", "Qd Jd 2s")), "pot");
    assert_eq!(acts(&Tight, &flop("As Kd Qh 3c", "Qd Jd 2s")), "check");
    assert_eq!(acts(&Tight, &flop("As Kd Qh 3c", "Jd Js 2s")), "check", "the pair is everybody's");
}

/// Five cards by counting, as a tuple that compares as hands do.
fn naive_five(cards: [u8; 5]) -> (u8, Vec<u8>) {
    let mut ranks: Vec<u8> = cards.iter().map(|c| card_at(*c).rank() as u8).collect();
    ranks.sort_unstable_by(|a, b| b.cmp(a));
    let mut groups: Vec<(usize, u8)> =
        ranks.iter().map(|r| (ranks.iter().filter(|x| *x == r).count(), *r)).collect();
    groups.sort_unstable_by(|a, b| b.cmp(a));
    groups.dedup();
    let flush = cards.iter().all(|c| card_at(*c).suit() == card_at(cards[0]).suit());
    let wheel = ranks == [12, 3, 2, 1, 0];
    let straight = groups.len() == 5 && (ranks[0] - ranks[4] == 4 || wheel);
    let category = match (groups[0].0, groups.get(1).map_or(0, |g| g.0)) {
        _ if straight && flush => 8,
        (4, _) => 7,
        (3, 2) => 6,
        _ if flush => 5,
        _ if straight => 4,
        (3, _) => 3,
        (2, 2) => 2,
        (2, _) => 1,
        _ => 0,
    };
    (category, if wheel && straight { vec![3] } else { groups.into_iter().map(|g| g.1).collect() })
}

/// The best five of seven, by trying all twenty-one.
fn naive(cards: &[u8]) -> (u8, Vec<u8>) {
    let mut best = (0, Vec::new());
    for leave in 0..7 {
        for also in leave + 1..7 {
            let five: Vec<u8> = (0..7).filter(|i| *i != leave && *i != also).map(|i| cards[i]).collect();
            best = best.max(naive_five(five.try_into().unwrap()));
        }
    }
    best
}

#[test]
fn a_beginner_gives_up_weak_cards_raises_little_and_does_anything_now_and_then() {
    for (cards, usual) in [("2c 7d Qh Qc", "fold"), ("As Ad Qh Qc", "raise")] {
        let hand = dealt([40; 2], cards);
        let habits: Vec<(&str, f64)> = hand.actions().into_iter().zip(hand.habits()).collect();
        assert!((habits.iter().map(|(_, p)| p).sum::<f64>() - 1.0).abs() < 1e-12);
        for (word, p) in habits {
            assert!(if word == usual { p > 0.7 } else { (0.01..0.1).contains(&p) }, "{cards} {word} {p}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Whatever is played: chips are conserved, bets and stacks stay in range, everybody acts only while they can, the
    /// hand ends within its turns, and the pot goes where a naive evaluator says.
    #[test]
    fn random_hands_conserve_chips(
        seed: u64,
        stacks in prop_oneof![Just([40_u32, 40]), [1_u32..60, 1_u32..60]],
        loud in 0.0..1.0,
    ) {
        let mut draws = Draws::new("holdem test", seed);
        let mut hand = Holdem::with_stacks(stacks);
        let mut turns = [0; 2];
        let won = loop {
            prop_assert!(hand.paid[0] <= stacks[0] && hand.paid[1] <= stacks[1]);
            match hand.node() {
                Node::End(won) => break won,
                Node::Chance(mut outcomes) => {
                    let total: f64 = outcomes.iter().map(|(p, _)| p).sum();
                    prop_assert!((total - 1.0).abs() < 1e-9 && outcomes.len() == 52 - hand.cards.len());
                    hand = outcomes.swap_remove(draws.below(outcomes.len())).1;
                }
                Node::Player(player) => {
                    turns[player] += 1;
                    prop_assert!(turns[player] <= hand.turns());
                    prop_assert!(hand.left(player) > 0);
                    for (word, action) in hand.menu() {
                        prop_assert!(hand.after(action).is_some(), "{word} of {hand:?}");
                        prop_assert_eq!(hand.hear(word), hand.after(action));
                    }
                    let range = hand.raise_range();
                    let action = match range {
                        Some((least, most)) if draws.uniform() < loud => {
                            prop_assert!(hand.after(Move::RaiseTo(most + 1)).is_none());
                            prop_assert!(hand.after(Move::RaiseTo(least - 1)).is_none());
                            Move::RaiseTo(least + draws.below((most - least + 1) as usize) as u32)
                        }
                        _ if draws.uniform() < 0.1 && hand.to_call(player) > 0 => Move::Fold,
                        _ => Move::Call,
                    };
                    hand = hand.after(action).expect("legal");
                }
            }
        };
        let chips = (won * 2.0) as i64;
        prop_assert!(chips.unsigned_abs() <= u64::from(stacks[0].min(stacks[1])));
        let stake = i64::from(hand.paid[0].min(hand.paid[1]));
        let expected = match hand.folded {
            Some(0) => -stake,
            Some(_) => stake,
            None => {
                let hands = [0, 1].map(|p| naive(&[hand.private(p), hand.board()].concat()));
                match hands[0].cmp(&hands[1]) {
                    std::cmp::Ordering::Greater => stake,
                    std::cmp::Ordering::Less => -stake,
                    std::cmp::Ordering::Equal => 0,
                }
            }
        };
        prop_assert_eq!(chips, expected, "{:?}", hand);
    }

    #[test]
    fn nothing_that_is_said_breaks_the_table(said in "\\PC{0,40}") {
        let hand = dealt([40; 2], HANDS);
        if let Some(next) = hand.hear(&said) {
            prop_assert!(next.history.len() > hand.history.len());
        }
        _ = hand.hear(&format!("raise {said}"));
    }
}
