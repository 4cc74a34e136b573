//! Card games against an opponent: Kuhn and Leduc poker, small enough to be solved exactly.
//!
//! The deal, the seat and the opponent's draws come from the task's seed, so that a group's samples play the same cards
//! and a transcript can be judged again.

pub mod game;
mod kuhn;
mod leduc;
mod table;

pub use game::{Game, Node, Profile, Strategy};
pub use kuhn::Kuhn;
pub use leduc::Leduc;
pub use table::{Opponent, Table};
