//! What one forward pass runs: ragged rows of several sequences, their positions and page tables, and tensors.
//!
//! Nothing here knows a tensor library: a batch looks the same to a stage in this process and to one on another
//! machine.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use swarm_wire::{DType, RequestId};

use crate::error::StageError;

/// Rows of several sequences, concatenated in the order of `sequences`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Counts forward passes of this engine.
    pub step: u64,
    /// The last stage shall also return the final-norm rows behind the wanted logits.
    pub want_hidden: bool,
    /// Pages to copy before anything is written, in this order.
    pub copies: Vec<CacheCopy>,
    /// Slots of recurrent states to copy likewise.
    pub state_copies: Vec<CacheCopy>,
    /// The sequences, each at most once.
    pub sequences: Vec<BatchSequence>,
}

/// A cache page, or the slot of a recurrent state, whose content in every layer is to be copied into another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheCopy {
    /// What is shared.
    pub from: u32,
    /// What somebody will write on.
    pub to: u32,
}

/// A copy of a sequence's recurrent state to keep on the way through its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSave {
    /// Of the state before the row at this position, which is in the batch.
    pub position: u32,
    /// Where to.
    pub slot: u32,
}

/// The rows of one sequence in a batch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BatchSequence {
    /// Whose rows; stable over the life of a request.
    pub request: RequestId,
    /// Position of the first row. Positions before it are in the cache.
    pub start: u32,
    /// Number of rows, at least one.
    pub rows: u32,
    /// Page table of the whole sequence so far: covers `start + rows` positions.
    pub pages: Vec<u32>,
    /// Slot of its recurrent state, which stands behind the positions before `start`; nobody else's in this batch. It begins anew
    /// with position 0. 0 where the runner has none ([`crate::StageShape::state_slots`]).
    pub state: u32,
    /// The last so many positions, of these rows or of batches before, may be taken back: a later batch may begin at any of them.
    pub drafted: u32,
    /// Copies of its recurrent state to keep, by rising positions.
    pub saves: Vec<StateSave>,
    /// Which rows go through the head.
    pub want: Want,
    /// The resident adapter that these rows use; `None` is what [`crate::StageRunner::set_adapter`] installed.
    pub adapter: Option<u32>,
}

/// Which rows of a sequence go through the head.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Want {
    /// None: the prompt goes on in a later batch.
    #[default]
    Nothing,
    /// The last row: a token is to be chosen.
    LastLogits,
    /// All rows: the sequence is being scored.
    AllLogits,
}

impl Batch {
    /// Rows of all sequences (T).
    pub fn n_rows(&self) -> usize {
        self.sequences.iter().map(|s| s.rows as usize).sum()
    }

    /// Rows that go through the head (W).
    pub fn n_wanted(&self) -> usize {
        self.sequences.iter().map(BatchSequence::n_wanted).sum()
    }

    /// Indices into the T rows of those that go through the head, ascending.
    pub fn wanted_rows(&self) -> Vec<usize> {
        let mut wanted = Vec::with_capacity(self.n_wanted());
        let mut first = 0;
        for sequence in &self.sequences {
            let end = first + sequence.rows as usize;
            wanted.extend(end - sequence.n_wanted()..end);
            first = end;
        }
        wanted
    }
}

impl BatchSequence {
    /// Rows of this sequence that go through the head.
    pub fn n_wanted(&self) -> usize {
        match self.want {
            Want::Nothing => 0,
            Want::LastLogits => 1,
            Want::AllLogits => self.rows as usize,
        }
    }
}

/// What a stage returns.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StageOutput {
    /// Not the last stage: hidden rows [T, H] for the next. Last stage: final-norm rows [W, H] behind the logits, if
    /// [`Batch::want_hidden`].
    pub hidden: Option<Tensor>,
    /// Last stage: logits [W, V] of the wanted rows, absent if there are none.
    pub logits: Option<Tensor>,
}

/// A tensor: type, shape and row-major elements. Numbers made in this process stay numbers; what came from a peer, or goes
/// to one, is little-endian bytes.
#[derive(Debug, Clone)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    data: Data,
}

#[derive(Debug, Clone)]
enum Data {
    F32(Arc<Vec<f32>>),
    Bytes(Bytes),
}

impl PartialEq for Tensor {
    /// The same type, shape and bits.
    fn eq(&self, other: &Self) -> bool {
        self.dtype == other.dtype && self.shape == other.shape && self.data() == other.data()
    }
}

impl Eq for Tensor {}

impl Tensor {
    /// A tensor over existing bytes.
    ///
    /// # Errors
    /// When the bytes are not as many as type and shape say.
    pub fn new(dtype: DType, shape: &[usize], data: Bytes) -> Result<Self, StageError> {
        let elements = shape.iter().try_fold(1usize, |n, &dim| n.checked_mul(dim));
        if elements.and_then(|n| n.checked_mul(dtype.size_bytes())) != Some(data.len()) {
            return Err(StageError::Tensor {
                expected: format!("{dtype:?} {shape:?}"),
                got: format!("{} bytes", data.len()),
            });
        }
        Ok(Self { dtype, shape: shape.to_vec(), data: Data::Bytes(data) })
    }

    /// f32 values of `shape`; a `Vec` is taken over as it is.
    ///
    /// # Panics
    /// When the number of values is not the product of the shape, which is a bug of the caller.
    pub fn from_f32(shape: &[usize], values: impl Into<Vec<f32>>) -> Self {
        let values = values.into();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values fill the shape");
        Self { dtype: DType::F32, shape: shape.to_vec(), data: Data::F32(Arc::new(values)) }
    }

    /// Token ids `[T]`.
    pub fn from_ids(ids: &[u32]) -> Self {
        let data = le_bytes(ids, |id| id.to_le_bytes());
        Self { dtype: DType::U32, shape: vec![ids.len()], data: Data::Bytes(data) }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements as little-endian bytes.
    pub fn data(&self) -> Bytes {
        match &self.data {
            Data::F32(values) => le_bytes(values, |value| value.to_le_bytes()),
            Data::Bytes(bytes) => bytes.clone(),
        }
    }

    /// The values of an f32 tensor of `[rows, columns]`, row-major.
    ///
    /// # Errors
    /// Another type or shape.
    pub fn to_f32_rows(&self, rows: usize, columns: usize) -> Result<Cow<'_, [f32]>, StageError> {
        if self.dtype != DType::F32 || self.shape != [rows, columns] {
            return Err(self.mismatch(format!("F32 [{rows}, {columns}]")));
        }
        Ok(match &self.data {
            Data::F32(values) => Cow::Borrowed(values),
            Data::Bytes(bytes) => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        })
    }

    /// The values of a tensor of `n` token ids.
    ///
    /// # Errors
    /// Another type or shape.
    pub fn to_ids(&self, n: usize) -> Result<Vec<u32>, StageError> {
        if self.dtype != DType::U32 || self.shape != [n] {
            return Err(self.mismatch(format!("U32 [{n}]")));
        }
        Ok(self.data().as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }

    fn mismatch(&self, expected: String) -> StageError {
        StageError::Tensor { expected, got: format!("{:?} {:?}", self.dtype, self.shape) }
    }
}

/// One allocation, one pass.
fn le_bytes<T>(values: &[T], bytes: impl Fn(&T) -> [u8; 4]) -> Bytes {
    let mut out = Vec::with_capacity(values.len() * 4);
    values.iter().for_each(|value| out.extend_from_slice(&bytes(value)));
    out.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(rows: u32, want: Want) -> BatchSequence {
        BatchSequence { rows, want, ..BatchSequence::default() }
    }

    #[test]
    fn wanted_rows_are_indices_into_the_concatenated_rows() {
        let sequences =
            vec![sequence(3, Want::LastLogits), sequence(2, Want::Nothing), sequence(2, Want::AllLogits)];
        let batch = Batch { sequences, ..Batch::default() };
        assert_eq!((batch.n_rows(), batch.n_wanted()), (7, 3));
        assert_eq!(batch.wanted_rows(), [2, 5, 6]);
    }

    #[test]
    fn tensors_round_trip_and_other_shapes_are_errors() {
        let values = [1.0, -0.0, f32::MIN_POSITIVE, 4.0];
        let tensor = Tensor::from_f32(&[2, 2], values);
        assert_eq!(*tensor.to_f32_rows(2, 2).unwrap(), values);
        let sent = Tensor::new(DType::F32, &[2, 2], tensor.data()).unwrap();
        assert_eq!(*sent.to_f32_rows(2, 2).unwrap(), values);
        assert_eq!(sent, tensor);
        assert!(tensor.to_f32_rows(4, 1).is_err());
        assert!(tensor.to_ids(4).is_err());
        assert_eq!(Tensor::from_ids(&[7, 9]).to_ids(2).unwrap(), [7, 9]);
        assert!(Tensor::new(DType::F32, &[2], Bytes::from_static(&[0; 7])).is_err());
        assert!(Tensor::new(DType::F32, &[usize::MAX, 8], Bytes::new()).is_err());
    }
}
