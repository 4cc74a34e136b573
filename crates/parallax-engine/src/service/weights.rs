//! A model's files over the swarm: the head publishes its checkpoint by reference; a member without a copy gets just the
//! bytes of its own layers, every block checked, into a sparse copy that opens like the real thing.
//!
//! The sparse copy has every file at its full length, with the headers, the small files and this member's tensors filled
//! in and holes elsewhere: the loader reads nothing else. A file named `.complete` is written last; without it
//! the copy is filled again (blocks that arrived before are not fetched twice).

use std::collections::BTreeMap;
use std::fs;
use std::io::SeekFrom;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use lattica_bitswap::{Blocks, FetchError, Manifest, PublishError};
use parallax_model::{Checkpoint, KvFormat, WeightDtype};
use parallax_sched::ModelProfile;
use swarm_wire::generated::parallax::v1::FileSpans;
use swarm_wire::limits::NAME_MAX_BYTES;
use swarm_wire::{Cid, DecodeError, LayerRange, PeerId};
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

/// Files of one checkpoint; more are refused.
const MAX_FILES: usize = 1024;
/// Spans closer than this are fetched as one: blocks are larger anyway.
const MERGE_GAP_BYTES: u64 = 64 * 1024;
/// Pieces in which a span is copied into its file.
const COPY_BYTES: u64 = 8 << 20;

/// Why weights could not be had from the swarm.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The head publishes nothing.
    #[error("the head publishes no weights for `{model}`: pass a local copy with --model")]
    NotPublished {
        /// The model.
        model: String,
    },
    /// The announcement makes no sense.
    #[error("the head's list of files is malformed: {0}")]
    Malformed(#[from] DecodeError),
    /// A file that is not in the manifest.
    #[error("the head's manifest does not contain {name} at {needed_bytes} bytes")]
    NotInManifest {
        /// The file.
        name: String,
        /// Its announced length.
        needed_bytes: u64,
    },
    /// Fetching broke.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The disk refused.
    #[error("cannot write {path}: {source}; free some space or choose another --cache-dir")]
    Disk {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Where published files go to and come from: a block exchange with peers, or a toy in a test.
pub trait WeightExchange: Send + Sync {
    /// Publishes files by reference; returns the root of their manifest, with one entry per file name.
    fn publish(
        &self,
        dir: &Path,
        files: &[PathBuf],
    ) -> impl Future<Output = Result<Cid, PublishError>> + Send;

    /// Neither serves nor keeps an artefact any more, except for what one of `kept` has too.
    fn unpublish(&self, root: &Cid, kept: &[Cid]) -> impl Future<Output = Result<(), FetchError>> + Send;

    /// The manifest of a root, from here or from these peers.
    fn manifest(
        &self,
        root: &Cid,
        from: &[PeerId],
    ) -> impl Future<Output = Result<Manifest, FetchError>> + Send;

    /// Gets the blocks of these spans (offset, length) and checks them; tells `progress` bytes done and in all.
    fn fetch(
        &self,
        root: &Cid,
        spans: &[(u64, u64)],
        from: &[PeerId],
        progress: impl FnMut(u64, u64) + Send,
    ) -> impl Future<Output = Result<(), FetchError>> + Send;

    /// Bytes that were fetched or published before.
    fn read(
        &self,
        root: &Cid,
        offset: u64,
        len: u64,
    ) -> impl Future<Output = Result<Bytes, FetchError>> + Send;
}

impl WeightExchange for Blocks {
    async fn publish(&self, dir: &Path, files: &[PathBuf]) -> Result<Cid, PublishError> {
        self.publish_files(dir, files).await
    }

    async fn unpublish(&self, root: &Cid, kept: &[Cid]) -> Result<(), FetchError> {
        Self::unpublish(self, root, kept).await
    }

    async fn manifest(&self, root: &Cid, from: &[PeerId]) -> Result<Manifest, FetchError> {
        self.fetch_manifest(root, from).await
    }

    async fn fetch(
        &self,
        root: &Cid,
        spans: &[(u64, u64)],
        from: &[PeerId],
        mut progress: impl FnMut(u64, u64) + Send,
    ) -> Result<(), FetchError> {
        self.fetch_spans(root, spans, from, |p| progress(p.done_bytes, p.total_bytes)).await.map(|_| ())
    }

    async fn read(&self, root: &Cid, offset: u64, len: u64) -> Result<Bytes, FetchError> {
        self.read_span(root, offset, len).await
    }
}

/// What a model's parts weigh when loaded as `dtype`, beside a cache for `context_tokens` tokens: what the planner needs.
pub fn model_profile(
    name: &str,
    checkpoint: &Checkpoint,
    dtype: WeightDtype,
    kv_format: KvFormat,
    context_tokens: u64,
) -> ModelProfile {
    let config = checkpoint.config();
    let n_layers = config.n_layers;
    let table = config.vocab as u64 * config.hidden as u64;
    let (layer_bytes, table_bytes) = if dtype == WeightDtype::Native {
        let spans = checkpoint.tensor_spans(0..n_layers);
        let embedding = spans.iter().find(|s| s.name == "model.embed_tokens.weight").map_or(0, |s| s.len);
        let head = spans.iter().find(|s| s.name == "lm_head.weight").map_or(0, |s| s.len);
        let layers = checkpoint.stage_bytes(0..n_layers, dtype).saturating_sub(embedding + head);
        (layers.div_ceil(n_layers.max(1) as u64), embedding)
    } else {
        (dtype.bytes(config.layer_parameters()), dtype.table().bytes(table))
    };
    ModelProfile {
        name: name.to_owned(),
        n_layers: u32::try_from(n_layers).unwrap_or(u32::MAX),
        layer_bytes: layer_bytes.max(1),
        embedding_bytes: table_bytes,
        head_bytes: table_bytes,
        tied: config.tied_embeddings,
        kv_bytes_per_token_layer: config.cache_bytes_per_token_layer(context_tokens, kv_format),
        layer_flops: 2.0 * config.layer_parameters() as f64,
        hidden: u32::try_from(config.hidden).unwrap_or(u32::MAX),
    }
}

/// The name of a file within the published checkpoint.
fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// All files of a checkpoint that live on disk, by absolute paths; empty for one that is built into the program.
pub fn published_files(checkpoint: &Checkpoint) -> Vec<PathBuf> {
    let weights = checkpoint.files();
    if weights.is_empty() || weights.iter().any(|path| !path.is_file()) {
        return Vec::new();
    }
    let all = checkpoint.companion_files().iter().cloned().chain(weights);
    // An exchange would look relative paths up in the directory that they have in common.
    all.map(|path| std::path::absolute(&path).unwrap_or(path)).collect()
}

/// The bytes of the published files that a stage of these layers reads: small files whole, headers, its tensors.
///
/// # Errors
/// When a file cannot be looked at.
pub fn file_spans(checkpoint: &Checkpoint, layers: LayerRange) -> std::io::Result<Vec<FileSpans>> {
    let mut files = Vec::new();
    for path in checkpoint.companion_files() {
        let file_bytes = fs::metadata(path)?.len();
        files.push(FileSpans { name: file_name(path), file_bytes, spans: vec![0, file_bytes] });
    }
    let wanted = checkpoint.tensor_spans(layers.as_range());
    for (index, path) in checkpoint.files().iter().enumerate() {
        let file_bytes = fs::metadata(path)?.len();
        // Everything before the first tensor is header; a file without tensors is needed whole.
        let header = checkpoint.header_bytes(index).unwrap_or(file_bytes);
        let tensors = wanted.iter().filter(|s| s.file == index).map(|s| (s.offset, s.len));
        let spans = merged(std::iter::once((0, header)).chain(tensors).collect());
        let spans = spans.into_iter().flat_map(|(offset, len)| [offset, len]).collect();
        files.push(FileSpans { name: file_name(path), file_bytes, spans });
    }
    Ok(files)
}

/// Ascending spans, those that touch or nearly touch joined.
fn merged(mut spans: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    spans.retain(|&(_, len)| len > 0);
    spans.sort_unstable();
    let mut joined: Vec<(u64, u64)> = Vec::with_capacity(spans.len());
    for (offset, len) in spans {
        match joined.last_mut() {
            Some((start, total)) if offset <= *start + *total + MERGE_GAP_BYTES => {
                *total = (*total).max(offset + len - *start);
            }
            _ => joined.push((offset, len)),
        }
    }
    joined
}

/// The head's list of files, checked: plain names, spans inside of their files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedFiles {
    files: Vec<WantedFile>,
}

/// Name, length, and spans (offset, length) of a file.
type WantedFile = (String, u64, Vec<(u64, u64)>);

impl TryFrom<&[FileSpans]> for WantedFiles {
    type Error = DecodeError;

    fn try_from(files: &[FileSpans]) -> Result<Self, DecodeError> {
        if files.len() > MAX_FILES {
            return Err(DecodeError::invalid("number of files", files.len()));
        }
        let mut seen = BTreeMap::new();
        let mut wanted = Vec::with_capacity(files.len());
        for file in files {
            let plain = !file.name.is_empty()
                && file.name.len() <= NAME_MAX_BYTES
                && !file.name.starts_with('.')
                && !file.name.contains(['/', '\\', '\0']);
            if !plain || seen.insert(file.name.clone(), ()).is_some() {
                return Err(DecodeError::invalid("file name", &file.name));
            }
            if file.spans.len() % 2 != 0 {
                return Err(DecodeError::invalid("list of spans", file.spans.len()));
            }
            let spans: Vec<(u64, u64)> = file.spans.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
            let inside = |&(offset, len): &(u64, u64)| {
                offset.checked_add(len).is_some_and(|end| end <= file.file_bytes)
            };
            if !spans.iter().all(inside) {
                return Err(DecodeError::invalid("span outside of its file", &file.name));
            }
            wanted.push((file.name.clone(), file.file_bytes, spans));
        }
        Ok(Self { files: wanted })
    }
}

impl WantedFiles {
    /// Bytes to fetch.
    pub fn needed_bytes(&self) -> u64 {
        self.files.iter().flat_map(|(_, _, spans)| spans).map(|(_, len)| len).sum()
    }

    /// Where the wanted bytes lie in the artefact: (file, offset in the file, offset in the artefact, length).
    fn places(&self, manifest: &Manifest) -> Result<Vec<(&str, u64, u64, u64)>, WeightsError> {
        let mut places = Vec::new();
        for (name, file_bytes, spans) in &self.files {
            let entry = manifest.entries().iter().find(|e| e.name == *name && e.length == *file_bytes);
            let entry = entry.ok_or_else(|| WeightsError::NotInManifest {
                name: name.clone(),
                needed_bytes: *file_bytes,
            })?;
            places.extend(spans.iter().map(|&(at, len)| (name.as_str(), at, entry.offset + at, len)));
        }
        Ok(places)
    }
}

/// Where a sparse copy of these weights for these layers is kept under `cache_dir`.
pub fn sparse_dir(cache_dir: &Path, root: &Cid, layers: LayerRange) -> PathBuf {
    cache_dir.join("models").join(root.to_string()).join(format!(
        "layers-{}-{}",
        layers.start(),
        layers.end()
    ))
}

/// Removes a sparse copy; files that are mapped stay readable where the system can do that.
pub async fn remove_copy(cache_dir: &Path, root: &Cid, layers: LayerRange) {
    let dir = sparse_dir(cache_dir, root, layers);
    if let Err(error) = tokio::fs::remove_dir_all(&dir).await {
        tracing::warn!(dir = %dir.display(), %error, "a copy of replaced weights stays");
    }
}

/// A finished sparse copy, as a path for [`Checkpoint::open`].
pub fn finished_copy(cache_dir: &Path, root: &Cid, layers: LayerRange) -> Option<PathBuf> {
    let dir = sparse_dir(cache_dir, root, layers);
    let name = fs::read_to_string(dir.join(COMPLETE)).ok()?;
    Some(if name.is_empty() { dir } else { dir.join(name) })
}

/// Written last; holds the name of the file to open, or nothing for a directory.
const COMPLETE: &str = ".complete";

/// Fetches what is missing and makes the sparse copy; returns the path for [`Checkpoint::open`]. Dropping the future
/// leaves an unfinished copy that is never taken for a finished one.
///
/// # Errors
/// When the list makes no sense, nobody has the bytes, or the disk refuses.
pub async fn fetch(
    exchange: &impl WeightExchange,
    root: &Cid,
    files: &[FileSpans],
    layers: LayerRange,
    from: &[PeerId],
    cache_dir: &Path,
    progress: impl FnMut(u64, u64) + Send,
) -> Result<PathBuf, WeightsError> {
    if let Some(path) = finished_copy(cache_dir, root, layers) {
        return Ok(path);
    }
    let wanted = WantedFiles::try_from(files)?;
    let manifest = exchange.manifest(root, from).await?;
    let places = wanted.places(&manifest)?;
    let spans: Vec<(u64, u64)> = merged(places.iter().map(|&(_, _, at, len)| (at, len)).collect());
    exchange.fetch(root, &spans, from, progress).await?;

    let dir = sparse_dir(cache_dir, root, layers);
    let disk = |path: &Path| {
        let path = path.to_owned();
        move |source| WeightsError::Disk { path, source }
    };
    tokio::fs::create_dir_all(&dir).await.map_err(disk(&dir))?;
    for (name, file_bytes, _) in &wanted.files {
        let path = dir.join(name);
        let mut file = tokio::fs::File::create(&path).await.map_err(disk(&path))?;
        file.set_len(*file_bytes).await.map_err(disk(&path))?;
        for &(_, at, source_at, len) in places.iter().filter(|place| place.0 == name) {
            file.seek(SeekFrom::Start(at)).await.map_err(disk(&path))?;
            let mut done = 0;
            while done < len {
                let n = COPY_BYTES.min(len - done);
                let bytes = exchange.read(root, source_at + done, n).await?;
                file.write_all(&bytes).await.map_err(disk(&path))?;
                done += n;
            }
        }
        // What `write_all` still holds must not fail unseen.
        file.flush().await.map_err(disk(&path))?;
        file.sync_all().await.map_err(disk(&path))?;
    }
    let gguf =
        wanted.files.iter().find(|(name, ..)| name.ends_with(".gguf")).map_or("", |(name, ..)| name.as_str());
    let complete = dir.join(COMPLETE);
    let partial = dir.join(".complete.partial");
    tokio::fs::write(&partial, gguf).await.map_err(disk(&partial))?;
    tokio::fs::rename(&partial, &complete).await.map_err(disk(&complete))?;
    Ok(if gguf.is_empty() { dir } else { dir.join(gguf) })
}

#[cfg(test)]
mod tests {
    use lattica_bitswap::{BlockRef, HashKind};

    use super::*;

    #[test]
    fn near_spans_are_joined_and_far_ones_kept() {
        let far = MERGE_GAP_BYTES * 10;
        assert_eq!(merged(vec![(far, 5), (0, 10), (10, 3), (20, 0)]), [(0, 13), (far, 5)]);
        assert_eq!(merged(vec![(0, 100), (10, 5)]), [(0, 100)]);
    }

    #[test]
    fn a_model_named_by_a_relative_path_is_published_by_absolute_ones() {
        let checkpoint = Checkpoint::open(Path::new("../../assets/tiny")).unwrap();
        let files = published_files(&checkpoint);
        assert!(files.len() >= 3 && files.iter().all(|f| f.is_absolute() && f.is_file()), "{files:?}");
    }

    #[test]
    fn lists_with_paths_or_spans_outside_are_refused() {
        let list = |name: &str, spans: Vec<u64>| {
            WantedFiles::try_from(&[FileSpans { name: name.into(), file_bytes: 100, spans }][..])
        };
        assert_eq!(list("model.gguf", vec![0, 10, 50, 50]).unwrap().needed_bytes(), 60);
        for (name, spans) in [
            ("../model.gguf", vec![]),
            ("/etc/passwd", vec![]),
            (".complete", vec![]),
            ("", vec![]),
            ("a", vec![0]),
            ("a", vec![60, 50]),
            ("a", vec![u64::MAX, 2]),
        ] {
            assert!(list(name, spans).is_err(), "{name}");
        }
    }

    /// An artefact in memory that counts what is asked of it.
    struct Toy {
        manifest: Manifest,
        bytes: Vec<u8>,
        fetched: std::sync::Mutex<Vec<(u64, u64)>>,
        broken: bool,
    }

    impl Toy {
        fn new(files: &[(&str, Vec<u8>)]) -> Self {
            let (mut bytes, mut entries) = (Vec::new(), Vec::new());
            for (name, content) in files {
                let (offset, length) = (bytes.len() as u64, content.len() as u64);
                entries.push(lattica_bitswap::Entry { name: (*name).to_owned(), offset, length });
                bytes.extend_from_slice(content);
            }
            let block = lattica_bitswap::Block::new(HashKind::Blake3, bytes.clone().into()).unwrap();
            let blocks = vec![BlockRef { cid: *block.cid(), length: u32::try_from(bytes.len()).unwrap() }];
            let manifest = Manifest::new("model", "files", HashKind::Blake3, entries, blocks).unwrap();
            Self { manifest, bytes, fetched: std::sync::Mutex::default(), broken: false }
        }

        fn root(&self) -> Cid {
            self.manifest.blocks()[0].cid
        }
    }

    impl WeightExchange for Toy {
        async fn publish(&self, _: &Path, _: &[PathBuf]) -> Result<Cid, PublishError> {
            Ok(self.root())
        }

        async fn unpublish(&self, _: &Cid, _: &[Cid]) -> Result<(), FetchError> {
            Ok(())
        }

        async fn manifest(&self, _: &Cid, _: &[PeerId]) -> Result<Manifest, FetchError> {
            Ok(self.manifest.clone())
        }

        async fn fetch(
            &self,
            _: &Cid,
            spans: &[(u64, u64)],
            _: &[PeerId],
            mut progress: impl FnMut(u64, u64) + Send,
        ) -> Result<(), FetchError> {
            self.fetched.lock().unwrap().extend_from_slice(spans);
            progress(1, 1);
            Ok(())
        }

        async fn read(&self, _: &Cid, offset: u64, len: u64) -> Result<Bytes, FetchError> {
            let range = offset as usize..(offset + len) as usize;
            if self.broken { Err(FetchError::Closed) } else { Ok(Bytes::copy_from_slice(&self.bytes[range])) }
        }
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn a_sparse_copy_has_the_wanted_bytes_at_their_places_and_holes_elsewhere() {
        let far = usize::try_from(MERGE_GAP_BYTES).unwrap() * 3;
        let weights: Vec<u8> = (0..far * 2).map(|i| (i % 251) as u8 + 1).collect();
        let toy = Toy::new(&[("config.json", b"{}".to_vec()), ("model.safetensors", weights.clone())]);
        let files = [
            FileSpans { name: "config.json".into(), file_bytes: 2, spans: vec![0, 2] },
            FileSpans {
                name: "model.safetensors".into(),
                file_bytes: weights.len() as u64,
                spans: vec![0, 100, far as u64, 50],
            },
        ];
        let (cache, layers) = (tempfile::tempdir().unwrap(), LayerRange::new(1, 3).unwrap());
        let copy = || run(fetch(&toy, &toy.root(), &files, layers, &[], cache.path(), |_, _| ()));
        let dir = copy().unwrap();
        assert_eq!(fs::read(dir.join("config.json")).unwrap(), b"{}");
        let got = fs::read(dir.join("model.safetensors")).unwrap();
        assert_eq!(got.len(), weights.len());
        assert_eq!((&got[..100], &got[far..far + 50]), (&weights[..100], &weights[far..far + 50]));
        assert!(got[100..far].iter().chain(&got[far + 50..]).all(|&byte| byte == 0));
        let asked: u64 = toy.fetched.lock().unwrap().iter().map(|(_, len)| len).sum();
        assert_eq!(asked, 152, "only these layers' bytes are fetched");
        assert_eq!(copy().unwrap(), dir);
        assert_eq!(toy.fetched.lock().unwrap().len(), 2, "a finished copy is not fetched again");
    }

    #[test]
    fn an_unfinished_copy_is_never_taken_for_a_finished_one() {
        let mut toy = Toy::new(&[("model.gguf", vec![7; 64])]);
        toy.broken = true;
        let files = [FileSpans { name: "model.gguf".into(), file_bytes: 64, spans: vec![0, 64] }];
        let (cache, layers) = (tempfile::tempdir().unwrap(), LayerRange::new(0, 1).unwrap());
        assert!(run(fetch(&toy, &toy.root(), &files, layers, &[], cache.path(), |_, _| ())).is_err());
        assert_eq!(finished_copy(cache.path(), &toy.root(), layers), None);
        toy.broken = false;
        let path = run(fetch(&toy, &toy.root(), &files, layers, &[], cache.path(), |_, _| ())).unwrap();
        assert_eq!(path.file_name().unwrap(), "model.gguf");
        assert_eq!(fs::read(path).unwrap(), [7; 64]);

        let other = [FileSpans { name: "other.gguf".into(), file_bytes: 64, spans: vec![0, 64] }];
        let layers = LayerRange::new(1, 2).unwrap();
        let missing =
            run(fetch(&toy, &toy.root(), &other, layers, &[], cache.path(), |_, _| ())).unwrap_err();
        assert!(missing.to_string().contains("other.gguf"), "{missing}");
    }
}
