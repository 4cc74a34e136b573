//! The samples of one prompt, complete: what group-relative advantages are computed from.

use crate::lease::GroupId;
use crate::rollout::Trajectory;

/// All samples of one prompt, in the order of their indices.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Its number.
    pub id: GroupId,
    /// Names the task.
    pub task_seed: u64,
    /// One trajectory per sample index.
    pub trajectories: Vec<Trajectory>,
}

impl Group {
    /// The rewards, in the order of the samples.
    pub fn rewards(&self) -> Vec<f32> {
        self.trajectories.iter().map(|t| t.reward().value()).collect()
    }
}
