//! The suite that every [`BlockStore`] passes. Implementations outside of this crate call it from their tests too.

use std::collections::HashMap;

use bytes::Bytes;
use swarm_wire::Cid;

use crate::{Block, BlockStore, HashKind, StoreError};

/// A quota that [`check_full`] reaches.
pub const SMALL_QUOTA_BYTES: u64 = 10_000;

/// Checks the contract on fresh stores.
///
/// # Panics
/// When the store breaks it.
pub fn check(fresh: impl Fn() -> Box<dyn BlockStore>) {
    put_get_and_absence(&*fresh());
    agrees_with_a_map(&*fresh());
    both_names_of_a_block_are_served(&*fresh());
    removed_is_absent_or_kept(&*fresh());
    everything_has_a_name_and_pins_are_kept(&*fresh());
    concurrent_puts_of_one_block_keep_one(&*fresh());
}

/// Checks that a store with [`SMALL_QUOTA_BYTES`] refuses what does not fit, names the need, and keeps the rest.
///
/// # Panics
/// When it does not.
pub fn check_full(store: &dyn BlockStore) {
    let mut stored = Vec::new();
    let refusal = (0..100u8).find_map(|seed| {
        let block = block(HashKind::Blake3, seed, 1000);
        match store.put(&block) {
            Ok(new) => {
                assert!(new);
                stored.push(block);
                None
            }
            Err(error) => Some(error),
        }
    });
    match refusal {
        Some(StoreError::Full { needed_bytes, .. }) => assert!(needed_bytes > 0, "the need is named"),
        other => panic!("a full store answered {other:?}"),
    }
    assert!(!stored.is_empty(), "something fits");
    let alias = Block::new(HashKind::Sha2, stored[0].bytes().clone()).expect("it is a block");
    store.put_alias(&alias, stored[0].cid()).expect("a second name takes no room");
    for block in stored {
        assert_eq!(store.get(block.cid()).expect("readable"), Some(block), "a full store keeps what it has");
    }
    store.flush().expect("a full store can still be flushed");
}

fn put_get_and_absence(store: &dyn BlockStore) {
    for hash in [HashKind::Blake3, HashKind::Sha2] {
        for length in [0, 1, 1000, 1 << 20] {
            let block = block(hash, 1, length);
            assert_eq!(store.get(block.cid()).expect("readable"), None);
            assert_eq!(store.length_of(block.cid()).expect("readable"), None);
            assert!(store.put(&block).expect("room"), "a first put is new");
            assert!(!store.put(&block).expect("room"), "a second put is not");
            assert_eq!(store.length_of(block.cid()).expect("readable"), Some(length));
            assert_eq!(store.get(block.cid()).expect("readable").as_ref(), Some(&block));
        }
    }
    store.flush().expect("flush");
}

fn agrees_with_a_map(store: &dyn BlockStore) {
    let mut model: HashMap<Cid, Block> = HashMap::new();
    let mut state = 0x9e37_79b9u32;
    for step in 0..400 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let block = block(HashKind::Blake3, (state >> 24) as u8 % 64, 100 + (state >> 24) as usize % 64);
        if state & 0x10_0000 == 0 {
            assert_eq!(store.put(&block).expect("room"), !model.contains_key(block.cid()));
            model.insert(*block.cid(), block);
        } else {
            assert_eq!(store.get(block.cid()).expect("readable").as_ref(), model.get(block.cid()));
            let length = model.get(block.cid()).map(Block::len);
            assert_eq!(store.length_of(block.cid()).expect("readable"), length);
        }
        if step % 97 == 0 {
            store.flush().expect("flush");
        }
    }
}

fn both_names_of_a_block_are_served(store: &dyn BlockStore) {
    for (seed, stored) in [(1, true), (2, false)] {
        let (first, second) = (block(HashKind::Blake3, seed, 3000), block(HashKind::Sha2, seed, 3000));
        if stored {
            store.put(&first).expect("room");
        }
        for _ in 0..2 {
            store.put_alias(&second, first.cid()).expect("room");
            assert_eq!(store.length_of(second.cid()).expect("readable"), Some(3000));
            assert_eq!(store.get(second.cid()).expect("readable").as_ref(), Some(&second));
            assert_eq!(store.get(first.cid()).expect("readable").is_some(), stored);
            store.flush().expect("flush");
        }
        assert!(!store.put(&second).expect("room"), "it is here already");
    }
}

fn removed_is_absent_or_kept(store: &dyn BlockStore) {
    let (gone, kept) = (block(HashKind::Blake3, 1, 1000), block(HashKind::Blake3, 2, 1000));
    for block in [&gone, &kept] {
        store.put(block).expect("room");
    }
    let removes = store.remove(&[*gone.cid()]).expect("removable");
    assert_eq!(store.get(gone.cid()).expect("readable").is_none(), removes, "as it says");
    assert_eq!(store.length_of(gone.cid()).expect("readable").is_none(), removes);
    assert_eq!(store.remove(&[*gone.cid()]).expect("removable"), removes, "what is not here is no error");
    store.reclaim().expect("room");
    assert_eq!(store.put(&gone).expect("room"), removes, "it can come back");
    for block in [gone, kept] {
        assert_eq!(store.get(block.cid()).expect("readable"), Some(block));
    }
}

fn everything_has_a_name_and_pins_are_kept(store: &dyn BlockStore) {
    let blocks: Vec<Block> = (0..5).map(|seed| block(HashKind::Blake3, seed, 100)).collect();
    for (i, block) in blocks.iter().enumerate() {
        store.put(block).expect("room");
        if i == 2 {
            store.flush().expect("flush");
        }
    }
    let alias = block(HashKind::Sha2, 0, 100);
    store.put_alias(&alias, blocks[0].cid()).expect("room");
    let mut names: Vec<Cid> = blocks.iter().chain([&alias]).map(|block| *block.cid()).collect();
    let mut listed = store.cids().expect("readable");
    names.sort();
    listed.sort();
    assert_eq!(listed, names);

    assert!(store.pins().expect("readable").is_empty());
    for _ in 0..2 {
        store.pin(&names[0]).expect("pinned");
    }
    store.pin(&names[1]).expect("pinned");
    assert!(store.unpin(&names[1]).expect("readable"));
    assert!(!store.unpin(&names[1]).expect("readable"));
    assert_eq!(store.pins().expect("readable"), names[..1]);
}

fn concurrent_puts_of_one_block_keep_one(store: &dyn BlockStore) {
    let block = block(HashKind::Blake3, 9, 5000);
    let new = std::thread::scope(|scope| {
        let puts: Vec<_> = (0..4).map(|_| scope.spawn(|| store.put(&block).expect("room"))).collect();
        puts.into_iter().filter_map(|p| p.join().ok()).filter(|&new| new).count()
    });
    assert_eq!(new, 1, "exactly one put was the first");
    assert_eq!(store.get(block.cid()).expect("readable"), Some(block));
}

fn block(hash: HashKind, seed: u8, length: usize) -> Block {
    Block::new(hash, Bytes::from(vec![seed; length])).expect("within the limit")
}
