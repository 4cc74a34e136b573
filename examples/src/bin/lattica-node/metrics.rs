//! `lattica-node --metrics`: what the node does, for Prometheus.

use std::fmt::Write as _;
use std::net::SocketAddr;

use anyhow::Context as _;
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use lattica_net::Node;
use swarm_examples::{machine, program};

/// Answers `GET /metrics` at `address` as long as the program runs.
pub(crate) async fn serve(node: &Node, address: SocketAddr) -> anyhow::Result<()> {
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve metrics at {address}; choose another --metrics"))?;
    let address = listener.local_addr()?;
    let node = node.clone();
    let answer = move || {
        let text = text(&node);
        async move { ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text) }
    };
    let app = Router::new().route("/metrics", get(answer));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, app).await {
            tracing::warn!(%error, "metrics are not served any more");
        }
    });
    program::say(&format!("metrics at http://{address}/metrics"));
    Ok(())
}

fn text(node: &Node) -> String {
    let peers = node.peers();
    let connected = |relayed: bool| peers.iter().filter(|p| p.connected && p.relayed == relayed).count();
    let known = peers.len();
    let rtts: Vec<f64> = peers.iter().filter(|p| p.connected).filter_map(|p| p.rtt_ms).collect();
    let c = node.counters();
    let mut text = String::new();
    let mut family = |name: &str, kind: &str, help: &str, samples: &[(&str, f64)]| {
        let _ = writeln!(text, "# HELP lattica_{name} {help}\n# TYPE lattica_{name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(text, "lattica_{name}{labels} {value}");
        }
    };
    let paths =
        [(r#"{path="direct"}"#, connected(false) as f64), (r#"{path="relayed"}"#, connected(true) as f64)];
    family("peers_connected", "gauge", "Peers with a connection, by their best path.", &paths);
    family("peers_known", "gauge", "Peers that are connected or remembered.", &[("", known as f64)]);
    let sum = rtts.iter().sum::<f64>() / 1e3;
    let rtt = [("_sum", sum), ("_count", rtts.len() as f64)];
    family(
        "peer_round_trip_seconds",
        "summary",
        "Smoothed round trips to the peers that are connected now.",
        &rtt,
    );
    for (name, help, value) in [
        ("connections_opened_total", "Connections that came to stand.", c.connections_opened),
        ("connections_closed_total", "Connections that ended.", c.connections_closed),
        ("calls_admitted_total", "Calls of peers that were let in.", c.calls_admitted),
        ("relay_circuits_opened_total", "Connections that this relay has carried.", c.relay_circuits_opened),
        ("relay_refusals_total", "Slots and connections that this relay refused.", c.relay_refusals),
    ] {
        family(name, "counter", help, &[("", value as f64)]);
    }
    for (name, help, value) in [
        ("relay_slots", "Peers that this relay keeps a slot for.", c.relay_slots as f64),
        ("relay_circuits", "Connections that this relay carries.", c.relay_circuits as f64),
        ("resident_memory_bytes", "Memory of the process.", machine::resident_mb() * 1e6),
    ] {
        family(name, "gauge", help, &[("", value)]);
    }
    text
}
