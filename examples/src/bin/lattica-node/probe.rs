//! `lattica-node probe`: how well a peer can be reached that is known only by its name and a relay. One side answers, the other
//! one calls without a pause, first over the relay, then over whatever connection stands.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use clap::{Args, ValueEnum};
use lattica_net::{Identity, NetEvent, Node, NodeConfig, Stream};
use serde_json::json;
use swarm_examples::program;
use swarm_wire::PeerId;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;

/// The method that is called.
const ECHO: &str = "probe/echo";
/// The protocol of streams that are sent to be measured.
const BULK: &str = "/lattica-node/probe/1";
/// How long joining, and any one call, may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// Pause between calls.
const PAUSE: Duration = Duration::from_millis(50);
/// Calls go on for this long over the direct connection, so that the change itself is tried, too.
const AFTERWARDS: Duration = Duration::from_millis(500);
/// How long a call may take while outages are waited for.
const IMPATIENCE: Duration = Duration::from_millis(500);

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Transport {
    Quic,
    Tcp,
    Both,
}

/// Whom to reach, and how.
#[derive(Debug, Args)]
pub(crate) struct ProbeArgs {
    /// The peer to reach, which runs this command, too. Without it: wait to be reached, until standard input ends.
    #[arg(long, value_name = "PEER_ID")]
    to: Option<PeerId>,
    /// A relay that both sides use, with its /p2p/ part; may be given several times.
    #[arg(long, value_name = "ADDR", required = true)]
    via: Vec<String>,
    /// What this side listens on and dials.
    #[arg(long, value_enum, default_value = "both")]
    transport: Transport,
    /// Name of the network.
    #[arg(long, default_value = "default")]
    network: String,
    /// How long to wait for a direct connection, in seconds.
    #[arg(long, default_value_t = 10.0, requires = "to")]
    patience_s: f64,
    /// Then send a stream of this many MiB to the peer and tell how fast it arrived.
    #[arg(long, default_value_t = 0, requires = "to")]
    stream_mib: u64,
    /// Then go on calling, half a second at most for each answer, until standard input ends. Prints {"calling":true} before,
    /// and {"gap_ms":…} when a call is answered after more than half a second without an answer.
    #[arg(long, requires = "to")]
    hold: bool,
    /// Who waits prints {"peer":…,"addresses":[…]} once a relay keeps a slot for it, then {"relay":…} for each slot. Who calls
    /// prints, as the last line: first_call_ms (from the call to its answer), first_relayed (whether that was over a relay),
    /// direct_ms (from the same call to the first direct connection, null without one), address (where the last connection
    /// leads), calls, calls_failed, relay_rtt_ms, reachability (confirmed addresses; quic and tcp: mapping, keeps_port, ports (the
    /// smallest and the largest seen), ips, n_observers), stream (mbit_per_s from its opening to its last byte, steady_mbit_per_s over
    /// its last three quarters; null without --stream-mib), held (calls, calls_failed; null without --hold).
    #[arg(long)]
    json: bool,
}

/// Waits or calls.
pub(crate) async fn run(args: &ProbeArgs) -> anyhow::Result<()> {
    let quic =
        matches!(args.transport, Transport::Quic | Transport::Both).then_some("/ip4/0.0.0.0/udp/0/quic-v1");
    let tcp = matches!(args.transport, Transport::Tcp | Transport::Both).then_some("/ip4/0.0.0.0/tcp/0");
    let config = NodeConfig {
        listen: quic.into_iter().chain(tcp).map(str::to_owned).collect(),
        bootstrap: args.via.clone(),
        relays: args.via.clone(),
        network: args.network.clone(),
        ..NodeConfig::default()
    };
    let node = Node::start(Identity::generate(), config).await?;
    match &args.to {
        None => answer(&node, args).await?,
        Some(peer) => call(&node, args, peer).await?,
    }
    node.shutdown().await;
    Ok(())
}

async fn answer(node: &Node, args: &ProbeArgs) -> anyhow::Result<()> {
    let (events, mut later) = (node.events(), node.events());
    node.handle(ECHO, |_, body| async move { Ok(body) });
    node.handle_stream(BULK, |_, mut stream| async move {
        if let Err(error) = take(&mut stream).await {
            tracing::warn!(%error, "stream");
        }
    })?;
    wait(events, |event| matches!(event, NetEvent::RelayReserved(_)))
        .await
        .context("no relay keeps a slot for us")?;
    let addresses = node.listen_addrs().await;
    if args.json {
        program::report(&json!({"peer": node.peer_id(), "addresses": addresses}))?;
    } else {
        program::list(&format!("call this node with --to {}", node.peer_id()))?;
    }
    let (mut input, mut nowhere) = (tokio::io::stdin(), tokio::io::sink());
    let mut asked_to_stop = std::pin::pin!(tokio::io::copy(&mut input, &mut nowhere));
    loop {
        tokio::select! {
            read = &mut asked_to_stop => return read.map(|_| ()).context("reading standard input"),
            event = later.recv() => if let (NetEvent::RelayReserved(relay), true) = (event?, args.json) {
                program::report(&json!({ "relay": relay }))?;
            },
        }
    }
}

async fn call(node: &Node, args: &ProbeArgs, peer: &PeerId) -> anyhow::Result<()> {
    let events = node.events();
    let joined = |event: &NetEvent| matches!(event, NetEvent::Connected(_));
    if node.connected_peers().is_empty() {
        wait(events, joined).await.context("no relay answers")?;
    }
    let relay = node.connected_peers().into_iter().next();
    for via in &args.via {
        node.add_address(peer, &format!("{via}/p2p-circuit"))?;
    }
    let mut events = node.events();
    let start = Instant::now();
    let (stop, stopped) = watch::channel(false);
    let (first, answered) = watch::channel(None);
    let calls = tokio::spawn(calls(node.clone(), peer.clone(), start, first, stopped));
    let directly = async {
        while node.paths(peer).iter().all(|path| path.relayed) {
            let _ = events.recv().await;
        }
        start.elapsed()
    };
    let patience = Duration::from_secs_f64(args.patience_s);
    let direct = tokio::time::timeout(patience, directly).await.ok();
    if direct.is_some() {
        tokio::time::sleep(AFTERWARDS).await;
    }
    let _ = stop.send(true);
    let (calls, calls_failed) = calls.await?;
    let (first_call, first_relayed) = answered.borrow().context("no call was answered")?;
    let stream =
        if args.stream_mib > 0 { Some(send(node, peer, args.stream_mib << 20).await?) } else { None };
    let ms = |duration: Duration| (duration.as_secs_f64() * 1e4).round() / 10.0;
    let held = if args.hold { Some(hold(node, peer).await?) } else { None };
    let held = held.map(|(calls, calls_failed)| json!({"calls": calls, "calls_failed": calls_failed}));
    let report = json!({
        "peer": peer,
        "first_call_ms": ms(first_call),
        "first_relayed": first_relayed,
        "direct_ms": direct.map(ms),
        "address": node.paths(peer).first().map(|path| path.address.clone()),
        "calls": calls,
        "calls_failed": calls_failed,
        "stream": stream,
        "held": held,
        "reachability": node.reachability().await,
        "relay_rtt_ms": relay.and_then(|relay| node.link(&relay)).map(|link| link.rtt_ms),
    });
    if args.json {
        return program::report(&report);
    }
    for (name, value) in report.as_object().into_iter().flatten() {
        program::list(&format!("{name:>16}  {value}"))?;
    }
    Ok(())
}

/// Takes a stream in: the number of bytes that follow, and they. Answers how long the last three quarters took, in microseconds.
async fn take(stream: &mut Stream) -> std::io::Result<()> {
    let n_bytes = stream.read_u64().await?;
    let mut sink = tokio::io::sink();
    tokio::io::copy(&mut (&mut *stream).take(n_bytes / 4), &mut sink).await?;
    let quarter = Instant::now();
    tokio::io::copy(&mut (&mut *stream).take(n_bytes - n_bytes / 4), &mut sink).await?;
    let micros = u64::try_from(quarter.elapsed().as_micros()).unwrap_or(u64::MAX);
    stream.write_u64(micros).await?;
    stream.shutdown().await
}

/// Sends a stream of zeros; how fast it arrived.
async fn send(node: &Node, peer: &PeerId, n_bytes: u64) -> anyhow::Result<serde_json::Value> {
    let start = Instant::now();
    let mut stream = node.open_stream(peer, BULK).await?;
    stream.write_u64(n_bytes).await?;
    tokio::io::copy(&mut tokio::io::repeat(0).take(n_bytes), &mut stream).await?;
    stream.flush().await?;
    let steady = Duration::from_micros(stream.read_u64().await.context("the peer did not take the stream")?);
    let mbit_per_s =
        |n_bytes: u64, time: Duration| (n_bytes as f64 * 8e-4 / time.as_secs_f64().max(1e-6)).round() / 100.0;
    Ok(json!({
        "mbit_per_s": mbit_per_s(n_bytes, start.elapsed()),
        "steady_mbit_per_s": mbit_per_s(n_bytes - n_bytes / 4, steady),
    }))
}

/// Calls until standard input ends; how many calls were made, and how many of them failed.
async fn hold(node: &Node, peer: &PeerId) -> anyhow::Result<(u64, u64)> {
    program::report(&json!({"calling": true}))?;
    let (mut input, mut nowhere) = (tokio::io::stdin(), tokio::io::sink());
    let mut asked_to_stop = std::pin::pin!(tokio::io::copy(&mut input, &mut nowhere));
    let (mut made, mut failed) = (0u64, 0);
    let mut answered = Instant::now();
    loop {
        let body = Bytes::copy_from_slice(&made.to_le_bytes());
        made += 1;
        if node.call(peer, ECHO, body.clone(), IMPATIENCE).await.is_ok_and(|answer| answer == body) {
            let gap = answered.elapsed();
            if gap > IMPATIENCE {
                program::report(&json!({"gap_ms": gap.as_secs_f64() * 1e3}))?;
            }
            answered = Instant::now();
        } else {
            failed += 1;
        }
        tokio::select! {
            read = &mut asked_to_stop => return Ok(read.map(|_| (made, failed))?),
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
}

/// Calls until it is stopped; how many calls were made, and how many of them failed.
async fn calls(
    node: Node,
    peer: PeerId,
    start: Instant,
    first: watch::Sender<Option<(Duration, bool)>>,
    stopped: watch::Receiver<bool>,
) -> (u64, u64) {
    let (mut made, mut failed) = (0u64, 0);
    while !*stopped.borrow() {
        let body = Bytes::copy_from_slice(&made.to_le_bytes());
        made += 1;
        match node.call(&peer, ECHO, body.clone(), PATIENCE).await {
            Ok(answer) if answer == body => {
                let relayed = node.paths(&peer).iter().all(|path| path.relayed);
                first.send_if_modified(|first| {
                    let is_first = first.is_none();
                    first.get_or_insert((start.elapsed(), relayed));
                    is_first
                });
            }
            Ok(_) => failed += 1,
            Err(error) => {
                tracing::warn!(%error, "call {made}");
                failed += 1;
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
    (made, failed)
}

/// Waits for an event.
async fn wait(
    mut events: tokio::sync::broadcast::Receiver<NetEvent>,
    wanted: impl Fn(&NetEvent) -> bool,
) -> anyhow::Result<()> {
    let found = async {
        while !wanted(&events.recv().await?) {}
        Ok(())
    };
    tokio::time::timeout(PATIENCE, found).await.map_err(|_| anyhow::anyhow!("nothing within {PATIENCE:?}"))?
}
