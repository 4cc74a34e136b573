//! Hands at a table: what they win, what is said, who is asked.

use std::sync::{Arc, Mutex};

use super::super::game::{Strategy, value};
use super::super::{Holdem, Kuhn, Leduc, Profile, Speaker};
use super::*;

fn at<G: Game>(table: &Table<G>, game: G, seed: u64) -> Stop<G> {
    table.advance(game, seed, &mut Talk::default()).unwrap()
}

/// The mean reward of a fixed strategy over many seeds.
fn played<G: Game>(table: &Table<G>, me: &Profile, hands: u64) -> f64 {
    let mut total = 0.0;
    for seed in 0..hands {
        let task = table.task(seed).unwrap();
        let mut position = at(table, G::start(), seed);
        let mut hand = table.episode(&task);
        let mut draws = Draws::new("test", seed);
        total += loop {
            let Stop::Act(game) = &position else { break f64::from(hand.cut().unwrap().value()) };
            let weights = me.probabilities(game, &game.information((seed & 1) as usize));
            let action = pick(&weights, draws.uniform());
            let turn = hand.step(game.actions()[action]).unwrap();
            position = at(table, game.act(action), seed);
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
    let leduc = Table::new(Opponent::<Leduc>::Strategy(Arc::new(uniform.clone())));
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
    assert_eq!(super::super::game::named("not pass, bet!", &["pass", "bet"]), Some(1));
}

#[test]
fn a_cut_hand_is_passed_to_its_end() {
    let table = Table::new(Opponent::<Leduc>::Always(1));
    let task = table.task(2).unwrap();
    let reward = table.episode(&task).cut().unwrap();
    assert!(table.reward_range().contains(&reward.value()));
}

#[test]
fn seeds_come_in_pairs_of_one_deal_with_the_seats_swapped() {
    for seed in (0..40).step_by(2) {
        let table = Table::new(Opponent::<Holdem>::Always(1));
        let shown = |seed| {
            let Stop::Act(game) = at(&table, Holdem::start(), seed) else { panic!("nobody folds") };
            [game.information(0), game.information(1)].map(|i| cards(&i))
        };
        assert_eq!(shown(seed), shown(seed + 1));
        assert_ne!(shown(seed), shown(seed + 2));
        // Who folds or passes like its opponent loses in one seat of a deal what it wins in the other.
        let mirror = Table::new(Opponent::<Holdem>::Always(0));
        let won = |seed| {
            let task = mirror.task(seed).unwrap();
            mirror.episode(&task).cut().unwrap().value()
        };
        assert_eq!(won(seed) + won(seed + 1), 0.0);
        assert_ne!(won(seed), 0.0, "somebody pays the blinds");
    }
}

/// Calls and remembers what it heard; says nothing at its second hand.
#[derive(Default)]
struct Caller(Mutex<Vec<(Vec<Said>, String)>>);

impl Speaker for Caller {
    fn say(&self, before: &[Said], shown: &str, _: u64) -> Result<String, String> {
        let mut heard = self.0.lock().unwrap();
        heard.push((before.to_vec(), shown.to_owned()));
        if heard.len() > 8 { Err("gone".to_owned()) } else { Ok("I call\nor check".to_owned()) }
    }
}

#[test]
fn who_plays_by_words_is_asked_once_and_its_silence_is_no_reward() {
    let caller = Arc::new(Caller::default());
    let table = Table::new(Opponent::<Holdem>::Speaker(Arc::clone(&caller) as Arc<dyn Speaker>));
    assert!(!table.is_repeatable());
    // The policy is the big blind: the other acts first, and what it said is in the task.
    let task = table.task(1).unwrap();
    assert_eq!(task.answer, "I call or check");
    let mut hand = table.episode(&task);
    assert_eq!(caller.0.lock().unwrap().len(), 1, "it is not asked again");
    let (words, shares): (Vec<_>, Vec<_>) = hand.options().into_iter().unzip();
    assert_eq!(words, ["check", "raise", "pot", "shove"]);
    assert!(
        (shares.iter().sum::<f64>() - 1.0).abs() < 1e-12 && shares.iter().all(|s| *s > 0.0),
        "{shares:?}"
    );
    let Turn::Continue { .. } = hand.step("check").unwrap() else { panic!("the flop comes") };
    let Turn::Continue { .. } = hand.step("check").unwrap() else { panic!("the turn comes") };
    {
        let heard = caller.0.lock().unwrap();
        let (before, shown) = heard.last().unwrap();
        assert_eq!(before.len(), 1, "{heard:?}");
        assert!(before[0].shown.contains("call 1") && before[0].said == "I call or check");
        assert!(shown.contains("check"), "{shown}");
        // It sees its own cards and not the policy's.
        assert_ne!(shown.split(' ').next(), task.prompt.split(' ').next());
    }
    for _ in 0..6 {
        _ = caller.say(&[], "", 0);
    }
    let error = hand.step("check").unwrap_err();
    assert!(matches!(&error, RewardError::Verifier { reason, .. } if reason == "gone"), "{error}");
    assert!(hand.cut().is_err(), "nor is a cut hand judged");
    assert!(table.task(3).is_err());
}
