//! A way through a NAT that hands out another port for each destination (symmetric), to a peer whose NAT keeps ports: nobody
//! knows the port that will be used, so it is guessed. One side opens many sockets, each with a mapping of its own; the other
//! side sends small packets to many ports. One guess that meets one mapping is enough, which is the birthday paradox. Pure.
//!
//! Of `n` open ports among 64,512, `m` guesses at different ports miss all with a chance of about `exp(-n m / 64512)`: with 256
//! and 2048 once in 3,400 tries. NATs that hand ports out in a row are met sooner, because the guesses are evenly spread.
//!
//! Over TCP a packet is the first one of a connection. The many sockets send theirs first, which the other NAT drops; a guess
//! that meets one makes both ends open the same connection at once. The guessing socket has to live until the answer is there,
//! so a bounded number of guesses stands at a time, each for twice the round trip.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::addr::is_plausible;

/// Sockets that the side with the changing ports opens.
pub const SOCKETS: usize = 256;
/// Ports that the other side tries.
pub const GUESSES: usize = 2048;
/// Guesses for QUIC that leave together, and the pause after them: 2000 packets of 21 bytes in a second.
pub const GUESSES_AT_ONCE: usize = 2;
/// See [`GUESSES_AT_ONCE`].
pub const GUESS_PAUSE: Duration = Duration::from_millis(1);
/// Guesses over TCP that stand at the same time: each is a socket.
pub const STANDING: usize = 256;
/// A guess over TCP stands at least this long ..
const STANDS_MIN: Duration = Duration::from_millis(256);
/// .. and at most this long.
const STANDS_MAX: Duration = Duration::from_millis(512);
/// How often this is tried with one peer ..
pub const TRIES: usize = 2;
/// .. in this time.
pub const TRIES_WITHIN: Duration = Duration::from_secs(600);

/// Ports below are not handed out to conversations.
const PORTS_FROM: u32 = 1024;
const PORTS: u32 = 65_536 - PORTS_FROM;
/// Steps of this size through the ports meet each once (it is prime to their number) and are spread evenly at any time: it is
/// the golden section of their number.
const STEP: u32 = 39_871;

/// What is to lead through the ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A UDP socket that becomes QUIC's.
    Quic,
    /// A TCP connection.
    Tcp,
}

impl Way {
    /// Every way, the better one first.
    pub const ALL: [Self; 2] = [Self::Quic, Self::Tcp];

    /// Everything after the agreement takes no longer.
    pub fn timeout(self) -> Duration {
        match self {
            Self::Quic => Duration::from_secs(4),
            Self::Tcp => Duration::from_secs(6),
        }
    }

    /// The socket address in a multiaddress that leads this way, over IPv4 and directly.
    pub fn address(self, multiaddr: &str) -> Option<SocketAddrV4> {
        let mut parts = multiaddr.strip_prefix("/ip4/")?.split('/');
        let ip = parts.next()?.parse().ok()?;
        let (transport, port) = (parts.next()?, parts.next()?.parse().ok()?);
        let leads = match self {
            Self::Quic => transport == "udp" && parts.next() == Some("quic-v1"),
            Self::Tcp => transport == "tcp",
        };
        // Only who is there may follow.
        let rest = (parts.next(), parts.next(), parts.next());
        let direct = matches!(rest, (None, ..) | (Some("p2p"), Some(_), None));
        (leads && direct).then(|| SocketAddrV4::new(ip, port))
    }

    /// The other way round.
    pub fn multiaddr(self, address: SocketAddrV4) -> String {
        let (ip, port) = (address.ip(), address.port());
        match self {
            Self::Quic => format!("/ip4/{ip}/udp/{port}/quic-v1"),
            Self::Tcp => format!("/ip4/{ip}/tcp/{port}"),
        }
    }
}

/// How long a guess over TCP stands, when a round trip over the relay takes `rtt`: the direct one is hardly longer, and the
/// answer of a busy machine may take as long again.
pub fn stands(rtt: Option<Duration>) -> Duration {
    rtt.map_or(STANDS_MAX, |rtt| rtt.saturating_mul(2).clamp(STANDS_MIN, STANDS_MAX))
}

/// The pause after each guess over TCP, so that no more than [`STANDING`] stand at the same time.
pub fn tcp_pause(stands: Duration) -> Duration {
    stands / STANDING as u32
}

/// What the own NAT does to ports, as peers tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Every peer sees the port that is listened on: another socket's port will be seen as it is, too.
    Kept,
    /// Some peer sees another one.
    Changed,
}

/// Where this node is seen and what its NAT does, from the ports that it listens on for `way` and the addresses at which peers
/// see it, the most promising first. Peers nearer than the relay, given its address, are on this side of the NAT and tell
/// nothing of it. `None` when nobody else sees it there over IPv4.
pub fn mapping<'a>(
    way: Way,
    ports: &[u16],
    relay: &str,
    seen: impl IntoIterator<Item = &'a str>,
) -> Option<(Ipv4Addr, Mapping)> {
    let mut found: Option<(Ipv4Addr, Mapping)> = None;
    let told = seen.into_iter().filter(|address| is_plausible(address, relay));
    for address in told.filter_map(|address| way.address(address)) {
        let kept = ports.contains(&address.port());
        match &mut found {
            None => found = Some((*address.ip(), if kept { Mapping::Kept } else { Mapping::Changed })),
            Some((ip, mapping)) if *ip == *address.ip() && !kept => *mapping = Mapping::Changed,
            Some(_) => {}
        }
    }
    found
}

/// The ports to try, all different; `seed` says where to begin.
pub fn guesses(seed: u32) -> impl Iterator<Item = u16> {
    let begin = seed % PORTS;
    (0..GUESSES as u32).map(move |n| (PORTS_FROM + (begin + n * STEP) % PORTS) as u16)
}

/// Bytes of a packet, which is a datagram, or over TCP the first bytes of a connection.
pub const PACKET_BYTES: usize = 1 + 4 + 16;
/// Begins a packet. QUIC's begin with another bit set (RFC 9000, section 17), so the two are never mistaken for each other.
const FIRST_BYTE: u8 = 0x0b;
/// Length of each side's nonce.
pub const NONCE_BYTES: usize = 16;

/// What the two sides say to each other over the relayed connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuessMessage {
    /// How the sender takes part.
    Offer(GuessOffer),
    /// The sender's sockets have sent: its NAT lets answers in now.
    Open,
    /// The sender does not take part.
    No,
}

/// How a side takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuessOffer {
    /// Never used before.
    pub nonce: [u8; NONCE_BYTES],
    /// Where the side is seen.
    pub ip: Ipv4Addr,
    /// The port at which the socket that will guess is seen; `None` where the NAT changes ports, and many sockets are opened.
    pub port: Option<u16>,
}

impl GuessOffer {
    /// Whether anything may be sent to where the peer says that it is seen, given the relay's address: to one machine that is no
    /// nearer than the relay, and to no port that is not handed out to conversations.
    pub fn is_plausible(&self, relay: &str) -> bool {
        let one_machine = !(self.ip.is_unspecified() || self.ip.is_broadcast() || self.ip.is_multicast());
        one_machine
            && self.port.is_none_or(|port| u32::from(port) >= PORTS_FROM)
            && is_plausible(&format!("/ip4/{}", self.ip), relay)
    }
}

/// What a packet says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packet {
    /// From each of the many sockets, so that its NAT lets answers in; the other NAT drops it. Over TCP the connection's first
    /// packet does that.
    Open,
    /// A guess; over TCP that, too, is a first packet.
    Guess,
    /// The guess arrived.
    Met,
    /// This pair of ports it shall be.
    Chosen,
}

impl Packet {
    const ALL: [Self; 4] = [Self::Open, Self::Guess, Self::Met, Self::Chosen];
}

/// Knows the packets of one try from everybody else's. Made of both sides' nonces, which only they know: these travel over
/// the relayed connection, which is encrypted end to end.
#[derive(Clone)]
pub struct Secret([u8; 2 * NONCE_BYTES]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// The nonce of the side that asked, and of the other one.
    pub fn new(asker: &[u8; NONCE_BYTES], answerer: &[u8; NONCE_BYTES]) -> Self {
        let mut bytes = [0; 2 * NONCE_BYTES];
        bytes[..NONCE_BYTES].copy_from_slice(asker);
        bytes[NONCE_BYTES..].copy_from_slice(answerer);
        Self(bytes)
    }

    /// The packet's bytes: first byte, kind (4 bytes, little endian), the first half of HMAC-SHA-256 over both.
    pub fn packet(&self, packet: Packet) -> [u8; PACKET_BYTES] {
        let mut bytes = [0; PACKET_BYTES];
        bytes[0] = FIRST_BYTE;
        bytes[1..5].copy_from_slice(&(packet as u32).to_le_bytes());
        let mac = self.mac(&bytes[..5]).finalize().into_bytes();
        bytes[5..].copy_from_slice(&mac[..16]);
        bytes
    }

    /// What a packet says, if it is one of this try.
    pub fn read(&self, bytes: &[u8]) -> Option<Packet> {
        let (head, mac) = bytes.split_at_checked(5).filter(|_| bytes.len() == PACKET_BYTES)?;
        self.mac(head).verify_truncated_left(mac).ok()?;
        Packet::ALL.into_iter().find(|packet| self.packet(*packet) == bytes)
    }

    fn mac(&self, head: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(b"lattica/punch/v1");
        mac.update(head);
        mac
    }
}

/// When tries with one peer began. At most [`TRIES`] in [`TRIES_WITHIN`].
#[derive(Debug, Default)]
pub struct Tries([Option<Duration>; TRIES]);

impl Tries {
    /// Whether one more may begin now; it is counted then.
    pub fn begin(&mut self, now: Duration) -> bool {
        let free = |at: &Option<Duration>| at.is_none_or(|at| now >= at + TRIES_WITHIN);
        let Some(place) = self.0.iter_mut().find(|at| free(at)) else { return false };
        *place = Some(now);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    /// A NAT that gives each conversation a port of its own and lets only its other end in.
    struct Nat {
        next: Box<dyn FnMut() -> u16>,
        /// By outside port: the socket inside, and whom it sent to.
        open: HashMap<u16, (usize, SocketAddrV4)>,
    }

    impl Nat {
        fn random(seed: u64) -> Self {
            let mut state = seed;
            let next = move || {
                // SplitMix64.
                state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                let mut z = state;
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                (1024 + (z ^ (z >> 31)) % 64_512) as u16
            };
            Self { next: Box::new(next), open: HashMap::new() }
        }

        fn in_a_row(mut port: u16) -> Self {
            let next = move || {
                port = if port == u16::MAX { 1024 } else { port + 1 };
                port
            };
            Self { next: Box::new(next), open: HashMap::new() }
        }

        fn send(&mut self, socket: usize, to: SocketAddrV4) {
            let mut port = (self.next)();
            while self.open.contains_key(&port) {
                port = (self.next)();
            }
            self.open.insert(port, (socket, to));
        }

        fn lets_in(&self, port: u16, from: SocketAddrV4) -> Option<usize> {
            self.open.get(&port).filter(|(_, to)| *to == from).map(|(socket, _)| *socket)
        }
    }

    const RELAY: &str = "/ip4/9.9.9.1/udp/1/quic-v1/p2p/R/p2p-circuit";
    const EASY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(9, 9, 9, 9), 5000);

    /// Guesses until one is met.
    fn met_after(mut nat: Nat, seed: u32) -> Option<usize> {
        for socket in 0..SOCKETS {
            nat.send(socket, EASY);
        }
        guesses(seed).position(|port| nat.lets_in(port, EASY).is_some())
    }

    #[test]
    fn random_ports_are_met_in_all_but_one_of_a_thousand_tries_and_half_of_them_soon() {
        let mut met: Vec<usize> =
            (0..4000u32).filter_map(|n| met_after(Nat::random(u64::from(n) * 7919), n * 104_729)).collect();
        assert!(met.len() >= 3996, "{} of 4000", met.len());
        met.sort_unstable();
        let (p50, p95) = (met[met.len() / 2], met[met.len() * 95 / 100]);
        assert!(p50 < 220 && p95 < 850, "half after {p50}, 95 % after {p95} guesses");
    }

    #[test]
    fn ports_in_a_row_are_always_met_and_sooner() {
        for n in 0..2000u32 {
            let begin = 1024 + (n * 31) as u16;
            let met = met_after(Nat::in_a_row(begin), n * 7919).expect("the guesses leave no gap as wide");
            assert!(met < 700, "{met} guesses");
        }
    }

    #[test]
    fn guesses_are_bounded_and_never_the_same_twice() {
        for seed in [0, 1, 64_511, u32::MAX] {
            let ports: Vec<u16> = guesses(seed).collect();
            assert_eq!(ports.len(), GUESSES);
            assert_eq!(ports.iter().collect::<HashSet<_>>().len(), GUESSES);
            assert!(ports.iter().all(|port| *port >= 1024));
        }
        let all = GUESS_PAUSE * (GUESSES / GUESSES_AT_ONCE) as u32;
        assert!(all < Way::Quic.timeout() / 2, "there is time for the answers");
    }

    #[test]
    fn guesses_over_tcp_stand_for_two_round_trips_and_never_too_many_of_them() {
        let ms = Duration::from_millis;
        assert_eq!(stands(None), ms(512));
        let rtts = [0, 1, 128, 200, 256, 90_000].map(|rtt| stands(Some(ms(rtt))).as_millis());
        assert_eq!(rtts, [256, 256, 256, 400, 512, 512]);
        assert_eq!(stands(Some(Duration::MAX)), STANDS_MAX);
        for stands in [STANDS_MIN, ms(333), STANDS_MAX] {
            let begun_meanwhile = stands.as_nanos() / tcp_pause(stands).as_nanos();
            assert!(begun_meanwhile <= STANDING as u128 + 1, "{begun_meanwhile}");
            // The last one, and its answer.
            let all = tcp_pause(stands) * GUESSES as u32 + 2 * stands;
            assert!(all < Way::Tcp.timeout(), "{all:?}");
        }
    }

    #[test]
    fn a_nat_is_known_by_what_peers_see() {
        let ip = Ipv4Addr::new(203, 0, 113, 5);
        // A peer in the own network sees the own port, whatever the NAT does.
        let near = |way: Way| way.multiaddr(SocketAddrV4::new(Ipv4Addr::new(192, 168, 0, 2), 4001));
        for (way, other) in [(Way::Quic, Way::Tcp), (Way::Tcp, Way::Quic)] {
            let seen = |ports: &[u16]| {
                let at = |port: &u16| SocketAddrV4::new(ip, *port);
                let far = ports.iter().map(|port| way.multiaddr(at(port)));
                let addresses: Vec<String> = std::iter::once(near(way)).chain(far).collect();
                let mapping = |way| mapping(way, &[4001], RELAY, addresses.iter().map(String::as_str));
                assert_eq!(mapping(other), None);
                mapping(way)
            };
            assert_eq!(seen(&[]), None);
            assert_eq!(seen(&[4001]), Some((ip, Mapping::Kept)));
            assert_eq!(seen(&[4001, 4001]), Some((ip, Mapping::Kept)));
            assert_eq!(seen(&[5123]), Some((ip, Mapping::Changed)));
            assert_eq!(seen(&[4001, 5123]), Some((ip, Mapping::Changed)));
        }
    }

    #[test]
    fn addresses_of_a_way_lead_there_over_ipv4_and_directly() {
        let at = Some(SocketAddrV4::new(Ipv4Addr::new(9, 9, 9, 9), 7));
        for (address, quic, tcp) in [
            ("/ip4/9.9.9.9/udp/7/quic-v1", at, None),
            ("/ip4/9.9.9.9/udp/7/quic-v1/p2p/Q", at, None),
            ("/ip4/9.9.9.9/tcp/7", None, at),
            ("/ip4/9.9.9.9/tcp/7/p2p/Q", None, at),
            ("/ip4/9.9.9.9/udp/7", None, None),
            ("/ip4/9.9.9.9/tcp/7/ws", None, None),
            ("/ip4/9.9.9.9/tcp/70000", None, None),
            ("/ip6/::1/udp/7/quic-v1", None, None),
            ("/ip6/::1/tcp/7", None, None),
            ("/ip4/9.9.9.9/udp/7/quic-v1/p2p/R/p2p-circuit", None, None),
            ("/ip4/9.9.9.9/tcp/7/p2p/R/p2p-circuit/p2p/Q", None, None),
        ] {
            assert_eq!((Way::Quic.address(address), Way::Tcp.address(address)), (quic, tcp), "{address}");
        }
    }

    #[test]
    fn a_peer_cannot_point_us_at_our_own_network_at_many_machines_or_at_a_service() {
        let may = |ip: [u8; 4], port: Option<u16>, relay: &str| {
            GuessOffer { nonce: [1; NONCE_BYTES], ip: Ipv4Addr::from(ip), port }.is_plausible(relay)
        };
        for port in [None, Some(1024), Some(40_000)] {
            assert!(may([9, 9, 9, 9], port, RELAY));
            // To connect to 0.0.0.0 is to connect to oneself.
            let others =
                [[0; 4], [127, 0, 0, 1], [192, 168, 0, 1], [169, 254, 0, 1], [224, 0, 0, 1], [255; 4]];
            for ip in others {
                assert!(!may(ip, port, RELAY), "{ip:?}");
            }
        }
        assert!(!may([9, 9, 9, 9], Some(22), RELAY) && !may([9, 9, 9, 9], Some(1023), RELAY));
        // Where the relay itself is near, so may the peer be.
        assert!(may([192, 168, 0, 1], None, "/ip4/192.168.0.2/tcp/1/p2p/R/p2p-circuit"));
    }

    #[test]
    fn a_peer_is_tried_with_twice_in_ten_minutes() {
        let mut tries = Tries::default();
        let minute = Duration::from_secs(60);
        assert!(tries.begin(Duration::ZERO) && tries.begin(minute));
        assert!(!tries.begin(2 * minute) && !tries.begin(9 * minute));
        assert!(tries.begin(10 * minute) && !tries.begin(10 * minute));
        assert!(tries.begin(11 * minute));
    }

    #[test]
    fn packets_are_pinned() {
        // Computed with Python's hmac and hashlib.
        let secret = Secret::new(&[1; 16], &[2; 16]);
        let hex: String = secret.packet(Packet::Chosen).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(hex, "0b0300000095330a8760d4b6f827a2af4e385f85a0");
    }

    proptest! {
        #[test]
        fn packets_are_known_by_their_try_only(a in any::<[u8; 16]>(), b in any::<[u8; 16]>(), flip in 0usize..PACKET_BYTES * 8) {
            let (secret, other) = (Secret::new(&a, &b), Secret::new(&[7; 16], &b));
            for packet in Packet::ALL {
                let mut bytes = secret.packet(packet);
                prop_assert_eq!(secret.read(&bytes), Some(packet));
                prop_assert!(a == [7; 16] || other.read(&bytes).is_none());
                bytes[flip / 8] ^= 1 << (flip % 8);
                prop_assert_eq!(secret.read(&bytes), None);
            }
        }

        #[test]
        fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            prop_assert_eq!(Secret::new(&[1; 16], &[2; 16]).read(&bytes), None);
        }
    }
}
