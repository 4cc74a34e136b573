//! Measures each connection with small probes on a stream of its own, answers those of the peer, closes connections that
//! fell silent, and lets redundant ones go.

use std::sync::Arc;
use std::time::Duration;

use futures::AsyncReadExt;
use libp2p::StreamProtocol;
use swarm_wire::frame;

use super::connection::{Connection, Incoming, OpenError};
use super::driver::Command;
use super::frames::{FrameReader, STALL_TIMEOUT, write_all};
use super::shared::Shared;
use crate::links::probe::{ProbeAction, ProbeTracker};
use crate::wire::{LINK_FRAME_MAX_BYTES, decode_echo, decode_probe, encode_echo, encode_probe};

/// The protocol of link measurements.
pub const LINK_PROTOCOL: StreamProtocol = StreamProtocol::new("/lattica/link/1.0.0");
/// A redundant connection whose last call is older than this gives its RPC streams up.
const RELEASE_AFTER_MS: u64 = 2000;

/// Every connection has two streams for probes as long as it stands.
const READ_BUFFER_BYTES: usize = 272;
const _: () = assert!(READ_BUFFER_BYTES > LINK_FRAME_MAX_BYTES + frame::LENGTH_MAX_BYTES);

/// Probe intervals after which another stream for probes is tried.
const TRY_AGAIN_AFTER: u32 = 5;

/// Probes a connection until it is gone.
pub(crate) async fn measure(shared: Arc<Shared>, connection: Arc<Connection>) {
    let probing = async {
        loop {
            // Without a stream the peer could fall silent unnoticed, so another one is tried after a while.
            let pause = match probe(&shared, &connection).await {
                Ok(Life::Silent) => {
                    tracing::info!(peer = %connection.peer.short(), "connection closed: the peer fell silent");
                    if !connection.is_redundant() {
                        connection.measured(|link| link.handle_break(shared.now()));
                    }
                    connection.fail();
                    let _ = shared.command(Command::Close { id: connection.id }).await;
                    return;
                }
                // Its ping is measured instead.
                Ok(Life::Unsupported) => u32::MAX,
                Ok(Life::Unmeasured) => TRY_AGAIN_AFTER,
                Err(error) => {
                    tracing::debug!(peer = %connection.peer.short(), %error, "link probes ended");
                    TRY_AGAIN_AFTER
                }
            };
            for _ in 0..pause {
                tokio::time::sleep(shared.config.liveness.probe_interval).await;
                tidy(&shared, &connection);
            }
        }
    };
    connection.until_closed(&shared, probing).await;
}

enum Life {
    Silent,
    /// The peer does not speak the protocol.
    Unsupported,
    /// No stream, or not any more, while the connection stands.
    Unmeasured,
}

async fn probe(shared: &Arc<Shared>, connection: &Arc<Connection>) -> std::io::Result<Life> {
    let mut stream = match connection.open(LINK_PROTOCOL).await {
        Ok(stream) => stream,
        Err(OpenError::Io(error)) => return Err(error),
        Err(OpenError::Unsupported) => return Ok(Life::Unsupported),
        Err(OpenError::Timeout | OpenError::Lost) => return Ok(Life::Unmeasured),
    };
    stream.ignore_for_keep_alive();
    let (reader, mut writer) = stream.split();
    let mut reader = FrameReader::with_buffer(reader, STALL_TIMEOUT, READ_BUFFER_BYTES);
    let liveness = &shared.config.liveness;
    let mut tracker = ProbeTracker::new(shared.now(), liveness.probe_interval, liveness.probe_timeout);
    loop {
        while let Some((sequence, rate, n_bytes)) = decode_echo(reader.buffered()).map_err(invalid)? {
            reader.consume(n_bytes);
            let now = shared.now();
            if let Some(rtt) = tracker.handle_echo(now, sequence).filter(|_| !connection.blurs()) {
                connection.measured(|link| {
                    link.handle_answer(now, rtt);
                    link.handle_reported_goodput(now, rate);
                });
            }
        }
        let wait = tracker.next_tick().saturating_sub(shared.now());
        tokio::select! {
            filled = reader.fill() => {
                if filled? == 0 {
                    return Ok(Life::Unmeasured);
                }
            }
            () = tokio::time::sleep(wait) => {
                tidy(shared, connection);
                let now = shared.now();
                let (action, newly_late) = tracker.handle_tick(now);
                if !connection.blurs() {
                    connection.measured(|link| (0..newly_late).for_each(|_| link.handle_loss(now)));
                }
                match action {
                    ProbeAction::Send(sequence) => write_all(&mut writer, &encode_probe(sequence)).await?,
                    ProbeAction::Wait => {}
                    ProbeAction::Dead => return Ok(Life::Silent),
                }
            }
        }
    }
}

/// A connection beside a better one gives up its idle RPC streams; without streams the swarm lets it go.
fn tidy(shared: &Shared, connection: &Connection) {
    connection.set_beside(shared.table().best(&connection.peer).as_deref());
    let now_ms = u64::try_from(shared.now().as_millis()).unwrap_or(u64::MAX);
    if connection.is_redundant() && now_ms.saturating_sub(connection.last_use_ms()) > RELEASE_AFTER_MS {
        connection.lanes.release_idle();
    }
}

/// Echoes the peer's probes.
pub(crate) async fn answer(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    mut stream: libp2p::Stream,
    place: Incoming,
) {
    stream.ignore_for_keep_alive();
    let echoing = async {
        let (reader, mut writer) = stream.split();
        let mut reader = FrameReader::with_buffer(reader, STALL_TIMEOUT, READ_BUFFER_BYTES);
        // A peer that probes without pause costs no more than this many echoes per second.
        let mut pace = tokio::time::interval(Duration::from_millis(5));
        pace.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while let Some(sequence) = reader.header(decode_probe).await? {
            pace.tick().await;
            let rate = connection.measured(|link| link.incoming_bytes_per_s());
            write_all(&mut writer, &encode_echo(sequence, rate)).await?;
        }
        Ok::<(), std::io::Error>(())
    };
    if let Some(Err(error)) = connection.until_closed(&shared, echoing).await {
        tracing::debug!(peer = %connection.peer.short(), %error, "link stream closed");
    }
    drop(place);
}

fn invalid(error: swarm_wire::DecodeError) -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidData, error)
}
