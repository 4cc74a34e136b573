//! Messages: round trips, limits, and the bytes that other implementations send.

use proptest::prelude::*;

use super::*;

fn block(seed: u8, length: usize, hash: HashKind) -> Block {
    Block::new(hash, Bytes::from(vec![seed; length])).unwrap()
}

fn body(encoded: &[u8]) -> Bytes {
    let (payload, rest) = frame::decode("test", encoded, BITSWAP_MESSAGE_MAX_BYTES).unwrap().unwrap();
    assert!(rest.is_empty());
    Bytes::copy_from_slice(payload)
}

fn any_message() -> impl Strategy<Value = Message> {
    let hash = prop_oneof![Just(HashKind::Blake3), Just(HashKind::Sha2)];
    let blocks = proptest::collection::vec((any::<u8>(), 0usize..300, hash), 0..6)
        .prop_map(|v| v.into_iter().map(|(s, l, h)| block(s, l, h)).collect::<Vec<_>>());
    let entry = (any::<u8>(), any::<bool>(), any::<bool>(), any::<i32>(), any::<bool>()).prop_map(
        |(seed, cancel, have, priority, send_dont_have)| {
            let cid = *block(seed, 3, HashKind::Blake3).cid();
            if cancel {
                return WantEntry::Cancel { cid };
            }
            let kind = if have { WantKind::Have } else { WantKind::Block };
            WantEntry::Want { cid, kind, priority, send_dont_have }
        },
    );
    let presence =
        (any::<u8>(), any::<bool>()).prop_map(|(seed, have)| (*block(seed, 2, HashKind::Sha2).cid(), have));
    (
        proptest::collection::vec(entry, 0..20),
        any::<bool>(),
        blocks,
        proptest::collection::vec(presence, 0..20),
        0u32..1000,
    )
        .prop_map(|(entries, full, blocks, presences, pending_bytes)| Message {
            entries,
            full,
            blocks,
            presences,
            pending_bytes,
        })
}

proptest! {
    #[test]
    fn messages_round_trip(message in any_message()) {
        prop_assert_eq!(Message::decode(body(&message.encode())).unwrap(), message);
    }

    #[test]
    fn any_bytes_decode_or_fail_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Message::decode(Bytes::from(bytes));
    }

    #[test]
    fn damaged_messages_never_pass_a_wrong_block(message in any_message(), at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut bytes = body(&message.encode()).to_vec();
        if bytes.is_empty() { return Ok(()); }
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        if let Ok(back) = Message::decode(Bytes::from(bytes)) {
            for block in back.blocks {
                prop_assert!(Block::verify(*block.cid(), block.bytes().clone()).is_ok());
            }
        }
    }

    #[test]
    fn splitting_keeps_everything_and_respects_the_target(lengths in proptest::collection::vec(1usize..700_000, 0..12)) {
        let blocks: Vec<Block> = lengths.iter().enumerate().map(|(i, &l)| block(i as u8, l, HashKind::Blake3)).collect();
        let whole = Message { blocks: blocks.clone(), ..Message::default() };
        let parts = whole.split();
        prop_assert_eq!(parts.iter().flat_map(|m| m.blocks.clone()).collect::<Vec<_>>(), blocks);
        for part in parts {
            let bytes: usize = part.blocks.iter().map(Block::len).sum();
            prop_assert!(bytes <= MESSAGE_TARGET_BYTES);
        }
    }
}

#[test]
fn truncated_messages_are_refused_or_lose_their_tail() {
    let message = Message { blocks: vec![block(1, 100, HashKind::Blake3)], ..Message::default() };
    let bytes = body(&message.encode());
    for cut in 1..bytes.len() {
        assert!(Message::decode(bytes.slice(..cut)).is_err());
    }
}

#[test]
fn the_encoding_is_pinned() {
    let cid = *block(7, 1, HashKind::Sha2).cid();
    let digest: String = cid.hash().digest().iter().map(|b| format!("{b:02x}")).collect();
    let message = Message {
        entries: vec![WantEntry::Want { cid, kind: WantKind::Have, priority: 5, send_dont_have: true }],
        full: true,
        blocks: vec![block(7, 1, HashKind::Sha2)],
        presences: vec![(cid, false)],
        pending_bytes: 3,
    };
    let hex: String = message.encode().iter().map(|b| format!("{b:02x}")).collect();
    let name = format!("01551220{digest}");
    // wantlist { entry { cid, priority 5, want have, send dont have }, full }, payload { prefix, data }, presence, pending
    let presence = format!("22280a24{name}1001");
    let expected = format!("690a300a2c0a24{name}10052001280110011a090a0401551220120107{presence}2803");
    assert_eq!(hex, expected);
}

#[test]
fn bitswap_1_0_blocks_are_read_as_sha2() {
    let message = proto::Message { blocks: vec![Bytes::from_static(b"old")], ..proto::Message::default() };
    let back = Message::decode(message.encode_to_vec().into()).unwrap();
    assert_eq!(back.blocks, [Block::new(HashKind::Sha2, Bytes::from_static(b"old")).unwrap()]);
}

#[test]
fn oversized_blocks_and_odd_prefixes_are_refused() {
    let with = |prefix: &[u8], length: usize| {
        let payload = vec![ProtoBlock { prefix: prefix.to_vec().into(), data: vec![0; length].into() }];
        Message::decode(proto::Message { payload, ..proto::Message::default() }.encode_to_vec().into())
    };
    assert!(with(&[1, 0x55, 0x1e, 32], 5).is_ok());
    assert!(with(&[0, 0x70, 0x12, 32], 5).is_ok());
    assert!(with(&[1, 0x55, 0x1e, 32], BLOCK_MAX_BYTES + 1).is_err());
    assert!(with(&[1, 0x55, 0x00, 5], 5).is_err(), "identity hash");
    assert!(with(&[1, 0x55, 0x1e, 16], 5).is_err(), "short digest");
    assert!(with(&[2, 0x55, 0x1e, 32], 5).is_err(), "unknown version");
    assert!(with(&[0x80; 12], 5).is_err(), "endless varint");
    assert!(with(&[], 5).is_err());
    assert!(Message::decode(vec![0; BITSWAP_MESSAGE_MAX_BYTES + 1].into()).is_err());
}

#[test]
fn a_message_of_empty_elements_is_refused_before_it_grows() {
    // Wants, blocks of 1.0, blocks, presences; each element is two bytes of the message and some fifty in memory.
    let wants = |n: usize| {
        let list = [0x0a, 0].repeat(n);
        let mut message = vec![0x0a];
        frame::encode_length(list.len(), &mut message);
        [message, list].concat()
    };
    let refused = |bytes: Vec<u8>| {
        let error = Message::decode(Bytes::from(bytes)).unwrap_err();
        assert!(error.to_string().contains("elements"), "{error}");
    };
    refused(wants(2_000_000));
    // Split over many wantlists, it is the same.
    refused([0x0a, 2, 0x0a, 0].repeat(1_000_000));
    for key in [0x12, 0x1a, 0x22] {
        refused([key, 0].repeat(2_000_000));
    }
    let entries = Message::decode(Bytes::from(wants(ELEMENTS_MAX))).unwrap().entries;
    assert_eq!(entries.len(), 0, "they name nothing");
}
