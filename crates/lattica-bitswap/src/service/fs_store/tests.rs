//! The store on disk: the conformance suite, reopening, torn writes, damage, references, a full disk.

use std::io::Write;

use super::*;
use crate::HashKind;
use crate::store::conformance;

fn block(seed: u8, length: usize) -> Block {
    Block::new(HashKind::Blake3, Bytes::from(vec![seed; length])).unwrap()
}

#[test]
fn fs_store_conforms() {
    let dir = tempfile::tempdir().unwrap();
    let count = std::cell::Cell::new(0);
    conformance::check(|| {
        count.set(count.get() + 1);
        Box::new(FsStore::open(dir.path().join(count.get().to_string())).unwrap())
    });
    let quota_bytes = Some(conformance::SMALL_QUOTA_BYTES);
    let config = FsStoreConfig { quota_bytes, ..FsStoreConfig::default() };
    conformance::check_full(&FsStore::open_with(dir.path().join("full"), config).unwrap());
}

#[test]
fn blocks_survive_reopening_with_and_without_a_flush() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path()).unwrap();
    store.put(&block(1, 1000)).unwrap();
    store.flush().unwrap();
    store.put(&block(2, 2000)).unwrap();
    // A kill: nothing is dropped in order, so neither flush nor index commit happen for the second block.
    let copy = killed(dir.path());
    let store = FsStore::open(copy.path()).unwrap();
    for block in [block(1, 1000), block(2, 2000)] {
        assert_eq!(store.get(block.cid()).unwrap(), Some(block));
    }
    assert!(!store.put(&block(2, 2000)).unwrap(), "found again, not stored again");
}

#[test]
fn torn_writes_are_cut_off_and_writing_goes_on() {
    let record = segment::record_bytes(&block(2, 500)) as usize;
    for torn in [1, 4, 9, 30, 100, record - 1] {
        let dir = tempfile::tempdir().unwrap();
        let store = FsStore::open(dir.path()).unwrap();
        store.put(&block(1, 1000)).unwrap();
        store.flush().unwrap();
        store.put(&block(2, 500)).unwrap();
        let path = segment_path(dir.path(), 0);
        let length = fs::metadata(&path).unwrap().len();
        let cut = tempfile::tempdir().unwrap();
        fs::copy(dir.path().join("index.redb"), cut.path().join("index.redb")).unwrap();
        let bytes = fs::read(&path).unwrap();
        fs::write(segment_path(cut.path(), 0), &bytes[..length as usize - record + torn]).unwrap();

        let store = FsStore::open(cut.path()).unwrap();
        assert_eq!(store.get(block(1, 1000).cid()).unwrap(), Some(block(1, 1000)), "torn at {torn}");
        assert_eq!(store.get(block(2, 500).cid()).unwrap(), None, "torn at {torn}");
        assert!(store.put(&block(2, 500)).unwrap());
        drop(store);
        let store = FsStore::open(cut.path()).unwrap();
        assert_eq!(store.get(block(2, 500).cid()).unwrap(), Some(block(2, 500)));
    }
}

#[test]
fn segments_roll_over() {
    let dir = tempfile::tempdir().unwrap();
    let config = FsStoreConfig { segment_bytes: 1000, flush_bytes: 700, ..FsStoreConfig::default() };
    let store = FsStore::open_with(dir.path(), config.clone()).unwrap();
    for seed in 0..20 {
        store.put(&block(seed, 400)).unwrap();
    }
    drop(store);
    assert!(segment::list(dir.path()).unwrap().len() > 3);
    let store = FsStore::open_with(dir.path(), config).unwrap();
    for seed in 0..20 {
        assert_eq!(store.get(block(seed, 400).cid()).unwrap(), Some(block(seed, 400)));
    }
}

#[test]
fn damage_is_noticed_and_healed_by_the_next_put() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path()).unwrap();
    store.put(&block(1, 1000)).unwrap();
    store.flush().unwrap();
    let path = segment_path(dir.path(), 0);
    let mut file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.seek(SeekFrom::End(-10)).unwrap();
    file.write_all(b"damaged!").unwrap();
    let cid = *block(1, 1000).cid();
    assert!(matches!(store.get(&cid), Err(StoreError::Damaged { .. })));
    assert_eq!(store.length_of(&cid).unwrap(), None);
    assert!(store.put(&block(1, 1000)).unwrap());
    assert_eq!(store.get(&cid).unwrap(), Some(block(1, 1000)));
}

/// The directory as a kill would leave it.
fn killed(dir: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

fn segments_bytes(dir: &Path) -> u64 {
    let numbers = segment::list(dir).unwrap();
    numbers.into_iter().map(|n| fs::metadata(segment_path(dir, n)).unwrap().len()).sum()
}

#[test]
fn removed_blocks_stay_gone_and_their_room_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let config = FsStoreConfig { segment_bytes: 2000, flush_bytes: 700, ..FsStoreConfig::default() };
    let store = FsStore::open_with(dir.path(), config.clone()).unwrap();
    let blocks: Vec<Block> = (0..30).map(|seed| block(seed, 400)).collect();
    for block in &blocks {
        store.put(block).unwrap();
    }
    let second = Block::new(HashKind::Sha2, blocks[7].bytes().clone()).unwrap();
    store.put_alias(&second, blocks[7].cid()).unwrap();
    let is_kept = |seed: usize| seed.is_multiple_of(7);
    let gone: Vec<Cid> = (0..30).filter(|&seed| !is_kept(seed)).map(|seed| *blocks[seed].cid()).collect();
    let before = segments_bytes(dir.path());
    assert!(store.remove(&gone).unwrap());
    let old = segment_path(dir.path(), 0);
    let old_bytes = fs::read(&old).unwrap();
    let freed = store.reclaim().unwrap();
    assert_eq!(freed, before - segments_bytes(dir.path()));
    assert!(freed > before / 2 && !old.exists(), "{freed} of {before}");
    assert_eq!(store.reclaim().unwrap(), 0, "once is enough");

    let check = |store: &FsStore| {
        for (seed, block) in blocks.iter().enumerate() {
            assert_eq!(store.get(block.cid()).unwrap().is_some(), is_kept(seed), "{seed}");
        }
        assert_eq!(store.get(second.cid()).unwrap().as_ref(), Some(&second));
    };
    check(&store);
    let copy = killed(dir.path());
    check(&FsStore::open_with(copy.path(), config.clone()).unwrap());
    // A kill between the new index and the end of the old file.
    let copy = killed(dir.path());
    fs::write(segment_path(copy.path(), 0), old_bytes).unwrap();
    let store = FsStore::open_with(copy.path(), config).unwrap();
    for (_, block) in blocks.iter().enumerate().filter(|(seed, _)| is_kept(*seed)) {
        assert_eq!(store.get(block.cid()).unwrap().as_ref(), Some(block));
    }
    store.remove(&gone).unwrap();
    store.reclaim().unwrap();
    check(&store);
}

#[test]
fn any_history_of_puts_removals_and_reopenings_agrees_with_a_map() {
    let dir = tempfile::tempdir().unwrap();
    let config = FsStoreConfig { segment_bytes: 3000, flush_bytes: 1500, ..FsStoreConfig::default() };
    let mut store = FsStore::open_with(dir.path(), config.clone()).unwrap();
    let mut model = HashMap::new();
    let mut state = 1u32;
    for step in 0..1500 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let (seed, choice) = ((state >> 8) as u8 % 40, (state >> 24) % 16);
        let block = block(seed, 100 + 10 * usize::from(seed));
        match choice {
            0..8 => assert_eq!(store.put(&block).unwrap(), model.insert(*block.cid(), block).is_none()),
            8..13 => {
                model.remove(block.cid());
                store.remove(&[*block.cid()]).unwrap();
            }
            13 => assert!(store.reclaim().is_ok()),
            14 => store.flush().unwrap(),
            _ => {
                drop(store);
                store = FsStore::open_with(dir.path(), config.clone()).unwrap();
            }
        }
        if step % 50 == 0 {
            let listed: HashSet<Cid> = store.cids().unwrap().into_iter().collect();
            assert_eq!(listed, model.keys().copied().collect(), "step {step}");
            model.iter().for_each(|(cid, block)| assert_eq!(store.get(cid).unwrap().as_ref(), Some(block)));
        }
    }
    store.reclaim().unwrap();
    let live: u64 = model.values().map(segment::record_bytes).sum();
    let used = segments_bytes(dir.path());
    assert!(used < 3 * live + 3000, "{used} bytes for {live}");
    assert_eq!(store.lock().used_bytes, used);
}

#[test]
fn a_reader_does_not_notice_that_blocks_move() {
    let dir = tempfile::tempdir().unwrap();
    let config = FsStoreConfig { segment_bytes: 20_000, ..FsStoreConfig::default() };
    let store = FsStore::open_with(dir.path(), config).unwrap();
    let kept = block(200, 300);
    store.put(&kept).unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while store.pins().unwrap().is_empty() {
                assert_eq!(store.get(kept.cid()).unwrap().as_ref(), Some(&kept));
            }
        });
        for round in 0..20 {
            let others: Vec<Block> = (0..100).map(|seed| block(seed, 300 + round)).collect();
            for block in &others {
                store.put(block).unwrap();
            }
            store.remove(&others.iter().map(|block| *block.cid()).collect::<Vec<_>>()).unwrap();
            assert!(store.reclaim().unwrap() > 0);
        }
        store.pin(kept.cid()).unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn a_scrub_drops_what_is_damaged_or_changed_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let store = FsStore::open(dir.path().join("store")).unwrap();
    for seed in 0..4 {
        store.put(&block(seed, 1000)).unwrap();
    }
    let file = dir.path().join("weights");
    fs::write(&file, vec![9; 5000]).unwrap();
    let referenced = block(9, 5000);
    assert!(store.put_reference(&referenced, &file, 0).unwrap());
    let clean = store.scrub(|_, _| ()).unwrap();
    assert_eq!(clean, Scrubbed { intact: 5, bytes: 9000, dropped: Vec::new() });

    let mut segment = File::options().write(true).open(segment_path(store.dir(), 0)).unwrap();
    segment.seek(SeekFrom::End(-10)).unwrap();
    segment.write_all(b"damaged!").unwrap();
    fs::write(&file, vec![8; 5001]).unwrap();
    let mut told = Vec::new();
    let mut found = store.scrub(|done, all| told.push((done, all))).unwrap();
    let mut wanted = vec![*block(3, 1000).cid(), *referenced.cid()];
    wanted.sort();
    found.dropped.sort();
    assert_eq!((found.intact, found.bytes, found.dropped), (3, 3000, wanted));
    assert_eq!((told.first(), told.last()), (Some(&(0, 5)), Some(&(5, 5))));
    drop(store);
    let store = FsStore::open(dir.path().join("store")).unwrap();
    assert_eq!(store.get(block(3, 1000).cid()).unwrap(), None);
    assert!(store.put(&block(3, 1000)).unwrap());
    assert_eq!(store.scrub(|_, _| ()).unwrap().intact, 4);
}

#[test]
fn pins_survive_reopening() {
    let dir = tempfile::tempdir().unwrap();
    let root = *block(1, 10).cid();
    FsStore::open(dir.path()).unwrap().pin(&root).unwrap();
    let store = FsStore::open(dir.path()).unwrap();
    assert_eq!(store.pins().unwrap(), [root]);
    assert!(store.unpin(&root).unwrap());
}

#[test]
fn references_are_served_without_a_copy_until_the_file_changes() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("weights");
    fs::write(&file, [vec![0; 100], vec![7; 50_000]].concat()).unwrap();
    let block = Block::new(HashKind::Blake3, Bytes::from(vec![7; 50_000])).unwrap();
    let store_dir = dir.path().join("store");
    let store = FsStore::open(&store_dir).unwrap();
    assert!(store.put_reference(&block, &file, 100).unwrap());
    drop(store);
    let store = FsStore::open(&store_dir).unwrap();
    assert_eq!(store.get(block.cid()).unwrap().as_ref(), Some(&block));
    assert!(fs::metadata(segment_path(&store_dir, 0)).unwrap().len() < 1000, "no copy");

    fs::write(&file, vec![8; 50_101]).unwrap();
    assert!(
        matches!(store.get(block.cid()), Err(StoreError::FileChanged { path }) if path.ends_with("weights"))
    );
    assert_eq!(store.length_of(block.cid()).unwrap(), None);
    assert!(store.put(&block).unwrap(), "can be stored again");
    assert_eq!(store.get(block.cid()).unwrap(), Some(block));
}

#[test]
fn a_reference_with_other_bytes_of_the_same_age_is_refused_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("weights");
    fs::write(&file, vec![7; 1000]).unwrap();
    let modified = fs::metadata(&file).unwrap().modified().unwrap();
    let block = Block::new(HashKind::Blake3, Bytes::from(vec![7; 1000])).unwrap();
    let store = FsStore::open(dir.path().join("store")).unwrap();
    store.put_reference(&block, &file, 0).unwrap();
    fs::write(&file, vec![8; 1000]).unwrap();
    File::options().write(true).open(&file).unwrap().set_modified(modified).unwrap();
    assert!(matches!(store.get(block.cid()), Err(StoreError::FileChanged { .. })));
}

#[test]
fn a_second_process_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let _first = FsStore::open(dir.path()).unwrap();
    let error = FsStore::open(dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_named_and_nothing_stored_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| {
        std::process::Command::new(args[0])
            .args(&args[1..])
            .arg(dir.path())
            .output()
            .is_ok_and(|o| o.status.success())
    };
    if !mount(&["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs"]) {
        println!("skipped: mounting a small tmpfs takes root (the quota test covers the rest)");
        return;
    }
    let result = std::panic::catch_unwind(|| {
        let store = FsStore::open(dir.path().join("store")).unwrap();
        let mut stored = Vec::new();
        let error = (0..40u8).find_map(|seed| match store.put(&block(seed, 1 << 20)) {
            Ok(_) => {
                stored.push(seed);
                None
            }
            Err(error) => Some(error),
        });
        let Some(StoreError::Full { path, needed_bytes }) = error else { panic!("{error:?}") };
        assert!(path.starts_with(dir.path()) && needed_bytes > 0);
        assert!(stored.len() > 2, "{}", stored.len());
        for seed in stored {
            assert_eq!(store.get(block(seed, 1 << 20).cid()).unwrap(), Some(block(seed, 1 << 20)));
        }
    });
    assert!(mount(&["umount"]), "unmounting");
    result.unwrap();
}
