//! libFuzzer's program: gives its inputs to the decoder that the environment variable `DECODER` names.
#![no_main]

use std::sync::OnceLock;

use swarm_fuzz::{DECODERS, Decoder};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    static CHOSEN: OnceLock<&Decoder> = OnceLock::new();
    let chosen = CHOSEN.get_or_init(|| {
        let name = std::env::var("DECODER").unwrap_or_default();
        let names: Vec<&str> = DECODERS.iter().map(|d| d.name).collect();
        DECODERS.iter().find(|d| d.name == name).unwrap_or_else(|| panic!("DECODER must be one of {names:?}"))
    });
    (chosen.check)(bytes);
});
