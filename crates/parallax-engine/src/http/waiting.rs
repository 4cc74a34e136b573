//! How long a connection waits for its client: to send a request, longer between two of them than once the next has begun to
//! come, and to take an answer.
//!
//! hyper has one timer for the head and the time before it, which it starts when it begins to wait and drops when the head is
//! there. Here that timer starts with the longer time, and the first byte that comes leaves only the shorter one.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use hyper::rt::{Sleep, Timer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::HttpLimits;

/// A connection, and the timer of its heads.
pub(super) fn timed(stream: TcpStream, limits: &HttpLimits) -> (Timed<TcpStream>, HeadTimer) {
    // Else a token waits until the client has acknowledged the one before it. Where this fails nobody is there any more.
    let _ = stream.set_nodelay(true);
    let bytes = Arc::<AtomicU64>::default();
    let timer = HeadTimer { head: limits.read_time, idle: limits.idle_time, bytes: Arc::clone(&bytes) };
    (Timed { stream, bytes, write_time: limits.write_time, stalled: None }, timer)
}

/// A connection that counts what comes, and ends when its client takes nothing.
#[derive(Debug)]
pub(super) struct Timed<S> {
    stream: S,
    /// Bytes that have come.
    bytes: Arc<AtomicU64>,
    write_time: Duration,
    /// Until then the client must take something.
    stalled: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl<S> Timed<S> {
    /// What became of a write, or that the client has taken nothing for too long.
    fn in_time(
        &mut self,
        context: &mut Context<'_>,
        written: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let write_time = self.write_time;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(write_time)));
        ready!(stalled.as_mut().poll(context));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Timed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let bytes = buffer.filled().len() - before;
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Timed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.in_time(context, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, pieces);
        self.in_time(context, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// What hyper takes the time of one connection's heads with.
#[derive(Debug)]
pub(super) struct HeadTimer {
    head: Duration,
    idle: Duration,
    bytes: Arc<AtomicU64>,
}

impl Timer for HeadTimer {
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Sleep>> {
        self.sleep_until(self.now() + duration)
    }

    /// hyper begins to wait for a head that must be there by `deadline`.
    fn sleep_until(&self, deadline: Instant) -> Pin<Box<dyn Sleep>> {
        // Who has never said anything is not between two requests.
        let (sleep, silent_at) = match self.bytes.load(Ordering::Relaxed) {
            0 => (tokio::time::sleep_until(deadline.into()), None),
            bytes => (tokio::time::sleep(self.idle), Some(bytes)),
        };
        let (head, bytes) = (self.head, Arc::clone(&self.bytes));
        Box::pin(HeadSleep { sleep: Box::pin(sleep), silent_at, head, bytes })
    }
}

/// One wait for a head.
struct HeadSleep {
    sleep: Pin<Box<tokio::time::Sleep>>,
    /// Bytes that had come when it began, as long as there are no more. `None`: the head must be there when it ends.
    silent_at: Option<u64>,
    head: Duration,
    bytes: Arc<AtomicU64>,
}

impl Future for HeadSleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // hyper polls this when it has read what there is, on the same task.
        if self.silent_at.is_some_and(|before| self.bytes.load(Ordering::Relaxed) > before) {
            self.silent_at = None;
            let end = tokio::time::Instant::now() + self.head;
            self.sleep.as_mut().reset(end);
        }
        self.sleep.as_mut().poll(context)
    }
}

impl Sleep for HeadSleep {}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn what_is_written_leaves_at_once() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        let (timed, _) = timed(accepted.unwrap().0, &HttpLimits::default());
        assert!(timed.stream.nodelay().unwrap());
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_waited_for_only_so_long() {
        let (stream, mut client) = tokio::io::duplex(1);
        let write_time = Duration::from_millis(50);
        let mut timed = Timed { stream, bytes: Arc::default(), write_time, stalled: None };
        let mut taken = [0; 3];
        let (written, read) = tokio::join!(timed.write_all(b"abc"), client.read_exact(&mut taken));
        written.unwrap();
        assert_eq!((read.unwrap(), &taken), (3, b"abc"));
        let late = timed.write_all(b"de").await.unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
    }
}
