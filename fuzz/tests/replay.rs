//! Gives every decoder its seeds, the kept corpus and whatever once broke one.

use std::fs;
use std::path::Path;

use swarm_fuzz::DECODERS;

#[test]
fn seeds_corpus_and_crashes_break_no_decoder() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for decoder in DECODERS {
        let mut inputs = (decoder.seeds)();
        assert!(!inputs.is_empty(), "{} has no seeds", decoder.name);
        for kind in ["corpus", "crashes"] {
            let Ok(files) = fs::read_dir(root.join(kind).join(decoder.name)) else { continue };
            inputs.extend(files.flatten().filter_map(|file| fs::read(file.path()).ok()));
        }
        for input in inputs {
            (decoder.check)(&input);
            // Cut off anywhere, it is refused or something else, no panic.
            for n in 0..input.len().min(512) {
                (decoder.check)(&input[..n]);
            }
        }
    }
}
