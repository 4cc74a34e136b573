//! Folding of values that the units of a cube left in shared memory.

use cubecl::prelude::*;

/// How two values become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Fold {
    Sum,
    Max,
}

/// Folds `n` lines of `lanes` values (a power of two), each into its first value, by halves. The lines begin `apart` from each
/// other; `at` is the unit's place in the first one, and `lane` its number there. Every unit of the cube must come here: it waits
/// for what the others wrote before, and for what they folded after.
#[cube]
pub(super) fn fold(
    shared: &mut Shared<[f32]>,
    at: usize,
    lane: usize,
    #[comptime] lanes: usize,
    #[comptime] n: usize,
    #[comptime] apart: usize,
    #[comptime] by: Fold,
) {
    sync_cube();
    #[unroll]
    for level in 0..comptime!(lanes.trailing_zeros() as usize) {
        let width = comptime!(lanes >> (level + 1));
        if lane < width {
            #[unroll]
            for line in 0..n {
                let own = at + comptime!(line * apart);
                let other = shared[own + width];
                let mine = shared[own];
                if comptime!(by == Fold::Sum) {
                    shared[own] = mine + other;
                } else {
                    shared[own] = mine.max(other);
                }
            }
        }
        sync_cube();
    }
}
