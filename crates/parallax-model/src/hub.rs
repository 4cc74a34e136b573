//! Names of models on a hub of Hugging Face's kind, and where its clients keep what they have fetched.
//!
//! The cache is the one that Hugging Face's own tools use: `models--ORG--NAME/{blobs,refs,snapshots}`. Fetching is not
//! done here; `parallax-engine` does it behind its feature `hub`.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::weights::gguf::split;

/// Small files that belong to a checkpoint in Hugging Face's layout; it may lack some.
pub const COMPANIONS: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors.index.json",
];

/// `ORG/NAME`, with a revision after `@` (a branch, a tag or a commit; `main` without one), and with one GGUF file of it
/// after another `/`, which may lie in folders. Of a file in several parts any part stands for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    /// `ORG/NAME`.
    pub repository: String,
    /// Branch, tag or commit.
    pub revision: String,
    /// One GGUF file of a repository that has several, with the folders that it lies in.
    pub file: Option<String>,
}

/// Most names between the repository's and the end of a file's.
const MAX_FOLDERS: usize = 8;

/// Why a text names nothing on a hub.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no model on a hub: those are written ORG/NAME, ORG/NAME@REVISION or ORG/NAME/FILE.gguf")]
pub struct NotAHubName(pub String);

/// Letters, digits and `-_.`, and nothing that leaves a directory: it becomes part of paths and addresses.
pub fn is_plain(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !part.is_empty() && part.len() <= 200 && part.chars().all(allowed) && !part.starts_with('.')
}

impl FromStr for HubName {
    type Err = NotAHubName;

    fn from_str(text: &str) -> Result<Self, NotAHubName> {
        let (path, revision) = text.split_once('@').unwrap_or((text, "main"));
        let parts: Vec<&str> = path.split('/').collect();
        let plain = parts.iter().copied().chain(revision.split('/')).all(is_plain);
        let file = match parts[..] {
            [_, _] if plain => None,
            [_, _, ref file @ ..] if plain && path.ends_with(".gguf") && file.len() <= MAX_FOLDERS => {
                Some(file.join("/"))
            }
            _ => return Err(NotAHubName(text.to_owned())),
        };
        Ok(Self { repository: format!("{}/{}", parts[0], parts[1]), revision: revision.to_owned(), file })
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(file) = &self.file {
            write!(f, "/{file}")?;
        }
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

/// The cache directory of the user: `HF_HUB_CACHE`, else below `HF_HOME`, else below the home directory.
pub fn cache_dir() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("HF_HUB_CACHE")
        .or_else(|| set("HF_HOME").map(|p| p.join("hub")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/huggingface/hub")))
}

impl HubName {
    /// The folder of the repository in a cache.
    pub fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.repository.replace('/', "--")))
    }

    /// What was fetched before: the directory of a snapshot, or a GGUF file in it. The snapshot is the one that the
    /// revision names; where the cache does not say what `main` is, the last by name.
    pub fn cached(&self, cache: &Path) -> Option<PathBuf> {
        let folder = self.folder(cache);
        let snapshots = folder.join("snapshots");
        let commit = std::fs::read_to_string(folder.join("refs").join(&self.revision)).ok();
        let named = commit.as_deref().map_or(self.revision.as_str(), str::trim);
        if let Some(found) = is_plain(named).then(|| self.model_in(&snapshots.join(named))).flatten() {
            return Some(found);
        }
        if self.revision != "main" || commit.is_some() {
            return None;
        }
        let mut all: Vec<PathBuf> =
            std::fs::read_dir(snapshots).ok()?.filter_map(|entry| entry.ok().map(|e| e.path())).collect();
        all.sort();
        all.iter().rev().find_map(|snapshot| self.model_in(snapshot))
    }

    /// What of a snapshot can be opened.
    fn model_in(&self, snapshot: &Path) -> Option<PathBuf> {
        match &self.file {
            Some(file) => Some(snapshot.join(file)).filter(|path| has_all_parts(path)),
            None if is_whole(snapshot) => Some(snapshot.to_owned()),
            None => only_gguf(snapshot).filter(|path| has_all_parts(path)),
        }
    }
}

/// Whether a directory has a configuration and all weights: other tools that share the cache fetch single files.
pub(crate) fn is_whole(dir: &Path) -> bool {
    let weights = || crate::weights::safetensors::shards(dir);
    dir.join("config.json").is_file()
        && weights().is_ok_and(|(files, _)| files.iter().all(|file| file.is_file()))
}

fn has_all_parts(gguf: &Path) -> bool {
    split::part_paths(gguf).iter().all(|path| path.is_file())
}

/// The files that belong together with a GGUF file of a repository: itself, or all parts of the model that it is part of,
/// in order (`NAME-00001-of-00003.gguf` and so on).
pub fn gguf_parts(file: &str) -> Vec<String> {
    split::part_names(file)
}

/// The GGUF file of a directory that has exactly one, or the first there is of the parts of exactly one.
pub(crate) fn only_gguf(dir: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"))
        .collect();
    found.sort();
    let first = found.first()?.clone();
    let parts = split::part_paths(&first);
    found.iter().all(|path| parts.contains(path)).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        for (text, repository, revision, file) in [
            ("a/b", "a/b", "main", None),
            ("Org-1/Model_2.5@v1.0", "Org-1/Model_2.5", "v1.0", None),
            ("a/b@refs/pr/7", "a/b", "refs/pr/7", None),
            ("a/b/c.Q4_K_M.gguf@abc", "a/b", "abc", Some("c.Q4_K_M.gguf")),
            ("a/b/Q4/c-00001-of-00002.gguf", "a/b", "main", Some("Q4/c-00001-of-00002.gguf")),
        ] {
            let name: HubName = text.parse().unwrap();
            assert_eq!((name.repository.as_str(), name.revision.as_str()), (repository, revision));
            assert_eq!((name.file.as_deref(), name.to_string().as_str()), (file, text));
        }
        for text in [
            "",
            "a",
            "a/",
            "/b",
            "../b",
            "a/..",
            "a/b/c",
            "a/b@",
            "a/b@../x",
            "a/b@.x",
            "a b/c",
            "a/b/../c.gguf",
            "a/b//c.gguf",
            "a/b/1/2/3/4/5/6/7/8/c.gguf",
            "a/b#c",
        ] {
            assert!(text.parse::<HubName>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_snapshot_is_found_by_its_revision() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("models--a--b");
        let cached = |name: &str| {
            name.parse::<HubName>()
                .unwrap()
                .cached(dir.path())
                .map(|p| p.strip_prefix(&folder).unwrap().to_owned())
        };
        assert_eq!(cached("a/b"), None);
        for commit in ["111", "222"] {
            std::fs::create_dir_all(folder.join("snapshots").join(commit)).unwrap();
            for file in ["config.json", "model.safetensors"] {
                std::fs::write(folder.join("snapshots").join(commit).join(file), "{}").unwrap();
            }
        }
        std::fs::create_dir_all(folder.join("snapshots/333")).unwrap();
        std::fs::write(folder.join("snapshots/333/config.json"), "{}").unwrap();
        assert_eq!(cached("a/b"), Some("snapshots/222".into()), "333 has no weights");
        let index = folder.join("snapshots/222/model.safetensors.index.json");
        std::fs::write(&index, r#"{"weight_map":{"a":"model-1.safetensors"}}"#).unwrap();
        assert_eq!(cached("a/b"), Some("snapshots/111".into()), "222 lacks a shard");
        std::fs::write(folder.join("snapshots/222/model-1.safetensors"), "").unwrap();
        assert_eq!(cached("a/b"), Some("snapshots/222".into()));
        assert_eq!(cached("a/b@111"), Some("snapshots/111".into()));
        assert_eq!(cached("a/b@dev"), None);
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), "111\n").unwrap();
        assert_eq!(cached("a/b"), Some("snapshots/111".into()));
        std::fs::write(folder.join("snapshots/333/x.gguf"), "").unwrap();
        assert_eq!(cached("a/b@333"), Some("snapshots/333/x.gguf".into()));
        assert_eq!(cached("a/b/x.gguf@333"), Some("snapshots/333/x.gguf".into()));
        assert_eq!(cached("a/b/y.gguf@333"), None);
        // Parts count as one model, which is there when all of them are.
        let part = |n: usize| folder.join(format!("snapshots/444/m-0000{n}-of-00002.gguf"));
        std::fs::create_dir_all(folder.join("snapshots/444")).unwrap();
        std::fs::write(part(2), "").unwrap();
        assert_eq!(cached("a/b@444"), None);
        assert_eq!(cached("a/b/m-00002-of-00002.gguf@444"), None);
        std::fs::write(part(1), "").unwrap();
        assert_eq!(cached("a/b@444"), Some("snapshots/444/m-00001-of-00002.gguf".into()));
        assert_eq!(
            cached("a/b/m-00002-of-00002.gguf@444"),
            Some("snapshots/444/m-00002-of-00002.gguf".into())
        );
    }
}
