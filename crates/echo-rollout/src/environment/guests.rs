//! What an environment takes that is no setting: opponents from outside, question sets from files, whole environments
//! from elsewhere, reward models.

use std::fmt;
use std::sync::Arc;

use super::Environment;
use super::cards::{FindSpeaker, Shared};
use super::maths::{BrokenLines, Maths};

/// Reads the question set in a file, or says why there is none.
pub type FindQuestions<'a> = dyn Fn(&str, BrokenLines) -> Result<Maths, String> + 'a;

/// Meets the environment at an http address, or says why there is none.
pub type FindEnvironment<'a> = dyn Fn(&str) -> Result<Box<dyn Environment>, String> + 'a;

/// Puts the reward model in a directory in the place of the verifier of these tasks, or says why there is none.
pub type FindJudge<'a> = dyn Fn(Box<dyn Environment>, &str) -> Result<Box<dyn Environment>, String> + 'a;

/// What only a caller can bring.
pub struct Guests<'a> {
    /// Plays `best`: its owner keeps it the best answer to the policy in training. Kuhn and Leduc only.
    pub best: Option<Arc<Shared>>,
    /// Finds who plays `self` (an earlier version of the policy) or an http address.
    pub speaker: &'a FindSpeaker<'a>,
    /// Reads the file of `maths:FILE`.
    pub questions: &'a FindQuestions<'a>,
    /// Asks who is at an http address that stands where a name does.
    pub elsewhere: &'a FindEnvironment<'a>,
    /// Reads the reward model of `judged@TASKS:DIRECTORY`.
    pub judge: &'a FindJudge<'a>,
}

impl Guests<'static> {
    /// Nobody comes.
    pub fn none() -> Self {
        Self {
            best: None,
            speaker: &|_| Err("nobody answers here".to_owned()),
            questions: &|_, _| Err("no files are read here".to_owned()),
            elsewhere: &|_| Err("nobody is asked here".to_owned()),
            judge: &|_, _| Err("no reward models are read here".to_owned()),
        }
    }
}

impl fmt::Debug for Guests<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Guests(best: {})", self.best.is_some())
    }
}
