//! From what a runner returned to events: log-probabilities, chosen tokens, endings.

use std::borrow::Cow;
use std::ops::Range;

use swarm_wire::RequestId;

use super::Engine;
use crate::batch::{Batch, BatchSequence, StageOutput, Want};
use crate::error::{Failure, StageError};
use crate::request::{Event, FinishReason, RequestEvent, Token};
use crate::sequence::Sequence;

/// The wanted rows of a forward pass.
struct Rows<'a> {
    /// [W, V]
    logits: &'a [f32],
    vocab: usize,
    /// [W, H], or nothing.
    hidden: &'a [f32],
    width: usize,
}

impl<'a> Rows<'a> {
    fn logits(&self, row: usize) -> &'a [f32] {
        &self.logits[row * self.vocab..(row + 1) * self.vocab]
    }

    fn hidden(&self, row: usize) -> Vec<f32> {
        self.hidden[row * self.width..(row + 1) * self.width].to_vec()
    }
}

impl Engine {
    pub(super) fn sample(
        &mut self,
        batch: &Batch,
        output: &StageOutput,
    ) -> Result<Vec<RequestEvent>, StageError> {
        let (wanted, vocab) = (batch.n_wanted(), self.shape.vocab);
        let missing = |what: &str| StageError::Tensor {
            expected: format!("{what} of {wanted} rows"),
            got: "none".into(),
        };
        let logits = match &output.logits {
            Some(logits) => logits.to_f32_rows(wanted, vocab)?,
            None if wanted == 0 => Cow::default(),
            None => return Err(missing("logits")),
        };
        let hidden = match &output.hidden {
            Some(hidden) if batch.want_hidden => hidden.to_f32_rows(wanted, self.shape.hidden)?,
            None if batch.want_hidden => return Err(missing("hidden states")),
            _ => Cow::default(),
        };
        let rows = Rows { logits: &logits, vocab, hidden: &hidden, width: self.shape.hidden };
        let mut events = Vec::with_capacity(wanted);
        let mut first = 0;
        for planned in &batch.sequences {
            let last = first + planned.n_wanted();
            self.take_rows(planned, first..last, &rows, &mut events);
            first = last;
        }
        Ok(events)
    }

    /// What the rows of one sequence say: log-probabilities of its prompt, its next token, and the tokens after that as
    /// far as a draft guessed them.
    fn take_rows(
        &mut self,
        planned: &BatchSequence,
        wanted: Range<usize>,
        rows: &Rows<'_>,
        events: &mut Vec<RequestEvent>,
    ) {
        let request = planned.request;
        let sequence = self.scheduler.running_mut(request).expect("planned sequences are running");
        let draft = sequence.take_draft();
        if planned.want == Want::AllLogits && sequence.wants_prompt_logprobs() {
            for (position, row) in (sequence.cached()..).zip(wanted.clone()) {
                if let Some(target) = sequence.prompt_target(position) {
                    let logprobs = self.sampler.logprobs(rows.logits(row));
                    sequence.push_prompt_logprob(logprobs[target as usize]);
                }
            }
        }
        let chooses = sequence.advance(planned.rows as usize - draft.len());
        if !chooses {
            self.publish(request);
            return;
        }
        let prompt_logprobs = sequence.take_prompt_logprobs();
        let is_first = sequence.generated() == 0;
        let cached_tokens = sequence.usage().cached_tokens;
        let first = wanted.end - 1 - draft.len();
        if is_first {
            self.fork_followers(request, first, prompt_logprobs.as_deref(), rows, events);
            let event = Event::Prompt { cached_tokens, logprobs: prompt_logprobs };
            events.push(RequestEvent { request, event });
        }
        self.choose(request, &draft, first, rows, events);
        self.publish(request);
    }

    /// The prompt of `leader` is cached and its last row is `row`: the other answers to it begin here.
    fn fork_followers(
        &mut self,
        leader: RequestId,
        row: usize,
        prompt_logprobs: Option<&[f32]>,
        rows: &Rows<'_>,
        events: &mut Vec<RequestEvent>,
    ) {
        for mut follower in self.scheduler.take_followers(leader, &self.cache) {
            let request = follower.id();
            let leader_now = self.scheduler.running_mut(leader).expect("it runs in this step");
            follower.begin_forked(leader_now);
            self.cache.fork(leader, request, follower.cached()).expect("states were counted");
            let wanted = follower.take_prompt_logprobs().is_some();
            let logprobs = prompt_logprobs.filter(|_| wanted).map(<[f32]>::to_vec);
            let event = Event::Prompt { cached_tokens: follower.usage().cached_tokens, logprobs };
            events.push(RequestEvent { request, event });
            self.scheduler.run(follower);
            self.choose(request, &[], row, rows, events);
        }
    }

    /// The next tokens of a sequence of which no row is due: one from row `first`, and one more for every guess in `draft`
    /// that turns out right.
    fn choose(
        &mut self,
        request: RequestId,
        draft: &[u32],
        first: usize,
        rows: &Rows<'_>,
        events: &mut Vec<RequestEvent>,
    ) {
        let sequence = self.scheduler.running_mut(request).expect("planned sequences are running");
        self.counted.speculations += u64::from(!draft.is_empty());
        self.counted.speculated_tokens += draft.len() as u64;
        let (mut ending, mut right) = (None, 0);
        for (i, row) in (first..=first + draft.len()).enumerate() {
            let sampled = match sequence.choose(&self.sampler, rows.logits(row)) {
                Ok(sampled) => sampled,
                Err(error) => {
                    ending = Some((FinishReason::Error, Some(error.into())));
                    break;
                }
            };
            self.counted.generated_tokens += 1;
            let guessed = draft.get(i) == Some(&sampled.id);
            let token = Token {
                id: sampled.id,
                logprob: sampled.logprob,
                sampled_logprob: sampled.sampled_logprob,
                version: self.version,
                hidden: sequence.capture_hidden().then(|| rows.hidden(row)),
                top_logprobs: sampled.top_logprobs,
            };
            events.push(RequestEvent { request, event: Event::Token(token) });
            if sequence.is_stopped() {
                ending = Some((FinishReason::Stop, None));
            } else if sequence.is_full() {
                ending = Some((FinishReason::Length, None));
            }
            if ending.is_some() || !guessed {
                break;
            }
            // The row of the guessed token ran in this very pass.
            sequence.advance(1);
            right += 1;
        }
        sequence.learn(draft.len(), right, self.draft_tokens);
        self.counted.accepted_tokens += right as u64;
        if let Some((reason, error)) = ending {
            // The pages stay in the index as they are: a conversation often goes on from here.
            self.publish(request);
            let sequence = self.scheduler.remove(request).expect("it was running a moment ago");
            self.cache.release(request);
            events.push(self.finished(&sequence, reason, error));
        }
    }

    /// What a running sequence has cached can answer others from now on.
    fn publish(&mut self, request: RequestId) {
        if self.reuse
            && let Some(sequence) = self.scheduler.running_mut(request)
            && let Some(root) = sequence.root()
        {
            self.cache.publish(request, root, &sequence.tokens()[..sequence.cached()]);
        }
    }

    pub(super) fn fail(&mut self, error: &StageError) -> Vec<RequestEvent> {
        let events = self.end_all(FinishReason::Error, Some(&error.clone().into()));
        self.cache.forget();
        events
    }

    pub(super) fn end_all(&mut self, reason: FinishReason, error: Option<&Failure>) -> Vec<RequestEvent> {
        let ended = self.scheduler.drain();
        let end = |sequence: &Sequence| {
            self.cache.release(sequence.id());
            self.finished(sequence, reason, error.cloned())
        };
        ended.iter().map(end).collect()
    }

    pub(super) fn finished(
        &mut self,
        sequence: &Sequence,
        reason: FinishReason,
        error: Option<Failure>,
    ) -> RequestEvent {
        self.counted.count_finished(reason);
        if let Some(drafter) = &mut self.drafter {
            drafter.close(sequence.id());
        }
        let event = Event::Finished { reason, error, usage: sequence.usage() };
        RequestEvent { request: sequence.id(), event }
    }
}
