//! Files and directories of IPFS: a second root for what is published here, and what stock peers have, fetched and written.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Write as _;
use std::path::{Component, Path, PathBuf};

use swarm_wire::{Cid, PeerId, cid};

use super::fetch::{self, Order};
use super::files::{not_here, stored_manifest, whole_file};
use super::{Blocks, MANIFEST_GUESS_BYTES, Progress};
use crate::session::Wanted;
use crate::unixfs::{self, File, Limits, Tree, Walk};
use crate::{Block, BlockStore, FetchError, PublishError, StoreError, UnixfsError};

impl Blocks {
    /// Makes a stored artefact a file (one entry) or a directory (several) of IPFS too, under the root that is returned, and
    /// announces that. Reads every leaf once, for its SHA2-256 name; no byte is stored again. See [`unixfs::publish`].
    ///
    /// Cancel safe: a publication that has begun ends in the store, pinned, but is not announced.
    ///
    /// # Errors
    /// When the artefact or one of its blocks is not stored, or it cannot be a directory.
    pub async fn publish_unixfs(&self, root: &Cid) -> Result<Cid, PublishError> {
        let root = *root;
        self.publishing(move |store, _| {
            let manifest = stored_manifest(store, &root).map_err(|error| match error {
                FetchError::Store(error) => PublishError::Store(error),
                FetchError::BadManifest { source, .. } => PublishError::Manifest(source),
                _ => PublishError::NotHere { cid: Box::new(root) },
            })?;
            let manifest = manifest.ok_or_else(|| PublishError::NotHere { cid: Box::new(root) })?;
            unixfs::publish(store, &manifest)
        })
        .await
    }

    /// Gets a file or directory of IPFS into the store, from our peers or stock ones, and tells what it holds; as
    /// [`Blocks::fetch`] otherwise. `progress` hears of the files' blocks, once all of them are known by name.
    ///
    /// Cancel safe: dropping the future stops the fetch and keeps what came.
    ///
    /// # Errors
    /// When it is no file or directory, larger than `limits`, no peer delivers what is missing, or the store refuses.
    pub async fn fetch_unixfs(
        &self,
        root: &Cid,
        from: &[PeerId],
        limits: Limits,
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Tree, FetchError> {
        let mut walk = Walk::new(*root, limits);
        loop {
            let wanted = walk.wanted();
            if wanted.is_empty() {
                break;
            }
            self.fetch_nodes(root, wanted, from).await?;
            let root = *root;
            walk = self.exchange.blocking(move |store| advance(store, root, walk)).await??;
        }
        let tree = walk.finish();
        self.fetch_listed(root, leaves(&tree), from, progress).await?;
        self.exchange.announce(*root);
        Ok(tree)
    }

    /// Writes what [`Blocks::fetch_unixfs`] found to `path`, a file or a directory that is not there yet: completely, or not
    /// at all.
    ///
    /// Cancel safe: what has been begun is written to its end all the same.
    ///
    /// # Errors
    /// When a block is not stored or damaged, a name cannot be a file's here, a directory is in the way, or the disk refuses.
    pub async fn write_unixfs_to(&self, root: &Cid, tree: &Tree, path: &Path) -> Result<(), FetchError> {
        let (root, tree, path) = (*root, tree.clone(), path.to_owned());
        self.exchange.blocking(move |store| write(store, &root, &tree, &path)).await?
    }

    /// Gets nodes whose lengths nobody has promised.
    async fn fetch_nodes(&self, root: &Cid, nodes: Vec<Cid>, from: &[PeerId]) -> Result<(), FetchError> {
        let missing = self.exchange.blocking(move |store| {
            let mut missing = Vec::new();
            for cid in nodes {
                if store.length_of(&cid)?.is_none() {
                    missing.push(Wanted { cid, length: MANIFEST_GUESS_BYTES, priority: 1 });
                }
            }
            Ok::<_, StoreError>(missing)
        });
        let wanted = missing.await??;
        let order = Order { root: *root, wanted, lengths: HashMap::new(), from: from.to_vec() };
        fetch::run(&self.exchange, order, |_| ()).await
    }
}

fn refused(root: &Cid) -> impl Fn(UnixfsError) -> FetchError {
    let root = *root;
    move |source| FetchError::Unixfs { root: Box::new(root), source }
}

/// What can go wrong while a block is looked at.
enum Failure {
    Unixfs(UnixfsError),
    Fetch(FetchError),
}

impl From<UnixfsError> for Failure {
    fn from(error: UnixfsError) -> Self {
        Self::Unixfs(error)
    }
}

fn load(store: &dyn BlockStore, root: &Cid, cid: &Cid) -> Result<Block, FetchError> {
    store.get(cid)?.ok_or_else(|| not_here(root, *cid))
}

fn advance(store: &dyn BlockStore, root: Cid, mut walk: Walk) -> Result<Walk, FetchError> {
    let done = walk.advance(|cid| load(store, &root, cid).map_err(Failure::Fetch));
    done.map(|()| walk).map_err(|failure| match failure {
        Failure::Unixfs(error) => refused(&root)(error),
        Failure::Fetch(error) => error,
    })
}

/// The blocks that were not looked at on the way, each once.
fn leaves(tree: &Tree) -> Vec<Wanted> {
    let mut seen = HashSet::new();
    let parts = tree.files.iter().flat_map(|file| &file.parts);
    parts
        .filter(|part| part.cid.codec() == cid::CODEC_RAW && seen.insert(part.cid))
        .map(|part| Wanted { cid: part.cid, length: part.bytes, priority: 0 })
        .collect()
}

fn write(store: &dyn BlockStore, root: &Cid, tree: &Tree, path: &Path) -> Result<(), FetchError> {
    let Some(directories) = &tree.directories else {
        let [file] = &tree.files[..] else { return Err(not_here(root, *root)) };
        return write_file(store, root, file, path);
    };
    if path.exists() {
        return Err(FetchError::Target {
            path: path.to_owned(),
            reason: "it exists; name another directory",
        });
    }
    let failed = |action, e| FetchError::from(StoreError::io(action, path, tree.bytes(), e));
    let parent = path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    fs::create_dir_all(parent).map_err(|e| failed("creating the directory of", e))?;
    let unfinished = tempfile::TempDir::new_in(parent).map_err(|e| failed("creating", e))?;
    for directory in directories {
        let inner = within(unfinished.path(), directory)?;
        fs::create_dir_all(inner).map_err(|e| failed("creating a directory of", e))?;
    }
    for file in &tree.files {
        write_file(store, root, file, &within(unfinished.path(), &file.path)?)?;
    }
    // A temporary directory is its owner's alone; what was asked for is like any other.
    let made = unfinished.keep();
    let done = public(&made).and_then(|()| fs::rename(&made, path));
    if done.is_err() {
        let _ = fs::remove_dir_all(&made);
    }
    done.map_err(|e| failed("renaming to", e))
}

#[cfg(unix)]
fn public(directory: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o755))
}

#[cfg(not(unix))]
fn public(_: &Path) -> std::io::Result<()> {
    Ok(())
}

/// A path below `directory`. The names were checked for what no system takes; this is for the rest, such as `C:` and `a\b`.
fn within(directory: &Path, path: &str) -> Result<PathBuf, FetchError> {
    let mut whole = directory.to_owned();
    for name in path.split('/') {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name) {
            let reason = "this system's files cannot have that name; fetch its siblings one by one";
            return Err(FetchError::Target { path: PathBuf::from(path), reason });
        }
        whole.push(name);
    }
    Ok(whole)
}

fn write_file(store: &dyn BlockStore, root: &Cid, file: &File, path: &Path) -> Result<(), FetchError> {
    whole_file(path, file.bytes, |target, left| {
        for part in &file.parts {
            let bytes = unixfs::content(&load(store, root, &part.cid)?).map_err(refused(root))?;
            if bytes.len() != part.bytes as usize {
                let (expected_bytes, got_bytes) = (part.bytes as usize, bytes.len());
                let (root, cid) = (Box::new(*root), Box::new(part.cid));
                return Err(FetchError::WrongLength { root, cid, expected_bytes, got_bytes });
            }
            target.write_all(&bytes).map_err(|e| StoreError::io("writing", path, *left, e))?;
            *left -= bytes.len() as u64;
        }
        Ok(())
    })
}
