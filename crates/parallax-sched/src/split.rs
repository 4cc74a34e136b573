//! The split of one chain's layers: given stages in order, how many layers each, so that the slowest is fastest.
//!
//! The smallest time T with sum_i min(c_i, floor((T - o_i) / t_i)) >= L is one of the values o_i + n * t_i, so a binary
//! search over those is exact. Among the splits with that T, the one with the least total time is taken.

/// One stage of a chain: fixed cost, cost per layer, and how many layers it has room for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageCost {
    /// Milliseconds of a visit, without layers.
    pub overhead_ms: f64,
    /// Milliseconds per layer.
    pub layer_ms: f64,
    /// Most layers.
    pub capacity: u32,
}

impl StageCost {
    fn layers_within(self, limit_ms: f64) -> u32 {
        if limit_ms < self.overhead_ms + self.layer_ms {
            return 0;
        }
        // The slack absorbs the rounding of o + n * t, so that a candidate time admits its own n.
        let layers = ((limit_ms - self.overhead_ms) / self.layer_ms + 1e-9).floor();
        if layers >= f64::from(self.capacity) { self.capacity } else { layers as u32 }
    }

    fn ms(self, layers: u32) -> f64 {
        self.overhead_ms + f64::from(layers) * self.layer_ms
    }
}

/// Layers per stage, each at least one, that minimise the slowest stage, then the total time; `None` when `n_layers`
/// do not fit or are fewer than the stages.
pub fn split(stages: &[StageCost], n_layers: u32) -> Option<Vec<u32>> {
    if stages.is_empty() || (n_layers as usize) < stages.len() || stages.iter().any(|s| s.capacity == 0) {
        return None;
    }
    let total = |f: &dyn Fn(&StageCost) -> u32| stages.iter().map(|s| u64::from(f(s))).sum::<u64>();
    if total(&|s| s.capacity) < u64::from(n_layers) {
        return None;
    }
    let mut times: Vec<f64> =
        stages.iter().flat_map(|s| (1..=s.capacity.min(n_layers)).map(move |n| s.ms(n))).collect();
    times.sort_by(f64::total_cmp);
    // Every stage takes at least one layer, whatever that costs.
    let at_least = stages.iter().map(|s| s.ms(1)).fold(0.0, f64::max);
    let first =
        times.partition_point(|&t| t < at_least || total(&|s| s.layers_within(t)) < u64::from(n_layers));
    let limit_ms = *times.get(first)?;

    let mut layers = vec![1; stages.len()];
    let mut missing = n_layers - u32::try_from(stages.len()).ok()?;
    let mut cheapest: Vec<usize> = (0..stages.len()).collect();
    cheapest.sort_by(|&a, &b| stages[a].layer_ms.total_cmp(&stages[b].layer_ms));
    for i in cheapest {
        let more = missing.min(stages[i].layers_within(limit_ms) - 1);
        layers[i] += more;
        missing -= more;
    }
    (missing == 0).then_some(layers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn brute(stages: &[StageCost], n_layers: u32) -> Option<f64> {
        let (first, rest) = stages.split_first()?;
        if rest.is_empty() {
            return (1..=first.capacity).contains(&n_layers).then(|| first.ms(n_layers));
        }
        (1..=first.capacity.min(n_layers))
            .filter_map(|n| Some(first.ms(n).max(brute(rest, n_layers - n)?)))
            .min_by(f64::total_cmp)
    }

    #[test]
    fn faster_stages_get_more_layers() {
        let stage = |layer_ms| StageCost { overhead_ms: 0.0, layer_ms, capacity: 100 };
        assert_eq!(split(&[stage(1.0), stage(3.0)], 12).unwrap(), [9, 3]);
    }

    proptest! {
        #[test]
        fn the_slowest_stage_is_as_fast_as_brute_force_finds(
            stages in proptest::collection::vec((0u32..5, 1u32..9, 0u32..8), 1..5), n_layers in 1u32..16,
        ) {
            let stages: Vec<StageCost> = stages
                .into_iter()
                .map(|(o, t, capacity)| StageCost { overhead_ms: f64::from(o) * 0.7, layer_ms: f64::from(t) * 0.3, capacity })
                .collect();
            let found = split(&stages, n_layers);
            let slowest = found.as_ref().map(|layers| {
                assert_eq!(layers.iter().sum::<u32>(), n_layers);
                stages.iter().zip(layers).map(|(s, &n)| { assert!(n >= 1 && n <= s.capacity); s.ms(n) }).fold(0.0, f64::max)
            });
            match (slowest, brute(&stages, n_layers)) {
                (None, None) => {}
                (Some(a), Some(b)) => prop_assert!((a - b).abs() < 1e-6, "{a} {b}"),
                (a, b) => prop_assert!(false, "{a:?} {b:?}"),
            }
        }
    }
}
