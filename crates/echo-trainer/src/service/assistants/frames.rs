//! Frames and their payloads on a stream, both ways.

use bytes::Bytes;
use lattica_net::{FrameError, read_bytes, read_frame};
use swarm_wire::{DecodeError, frame};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};

use crate::averaging::wire::{FRAME_MAX_BYTES, Frame, decode_frame, encode_frame};

/// Says `frame` with its payload. Not cancel safe.
///
/// # Errors
/// The stream broke.
pub(crate) async fn send(
    writer: &mut (impl AsyncWrite + Unpin),
    frame: &Frame,
    payload: &[u8],
) -> std::io::Result<()> {
    let mut bytes = Vec::new();
    frame::encode(&encode_frame(frame, payload.len()), &mut bytes);
    writer.write_all(&bytes).await?;
    writer.write_all(payload).await?;
    writer.flush().await
}

/// The next frame, and how many bytes of its payload follow; `None` at the end. Give it a buffered reader. Not cancel safe.
///
/// # Errors
/// The stream broke, or what came is no frame.
pub(crate) async fn receive(
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<Option<(Frame, u64)>, FrameError> {
    match read_frame(reader, "assist frame", FRAME_MAX_BYTES).await? {
        Some(bytes) => Ok(Some(decode_frame(&bytes)?)),
        None => Ok(None),
    }
}

/// The payload of `announced` bytes, at most `limit_bytes`. Not cancel safe.
///
/// # Errors
/// The stream broke, or more was announced; then nothing is read.
pub(crate) async fn payload(
    reader: &mut (impl AsyncRead + Unpin),
    announced: u64,
    limit_bytes: usize,
) -> Result<Bytes, FrameError> {
    let got_bytes = usize::try_from(announced).unwrap_or(usize::MAX);
    if got_bytes > limit_bytes {
        return Err(DecodeError::TooLarge { what: "assist payload", limit_bytes, got_bytes }.into());
    }
    Ok(read_bytes(reader, got_bytes).await?)
}
