//! Models from a hub of Hugging Face's kind, over HTTP, into the cache that its own tools share. Feature `hub`.
//!
//! A file arrives in `blobs/ETAG.incomplete` and gets its name only when its length, and for weights the SHA-256, is what the
//! hub announced. Weights are resumed after any break; of a small file, which has no hash to check a beginning by, an earlier
//! fetch's beginning is not used. The snapshot's `config.json` comes last.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use parallax_model::hub::{COMPANIONS, HubName, gguf_parts, is_plain};
use reqwest::header::{CONTENT_RANGE, RANGE};
use reqwest::{Client, Response, StatusCode};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncWriteExt as _;

/// Where models are when nobody says otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// How long a connection may take, and how long bytes may fail to come.
const PATIENCE: Duration = Duration::from_secs(30);
/// Fruitless attempts in a row, after which a file is given up.
const FRUITLESS_ATTEMPTS: u32 = 5;
/// An attempt that brings fewer bytes, and not the rest of the file, counts as fruitless.
const FRUIT_BYTES: u64 = 64 << 10;
/// The pause after the first of them; it doubles.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest description of a repository.
const MAX_LISTING_BYTES: usize = 16 << 20;

/// Why a model could not be had from a hub.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// No connection, or it broke too often.
    #[error("cannot fetch {url}: {source}; check the network, or name another hub with HF_ENDPOINT")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The hub keeps it from us.
    #[error(
        "{url} asks for permission ({status}): accept the model's terms on its page and set HF_TOKEN to a token of yours"
    )]
    Forbidden {
        /// What was asked for.
        url: String,
        /// The hub's answer.
        status: StatusCode,
    },
    /// There is none.
    #[error("{url} does not exist: check the model's name and revision (a private one needs HF_TOKEN)")]
    Missing {
        /// What was asked for.
        url: String,
    },
    /// Another answer than the one asked for.
    #[error("{url} answered {status}; try again later")]
    Status {
        /// What was asked for.
        url: String,
        /// The hub's answer.
        status: StatusCode,
    },
    /// An answer that makes no sense.
    #[error("{url} does not answer as a hub does: {reason}")]
    Malformed {
        /// What was asked for.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Nothing that can be run.
    #[error("{repository} has neither config.json with safetensors nor a single GGUF model outside of folders{}", named(.gguf))]
    NoWeights {
        /// The repository.
        repository: String,
        /// The GGUF files that it has.
        gguf: Vec<String>,
    },
    /// A model in several parts, one of which is not there.
    #[error("{repository} lacks {file}, a part of the model; another repository may have all of them")]
    MissingPart {
        /// The repository.
        repository: String,
        /// The missing file.
        file: String,
    },
    /// The bytes are not those that the hub announced.
    #[error("{file} arrived damaged ({what}) and was thrown away; fetch it again")]
    Damaged {
        /// The file.
        file: String,
        /// What differs.
        what: String,
    },
    /// The hub sends too little, again and again.
    #[error("{file} does not arrive ({what} came); what is here is kept, fetch it again later")]
    Stalled {
        /// The file.
        file: String,
        /// How far it came.
        what: String,
    },
    /// The disk refused.
    #[error("cannot write {path}: {source}; free some space or choose another place with HF_HUB_CACHE")]
    Disk {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

fn named(gguf: &[String]) -> String {
    match gguf {
        [] => String::new(),
        several => format!(": name one of its files, {}", several.join(", ")),
    }
}

/// A hub, and where its files are kept.
#[derive(Debug, Clone)]
pub struct Hub {
    client: Client,
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
}

/// How far a fetch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubProgress<'a> {
    /// The file that arrives.
    pub file: &'a str,
    /// Bytes of all files that are here.
    pub done_bytes: u64,
    /// Bytes of all files.
    pub total_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

/// A file of a repository.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    #[serde(default)]
    size: u64,
    /// The id of its content, if it is small enough for git.
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

impl Sibling {
    fn bytes(&self) -> u64 {
        self.lfs.as_ref().map_or(self.size, |lfs| lfs.size)
    }

    /// The name of its blob: what the hub sends as ETag.
    fn blob(&self) -> Option<&str> {
        self.lfs.as_ref().map(|lfs| lfs.sha256.as_str()).or(self.blob_id.as_deref()).filter(|id| is_plain(id))
    }
}

/// The files to fetch, `config.json` last.
fn choose(name: &HubName, siblings: Vec<Sibling>) -> Result<Vec<Sibling>, HubError> {
    let wanted = |list: Vec<Sibling>, keep: &dyn Fn(&str) -> bool| -> Vec<Sibling> {
        list.into_iter().filter(|s| is_plain(&s.rfilename) && keep(&s.rfilename)).collect()
    };
    let has = |file: &str| siblings.iter().any(|s| s.rfilename == file);
    // An index may also name one whole file.
    let sharded = has("model.safetensors.index.json") && siblings.iter().any(|s| is_shard(&s.rfilename));
    let is_weights = |file: &str| if sharded { is_shard(file) } else { file == "model.safetensors" };
    if name.file.is_none() && has("config.json") && siblings.iter().any(|s| is_weights(&s.rfilename)) {
        let mut files = wanted(siblings, &|file| is_weights(file) || COMPANIONS.contains(&file));
        // What takes long first.
        files.sort_by_key(|s| (s.rfilename == "config.json", !is_weights(&s.rfilename)));
        return Ok(files);
    }
    let gguf: Vec<Sibling> = siblings
        .into_iter()
        .filter(|s| s.rfilename.ends_with(".gguf") && s.rfilename.split('/').all(is_plain))
        .collect();
    // Without a name it is the only model there is, which lies in no folder.
    let mut roots: Vec<&str> = gguf.iter().map(|s| s.rfilename.as_str()).filter(|f| is_plain(f)).collect();
    roots.sort_unstable();
    let parts = match &name.file {
        Some(file) => gguf_parts(file),
        None => roots.first().map_or_else(Vec::new, |first| gguf_parts(first)),
    };
    let one = match &name.file {
        Some(file) => gguf.iter().any(|s| s.rfilename == *file),
        None => !roots.is_empty() && roots.iter().all(|root| parts.iter().any(|part| part == root)),
    };
    if !one {
        let gguf = gguf.into_iter().map(|s| format!("{}/{}", name.repository, s.rfilename)).collect();
        return Err(HubError::NoWeights { repository: name.repository.clone(), gguf });
    }
    let found = parts.into_iter().map(|part| {
        gguf.iter()
            .find(|s| s.rfilename == part)
            .cloned()
            .ok_or_else(|| HubError::MissingPart { repository: name.repository.clone(), file: part })
    });
    found.collect()
}

/// `model-00001-of-00004.safetensors`, or `model.safetensors-00001-of-00004.safetensors`.
fn is_shard(file: &str) -> bool {
    let stem = file.strip_suffix(".safetensors").and_then(|stem| stem.strip_prefix("model"));
    stem.is_some_and(|stem| stem.strip_prefix(".safetensors").unwrap_or(stem).starts_with('-'))
}

/// Appends to a file that no other process of this machine appends to.
struct Partial {
    path: PathBuf,
    file: tokio::fs::File,
    len: u64,
}

impl Partial {
    async fn open(path: PathBuf) -> std::io::Result<Self> {
        let opened = path.clone();
        let file = tokio::task::spawn_blocking(move || {
            let file = File::options().create(true).append(true).open(opened)?;
            file.lock()?;
            Ok::<_, std::io::Error>(file)
        });
        let file = file.await.map_err(std::io::Error::other)??;
        let len = file.metadata()?.len();
        Ok(Self { path, file: tokio::fs::File::from_std(file), len })
    }

    async fn cut(&mut self, len: u64) -> std::io::Result<()> {
        self.file.set_len(len).await?;
        self.len = len;
        Ok(())
    }

    async fn append(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.file.write_all(bytes).await?;
        // So that what a failed write leaves is known.
        self.file.flush().await?;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

impl Hub {
    /// The hub at `endpoint` (without a path at its end), with a token for what is not public; files go to `cache`.
    ///
    /// # Errors
    /// When this system has no usable TLS.
    pub fn new(endpoint: &str, token: Option<String>, cache: PathBuf) -> Result<Self, HubError> {
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let client = Client::builder()
            .connect_timeout(PATIENCE)
            .read_timeout(PATIENCE)
            .user_agent(concat!("parallax/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|source| HubError::Unreachable { url: endpoint.clone(), source })?;
        Ok(Self { client, endpoint, token, cache })
    }

    /// Fetches what of a model is not here yet; returns the path for [`parallax_model::Checkpoint::open`]. Dropping the
    /// future loses nothing: the next fetch goes on where this one was.
    ///
    /// # Errors
    /// When the hub does not have it, does not give it, or the disk refuses.
    pub async fn fetch(
        &self,
        name: &HubName,
        mut progress: impl FnMut(HubProgress<'_>) + Send,
    ) -> Result<PathBuf, HubError> {
        let revision = name.revision.replace('/', "%2F");
        let url = format!("{}/api/models/{}/revision/{revision}?blobs=true", self.endpoint, name.repository);
        let listing: Listing = self.listing(&url).await?;
        if !is_plain(&listing.sha) {
            return Err(HubError::Malformed { url, reason: format!("{:?} is no commit", listing.sha) });
        }
        let files = choose(name, listing.siblings)?;
        let folder = name.folder(&self.cache);
        let snapshot = folder.join("snapshots").join(&listing.sha);
        for dir in [&folder.join("blobs"), &snapshot] {
            tokio::fs::create_dir_all(dir).await.map_err(|source| disk(dir, source))?;
        }
        let total_bytes = files.iter().map(Sibling::bytes).sum();
        let mut before = 0;
        for file in &files {
            let Some(blob) = file.blob() else {
                let reason = format!("{} has no id", file.rfilename);
                return Err(HubError::Malformed { url, reason });
            };
            let mut tell = |bytes: u64| {
                progress(HubProgress { file: &file.rfilename, done_bytes: before + bytes, total_bytes });
            };
            let path = folder.join("blobs").join(blob);
            if !path.is_file() {
                let from = format!(
                    "{}/{}/resolve/{}/{}",
                    self.endpoint, name.repository, listing.sha, file.rfilename
                );
                self.blob(&from, file, &path, &mut tell).await?;
            }
            tell(file.bytes());
            before += file.bytes();
            let link = snapshot.join(&file.rfilename);
            if let Some(dir) = link.parent() {
                tokio::fs::create_dir_all(dir).await.map_err(|source| disk(dir, source))?;
            }
            let depth = file.rfilename.matches('/').count();
            place(blob, depth, &path, &link).map_err(|source| disk(&link, source))?;
        }
        let reference = folder.join("refs").join(&name.revision);
        if name.revision != listing.sha {
            let dir = reference.parent().unwrap_or(&folder);
            tokio::fs::create_dir_all(dir).await.map_err(|source| disk(dir, source))?;
            tokio::fs::write(&reference, &listing.sha).await.map_err(|source| disk(&reference, source))?;
        }
        Ok(match files.as_slice() {
            [file, ..] if file.rfilename.ends_with(".gguf") => snapshot.join(&file.rfilename),
            _ => snapshot,
        })
    }

    async fn ask(&self, url: &str, from: u64) -> Result<Response, HubError> {
        let mut request = self.client.get(url);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if from > 0 {
            request = request.header(RANGE, format!("bytes={from}-"));
        }
        let url = url.to_owned();
        let response =
            request.send().await.map_err(|source| HubError::Unreachable { url: url.clone(), source })?;
        match response.status() {
            status if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE => Ok(response),
            status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) => {
                Err(HubError::Forbidden { url, status })
            }
            StatusCode::NOT_FOUND => Err(HubError::Missing { url }),
            status => Err(HubError::Status { url, status }),
        }
    }

    async fn listing(&self, url: &str) -> Result<Listing, HubError> {
        let mut response = self.ask(url, 0).await?;
        let mut text = Vec::new();
        let unreachable = |source| HubError::Unreachable { url: url.to_owned(), source };
        while let Some(bytes) = response.chunk().await.map_err(unreachable)? {
            text.extend_from_slice(&bytes);
            if text.len() > MAX_LISTING_BYTES {
                let reason = format!("its description is longer than {MAX_LISTING_BYTES} bytes");
                return Err(HubError::Malformed { url: url.to_owned(), reason });
            }
        }
        serde_json::from_slice(&text)
            .map_err(|e| HubError::Malformed { url: url.to_owned(), reason: e.to_string() })
    }

    /// One file, from where an earlier fetch left it.
    async fn blob(
        &self,
        url: &str,
        file: &Sibling,
        path: &Path,
        tell: &mut (impl FnMut(u64) + Send),
    ) -> Result<(), HubError> {
        let mut incomplete = path.as_os_str().to_owned();
        incomplete.push(".incomplete");
        let incomplete = PathBuf::from(incomplete);
        let failed = |source| disk(&incomplete, source);
        let mut partial = Partial::open(incomplete.clone()).await.map_err(failed)?;
        if path.is_file() {
            // Another process fetched it while this one waited for it.
            return Ok(());
        }
        if file.lfs.is_none() {
            partial.cut(0).await.map_err(failed)?;
        }
        let mut fruitless = 0;
        while partial.len != file.bytes() {
            if partial.len > file.bytes() {
                partial.cut(0).await.map_err(failed)?;
            }
            let before = partial.len;
            let error = match self.attempt(url, file, &mut partial, tell).await {
                Ok(()) => None,
                Err(error @ HubError::Unreachable { .. }) => Some(error),
                Err(HubError::Status { url, status }) if status.is_server_error() => {
                    Some(HubError::Status { url, status })
                }
                Err(error) => return Err(error),
            };
            let enough = (before + FRUIT_BYTES).min(file.bytes());
            fruitless = if partial.len >= enough { 0 } else { fruitless + 1 };
            if fruitless >= FRUITLESS_ATTEMPTS {
                let what = format!("{} of {} bytes", partial.len, file.bytes());
                return Err(error.unwrap_or(HubError::Stalled { file: file.rfilename.clone(), what }));
            }
            if fruitless > 0 {
                tokio::time::sleep(PAUSE * 2u32.pow(fruitless - 1)).await;
            }
        }
        partial.file.sync_all().await.map_err(failed)?;
        if let Some(lfs) = &file.lfs {
            let whole = partial.path.clone();
            let digest = tokio::task::spawn_blocking(move || sha256(&whole)).await;
            let digest = digest.map_err(|e| failed(std::io::Error::other(e)))?.map_err(failed)?;
            if digest != lfs.sha256 {
                tokio::fs::remove_file(&partial.path).await.map_err(failed)?;
                let what = format!("its SHA-256 is {digest}, not {}", lfs.sha256);
                return Err(HubError::Damaged { file: file.rfilename.clone(), what });
            }
        }
        tokio::fs::rename(&partial.path, path).await.map_err(|source| disk(path, source))
    }

    /// Bytes until the end or a break.
    async fn attempt(
        &self,
        url: &str,
        file: &Sibling,
        partial: &mut Partial,
        tell: &mut (impl FnMut(u64) + Send),
    ) -> Result<(), HubError> {
        let path = partial.path.clone();
        let failed = |source| disk(&path, source);
        let mut response = self.ask(url, partial.len).await?;
        if partial.len > 0 && !continues(&response, partial.len) {
            // It sends the whole file, or nothing.
            partial.cut(0).await.map_err(failed)?;
            if response.status() != StatusCode::OK {
                return Ok(());
            }
        }
        loop {
            let chunk = response.chunk().await;
            let chunk = chunk.map_err(|source| HubError::Unreachable { url: url.to_owned(), source })?;
            let Some(bytes) = chunk else { return Ok(()) };
            if partial.len + bytes.len() as u64 > file.bytes() {
                partial.cut(0).await.map_err(failed)?;
                let what = format!("longer than {} bytes", file.bytes());
                return Err(HubError::Damaged { file: file.rfilename.clone(), what });
            }
            partial.append(&bytes).await.map_err(failed)?;
            tell(partial.len);
        }
    }
}

/// Whether the answer goes on at this byte.
fn continues(response: &Response, at: u64) -> bool {
    let range = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
    response.status() == StatusCode::PARTIAL_CONTENT
        && range.is_some_and(|range| range.starts_with(&format!("bytes {at}-")))
}

fn disk(path: &Path, source: std::io::Error) -> HubError {
    HubError::Disk { path: path.to_owned(), source }
}

fn sha256(path: &Path) -> std::io::Result<String> {
    let (mut file, mut hash, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hash.update(&buffer[..n]),
        }
    }
}

/// Gives a blob its name in a snapshot, as Hugging Face's tools do, unless it has it.
fn place(blob: &str, depth: usize, path: &Path, link: &Path) -> std::io::Result<()> {
    if link.is_file() {
        return Ok(());
    }
    // A link to what is not there.
    if link.is_symlink() {
        std::fs::remove_file(link)?;
    }
    #[cfg(unix)]
    let placed = {
        let _ = path;
        std::os::unix::fs::symlink(Path::new(&"../".repeat(depth + 2)).join("blobs").join(blob), link)
    };
    #[cfg(not(unix))]
    let placed = {
        let _ = (blob, depth);
        std::fs::hard_link(path, link)
    };
    match placed {
        // Another process was faster.
        Err(error) if error.kind() == ErrorKind::AlreadyExists && link.is_file() => Ok(()),
        placed => placed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[&str]) -> Vec<Sibling> {
        let file = |name: &&str| Sibling { rfilename: (*name).to_owned(), size: 1, blob_id: None, lfs: None };
        names.iter().map(file).collect()
    }

    fn chosen(name: &str, has: &[&str]) -> Result<Vec<String>, String> {
        let files = choose(&name.parse().unwrap(), files(has)).map_err(|e| e.to_string())?;
        Ok(files.into_iter().map(|s| s.rfilename).collect())
    }

    #[test]
    fn what_runs_is_chosen_and_nothing_else() {
        let sharded = [
            "config.json",
            "README.md",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "model-00001-of-00002.safetensors",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "../x.gguf",
        ];
        assert_eq!(
            chosen("a/b", &sharded).unwrap(),
            [
                "model-00002-of-00002.safetensors",
                "model-00001-of-00002.safetensors",
                "model.safetensors.index.json",
                "config.json"
            ]
        );
        let other = [
            "model.safetensors",
            "model.safetensors-00001-of-00001.safetensors",
            "model.safetensors.index.json",
            "config.json",
        ];
        assert_eq!(chosen("a/b", &other).unwrap(), other[1..]);
        let whole = ["model.safetensors", "model.safetensors.index.json", "config.json"];
        assert_eq!(chosen("a/b", &whole).unwrap(), whole, "an index of one file");
        assert_eq!(
            chosen("a/b", &["model.safetensors", "config.json", "model-x.safetensors"]).unwrap().len(),
            2
        );
        let ranks = ["tiktoken.model", "tokenization_kimi.py", "model.safetensors", "config.json"];
        assert_eq!(chosen("a/b", &ranks).unwrap(), ["model.safetensors", "tiktoken.model", "config.json"]);
        assert_eq!(chosen("a/b", &["config.json", "x.gguf"]).unwrap(), ["x.gguf"]);
        let parts = ["m-00002-of-00002.gguf", "README.md", "m-00001-of-00002.gguf"];
        let both = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"];
        assert_eq!(chosen("a/b", &parts).unwrap(), both);
        assert_eq!(chosen("a/b/m-00002-of-00002.gguf", &parts).unwrap(), both);
        let error = chosen("a/b", &parts[..2]).unwrap_err();
        assert!(error.contains("m-00001-of-00002.gguf"), "{error}");
        let folders = ["Q4/m-00001-of-00002.gguf", "Q4/m-00002-of-00002.gguf", "Q8/m.gguf"];
        assert_eq!(chosen("a/b/Q4/m-00001-of-00002.gguf", &folders).unwrap(), folders[..2]);
        assert_eq!(chosen("a/b/Q8/m.gguf", &folders).unwrap(), folders[2..]);
        let error = chosen("a/b", &folders).unwrap_err();
        assert!(error.contains("a/b/Q8/m.gguf"), "{error}");
        let two = ["x.Q4_0.gguf", "x.Q8_0.gguf"];
        assert_eq!(chosen("a/b/x.Q8_0.gguf", &two).unwrap(), ["x.Q8_0.gguf"]);
        let error = chosen("a/b", &two).unwrap_err();
        assert!(error.contains("a/b/x.Q4_0.gguf, a/b/x.Q8_0.gguf"), "{error}");
        assert!(chosen("a/b", &["config.json"]).unwrap_err().contains("neither"));
    }
}
