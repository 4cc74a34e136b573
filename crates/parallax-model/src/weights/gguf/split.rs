//! GGUF files in several parts: `NAME-00001-of-00003.gguf` and so on, as llama.cpp's `gguf-split` writes them.
//!
//! Every part is a GGUF file of its own with a share of the tensors; the first has the metadata. Which part a file is, is
//! said by its keys `split.no` (from zero) and `split.count`; where the others are, by its name alone.

use std::path::{Path, PathBuf};

use super::GgufFile;
use crate::error::OpenError;

/// Most parts: one file is opened for each.
const MAX_PARTS: u64 = 1 << 12;

/// What a part's file name says.
#[derive(Debug, PartialEq, Eq)]
struct PartName<'a> {
    prefix: &'a str,
    /// From one.
    number: u64,
    count: u64,
}

/// Reads `PREFIX-00002-of-00003.gguf`.
fn part_name(name: &str) -> Option<PartName<'_>> {
    let digits = |text: &str| -> Option<u64> {
        text.parse().ok().filter(|_| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit()))
    };
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let (number, count) = (digits(number)?, digits(count)?);
    (1..=count).contains(&number).then_some(PartName { prefix, number, count })
}

/// The files of the model that a file name belongs to, in order: itself, or all parts.
pub(crate) fn part_names(name: &str) -> Vec<String> {
    match part_name(name).filter(|part| part.count <= MAX_PARTS) {
        None => vec![name.to_owned()],
        Some(PartName { prefix, count, .. }) => {
            (1..=count).map(|number| format!("{prefix}-{number:05}-of-{count:05}.gguf")).collect()
        }
    }
}

/// The same beside a path.
pub(crate) fn part_paths(path: &Path) -> Vec<PathBuf> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    name.map_or_else(Vec::new, |name| {
        part_names(&name).iter().map(|part| path.with_file_name(part)).collect()
    })
}

impl GgufFile {
    /// Number, from zero, and count of the parts, where there are several.
    pub(super) fn part(&self) -> Option<(u64, u64)> {
        let count = self.unsigned("split.count").filter(|count| *count > 1)?;
        Some((self.unsigned("split.no").unwrap_or(0), count))
    }

    /// This part and all others as one file.
    pub(super) fn with_other_parts(self, path: &Path) -> Result<Self, OpenError> {
        let Some((number, count)) = self.part() else { return Ok(self) };
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let agrees = part_name(&name).is_some_and(|part| (part.number - 1, part.count) == (number, count));
        if !agrees || count > MAX_PARTS {
            return Err(self.sources[0].corrupt(format!(
                "it calls itself part {} of {count}, at most {MAX_PARTS}; the parts are found by names that end in -00001-of-{count:05}.gguf and so on",
                number.saturating_add(1)
            )));
        }
        let mut own = Some(self);
        let mut whole: Option<Self> = None;
        for (i, path) in (0u64..).zip(part_paths(path)) {
            let part = match own.take_if(|_| i == number) {
                Some(own) => own,
                None if !path.is_file() => return Err(OpenError::MissingPart { path, number: i + 1, count }),
                None => Self::read(&path)?,
            };
            if part.part() != Some((i, count)) {
                return Err(part.sources[0].corrupt(format!("it is not part {} of {count}", i + 1)));
            }
            match &mut whole {
                None => whole = Some(part),
                Some(whole) => whole.append(part)?,
            }
        }
        let whole = whole.expect("there are at least two parts");
        match whole.unsigned("split.tensors.count") {
            Some(n) if n != whole.tensors.len() as u64 => Err(whole.sources[0].corrupt(format!(
                "the {count} parts have {} tensors, the first says {n}",
                whole.tensors.len()
            ))),
            _ => Ok(whole),
        }
    }

    /// Adds the tensors of the next part.
    fn append(&mut self, part: Self) -> Result<(), OpenError> {
        let file = self.sources.len();
        for (name, info) in part.tensors {
            if self.tensors.contains_key(&name) {
                return Err(part.sources[0].corrupt(format!("tensor {name:?} is in an earlier part too")));
            }
            self.tensors.insert(name, super::TensorInfo { file, ..info });
        }
        self.sources.extend(part.sources);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_read_and_others_left_alone() {
        let all = ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"];
        for name in all {
            assert_eq!(part_names(name), all);
        }
        assert_eq!(
            part_paths(Path::new("/x/a-b-00001-of-00001.gguf")),
            [Path::new("/x/a-b-00001-of-00001.gguf")]
        );
        for name in [
            "m.gguf",
            "m-00000-of-00003.gguf",
            "m-00004-of-00003.gguf",
            "m-1-of-3.gguf",
            "m-00001-of-00003.bin",
            "m-+0001-of-00003.gguf",
            "m-00001-of-99999.gguf",
        ] {
            assert_eq!(part_names(name), [name], "{name}");
        }
    }
}
