//! Shortest solutions by breadth-first search over (player, boxes). Exact for the small levels that are drawn here.

use std::collections::{HashMap, VecDeque};

use super::level::{Level, Move};

/// A shortest solution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Solution {
    /// The moves.
    pub moves: Vec<Move>,
    /// How many of them push a box.
    pub pushes: usize,
}

/// The player and the boxes, which is all that changes.
type Key = (usize, Vec<usize>);

/// The shortest solution of `level` in moves, or `None` when there is none within `max_states` positions.
pub fn solve(level: &Level, max_states: usize) -> Option<Solution> {
    let key = |l: &Level| (l.player(), l.boxes().to_vec());
    if level.solved() {
        return Some(Solution { moves: Vec::new(), pushes: 0 });
    }
    let mut play = level.clone();
    // Where each position was first reached from.
    let mut from: HashMap<Key, Option<(Key, Move)>> = HashMap::from([(key(level), None)]);
    let mut open = VecDeque::from([key(level)]);
    while let Some(here) = open.pop_front() {
        for step in Move::ALL {
            play.set(here.0, &here.1);
            if play.step(step).is_none() {
                continue;
            }
            let there = key(&play);
            if from.contains_key(&there) {
                continue;
            }
            if from.len() >= max_states {
                return None;
            }
            from.insert(there.clone(), Some((here.clone(), step)));
            if play.solved() {
                return Some(walked(level, &from, &there));
            }
            open.push_back(there);
        }
    }
    None
}

/// The moves from `level` to the position `end`.
fn walked(level: &Level, from: &HashMap<Key, Option<(Key, Move)>>, end: &Key) -> Solution {
    let mut moves = Vec::new();
    let mut at = end;
    while let Some(Some((before, step))) = from.get(at) {
        moves.push(*step);
        at = before;
    }
    moves.reverse();
    let mut replay = level.clone();
    let pushes = moves.iter().filter(|m| replay.step(**m) == Some(true)).count();
    Solution { moves, pushes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solutions_are_shortest_and_a_stuck_box_has_none() {
        let one: Level = "######\n#@ $.#\n#    #\n######".parse().unwrap();
        let solution = solve(&one, 1000).unwrap();
        assert_eq!((solution.moves.len(), solution.pushes), (2, 1));
        let around: Level = "######\n# .  #\n# $  #\n# @  #\n######".parse().unwrap();
        assert_eq!(solve(&around, 1000).unwrap().moves, [Move::Up]);
        let corner: Level = "#####\n#$ .#\n#  @#\n#####".parse().unwrap();
        assert_eq!(solve(&corner, 10_000), None);
        assert_eq!(solve(&one, 1), None, "the bound is kept");
    }

    /// All positions to a depth, the slow way: no shorter solution may exist.
    #[test]
    fn exhaustive_search_agrees() {
        let level: Level = "######\n#.   #\n# $  #\n#  @ #\n######".parse().unwrap();
        let n = solve(&level, 10_000).unwrap().moves.len();
        let solvable_in = |depth: u32| {
            (0..4_u64.pow(depth)).any(|code| {
                let mut play = level.clone();
                (0..depth).any(|i| {
                    play.step(Move::ALL[(code >> (2 * i) & 3) as usize]);
                    play.solved()
                })
            })
        };
        assert!(solvable_in(n as u32) && !solvable_in(n as u32 - 1), "{n}");
    }
}
