//! The adapters that requests can name, and those that only running requests still use.

use std::collections::{BTreeMap, BTreeSet};

use crate::adapter_file::AdapterFile;
use crate::error::RequestError;
use crate::sequence::ResidentAdapter;

/// Resident adapters by name.
#[derive(Debug, Clone, Default)]
pub struct Adapters {
    by_name: BTreeMap<String, ResidentAdapter>,
    /// For the next runner, retired ones too.
    files: BTreeMap<u32, AdapterFile>,
    retired: BTreeSet<u32>,
    issued: u32,
}

impl Adapters {
    /// Their names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// The adapter of a name.
    ///
    /// # Errors
    /// There is none; the error lists those that there are.
    pub fn find(&self, name: &str) -> Result<ResidentAdapter, RequestError> {
        let found = self.by_name.get(name).copied();
        found.ok_or_else(|| RequestError::unknown_adapter(name, self.names()))
    }

    /// An id that was never given out before.
    pub(super) fn next_id(&mut self) -> u32 {
        self.issued += 1;
        self.issued
    }

    pub(super) fn insert(&mut self, name: &str, id: u32, file: AdapterFile) {
        let adapter = ResidentAdapter { id, hash: file.hash() };
        self.files.insert(id, file.unparsed());
        if let Some(before) = self.by_name.insert(name.to_owned(), adapter) {
            self.retired.insert(before.id);
        }
    }

    pub(super) fn remove(&mut self, name: &str) -> bool {
        let removed = self.by_name.remove(name);
        self.retired.extend(removed.map(|adapter| adapter.id));
        removed.is_some()
    }

    /// All that requests may still pass through, by number.
    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &AdapterFile)> {
        self.files.iter().map(|(id, file)| (*id, file))
    }

    /// What an adapter is called; nothing once it is retired.
    pub(super) fn name_of(&self, id: u32) -> Option<&str> {
        self.by_name.iter().find(|(_, adapter)| adapter.id == id).map(|(name, _)| name.as_str())
    }

    pub(super) fn has_retired(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Retired adapters outside `used`, once.
    pub(super) fn take_unused(&mut self, used: &BTreeSet<u32>) -> Vec<u32> {
        let unused: Vec<u32> = self.retired.difference(used).copied().collect();
        self.retired.retain(|id| used.contains(id));
        unused.iter().for_each(|id| drop(self.files.remove(id)));
        unused
    }
}
