//! Turns relayed connections into direct ones, by the exchange that libp2p calls DCUtR: over the relayed connection the side
//! that was dialled asks, both name the addresses at which they were seen, and both dial at the same moment. What is dialled
//! and how, [`crate::punch`] decides; the other side may be a stock libp2p node.

use std::io::{Error, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{AsyncReadExt, AsyncWriteExt};
use libp2p::StreamProtocol;
use libp2p::core::Multiaddr;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::connection::{Connection, Incoming, OpenError};
use super::driver::Command;
use super::frames::{FrameReader, write_all};
use super::guess;
use super::shared::Shared;
use crate::addr::without_peer;
use crate::punch::guess::Way;
use crate::punch::{
    FIRST_LONG_PAUSE, GUESS_AFTER, PunchDial, TRY_TIMEOUT, answerer_dials, asker_dials, pause_after,
    worth_dialling,
};
use crate::wire::{PunchMessage, decode_punch, encode_punch};

/// The protocol of the exchange.
pub(crate) const PUNCH_PROTOCOL: StreamProtocol = StreamProtocol::new("/libp2p/dcutr");
/// An exchange takes two round trips over the relay.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);
/// Who was just connected may not know yet where it is seen; the first peer that it met tells within a round trip.
const SEEN_TIMEOUT: Duration = Duration::from_secs(2);

/// Tries for a direct connection whenever there is none, as long as the relayed one stands.
pub(crate) async fn keep_direct(shared: Arc<Shared>, connection: Arc<Connection>) {
    let trying = async {
        let (mut failed, mut ways) = (0, Way::ALL.to_vec());
        let mut seen = shared.seen_at.subscribe();
        loop {
            if is_direct(&shared, &connection) {
                failed = 0;
                sleep(shared.config.liveness.probe_interval).await;
                continue;
            }
            seen.mark_unchanged();
            match ask(&shared, &connection).await {
                Ok(()) => {
                    wait_direct(&shared, &connection, GUESS_AFTER).await;
                    guess(&shared, &connection, &mut ways).await;
                    wait_direct(&shared, &connection, TRY_TIMEOUT - GUESS_AFTER).await;
                }
                Err(error) if error.kind() == ErrorKind::Unsupported => return,
                Err(error) => {
                    tracing::debug!(peer = %connection.peer.short(), %error, "no punch agreed upon")
                }
            }
            if is_direct(&shared, &connection) {
                tracing::info!(peer = %connection.peer.short(), tries = failed + 1, "direct path found");
                continue;
            }
            failed += 1;
            let pause = pause_after(failed);
            tracing::debug!(peer = %connection.peer.short(), failed, ?pause, "no direct path");
            tokio::select! {
                () = sleep(pause) => {}
                // Another network, another chance; but peers could say every second that we are seen elsewhere.
                Ok(()) = moved(&mut seen, pause) => failed = 0,
            }
        }
    };
    connection.until_closed(&shared, trying).await;
}

/// Tries it with ports that have to be guessed, the next way where nothing comes of one. Those that the peer does not know are
/// forgotten.
async fn guess(shared: &Arc<Shared>, connection: &Connection, ways: &mut Vec<Way>) {
    for way in ways.clone() {
        if is_direct(shared, connection) {
            return;
        }
        match guess::ask(shared, connection, way).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) if error.kind() == ErrorKind::Unsupported => ways.retain(|known| *known != way),
            Err(error) => {
                tracing::debug!(peer = %connection.peer.short(), ?way, %error, "no port was met");
            }
        }
    }
}

/// Waits until the node is seen elsewhere, and at least as long as for the first of the long pauses.
async fn moved(
    seen: &mut watch::Receiver<Vec<String>>,
    pause: Duration,
) -> Result<(), watch::error::RecvError> {
    sleep(pause.min(FIRST_LONG_PAUSE)).await;
    seen.changed().await
}

/// One try from the side that asks.
async fn ask(shared: &Shared, connection: &Connection) -> std::io::Result<()> {
    let ours = seen_at(shared).await;
    if ours.is_empty() {
        return Err(Error::other("nobody has told yet where we are seen"));
    }
    let stream = match connection.open(PUNCH_PROTOCOL).await {
        Ok(stream) => stream,
        Err(OpenError::Io(error)) => return Err(error),
        Err(OpenError::Unsupported) => return Err(ErrorKind::Unsupported.into()),
        Err(OpenError::Timeout) => return Err(ErrorKind::TimedOut.into()),
        Err(OpenError::Lost) => return Err(ErrorKind::ConnectionReset.into()),
    };
    let exchange = async {
        let (reader, mut writer) = stream.split();
        let mut reader = FrameReader::new(reader, EXCHANGE_TIMEOUT);
        write_all(&mut writer, &encode_punch(named(&ours))).await?;
        writer.flush().await?;
        let sent = Instant::now();
        let theirs = addresses(reader.header(decode_punch).await?)?;
        let mut rtt = sent.elapsed();
        write_all(&mut writer, &encode_punch(PunchMessage::Sync)).await?;
        writer.flush().await?;
        // The peer may have waited before it answered; probes know better.
        let probed = connection.measured(|link| link.estimate(shared.now(), connection.path));
        if let Some(probed) = probed.and_then(|link| Duration::try_from_secs_f64(link.rtt_ms / 1e3).ok()) {
            rtt = rtt.min(probed);
        }
        sleep(rtt / 2).await;
        Ok::<_, Error>(theirs)
    };
    let theirs = timeout(EXCHANGE_TIMEOUT, exchange).await??;
    dial(shared, connection, asker_dials(worth_dialling(theirs, &connection.address))).await
}

/// The other side of [`ask`].
pub(crate) async fn answer(
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    stream: libp2p::Stream,
    place: Incoming,
) {
    // One try at a time, and only for who cannot reach us otherwise: it makes us dial.
    let Ok(_punching) = connection.punching.try_acquire() else { return };
    if !connection.is_relayed() || is_direct(&shared, &connection) {
        return;
    }
    let exchange = async {
        let (reader, mut writer) = stream.split();
        let mut reader = FrameReader::new(reader, EXCHANGE_TIMEOUT);
        let theirs = addresses(reader.header(decode_punch).await?)?;
        let ours = seen_at(&shared).await;
        write_all(&mut writer, &encode_punch(named(&ours))).await?;
        writer.flush().await?;
        match reader.header(decode_punch).await? {
            Some(PunchMessage::Sync) => Ok::<_, Error>(theirs),
            _ => Err(Error::new(ErrorKind::InvalidData, "a sync was expected")),
        }
    };
    let punching = async {
        let theirs = timeout(EXCHANGE_TIMEOUT, exchange).await??;
        dial(&shared, &connection, answerer_dials(worth_dialling(theirs, &connection.address))).await?;
        // Whatever becomes of it: the next try may begin when this one has had its time.
        sleep(TRY_TIMEOUT).await;
        Ok::<(), Error>(())
    };
    if let Some(Err(error)) = connection.until_closed(&shared, punching).await {
        tracing::debug!(peer = %connection.peer.short(), %error, "no punch agreed upon");
    }
    drop(place);
}

async fn dial(shared: &Shared, connection: &Connection, dials: Vec<PunchDial>) -> std::io::Result<()> {
    if dials.is_empty() {
        return Err(Error::other("the peer names no address that may be dialled"));
    }
    tracing::debug!(peer = %connection.peer.short(), ?dials, "punching");
    shared.command(Command::Punch { peer: connection.peer.clone(), dials }).await.map_err(Error::other)
}

fn named(addresses: &[String]) -> PunchMessage {
    let binary = |text: &String| Some(Bytes::from(text.parse::<Multiaddr>().ok()?.to_vec()));
    PunchMessage::Connect(addresses.iter().filter_map(binary).collect())
}

fn addresses(message: Option<PunchMessage>) -> std::io::Result<Vec<String>> {
    match message {
        Some(PunchMessage::Connect(addresses)) => {
            let text =
                |bytes: Bytes| Multiaddr::try_from(bytes.to_vec()).ok().map(|a| without_peer(&a).to_string());
            Ok(addresses.into_iter().filter_map(text).collect())
        }
        Some(PunchMessage::Sync) => Err(Error::new(ErrorKind::InvalidData, "addresses were expected")),
        None => Err(ErrorKind::UnexpectedEof.into()),
    }
}

/// Where peers see us, as soon as one has told; nothing when none does for a while.
async fn seen_at(shared: &Shared) -> Vec<String> {
    let mut seen = shared.seen_at.subscribe();
    let told = timeout(SEEN_TIMEOUT, seen.wait_for(|seen| !seen.is_empty())).await;
    told.ok().and_then(Result::ok).map(|seen| seen.clone()).unwrap_or_default()
}

pub(super) fn is_direct(shared: &Shared, connection: &Connection) -> bool {
    shared.table().connected(&connection.peer).is_some_and(|relayed| !relayed.0)
}

/// Waits until a direct connection stands, but no longer than that.
async fn wait_direct(shared: &Shared, connection: &Connection, at_most: Duration) {
    let mut events = shared.events.subscribe();
    let found = async {
        while !is_direct(shared, connection) {
            let _ = events.recv().await;
        }
    };
    let _ = timeout(at_most, found).await;
}
