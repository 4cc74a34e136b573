//! Brings a node up: its threads, its transports, its listeners.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use futures::io::BufReader;
use libp2p::core::muxing::StreamMuxerBox;
use libp2p::core::transport::timeout::TransportTimeout;
use libp2p::core::transport::{ListenerId, Transport as _};
use libp2p::core::upgrade::Version;
use libp2p::core::{Multiaddr, multiaddr::Protocol};
use libp2p::swarm::{self, SwarmEvent};
use libp2p::{Swarm, dns, identity::Keypair, noise, relay, tcp, yamux};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{mpsc, oneshot, watch};

use super::behaviour::Behaviour;
use super::boxed::Boxed;
use super::driver::{Driver, root_cause};
use super::early;
use super::gate::Gate;
use super::guess;
use super::identity::Identity;
use super::link_probe::LINK_PROTOCOL;
use super::news;
use super::punch::PUNCH_PROTOCOL;
use super::quic::{Configs, Quic, Settings};
use super::rendezvous;
use super::rpc_client::RPC_PROTOCOL;
use super::shared::{Acceptor, Shared, lock};
use super::tcp::Tcp;
use crate::addr::is_relayed;
use crate::config::NodeConfig;
use crate::error::StartError;
use crate::punch::guess::Way;

/// Commands that wait for the swarm; further callers wait.
const COMMAND_QUEUE: usize = 256;
/// An idle connection beside a better one is closed after this long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);
/// Listeners have this long to report their addresses.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Read at once from a TCP socket. Memory that no data has passed through costs nothing.
const TCP_READ_BYTES: usize = 64 * 1024;
/// Streams that a peer may have open on one QUIC connection beside those of the limits: libp2p's protocols, and what is being
/// reset.
const OTHER_STREAMS: usize = 128;
/// Incoming streams of a connection whose protocol is not agreed upon yet.
const NEGOTIATING_STREAMS: usize = 128;

/// Starts a node's threads; returns when it listens.
pub(super) async fn start(
    identity: &Identity,
    mut config: NodeConfig,
) -> Result<(Arc<Shared>, watch::Receiver<()>), StartError> {
    // A slot at a relay is kept by the upkeep, not by a listener of our own.
    let (circuits, listen): (Vec<String>, Vec<String>) =
        config.listen.into_iter().partition(|a| is_relayed(a));
    config.listen = listen;
    config.relays.extend(circuits.iter().filter_map(|a| Some(a.split_once("/p2p-circuit")?.0.to_owned())));
    config.validate()?;
    let listen = parse_all(&config.listen)?;
    let external = parse_all(&config.external)?;
    parse_all(&config.bootstrap)?;
    parse_all(&config.relays)?;
    parse_all(&config.rendezvous)?;
    for address in &listen {
        refuse_taken_port(address)?;
    }

    let setup = |what: &'static str| {
        move |error: std::io::Error| StartError::Setup { what, reason: error.to_string() }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.io_threads)
        .thread_name("lattica-io")
        .enable_all()
        .build()
        .map_err(setup("the network threads"))?;
    let (commands, queue) = mpsc::channel(COMMAND_QUEUE);
    let local = identity.peer_id();
    let shared = Arc::new(Shared::new(local, config, Handle::current(), runtime.handle().clone(), commands));
    shared.set_acceptor(RPC_PROTOCOL, Some(Acceptor::Rpc));
    shared.set_acceptor(LINK_PROTOCOL, Some(Acceptor::Link));
    if shared.config.hole_punching {
        shared.set_acceptor(PUNCH_PROTOCOL, Some(Acceptor::Punch));
        for way in Way::ALL {
            shared.set_acceptor(guess::protocol(way), Some(Acceptor::Guess(way)));
        }
    }

    let signer = identity.clone();
    let (ready, started) = oneshot::channel();
    let (end, ended) = watch::channel(());
    let node = Arc::clone(&shared);
    // Kept outside of the thread's closure: a runtime must not be dropped here, where another one runs.
    let runtime = Arc::new(Mutex::new(Some(runtime)));
    let given = Arc::clone(&runtime);
    std::thread::Builder::new()
        .name("lattica-swarm".to_owned())
        .spawn(move || {
            let Some(runtime) = lock(&given).take() else { return };
            run(runtime, &signer, &node, queue, &listen, &external, ready);
            drop(end);
        })
        .map_err(|error| {
            if let Some(runtime) = lock(&runtime).take() {
                runtime.shutdown_background();
            }
            setup("the swarm thread")(error)
        })?;
    match started.await {
        Ok(result) => result.map(|()| {
            news::start(&shared, identity.clone());
            rendezvous::start(&shared, &identity.libp2p_keypair());
            (shared, ended)
        }),
        Err(_) => Err(StartError::Setup { what: "the swarm", reason: "its thread ended".to_owned() }),
    }
}

fn run(
    runtime: Runtime,
    identity: &Identity,
    shared: &Arc<Shared>,
    commands: mpsc::Receiver<super::driver::Command>,
    listen: &[Multiaddr],
    external: &[Multiaddr],
    ready: oneshot::Sender<Result<(), StartError>>,
) {
    runtime.block_on(async {
        let swarm = async {
            let mut swarm = build(&identity.libp2p_keypair(), Arc::clone(shared))?;
            for address in external {
                swarm.add_external_address(address.clone());
            }
            listen_on(&mut swarm, shared, listen).await?;
            Ok(swarm)
        };
        match swarm.await {
            Ok(swarm) => {
                let driver = Driver::new(swarm, Arc::clone(shared), identity.clone(), commands);
                if ready.send(Ok(())).is_ok() {
                    driver.run().await;
                    news::save(shared);
                }
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    });
    shared.stopped.cancel();
    // Tasks that still wait for a peer are dropped; none of them holds anything that needs an orderly end.
    runtime.shutdown_timeout(Duration::from_millis(200));
}

fn build(keypair: &Keypair, shared: Arc<Shared>) -> Result<Swarm<Boxed<Behaviour>>, StartError> {
    let liveness = shared.config.liveness.clone();
    let peer = keypair.public().to_peer_id();
    let setup = |what, reason: String| StartError::Setup { what, reason };
    let noise =
        noise::Config::new(keypair).map_err(|error| setup("the encryption of TCP", error.to_string()))?;

    let tcp = Tcp::new(tcp::Config::new().nodelay(true), Arc::clone(&shared.adopted_tcp))
        // The encryption reads 8 KiB at a time, which is a system call for each.
        .map(|stream, _| BufReader::with_capacity(TCP_READ_BYTES, stream))
        .upgrade(Version::V1Lazy)
        .authenticate(noise.clone())
        .multiplex(yamux::Config::default())
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(early::connection(muxer))));
    let limits = &shared.config.limits;
    let streams = limits.streams_per_connection + limits.waiting_streams_per_connection + OTHER_STREAMS;
    let settings = Settings {
        idle: liveness.quic_idle,
        keep_alive: liveness.quic_keep_alive,
        handshake: liveness.dial_timeout,
        streams: u32::try_from(streams).expect("validated: three millions at most"),
    };
    let configs = Configs::new(keypair, &settings)
        .map_err(|error| setup("the encryption of QUIC", root_cause(&error)))?;
    let quic = Quic::new(configs, Arc::clone(&shared.adopted))
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(early::connection(muxer))));
    let direct = quic.or_transport(tcp).map(|either, _| either.into_inner());
    let named =
        dns::tokio::Transport::system(direct).map_err(|error| setup("name lookup", error.to_string()))?;
    let (relayed, relay_client) = relay::client::new(peer);
    let relayed = relayed
        .upgrade(Version::V1Lazy)
        .authenticate(noise)
        .multiplex(yamux::Config::default())
        .map(|(peer, muxer), _| (peer, StreamMuxerBox::new(early::connection(muxer))));

    // Whatever the way, nobody gets past the gate unproved.
    let gate = Gate::new(shared.local.clone(), &shared.config.network, shared.config.access.clone());
    let transport = relayed
        .or_transport(named)
        .map(|either, _| either.into_inner())
        .and_then(move |output, endpoint| gate.pass(output, endpoint));
    let transport = TransportTimeout::new(transport, liveness.dial_timeout).boxed();
    let behaviour = Behaviour::new(keypair, relay_client, shared)
        .map_err(|error| setup("the behaviours", error.to_string()))?;
    let config = swarm::Config::with_tokio_executor()
        .with_idle_connection_timeout(IDLE_TIMEOUT)
        .with_max_negotiating_inbound_streams(NEGOTIATING_STREAMS)
        .with_smart_dial();
    Ok(Swarm::new(transport, Boxed(behaviour), peer, config))
}

/// Listens on every address and waits until each listener has reported where.
async fn listen_on(
    swarm: &mut Swarm<Boxed<Behaviour>>,
    shared: &Shared,
    addresses: &[Multiaddr],
) -> Result<(), StartError> {
    let mut waiting: HashSet<ListenerId> = HashSet::new();
    for address in addresses {
        let listener =
            swarm.listen_on(address.clone()).map_err(|error| listen_error(address, &root_cause(&error)))?;
        waiting.insert(listener);
    }
    let reported = async {
        while !waiting.is_empty() {
            match swarm.select_next_some().await {
                SwarmEvent::NewListenAddr { listener_id, address } => {
                    waiting.remove(&listener_id);
                    if shared.config.relay_server && shared.config.external.is_empty() {
                        swarm.add_external_address(address);
                    }
                }
                SwarmEvent::ListenerClosed { listener_id, reason: Err(error), .. }
                    if waiting.contains(&listener_id) =>
                {
                    return Err(StartError::Listen {
                        address: "an address".to_owned(),
                        reason: error.to_string(),
                    });
                }
                _ => {}
            }
        }
        Ok(())
    };
    tokio::time::timeout(LISTEN_TIMEOUT, reported).await.unwrap_or_else(|_| {
        let reason = format!("no listener came up within {LISTEN_TIMEOUT:?}");
        Err(StartError::Listen {
            address: addresses.first().map_or_else(String::new, ToString::to_string),
            reason,
        })
    })
}

fn parse_all(addresses: &[String]) -> Result<Vec<Multiaddr>, StartError> {
    let parse = |address: &String| {
        address.parse().map_err(|error: libp2p::multiaddr::Error| StartError::Address {
            address: address.clone(),
            reason: error.to_string(),
        })
    };
    addresses.iter().map(parse).collect()
}

/// The transports listen with port reuse, under which a second process can share a taken port without an error and then
/// steal connections; so the port is tried without it first.
fn refuse_taken_port(address: &Multiaddr) -> Result<(), StartError> {
    let mut parts = address.iter();
    let ip: IpAddr = match parts.next() {
        Some(Protocol::Ip4(ip)) => ip.into(),
        Some(Protocol::Ip6(ip)) => ip.into(),
        _ => return Ok(()),
    };
    let tried = match parts.next() {
        Some(Protocol::Tcp(port)) if port != 0 => TcpListener::bind(SocketAddr::new(ip, port)).map(|_| ()),
        Some(Protocol::Udp(port)) if port != 0 => UdpSocket::bind(SocketAddr::new(ip, port)).map(|_| ()),
        _ => return Ok(()),
    };
    tried.map_err(|error| listen_error(address, &error.to_string()))
}

fn listen_error(address: &Multiaddr, reason: &str) -> StartError {
    let address = address.to_string();
    if reason.contains("in use") {
        StartError::PortInUse { address }
    } else {
        StartError::Listen { address, reason: reason.to_owned() }
    }
}
