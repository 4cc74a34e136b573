//! Who plays the other seat: scripted players by name, tables, strategies that change between hands, and whoever plays
//! by words (another model, near or far).

use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use super::super::{Environment, Guests};
use super::game::{Game, Profile, Strategy, solve};
use super::holdem::{Station, Tight};
use super::{Holdem, Kuhn, Leduc, Table};

/// Rounds of CFR+ after which Leduc is taken for solved; its exploitability is below 0.02 antes then.
const LEDUC_ITERATIONS: u32 = 100;

/// Somebody who plays by words.
pub trait Speaker: Send + Sync {
    /// What it says when it is shown `shown`, after the turns `before`: what it was shown and what it said. `seed` is for its
    /// draws.
    ///
    /// # Errors
    /// When nothing can be heard of it. That is not a lost hand: the hand is not judged.
    fn say(&self, before: &[Said], shown: &str, seed: u64) -> Result<String, String>;
}

/// One turn of a [`Speaker`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// What it was shown.
    pub shown: String,
    /// What it said.
    pub said: String,
}

/// A table that its owner replaces between hands.
#[derive(Debug, Default)]
pub struct Shared(RwLock<Arc<Profile>>);

impl Shared {
    /// From now on this is played.
    pub fn replace(&self, profile: Profile) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(profile);
    }
}

impl<G: Game> Strategy<G> for Shared {
    fn probabilities(&self, game: &G, information: &str) -> Vec<f64> {
        let profile = Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner));
        profile.probabilities(game, information)
    }
}

/// Who plays the other seat.
#[derive(Clone)]
pub enum Opponent<G: Game> {
    /// Every legal action alike.
    Uniform,
    /// The action of this number where there is one, else the last; 0 passes, checks or folds.
    Always(usize),
    /// A table or a program.
    Strategy(Arc<dyn Strategy<G> + Send + Sync>),
    /// Somebody who is asked; what is no legal action passes, checks or folds.
    Speaker(Arc<dyn Speaker>),
}

impl<G: Game> fmt::Debug for Opponent<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uniform => "Uniform",
            Self::Always(_) => "Always",
            Self::Strategy(_) => "Strategy",
            Self::Speaker(_) => "Speaker",
        })
    }
}

/// Finds a [`Speaker`] by name, or says why there is none.
pub type FindSpeaker<'a> = dyn Fn(&str) -> Result<Arc<dyn Speaker>, String> + 'a;

/// There is no such opponent at this table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnknownOpponent {
    /// Not a name.
    #[error(
        "{game} knows no opponent {opponent}; known: {known}, self, and the http address of a chat API, as in {game}:http://127.0.0.1:3001/v1"
    )]
    Name {
        /// The game.
        game: String,
        /// What was asked for.
        opponent: String,
        /// What there is.
        known: String,
    },
    /// A name, but nobody of that name is here.
    #[error("{game}:{opponent}: {reason}")]
    Absent {
        /// The game.
        game: String,
        /// Who.
        opponent: String,
        /// Why not.
        reason: String,
    },
    /// Chips to begin with.
    #[error("{game}: stacks are 2 to {most} big blinds, as in holdem@20, not {stack:?}")]
    Stack {
        /// The game.
        game: String,
        /// What was asked for.
        stack: String,
        /// Most big blinds.
        most: u32,
    },
}

/// The table of `name`: `GAME`, `GAME:OPPONENT`, for hold'em also `holdem@BIG_BLINDS:OPPONENT`. `None` when it is no card
/// game.
pub(crate) fn table(
    name: &str,
    guests: &Guests<'_>,
) -> Result<Option<Box<dyn Environment>>, UnknownOpponent> {
    let (game, opponent) = name.split_once(':').unwrap_or((name, ""));
    let (game, stack) = game.split_once('@').map_or((game, None), |(game, stack)| (game, Some(stack)));
    let wrong_stack = |stack: &str| {
        let (game, stack) = (game.to_owned(), stack.to_owned());
        UnknownOpponent::Stack { game, stack, most: Holdem::MOST_BIG_BLINDS }
    };
    match (game, stack) {
        (Kuhn::NAME, None) => {
            let equilibrium = || Kuhn::equilibrium(0.2);
            Ok(Some(Box::new(Table::named(name, Kuhn::start(), solved(opponent, guests, equilibrium)?))))
        }
        (Leduc::NAME, None) => {
            let equilibrium = || solve::<Leduc>(LEDUC_ITERATIONS);
            Ok(Some(Box::new(Table::named(name, Leduc::start(), solved(opponent, guests, equilibrium)?))))
        }
        (Holdem::NAME, stack) => {
            let start = match stack {
                None => Holdem::start(),
                Some(stack) => {
                    let n = stack.parse().ok().and_then(Holdem::with_big_blinds);
                    n.ok_or_else(|| wrong_stack(stack))?
                }
            };
            let opponent = match opponent {
                "" | "station" => Opponent::Strategy(Arc::new(Station)),
                "tight" => Opponent::Strategy(Arc::new(Tight)),
                "uniform" => Opponent::Uniform,
                other => Opponent::Speaker(guest(Holdem::NAME, other, "station, tight, uniform", guests)?),
            };
            Ok(Some(Box::new(Table::named(name, start, opponent))))
        }
        (Kuhn::NAME | Leduc::NAME, Some(stack)) => Err(wrong_stack(stack)),
        _ => Ok(None),
    }
}

fn solved<G: Game>(
    opponent: &str,
    guests: &Guests<'_>,
    equilibrium: impl Fn() -> Profile,
) -> Result<Opponent<G>, UnknownOpponent> {
    Ok(match opponent {
        "" | "uniform" => Opponent::Uniform,
        "passive" => Opponent::Always(0),
        "aggressive" => Opponent::Always(usize::MAX),
        "equilibrium" => Opponent::Strategy(Arc::new(equilibrium())),
        "best" => match &guests.best {
            Some(best) => Opponent::Strategy(Arc::clone(best) as Arc<dyn Strategy<G> + Send + Sync>),
            None => {
                let reason = "the best answer to the policy changes with it; train with training-swarm solo";
                let (game, opponent) = (G::NAME.to_owned(), opponent.to_owned());
                return Err(UnknownOpponent::Absent { game, opponent, reason: reason.to_owned() });
            }
        },
        other => {
            let known = "uniform, passive, aggressive, equilibrium, best";
            Opponent::Speaker(guest(G::NAME, other, known, guests)?)
        }
    })
}

fn guest(
    game: &str,
    opponent: &str,
    known: &str,
    guests: &Guests<'_>,
) -> Result<Arc<dyn Speaker>, UnknownOpponent> {
    let (game, named) = (game.to_owned(), opponent.to_owned());
    if opponent != "self" && !opponent.starts_with("http://") && !opponent.starts_with("https://") {
        return Err(UnknownOpponent::Name { game, opponent: named, known: known.to_owned() });
    }
    (guests.speaker)(opponent).map_err(|reason| UnknownOpponent::Absent { game, opponent: named, reason })
}
