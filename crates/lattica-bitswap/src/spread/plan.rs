//! Whether it pays to spread, in chunks of which size, and what other plans would take: star, chain, tree and mesh by formula.
//!
//! A star is a copy for everybody from the source. In a chain everybody passes on to the next, in a tree to several; both are
//! executed as a mesh, which is done earlier in all that was simulated and whose members find their way around a slow or
//! dead one (docs/decisions/0024).

/// What is planned from.
#[derive(Debug, Clone, PartialEq)]
pub struct Fleet {
    /// Bytes that everybody is to get.
    pub bytes: u64,
    /// Bytes of the largest chunk that may be made.
    pub chunk_bytes: u64,
    /// What the source can send, bytes per second.
    pub source_uplink: f64,
    /// What each receiver can send, bytes per second.
    pub uplinks: Vec<f64>,
    /// What each receiver can take, bytes per second.
    pub downlinks: Vec<f64>,
    /// Receivers that are reached over relays only; they pass nothing on in a chain or tree.
    pub leaves: usize,
    /// Between two members, from a chunk asked for to its first byte, in seconds.
    pub hop_s: f64,
}

/// Who gets everything from whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Everybody from the source.
    Star,
    /// Everybody from the one before.
    Chain,
    /// Everybody from one that serves `arity`.
    Tree {
        /// How many.
        arity: u32,
    },
    /// Everybody from everybody.
    Mesh,
}

/// What one shape takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Which.
    pub shape: Shape,
    /// Of the sizes that were looked at, the one with which it takes least.
    pub chunk_bytes: u64,
    /// Until the last receiver has everything, the members' search for each other included.
    pub seconds: f64,
}

/// All shapes for one artefact and fleet.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    predictions: [Prediction; 4],
}

impl Plan {
    /// What each shape takes, the fastest first; of trees the fastest.
    pub fn predictions(&self) -> &[Prediction; 4] {
        &self.predictions
    }

    /// The size of chunks to spread in; `None` when a star is done before a mesh. Nothing else is executed, so that it does not
    /// matter what a chain or a tree would take.
    pub fn spread_in_chunks(&self) -> Option<u64> {
        let of = |shape| self.predictions.iter().find(|p| p.shape == shape);
        let (star, mesh) = (of(Shape::Star)?, of(Shape::Mesh)?);
        (mesh.seconds < star.seconds).then_some(mesh.chunk_bytes)
    }
}

/// A mesh takes this share of the fluid bound longer for each hop and by the root of the number of chunks: the fewer there
/// are, the more it matters who gets which by chance. From the simulation in the tests, rounded up.
const MESH_SLACK: f64 = 0.2;
/// Chunks that cross a link in less than this share of a hop keep no mesh busy: too many would have to be on their way.
const MESH_MIN_CHUNK: f64 = 0.2;
/// Seconds until members have found each other: they look for neighbours once a second, and until then hear from the source
/// alone.
const SETUP_S: f64 = 1.0;
/// The smallest chunk that is looked at: below, what goes with a chunk counts.
const CHUNK_MIN_BYTES: u64 = 64 << 10;
/// More chunks than this make the manifest large.
const CHUNKS_MAX: u64 = 1 << 14;
/// Trees are looked at up to here; wider ones are stars of slow members.
const ARITY_MAX: u32 = 8;

impl Fleet {
    /// The fluid bound: everything must leave the source once, reach the slowest receiver, and be sent once per receiver
    /// by all uplinks together (Kumar and Ross, "Peer-assisted file distribution: the minimum distribution time", 2006).
    pub fn bound_s(&self) -> f64 {
        let bytes = self.bytes as f64;
        let together = self.source_uplink + self.uplinks.iter().sum::<f64>();
        (bytes / self.source_uplink)
            .max(bytes / self.slowest_down())
            .max(bytes * self.uplinks.len() as f64 / together)
    }

    /// What each shape takes, in chunks of the size that suits it. Fewer than two receivers have nothing to pass on.
    pub fn plan(&self) -> Plan {
        let passed_on = |seconds: f64| if self.uplinks.len() > 1 { seconds + SETUP_S } else { f64::INFINITY };
        let best = |of: &dyn Fn(f64) -> (Shape, f64)| {
            let sizes = self.chunk_sizes().map(|chunk_bytes| {
                let (shape, seconds) = of(chunk_bytes as f64);
                Prediction { shape, chunk_bytes, seconds: passed_on(seconds) }
            });
            sizes.min_by(|a, b| a.seconds.total_cmp(&b.seconds)).expect("one size at least")
        };
        let tree = |chunk: f64| {
            let of = |arity| (Shape::Tree { arity }, self.tree_s(arity, chunk));
            (2..=ARITY_MAX).map(of).min_by(|a, b| a.1.total_cmp(&b.1)).expect("not empty")
        };
        let star = Prediction { shape: Shape::Star, chunk_bytes: self.chunk_bytes, seconds: self.star_s() };
        let mut predictions = [
            star,
            best(&|chunk| (Shape::Chain, self.chain_s(chunk))),
            best(&tree),
            best(&|chunk| (Shape::Mesh, self.mesh_s(chunk))),
        ];
        predictions.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        Plan { predictions }
    }

    /// Whether it pays that receivers pass on to each other instead of having a copy each from the source.
    pub fn pays_to_spread(&self) -> bool {
        self.plan().spread_in_chunks().is_some()
    }

    /// The largest first, each half as large as the one before.
    fn chunk_sizes(&self) -> impl Iterator<Item = u64> {
        let least = CHUNK_MIN_BYTES.max(self.bytes / CHUNKS_MAX);
        std::iter::successors(Some(self.chunk_bytes.max(1)), move |size| {
            Some(size / 2).filter(|half| *half >= least)
        })
    }

    fn slowest_down(&self) -> f64 {
        self.downlinks.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn n_chunks(&self, chunk: f64) -> f64 {
        (self.bytes as f64 / chunk).ceil().max(1.0)
    }

    /// Seconds until the last of the receivers has had a copy of its own from the source.
    fn star_s(&self) -> f64 {
        let (n, bytes) = (self.uplinks.len() as f64, self.bytes as f64);
        (n * bytes / self.source_uplink).max(bytes / self.slowest_down()) + self.hop_s
    }

    /// A pipeline of `m` chunks over `stages`, of which each takes `step_s` a chunk: it is filled once, then a chunk comes out
    /// with every step (Sanders, Speck and Traeff, "Two-tree algorithms for full bandwidth broadcast, reduction and scan", 2009).
    fn pipeline_s(m: f64, stages: f64, step_s: f64) -> f64 {
        (m + stages - 1.0) * step_s
    }

    /// Everybody passes on to the next: (m + N - 1)(c/b + a) with m chunks of c bytes, N receivers, b the slowest link that
    /// passes on and a the hop. Fast uplinks come first and leaves last.
    fn chain_s(&self, chunk: f64) -> f64 {
        let n = self.uplinks.len();
        let rate = self.slowest_of(n.saturating_sub(1)).min(self.slowest_down());
        Self::pipeline_s(self.n_chunks(chunk), n as f64, chunk / rate + self.hop_s)
    }

    /// Everybody passes on to `arity` others: (m + depth - 1)(k c/b + a), b being the slowest uplink of those inside.
    fn tree_s(&self, arity: u32, chunk: f64) -> f64 {
        let (n, k) = (self.uplinks.len(), arity as usize);
        let (mut depth, mut reached, mut level) = (1.0, k, k);
        while reached < n {
            level = level.saturating_mul(k);
            reached = reached.saturating_add(level);
            depth += 1.0;
        }
        // The source serves `k`; of the receivers as many as it takes to serve the others.
        let inside = n.saturating_sub(k).div_ceil(k);
        let rate = (self.slowest_of(inside) / f64::from(arity)).min(self.slowest_down());
        Self::pipeline_s(self.n_chunks(chunk), depth, chunk / rate + self.hop_s)
    }

    /// The slowest uplink when the source and the `inside` fastest receivers pass on; nothing when leaves would have to.
    fn slowest_of(&self, inside: usize) -> f64 {
        if inside + self.leaves > self.uplinks.len() {
            return 0.0;
        }
        let mut uplinks = self.uplinks.clone();
        uplinks.sort_by(|a, b| b.total_cmp(a));
        uplinks.iter().take(inside).copied().fold(self.source_uplink, f64::min)
    }

    /// Seconds until the last of the receivers has everything, when all pass on what they have.
    fn mesh_s(&self, chunk: f64) -> f64 {
        let n = self.uplinks.len() as f64;
        let typical = (self.uplinks.iter().sum::<f64>() / n).min(self.slowest_down());
        if chunk < MESH_MIN_CHUNK * typical * self.hop_s && chunk < self.chunk_bytes as f64 {
            return f64::INFINITY;
        }
        let hops = (n + 1.0).log2().ceil();
        // A hop is told of the chunk, asks for it and gets it: one way more than asking alone.
        let hop_s = chunk / typical + 1.5 * self.hop_s;
        self.bound_s() * (1.0 + MESH_SLACK * hops / self.n_chunks(chunk).sqrt()) + hops * hop_s
    }
}

#[cfg(test)]
mod tests;
