//! Our transport with itself and with libp2p's own, either dialling: streams, limits, garbage, silence, adopted sockets.

use std::collections::HashSet;
use std::fmt::Debug;
use std::future::poll_fn;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::io::{AsyncReadExt as _, AsyncWriteExt as _};
use futures::{AsyncRead, AsyncWrite};
use libp2p::PeerId;
use libp2p::core::muxing::{StreamMuxer, StreamMuxerExt as _};
use libp2p::core::transport::{DialOpts, ListenerId, PortUse, Transport, TransportEvent};
use libp2p::core::{Endpoint as Role, Multiaddr};
use libp2p::identity::Keypair;
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::connection::Connection;
use super::{Adopted, Configs, Quic, Settings, address};

const PATIENCE: Duration = Duration::from_secs(20);
const IDLE: Duration = Duration::from_secs(1);
const STREAMS: u32 = 200;
const ANYWHERE: &str = "/ip4/127.0.0.1/udp/0/quic-v1";

fn settings() -> Settings {
    Settings { idle: IDLE, keep_alive: IDLE / 10, handshake: PATIENCE, streams: STREAMS }
}

/// A transport of ours, its adopted sockets, and who it is.
fn ours() -> (Quic, Arc<Adopted>, PeerId) {
    let keypair = Keypair::generate_ed25519();
    let adopted = Arc::<Adopted>::default();
    let quic = Quic::new(Configs::new(&keypair, &settings()).unwrap(), Arc::clone(&adopted));
    (quic, adopted, keypair.public().to_peer_id())
}

/// libp2p's.
fn stock() -> (libp2p::quic::tokio::Transport, PeerId) {
    let keypair = Keypair::generate_ed25519();
    let quic = libp2p::quic::tokio::Transport::new(libp2p::quic::Config::new(&keypair));
    (quic, keypair.public().to_peer_id())
}

async fn event<T: Transport + Unpin>(transport: &mut T) -> TransportEvent<T::ListenerUpgrade, T::Error> {
    let next = poll_fn(|cx| Pin::new(&mut *transport).poll(cx));
    timeout(PATIENCE, next).await.expect("an event")
}

async fn listen<T: Transport + Unpin>(transport: &mut T, at: &str) -> Multiaddr
where
    T::Error: Debug,
{
    transport.listen_on(ListenerId::next(), at.parse().unwrap()).unwrap();
    match event(transport).await {
        TransportEvent::NewAddress { listen_addr, .. } => listen_addr,
        _ => panic!("an address was expected"),
    }
}

/// Who calls, from where.
async fn incoming<T: Transport + Unpin>(transport: &mut T) -> (T::Output, Multiaddr)
where
    T::Error: Debug,
{
    loop {
        if let TransportEvent::Incoming { upgrade, send_back_addr, .. } = event(transport).await {
            return (upgrade.await.unwrap(), send_back_addr);
        }
    }
}

fn options(port_use: PortUse) -> DialOpts {
    DialOpts { role: Role::Dialer, port_use }
}

async fn connect<A, B>(a: &mut A, b: &mut B, to: Multiaddr) -> (A::Output, B::Output)
where
    A: Transport + Unpin,
    B: Transport + Unpin,
    A::Error: Debug,
    B::Error: Debug,
{
    let dial = a.dial(to, options(PortUse::Reuse)).unwrap();
    let (dialled, (heard, _)) = tokio::join!(dial, incoming(b));
    (dialled.unwrap(), heard)
}

async fn open<M: StreamMuxer + Unpin>(connection: &mut M) -> M::Substream {
    timeout(PATIENCE, poll_fn(|cx| connection.poll_outbound_unpin(cx))).await.unwrap().unwrap()
}

async fn take<M: StreamMuxer + Unpin>(connection: &mut M) -> M::Substream {
    timeout(PATIENCE, poll_fn(|cx| connection.poll_inbound_unpin(cx))).await.unwrap().unwrap()
}

/// Sends more than a window there and the same back, and ends both directions.
async fn echo<M: StreamMuxer + Unpin, N: StreamMuxer + Unpin>(opener: &mut M, taker: &mut N)
where
    M::Substream: Unpin,
    N::Substream: Unpin,
{
    let message: Vec<u8> = (0..11_000_000u32).map(|n| n.to_le_bytes()[n as usize % 4]).collect();
    let asking = async {
        let (mut reader, mut writer) = open(opener).await.split();
        let mut answer = Vec::new();
        let (written, read) = tokio::join!(
            async {
                writer.write_all(&message).await?;
                writer.close().await
            },
            reader.read_to_end(&mut answer)
        );
        written.unwrap();
        read.unwrap();
        answer
    };
    let answering = async {
        let (mut reader, mut writer) = take(taker).await.split();
        futures::io::copy(&mut reader, &mut writer).await.unwrap();
        writer.close().await.unwrap();
    };
    let (answer, ()) = timeout(PATIENCE, async { tokio::join!(asking, answering) }).await.unwrap();
    assert!(answer == message);
}

async fn streams_go_both_ways<A, B, M, N>((mut a, peer_a): (A, PeerId), (mut b, peer_b): (B, PeerId))
where
    A: Transport<Output = (PeerId, M)> + Unpin,
    B: Transport<Output = (PeerId, N)> + Unpin,
    A::Error: Debug,
    B::Error: Debug,
    M: StreamMuxer + Unpin,
    N: StreamMuxer + Unpin,
    M::Substream: AsyncRead + AsyncWrite + Unpin,
    N::Substream: AsyncRead + AsyncWrite + Unpin,
{
    let to = listen(&mut b, ANYWHERE).await;
    let ((at_a, mut a), (at_b, mut b)) = connect(&mut a, &mut b, to).await;
    assert_eq!((at_a, at_b), (peer_b, peer_a));
    echo(&mut a, &mut b).await;
    echo(&mut b, &mut a).await;
    poll_fn(|cx| a.poll_close_unpin(cx)).await.unwrap();
    let ended = timeout(PATIENCE, poll_fn(|cx| b.poll_inbound_unpin(cx))).await.unwrap();
    assert!(ended.is_err());
}

#[tokio::test]
async fn streams_go_both_ways_between_our_own() {
    let ((a, _, peer_a), (b, _, peer_b)) = (ours(), ours());
    streams_go_both_ways((a, peer_a), (b, peer_b)).await;
}

#[tokio::test]
async fn streams_go_both_ways_when_a_stock_peer_dials() {
    let (b, _, peer_b) = ours();
    streams_go_both_ways(stock(), (b, peer_b)).await;
}

#[tokio::test]
async fn streams_go_both_ways_when_a_stock_peer_is_dialled() {
    let (a, _, peer_a) = ours();
    streams_go_both_ways((a, peer_a), stock()).await;
}

/// Two of ours that are connected.
async fn pair() -> (Connection, Connection, [Quic; 2]) {
    let ((mut a, ..), (mut b, ..)) = (ours(), ours());
    let to = listen(&mut b, ANYWHERE).await;
    let ((_, at_a), (_, at_b)) = connect(&mut a, &mut b, to).await;
    (at_a, at_b, [a, b])
}

#[tokio::test]
async fn more_streams_are_allowed_as_they_are_used_but_no_more_than_the_limit() {
    let (mut a, mut b, _transports) = pair().await;
    let mut open_here = Vec::new();
    let mut open_there = Vec::new();
    for _ in 0..STREAMS {
        let mut stream = open(&mut a).await;
        stream.write_all(b"x").await.unwrap();
        open_here.push(stream);
        open_there.push(take(&mut b).await);
    }
    let beyond = timeout(IDLE, poll_fn(|cx| a.poll_outbound_unpin(cx))).await;
    assert!(beyond.is_err(), "one stream too many");
    // Whoever ends some may open another. They are told of an eighth of the limit at a time.
    open_here.truncate(STREAMS as usize / 2);
    open_there.truncate(STREAMS as usize / 2);
    open(&mut a).await;
}

#[tokio::test]
async fn what_came_is_read_although_nobody_reads_our_answer() {
    let (a, mut b, _transports) = pair().await;
    let (mut send, mut recv) = a.raw().open_bi().await.unwrap();
    send.write_all(b"its message").await.unwrap();
    send.finish().unwrap();
    recv.stop(0u32.into()).unwrap();
    let mut incoming = take(&mut b).await;
    timeout(PATIENCE, incoming.stopped()).await.unwrap();
    incoming.write_all(b"\x13/multistream/1.0.0\n").await.unwrap();
    let mut message = String::new();
    incoming.read_to_string(&mut message).await.unwrap();
    assert_eq!(message, "its message");
    // More than an agreement is something that somebody should have read.
    assert!(incoming.write_all(&[0; 192]).await.is_err());
}

#[tokio::test]
async fn garbage_is_ignored() {
    let ((mut a, ..), (mut b, ..)) = (ours(), ours());
    let to = listen(&mut b, ANYWHERE).await;
    let at = address::socket(&to).unwrap();
    let stranger = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    for n_bytes in [0, 1, 20, 21, 40, 1199, 1200, 1500, 9000, 65_507] {
        for first in [0x00, 0x40, 0x80, 0xc0, 0xc3, 0xff] {
            let mut datagram = vec![0xa5; n_bytes];
            if let Some(byte) = datagram.first_mut() {
                *byte = first;
            }
            stranger.send_to(&datagram, at).await.unwrap();
            // The same with the version that is spoken here.
            if n_bytes > 5 {
                datagram[1..5].copy_from_slice(&[0, 0, 0, 1]);
                stranger.send_to(&datagram, at).await.unwrap();
            }
        }
    }
    let ((_, mut a), (_, mut b)) = connect(&mut a, &mut b, to).await;
    echo(&mut a, &mut b).await;
}

#[tokio::test]
async fn with_many_handshakes_under_way_a_stock_peer_shows_where_it_is_and_gets_in() {
    let ((mut a, ..), (mut b, ..), (mut c, _)) = (ours(), ours(), stock());
    let to = listen(&mut b, ANYWHERE).await;
    let mut under_way = Vec::new();
    while under_way.len() < 64 {
        let dial = tokio::spawn(a.dial(to.clone(), options(PortUse::Reuse)).unwrap());
        if let TransportEvent::Incoming { upgrade, .. } = event(&mut b).await {
            under_way.push((dial, upgrade));
        }
    }
    let dial = c.dial(to.clone(), options(PortUse::New)).unwrap();
    let (dialled, ((_, mut there), _)) = tokio::join!(dial, incoming(&mut b));
    echo(&mut dialled.unwrap().1, &mut there).await;
    // Whoever shows it is let in as well, up to a limit.
    while under_way.len() < 128 {
        let dial = tokio::spawn(a.dial(to.clone(), options(PortUse::Reuse)).unwrap());
        if let TransportEvent::Incoming { upgrade, .. } = event(&mut b).await {
            under_way.push((dial, upgrade));
        }
    }
    let dial = c.dial(to, options(PortUse::New)).unwrap();
    tokio::select! {
        dialled = dial => assert!(dialled.is_err()),
        _ = incoming(&mut b) => panic!("one handshake too many"),
    }
}

#[tokio::test]
async fn a_connection_that_hears_nothing_ends() {
    let ((mut a, ..), (mut b, ..)) = (ours(), ours());
    let to = address::socket(&listen(&mut b, ANYWHERE).await).unwrap();
    // A line that can be cut.
    let (front, back) = (
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
        UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap(),
    );
    let via = address::multiaddr(front.local_addr().unwrap());
    let line = tokio::spawn(async move {
        let (mut one, mut other) = (vec![0; 65_536], vec![0; 65_536]);
        let mut caller: Option<SocketAddr> = None;
        loop {
            tokio::select! {
                Ok((n, from)) = front.recv_from(&mut one) => {
                    caller = Some(from);
                    let _ = back.send_to(&one[..n], to).await;
                }
                Ok((n, _)) = back.recv_from(&mut other) => {
                    if let Some(caller) = caller {
                        let _ = front.send_to(&other[..n], caller).await;
                    }
                }
            }
        }
    });
    let ((_, mut a), (_, mut b)) = connect(&mut a, &mut b, via).await;
    // Silence of both ends is none of the line: keep-alives pass.
    assert!(timeout(IDLE * 3, poll_fn(|cx| a.poll_inbound_unpin(cx))).await.is_err());
    line.abort();
    for connection in [&mut a, &mut b] {
        assert!(timeout(PATIENCE, poll_fn(|cx| connection.poll_inbound_unpin(cx))).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn dials_leave_from_the_listeners_port_unless_they_ask_for_another() {
    let ((mut a, ..), (mut b, ..)) = (ours(), ours());
    let from = listen(&mut a, "/ip4/0.0.0.0/udp/0/quic-v1").await;
    let port = address::socket(&from).unwrap().port();
    let to = listen(&mut b, ANYWHERE).await;
    for (port_use, same) in [(PortUse::Reuse, true), (PortUse::New, false), (PortUse::Reuse, true)] {
        let dial = a.dial(to.clone(), options(port_use)).unwrap();
        let (dialled, (_, seen)) = tokio::join!(dial, incoming(&mut b));
        dialled.unwrap();
        assert_eq!(address::socket(&seen).unwrap().port() == port, same);
    }
}

/// A node dials as soon as its listeners stand.
#[tokio::test]
async fn the_first_dial_leaves_from_the_listeners_port_although_a_wildcard_has_told_no_address() {
    let ((mut a, ..), (mut b, ..)) = (ours(), ours());
    let to = listen(&mut b, ANYWHERE).await;
    a.listen_on(ListenerId::next(), "/ip4/0.0.0.0/udp/0/quic-v1".parse().unwrap()).unwrap();
    let dial = a.dial(to, options(PortUse::Reuse)).unwrap();
    let (dialled, (_, seen)) = tokio::join!(dial, incoming(&mut b));
    dialled.unwrap();
    let TransportEvent::NewAddress { listen_addr, .. } = event(&mut a).await else {
        panic!("an address was expected")
    };
    assert_eq!(address::socket(&seen).unwrap().port(), address::socket(&listen_addr).unwrap().port());
}

#[tokio::test]
async fn a_wildcard_is_listened_at_on_all_addresses_of_its_family() {
    let (mut a, ..) = ours();
    a.listen_on(ListenerId::next(), "/ip4/0.0.0.0/udp/0/quic-v1".parse().unwrap()).unwrap();
    let mut found = HashSet::new();
    while !found.contains(&Ipv4Addr::LOCALHOST.into()) {
        if let TransportEvent::NewAddress { listen_addr, .. } = event(&mut a).await {
            let ip = address::socket(&listen_addr).unwrap().ip();
            assert!(ip.is_ipv4() && !ip.is_unspecified() && found.insert(ip));
        }
    }
}

#[tokio::test]
async fn a_listener_that_is_removed_hears_nobody_and_its_connections_go_on() {
    let ((mut a, ..), (mut b, ..)) = (ours(), ours());
    let to = listen(&mut b, ANYWHERE).await;
    let ((_, mut at_a), (_, mut at_b)) = connect(&mut a, &mut b, to.clone()).await;
    let id = b.listeners().next().unwrap();
    assert!(b.remove_listener(id) && !b.remove_listener(id));
    assert!(
        matches!(event(&mut b).await, TransportEvent::ListenerClosed { listener_id, .. } if listener_id == id)
    );
    assert!(a.dial(to, options(PortUse::New)).unwrap().await.is_err());
    echo(&mut at_a, &mut at_b).await;
}

#[tokio::test]
async fn other_addresses_are_left_to_other_transports() {
    let (mut a, ..) = ours();
    for text in ["/ip4/127.0.0.1/tcp/1", "/dns/example.org/udp/1/quic-v1", "/ip4/127.0.0.1/udp/1"] {
        assert!(a.listen_on(ListenerId::next(), text.parse().unwrap()).is_err());
        assert!(a.dial(text.parse().unwrap(), options(PortUse::Reuse)).is_err());
    }
    for text in ["/ip4/127.0.0.1/udp/0/quic-v1", "/ip4/0.0.0.0/udp/1/quic-v1"] {
        assert!(a.dial(text.parse().unwrap(), options(PortUse::Reuse)).is_err());
    }
}

async fn socket() -> (std::net::UdpSocket, SocketAddrV4) {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let SocketAddr::V4(address) = socket.local_addr().unwrap() else { panic!("asked for IPv4") };
    (socket.into_std().unwrap(), address)
}

#[tokio::test]
async fn an_adopted_socket_is_dialled_through_and_heard_and_strangers_are_not() {
    let ((mut a, adopted_a, peer_a), (mut b, adopted_b, peer_b)) = (ours(), ours());
    let ((socket_a, at_a), (socket_b, at_b)) = (socket().await, socket().await);
    // Neither listens anywhere else.
    adopted_a.adopt(socket_a, at_b).unwrap();
    adopted_b.adopt(socket_b, at_a).unwrap();
    let (to_a, to_b) = (address::multiaddr(at_a.into()), address::multiaddr(at_b.into()));
    assert!(adopted_a.leads_to(&to_b) && !adopted_a.leads_to(&to_a));

    let (mut stranger, ..) = ours();
    let refused = stranger.dial(to_b.clone(), options(PortUse::New)).unwrap();
    let dial = a.dial(to_b, options(PortUse::New)).unwrap();
    let (dialled, ((from, mut there), seen)) = tokio::join!(dial, incoming(&mut b));
    let (to, mut here) = dialled.unwrap();
    assert_eq!((from, to, seen), (peer_a, peer_b, to_a));
    echo(&mut here, &mut there).await;
    echo(&mut there, &mut here).await;
    tokio::select! {
        dialled = refused => assert!(dialled.is_err()),
        _ = incoming(&mut b) => panic!("the hole is for one"),
    }
}

#[tokio::test]
async fn sockets_are_adopted_up_to_a_limit_and_a_later_one_to_the_same_address_counts() {
    let (quic, adopted, _) = ours();
    let remote = |port| SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 9), port);
    let mut last = 0;
    for _ in 0..2 {
        let (socket, at) = socket().await;
        adopted.adopt(socket, remote(1)).unwrap();
        last = at.port();
    }
    let endpoint = adopted.endpoint(remote(1).into()).unwrap();
    assert_eq!(endpoint.local_addr().unwrap().port(), last);
    for port in 2..=63 {
        adopted.adopt(socket().await.0, remote(port)).unwrap();
    }
    // The first one is still there.
    for port in [1, 64] {
        assert!(adopted.adopt(socket().await.0, remote(port)).is_err());
    }
    drop(quic);
    let ended = async {
        while adopted.adopt(socket().await.0, remote(64)).is_err() {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, ended).await.expect("those that end make room");
    assert!(Arc::<Adopted>::default().adopt(socket().await.0, remote(1)).is_err(), "there is no transport");
}
