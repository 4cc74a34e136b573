//! `lattica-node publish` and `lattica-node fetch`: files by their content's name, between our nodes and with IPFS.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use clap::Args;
use lattica_bitswap::unixfs::Limits;
use lattica_bitswap::{BlockStore, Blocks, ExchangeConfig, FsStore, FsStoreConfig, Manifest};
use lattica_net::Node;
use serde_json::{Value, json};
use swarm_examples::program;
use swarm_wire::{Cid, PeerId, cid};

use crate::node::NodeArgs;

/// Files that are shared as one artefact.
const FILES_MAX: usize = 65_536;

/// Where blocks are, on disk and in the network.
#[derive(Debug, Args)]
struct Place {
    /// Where blocks and their index are kept; a fetch that broke off goes on from there. Without it: a temporary directory.
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// GB (10^9 bytes) that the blocks in --store may take; what is more is refused. Files that are served from where they lie do
    /// not count. `lattica-node store DIR gc` makes room.
    #[arg(long, value_name = "GB", requires = "store")]
    quota_gb: Option<f64>,
    #[command(flatten)]
    node: NodeArgs,
}

/// What is shared, and how.
#[derive(Debug, Args)]
pub(crate) struct PublishArgs {
    /// Files, or one directory with everything in it. They are served from where they lie and must stay as they are.
    #[arg(required = true)]
    paths: Vec<PathBuf>,
    /// Give it a second name under which stock IPFS peers (Kubo, Helia) read it: a file, or a directory of several. The same
    /// blocks serve both.
    #[arg(long)]
    ipfs: bool,
    /// Length of the blocks in KiB, 1 to 2048. With 256, `ipfs add --cid-version=1 --raw-leaves` gives the same name.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=2048))]
    leaf_kib: u32,
    #[command(flatten)]
    place: Place,
    /// Print one line when everything is served: peer, addresses, root (our name), ipfs (the second one, or null), bytes,
    /// blocks (leaves).
    #[arg(long)]
    json: bool,
}

/// What is fetched, and from whom.
#[derive(Debug, Args)]
pub(crate) struct FetchArgs {
    /// Its name. A raw BLAKE3 name is an artefact of ours, every other one a file or directory of IPFS.
    cid: Cid,
    /// Where to write it: a file, or a directory that is not there yet.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Address of a peer that has it, with its /p2p/ part; may be given several times. Without: the DHT is asked.
    #[arg(long, value_name = "ADDR")]
    from: Vec<String>,
    /// Keep it in --store when `lattica-node store DIR gc` cleans up.
    #[arg(long, requires = "store")]
    pin: bool,
    /// Refuse what is larger, in GB (10^9 bytes).
    #[arg(long, default_value_t = 1000.0)]
    max_gb: f64,
    #[command(flatten)]
    place: Place,
    /// Print, as the last line: cid, kind (artefact, file or directory), files, bytes, ms (from asking to written).
    #[arg(long)]
    json: bool,
}

impl Place {
    /// The store, and the temporary directory that it may lie in.
    fn open(&self) -> anyhow::Result<(Arc<dyn BlockStore>, Option<tempfile::TempDir>)> {
        let (dir, temporary) = match &self.store {
            Some(dir) => (dir.clone(), None),
            None => {
                let temporary = tempfile::tempdir().context("making a temporary directory for blocks")?;
                (temporary.path().to_owned(), Some(temporary))
            }
        };
        ensure!(self.quota_gb.is_none_or(|gb| gb > 0.0), "--quota-gb must be above 0");
        let quota_bytes = self.quota_gb.map(|gb| (gb * 1e9) as u64);
        let config = FsStoreConfig { quota_bytes, ..FsStoreConfig::default() };
        Ok((Arc::new(FsStore::open_with(dir, config)?), temporary))
    }
}

/// Serves the files until it is stopped.
pub(crate) async fn publish(args: PublishArgs) -> anyhow::Result<()> {
    let (dir, files) = listed(&args.paths)?;
    let (store, _temporary) = args.place.open()?;
    let node = args.place.node.start().await?;
    let mut events = node.events();
    let config = ExchangeConfig { leaf_bytes: args.leaf_kib as usize * 1024, ..ExchangeConfig::default() };
    let blocks = Blocks::start_with(node.clone(), Arc::clone(&store), config);
    let root = blocks.publish_files(&dir, &files).await?;
    let ipfs = match args.ipfs {
        true => Some(blocks.publish_unixfs(&root).await?),
        false => None,
    };
    let manifest = Manifest::decode(store.get(&root)?.context("it was just stored")?.bytes())?;
    let addresses = node.listen_addrs().await;
    let report = json!({
        "peer": node.peer_id(),
        "addresses": addresses,
        "root": root.to_string(),
        "ipfs": ipfs.map(|cid| cid.to_string()),
        "bytes": manifest.total_bytes(),
        "blocks": manifest.blocks().len(),
    });
    tell(&report, args.json)?;
    crate::serve(&node, &mut events).await;
    Ok(())
}

/// Gets it and writes it.
pub(crate) async fn fetch(args: FetchArgs) -> anyhow::Result<()> {
    ensure!(args.max_gb > 0.0, "--max-gb must be above 0");
    let max_bytes = (args.max_gb * 1e9) as u64;
    let (store, _temporary) = args.place.open()?;
    let node = args.place.node.start().await?;
    let blocks = Blocks::start(node.clone(), Arc::clone(&store));
    let from = dial(&node, &args.from).await?;
    let start = Instant::now();
    let (kind, files, bytes) = if names_an_artefact(&args.cid) {
        let manifest = blocks.fetch_manifest(&args.cid, &from).await?;
        let bytes = manifest.total_bytes();
        ensure!(bytes <= max_bytes, "{} has {bytes} bytes; allow more with --max-gb", args.cid);
        blocks.fetch(&args.cid, &from, |_| ()).await?;
        write_artefact(&blocks, &args.cid, &manifest, &args.out).await?;
        ("artefact", manifest.entries().len(), bytes)
    } else {
        let limits = Limits { bytes: max_bytes, ..Limits::default() };
        let tree = blocks.fetch_unixfs(&args.cid, &from, limits, |_| ()).await?;
        blocks.write_unixfs_to(&args.cid, &tree, &args.out).await?;
        (if tree.directories.is_some() { "directory" } else { "file" }, tree.files.len(), tree.bytes())
    };
    if args.pin {
        store.pin(&args.cid)?;
    }
    let ms = (start.elapsed().as_secs_f64() * 1e4).round() / 10.0;
    let report = json!({"cid": args.cid.to_string(), "kind": kind, "files": files, "bytes": bytes, "ms": ms});
    tell(&report, args.json)?;
    node.shutdown().await;
    Ok(())
}

/// Whether a name is one of our manifests'; IPFS names files by SHA2-256 unless it is told otherwise.
fn names_an_artefact(root: &Cid) -> bool {
    root.codec() == cid::CODEC_RAW && root.hash().code() == cid::HASH_BLAKE3
}

async fn dial(node: &Node, addresses: &[String]) -> anyhow::Result<Vec<PeerId>> {
    let mut peers = Vec::new();
    for address in addresses {
        peers.push(node.dial(address).await?);
    }
    Ok(peers)
}

/// One entry is a file, several are a directory.
async fn write_artefact(blocks: &Blocks, root: &Cid, manifest: &Manifest, out: &Path) -> anyhow::Result<()> {
    if manifest.entries().len() <= 1 {
        return Ok(blocks.write_to(root, out).await?);
    }
    ensure!(!out.exists(), "{} exists; name another directory", out.display());
    for entry in manifest.entries() {
        let plain =
            Path::new(&entry.name).components().all(|part| matches!(part, std::path::Component::Normal(_)));
        ensure!(plain, "entry {} is no path within {}", entry.name, out.display());
        blocks.write_entry_to(root, &entry.name, &out.join(&entry.name)).await?;
    }
    Ok(())
}

/// The directory that names are relative to, and the files in it, in order.
fn listed(paths: &[PathBuf]) -> anyhow::Result<(PathBuf, Vec<PathBuf>)> {
    if let [dir] = paths
        && dir.is_dir()
    {
        let mut files = Vec::new();
        collect(dir, &mut files)?;
        files.sort();
        ensure!(!files.is_empty(), "{} holds no file", dir.display());
        return Ok((dir.clone(), files));
    }
    if let Some(dir) = paths.iter().find(|path| path.is_dir()) {
        anyhow::bail!("{} is a directory; share it alone, or name the files in it", dir.display());
    }
    let files = paths
        .iter()
        .map(|path| std::path::absolute(path).with_context(|| format!("looking at {}", path.display())))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let dir = files[0].parent().unwrap_or_else(|| Path::new("/")).to_owned();
    Ok((dir, files))
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let reading = || format!("reading {}", dir.display());
    for entry in std::fs::read_dir(dir).with_context(reading)? {
        let entry = entry.with_context(reading)?;
        let kind = entry.file_type().with_context(reading)?;
        if kind.is_dir() {
            collect(&entry.path(), files)?;
        } else if kind.is_file() {
            files.push(std::path::absolute(entry.path()).with_context(reading)?);
            ensure!(files.len() <= FILES_MAX, "more than {FILES_MAX} files; share subdirectories one by one");
        }
    }
    Ok(())
}

fn tell(report: &Value, json: bool) -> anyhow::Result<()> {
    if json {
        return program::report(report);
    }
    for (name, value) in report.as_object().into_iter().flatten() {
        program::list(&format!("{name:>9}  {value}"))?;
    }
    Ok(())
}
