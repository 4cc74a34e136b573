//! What one token costs besides time: heap allocations (counted here), and instructions, which `cargo xtask instructions`
//! counts by running one work of this program under callgrind. Neither depends on what else the machine does.
//!
//! `cargo bench -p swarm-benches --bench steady` prints a row for each work; with the name of a work it is done once,
//! on one thread, without counting.
#![expect(clippy::print_stdout, reason = "a bench prints its table")]

use std::alloc::System;
use std::hint::black_box;

use parallax_engine::local::Pipeline;
use parallax_engine::{Engine, EngineConfig, Request, StageRunner};
use parallax_kernels::pool;
use parallax_model::{Checkpoint, LoadOptions};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Tokens that a sequence has before it decodes, tokens that it then gets, and tokens of a measured prompt.
const CONTEXT: usize = 16;
const STEPS: usize = 16;
const PROMPT: usize = 64;

/// Name, sequences, and whether their prompts are measured or what they decode.
const WORKS: [(&str, usize, bool); 4] =
    [("prefill_64", 1, true), ("decode_1", 1, false), ("decode_8", 8, false), ("decode_32", 32, false)];

fn main() {
    if std::env::args().any(|argument| argument == "--list") {
        return WORKS.iter().for_each(|(name, ..)| println!("{name}"));
    }
    // `cargo bench` hands `--bench` to every program.
    let named = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    let checkpoint = Checkpoint::resolve("tiny").expect("the embedded model opens");
    let options = LoadOptions { kv_pages: 1024, ..LoadOptions::whole(&checkpoint) };
    let mut runner = Pipeline::load(&checkpoint, &options, 1, |_| {}).expect("the embedded model loads");
    match named {
        Some(name) => {
            let found = WORKS.iter().find(|(known, ..)| *known == name);
            let Some(&(_, sequences, prompts)) = found else {
                panic!("no work is called {name}; there are {:?}", WORKS.map(|(known, ..)| known));
            };
            pool::set_threads(1);
            let mut engine = prepared(&mut runner, sequences, prompts);
            black_box(measured(&mut engine, &mut runner, if prompts { 1 } else { STEPS }));
        }
        None => table(&mut runner),
    }
}

fn table(runner: &mut Pipeline) {
    println!("{:12} {:>8} {:>18} {:>12}", "work", "tokens", "allocations/token", "bytes/token");
    for (name, sequences, prompts) in WORKS {
        let mut engine = prepared(runner, sequences, prompts);
        let steps = if prompts { 1 } else { STEPS };
        let region = Region::new(HEAP);
        let steps_done = measured(&mut engine, runner, steps);
        let counted = region.change();
        let tokens = steps_done * if prompts { PROMPT } else { sequences };
        println!(
            "{name:12} {tokens:8} {:18.1} {:12.0}",
            counted.allocations as f64 / tokens as f64,
            counted.bytes_allocated as f64 / tokens as f64
        );
    }
}

/// An engine whose next step is the first to be measured; what it uses was used once before.
fn prepared(runner: &mut Pipeline, sequences: usize, prompts: bool) -> Engine {
    let config =
        EngineConfig { prefix_cache: false, running_sequences: sequences, ..EngineConfig::default() };
    let config = EngineConfig { step_tokens: config.step_tokens.max(sequences * CONTEXT), ..config };
    let mut engine =
        Engine::new(runner.shape(), runner.log_softmax(), config).expect("a valid configuration");
    let (tokens, most) = if prompts { (PROMPT, 1) } else { (CONTEXT, usize::MAX) };
    ask(&mut engine, sequences, tokens, most);
    while engine.metrics().generated_tokens < sequences as u64 {
        engine.step(runner);
    }
    if prompts {
        ask(&mut engine, sequences, tokens, most);
    }
    engine
}

/// Queues prompts of known ids: what they cost does not depend on them.
fn ask(engine: &mut Engine, sequences: usize, tokens: usize, most: usize) {
    let vocab = engine.limits().vocab;
    for salt in 0..sequences {
        let prompt = (0..tokens).map(|i| ((i * 7919 + salt * 104_729 + 11) % vocab) as u32).collect();
        engine.add(Request::greedy(prompt, most)).expect("the request fits");
    }
}

/// Does `steps` steps; callgrind counts what happens in here.
#[inline(never)]
fn measured(engine: &mut Engine, runner: &mut Pipeline, steps: usize) -> usize {
    (0..steps).take_while(|_| !black_box(engine.step(runner)).is_empty()).count()
}
