//! The reader against a small writer, and against mutated bytes.

use proptest::prelude::*;

use super::*;

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

/// A file with two metadata entries and two tensors.
fn sample() -> Vec<u8> {
    let mut f = MAGIC.to_vec();
    f.extend(3u32.to_le_bytes());
    f.extend(2u64.to_le_bytes());
    f.extend(3u64.to_le_bytes());
    put_string(&mut f, "general.architecture");
    f.extend(8u32.to_le_bytes());
    put_string(&mut f, "llama");
    put_string(&mut f, "llama.block_count");
    f.extend(4u32.to_le_bytes());
    f.extend(7u32.to_le_bytes());
    put_string(&mut f, "words");
    f.extend(9u32.to_le_bytes());
    f.extend(8u32.to_le_bytes());
    f.extend(2u64.to_le_bytes());
    put_string(&mut f, "a");
    put_string(&mut f, "b");
    for (name, dims, kind, offset) in [("x", vec![4u64, 2], 0u32, 0u64), ("q", vec![32], 8, 32)] {
        put_string(&mut f, name);
        f.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| f.extend(d.to_le_bytes()));
        f.extend(kind.to_le_bytes());
        f.extend(offset.to_le_bytes());
    }
    f.resize(f.len().next_multiple_of(32), 0);
    (0..8).for_each(|i| f.extend((i as f32).to_le_bytes()));
    f.extend(half::f16::from_f32(1.0).to_le_bytes());
    f.extend((0..32).map(|i| i as u8));
    f
}

#[test]
fn header_and_tensors_are_read() {
    let g = GgufFile::from_bytes("sample", sample()).unwrap();
    assert_eq!(g.string("general.architecture"), Some("llama"));
    assert_eq!(g.unsigned("llama.block_count"), Some(7));
    assert_eq!(g.strings("words"), Some(vec!["a", "b"]));
    assert_eq!(g.tensors["x"].shape, [2, 4]);
    assert_eq!(g.read_f32("x").unwrap(), (0..8).map(|i| i as f32).collect::<Vec<_>>());
    assert_eq!(g.read_f32("q").unwrap()[31], 31.0);
}

#[test]
fn every_truncation_is_an_error() {
    let whole = sample();
    for len in 0..whole.len() {
        let error = GgufFile::from_bytes("cut", whole[..len].to_vec()).unwrap_err();
        assert!(error.to_string().contains("truncated or corrupt"), "{len}: {error}");
    }
}

#[test]
fn unsupported_block_format_is_named() {
    let mut f = sample();
    let at = f.windows(9).position(|w| w == [1, 0, 0, 0, 0, 0, 0, 0, b'q']).unwrap() + 9 + 4 + 8;
    f[at..at + 4].copy_from_slice(&16u32.to_le_bytes());
    let error = GgufFile::from_bytes("k", f.clone()).unwrap_err().to_string();
    assert!(error.contains("GGUF type 16") && error.contains("Q4_K"), "{error}");
    // A k-quant needs rows of 256.
    f[at..at + 4].copy_from_slice(&12u32.to_le_bytes());
    let error = GgufFile::from_bytes("k", f).unwrap_err().to_string();
    assert!(error.contains("whole number of Q4_K"), "{error}");
}

/// The sample with eight bytes replaced: those `skip` after the text `mark`.
fn changed(mark: &[u8], skip: usize, value: u64) -> String {
    let mut f = sample();
    let at = f.windows(mark.len()).position(|w| w == mark).unwrap() + mark.len() + skip;
    f[at..at + 8].copy_from_slice(&value.to_le_bytes());
    GgufFile::from_bytes("lie", f).unwrap_err().to_string()
}

#[test]
fn headers_that_lie_about_the_data_are_refused() {
    // Counts of tensors, metadata and array elements; a key's length; a dimension; offsets.
    let x = [&1u64.to_le_bytes()[..], b"x"].concat();
    let q = [&1u64.to_le_bytes()[..], b"q"].concat();
    for (what, error) in [
        ("tensors", changed(&3u32.to_le_bytes(), 0, 1 << 63)),
        ("metadata", changed(&3u32.to_le_bytes(), 8, 1 << 40)),
        ("bytes wanted", changed(&3u32.to_le_bytes(), 16, u64::MAX)),
        ("array elements", changed(b"words", 8, 1 << 50)),
        ("blocks", changed(&x, 4, 1 << 62)),
        ("past the end", changed(&x, 24, u64::MAX - 31)),
        ("not aligned", changed(&q, 16, 1)),
        ("share bytes", changed(&q, 16, 0)),
    ] {
        assert!(error.contains(what) && error.contains("lie"), "{what}: {error}");
    }
}

proptest! {
    #[test]
    fn mutated_bytes_never_panic(at in 0usize..400, value: u8, second in 0usize..400, other: u8) {
        let mut f = sample();
        let n = f.len();
        f[at % n] = value;
        f[second % n] ^= other;
        if let Ok(g) = GgufFile::from_bytes("mutated", f) {
            let _ = g.read_f32("x");
            let _ = g.read_f32("q");
            let _ = ModelConfig::from_gguf(&g);
        }
    }
}
