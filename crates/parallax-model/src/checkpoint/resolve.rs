//! From what a user types after `--model` to a checkpoint.

use std::path::{Path, PathBuf};

use super::Checkpoint;
use crate::error::OpenError;

/// The hub's cache folder: `HF_HUB_CACHE`, else below `HF_HOME`, else below the home directory.
fn hub_cache() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("HF_HUB_CACHE")
        .or_else(|| set("HF_HOME").map(|p| p.join("hub")))
        .or_else(|| set("HOME").map(|p| p.join(".cache/huggingface/hub")))
}

/// The snapshot of a repository: the one `refs/main` names, else the last by name that has a config.json.
fn snapshot(cache: &Path, repository: &str) -> Option<PathBuf> {
    let folder = cache.join(format!("models--{}", repository.replace('/', "--")));
    let main = std::fs::read_to_string(folder.join("refs/main"))
        .ok()
        .map(|commit| folder.join("snapshots").join(commit.trim()))
        .filter(|p| p.join("config.json").is_file());
    if main.is_some() {
        return main;
    }
    let mut all: Vec<PathBuf> = std::fs::read_dir(folder.join("snapshots"))
        .ok()?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| p.join("config.json").is_file())
        .collect();
    all.sort();
    all.pop()
}

/// A directory may hold one GGUF file instead of an HF checkpoint.
fn only_gguf(dir: &Path) -> Option<PathBuf> {
    let mut found = std::fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|p| p.extension().is_some_and(|e| e == "gguf"));
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

pub(super) fn resolve(model: &str) -> Result<Checkpoint, OpenError> {
    if model == "tiny" {
        return Checkpoint::tiny();
    }
    let path = Path::new(model);
    if path.is_dir()
        && !path.join("config.json").is_file()
        && let Some(gguf) = only_gguf(path)
    {
        return Checkpoint::open(&gguf);
    }
    if path.exists() {
        return Checkpoint::open(path);
    }
    let cache = hub_cache();
    let is_repository = model.split('/').count() == 2 && !model.starts_with('.') && !path.is_absolute();
    if let Some(found) = cache.as_deref().filter(|_| is_repository).and_then(|c| snapshot(c, model)) {
        return Checkpoint::open(&found);
    }
    Err(OpenError::NotFound {
        model: model.to_owned(),
        cache: cache.map_or_else(|| "none".to_owned(), |c| c.display().to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_model_lists_the_alternatives() {
        let text = resolve("nobody/nothing-of-this-name").unwrap_err().to_string();
        assert!(text.contains("nobody/nothing-of-this-name") && text.contains("GGUF"), "{text}");
    }

    #[test]
    fn snapshot_prefers_the_main_reference() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("models--a--b");
        for commit in ["111", "222"] {
            std::fs::create_dir_all(folder.join("snapshots").join(commit)).unwrap();
            std::fs::write(folder.join("snapshots").join(commit).join("config.json"), "{}").unwrap();
        }
        assert!(snapshot(dir.path(), "a/b").unwrap().ends_with("222"));
        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::write(folder.join("refs/main"), "111\n").unwrap();
        assert!(snapshot(dir.path(), "a/b").unwrap().ends_with("111"));
    }
}
