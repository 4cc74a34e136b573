//! A batch checked against the store and the context, and its rows as attention sees them.

use std::sync::Arc;

use parallax_kernels::attention::RowRef;

use super::{ForwardBatch, Want};
use crate::{
    config::ModelConfig,
    error::ForwardError,
    ops::{attention::PagedRows, delta::StateRows},
    options::{DeviceKind, LoadOptions},
};

/// Elements that the kernels of a GPU tell apart in one matrix.
const DEVICE_ELEMENTS: usize = u32::MAX as usize;

/// Rows of one batch; what the largest prefill chunk of an engine needs, many times over.
const MAX_ROWS: usize = 1 << 20;

pub(super) fn rows(
    batch: &ForwardBatch,
    options: &LoadOptions,
    config: &ModelConfig,
) -> Result<PagedRows, ForwardError> {
    let n_rows = batch.sequences.iter().fold(0usize, |n, s| n.saturating_add(s.rows as usize));
    if n_rows == 0 || n_rows > MAX_ROWS {
        return Err(ForwardError::Batch { reason: format!("{n_rows} rows, must be within 1..={MAX_ROWS}") });
    }
    if options.device != DeviceKind::Cpu {
        let widths = config.layers.iter().map(|layer| layer.widest_row(config.hidden));
        let (wanted, widest) = (batch.n_wanted(), widths.max().unwrap_or(0));
        for (rows, width) in [(n_rows, widest), (wanted, config.vocab)] {
            if rows * width >= DEVICE_ELEMENTS {
                let reason =
                    format!("a matrix [{rows}, {width}] is too large for a GPU: send fewer rows at once");
                return Err(ForwardError::Batch { reason });
            }
        }
    }
    let mut out = PagedRows {
        positions: Vec::with_capacity(n_rows),
        rows: Vec::with_capacity(n_rows),
        tables: Vec::with_capacity(batch.sequences.len()),
        ..PagedRows::default()
    };
    let mut sequences = Vec::with_capacity(batch.sequences.len());
    for (i, sequence) in batch.sequences.iter().enumerate() {
        let end = sequence.start as usize + sequence.rows as usize;
        if end > config.max_context {
            return Err(ForwardError::Context { position: end - 1, max_context: config.max_context });
        }
        let capacity = options.kv_pages * options.kv_page_tokens;
        if end > capacity {
            return Err(ForwardError::Batch {
                reason: format!(
                    "sequence {i} has {end} positions, the key-value store holds {capacity}; load with more kv_pages"
                ),
            });
        }
        let n_pages = end.div_ceil(options.kv_page_tokens);
        if sequence.rows > 0 && sequence.pages.len() < n_pages {
            return Err(ForwardError::Batch {
                reason: format!(
                    "sequence {i} has {} pages of {} tokens for {end} positions",
                    sequence.pages.len(),
                    options.kv_page_tokens
                ),
            });
        }
        if let Some(page) = sequence.pages.iter().find(|p| **p as usize >= options.kv_pages) {
            return Err(ForwardError::Batch {
                reason: format!("sequence {i} names page {page} of a store of {}", options.kv_pages),
            });
        }
        let first = out.rows.len();
        sequences.push(StateRows {
            slot: sequence.state,
            start: sequence.start,
            rows: first..first + sequence.rows as usize,
            drafted: sequence.drafted,
            saves: sequence.saves.clone(),
        });
        for position in sequence.start..sequence.start + sequence.rows {
            out.positions.push(position);
            out.rows.push(RowRef { seq: i, n_keys: position as usize + 1 });
        }
        out.tables.push(sequence.pages.clone());
    }
    out.sequences = Arc::new(sequences);
    Ok(out)
}

/// Numbers of the rows that need logits.
pub(super) fn wanted_rows(batch: &ForwardBatch) -> Vec<u32> {
    let mut out = Vec::with_capacity(batch.n_wanted());
    let mut first = 0;
    for sequence in &batch.sequences {
        let n = sequence.rows;
        let skip = match sequence.want {
            Want::Nothing => n,
            Want::LastLogits => n.saturating_sub(1),
            Want::AllLogits => 0,
        };
        out.extend(first + skip..first + n);
        first += n;
    }
    out
}

/// Sequence and position of a row.
pub(super) fn locate(batch: &ForwardBatch, row: usize) -> (usize, u32) {
    let mut first = 0;
    for (i, sequence) in batch.sequences.iter().enumerate() {
        if row < first + sequence.rows as usize {
            return (i, sequence.start + (row - first) as u32);
        }
        first += sequence.rows as usize;
    }
    (batch.sequences.len(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Checkpoint, SequenceRows, catalogue};

    #[test]
    fn a_pass_that_a_gpu_cannot_index_is_refused_before_it_starts() {
        let tiny = Checkpoint::tiny().unwrap();
        let config = catalogue::find("meta-llama/Llama-3.1-8B").unwrap().config();
        let refused = |rows, device| {
            let sequence = SequenceRows { rows, ..SequenceRows::default() };
            let batch = ForwardBatch { sequences: vec![sequence] };
            let options = LoadOptions { device, kv_pages: 1, ..LoadOptions::whole(&tiny) };
            super::rows(&batch, &options, &config).unwrap_err().to_string()
        };
        // 2 x 14,336 wide.
        assert!(refused(149_797, DeviceKind::Wgpu).contains("too large for a GPU"));
        for (rows, device) in [(149_796, DeviceKind::Wgpu), (149_797, DeviceKind::Cpu)] {
            assert!(!refused(rows, device).contains("GPU"));
        }
    }
}
