//! `parallax status`: who takes part in a swarm, with which layers, and what it waits for.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use clap::Args;
use serde_json::Value;

use crate::program;

/// Ask the head of a swarm who takes part, with which layers, and why it does or does not serve.
///
/// Report (--json): nodes (peer, head, layers [a,b) or null, state, detail, rtt_ms, decode_ms_per_layer, measured,
/// memory_bytes, kv_free_tokens, device, sent_bytes, sent_payload_bytes, sent_tokens), pipelines (stages, ready,
/// bottleneck_ms, latency_ms), ready, why, swarm, model, epoch.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Where the head serves, as `parallax serve` prints it
    #[arg(long, value_name = "URL")]
    url: String,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// When nobody answers at the address, or somebody who is not the head of a swarm.
pub fn run(args: StatusArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status = runtime.block_on(fetch(&args.url))?;
    for node in status["nodes"].as_array().into_iter().flatten() {
        let layers = match &node["layers"] {
            Value::Array(range) => format!("layers {}..{}", range[0], range[1]),
            _ => "no layers".to_owned(),
        };
        let line = format!(
            "{} {layers:14} {} {:.2} ms rtt, {:.3} ms a layer {}",
            node["peer"].as_str().unwrap_or_default(),
            node["state"].as_str().unwrap_or_default(),
            node["rtt_ms"].as_f64().unwrap_or_default(),
            node["decode_ms_per_layer"].as_f64().unwrap_or_default(),
            node["detail"].as_str().unwrap_or_default(),
        );
        program::tell(&line, args.json)?;
    }
    program::tell(status["why"].as_str().unwrap_or_default(), args.json)?;
    if args.json { program::report(&status) } else { Ok(()) }
}

async fn fetch(url: &str) -> anyhow::Result<Value> {
    let address = format!("{}/swarm/status", url.trim_end_matches('/'));
    let client = reqwest::Client::builder().timeout(Duration::from_secs(10)).build()?;
    let answer = client.get(&address).send().await.with_context(|| {
        format!("nobody answers at {url}: pass the address that `parallax serve` printed")
    })?;
    let status = answer.status();
    let text = answer.text().await?;
    ensure!(
        status.is_success(),
        "{address} answered {status}: is that the head of a swarm (`parallax serve`)?"
    );
    serde_json::from_str(&text).with_context(|| format!("{address} answered with something that is not JSON"))
}
