//! Every decoder that a peer's bytes reach in the network layers, as functions that take any bytes: they may refuse them,
//! not panic, and what they accept must survive being encoded and decoded again.
//!
//! `cargo xtask fuzz` searches for bytes that break one; `tests/replay.rs` gives what was found, and the corpus, to all of
//! them on the stable toolchain.

use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::Bytes;
use ed25519_dalek::SigningKey;
use lattica_bitswap::delta::{self, DeltaIndex};
use lattica_bitswap::manifest::{BlockRef, Entry, Manifest};
use lattica_bitswap::spread::wire::Frame;
use lattica_bitswap::spread::{Bitmap, SpreadMessage};
use lattica_bitswap::unixfs::{self, Limits, Node, Tree, Walk};
use lattica_bitswap::wire::Message;
use lattica_bitswap::{Block, BlockStore, HashKind, MemoryStore, UnixfsError};
use lattica_net::access;
use lattica_net::dht;
use lattica_net::news::record;
use lattica_net::news::wire::{LINKS_DOMAIN, Reply, Request, decode_vector};
use lattica_net::punch::guess::{GuessMessage, GuessOffer, Packet, Secret};
use lattica_net::rendezvous::wire::{Answer, Question};
use lattica_net::rendezvous::{Found, Registration};
use lattica_net::v1;
use lattica_net::wire::{
    Header, PunchMessage, decode_echo, decode_guess, decode_probe, decode_punch, encode_echo, encode_guess,
    encode_probe, encode_punch,
};
use swarm_wire::generated::swarm::v1::Signed;
use swarm_wire::limits::RPC_BODY_MAX_BYTES;
use swarm_wire::prost::Message as _;
use swarm_wire::repeated::{self, Element};
use swarm_wire::signed::{self, Signer as _};
use swarm_wire::{Cid, DType, PeerId, TensorHeader, cid, frame};

/// One decoder.
#[derive(Debug)]
pub struct Decoder {
    /// Names it, and its folder of inputs.
    pub name: &'static str,
    /// Gives it bytes. Panics when it breaks a promise.
    pub check: fn(&[u8]),
    /// Valid inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Longest input that is tried.
    pub input_max_bytes: u32,
    /// No single allocation may be larger than this many MiB: a few times the longest input, so that lists which grow in
    /// memory are found.
    pub allocation_max_mb: u32,
}

impl Decoder {
    /// A decoder of short messages.
    const fn new(name: &'static str, check: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Self {
        Self { name, check, seeds, input_max_bytes: 64 * 1024, allocation_max_mb: 1 }
    }

    /// A decoder of messages that may be long.
    const fn long(name: &'static str, check: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Self {
        Self { name, check, seeds, input_max_bytes: 1024 * 1024, allocation_max_mb: 8 }
    }
}

/// All of them.
pub const DECODERS: &[Decoder] = &[
    Decoder::new("frame-length", frame_length, || vec![vec![0x05, 1, 2, 3, 4, 5]]),
    Decoder::new("tensor-header", tensor_header, tensor_seeds),
    Decoder::new("cid", content_id, || vec![root().to_bytes()]),
    Decoder::new("peer-id", peer_id, || vec![peer().as_bytes().to_vec()]),
    Decoder::new("signed", signed_statement, signed_seeds),
    Decoder::new("repeated", lists, || vec![vec![1, 0x0a, 2, 0x0a, 0]]),
    Decoder::new("rpc-header", rpc_header, rpc_seeds),
    Decoder::new("link-frame", link_frame, || vec![encode_probe(9), encode_echo(9, Some(1e6))]),
    Decoder::new("hole-punch", hole_punch, punch_seeds),
    Decoder::new("guess", guess, guess_seeds),
    Decoder::new("gate-hello", gate_hello, || vec![access::hello(&[7; 32]).to_vec()]),
    Decoder::new("news", news, news_seeds),
    Decoder::new("link-vector", link_vector, vector_seeds),
    Decoder::new("peer-record", peer_record, record_seeds),
    Decoder::new("dht-record", dht_record, dht_seeds),
    Decoder::new("rendezvous", rendezvous, rendezvous_seeds),
    Decoder::new("v1-message", v1_message, v1_seeds),
    Decoder::long("bitswap-message", bitswap_message, bitswap_seeds),
    Decoder::long("manifest", manifest, manifest_seeds),
    Decoder::new("delta-index", delta_index, delta_seeds),
    Decoder::new("patch", patch, patch_seeds),
    Decoder::long("spread-frame", spread_frame, spread_seeds),
    Decoder::long("unixfs-node", unixfs_node, unixfs_seeds),
    Decoder::new("unixfs-walk", unixfs_walk, walk_seeds),
];

fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn peer() -> PeerId {
    PeerId::from_ed25519(&key().public_key())
}

fn root() -> Cid {
    cid::raw(HashKind::Blake3.code(), &[3; 32])
}

fn frame_length(bytes: &[u8]) {
    if let Ok(Some((length, n_prefix))) = frame::decode_length("fuzz", bytes, 1 << 20) {
        assert!(length <= 1 << 20 && n_prefix <= bytes.len());
        let mut again = Vec::new();
        frame::encode_length(length, &mut again);
        assert!(again.len() <= n_prefix, "the shortest encoding is ours");
    }
    if let Ok(Some((payload, rest))) = frame::decode("fuzz", bytes, 1 << 20) {
        assert!(payload.len() + rest.len() < bytes.len());
    }
}

fn tensor_header(bytes: &[u8]) {
    if let Ok((header, rest)) = TensorHeader::decode(bytes) {
        assert_eq!(header.encode(), bytes[..bytes.len() - rest.len()]);
    }
    if let Ok((header, payload)) = TensorHeader::decode_with_payload(bytes) {
        assert_eq!(header.payload_bytes(), payload.len());
    }
}

fn tensor_seeds() -> Vec<Vec<u8>> {
    let header = TensorHeader::new(DType::F32, &[2, 1]).expect("a small tensor");
    vec![[header.encode(), vec![0; 8]].concat()]
}

fn content_id(bytes: &[u8]) {
    if let Ok(found) = cid::decode(bytes) {
        assert_eq!(cid::decode(&found.to_bytes()).expect("it was one"), found);
    }
}

fn peer_id(bytes: &[u8]) {
    if let Ok(peer) = PeerId::from_bytes(bytes) {
        assert_eq!(peer.to_string().parse::<PeerId>().expect("it was one"), peer);
        let _ = (peer.short(), peer.ed25519_public_key());
    }
}

fn signed_statement(bytes: &[u8]) {
    if let Ok(statement) = Signed::decode(bytes) {
        let _ = signed::verify(&statement, "fuzz/v1");
    }
    // The bytes as what an honest key signs: they verify, and not for another purpose.
    let statement = key().signed("fuzz/v1", bytes);
    assert_eq!(signed::verify(&statement, "fuzz/v1"), Ok(peer()));
    assert!(signed::verify(&statement, "fuzz/v2").is_err());
}

fn signed_seeds() -> Vec<Vec<u8>> {
    vec![key().signed("fuzz/v1", b"payload").encode_to_vec()]
}

/// The first byte chooses the list; what prost reads has the length that was counted before.
fn lists(bytes: &[u8]) {
    use swarm_wire::generated::bitswap::Message;
    let Some((&choice, bytes)) = bytes.split_first() else { return };
    let path: &[u32] = [&[1, 1][..], &[2], &[3], &[4]][usize::from(choice) % 4];
    let Ok(read) = Message::decode(bytes) else { return };
    let wants = read.wantlist.map_or(0, |list| list.entries.len());
    let lengths = [wants, read.blocks.len(), read.payload.len(), read.block_presences.len()];
    let n = lengths[usize::from(choice) % 4];
    let counted = |most| repeated::check("fuzz", bytes, (path, Element::Field), most).is_ok();
    // Groups are refused though prost skips them.
    assert!(!counted(usize::MAX) || (counted(n) && (n == 0 || !counted(n - 1))), "{n} are there");
}

fn rpc_header(bytes: &[u8]) {
    if let Ok(Some((header, n_bytes))) = Header::decode(bytes, RPC_BODY_MAX_BYTES) {
        assert!(n_bytes <= bytes.len() && header.body_bytes() <= RPC_BODY_MAX_BYTES);
        let again = Header::decode(&header.clone().encode(), RPC_BODY_MAX_BYTES);
        assert_eq!(again.expect("it was one").expect("all of it is there").0, header);
    }
}

fn rpc_seeds() -> Vec<Vec<u8>> {
    let request = Header::Request {
        call_id: 7,
        method: "method".to_owned(),
        deadline: Duration::from_secs(1),
        body_bytes: 128,
        done_below: 3,
        attempt: 1,
    };
    let answer = Header::Answer { call_id: 7, refusal: None, body_bytes: 128 };
    [request, answer, Header::Cancel { call_id: 7 }].into_iter().map(Header::encode).collect()
}

fn link_frame(bytes: &[u8]) {
    if let Ok(Some((sequence, n_bytes))) = decode_probe(bytes) {
        assert!(n_bytes <= bytes.len());
        assert_eq!(decode_probe(&encode_probe(sequence)).ok().flatten().map(|p| p.0), Some(sequence));
    }
    let _ = decode_echo(bytes);
}

fn hole_punch(bytes: &[u8]) {
    if let Ok(Some((message, n_bytes))) = decode_punch(bytes) {
        assert!(n_bytes <= bytes.len());
        let again = decode_punch(&encode_punch(message.clone())).expect("it was one").expect("all of it");
        assert_eq!(again.0, message);
    }
}

fn punch_seeds() -> Vec<Vec<u8>> {
    let address = Bytes::from_static(&[4, 9, 9, 9, 9, 6, 0, 80]);
    vec![encode_punch(PunchMessage::Connect(vec![address])), encode_punch(PunchMessage::Sync)]
}

fn guess(bytes: &[u8]) {
    if let Ok(Some((message, n_bytes))) = decode_guess(bytes) {
        assert!(n_bytes <= bytes.len());
        assert_eq!(decode_guess(&encode_guess(message)).expect("it was one").expect("all of it").0, message);
    }
    assert_eq!(Secret::new(&[1; 16], &[2; 16]).read(bytes), None, "nobody guesses a MAC");
}

fn guess_seeds() -> Vec<Vec<u8>> {
    let offer = GuessOffer { nonce: [7; 16], ip: Ipv4Addr::new(9, 9, 9, 9), port: Some(300) };
    let messages = [GuessMessage::Offer(offer), GuessMessage::Open, GuessMessage::No];
    let packet = Secret::new(&[3; 16], &[2; 16]).packet(Packet::Guess);
    messages.into_iter().map(encode_guess).chain([packet.to_vec()]).collect()
}

fn gate_hello(bytes: &[u8]) {
    if let Some(hello) = bytes.first_chunk::<{ access::HELLO_BYTES }>()
        && let Ok(nonce) = access::read_hello(hello)
    {
        assert_eq!(access::hello(&nonce), *hello);
    }
}

fn news(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    if let Ok(request) = Request::decode(bytes.clone()) {
        assert_eq!(Request::decode(request.encode()).expect("it was one"), request);
    }
    if let Ok(reply) = Reply::decode(bytes) {
        assert_eq!(Reply::decode(reply.clone().encode()).expect("it was one"), reply);
    }
}

fn news_seeds() -> Vec<Vec<u8>> {
    let request = Request { vectors: vec![(1, 2)], records: vec![(3, 4), (5, 6)] };
    let item = (Bytes::from_static(b"statement"), Duration::from_secs(1));
    let reply = Reply { vectors: vec![item.clone()], records: vec![item] };
    vec![request.encode().to_vec(), reply.encode().to_vec()]
}

/// What is signed in a peer record, and as what (RFC 0003).
const RECORD_DOMAIN: &[u8] = b"libp2p-peer-record";
const RECORD_TYPE: &[u8] = &[3, 1];

fn peer_record(bytes: &[u8]) {
    for read in [record::decode, record::decode_of_any_form] {
        let _ = read(bytes);
        // Behind a good signature, where no random bytes get.
        if let Ok(found) = read(&signed_record(bytes)) {
            assert!(found.author == peer() && found.addresses.len() <= bytes.len() / 2);
        }
    }
}

/// The bytes in an envelope (RFC 0002) of our key's: its fields are the key, the type, the payload and the signature.
fn signed_record(payload: &[u8]) -> Vec<u8> {
    let mut signed = Vec::new();
    for part in [RECORD_DOMAIN, RECORD_TYPE, payload] {
        frame::encode(part, &mut signed);
    }
    let (key, signature) = (key().public_key(), key().signature(&signed));
    // An Ed25519 key, as libp2p writes it.
    let key = [&[8, 1, 18, 32][..], &key].concat();
    fields(&[(1, &key), (2, RECORD_TYPE), (3, payload), (5, &signature)])
}

/// A protobuf message of byte strings.
fn fields(fields: &[(u8, &[u8])]) -> Vec<u8> {
    let mut message = Vec::new();
    for (number, bytes) in fields {
        message.push(number << 3 | 2);
        frame::encode(bytes, &mut message);
    }
    message
}

fn record_seeds() -> Vec<Vec<u8>> {
    let address = fields(&[(1, &[4, 127, 0, 0, 1, 6, 16, 1])]);
    let record = fields(&[(1, peer().as_bytes()), (3, &address), (3, &address)]);
    let record = [&record[..], &[16, 7]].concat();
    vec![signed_record(&record), record]
}

fn v1_message(bytes: &[u8]) {
    if let Ok(message) = v1::Message::decode(&Bytes::copy_from_slice(bytes)) {
        assert_eq!(v1::Message::decode(&message.encode().into()), Ok(message));
    }
}

fn v1_seeds() -> Vec<Vec<u8>> {
    let (id, data) = ("7".to_owned(), Bytes::from(vec![1; 300]));
    let request =
        v1::Message::Request { id: id.clone(), method: "Service.method".to_owned(), data: data.clone() };
    let answers =
        [v1::Message::Response { id: id.clone(), data }, v1::Message::Error { id, error: "no".to_owned() }];
    let compressed = vec![1, 1, b'7', 3, 1, 2, 3, 1, 2];
    [request].iter().chain(&answers).map(v1::Message::encode).chain([compressed]).collect()
}

fn rendezvous(bytes: &[u8]) {
    let bytes = Bytes::copy_from_slice(bytes);
    if let Ok(question) = Question::decode(bytes.clone()) {
        assert_eq!(Question::decode(question.encode()).expect("it was one"), question);
    }
    if let Ok(answer) = Answer::decode(bytes) {
        assert_eq!(Answer::decode(answer.encode()).expect("it was one"), answer);
    }
}

fn rendezvous_seeds() -> Vec<Vec<u8>> {
    let (namespace, record) = ("swarm".to_owned(), Bytes::from_static(b"record"));
    let registration = Registration { namespace: namespace.clone(), record: record.clone(), ttl_s: 7200 };
    let found =
        Found { registrations: vec![registration], cookie: Bytes::from_static(b"\0\0\0\0\0\0\0\x01swarm") };
    vec![
        Question::Register { namespace: namespace.clone(), record, ttl_s: None }.encode().to_vec(),
        Question::Discover { namespace: Some(namespace), limit: Some(9), cookie: None }.encode().to_vec(),
        Answer::Registered(Ok(7200)).encode().to_vec(),
        Answer::Discovered(Ok(found)).encode().to_vec(),
    ]
}

fn link_vector(bytes: &[u8]) {
    let _ = decode_vector(&Bytes::copy_from_slice(bytes), |_, _| true);
    // Behind a good signature, where no random bytes get.
    let statement = Bytes::from(key().signed(LINKS_DOMAIN, bytes).encode_to_vec());
    if let Ok(Some((author, vector))) = decode_vector(&statement, |_, _| true) {
        assert_eq!(author, peer());
        assert!(vector.coordinate.error() <= 1.0 && vector.neighbours.iter().all(|(_, c)| c.rtt_ms >= 0.0));
    }
}

fn vector_seeds() -> Vec<Vec<u8>> {
    use swarm_wire::generated::lattica::v1::{Coordinate, LinkNeighbour, LinkVector};
    let peer = Bytes::copy_from_slice(peer().as_bytes());
    let neighbour =
        LinkNeighbour { peer, rtt_ms: 20.0, loss: 0.1, relayed: true, ..LinkNeighbour::default() };
    let coordinate = Coordinate { x_ms: 1.0, height_ms: 2.0, error: 0.3, ..Coordinate::default() };
    let vector = LinkVector { written_ms: 7, coordinate: Some(coordinate), neighbours: vec![neighbour] };
    vec![vector.encode_to_vec()]
}

fn dht_record(bytes: &[u8]) {
    let _ = (dht::wire::decode(bytes, |_| Ok(())), dht::wire::decode_kept(bytes));
    // Behind a good signature, where no random bytes get.
    let statement = key().signed(dht::wire::RECORD_DOMAIN, bytes).encode_to_vec();
    if let Ok(record) = dht::wire::decode(&statement, |_| Ok(())) {
        assert!(record.publisher == peer() && dht::is_signed(&record.key()));
        if let Some(now) = record.expires().checked_sub(Duration::from_secs(1)) {
            let again = dht::wire::encode(&record, &key());
            assert_eq!(dht::accept(now, &record.key(), &again, Some(&statement)), Ok(record));
        }
    }
}

fn dht_seeds() -> Vec<Vec<u8>> {
    use swarm_wire::generated::lattica::v1::DhtRecord;
    let value = Bytes::from_static(b"value");
    let (network, name) = ("swarm".to_owned(), "name".to_owned());
    vec![DhtRecord { network, name, sequence: 7, expires_s: 9, value }.encode_to_vec()]
}

fn bitswap_message(bytes: &[u8]) {
    if let Ok(message) = Message::decode(Bytes::copy_from_slice(bytes)) {
        let encoded = message.encode();
        let (payload, _) = frame::decode("fuzz", &encoded, 8 << 20).expect("ours").expect("all of it");
        Message::decode(Bytes::copy_from_slice(payload)).expect("what we read we can write");
    }
}

fn bitswap_seeds() -> Vec<Vec<u8>> {
    let block = Block::new(HashKind::Blake3, Bytes::from_static(b"a block")).expect("a small block");
    let message = Message {
        blocks: vec![block],
        presences: vec![(root(), true)],
        entries: vec![lattica_bitswap::wire::WantEntry::Cancel { cid: root() }],
        full: true,
        pending_bytes: 9,
    };
    let encoded = message.encode();
    let (payload, _) = frame::decode("fuzz", &encoded, 8 << 20).expect("ours").expect("all of it");
    vec![payload.to_vec(), [0x0a, 0x12, 0x1a, 0x22].map(|key| [key, 0].repeat(40)).concat()]
}

fn manifest_seeds() -> Vec<Vec<u8>> {
    vec![a_manifest().to_vec(), [0x22, 0].repeat(40)]
}

fn manifest(bytes: &[u8]) {
    if let Ok(manifest) = Manifest::decode(bytes)
        && let Ok(block) = manifest.to_block()
    {
        let again = Manifest::decode(block.bytes()).expect("it was one");
        assert_eq!((again.total_bytes(), again.blocks()), (manifest.total_bytes(), manifest.blocks()));
    }
}

fn a_manifest() -> Bytes {
    let entries = vec![Entry { name: "file".to_owned(), offset: 0, length: 9 }];
    let blocks = vec![BlockRef { cid: root(), length: 9 }];
    let manifest = Manifest::new("name", "file", HashKind::Blake3, entries, blocks).expect("a small one");
    manifest.to_block().expect("a small one").bytes().clone()
}

fn delta_index(bytes: &[u8]) {
    let Some((n_blocks, bytes)) = bytes.split_first_chunk::<2>() else { return };
    let n_blocks = usize::from(u16::from_le_bytes(*n_blocks));
    if let Ok(index) = DeltaIndex::decode(bytes, n_blocks) {
        assert!(index.patched.is_sorted_by(|a, b| a < b) && index.patched.len() <= n_blocks);
        assert_eq!(DeltaIndex::decode(&index.encode(), n_blocks).expect("it was one"), index);
    }
}

fn delta_seeds() -> Vec<Vec<u8>> {
    let index = DeltaIndex { patched: vec![0, 3, 8] };
    vec![[vec![9, 0], index.encode().to_vec()].concat()]
}

/// The first byte says how many of the others are the block before; the rest is its patch, and its next version.
fn patch(bytes: &[u8]) {
    let Some((&n, bytes)) = bytes.split_first() else { return };
    let (old, rest) = bytes.split_at(usize::from(n).min(bytes.len()));
    if let Ok(new) = delta::apply(old, rest) {
        assert_eq!(new.len(), old.len());
    }
    let n = old.len().min(rest.len());
    if let Some(made) = delta::diff(&old[..n], &rest[..n]) {
        assert_eq!(delta::apply(&old[..n], &made).expect("ours"), rest[..n]);
    }
}

fn patch_seeds() -> Vec<Vec<u8>> {
    let (old, mut new) = ([7; 64], [7; 64]);
    new[20] = 9;
    let made = delta::diff(&old, &new).expect("one word");
    vec![[&[64][..], &old, &made].concat(), [&[64][..], &old, &new].concat()]
}

fn spread_frame(bytes: &[u8]) {
    let Some((n_chunks, bytes)) = bytes.split_first_chunk::<2>() else { return };
    let n_chunks = u32::from(u16::from_le_bytes(*n_chunks) & 0x3fff);
    if let Ok(read) = Frame::decode(Bytes::copy_from_slice(bytes), n_chunks) {
        let encoded = read.clone().encode();
        let (payload, _) = frame::decode("fuzz", &encoded, 4 << 20).expect("ours").expect("all of it");
        let again = Frame::decode(Bytes::copy_from_slice(payload), n_chunks).expect("it was one");
        assert_eq!(again, read);
    }
}

fn spread_seeds() -> Vec<Vec<u8>> {
    let frames = [
        Frame::Hello(root()),
        Frame::Peers(vec![(peer(), vec!["/ip4/127.0.0.1/tcp/1".to_owned()])]),
        Frame::Message(SpreadMessage::Holds(Bitmap::full(9))),
        Frame::Message(SpreadMessage::Have(vec![0, 8])),
        Frame::Message(SpreadMessage::Request(3)),
        Frame::Message(SpreadMessage::Coming { chunk: 4, lot: 5 }),
        Frame::Chunk { index: 7, bytes: Bytes::from_static(b"chunk") },
    ];
    let seed = |read: Frame| {
        let encoded = read.encode();
        let (payload, _) = frame::decode("fuzz", &encoded, 4 << 20).expect("ours").expect("all of it");
        [&[9, 0][..], payload].concat()
    };
    frames.into_iter().map(seed).collect()
}

/// Any bytes as a block of this codec.
fn block_of(codec: u64, bytes: &[u8]) -> Option<Block> {
    let bytes = Bytes::copy_from_slice(bytes);
    let raw = Block::new(HashKind::Sha2, bytes.clone()).ok()?;
    Block::verify(Cid::new_v1(codec, *raw.cid().hash()), bytes).ok()
}

fn unixfs_node(bytes: &[u8]) {
    let Some(block) = block_of(unixfs::CODEC_DAG_PB, bytes) else { return };
    if let Ok(Node::File { data, children }) = Node::decode(&block) {
        // A link has a name of 34 bytes or more, and a length.
        assert!(data.len() + children.len() * 36 <= bytes.len());
        assert_eq!(unixfs::content(&block).ok(), Some(data));
    }
}

/// What the reader of a graph refuses to go beyond here, so that few bytes reach it.
const LIMITS: Limits = Limits { bytes: 1 << 24, blocks: 512, depth: 8 };

/// Blocks, each with its length in front, the root first. A link leads to one of them by the first byte of its digest, so
/// that graphs with circles are found, which no honest hash gives.
fn unixfs_walk(mut bytes: &[u8]) {
    let mut blocks = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<2>() {
        let (block, rest) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
        blocks.push(block);
        bytes = rest;
    }
    let Some(root) = blocks.first().and_then(|root| block_of(unixfs::CODEC_DAG_PB, root)) else { return };
    let refused = || UnixfsError::NotAFile { cid: *root.cid() };
    let load = |cid: &Cid| {
        let bytes = if cid == root.cid() {
            blocks[0]
        } else {
            blocks[usize::from(cid.hash().digest()[0]) % blocks.len()]
        };
        block_of(cid.codec(), bytes).ok_or_else(refused)
    };
    let mut walk = Walk::new(*root.cid(), LIMITS);
    while !walk.wanted().is_empty() {
        if walk.advance(load).is_err() {
            return;
        }
    }
    let tree = walk.finish();
    assert!(tree.bytes() <= LIMITS.bytes && n_parts(&tree) <= LIMITS.blocks);
    for file in &tree.files {
        assert!(!file.path.split('/').any(|name| matches!(name, "." | "..")) && !file.path.starts_with('/'));
    }
}

fn n_parts(tree: &Tree) -> usize {
    tree.files.iter().map(|file| file.parts.len()).sum()
}

/// Nodes of a directory with a file of two leaves and a directory below it, the root first.
fn unixfs_seeds() -> Vec<Vec<u8>> {
    let store = MemoryStore::new();
    let mut blocks = Vec::new();
    let mut add = |bytes: &'static [u8]| {
        let block = Block::new(HashKind::Sha2, Bytes::from_static(bytes)).expect("a small block");
        store.put(&block).expect("it keeps all");
        blocks.push(BlockRef { cid: *block.cid(), length: block.len() as u32 });
    };
    for leaf in [&b"the first leaf"[..], b"another leaf", b"below"] {
        add(leaf);
    }
    let entries = [("file", 0, 26), ("below/file", 26, 5)];
    let entries =
        entries.map(|(name, offset, length)| Entry { name: name.to_owned(), offset, length }).to_vec();
    let manifest = Manifest::new("name", "files", HashKind::Sha2, entries, blocks).expect("a small one");
    let root = unixfs::publish(&store, &manifest).expect("it keeps all");
    let mut nodes = store.cids().expect("in memory");
    nodes.retain(|cid| cid.codec() == unixfs::CODEC_DAG_PB);
    nodes.sort_by_key(|cid| (*cid != root, *cid));
    let bytes = |cid: &Cid| store.get(cid).expect("in memory").expect("it was listed").bytes().to_vec();
    nodes.iter().map(bytes).collect()
}

fn walk_seeds() -> Vec<Vec<u8>> {
    let block = |node: Vec<u8>| [&(node.len() as u16).to_le_bytes()[..], &node].concat();
    vec![unixfs_seeds().into_iter().map(block).collect::<Vec<_>>().concat()]
}
