//! `parallax plan`: what would a cluster run?

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use parallax_engine::service::weights::model_profile;
use parallax_model::{KvFormat, ModelConfig, WeightDtype, catalogue};
use parallax_sched::profile::roofline;
use parallax_sched::{Algorithm, ModelProfile, NodeId, NodeProfile, PlanOptions, RttMatrix, plan};
use serde::{Deserialize, Serialize};
use swarm_wire::LayerRange;

use super::model::DTYPES;
use crate::program;

/// Pipelines that are printed for people; the report has all.
const SHOWN_PIPELINES: usize = 16;

/// Assign a model's layers to the nodes of a cluster file, without starting anything.
///
/// The cluster file is {"nodes":[{"id":..,"memory_gb":..,"tflops":..,"bandwidth_gbps":..}],"rtt_ms":[[..]]}; a node may
/// also have `"layers":[a,b]` (pinned), "decode_ms_per_layer" and "head_ms" (measured, instead of the roofline). Decimal
/// gigabytes. tflops may be 0 or absent: decoding one token at a time is bound by bandwidth.
///
/// Report (--json): assignments (id, layers [a,b)), throughput_tokens_per_s (all pipelines kept full, one token per
/// visit), upper_bound_tokens_per_s (no plan can exceed it), plan_ms, algorithm, pipelines (stages, bottleneck_ms,
/// latency_ms), standby.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// The cluster file
    #[arg(long, value_name = "FILE")]
    cluster: PathBuf,
    /// A model as elsewhere, a name out of `parallax models`, or a .json file with a model profile
    /// ({"name","n_layers","layer_bytes","embedding_bytes","head_bytes","tied","kv_bytes_per_token_layer"})
    #[arg(long, value_name = "MODEL|PROFILE")]
    model: String,
    /// exact: the best plan whose pipelines share no node, up to 8 nodes; cover: a heuristic for any number; auto chooses
    #[arg(long, default_value = "auto", value_name = "exact|cover|auto")]
    algorithm: String,
    /// Weights in memory; native is what the file has, and bf16 for a name out of `parallax models`
    #[arg(long, default_value = "native", value_name = DTYPES)]
    dtype: WeightDtype,
    /// Keys and values in memory
    #[arg(long, default_value = "f32", value_name = "f32|bf16|q8")]
    kv: KvFormat,
    /// Cached positions that every stage must have room for
    #[arg(long, default_value_t = 2048)]
    context_tokens: u64,
    /// At most this many pipelines [default: as many as pay]
    #[arg(long)]
    max_pipelines: Option<usize>,
    /// Print the report on stdout
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Deserialize)]
struct Cluster {
    nodes: Vec<ClusterNode>,
    #[serde(default)]
    rtt_ms: Vec<Vec<Option<f64>>>,
}

#[derive(Debug, Deserialize)]
struct ClusterNode {
    id: String,
    memory_gb: f64,
    #[serde(default)]
    tflops: f64,
    #[serde(default)]
    bandwidth_gbps: f64,
    decode_ms_per_layer: Option<f64>,
    head_ms: Option<f64>,
    layers: Option<[u32; 2]>,
}

#[derive(Debug, Serialize)]
struct Assignment {
    id: String,
    layers: [u32; 2],
}

#[derive(Debug, Serialize)]
struct Report {
    assignments: Vec<Assignment>,
    throughput_tokens_per_s: f64,
    upper_bound_tokens_per_s: f64,
    plan_ms: f64,
    algorithm: String,
    model: String,
    pipelines: Vec<parallax_sched::Pipeline>,
    standby: Vec<NodeId>,
}

/// Runs the command.
///
/// # Errors
/// Files that cannot be read, an unknown algorithm, or a cluster that cannot hold the model.
pub fn run(args: PlanArgs) -> anyhow::Result<()> {
    if args.algorithm == "paper" {
        bail!(
            "the dynamic program of the Parallax paper is not here: use --algorithm exact (up to 8 nodes) or cover (any number)"
        );
    }
    let algorithm: Algorithm = args.algorithm.parse()?;
    let model = profile(&args.model, args.dtype, args.kv, args.context_tokens)?;
    let text = std::fs::read_to_string(&args.cluster).with_context(|| args.cluster.display().to_string())?;
    let cluster: Cluster = serde_json::from_str(&text).with_context(|| args.cluster.display().to_string())?;
    let nodes = cluster.nodes.iter().map(|n| node(n, &model)).collect::<anyhow::Result<Vec<_>>>()?;
    let rtt = rtt(&cluster, &nodes)?;
    let options = PlanOptions {
        algorithm,
        max_pipelines: args.max_pipelines.unwrap_or(usize::MAX),
        context_tokens: args.context_tokens,
        ..PlanOptions::default()
    };
    let started = Instant::now();
    let plan = plan(&model, &nodes, &rtt, &options)?;
    let plan_ms = started.elapsed().as_secs_f64() * 1e3;
    for (i, pipeline) in plan.pipelines.iter().enumerate().take(SHOWN_PIPELINES) {
        let stages: Vec<String> =
            pipeline.stages.iter().map(|s| format!("{} {}", s.node, s.layers)).collect();
        let line = format!("pipeline {i}: {} ({:.2} ms a token)", stages.join(" -> "), pipeline.latency_ms);
        program::tell(&line, args.json)?;
    }
    let line = format!(
        "{:.1} tokens/s of at most {:.1}; {} nodes stand by; planned in {plan_ms:.1} ms",
        plan.throughput_tokens_per_s,
        plan.upper_bound_tokens_per_s,
        plan.standby.len()
    );
    program::tell(&line, args.json)?;
    if !args.json {
        return Ok(());
    }
    let stages = plan.pipelines.iter().flat_map(|p| &p.stages);
    let assignments = stages
        .map(|s| Assignment { id: s.node.to_string(), layers: [s.layers.start(), s.layers.end()] })
        .collect();
    program::report(&Report {
        assignments,
        throughput_tokens_per_s: plan.throughput_tokens_per_s,
        upper_bound_tokens_per_s: plan.upper_bound_tokens_per_s,
        plan_ms,
        algorithm: args.algorithm,
        model: model.name,
        pipelines: plan.pipelines,
        standby: plan.standby,
    })
}

fn profile(
    model: &str,
    dtype: WeightDtype,
    kv: KvFormat,
    context_tokens: u64,
) -> anyhow::Result<ModelProfile> {
    let path = Path::new(model);
    if path.extension().is_some_and(|e| e == "json") && path.is_file() {
        let text = std::fs::read_to_string(path).with_context(|| model.to_owned())?;
        return serde_json::from_str(&text).with_context(|| format!("{model} is not a model profile"));
    }
    if let Some(known) = catalogue::find(model) {
        return known_profile(known.name, &known.config(), dtype, kv, context_tokens);
    }
    let checkpoint = super::hub::open(model)?;
    Ok(model_profile(model, &checkpoint, dtype, kv, context_tokens))
}

fn known_profile(
    name: &str,
    config: &ModelConfig,
    dtype: WeightDtype,
    kv: KvFormat,
    context_tokens: u64,
) -> anyhow::Result<ModelProfile> {
    let table = config.table_bytes(dtype);
    Ok(ModelProfile {
        name: name.to_owned(),
        n_layers: u32::try_from(config.n_layers)?,
        layer_bytes: config.layer_bytes(dtype),
        embedding_bytes: table,
        head_bytes: table,
        tied: config.tied_embeddings,
        kv_bytes_per_token_layer: config.cache_bytes_per_token_layer(context_tokens, kv),
        layer_flops: 2.0 * config.layer_parameters() as f64,
        hidden: u32::try_from(config.hidden)?,
    })
}

fn node(node: &ClusterNode, model: &ModelProfile) -> anyhow::Result<NodeProfile> {
    let id = &node.id;
    ensure!(
        node.memory_gb.is_finite() && node.memory_gb >= 0.0,
        "node {id}: memory_gb must be a number from 0 up"
    );
    ensure!(
        node.decode_ms_per_layer.is_some() || node.bandwidth_gbps > 0.0,
        "node {id} needs bandwidth_gbps above 0, or a measured decode_ms_per_layer"
    );
    let (layer_ms, head_ms) = roofline(model, node.bandwidth_gbps, node.tflops);
    Ok(NodeProfile {
        decode_ms_per_layer: node.decode_ms_per_layer.unwrap_or(layer_ms),
        head_ms: node.head_ms.unwrap_or_else(|| if head_ms.is_finite() { head_ms } else { 0.0 }),
        pinned: node.layers.map(|[start, end]| LayerRange::new(start, end)).transpose()?,
        ..NodeProfile::new(id, (node.memory_gb * 1e9) as u64, layer_ms)
    })
}

fn rtt(cluster: &Cluster, nodes: &[NodeProfile]) -> anyhow::Result<RttMatrix> {
    let n = nodes.len();
    let fits = cluster.rtt_ms.is_empty()
        || (cluster.rtt_ms.len() == n && cluster.rtt_ms.iter().all(|r| r.len() == n));
    ensure!(fits, "rtt_ms must have {n} rows of {n} numbers (null where unknown), or be left out");
    let mut rtt = RttMatrix::default();
    for (a, row) in cluster.rtt_ms.iter().enumerate() {
        for (b, ms) in row.iter().enumerate().filter(|(b, _)| *b != a) {
            if let Some(ms) = ms {
                ensure!(ms.is_finite() && *ms >= 0.0, "rtt_ms[{a}][{b}] must be a number from 0 up");
                rtt.set(&nodes[a].id, &nodes[b].id, *ms);
            }
        }
    }
    Ok(rtt)
}
