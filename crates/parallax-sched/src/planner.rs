//! Choosing a plan: checks the inputs, picks the algorithm, prices the result.

mod cover;
mod exact;

use crate::config::EXACT_MAX_NODES;
use crate::{Algorithm, ModelProfile, NodeProfile, Plan, PlanError, PlanOptions, RttMatrix};

/// Layers up to which [`Algorithm::Auto`] searches exactly; the tables grow with their square.
const AUTO_EXACT_MAX_LAYERS: u32 = 256;

/// Assigns contiguous layer ranges to nodes so that every pipeline covers every layer once, within memory and pins, at
/// the highest throughput found; among equal plans, the lower latency.
///
/// # Errors
/// When inputs are not usable, the nodes cannot hold the model, or pins leave a gap; the error says what is missing.
pub fn plan(
    model: &ModelProfile,
    nodes: &[NodeProfile],
    rtt: &RttMatrix,
    options: &PlanOptions,
) -> Result<Plan, PlanError> {
    model.validate()?;
    if nodes.is_empty() {
        return Err(PlanError::NoNodes);
    }
    for (i, node) in nodes.iter().enumerate() {
        node.validate(model)?;
        if nodes[..i].iter().any(|other| other.id == node.id) {
            return Err(PlanError::DuplicateNode { node: node.id.clone() });
        }
    }
    if options.max_pipelines == 0 {
        return Err(PlanError::BadConfig { what: "max_pipelines must be at least 1" });
    }
    let exact = match options.algorithm {
        Algorithm::Exact if nodes.len() > EXACT_MAX_NODES => {
            return Err(PlanError::TooManyNodes { n_nodes: nodes.len(), limit: EXACT_MAX_NODES });
        }
        Algorithm::Exact => true,
        Algorithm::Auto => nodes.len() <= EXACT_MAX_NODES && model.n_layers <= AUTO_EXACT_MAX_LAYERS,
        Algorithm::Cover => false,
    };
    let search = Search { model, nodes, rtt, options };
    let pipelines = if exact { exact::search(&search) } else { cover::search(&search) };
    if pipelines.is_empty() {
        return Err(search.why_not());
    }
    let plan = Plan::from_pipelines(model, pipelines, nodes);
    debug_assert_eq!(
        plan.defect(model, nodes, options.context_tokens),
        None,
        "the planner keeps its own rules"
    );
    Ok(plan)
}

/// What every algorithm looks at.
struct Search<'a> {
    model: &'a ModelProfile,
    nodes: &'a [NodeProfile],
    rtt: &'a RttMatrix,
    options: &'a PlanOptions,
}

impl Search<'_> {
    fn capacity(&self, node: &NodeProfile, first: bool, last: bool) -> u32 {
        self.model.capacity(node.memory_bytes, self.options.context_tokens, first, last)
    }

    fn must_be_first(&self, node: &NodeProfile) -> bool {
        self.options.first_stage.as_ref() == Some(&node.id)
    }

    /// Explains that no pipeline exists.
    fn why_not(&self) -> PlanError {
        let n_layers = self.model.n_layers;
        let room: u64 = self.nodes.iter().map(|n| u64::from(self.capacity(n, false, false))).sum();
        let pins = self.nodes.iter().any(|n| n.pinned.is_some());
        if room >= u64::from(n_layers) && pins {
            let reason = self.first_gap();
            return PlanError::PinsLeaveGap { reason };
        }
        let endpoint_layers = u32::from(room >= u64::from(n_layers));
        let missing_layers =
            n_layers.saturating_sub(u32::try_from(room).unwrap_or(n_layers)).max(endpoint_layers);
        let per_layer = self.model.layer_bytes_with_cache(self.options.context_tokens);
        let mut missing_bytes = per_layer.saturating_mul(u64::from(missing_layers));
        if endpoint_layers > 0 {
            // The layers fit, but not together with embedding and head.
            missing_bytes = missing_bytes.max(self.model.embedding_bytes).max(self.model.head_bytes);
        }
        PlanError::NotEnoughMemory { missing_layers, n_layers, missing_bytes }
    }

    fn first_gap(&self) -> String {
        let mut pins: Vec<_> = self.nodes.iter().filter_map(|n| Some((n.pinned?, &n.id))).collect();
        pins.sort();
        let free = self.nodes.iter().filter(|n| n.pinned.is_none()).count();
        let mut next = 0;
        for (layers, id) in &pins {
            if layers.start() < next {
                return format!("layers {layers} of {id} overlap another pinned range");
            }
            if layers.start() > next && free == 0 {
                return format!("nobody holds layers {next}..{}", layers.start());
            }
            next = layers.end();
        }
        if next < self.model.n_layers && free == 0 {
            return format!("nobody holds layers {next}..{}", self.model.n_layers);
        }
        "a pinned range does not fit its node's memory, or the remaining nodes cannot fill the gaps"
            .to_owned()
    }
}

#[cfg(test)]
mod tests;
