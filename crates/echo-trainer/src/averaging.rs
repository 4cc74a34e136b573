//! Several trainers make one step: each computes a share of the batch's gradients, all of them add the shares, and nobody's
//! weights move before all have come to the same sum.
//!
//! Pure: what came and what time it is are arguments, what is to be done is returned. One trainer leads: it says who takes part
//! ([`Leader`]); every trainer, the leader too, is a [`Member`]. An attempt goes
//!
//! 1. the leader says `Begin` with the members in order and the hash of the state that the step begins with;
//! 2. every member computes the share of its place and sends it to all;
//! 3. a member that has all shares adds them *in the order of the members*, whoever was first, and sends the hashes of the shares
//!    and of the sum to the leader;
//! 4. when all hashes agree the leader says `Commit`, and each member applies the sum that it has.
//!
//! A share is the gradient of its rows with the weights that they have in the whole batch, so the sum is the average that one
//! trainer would have come to. Who is late, sends different shares to different members or comes to another sum is named, and the
//! step is attempted again without it; in the end the leader makes it alone. An attempt that is given up has changed nothing. A
//! member that missed a `Commit` hears of it with the next `Begin`; one that cannot follow says `Behind` and is left out until
//! it has been given the state ([`Leader::admit`]).
//!
//! What this does not find: a member that computes a wrong share and sends the same wrong share to everybody.

mod leader;
mod member;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use swarm_wire::PeerId;

use crate::parameters::Gradients;

pub use leader::{Exclusion, Leader, LeaderAction, LeaderConfig};
pub use member::{Member, MemberAction};

/// BLAKE3.
pub type Hash = [u8; 32];

/// Most trainers of one step.
pub const MAX_MEMBERS: usize = 64;

/// One try at one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Attempt {
    /// The step: it makes version `step + 1`.
    pub step: u64,
    /// How many tries at it came before.
    pub number: u32,
}

/// What trainers say to each other. Who says it is known from the connection.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// Leader to all: compute your share.
    Begin {
        /// Of which attempt.
        attempt: Attempt,
        /// Who takes part, the leader first; a member's place is its share.
        members: Vec<PeerId>,
        /// Hash of the state that the step begins with.
        state: Hash,
        /// The attempt that made this state, for members that have not heard of its commit.
        committed: Option<Attempt>,
    },
    /// Member to all: my share.
    Share {
        /// Of which attempt.
        attempt: Attempt,
        /// The gradients of its rows.
        gradients: Arc<Gradients>,
    },
    /// Member to leader: what I have, and what it comes to.
    Sum {
        /// Of which attempt.
        attempt: Attempt,
        /// Hashes of all shares, in the order of the members.
        shares: Vec<Hash>,
        /// Hash of their sum.
        sum: Hash,
    },
    /// Leader to all: everybody has this sum.
    Commit {
        /// Of which attempt.
        attempt: Attempt,
    },
    /// Member to leader: my state is another one.
    Behind {
        /// Which attempt it cannot take part in.
        attempt: Attempt,
    },
}

/// The hash that gradients are compared by.
pub fn hash(gradients: &Gradients) -> Hash {
    let mut hasher = blake3::Hasher::new_derive_key("echo-trainer gradients v1");
    for values in &gradients.values {
        hasher.update(&(values.len() as u64).to_le_bytes());
        for part in values.chunks(1024) {
            let bytes: Vec<u8> = part.iter().flat_map(|v| v.to_le_bytes()).collect();
            hasher.update(&bytes);
        }
    }
    *hasher.finalize().as_bytes()
}

/// Which of `n` parts of a batch the member at `place` of `of` computes: its even share, in order.
///
/// # Panics
/// Nobody takes part: a mistake of the calling program.
pub fn share(n: usize, place: usize, of: usize) -> std::ops::Range<usize> {
    assert!(place < of, "a member has a place");
    n * place / of..n * (place + 1) / of
}
