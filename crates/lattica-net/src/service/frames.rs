//! Moves frames between a stream and memory: a reader that never holds more than one header's worth unasked, and a
//! writer that sends what is ready in one piece.

use std::io::{Error, ErrorKind};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use swarm_wire::limits::RPC_HEADER_MAX_BYTES;
use swarm_wire::{DecodeError, frame};
use tokio::sync::mpsc;

use super::shared::Held;

/// Holds at least one header of maximal length.
const READ_BUFFER_BYTES: usize = 32 * 1024;
const _: () = assert!(READ_BUFFER_BYTES > RPC_HEADER_MAX_BYTES + frame::LENGTH_MAX_BYTES);
/// A body is read in pieces of this size, so that memory follows the bytes that came, not those that were announced.
const BODY_STEP_BYTES: usize = 256 * 1024;
/// Smaller bodies are copied behind their headers, so that many frames leave in one write.
const COPY_MAX_BYTES: usize = 16 * 1024;
/// A write goes out when this much is ready.
const WRITE_BUFFER_BYTES: usize = 64 * 1024;
/// A peer that takes or gives nothing for this long in the middle of a frame is given up.
pub(crate) const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads frames. A future of [`FrameReader::fill`] may be dropped without loss.
pub(crate) struct FrameReader<R> {
    reader: R,
    stall: Duration,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader that gives a peer up when it stalls for `stall` in the middle of a frame.
    pub(crate) fn new(reader: R, stall: Duration) -> Self {
        Self::with_buffer(reader, stall, READ_BUFFER_BYTES)
    }

    /// As [`FrameReader::new`], for a protocol whose frames, lengths included, are shorter than `n_bytes`: streams that stand as
    /// long as their connection are not to take more.
    pub(crate) fn with_buffer(reader: R, stall: Duration, n_bytes: usize) -> Self {
        Self { reader, stall, buffer: vec![0; n_bytes].into_boxed_slice(), start: 0, end: 0 }
    }

    /// What has arrived and was not consumed.
    pub(crate) fn buffered(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    pub(crate) fn consume(&mut self, n_bytes: usize) {
        self.start += n_bytes;
        debug_assert!(self.start <= self.end, "consumed more than was there");
    }

    /// Waits for more bytes; 0 is the end of the stream.
    pub(crate) async fn fill(&mut self) -> std::io::Result<usize> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.end == self.buffer.len() {
            return Err(Error::new(ErrorKind::InvalidData, "header longer than the read buffer"));
        }
        let n_bytes = self.reader.read(&mut self.buffer[self.end..]).await?;
        self.end += n_bytes;
        Ok(n_bytes)
    }

    /// The next frame's header, read by `decode`, which returns how many bytes it took; `None` when the stream ended
    /// between frames. Waits for the first byte of a frame as long as it takes, but not for the rest of it.
    pub(crate) async fn header<T>(
        &mut self,
        decode: impl Fn(&[u8]) -> Result<Option<(T, usize)>, DecodeError>,
    ) -> std::io::Result<Option<T>> {
        loop {
            match decode(self.buffered()) {
                Ok(Some((header, n_bytes))) => {
                    self.consume(n_bytes);
                    return Ok(Some(header));
                }
                Ok(None) => {}
                Err(error) => return Err(Error::new(ErrorKind::InvalidData, error)),
            }
            let between_frames = self.buffered().is_empty();
            let n_bytes =
                if between_frames { self.fill().await? } else { stalled(self.stall, self.fill()).await? };
            if n_bytes == 0 {
                return if between_frames { Ok(None) } else { Err(ErrorKind::UnexpectedEof.into()) };
            }
        }
    }

    /// The `n_bytes` that follow.
    pub(crate) async fn body(&mut self, n_bytes: usize) -> std::io::Result<Bytes> {
        let ready = n_bytes.min(self.end - self.start);
        let mut body = BytesMut::with_capacity(n_bytes.min(BODY_STEP_BYTES).max(ready));
        body.extend_from_slice(&self.buffer[self.start..self.start + ready]);
        self.consume(ready);
        while body.len() < n_bytes {
            let from = body.len();
            body.resize(n_bytes.min(from + BODY_STEP_BYTES), 0);
            let mut filled = from;
            while filled < body.len() {
                let got = stalled(self.stall, self.reader.read(&mut body[filled..])).await?;
                if got == 0 {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                filled += got;
            }
        }
        Ok(body.freeze())
    }

    /// Reads and forgets the `n_bytes` that follow.
    pub(crate) async fn skip(&mut self, mut n_bytes: usize) -> std::io::Result<()> {
        loop {
            let ready = n_bytes.min(self.end - self.start);
            self.consume(ready);
            n_bytes -= ready;
            if n_bytes == 0 {
                return Ok(());
            }
            if stalled(self.stall, self.fill()).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// A frame to be sent. What the peer holds of our memory for it is given back when it has left.
pub(crate) struct OutFrame {
    pub(crate) header: Vec<u8>,
    pub(crate) body: Bytes,
    #[expect(dead_code, reason = "kept for its drop, which frees the caller's place")]
    pub(crate) held: Option<Held>,
}

/// Sends frames until every sender is gone, then closes the stream.
pub(crate) async fn write_frames<W: AsyncWrite + Unpin>(
    mut writer: W,
    mut frames: mpsc::Receiver<OutFrame>,
) -> std::io::Result<()> {
    let mut ready = Vec::with_capacity(64);
    let mut buffer = Vec::with_capacity(4096);
    while frames.recv_many(&mut ready, 64).await > 0 {
        for frame in &ready {
            buffer.extend_from_slice(&frame.header);
            let copied = frame.body.len() <= COPY_MAX_BYTES;
            if copied {
                buffer.extend_from_slice(&frame.body);
            }
            if !copied || buffer.len() >= WRITE_BUFFER_BYTES {
                write_all(&mut writer, &buffer).await?;
                buffer.clear();
            }
            if !copied {
                write_all(&mut writer, &frame.body).await?;
            }
        }
        write_all(&mut writer, &buffer).await?;
        buffer.clear();
        stalled(STALL_TIMEOUT, writer.flush()).await?;
        // Only now: until it has left, an answer counts against its caller.
        ready.clear();
    }
    stalled(STALL_TIMEOUT, writer.close()).await
}

/// Like `AsyncWriteExt::write_all`, but the peer has to take something now and then.
pub(crate) async fn write_all<W: AsyncWrite + Unpin>(
    writer: &mut W,
    mut bytes: &[u8],
) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let n_bytes = stalled(STALL_TIMEOUT, writer.write(bytes)).await?;
        if n_bytes == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
        bytes = &bytes[n_bytes..];
    }
    Ok(())
}

async fn stalled<T>(limit: Duration, step: impl Future<Output = std::io::Result<T>>) -> std::io::Result<T> {
    tokio::time::timeout(limit, step)
        .await
        .unwrap_or_else(|_| Err(Error::new(ErrorKind::TimedOut, "peer stalled in the middle of a frame")))
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;

    use super::*;
    use crate::wire::Header;

    fn decode(bytes: &[u8]) -> Result<Option<(Header, usize)>, DecodeError> {
        Header::decode(bytes, 1 << 20)
    }

    #[tokio::test]
    async fn frames_with_large_and_small_bodies_come_out_as_they_went_in() {
        let bodies = [0, 5, COPY_MAX_BYTES, COPY_MAX_BYTES + 1, 700_000, 3];
        let (sender, receiver) = mpsc::channel(16);
        for (i, n_bytes) in bodies.into_iter().enumerate() {
            let header = Header::Answer { call_id: i as u64, refusal: None, body_bytes: n_bytes }.encode();
            sender.send(OutFrame { header, body: vec![i as u8; n_bytes].into(), held: None }).await.unwrap();
        }
        drop(sender);
        let mut wire = Cursor::new(Vec::new());
        write_frames(&mut wire, receiver).await.unwrap();

        let mut reader = FrameReader::new(Cursor::new(wire.into_inner()), STALL_TIMEOUT);
        for (i, n_bytes) in bodies.into_iter().enumerate() {
            let header = reader.header(decode).await.unwrap().unwrap();
            assert_eq!(header.body_bytes(), n_bytes);
            if i % 2 == 0 {
                assert_eq!(reader.body(n_bytes).await.unwrap(), vec![i as u8; n_bytes]);
            } else {
                reader.skip(n_bytes).await.unwrap();
            }
        }
        assert_eq!(reader.header(decode).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_stream_that_ends_inside_a_frame_is_an_error() {
        let bytes = Header::Cancel { call_id: 300 }.encode();
        let mut reader = FrameReader::new(Cursor::new(bytes[..bytes.len() - 1].to_vec()), STALL_TIMEOUT);
        assert_eq!(reader.header(decode).await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        let mut reader = FrameReader::new(Cursor::new(vec![1, 2, 3]), STALL_TIMEOUT);
        assert_eq!(reader.body(4).await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn a_peer_that_stalls_inside_a_frame_is_given_up() {
        let (here, mut there) = tokio::io::duplex(64);
        tokio::io::AsyncWriteExt::write_all(&mut there, &[0x20]).await.unwrap();
        let here = tokio_util::compat::TokioAsyncReadCompatExt::compat(here);
        let mut reader = FrameReader::new(here, Duration::from_millis(20));
        assert_eq!(reader.header(decode).await.unwrap_err().kind(), ErrorKind::TimedOut);
    }
}
