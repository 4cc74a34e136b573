//! Our side of `cargo xtask interop`: a node that does what it is told, one JSON object a line on standard input, and answers
//! each with one on standard output. The peers' programs (tests/interop) take the same commands. The first line is the
//! settings: `dht_protocol`, `identify_version`, `via` (addresses of relays), each of which may be missing.

use std::collections::HashMap;
use std::error::Error;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use lattica_bitswap::unixfs::Limits;
use lattica_bitswap::{Blocks, ExchangeConfig, MemoryStore};
use lattica_net::gossip::Verdict;
use lattica_net::{GossipError, Identity, Node, NodeConfig, Subscription};
use serde_json::{Value, json};
use swarm_wire::{Cid, PeerId};
use tokio::io::{AsyncBufReadExt as _, BufReader};

/// How long one command may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Leaves as Kubo cuts files, so that both give a file one name.
const LEAF_BYTES: usize = 256 * 1024;

type Answer = Result<Value, Box<dyn Error>>;

struct Ours {
    node: Node,
    blocks: Blocks,
    topics: HashMap<String, Subscription>,
    #[cfg(feature = "v1-compat")]
    v1: lattica_net::V1,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let settings: Value = serde_json::from_str(&lines.next_line().await?.ok_or("no settings")?)?;
    let mut ours = start(&settings).await?;
    say(&json!({"peer": ours.node.peer_id(), "addresses": ours.node.listen_addrs().await}))?;
    while let Some(line) = lines.next_line().await? {
        let answered = tokio::time::timeout(PATIENCE, ours.answer(&line)).await;
        let answer = match answered {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => json!({"error": error.to_string()}),
            Err(_) => json!({"error": format!("nothing within {PATIENCE:?}")}),
        };
        say(&answer)?;
    }
    ours.node.shutdown().await;
    Ok(())
}

async fn start(settings: &Value) -> Result<Ours, Box<dyn Error>> {
    let text = |name: &str| settings[name].as_str().map(str::to_owned);
    let via: Vec<String> = serde_json::from_value(settings["via"].clone()).unwrap_or_default();
    let config = NodeConfig {
        listen: vec!["/ip4/127.0.0.1/tcp/0".to_owned(), "/ip4/127.0.0.1/udp/0/quic-v1".to_owned()],
        network: "interop".to_owned(),
        dht_protocol: text("dht_protocol"),
        identify_version: text("identify_version").unwrap_or_else(|| NodeConfig::default().identify_version),
        relay_server: via.is_empty(),
        relays: via,
        gossip: true,
        ..NodeConfig::default()
    };
    let node = Node::start(Identity::generate(), config).await?;
    let exchange = ExchangeConfig { leaf_bytes: LEAF_BYTES, ..ExchangeConfig::default() };
    Ok(Ours {
        blocks: Blocks::start_with(node.clone(), Arc::new(MemoryStore::new()), exchange),
        topics: HashMap::new(),
        #[cfg(feature = "v1-compat")]
        v1: {
            let v1 = lattica_net::V1::start(node.clone())?;
            v1.handle("Interop.echo", |_, request| async move { Ok(request) });
            v1.handle("Interop.fail", |_, _| async move { Err("as asked".to_owned()) });
            v1
        },
        node,
    })
}

/// What a command needs is not there yet: who asked asks again.
fn not_yet() -> Value {
    json!({"wait": true})
}

fn say(answer: &Value) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{answer}")?;
    out.flush()
}

impl Ours {
    async fn answer(&mut self, line: &str) -> Answer {
        let command: Value = serde_json::from_str(line)?;
        let text = |name: &'static str| command[name].as_str().ok_or_else(|| format!("{name} is missing"));
        let peer = || Ok::<PeerId, Box<dyn Error>>(text("peer")?.parse()?);
        let node = &self.node;
        Ok(match text("op")? {
            "dial" => json!({"peer": node.dial(text("addr")?).await?}),
            "ping" => {
                let peer = peer()?;
                // Measured by pings when the peer has no link protocol of ours.
                match node.link(&peer) {
                    Some(link) if node.is_connected(&peer) => json!({"ms": link.rtt_ms}),
                    _ => not_yet(),
                }
            }
            "identify" => {
                let peer = peer()?;
                // A dialler's port is no listener's: what it listens on, it says in its identify message alone.
                let (known, paths) = (node.addresses(&peer), node.paths(&peer));
                let said = known.iter().any(|address| paths.iter().all(|path| path.address != *address));
                if said { json!({"addresses": known}) } else { not_yet() }
            }
            "connected" => {
                let peer = peer()?;
                json!({"connected": node.is_connected(&peer), "paths": node.paths(&peer).iter().map(|p| &p.address).collect::<Vec<_>>()})
            }
            "add" => {
                let path = Path::new(text("path")?);
                let root = if path.is_dir() {
                    let mut files = Vec::new();
                    collect(path, &mut files)?;
                    self.blocks.publish_files(path, &files).await?
                } else {
                    self.blocks.publish_file(path).await?
                };
                json!({"cid": self.blocks.publish_unixfs(&root).await?.to_string()})
            }
            "get" => {
                let (cid, start): (Cid, _) = (text("cid")?.parse()?, Instant::now());
                let tree = self.blocks.fetch_unixfs(&cid, &[peer()?], Limits::default(), |_| ()).await?;
                let ms = start.elapsed().as_secs_f64() * 1e3;
                self.blocks.write_unixfs_to(&cid, &tree, Path::new(text("path")?)).await?;
                json!({"bytes": tree.bytes(), "ms": ms})
            }
            "provide" => {
                node.provide(&dht_key(text("key")?)).await?;
                json!({})
            }
            "providers" => {
                let peers = node.providers(&dht_key(text("key")?)).await?;
                if peers.is_empty() { not_yet() } else { json!({"peers": peers}) }
            }
            "put" => {
                node.put_record(text("key")?.as_bytes(), text("value")?.into()).await?;
                json!({})
            }
            "find" => match node.get_record(text("key")?.as_bytes()).await? {
                Some(value) => json!({"value": String::from_utf8_lossy(&value)}),
                None => not_yet(),
            },
            "subscribe" => {
                let topic = text("topic")?;
                let subscription = node.subscribe(topic, |_, _| Verdict::Accept).await?;
                self.topics.insert(topic.to_owned(), subscription);
                json!({})
            }
            "publish" => match node.publish(text("topic")?, text("data")?.into()).await {
                Ok(()) => json!({}),
                // The other side's subscription may still be on its way.
                Err(GossipError::NoListeners) => not_yet(),
                Err(error) => return Err(error.into()),
            },
            "received" => {
                let subscription = self.topics.get_mut(text("topic")?).ok_or("not subscribed")?;
                let announcement = subscription.recv().await.ok_or("the node has stopped")?;
                json!({"data": String::from_utf8_lossy(&announcement.data), "from": announcement.author})
            }
            "relayed" => {
                let listening = node.listen_addrs().await;
                let relayed: Vec<_> = listening.into_iter().filter(|a| a.contains("/p2p-circuit")).collect();
                if relayed.is_empty() { not_yet() } else { json!({"addresses": relayed}) }
            }
            "disconnect" => {
                node.disconnect(&peer()?).await;
                json!({})
            }
            #[cfg(feature = "v1-compat")]
            "call_v1" => {
                let data = bytes::Bytes::copy_from_slice(text("data")?.as_bytes());
                let reply = self.v1.call(&peer()?, text("method")?, data, PATIENCE).await?;
                json!({"data": String::from_utf8_lossy(&reply)})
            }
            other => json!({"skip": format!("we have no {other}")}),
        })
    }
}

/// A content id stands for its multihash, as everywhere in IPFS; anything else for itself.
fn dht_key(key: &str) -> Vec<u8> {
    key.parse::<Cid>().map_or_else(|_| key.as_bytes().to_vec(), |cid| cid.hash().to_bytes())
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> std::io::Result<()> {
    let mut entries = std::fs::read_dir(dir)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}
