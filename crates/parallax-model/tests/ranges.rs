//! A stage reads the bytes of its own layers, and no others.

#![expect(clippy::unwrap_used, reason = "a test: the helpers outside the test functions too")]

use std::{collections::BTreeMap, path::Path};

use parallax_model::{Checkpoint, LoadOptions, Stage};
use safetensors::tensor::{Dtype, TensorView, serialize};

/// The tiny model in three shards with an index, tensors dealt out in turn.
fn shards(dir: &Path) {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/tiny");
    std::fs::copy(assets.join("config.json"), dir.join("config.json")).unwrap();
    let whole = std::fs::read(assets.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&whole).unwrap();
    let mut map = BTreeMap::new();
    let mut parts: Vec<Vec<(String, TensorView<'_>)>> = vec![Vec::new(); 3];
    let mut names = file.names();
    names.sort();
    for (i, name) in names.into_iter().enumerate() {
        let view = file.tensor(name).unwrap();
        assert!(matches!(view.dtype(), Dtype::BF16 | Dtype::F32));
        map.insert(name.to_owned(), format!("part-{}.safetensors", i % 3));
        parts[i % 3].push((name.to_owned(), view));
    }
    for (i, part) in parts.into_iter().enumerate() {
        let bytes = serialize(part, None).unwrap();
        std::fs::write(dir.join(format!("part-{i}.safetensors")), bytes).unwrap();
    }
    let index = serde_json::json!({ "weight_map": map });
    std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn a_stage_reads_the_bytes_of_its_layers_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    shards(dir.path());
    let n_layers = Checkpoint::open(dir.path()).unwrap().config().n_layers;
    let whole: u64 = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.extension().is_some_and(|e| e == "safetensors"))
        .map(|p| p.metadata().unwrap().len())
        .sum();
    for layers in [0..1, 1..2, n_layers - 1..n_layers, 0..n_layers] {
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let opened = checkpoint.bytes_read();
        assert!(opened < whole / 10, "opening reads headers only: {opened} of {whole}");
        let expected: u64 = checkpoint.tensor_spans(layers.clone()).iter().map(|s| s.len).sum();
        let options = LoadOptions { layers: layers.clone(), kv_pages: 1, ..LoadOptions::whole(&checkpoint) };
        Stage::load(&checkpoint, &options).unwrap();
        assert_eq!(checkpoint.bytes_read() - opened, expected, "layers {layers:?} of {whole} bytes");
    }
}
