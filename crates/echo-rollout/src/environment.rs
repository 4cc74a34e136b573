//! What a policy is trained on: an environment makes a task from a seed and judges what is said by a program.
//!
//! An [`Episode`] is one run of a task: the policy speaks, the environment answers with an observation or ends it with a
//! reward. A plain question with one answer is an episode of one turn ([`one_turn`]); games and tools take several.
//! Episodes are repeatable, so that the trainer can judge a transcript again.
//!
//! Tasks are named by their seed alone, so that a lease carries eight bytes instead of a prompt, and trainer, worker and
//! auditor all see the same task. Seeds from [`HELD_OUT_SEEDS`] on are for evaluation only and are never leased.

pub mod arithmetic;
pub mod calculator;
pub mod cards;
pub mod countdown;
pub mod draws;
pub mod exact;
mod guests;
pub mod knights;
pub mod maths;
pub mod sokoban;

use std::fmt;
use std::ops::RangeInclusive;

pub use arithmetic::Arithmetic;
pub use calculator::Calculator;
use cards::UnknownOpponent;
pub use countdown::Countdown;
pub use guests::{FindEnvironment, FindJudge, FindQuestions, Guests};
pub use knights::Knights;
use maths::BrokenLines;
pub use maths::Maths;
pub use sokoban::Sokoban;

/// Seeds from here on name held-out tasks; smaller ones name tasks to train on.
pub const HELD_OUT_SEEDS: u64 = 1 << 63;

/// The seed of the `index`-th held-out task.
pub fn held_out_seed(index: u64) -> u64 {
    HELD_OUT_SEEDS | index
}

/// A source of verifiable tasks. The same seed gives the same task, and the same completion the same reward, on every
/// machine, unless [`Environment::is_repeatable`] says otherwise.
pub trait Environment: Send + Sync {
    /// Its name on the wire, for example `arithmetic`.
    fn name(&self) -> &str;

    /// Changes whenever a seed would give another task or a completion another reward.
    fn version(&self) -> u32 {
        1
    }

    /// The task of `seed`.
    ///
    /// # Errors
    /// When there is none: the settings admit no problem, or the program that makes them does not answer.
    fn task(&self, seed: u64) -> Result<Task, RewardError>;

    /// Between which values its rewards lie.
    fn reward_range(&self) -> RangeInclusive<f32> {
        0.0..=1.0
    }

    /// How often the policy speaks at most in one episode.
    fn turns(&self) -> usize {
        1
    }

    /// Whether a transcript can be played again to the same end. False where somebody else is asked who may answer otherwise:
    /// such rewards are believed without being judged again.
    fn is_repeatable(&self) -> bool {
        true
    }

    /// How many questions it answers at once; more wait for their turn.
    fn concurrency(&self) -> usize {
        usize::MAX
    }

    /// A fresh run of `task`. Environments of one turn implement [`Environment::verify`] and return [`one_turn`] here.
    fn episode<'a>(&'a self, task: &'a Task) -> Box<dyn Episode + 'a>;

    /// Judges `completion`, the decoded answer without the end-of-sequence token, as the only turn of an episode.
    ///
    /// # Errors
    /// When the verifier itself could not judge. That is not a reward of 0: the trajectory is dropped and counted.
    fn verify(&self, task: &Task, completion: &str) -> Result<Reward, RewardError> {
        let mut episode = self.episode(task);
        match episode.step(completion)? {
            Turn::Done(reward) => Ok(reward),
            Turn::Continue { .. } => episode.cut(),
        }
    }
}

/// One run of a task.
pub trait Episode: Send {
    /// The policy says `said`, decoded without the end-of-sequence token.
    ///
    /// # Errors
    /// When the verifier itself could not judge.
    fn step(&mut self, said: &str) -> Result<Turn, RewardError>;

    /// The reward when there is no room for another turn.
    ///
    /// # Errors
    /// When the verifier itself could not judge.
    fn cut(&mut self) -> Result<Reward, RewardError>;

    /// All that may sensibly be said now, where that is a choice of a few words, each with the share of the times that a
    /// beginner says it; else nothing. A beginner knows the rules and looks at its cards or the board, and can be beaten.
    fn options(&self) -> Vec<(&'static str, f64)> {
        Vec::new()
    }
}

/// What follows from something said.
#[derive(Debug, Clone, PartialEq)]
pub enum Turn {
    /// The environment answers and the policy speaks again.
    Continue {
        /// What a tool, the world or another player says.
        observation: String,
    },
    /// The episode is over.
    Done(Reward),
}

/// An episode of a single turn, judged by [`Environment::verify`].
pub fn one_turn<'a, E: Environment + ?Sized>(environment: &'a E, task: &'a Task) -> Box<dyn Episode + 'a> {
    Box::new(OneTurn { environment, task })
}

struct OneTurn<'a, E: ?Sized> {
    environment: &'a E,
    task: &'a Task,
}

impl<E: Environment + ?Sized> Episode for OneTurn<'_, E> {
    fn step(&mut self, said: &str) -> Result<Turn, RewardError> {
        Ok(Turn::Done(self.environment.verify(self.task, said)?))
    }

    fn cut(&mut self) -> Result<Reward, RewardError> {
        self.environment.verify(self.task, "")
    }
}

impl fmt::Debug for dyn Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Environment({} {})", self.name(), self.version())
    }
}

/// Turns of `sokoban-steps`.
const SOKOBAN_TURNS: usize = 24;
/// Turns of `sokoban-squares`; no level needs more than 12.
const SQUARES_TURNS: usize = 16;

/// Most candidates that a generator draws for one problem; one in a few is good where the settings admit any.
const MAX_CANDIDATES: usize = 10_000;

/// After [`MAX_CANDIDATES`] candidates without a problem.
fn no_task(environment: &str) -> RewardError {
    RewardError::NoTask { environment: environment.to_owned(), tries: MAX_CANDIDATES }
}

/// One task: what the user says, and what the verifier compares with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// What names it.
    pub seed: u64,
    /// The user's chat message.
    pub prompt: String,
    /// What a perfect answer says. Workers know it too (they run the verifier); the trainer grades again.
    pub answer: String,
}

/// A finite reward within its environment's range, with its named parts.
#[derive(Debug, Clone, PartialEq)]
pub struct Reward {
    value: f32,
    components: Vec<(String, f32)>,
}

impl Reward {
    /// Most parts of one reward.
    pub const MAX_COMPONENTS: usize = 16;

    /// A reward of `value` within `range`; minus zero is zero, because a message keeps no sign of it.
    ///
    /// # Errors
    /// When the value or a part is not finite, the value is outside of `range`, or there are too many parts.
    pub fn new(
        value: f32,
        mut components: Vec<(String, f32)>,
        range: &RangeInclusive<f32>,
    ) -> Result<Self, RewardError> {
        if !value.is_finite() {
            return Err(RewardError::NotFinite { what: "reward".to_owned(), value });
        }
        if !range.contains(&value) {
            return Err(RewardError::OutOfRange { value, low: *range.start(), high: *range.end() });
        }
        if let Some((what, value)) = components.iter().find(|(_, v)| !v.is_finite()) {
            return Err(RewardError::NotFinite { what: what.clone(), value: *value });
        }
        if components.len() > Self::MAX_COMPONENTS {
            return Err(RewardError::TooManyComponents { got: components.len() });
        }
        // The sum of the two zeros is the positive one.
        components.iter_mut().for_each(|(_, value)| *value += 0.0);
        Ok(Self { value: value + 0.0, components })
    }

    /// What the learner sees.
    pub fn value(&self) -> f32 {
        self.value
    }

    /// Its parts, for people and plots.
    pub fn components(&self) -> &[(String, f32)] {
        &self.components
    }
}

/// Why there is no task or no reward.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RewardError {
    /// NaN or infinity.
    #[error("{what} is {value}; a reward must be a finite number")]
    NotFinite {
        /// The reward or the part of it.
        what: String,
        /// What it was.
        value: f32,
    },
    /// Outside of the environment's range.
    #[error("reward {value} is outside of {low} to {high}")]
    OutOfRange {
        /// What it was.
        value: f32,
        /// The smallest allowed one.
        low: f32,
        /// The largest allowed one.
        high: f32,
    },
    /// More parts than [`Reward::MAX_COMPONENTS`].
    #[error("a reward of {got} parts; at most 16 are kept")]
    TooManyComponents {
        /// How many came.
        got: usize,
    },
    /// No problem fits the settings.
    #[error("{environment} found no problem in {tries} draws; loosen its settings")]
    NoTask {
        /// The environment.
        environment: String,
        /// How many candidates were drawn.
        tries: usize,
    },
    /// A task of another environment or other settings.
    #[error("the task of seed {seed} is none of {environment}'s")]
    OtherTask {
        /// The environment.
        environment: String,
        /// Names the task.
        seed: u64,
    },
    /// The verifier could not judge, for example because a tool timed out.
    #[error("the verifier of {environment} could not judge: {reason}")]
    Verifier {
        /// The environment.
        environment: String,
        /// Why.
        reason: String,
    },
}

/// The environment called `name`, with its default settings; what binaries use for `--env NAME`. Card games take an
/// opponent, as in `holdem:tight`.
///
/// # Errors
/// When there is none of that name, or it takes something that only a caller of [`by_name_with`] can bring: an opponent, a
/// file. The message lists those that exist.
pub fn by_name(name: &str) -> Result<Box<dyn Environment>, UnknownEnvironment> {
    by_name_with(name, &Guests::none())
}

/// The environment called `name`, with `guests` for opponents that are not scripted, for questions from files (`maths:FILE`, or
/// `maths@skip:FILE` to leave out broken lines), for a reward model (`judged@TASKS:DIRECTORY`, where TASKS is a name without a
/// colon) and for an http address in place of a name.
///
/// # Errors
/// When there is none of that name, or a guest did not come.
pub fn by_name_with(name: &str, guests: &Guests<'_>) -> Result<Box<dyn Environment>, UnknownEnvironment> {
    if is_address(name) {
        let absent = |reason| UnknownEnvironment::Elsewhere { address: name.to_owned(), reason };
        return (guests.elsewhere)(name).map_err(absent);
    }
    if let Some((tasks, directory)) = judged(name) {
        let absent = |reason| UnknownEnvironment::Judge { name: name.to_owned(), reason };
        return (guests.judge)(by_name_with(tasks, guests)?, directory).map_err(absent);
    }
    if let Some(table) = cards::table(name, guests)? {
        return Ok(table);
    }
    if let Some((file, broken)) = question_file(name) {
        let absent = |reason| UnknownEnvironment::Questions { name: name.to_owned(), reason };
        return Ok(Box::new((guests.questions)(file, broken).map_err(absent)?));
    }
    match name {
        "arithmetic" => Ok(Box::new(Arithmetic::default())),
        "calculator" => Ok(Box::new(Calculator::default())),
        "countdown" => Ok(Box::new(Countdown::default())),
        "countdown-sums" => Ok(Box::new(Countdown::tiny())),
        "knights" => Ok(Box::new(Knights::default())),
        "sokoban" => Ok(Box::new(Sokoban::default())),
        "sokoban-pushes" => Ok(Box::new(Sokoban::pushes())),
        "sokoban-squares" => Ok(Box::new(Sokoban::tiny(SQUARES_TURNS))),
        "sokoban-steps" => Ok(Box::new(Sokoban::interactive(SOKOBAN_TURNS))),
        other => Err(UnknownEnvironment::Name { name: other.to_owned() }),
    }
}

/// Whether `name` is an http address, where somebody else's environment is asked.
pub fn is_address(name: &str) -> bool {
    ["http://", "https://"].iter().any(|scheme| name.starts_with(scheme))
}

/// The tasks and the directory of `judged@TASKS:DIRECTORY`.
fn judged(name: &str) -> Option<(&str, &str)> {
    name.strip_prefix("judged@")?.split_once(':').filter(|(_, directory)| !directory.is_empty())
}

/// The file of `maths:FILE` or `maths@skip:FILE`, and what is done about its broken lines.
fn question_file(name: &str) -> Option<(&str, BrokenLines)> {
    let (kind, file) = name.split_once(':').filter(|(_, file)| !file.is_empty())?;
    match kind {
        "maths" => Some((file, BrokenLines::Refuse)),
        "maths@skip" => Some((file, BrokenLines::Skip)),
        _ => None,
    }
}

/// Whether [`by_name_with`] knows `name` when all guests come.
///
/// # Errors
/// When there is none of that name.
pub fn check_name(name: &str) -> Result<(), UnknownEnvironment> {
    use UnknownEnvironment::{Elsewhere, Judge, Opponent, Questions};
    match by_name(name) {
        Ok(_)
        | Err(
            Opponent(UnknownOpponent::Absent { .. }) | Questions { .. } | Elsewhere { .. } | Judge { .. },
        ) => Ok(()),
        Err(error) => Err(error),
    }
}

/// There is no environment of that name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnknownEnvironment {
    /// Not a name.
    #[error(
        "there is no environment {name}; known: arithmetic, calculator, countdown, countdown-sums, holdem, judged@TASKS:DIRECTORY, knights, kuhn, leduc, maths:FILE, sokoban, sokoban-pushes, sokoban-squares, sokoban-steps, http://HOST:PORT/"
    )]
    Name {
        /// The name that was asked for.
        name: String,
    },
    /// A game without such an opponent.
    #[error(transparent)]
    Opponent(#[from] UnknownOpponent),
    /// Nobody makes tasks at an address.
    #[error("environment {address}: {reason}")]
    Elsewhere {
        /// The address.
        address: String,
        /// Why not.
        reason: String,
    },
    /// A reward model that cannot be had.
    #[error("{name}: {reason}")]
    Judge {
        /// The name that was asked for.
        name: String,
        /// Why not.
        reason: String,
    },
    /// A question set that cannot be had.
    #[error("{name}: {reason}")]
    Questions {
        /// The name that was asked for.
        name: String,
        /// Why not.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reward_of_minus_zero_is_zero_as_on_the_wire() {
        let nothing = Reward::new(-0.0, vec![("chips".to_owned(), -0.0)], &(-1.0..=1.0)).unwrap();
        assert_eq!((nothing.value().to_bits(), nothing.components()[0].1.to_bits()), (0, 0));
    }

    #[test]
    fn rewards_that_no_gradient_should_see_are_refused() {
        let unit = 0.0..=1.0;
        assert_eq!(Reward::new(1.0, vec![], &unit).unwrap().value(), 1.0);
        assert!(matches!(Reward::new(f32::NAN, vec![], &unit), Err(RewardError::NotFinite { .. })));
        assert!(matches!(Reward::new(f32::INFINITY, vec![], &unit), Err(RewardError::NotFinite { .. })));
        assert!(matches!(Reward::new(1.5, vec![], &unit), Err(RewardError::OutOfRange { .. })));
        assert!(matches!(Reward::new(-0.1, vec![], &unit), Err(RewardError::OutOfRange { .. })));
        let nan = vec![("length".to_owned(), f32::NAN)];
        assert!(matches!(Reward::new(0.5, nan, &unit), Err(RewardError::NotFinite { .. })));
    }

    #[test]
    fn every_environment_answers_to_its_name_and_repeats_itself() {
        let known = UnknownEnvironment::Name { name: String::new() }.to_string();
        let names = known.split_once("known: ").unwrap().1;
        for name in names.split(", ").filter(|name| !name.contains(':')) {
            let environment = by_name(name).unwrap();
            assert_eq!(environment.name(), name);
            for seed in [0, 1, 77, held_out_seed(3)] {
                let task = environment.task(seed).unwrap();
                assert_eq!(environment.task(seed).unwrap(), task);
                assert!(!task.prompt.is_empty());
                let reward = environment.verify(&task, "7").unwrap();
                assert!(environment.reward_range().contains(&reward.value()), "{name}");
                assert_eq!(environment.verify(&task, "7").unwrap(), reward);
            }
        }
    }

    #[test]
    fn an_unknown_environment_is_named() {
        assert!(by_name("arithmetic").is_ok());
        assert!(by_name("chess").unwrap_err().to_string().contains("chess"));
        for name in ["kuhn:uniform", "kuhn:equilibrium", "leduc:passive", "holdem@50:tight", "holdem:uniform"]
        {
            assert_eq!(by_name(name).unwrap().name(), name);
            check_name(name).unwrap();
        }
        assert_eq!(by_name("holdem@50").unwrap().reward_range(), -50.0..=50.0);
        let text = |name| by_name(name).unwrap_err().to_string();
        assert!(text("holdem:fish").contains("station, tight, uniform"), "{}", text("holdem:fish"));
        assert!(text("kuhn:tight").contains("equilibrium"), "{}", text("kuhn:tight"));
        assert!(text("holdem@1").contains("2 to 200"), "{}", text("holdem@1"));
        assert!(text("kuhn@20").contains("kuhn"), "{}", text("kuhn@20"));
        assert!(text("holdem:http://127.0.0.1:1/v1").contains("nobody answers"));
        for name in ["holdem:self", "kuhn:best", "leduc:https://example.org/v1#large"] {
            assert!(by_name(name).is_err());
            check_name(name).unwrap();
        }
        assert!(check_name("holdem:fish").is_err());
    }

    #[test]
    fn questions_come_from_the_file_that_the_name_names() {
        let questions = |file: &str, broken| {
            assert_eq!(file, "of/my:questions.jsonl");
            let text = "{\"question\": \"1+1?\", \"answer\": \"2\"}\nnot a question\n";
            Maths::parse(text, broken).map_err(|e| e.to_string())
        };
        let guests = Guests { questions: &questions, ..Guests::none() };
        let maths = by_name_with("maths@skip:of/my:questions.jsonl", &guests).unwrap();
        assert_eq!(maths.name(), "maths");
        let refused = by_name_with("maths:of/my:questions.jsonl", &guests).unwrap_err().to_string();
        assert!(refused.starts_with("maths:of/my") && refused.contains("line 2"), "{refused}");
        check_name("maths:anything").unwrap();
        check_name("http://127.0.0.1:1/").unwrap();
        check_name("judged@arithmetic:out/judge").unwrap();
        for unknown in ["judged", "judged@arithmetic", "judged@arithmetic:", "judged@chess:out"] {
            assert!(matches!(check_name(unknown), Err(UnknownEnvironment::Name { .. })), "{unknown}");
        }
        assert!(by_name("http://127.0.0.1:1/").unwrap_err().to_string().contains("nobody is asked here"));
        for unknown in ["maths", "maths:", "maths@keep:file", "arithmetic:file"] {
            assert!(matches!(check_name(unknown), Err(UnknownEnvironment::Name { .. })), "{unknown}");
        }
    }
}
