//! Batches as messages and back. What does not change during a sequence's life travels once: the head remembers which
//! part of a page table it has sent, every stage keeps the tables of the open sequences.

use std::collections::HashMap;

use swarm_wire::generated::parallax::v1::{StageSequence, StageStep, StageWant};
use swarm_wire::{DecodeError, RequestId};

use crate::batch::{Batch, BatchSequence, CacheCopy, StateSave, Want};

/// Sequences of one step, and sequences that a stage remembers.
pub const MAX_SEQUENCES: usize = 4096;
/// Rows of one step.
pub const MAX_ROWS: usize = 65_536;

/// The head's side: which handle a sequence has and which pages the stages know.
#[derive(Debug, Default)]
pub struct StepEncoder {
    open: HashMap<RequestId, (u32, Vec<u32>)>,
    next_handle: u32,
    closed: Vec<u32>,
}

impl StepEncoder {
    /// The message for a batch.
    pub fn encode(&mut self, step_id: u64, batch: &Batch) -> StageStep {
        if self.open.len() + batch.sequences.len() > MAX_SEQUENCES {
            // Somebody forgot to release: whoever is not in this batch is opened again when it comes back.
            let used = |id: &RequestId| batch.sequences.iter().any(|s| s.request == *id);
            let stale: Vec<RequestId> = self.open.keys().copied().filter(|id| !used(id)).collect();
            stale.into_iter().for_each(|id| self.release(id));
        }
        let sequences = batch.sequences.iter().map(|sequence| self.sequence(sequence)).collect();
        StageStep {
            step_id,
            sequences,
            closed: std::mem::take(&mut self.closed),
            hidden_rows: 0,
            want_hidden: batch.want_hidden,
            copies: batch.copies.iter().flat_map(|copy| [copy.from, copy.to]).collect(),
            state_copies: batch.state_copies.iter().flat_map(|copy| [copy.from, copy.to]).collect(),
        }
    }

    /// The sequence has ended; the next step tells the stages.
    pub fn release(&mut self, id: RequestId) {
        if let Some((handle, _)) = self.open.remove(&id) {
            self.closed.push(handle);
        }
    }

    fn sequence(&mut self, sequence: &BatchSequence) -> StageSequence {
        let known =
            self.open.get(&sequence.request).is_some_and(|(_, sent)| sequence.pages.starts_with(sent));
        if !known {
            self.release(sequence.request);
            self.open.insert(sequence.request, (self.next_handle, Vec::new()));
            self.next_handle = self.next_handle.wrapping_add(1);
        }
        let (handle, sent) = self.open.get_mut(&sequence.request).expect("inserted above");
        let new_pages = sequence.pages[sent.len()..].to_vec();
        sent.extend_from_slice(&new_pages);
        let want = match sequence.want {
            Want::Nothing => StageWant::Nothing,
            Want::LastLogits => StageWant::LastLogits,
            Want::AllLogits => StageWant::AllLogits,
        };
        StageSequence {
            handle: *handle,
            start: sequence.start,
            rows: sequence.rows,
            want: want.into(),
            opened: !known,
            new_pages,
            adapter: sequence.adapter.unwrap_or(0),
            state: sequence.state,
            drafted: sequence.drafted,
            saves: sequence.saves.iter().flat_map(|save| [save.position, save.slot]).collect(),
        }
    }
}

/// A stage's side: the page tables of open sequences.
#[derive(Debug)]
pub struct StepDecoder {
    tables: HashMap<u32, Vec<u32>>,
    n_pages: u32,
    page_tokens: u32,
}

impl StepDecoder {
    /// For a store of `n_pages` pages of `page_tokens` positions.
    pub fn new(n_pages: u32, page_tokens: u32) -> Self {
        Self { tables: HashMap::new(), n_pages, page_tokens: page_tokens.max(1) }
    }

    /// The batch of a message.
    ///
    /// # Errors
    /// When it names unknown sequences or pages, or positions without a page, or is too large.
    pub fn decode(&mut self, step: &StageStep) -> Result<Batch, DecodeError> {
        for handle in &step.closed {
            self.tables.remove(handle);
        }
        if step.sequences.len() > MAX_SEQUENCES {
            return Err(DecodeError::invalid("number of sequences", step.sequences.len()));
        }
        let mut n_rows = 0usize;
        let mut sequences = Vec::with_capacity(step.sequences.len());
        for sequence in &step.sequences {
            n_rows = n_rows.saturating_add(sequence.rows as usize);
            if sequence.rows == 0 || n_rows > MAX_ROWS {
                return Err(DecodeError::invalid("rows of a step", n_rows));
            }
            sequences.push(self.sequence(sequence)?);
        }
        Ok(Batch {
            step: step.step_id,
            want_hidden: step.want_hidden,
            copies: copies(&step.copies, self.n_pages)?,
            // Which slots there are, the stage knows.
            state_copies: copies(&step.state_copies, u32::MAX)?,
            sequences,
        })
    }

    fn sequence(&mut self, sequence: &StageSequence) -> Result<BatchSequence, DecodeError> {
        if sequence.opened {
            if self.tables.len() >= 2 * MAX_SEQUENCES {
                return Err(DecodeError::invalid("number of open sequences", self.tables.len()));
            }
            self.tables.insert(sequence.handle, Vec::new());
        }
        let table = self
            .tables
            .get_mut(&sequence.handle)
            .ok_or_else(|| DecodeError::invalid("sequence handle", sequence.handle))?;
        if let Some(page) = sequence.new_pages.iter().find(|&&page| page >= self.n_pages) {
            return Err(DecodeError::invalid("cache page", page));
        }
        if table.len() + sequence.new_pages.len() > self.n_pages as usize {
            return Err(DecodeError::invalid(
                "length of a page table",
                table.len() + sequence.new_pages.len(),
            ));
        }
        table.extend_from_slice(&sequence.new_pages);
        let end = u64::from(sequence.start) + u64::from(sequence.rows);
        if end > table.len() as u64 * u64::from(self.page_tokens) {
            return Err(DecodeError::invalid("last position of a sequence", end));
        }
        let want = match StageWant::try_from(sequence.want) {
            Ok(StageWant::Nothing) => Want::Nothing,
            Ok(StageWant::LastLogits) => Want::LastLogits,
            Ok(StageWant::AllLogits) => Want::AllLogits,
            Err(_) => return Err(DecodeError::invalid("wanted logits", sequence.want)),
        };
        let saves = pairs(&sequence.saves)?.iter().map(|&[position, slot]| StateSave { position, slot });
        Ok(BatchSequence {
            request: RequestId(u64::from(sequence.handle)),
            start: sequence.start,
            rows: sequence.rows,
            want,
            pages: table.clone(),
            state: sequence.state,
            drafted: sequence.drafted,
            saves: saves.collect(),
            adapter: (sequence.adapter != 0).then_some(sequence.adapter),
        })
    }
}

/// Numbers that belong together, two by two.
fn pairs(numbers: &[u32]) -> Result<&[[u32; 2]], DecodeError> {
    let (pairs, rest) = numbers.as_chunks();
    if !rest.is_empty() || pairs.len() > MAX_SEQUENCES {
        return Err(DecodeError::invalid("number of pairs", pairs.len()));
    }
    Ok(pairs)
}

/// Copies among `n` pages or slots.
fn copies(numbers: &[u32], n: u32) -> Result<Vec<CacheCopy>, DecodeError> {
    let copy = |&[from, to]: &[u32; 2]| {
        if from.max(to) < n && from != to {
            Ok(CacheCopy { from, to })
        } else {
            Err(DecodeError::invalid("page or state to copy", format!("{from} to {to}")))
        }
    };
    pairs(numbers)?.iter().map(copy).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use swarm_wire::prost::Message;

    use super::*;

    fn sequence(id: u64, start: u32, rows: u32, pages: &[u32]) -> BatchSequence {
        BatchSequence {
            request: RequestId(id),
            start,
            rows,
            want: Want::LastLogits,
            pages: pages.to_vec(),
            ..BatchSequence::default()
        }
    }

    fn batch(sequences: Vec<BatchSequence>) -> Batch {
        Batch { sequences, ..Batch::default() }
    }

    #[test]
    fn page_tables_travel_once_and_arrive_whole() {
        let (mut head, mut stage) = (StepEncoder::default(), StepDecoder::new(100, 16));
        let first = head.encode(1, &batch(vec![sequence(7, 0, 40, &[3, 1, 4])]));
        assert_eq!(first.sequences[0].new_pages, [3, 1, 4]);
        stage.decode(&first).unwrap();
        let second = head.encode(2, &batch(vec![sequence(7, 40, 1, &[3, 1, 4])]));
        assert!(second.sequences[0].new_pages.is_empty() && !second.sequences[0].opened);
        assert!(second.encoded_len() < 20, "a decode step is a few bytes: {}", second.encoded_len());
        assert_eq!(stage.decode(&second).unwrap().sequences[0].pages, [3, 1, 4]);
        let grown = head.encode(3, &batch(vec![sequence(7, 48, 1, &[3, 1, 4, 9])]));
        assert_eq!(grown.sequences[0].new_pages, [9]);
        assert_eq!(stage.decode(&grown).unwrap().sequences[0].pages, [3, 1, 4, 9]);
        // Another table under the same id (paged out and in again) is sent whole.
        let moved = head.encode(4, &batch(vec![sequence(7, 49, 1, &[5, 6, 7, 8])]));
        assert!(moved.sequences[0].opened);
        assert_eq!(stage.decode(&moved).unwrap().sequences[0].pages, [5, 6, 7, 8]);
        assert_eq!(stage.tables.len(), 1, "the old handle was closed");
    }

    #[test]
    fn copies_and_states_travel_in_order_and_are_checked() {
        let copies = vec![CacheCopy { from: 3, to: 1 }, CacheCopy { from: 0, to: 3 }];
        let state_copies = vec![CacheCopy { from: 9, to: 1 }];
        let saves = vec![StateSave { position: 1, slot: 5 }, StateSave { position: 3, slot: 0 }];
        let rows = BatchSequence { state: 2, drafted: 3, saves, ..sequence(7, 0, 4, &[1]) };
        let sent = Batch { copies, state_copies, ..batch(vec![rows]) };
        let step = StepEncoder::default().encode(1, &sent);
        let got = StepDecoder::new(4, 4).decode(&step).unwrap();
        assert_eq!((&got.copies, &got.state_copies), (&sent.copies, &sent.state_copies));
        let named = |batch: &Batch| batch.sequences[0].clone();
        assert_eq!(named(&got), BatchSequence { request: named(&got).request, ..named(&sent) });
        let mut odd = step.clone();
        odd.sequences[0].saves.pop();
        assert!(StepDecoder::new(4, 4).decode(&odd).is_err());
        let odd = StageStep { state_copies: vec![1, 2, 3], ..step.clone() };
        assert!(StepDecoder::new(4, 4).decode(&odd).is_err());
        for bad in [vec![0, 4], vec![4, 0], vec![2, 2], vec![0]] {
            let step = StageStep { copies: bad, ..step.clone() };
            assert!(StepDecoder::new(4, 4).decode(&step).is_err());
        }
    }

    #[test]
    fn steps_that_do_not_fit_are_refused() {
        let good =
            StageSequence { handle: 1, rows: 4, opened: true, new_pages: vec![0], ..Default::default() };
        let refused = |sequence: StageSequence| {
            let step = StageStep { sequences: vec![sequence], ..Default::default() };
            StepDecoder::new(2, 4).decode(&step).is_err()
        };
        assert!(!refused(good.clone()));
        assert!(refused(StageSequence { opened: false, ..good.clone() }), "unknown handle");
        assert!(refused(StageSequence { rows: 0, ..good.clone() }));
        assert!(refused(StageSequence { rows: 5, ..good.clone() }), "more rows than pages");
        assert!(refused(StageSequence { start: u32::MAX, ..good.clone() }));
        assert!(refused(StageSequence { new_pages: vec![2], ..good.clone() }), "no such page");
        assert!(
            refused(StageSequence { new_pages: vec![0, 1, 1], ..good.clone() }),
            "more pages than there are"
        );
        assert!(refused(StageSequence { want: 9, ..good }));
    }

    proptest! {
        #[test]
        fn any_life_of_sequences_arrives_as_it_was_sent(
            events in proptest::collection::vec((0u64..4, 1u32..6, any::<bool>()), 1..40),
        ) {
            let (mut head, mut stage) = (StepEncoder::default(), StepDecoder::new(1000, 4));
            let mut live: HashMap<u64, (u32, Vec<u32>)> = HashMap::new();
            let mut page = 0;
            for (step, (id, rows, ends)) in events.into_iter().enumerate() {
                let (start, pages) = live.entry(id).or_default();
                while pages.len() * 4 < (*start + rows) as usize { pages.push(page); page += 1; }
                let sent = batch(vec![sequence(id, *start, rows, pages)]);
                *start += rows;
                let got = stage.decode(&head.encode(step as u64, &sent)).unwrap();
                prop_assert_eq!(&got.sequences[0].pages, &sent.sequences[0].pages);
                prop_assert_eq!(got.sequences[0].start, sent.sequences[0].start);
                if ends { head.release(RequestId(id)); live.remove(&id); }
            }
            prop_assert!(stage.tables.len() <= live.len() + 1);
        }
    }
}
