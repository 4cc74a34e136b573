//! Card games against an opponent: Kuhn and Leduc poker, small enough to be solved exactly, and heads-up no-limit hold'em.
//!
//! The deal, the seat and the opponent's draws come from the task's seed, so that a group's samples play the same cards
//! and a transcript can be judged again; not so where a [`Speaker`] plays, who may answer otherwise. Seeds come in pairs: 2k and 2k + 1 are the same deal with the seats swapped, so
//! that luck cancels where both are played.

pub mod game;
pub mod holdem;
mod kuhn;
mod leduc;
mod opponent;
mod table;

pub use game::{Game, Node, Profile, Strategy};
pub use holdem::Holdem;
pub use kuhn::Kuhn;
pub use leduc::Leduc;
pub(crate) use opponent::table;
pub use opponent::{FindSpeaker, Opponent, Said, Shared, Speaker, UnknownOpponent};
pub use table::Table;
