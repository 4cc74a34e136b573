//! Sokoban: push every box onto a goal. Levels are drawn from a seed and kept only when a breadth-first search solves
//! them in enough pushes, so that none is unsolvable and none trivial.

mod level;
mod solver;

pub use level::{Level, LevelError, Move};
pub use solver::{Solution, solve};

use super::draws::{Draws, draw_on_side};
use super::{Environment, Episode, MAX_CANDIDATES, Reward, RewardError, Task, Turn, no_task};

/// What a prompt says after the picture.
const RULES: &str = "\nPush each $ onto a dot. You are @, # is wall. ";
/// What a prompt says before the squares.
const SQUARES_RULES: &str = "Push each $ onto a dot. You are @, # is wall. U, D, L or R?\n";
/// The same where a letter is a push.
const PUSHES_RULES: &str = "Push $ onto the dot. You are @, # is wall. All pushes, U, D, L or R?\n";
const CONTEXT: &str = "echo-rollout sokoban task v1";
/// How often a beginner makes just any move.
const WHIM: f64 = 0.2;
/// Most positions that the search visits for one level.
pub const MAX_STATES: usize = 200_000;

/// How a level is shown, and what a letter says there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// Drawn, in the usual characters.
    Picture,
    /// Named, as in `#r1u1 .r3d2 $r2d1 @a1`: how far to the right or left and down or up of the player everything is, and the
    /// player's own square, a letter for the column and a digit for the row. Half as long, and nobody need count characters
    /// or subtract squares to see who stands beside whom.
    Squares,
    /// Named by the way from the box, as in `#r1u1 @l1d1 .r3d2 $b1`, and a letter says which way the box is pushed: the player
    /// walks by itself to where it has to stand for that, and nothing happens where it cannot. Levels of one box.
    Pushes,
}

/// Small levels with their own generator.
#[derive(Debug, Clone, PartialEq)]
pub struct Sokoban {
    /// Columns, walls included. Default: 6.
    pub width: usize,
    /// Rows, walls included. Default: 6.
    pub height: usize,
    /// Boxes. Default: 1.
    pub boxes: usize,
    /// Share of inner squares that are walls. Default: 0.1.
    pub walls: f64,
    /// Fewest pushes of a shortest solution. Default: 2.
    pub min_pushes: usize,
    /// Most moves of a shortest solution. Default: 12.
    pub max_moves: usize,
    /// How often the player may speak; 1 asks for the whole solution at once. Default: 1.
    pub turns: usize,
    /// Most moves that are read from one turn. Default: 24.
    pub moves_per_turn: usize,
    /// Reward for the share of boxes on goals when not all are. Default: 0.1.
    pub partial: f32,
    /// Whether the game is over where no way leads to the end any more: then no turn is spent on what is lost. Asks the solver
    /// after every turn, so it is for small levels; where that finds nothing within 200,000 positions, the game counts as lost
    /// too. Default: no.
    pub ends_lost: bool,
    /// How levels are shown. Default: drawn.
    pub view: View,
}

impl Default for Sokoban {
    fn default() -> Self {
        Self {
            width: 6,
            height: 6,
            boxes: 1,
            walls: 0.1,
            min_pushes: 2,
            max_moves: 12,
            turns: 1,
            moves_per_turn: 24,
            partial: 0.1,
            ends_lost: false,
            view: View::Picture,
        }
    }
}

impl Sokoban {
    /// One move a turn, the new picture after each.
    pub fn interactive(turns: usize) -> Self {
        Self { turns, moves_per_turn: 1, ..Self::default() }
    }

    /// One move a turn, squares named instead of drawn, over where it is lost: meant for small models, though those of
    /// some 0.3 million parameters have hardly learnt it (docs/LEARNING.md).
    pub fn tiny(turns: usize) -> Self {
        Self { view: View::Squares, ends_lost: true, ..Self::interactive(turns) }
    }

    /// All pushes of a level at once, so that the box is what has to be understood: eight are read, none needs more than a few.
    pub fn pushes() -> Self {
        Self { view: View::Pushes, moves_per_turn: 8, ..Self::default() }
    }

    /// Columns and rows of every level.
    fn size(&self) -> (usize, usize) {
        (self.width.clamp(4, 12), self.height.clamp(4, 12))
    }

    fn show(&self, level: &Level) -> String {
        match self.view {
            View::Picture => level.to_string(),
            View::Squares => level.squares(),
            View::Pushes => level.squares_from_box(),
        }
    }

    /// What stands in a prompt before the squares; none before a picture.
    fn squares_rules(&self) -> Option<&'static str> {
        match self.view {
            View::Picture => None,
            View::Squares => Some(SQUARES_RULES),
            View::Pushes => Some(PUSHES_RULES),
        }
    }

    fn prompt(&self, level: &Level) -> String {
        let shown = self.show(level);
        match self.squares_rules() {
            // The squares last, so that they are as far from the move as in every later turn.
            Some(rules) => format!("{rules}{shown}"),
            None => {
                let ask = if self.turns > 1 { "Say your next move" } else { "Say all moves" };
                format!("{shown}{RULES}{ask}: U, D, L or R.")
            }
        }
    }

    /// The letters of a solution: its moves, or those that push.
    fn letters(&self, level: &Level, solution: Solution) -> Vec<Move> {
        if self.view != View::Pushes {
            return solution.moves;
        }
        let mut level = level.clone();
        solution.moves.into_iter().filter(|step| level.step(*step) == Some(true)).collect()
    }

    fn draw(&self, draws: &mut Draws) -> Option<(Level, Solution)> {
        for _ in 0..MAX_CANDIDATES {
            let level = self.candidate(draws);
            if let Some(solution) = level.and_then(|level| solve(&level, MAX_STATES).map(|s| (level, s)))
                && solution.1.pushes >= self.min_pushes.max(1)
                && solution.1.moves.len() <= self.max_moves
            {
                return Some(solution);
            }
        }
        None
    }

    /// A room with random walls, goals, boxes and a player; it may be unsolvable.
    fn candidate(&self, draws: &mut Draws) -> Option<Level> {
        let (w, h) = self.size();
        let mut level = Level::room(w, h);
        let inner: Vec<usize> = (0..w * h).filter(|at| !level.wall(*at)).collect();
        for &at in &inner {
            if draws.uniform() < self.walls {
                level.set_wall(at);
            }
        }
        let mut free: Vec<usize> = inner.into_iter().filter(|at| !level.wall(*at)).collect();
        let boxes = if self.view == View::Pushes { 1 } else { self.boxes.clamp(1, 4) };
        if free.len() < 2 * boxes + 1 {
            return None;
        }
        draws.shuffle(&mut free);
        let goals = free[..boxes].to_vec();
        let stones = free[boxes..2 * boxes].to_vec();
        level.place(goals, stones, free[2 * boxes]);
        Some(level)
    }

    fn level(&self, seed: u64) -> Option<(Level, Solution)> {
        draw_on_side(CONTEXT, seed, 200, |d| self.draw(d), |(level, _)| level.to_string().into_bytes())
    }

    fn other_task(&self, seed: u64) -> RewardError {
        RewardError::OtherTask { environment: self.name().to_owned(), seed }
    }

    fn reward(&self, level: &Level) -> Result<Reward, RewardError> {
        let on_goal = level.boxes_on_goals() as f32 / level.boxes().len() as f32;
        let solved = level.solved();
        let parts = vec![("solved".to_owned(), f32::from(solved)), ("on_goal".to_owned(), on_goal)];
        Reward::new(if solved { 1.0 } else { self.partial * on_goal }, parts, &self.reward_range())
    }
}

/// The moves in a text: the letters `U`, `D`, `L`, `R` of its answer, in any case, with spaces or commas; `None` when
/// anything else stands there.
fn moves(text: &str) -> Option<Vec<Move>> {
    let text = super::countdown::answer_of(text);
    let letters = text.chars().filter(|c| !c.is_whitespace() && !matches!(c, ',' | '.'));
    letters.map(Move::from_letter).collect()
}

struct Play<'a> {
    rules: &'a Sokoban,
    /// `None` when the task is not one of ours.
    level: Option<Level>,
    seed: u64,
    turn: usize,
}

impl Episode for Play<'_> {
    fn step(&mut self, said: &str) -> Result<Turn, RewardError> {
        self.turn += 1;
        let level = self.level.as_mut().ok_or_else(|| self.rules.other_task(self.seed))?;
        for step in moves(said).unwrap_or_default().into_iter().take(self.rules.moves_per_turn.max(1)) {
            match self.rules.view {
                View::Pushes => _ = level.push(step),
                View::Picture | View::Squares => _ = level.step(step),
            }
            if level.solved() {
                break;
            }
        }
        let lost = |level: &Level| self.rules.ends_lost && solve(level, MAX_STATES).is_none();
        if level.solved() || self.turn >= self.rules.turns.max(1) || lost(level) {
            return Ok(Turn::Done(self.rules.reward(level)?));
        }
        Ok(Turn::Continue { observation: self.rules.show(level) })
    }

    fn cut(&mut self) -> Result<Reward, RewardError> {
        let level = self.level.as_ref().ok_or_else(|| self.rules.other_task(self.seed))?;
        self.rules.reward(level)
    }

    /// A beginner sees the best move, and now and then makes another one.
    fn options(&self) -> Vec<(&'static str, f64)> {
        let Some(level) = self.level.as_ref().filter(|_| self.rules.moves_per_turn == 1) else {
            return Vec::new();
        };
        let solution = solve(level, MAX_STATES);
        let best = solution.and_then(|solution| self.rules.letters(level, solution).first().copied());
        // Where nothing leads to the end any more, all moves are alike.
        let whim = if best.is_some() { WHIM } else { 1.0 };
        let share = |step| whim / 4.0 + if Some(step) == best { 1.0 - whim } else { 0.0 };
        Move::ALL.map(|step| (step.letter(), share(step))).to_vec()
    }
}

impl Environment for Sokoban {
    fn name(&self) -> &str {
        match self.view {
            View::Squares => "sokoban-squares",
            View::Pushes => "sokoban-pushes",
            View::Picture if self.turns > 1 => "sokoban-steps",
            View::Picture => "sokoban",
        }
    }

    fn version(&self) -> u32 {
        match self.view {
            View::Squares => 2,
            View::Picture | View::Pushes => 1,
        }
    }

    fn task(&self, seed: u64) -> Result<Task, RewardError> {
        let (level, solution) = self.level(seed).ok_or_else(|| no_task(self.name()))?;
        let answer: String = self.letters(&level, solution).iter().map(|m| m.letter()).collect();
        Ok(Task { seed, prompt: self.prompt(&level), answer })
    }

    fn turns(&self) -> usize {
        self.turns.max(1)
    }

    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a> {
        // What the prompt shows spares the search for the level.
        let level = match self.squares_rules() {
            None => task.prompt.split_once(RULES).and_then(|(level, _)| level.parse().ok()),
            Some(rules) => {
                let squares = task.prompt.strip_prefix(rules);
                let (width, height) = self.size();
                squares.and_then(|squares| Level::from_squares(squares, width, height).ok())
            }
        };
        Box::new(Play { rules: self, level, seed: task.seed, turn: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::super::held_out_seed;
    use super::*;

    #[test]
    fn every_level_is_solved_by_its_own_answer_and_not_before() {
        for env in [Sokoban::default(), Sokoban { boxes: 2, width: 7, max_moves: 30, ..Sokoban::default() }] {
            for seed in (0..6).chain((0..2).map(held_out_seed)) {
                let task = env.task(seed).unwrap();
                let play = |said: &str| match env.episode(&task).step(said).unwrap() {
                    Turn::Done(reward) => reward.value(),
                    Turn::Continue { .. } => unreachable!("one turn"),
                };
                assert_eq!(play(&task.answer), 1.0, "{}", task.prompt);
                let shorter = &task.answer[..task.answer.len() - 1];
                assert!(play(shorter) < 1.0, "a shortest solution needs its last move");
                assert!(play("I do not know") <= 0.1);
            }
        }
    }

    #[test]
    fn settings_that_admit_no_level_are_an_error() {
        let full = Sokoban { walls: 1.0, ..Sokoban::default() };
        let error = full.task(1).unwrap_err();
        assert!(matches!(error, RewardError::NoTask { .. }), "{error}");
        let other = Task { seed: 4, prompt: "Hello".to_owned(), answer: String::new() };
        let error = full.episode(&other).step("U").unwrap_err();
        assert!(matches!(error, RewardError::OtherTask { seed: 4, .. }), "{error}");
    }

    #[test]
    fn move_by_move_reaches_the_same_end_drawn_or_named() {
        for seed in 0..20 {
            let answers = [Sokoban::interactive(20), Sokoban::tiny(20)].map(|env| {
                let task = env.task(seed).unwrap();
                let mut play = env.episode(&task);
                let moves = task.answer.chars().map(|letter| play.step(&letter.to_string()).unwrap());
                let Some(Turn::Done(reward)) = moves.last() else { panic!("{task:?} goes on") };
                assert_eq!(reward.value(), 1.0);
                task.answer.clone()
            });
            assert_eq!(answers[0], answers[1], "a seed is the same level");
        }
    }

    #[test]
    fn all_pushes_solve_a_level_and_fewer_do_not() {
        let env = Sokoban::pushes();
        for seed in (0..20).chain((0..4).map(held_out_seed)) {
            let task = env.task(seed).unwrap();
            assert!((2..=8).contains(&task.answer.len()), "{task:?}");
            let value = |said: &str| env.verify(&task, said).unwrap().value();
            assert_eq!(value(&task.answer), 1.0, "{task:?}");
            assert_eq!(value(&task.answer[..task.answer.len() - 1]), 0.0, "{task:?}");
        }
    }

    #[test]
    fn a_lost_level_is_over_where_that_is_the_rule() {
        let lost = |env: Sokoban| {
            let level = Level::from_squares(".r1d3 $l1d0 @c0", 6, 6).unwrap();
            let task = Task { seed: 1, prompt: env.prompt(&level), answer: String::new() };
            env.episode(&task).step("L").unwrap()
        };
        assert!(
            matches!(lost(Sokoban::tiny(16)), Turn::Done(reward) if reward.value() == 0.0),
            "a box in a corner"
        );
        assert!(matches!(lost(Sokoban::interactive(16)), Turn::Continue { .. }));
    }

    #[test]
    fn a_beginner_sees_the_best_move_and_now_and_then_makes_another() {
        let env = Sokoban::tiny(16);
        let task = env.task(5).unwrap();
        let mut play = env.episode(&task);
        // There may be several shortest ways, so the best moves need not be the answer's.
        for left in (0..task.answer.len()).rev() {
            let options = play.options();
            assert!((options.iter().map(|(_, share)| share).sum::<f64>() - 1.0).abs() < 1e-12);
            let (best, share) = options.iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
            assert!((share - (1.0 - 0.75 * WHIM)).abs() < 1e-12);
            let turn = play.step(best).unwrap();
            assert_eq!(matches!(turn, Turn::Done(reward) if reward.value() == 1.0), left == 0);
        }
        let lost = Task { seed: 1, prompt: format!("{SQUARES_RULES}.r1d1 $l1u1 @b1"), answer: String::new() };
        assert!(env.episode(&lost).options().iter().all(|(_, share)| *share == 0.25), "a box in a corner");
        let all_at_once = Sokoban::default();
        let task = all_at_once.task(5).unwrap();
        assert!(all_at_once.episode(&task).options().is_empty());
    }
}
