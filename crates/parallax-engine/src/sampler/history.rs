//! The tokens that penalties look at.

use std::collections::BTreeMap;

use crate::sampling::SamplingParams;

/// How often each token of a sequence occurs in its answer; tokens of the prompt alone occur 0 times.
///
/// The repetition penalty looks at prompt and answer (as transformers and vLLM do), presence and frequency at the answer
/// alone (as OpenAI defines them).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    occurrences: BTreeMap<u32, u32>,
}

impl History {
    /// Before the first token of the answer.
    pub fn new(prompt: &[u32]) -> Self {
        Self { occurrences: prompt.iter().map(|id| (*id, 0)).collect() }
    }

    /// One more token of the answer.
    pub fn push(&mut self, id: u32) {
        let times = self.occurrences.entry(id).or_default();
        *times = times.saturating_add(1);
    }

    /// Applies the three penalties to logits `[V]`.
    pub fn penalise(&self, logits: &mut [f32], params: &SamplingParams) {
        for (&id, &times) in &self.occurrences {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            if *logit > 0.0 {
                *logit /= params.repetition_penalty;
            } else {
                *logit *= params.repetition_penalty;
            }
            if times > 0 {
                *logit -= params.frequency_penalty * times as f32 + params.presence_penalty;
            }
        }
    }
}
