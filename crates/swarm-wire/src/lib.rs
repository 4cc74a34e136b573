//! Identifiers, tensor frames, size limits and generated messages: what every crate of the stack must agree on.
//!
//! Nothing here waits, opens or reads anything; a peer's bytes come in as slices and leave as checked types.
//!
//! ```
//! use swarm_wire::{DType, TensorHeader};
//!
//! let header = TensorHeader::new(DType::F32, &[2, 3])?;
//! let bytes = header.encode();
//! let (back, rest) = TensorHeader::decode(&bytes)?;
//! assert_eq!((back.shape(), back.payload_bytes(), rest.len()), (&[2, 3][..], 24, 0));
//! # Ok::<(), swarm_wire::DecodeError>(())
//! ```
//!
//! Map: [`id`] (peers, runs, versions), [`cid`] (content identifiers), [`layer`] (layer ranges), [`tensor`] (tensor
//! headers), [`frame`] (length-delimited framing), [`repeated`] (lists counted before they are decoded), [`signed`] (signed
//! statements), [`limits`] (every size limit on the wire), [`generated`] (prost messages, written by `cargo xtask codegen` from `proto/`).

pub mod cid;
pub mod error;
pub mod frame;
pub mod generated;
pub mod id;
pub mod layer;
pub mod limits;
pub mod repeated;
pub mod signed;
pub mod tensor;

pub use crate::cid::Cid;
pub use error::DecodeError;
pub use id::{PeerId, PolicyVersion, RequestId, RunId};
pub use layer::LayerRange;
pub use prost;
pub use tensor::{DType, TensorHeader};
