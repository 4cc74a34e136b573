//! `lattica-node store`: looks after a directory of blocks.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use lattica_bitswap::{BlockStore, FsStore, garbage};
use serde_json::{Value, json};
use swarm_examples::program;
use swarm_wire::Cid;

/// The directory, and what to do with it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  lattica-node store ~/blocks list\n  lattica-node store ~/blocks gc")]
pub(crate) struct StoreArgs {
    /// What `publish` and `fetch` call --store. No other process may have it open.
    dir: PathBuf,
    #[command(subcommand)]
    command: StoreCommand,
    /// Print one line for machines.
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// The pinned roots: how many blocks each names, and how many of them are missing.
    List,
    /// Reads every block and drops what is damaged or whose file has changed; what misses something then is fetched again with
    /// `lattica-node fetch`.
    Verify,
    /// Removes everything that no pinned root names. What was published is pinned.
    Gc,
    /// Keeps a root, and all that it names, from `gc`.
    Pin {
        /// As `publish` or `fetch` named it.
        root: Cid,
    },
    /// Gives a root up to `gc`.
    Unpin {
        /// As `list` names it.
        root: Cid,
    },
}

/// Runs the command.
pub(crate) fn run(args: &StoreArgs) -> anyhow::Result<()> {
    anyhow::ensure!(
        args.dir.is_dir(),
        "{} is no directory; `lattica-node publish --store` or `fetch --store` makes one",
        args.dir.display()
    );
    let store = FsStore::open(&args.dir)?;
    let report = match &args.command {
        StoreCommand::List => json!({"pins": pins(&store)?}),
        StoreCommand::Verify => verify(&store)?,
        StoreCommand::Gc => {
            let done = garbage::collect(&store)?;
            json!({"kept": done.kept, "removed": done.removed, "freed_bytes": done.freed_bytes})
        }
        StoreCommand::Pin { root } => {
            store.pin(root)?;
            json!({"pinned": root.to_string()})
        }
        StoreCommand::Unpin { root } => {
            anyhow::ensure!(store.unpin(root)?, "{root} is not pinned; `list` names what is");
            json!({"unpinned": root.to_string()})
        }
    };
    if args.json {
        return program::report(&report);
    }
    for (name, value) in report.as_object().into_iter().flatten() {
        match value {
            Value::Array(lines) if lines.is_empty() => program::list(&format!("{name}: none"))?,
            Value::Array(lines) => lines.iter().try_for_each(|line| program::list(&line.to_string()))?,
            value => program::list(&format!("{name}: {value}"))?,
        }
    }
    Ok(())
}

fn pins(store: &FsStore) -> anyhow::Result<Vec<Value>> {
    // In an order that stays.
    let roots: BTreeSet<Cid> = store.pins()?.into_iter().collect();
    roots
        .iter()
        .map(|root| {
            let named = garbage::reachable(store, root).with_context(|| format!("reading {root}"))?;
            let (mut bytes, mut missing) = (0, 0);
            for cid in &named {
                match store.length_of(cid)? {
                    Some(length) => bytes += length as u64,
                    None => missing += 1,
                }
            }
            Ok(json!({"root": root.to_string(), "blocks": named.len(), "missing": missing, "bytes": bytes}))
        })
        .collect()
}

fn verify(store: &FsStore) -> anyhow::Result<Value> {
    let style = ProgressStyle::with_template("{bar:40} {pos}/{len} blocks, {eta} to go")?;
    let bar = ProgressBar::new(0).with_style(style);
    let found = store.scrub(|done, all| {
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    let dropped: Vec<String> = found.dropped.iter().map(Cid::to_string).collect();
    let incomplete = pins(store)?.into_iter().filter(|pin| pin["missing"] != 0).collect::<Vec<_>>();
    Ok(json!({"intact": found.intact, "bytes": found.bytes, "dropped": dropped, "incomplete": incomplete}))
}
