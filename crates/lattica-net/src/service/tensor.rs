//! Tensors over a stream: the header of `swarm_wire::TensorHeader`, then the payload. The sender says when it is done, so
//! that a connection that dies is never mistaken for the end.

use std::io::{Error, ErrorKind};

use bytes::Bytes;
use swarm_wire::{DecodeError, TensorHeader, limits};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::stream::read_bytes;

/// Instead of a header: no tensor follows.
const END: u8 = 0x45;
/// Bytes of a header before its dimensions.
const FIXED_BYTES: usize = 4;
/// Smaller payloads leave together with their header in one write.
const COPY_MAX_BYTES: usize = 64 * 1024;

/// A tensor that arrived: what it is, and its bytes, row-major and little endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Element type and shape.
    pub header: TensorHeader,
    /// `header.payload_bytes()` bytes.
    pub payload: Bytes,
}

/// Sends tensors over a stream.
#[derive(Debug)]
pub struct TensorSender<W> {
    writer: W,
}

impl<W: AsyncWrite + Unpin> TensorSender<W> {
    /// Sends over `writer`: a [`crate::Stream`] or the writing half of one.
    pub fn new(writer: W) -> Self {
        Self { writer }
    }

    /// Sends one tensor and flushes.
    ///
    /// Not cancel safe: after a dropped future the stream is of no more use.
    ///
    /// # Errors
    /// When the payload's length is not what the header says, or the stream broke.
    pub async fn send(&mut self, header: &TensorHeader, payload: &[u8]) -> std::io::Result<()> {
        if payload.len() != header.payload_bytes() {
            let reason =
                format!("tensor payload of {} bytes, header says {}", payload.len(), header.payload_bytes());
            return Err(Error::new(ErrorKind::InvalidInput, reason));
        }
        let mut bytes = header.encode();
        if payload.len() <= COPY_MAX_BYTES {
            bytes.extend_from_slice(payload);
            self.writer.write_all(&bytes).await?;
        } else {
            self.writer.write_all(&bytes).await?;
            self.writer.write_all(payload).await?;
        }
        self.writer.flush().await
    }

    /// Tells the receiver that no tensor follows, and closes this direction.
    ///
    /// Not cancel safe: the receiver may see a stream that was cut off.
    ///
    /// # Errors
    /// When the stream broke.
    pub async fn finish(mut self) -> std::io::Result<()> {
        self.writer.write_all(&[END]).await?;
        self.writer.flush().await?;
        self.writer.shutdown().await
    }

    /// The writer, to send something else over it.
    pub fn into_inner(self) -> W {
        self.writer
    }
}

/// Receives tensors from a stream.
#[derive(Debug)]
pub struct TensorReceiver<R> {
    reader: R,
    limit_bytes: usize,
    finished: bool,
}

impl<R: AsyncRead + Unpin> TensorReceiver<R> {
    /// Receives from `reader`: a [`crate::Stream`] or the reading half of one. Tensors of more than `limit_bytes` are
    /// refused before anything is allocated for them.
    pub fn new(reader: R, limit_bytes: usize) -> Self {
        Self { reader, limit_bytes, finished: false }
    }

    /// The next tensor; `None` when the sender finished.
    ///
    /// Not cancel safe: after a dropped future the stream is of no more use.
    ///
    /// # Errors
    /// `InvalidData` when the peer sent something else or too much; `UnexpectedEof` when the stream ended without the
    /// sender's word, which is how a peer that died is seen; other kinds when the stream broke.
    pub async fn recv(&mut self) -> std::io::Result<Option<Tensor>> {
        if self.finished {
            return Ok(None);
        }
        let mut head = [0; FIXED_BYTES + 4 * limits::TENSOR_MAX_DIMS];
        self.reader.read_exact(&mut head[..1]).await?;
        if head[0] == END {
            self.finished = true;
            return Ok(None);
        }
        self.reader.read_exact(&mut head[1..FIXED_BYTES]).await?;
        let n_dims = usize::from(head[2]);
        if n_dims > limits::TENSOR_MAX_DIMS {
            return Err(invalid(DecodeError::invalid("number of tensor dimensions", n_dims)));
        }
        let head = &mut head[..FIXED_BYTES + 4 * n_dims];
        self.reader.read_exact(&mut head[FIXED_BYTES..]).await?;
        let (header, _) = TensorHeader::decode(head).map_err(invalid)?;
        let n_bytes = header.payload_bytes();
        if n_bytes > self.limit_bytes {
            let limit_bytes = self.limit_bytes;
            return Err(invalid(DecodeError::TooLarge { what: "tensor", limit_bytes, got_bytes: n_bytes }));
        }
        let payload = read_bytes(&mut self.reader, n_bytes).await?;
        Ok(Some(Tensor { header, payload }))
    }
}

fn invalid(error: DecodeError) -> Error {
    Error::new(ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use swarm_wire::DType;

    use super::*;

    #[tokio::test]
    async fn tensors_of_any_size_arrive_whole_and_in_order() {
        let (near, far) = tokio::io::duplex(1000);
        let sizes = [0usize, 1, 4097, 700_000];
        let sending = tokio::spawn(async move {
            let mut sender = TensorSender::new(near);
            for n in sizes {
                let payload: Vec<u8> = (0..4 * n).map(|i| i as u8).collect();
                sender.send(&TensorHeader::new(DType::F32, &[n, 1]).unwrap(), &payload).await.unwrap();
            }
            sender.finish().await.unwrap();
        });
        let mut receiver = TensorReceiver::new(far, 1 << 22);
        for n in sizes {
            let tensor = receiver.recv().await.unwrap().unwrap();
            assert_eq!(tensor.header.shape(), [n, 1]);
            assert!(tensor.payload.iter().enumerate().all(|(i, b)| *b == i as u8));
        }
        assert_eq!(receiver.recv().await.unwrap(), None);
        assert_eq!(receiver.recv().await.unwrap(), None);
        sending.await.unwrap();
    }

    #[tokio::test]
    async fn a_sender_that_dies_is_not_an_end() {
        let header = TensorHeader::new(DType::U32, &[2]).unwrap().encode();
        for bytes in [Vec::new(), header[..5].to_vec(), [header.clone(), vec![1, 2, 3]].concat()] {
            let mut receiver = TensorReceiver::new(&bytes[..], 1 << 20);
            assert_eq!(receiver.recv().await.unwrap_err().kind(), ErrorKind::UnexpectedEof);
        }
    }

    #[tokio::test]
    async fn garbage_and_oversized_tensors_are_refused_before_allocation() {
        let large = TensorHeader::new(DType::F32, &[1 << 20]).unwrap().encode();
        for bytes in [vec![0x11; 64], vec![0x54, 1, 200, 0], large] {
            let mut receiver = TensorReceiver::new(&bytes[..], 1 << 20);
            assert_eq!(receiver.recv().await.unwrap_err().kind(), ErrorKind::InvalidData);
        }
    }

    #[tokio::test]
    async fn a_payload_that_contradicts_its_header_is_not_sent() {
        let mut sent = Vec::new();
        let header = TensorHeader::new(DType::F32, &[2]).unwrap();
        assert_eq!(
            TensorSender::new(&mut sent).send(&header, &[0; 7]).await.unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
        assert!(sent.is_empty());
    }
}
