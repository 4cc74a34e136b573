//! The peers that a node met, on disk, so that it finds back without its bootstrap peers. Each is the record that the peer
//! signed; whoever changes the file can take peers away, not put words into their mouths.

use std::fs;
use std::io::{Error, Read as _, Result, Write as _};
use std::path::Path;

use bytes::Bytes;
use rand::RngExt as _;

use crate::news::wire::Reply;

/// Larger files are no files of peers.
pub(super) const MAX_BYTES: usize = 256 * 1024;

/// The records in the file, unchecked. A file that is missing or damaged counts as empty.
pub(super) fn load(path: &Path) -> Vec<Bytes> {
    let read = || -> Result<Vec<Bytes>> {
        let mut bytes = Vec::new();
        fs::File::open(path)?.take(MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
        if bytes.len() > MAX_BYTES {
            return Err(Error::other("it is too large"));
        }
        let records = Reply::decode(bytes.into()).map_err(Error::other)?.records;
        Ok(records.into_iter().map(|(record, _)| record).collect())
    };
    match read() {
        Ok(records) => records,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the file of peers is not used");
            Vec::new()
        }
    }
}

/// Replaces the file: it is the old one or the new one, never a part.
pub(super) fn save(path: &Path, records: &[Bytes]) -> Result<()> {
    let records = records.iter().map(|record| (record.clone(), std::time::Duration::ZERO)).collect();
    let bytes = Reply { vectors: Vec::new(), records }.encode();
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        fs::create_dir_all(folder)?;
    }
    // A name of its own: the last words of a node that stops may be written beside those of its last minute.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(format!(".{:016x}", rand::rng().random::<u64>()));
    let written = fs::File::create_new(&unfinished).and_then(|mut file| {
        file.write_all(&bytes)?;
        file.sync_all()
    });
    let replaced = written.and_then(|()| fs::rename(&unfinished, path));
    if replaced.is_err() {
        let _ = fs::remove_file(&unfinished);
    }
    replaced
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_what_is_no_such_file_counts_as_empty() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deeper/peers");
        assert!(load(&path).is_empty());
        let records = [Bytes::from_static(b"one"), Bytes::from_static(b"two")];
        save(&path, &records).unwrap();
        save(&path, &records).unwrap();
        assert_eq!(load(&path), records);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
        fs::write(&path, [0xff; 9]).unwrap();
        assert!(load(&path).is_empty());
        fs::write(&path, vec![0; MAX_BYTES + 1]).unwrap();
        assert!(load(&path).is_empty());
    }
}
