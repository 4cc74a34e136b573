//! Developer commands, cheapest first. `cargo xtask help` lists them; `cargo xtask ci` runs what the gate runs.

mod codegen;

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
    /// Write crates/swarm-wire/src/generated from proto/ (with --check: only compare).
    Codegen {
        /// Fail when the committed code differs from what proto/ gives; write nothing.
        #[arg(long)]
        check: bool,
    },
}

/// The workspace root, found from this package's own manifest.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the root").to_path_buf()
}

fn main() -> anyhow::Result<()> {
    match Args::parse().command {
        Command::Codegen { check } => codegen::run(&root(), check),
    }
}
