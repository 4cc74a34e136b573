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
    let copy = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
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
