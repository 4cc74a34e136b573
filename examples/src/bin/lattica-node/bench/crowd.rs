//! One block, one holder, many peers: how long a node that knows only whom it is connected to takes to get it.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use lattica_bitswap::{Blocks, HashKind, MemoryStore, publish};
use lattica_net::{Identity, Node, NodeConfig};

/// How often another one of the crowd is the holder.
const ROUNDS: usize = 9;

/// Milliseconds of each round, with `n_peers` nodes of this process connected to the one that asks.
pub(super) async fn rounds(n_peers: usize) -> anyhow::Result<Vec<f64>> {
    let config = || NodeConfig {
        listen: vec!["/ip4/127.0.0.1/udp/0/quic-v1".to_owned()],
        network: "crowd".to_owned(),
        io_threads: 1,
        // They are to know the one that asks and nobody else.
        dht_server: false,
        ..NodeConfig::default()
    };
    let asking = Node::start(Identity::generate(), config()).await?;
    let fetcher = Blocks::start(asking.clone(), Arc::new(MemoryStore::new()));
    let address = asking.listen_addrs().await.remove(0);
    let mut crowd = Vec::with_capacity(n_peers);
    for _ in 0..n_peers {
        let node = Node::start(Identity::generate(), config()).await?;
        let blocks = Blocks::start(node.clone(), Arc::new(MemoryStore::new()));
        node.dial(&address).await?;
        crowd.push((node, blocks));
    }
    let mut took_ms = Vec::with_capacity(ROUNDS);
    // The first round opens the streams, which stay.
    for round in 0..=ROUNDS {
        let holder = crowd[round * n_peers / (ROUNDS + 1)].1.store();
        // Into its store and no further: nobody is told that it is there. A manifest is one block.
        let bytes = Bytes::from(vec![round as u8; 1000]);
        let root = publish::publish_bytes(&**holder, "one", "file", HashKind::Blake3, 1 << 20, &bytes)?;
        let begin = Instant::now();
        fetcher.fetch_manifest(&root, &[]).await?;
        if round > 0 {
            took_ms.push(begin.elapsed().as_secs_f64() * 1e3);
        }
    }
    for (node, _) in &crowd {
        node.shutdown().await;
    }
    asking.shutdown().await;
    Ok(took_ms)
}
