//! Files in several parts.

use std::path::{Path, PathBuf};

use parallax_model::{Checkpoint, StageInput};
use tempfile::TempDir;

use super::seeded::{bits, longest_prompt};
use super::writer::{Age, Gguf, Key, convert};
use super::{forward, logits, recording, sparse_copy, write};

const N: usize = 3;

fn path(dir: &Path, number: usize) -> PathBuf {
    dir.join(format!("model-{number:05}-of-{N:05}.gguf"))
}

/// A stand-in in three files, and what it was before.
fn split() -> (TempDir, Gguf, Vec<Gguf>) {
    let mut whole = convert(&recording("glm4-moe"), "glm4moe", Age::New);
    // Layer by layer, so that parts hold some of them.
    whole.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let parts = whole.parts(N);
    let dir = tempfile::tempdir().unwrap();
    for (i, part) in parts.iter().enumerate() {
        std::fs::write(path(dir.path(), i + 1), part.bytes()).unwrap();
    }
    (dir, whole, parts)
}

fn refused(path: &Path) -> String {
    Checkpoint::open(path).unwrap_err().to_string()
}

#[test]
fn any_part_or_the_folder_names_the_model() {
    let (dir, whole, _) = split();
    let tokens = longest_prompt(&recording("glm4-moe"));
    let other = tempfile::tempdir().unwrap();
    let whole = write(&whole, &other.path().join("model.gguf"));
    let expected = bits(&logits(&whole, &tokens));
    // Hubs keep a configuration beside such files.
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    let names = (1..=N).map(|n| path(dir.path(), n)).chain([dir.path().to_owned()]);
    for name in names {
        let checkpoint = Checkpoint::open(&name).unwrap();
        let files: Vec<PathBuf> = (1..=N).map(|n| path(dir.path(), n)).collect();
        assert_eq!(checkpoint.files(), files);
        assert_eq!(bits(&logits(&checkpoint, &tokens)), expected, "{}", name.display());
        assert_eq!(checkpoint.id().unwrap(), whole.id().unwrap());
        let resolved = Checkpoint::resolve(&name.to_string_lossy()).unwrap();
        assert_eq!(resolved.files(), files);
    }
}

#[test]
fn a_stage_reads_the_parts_of_its_layers() {
    let (dir, _, _) = split();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let n = checkpoint.config().n_layers;
    for layers in [0..1, n - 1..n] {
        let (spans, opened) = (checkpoint.tensor_spans(layers.clone()), checkpoint.bytes_read());
        let files: std::collections::BTreeSet<usize> = spans.iter().map(|s| s.file).collect();
        assert!(files.len() < N, "{layers:?} lies in {files:?}");
        let tokens = [1, 2];
        let x = vec![0.5; 2 * checkpoint.config().hidden];
        let input = if layers.start == 0 { StageInput::Tokens(&tokens) } else { StageInput::Hidden(&x) };
        forward(&checkpoint, layers.clone(), input, 2);
        let (read, wanted) = (checkpoint.bytes_read() - opened, spans.iter().map(|s| s.len).sum::<u64>());
        assert_eq!(read, wanted, "{layers:?}");
    }
}

#[test]
fn a_missing_part_is_named() {
    for missing in 1..=N {
        let (dir, _, _) = split();
        let gone = path(dir.path(), missing);
        std::fs::remove_file(&gone).unwrap();
        for name in [path(dir.path(), missing % N + 1), dir.path().to_owned()] {
            let error = refused(&name);
            let part = format!("part {missing} of {N}");
            assert!(error.contains(&*gone.to_string_lossy()) && error.contains(&part), "{error}");
        }
    }
}

#[test]
fn parts_that_do_not_belong_together_are_refused() {
    let (dir, _, parts) = split();
    let second = path(dir.path(), 2);
    let with = |change: &dyn Fn(&mut Gguf)| {
        let mut part = parts[1].clone();
        change(&mut part);
        std::fs::write(&second, part.bytes()).unwrap();
        refused(&path(dir.path(), 1))
    };
    let short = |name: &str, value: u16| {
        let name = name.to_owned();
        with(&|part| {
            part.keys.insert(name.clone(), Key::Short(value));
        })
    };
    assert!(short("split.no", 2).contains("not part 2 of 3"));
    assert!(short("split.count", 4).contains("not part 2 of 3"));
    assert!(with(&|part| part.keys.clear()).contains("not part 2 of 3"));
    let twice = with(&|part| part.tensors.push(parts[0].tensors[0].clone()));
    assert!(twice.contains("in an earlier part too") && twice.contains("00002"), "{twice}");
    let fewer = with(&|part| {
        part.tensors.pop();
    });
    assert!(fewer.contains("the first says"), "{fewer}");
    let mut cut = parts[1].bytes();
    cut.truncate(cut.len() - 4);
    std::fs::write(&second, cut).unwrap();
    let error = refused(&path(dir.path(), 1));
    assert!(error.contains("truncated") && error.contains("00002"), "{error}");
    // Under another name the others cannot be found.
    let stray = dir.path().join("stray.gguf");
    std::fs::write(&stray, parts[0].bytes()).unwrap();
    let error = refused(&stray);
    assert!(error.contains("part 1 of 3") && error.contains("00003.gguf"), "{error}");
    let misnamed = dir.path().join("x-00002-of-00003.gguf");
    std::fs::write(&misnamed, parts[0].bytes()).unwrap();
    assert!(refused(&misnamed).contains("part 1 of 3"));
}

#[test]
fn a_folder_of_two_models_is_no_model() {
    let (dir, whole, _) = split();
    write(&whole, &dir.path().join("other.gguf"));
    assert!(refused(dir.path()).contains("config.json"));
}

#[test]
fn a_whole_file_may_be_called_a_part_of_one() {
    let (dir, whole, _) = split();
    let path = dir.path().join("one-00001-of-00001.gguf");
    let checkpoint = write(&whole.parts(1)[0], &path);
    assert_eq!(checkpoint.files(), [path]);
    // Holes where a stage does not read do no harm.
    sparse_copy(&checkpoint, 0..1, &dir.path().join("holes.gguf"));
}
