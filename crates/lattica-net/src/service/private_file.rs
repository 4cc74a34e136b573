//! Files that only their owner may read: they hold secrets. A file is there completely or not at all, and none that is
//! there is overwritten.

use std::fs::{File, OpenOptions};
use std::io::{Error, Result, Write};
use std::path::Path;

use rand::RngExt as _;

/// What a file that could be opened is.
pub(super) enum Opened {
    /// Its owner's only.
    Private(File),
    /// Others may read it: its permission bits.
    TooOpen(u32),
}

/// Opens the file at `path`.
pub(super) fn open(path: &Path) -> Result<Opened> {
    let file = File::open(path)?;
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::MetadataExt::mode(&file.metadata()?) & 0o777;
        if mode & 0o077 != 0 {
            return Ok(Opened::TooOpen(mode));
        }
    }
    Ok(Opened::Private(file))
}

/// Writes a new file at `path` with mode 0600, and the folders that it lies in. A file that exists is an error of the kind
/// `AlreadyExists`.
pub(super) fn create(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
    if let Some(folder) = folder {
        std::fs::create_dir_all(folder)?;
    }
    let name = path.file_name().ok_or_else(|| Error::other("the path names no file"))?;
    let unfinished = path.with_file_name(format!("{}.{:016x}", name.display(), rand::rng().random::<u64>()));
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&unfinished)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    // A second name fails when there is such a file, which a rename does not.
    let linked = written.and_then(|()| std::fs::hard_link(&unfinished, path));
    let removed = std::fs::remove_file(&unfinished);
    linked.and(removed)
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};

    use super::*;

    #[test]
    fn a_file_is_made_once_with_its_folders_and_leaves_nothing_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/secret");
        create(&path, b"first").unwrap();
        assert_eq!(create(&path, b"second").unwrap_err().kind(), ErrorKind::AlreadyExists);
        let Opened::Private(mut file) = open(&path).unwrap() else { panic!("others may read it") };
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "first");
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }
}
