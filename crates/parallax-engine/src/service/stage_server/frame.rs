//! Frames between stages: varint length, one `StageFrame`, then the tensor (or adapter) bytes that it announces.
//! Specified in docs/WIRE.md. Everything is checked against a limit before it is allocated.

use bytes::Bytes;
pub use lattica_net::FrameError;
use prost::Message;
use swarm_wire::generated::parallax::v1::{StageFrame, stage_frame};
use swarm_wire::limits::{MESSAGE_MAX_BYTES, TENSOR_MAX_BYTES};
use swarm_wire::repeated::{self, Element};
use swarm_wire::{DecodeError, TensorHeader, frame};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

/// The stream protocol between stages.
pub const STAGE_PROTOCOL: &str = "/parallax/stage/2";

/// Sequences of one step: a step has at most this many rows, and each of its sequences a row.
const SEQUENCES_MAX: usize = 1 << 16;

/// A frame ready to be written: one buffer, because small writes cost more than the copy.
#[derive(Debug, Clone)]
pub struct EncodedFrame {
    bytes: Bytes,
    /// Tensor payload inside, without any header.
    pub payload_bytes: usize,
}

impl EncodedFrame {
    /// A frame without tensor.
    pub fn new(kind: stage_frame::Kind) -> Self {
        Self::assemble(StageFrame { tensor_bytes: 0, kind: Some(kind) }, &[], &[])
    }

    /// A frame with a tensor behind it.
    pub fn with_tensor(kind: stage_frame::Kind, header: &TensorHeader, payload: &[u8]) -> Self {
        debug_assert_eq!(header.payload_bytes(), payload.len());
        Self::assemble(StageFrame { tensor_bytes: 0, kind: Some(kind) }, &header.encode(), payload)
    }

    /// A frame with plain bytes behind it.
    pub fn with_bytes(kind: stage_frame::Kind, bytes: &[u8]) -> Self {
        Self::assemble(StageFrame { tensor_bytes: 0, kind: Some(kind) }, &[], bytes)
    }

    fn assemble(mut message: StageFrame, header: &[u8], payload: &[u8]) -> Self {
        message.tensor_bytes =
            u32::try_from(header.len() + payload.len()).expect("tensors are limited far below 4 GiB");
        let message = message.encode_to_vec();
        let mut bytes = Vec::with_capacity(message.len() + header.len() + payload.len() + 5);
        frame::encode(&message, &mut bytes);
        bytes.extend_from_slice(header);
        bytes.extend_from_slice(payload);
        Self { bytes: bytes.into(), payload_bytes: payload.len() }
    }

    /// Bytes on the stream.
    pub fn wire_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Writes and flushes.
    ///
    /// # Errors
    /// When the stream broke.
    pub async fn write<W: AsyncWrite + Unpin>(&self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(&self.bytes).await?;
        writer.flush().await
    }
}

/// A frame that arrived.
#[derive(Debug, Clone, PartialEq)]
pub struct ReceivedFrame {
    /// What it is.
    pub kind: stage_frame::Kind,
    /// The bytes behind it.
    pub tail: Bytes,
}

impl ReceivedFrame {
    /// The tensor behind the message.
    ///
    /// # Errors
    /// When the tail is not one tensor.
    pub fn tensor(&self) -> Result<(TensorHeader, Bytes), DecodeError> {
        let (header, payload) = TensorHeader::decode_with_payload(&self.tail)?;
        let payload = self.tail.slice_ref(payload);
        Ok((header, payload))
    }
}

/// Reads the next frame; `None` when the sender finished. Not safe to drop half way: the stream is then out of step.
///
/// # Errors
/// When the stream broke or the bytes are not a frame within the limits.
pub async fn read_frame<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Option<ReceivedFrame>, FrameError> {
    let Some(message) = lattica_net::read_frame(reader, "stage frame", MESSAGE_MAX_BYTES).await? else {
        return Ok(None);
    };
    let sequences = (&[3, 2][..], Element::Field);
    repeated::check("sequences of a StageFrame", &message, sequences, SEQUENCES_MAX)?;
    let message = StageFrame::decode(message).map_err(|e| DecodeError::message("StageFrame", &e))?;
    let kind = message.kind.ok_or_else(|| DecodeError::invalid("stage frame kind", "none"))?;
    let tail_bytes = message.tensor_bytes as usize;
    // A header of eight dimensions is 36 bytes.
    if tail_bytes > TENSOR_MAX_BYTES + 36 {
        let limit_bytes = TENSOR_MAX_BYTES;
        return Err(
            DecodeError::TooLarge { what: "stage frame tensor", limit_bytes, got_bytes: tail_bytes }.into()
        );
    }
    Ok(Some(ReceivedFrame { kind, tail: lattica_net::read_bytes(reader, tail_bytes).await? }))
}

#[cfg(test)]
mod tests {
    use swarm_wire::DType;
    use swarm_wire::generated::parallax::v1::{StageHello, StageStep};

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn frames_round_trip_one_after_another() {
        let header = TensorHeader::new(DType::F32, &[1, 2]).unwrap();
        let step = stage_frame::Kind::Step(StageStep { step_id: 9, ..StageStep::default() });
        let hello = stage_frame::Kind::Hello(StageHello { epoch: 3, stage_index: 1 });
        let frames =
            [EncodedFrame::new(hello.clone()), EncodedFrame::with_tensor(step.clone(), &header, &[7; 8])];
        run(async {
            let mut bytes = Vec::new();
            for frame in &frames {
                frame.write(&mut bytes).await.unwrap();
            }
            assert_eq!(bytes.len(), frames[0].wire_bytes() + frames[1].wire_bytes());
            let mut reader = &bytes[..];
            assert_eq!(read_frame(&mut reader).await.unwrap().unwrap().kind, hello);
            let second = read_frame(&mut reader).await.unwrap().unwrap();
            assert_eq!(second.kind, step);
            assert_eq!(second.tensor().unwrap(), (header, Bytes::from_static(&[7; 8])));
            assert!(read_frame(&mut reader).await.unwrap().is_none());
            // Every truncation is an error, never a frame.
            for cut in 1..frames[0].wire_bytes() {
                assert!(read_frame(&mut &bytes[..cut]).await.is_err(), "{cut}");
            }
        });
    }

    #[test]
    fn oversized_and_foreign_frames_are_refused_before_allocation() {
        run(async {
            let mut huge = Vec::new();
            frame::encode_length(MESSAGE_MAX_BYTES + 1, &mut huge);
            assert!(matches!(
                read_frame(&mut &huge[..]).await,
                Err(FrameError::Malformed(DecodeError::TooLarge { .. }))
            ));
            let kind = stage_frame::Kind::Hello(StageHello::default());
            let message = StageFrame { tensor_bytes: u32::MAX, kind: Some(kind) }.encode_to_vec();
            let mut lying = Vec::new();
            frame::encode(&message, &mut lying);
            assert!(matches!(read_frame(&mut &lying[..]).await, Err(FrameError::Malformed(_))));
            assert!(read_frame(&mut &b"GET / HTTP/1.1\r\n\r\n"[..]).await.is_err());
        });
    }
}
