//! What clients save, on disk: `RUN/weights/NAME` to train on, `RUN/sampler_weights/NAME` as a PEFT adapter to sample from.
//! A directory counts once its `saved.json` is there, which is written last; what does not count, and adapters without a
//! name, whose sampling sessions are over, are removed when a server starts.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use parallax_model::Adapter;
use serde::{Deserialize, Serialize};

use crate::service::checkpoint_dir::{self, CheckpointDirError, io_error};

const SCHEME: &str = "tinker://";
const SAVED: &str = "saved.json";
const ADAPTER: &str = "adapter_model.safetensors";
/// How the names of adapters begin that clients gave none.
const UNNAMED: &str = "unnamed-";
/// Version of what is written.
const FORMAT: u32 = 1;

/// What something was saved for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Weights,
    Sampler,
}

impl Kind {
    fn folder(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Sampler => "sampler_weights",
        }
    }
}

/// The name of something saved: `tinker://RUN/weights/NAME` or `tinker://RUN/sampler_weights/NAME`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SavedPath {
    pub(super) run: String,
    pub(super) kind: Kind,
    pub(super) name: String,
}

impl fmt::Display for SavedPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}/{}", self.run, self.kind.folder(), self.name)
    }
}

/// Which adapter a model has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LoraSpec {
    pub(super) rank: usize,
    pub(super) attention: bool,
    pub(super) mlp: bool,
}

/// What is written beside saved weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Saved {
    format: u32,
    pub(super) base_model_id: String,
    pub(super) lora: LoraSpec,
    /// Optimiser updates of the state.
    pub(super) steps: u64,
    /// Names of its parameters' file and its BLAKE3; empty for an adapter.
    blake3: String,
}

/// One line of a listing.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Listed {
    pub(super) path: SavedPath,
    pub(super) bytes: u64,
    /// Seconds since 1970.
    pub(super) unix_s: u64,
}

/// Why something could not be saved or read.
#[derive(Debug, thiserror::Error)]
pub(super) enum StoreError {
    #[error(
        "{text:?} is no name of saved weights; it looks like tinker://RUN/weights/NAME or tinker://RUN/sampler_weights/NAME"
    )]
    Path { text: String },
    #[error(
        "{name:?} cannot name saved weights: 1 to 128 of a-z, A-Z, 0-9, '.', '_', '-' and neither '.' nor 'unnamed-' in front"
    )]
    Name { name: String },
    #[error("there is nothing saved as {path}")]
    Unknown { path: String },
    #[error("{path} is there already; choose another name, or save with overwrite")]
    Exists { path: String },
    #[error("{limit} checkpoints are saved, which is the limit; delete some")]
    Full { limit: usize },
    #[error("{path} is damaged; load an older one")]
    Damaged { path: String },
    #[error("{path} was made with another base model ({got}), this server's is {wanted}")]
    OtherModel { path: String, got: String, wanted: String },
    #[error(transparent)]
    Disk(#[from] CheckpointDirError),
    #[error("{path}: {reason}")]
    Adapter { path: String, reason: String },
}

impl StoreError {
    /// Whether the request was at fault.
    pub(super) fn is_users(&self) -> bool {
        !matches!(self, Self::Disk(_) | Self::Damaged { .. } | Self::Adapter { .. })
    }
}

fn check_name(name: &str) -> Result<(), StoreError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.is_empty() || name.len() > 128 || name.starts_with('.') || !name.chars().all(fine) {
        return Err(StoreError::Name { name: name.chars().take(200).collect() });
    }
    Ok(())
}

impl SavedPath {
    /// `run` is a model's id, whose colons become part of a folder's name; a client chose `name`.
    pub(super) fn new(run: &str, kind: Kind, name: &str) -> Result<Self, StoreError> {
        check_name(name)?;
        if name.starts_with(UNNAMED) {
            return Err(StoreError::Name { name: name.to_owned() });
        }
        Ok(Self { run: run.to_owned(), kind, name: name.to_owned() })
    }

    /// Where the adapter of one sampling session is saved.
    pub(super) fn unnamed(run: &str, sampling_session: u64) -> Self {
        Self { run: run.to_owned(), kind: Kind::Sampler, name: format!("{UNNAMED}{sampling_session}") }
    }

    pub(super) fn parse(text: &str) -> Result<Self, StoreError> {
        let wrong = || StoreError::Path { text: text.chars().take(200).collect() };
        let parts: Vec<&str> = text.strip_prefix(SCHEME).ok_or_else(wrong)?.split('/').collect();
        let [run, folder, name] = parts[..] else { return Err(wrong()) };
        let kinds = [Kind::Weights, Kind::Sampler];
        let kind = kinds.into_iter().find(|kind| kind.folder() == folder).ok_or_else(wrong)?;
        check_name(&run.replace(':', "_"))?;
        check_name(name)?;
        Ok(Self { run: run.to_owned(), kind, name: name.to_owned() })
    }
}

/// The directory of a server.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    base_model_id: String,
    limit: usize,
}

impl Store {
    /// Makes the directory if it is not there; what is left over from a server before is removed.
    pub(super) fn open(dir: &Path, base_model_id: &str, limit: usize) -> Result<Self, StoreError> {
        checkpoint_dir::create(dir)?;
        let store = Self { dir: dir.to_owned(), base_model_id: base_model_id.to_owned(), limit };
        for dir in store.directories() {
            let unnamed = dir.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNNAMED));
            if unnamed || !dir.join(SAVED).exists() {
                fs::remove_dir_all(&dir).map_err(io_error("removing", &dir))?;
            }
        }
        Ok(store)
    }

    /// One for each thing that is saved, or was to be.
    fn directories(&self) -> impl Iterator<Item = PathBuf> {
        let entries = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
        let kinds = entries(self.dir.clone())
            .flat_map(|run| [Kind::Weights, Kind::Sampler].map(|kind| run.join(kind.folder())));
        kinds.flat_map(entries).filter(|path| path.is_dir())
    }

    fn run_dir(&self, run: &str) -> PathBuf {
        self.dir.join(run.replace(':', "_"))
    }

    fn path(&self, saved: &SavedPath) -> PathBuf {
        self.run_dir(&saved.run).join(saved.kind.folder()).join(&saved.name)
    }

    /// A directory for `saved`, in which nothing counts yet.
    fn prepare(&self, saved: &SavedPath, overwrite: bool) -> Result<PathBuf, StoreError> {
        let dir = self.path(saved);
        if dir.join(SAVED).exists() {
            if !overwrite {
                return Err(StoreError::Exists { path: saved.to_string() });
            }
        } else if self.directories().count() >= self.limit {
            return Err(StoreError::Full { limit: self.limit });
        }
        fs::create_dir_all(&dir).map_err(io_error("creating", &dir))?;
        Ok(dir)
    }

    /// Writes into a directory for `saved`; one in which nothing counts afterwards goes again.
    fn save(
        &self,
        saved: &SavedPath,
        overwrite: bool,
        write: impl FnOnce(&Path) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let dir = self.prepare(saved, overwrite)?;
        let written = write(&dir);
        if written.is_err() && !dir.join(SAVED).exists() {
            // What went wrong is said already; if this does too, the next start removes it.
            let _ = fs::remove_dir_all(&dir);
        }
        written
    }

    fn finish(&self, dir: &Path, lora: LoraSpec, steps: u64, blake3: String) -> Result<(), StoreError> {
        let saved = Saved { format: FORMAT, base_model_id: self.base_model_id.clone(), lora, steps, blake3 };
        let text = serde_json::to_vec_pretty(&saved).expect("plain fields become JSON");
        Ok(checkpoint_dir::write(&dir.join(SAVED), &text)?)
    }

    /// Weights and moments to train on.
    pub(super) fn save_state(
        &self,
        saved: &SavedPath,
        state: &[u8],
        lora: LoraSpec,
        steps: u64,
        overwrite: bool,
    ) -> Result<(), StoreError> {
        self.save(saved, overwrite, |dir| {
            let hash = blake3::hash(state).to_hex().to_string();
            checkpoint_dir::write(&dir.join(state_file(&hash)), state)?;
            self.finish(dir, lora, steps, hash.clone())?;
            // What was there before counts no longer.
            for entry in fs::read_dir(dir).map_err(io_error("listing", dir))?.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with("state-") && name != state_file(&hash) {
                    fs::remove_file(entry.path()).map_err(io_error("removing", &entry.path()))?;
                }
            }
            Ok(())
        })
    }

    /// An adapter to sample from; one of this name is replaced.
    pub(super) fn save_adapter(
        &self,
        saved: &SavedPath,
        adapter: &Adapter,
        lora: LoraSpec,
    ) -> Result<(), StoreError> {
        self.save(saved, true, |dir| {
            adapter
                .save(dir)
                .map_err(|e| StoreError::Adapter { path: saved.to_string(), reason: e.to_string() })?;
            self.finish(dir, lora, 0, String::new())
        })
    }

    /// What is known of `saved`.
    pub(super) fn read(&self, saved: &SavedPath) -> Result<Saved, StoreError> {
        let path = saved.to_string();
        let text = fs::read(self.path(saved).join(SAVED));
        let text = text.map_err(|_| StoreError::Unknown { path: path.clone() })?;
        let read: Saved =
            serde_json::from_slice(&text).map_err(|_| StoreError::Damaged { path: path.clone() })?;
        if read.format != FORMAT {
            return Err(StoreError::Damaged { path });
        }
        if read.base_model_id != self.base_model_id {
            let wanted = self.base_model_id.clone();
            return Err(StoreError::OtherModel { path, got: read.base_model_id, wanted });
        }
        Ok(read)
    }

    /// The state that was saved.
    pub(super) fn load_state(&self, saved: &SavedPath) -> Result<(Saved, Vec<u8>), StoreError> {
        let read = self.read(saved)?;
        let damaged = || StoreError::Damaged { path: saved.to_string() };
        let state = fs::read(self.path(saved).join(state_file(&read.blake3))).map_err(|_| damaged())?;
        if blake3::hash(&state).to_hex().as_str() != read.blake3 {
            return Err(damaged());
        }
        Ok((read, state))
    }

    /// The bytes of an adapter that was saved.
    pub(super) fn load_adapter(&self, saved: &SavedPath) -> Result<Vec<u8>, StoreError> {
        self.read(saved)?;
        let file = self.path(saved).join(ADAPTER);
        fs::read(&file).map_err(|_| StoreError::Damaged { path: saved.to_string() })
    }

    /// Everything saved of `run`, by name.
    pub(super) fn list(&self, run: &str) -> Vec<Listed> {
        let mut listed = Vec::new();
        for kind in [Kind::Weights, Kind::Sampler] {
            let Ok(entries) = fs::read_dir(self.run_dir(run).join(kind.folder())) else { continue };
            for entry in entries.flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                let Ok(written) = fs::metadata(entry.path().join(SAVED)) else { continue };
                let since = written.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
                let files = fs::read_dir(entry.path()).into_iter().flatten().flatten();
                let bytes = files.filter_map(|file| Some(file.metadata().ok()?.len())).sum();
                let path = SavedPath { run: run.to_owned(), kind, name };
                listed.push(Listed { path, bytes, unix_s: since.map_or(0, |since| since.as_secs()) });
            }
        }
        listed.sort_by_key(|saved| saved.path.to_string());
        listed
    }

    /// Removes what is saved.
    pub(super) fn delete(&self, saved: &SavedPath) -> Result<(), StoreError> {
        let dir = self.path(saved);
        fs::remove_file(dir.join(SAVED)).map_err(|_| StoreError::Unknown { path: saved.to_string() })?;
        Ok(fs::remove_dir_all(&dir).map_err(io_error("removing", &dir))?)
    }
}

fn state_file(hash: &str) -> String {
    format!("state-{}.safetensors", &hash[..hash.len().min(16)])
}

#[cfg(test)]
mod tests {
    use super::*;

    const LORA: LoraSpec = LoraSpec { rank: 4, attention: true, mlp: false };

    fn path(name: &str) -> SavedPath {
        SavedPath::parse(&format!("tinker://ab12:train:0/weights/{name}")).unwrap()
    }

    #[test]
    fn names_that_leave_the_directory_are_refused() {
        for text in [
            "tinker://a/weights/..",
            "tinker://../weights/a",
            "tinker://a/weights/b/c",
            "file://a/weights/b",
            "tinker://a/other/b",
            "tinker://a/weights/",
            "tinker://a/weights/a%2fb",
        ] {
            assert!(SavedPath::parse(text).is_err(), "{text}");
        }
        assert_eq!(path("step-1").to_string(), "tinker://ab12:train:0/weights/step-1");
    }

    #[test]
    fn what_does_not_count_is_gone_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), "base", 9).unwrap();
        store.save_state(&path("a"), b"one", LORA, 7, false).unwrap();
        let torn = store.path(&path("torn"));
        fs::create_dir_all(&torn).unwrap();
        fs::write(torn.join("state-1.safetensors"), "half").unwrap();
        let unnamed = SavedPath::unnamed("ab12:train:0", 3);
        store.save(&unnamed, true, |dir| store.finish(dir, LORA, 0, String::new())).unwrap();
        assert_eq!(SavedPath::parse(&unnamed.to_string()).unwrap(), unnamed);
        assert!(SavedPath::new("ab12:train:0", Kind::Sampler, &unnamed.name).is_err(), "no client's name");
        let store = Store::open(dir.path(), "base", 9).unwrap();
        assert!(!torn.exists() && matches!(store.read(&unnamed), Err(StoreError::Unknown { .. })));
        assert_eq!(store.load_state(&path("a")).unwrap().1, b"one");
    }

    #[test]
    fn a_write_that_fails_leaves_nothing_that_counts() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), "base", 1).unwrap();
        let broken = || Err(StoreError::Damaged { path: "disk".to_owned() });
        store.save(&path("a"), false, |_| broken()).unwrap_err();
        store.save_state(&path("b"), b"one", LORA, 7, false).unwrap();
        store.save(&path("b"), true, |_| broken()).unwrap_err();
        assert_eq!(store.load_state(&path("b")).unwrap().1, b"one");
    }

    #[test]
    fn what_is_saved_is_loaded_listed_and_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path(), "base", 2).unwrap();
        store.save_state(&path("a"), b"one", LORA, 7, false).unwrap();
        let again = store.save_state(&path("a"), b"two", LORA, 8, false);
        assert!(matches!(again, Err(StoreError::Exists { .. })));
        store.save_state(&path("a"), b"two", LORA, 8, true).unwrap();
        let (saved, state) = store.load_state(&path("a")).unwrap();
        assert_eq!((saved.steps, saved.lora, &state[..]), (8, LORA, &b"two"[..]));
        store.save_state(&path("b"), b"x", LORA, 1, false).unwrap();
        assert!(matches!(
            store.save_state(&path("c"), b"x", LORA, 1, false),
            Err(StoreError::Full { limit: 2 })
        ));
        let names: Vec<String> = store.list("ab12:train:0").into_iter().map(|l| l.path.name).collect();
        assert_eq!(names, ["a", "b"]);
        store.delete(&path("b")).unwrap();
        assert!(matches!(store.delete(&path("b")), Err(StoreError::Unknown { .. })));
        assert!(matches!(store.load_state(&path("b")), Err(StoreError::Unknown { .. })));

        let file = store.path(&path("a")).join(state_file(blake3::hash(b"two").to_hex().as_str()));
        fs::write(file, "tw").unwrap();
        assert!(matches!(store.load_state(&path("a")), Err(StoreError::Damaged { .. })));
        let other = Store::open(dir.path(), "another", 9).unwrap();
        let error = other.load_state(&path("a")).unwrap_err();
        assert!(matches!(&error, StoreError::OtherModel { .. }) && error.is_users(), "{error}");
    }
}
