//! A Merkle tree over hidden rows, with the shape of RFC 6962 section 2.1 (an odd node is promoted) and BLAKE3 with
//! separate contexts for leaves and nodes, so that a node can never pass as a leaf.

/// A hash.
pub type Hash = [u8; 32];

/// What a leaf binds besides its values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafContext {
    /// The job.
    pub job_id: Hash,
    /// Decoder layers below the row.
    pub boundary: u32,
    /// Index of the output token.
    pub position: u32,
}

/// Hash of one row. The row is taken as little-endian f32 values.
pub fn leaf(context: &LeafContext, row: &[f32]) -> Hash {
    let mut hash = blake3::Hasher::new_derive_key("veri/v1/leaf");
    hash.update(&context.job_id);
    hash.update(&context.boundary.to_le_bytes());
    hash.update(&context.position.to_le_bytes());
    hash.update(&(row.len() as u64).to_le_bytes());
    for value in row {
        hash.update(&value.to_le_bytes());
    }
    *hash.finalize().as_bytes()
}

fn node(left: &Hash, right: &Hash) -> Hash {
    let mut hash = blake3::Hasher::new_derive_key("veri/v1/node");
    hash.update(left);
    hash.update(right);
    *hash.finalize().as_bytes()
}

/// A tree with all its levels, leaves first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    levels: Vec<Vec<Hash>>,
}

impl Tree {
    /// The tree over `leaves`; `None` when there are none.
    pub fn new(leaves: Vec<Hash>) -> Option<Self> {
        if leaves.is_empty() {
            return None;
        }
        let mut levels = vec![leaves];
        while levels[levels.len() - 1].len() > 1 {
            let below = &levels[levels.len() - 1];
            let level = below
                .chunks(2)
                .map(|pair| match pair {
                    [left, right] => node(left, right),
                    [odd, ..] => *odd,
                    [] => unreachable!("chunks are never empty"),
                })
                .collect();
            levels.push(level);
        }
        Some(Self { levels })
    }

    /// The root.
    pub fn root(&self) -> Hash {
        self.levels[self.levels.len() - 1][0]
    }

    /// Sibling hashes of leaf `index`, from the leaf upwards.
    ///
    /// # Panics
    /// When there is no such leaf.
    pub fn path(&self, index: usize) -> Vec<Hash> {
        assert!(index < self.levels[0].len(), "leaf {index} of {}", self.levels[0].len());
        let mut path = Vec::new();
        let mut index = index;
        for level in &self.levels {
            if let Some(sibling) = level.get(index ^ 1) {
                path.push(*sibling);
            }
            index /= 2;
        }
        path
    }
}

/// Whether `leaf` is number `index` of `n_leaves` under `root`. Extra or missing path elements are refused.
pub fn verify(root: &Hash, leaf: &Hash, index: usize, n_leaves: usize, path: &[Hash]) -> bool {
    if index >= n_leaves {
        return false;
    }
    let (mut hash, mut index, mut width, mut path) = (*leaf, index, n_leaves, path.iter());
    while width > 1 {
        if index ^ 1 < width {
            let Some(sibling) = path.next() else { return false };
            hash = if index % 2 == 0 { node(&hash, sibling) } else { node(sibling, &hash) };
        }
        index /= 2;
        width = width.div_ceil(2);
    }
    path.next().is_none() && hash == *root
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The definition of RFC 6962 section 2.1: split at the largest power of two below n.
    fn naive_root(leaves: &[Hash]) -> Hash {
        match leaves {
            [one] => *one,
            _ => {
                let split = leaves.len().next_power_of_two() / 2;
                node(&naive_root(&leaves[..split]), &naive_root(&leaves[split..]))
            }
        }
    }

    fn leaves(n: usize) -> Vec<Hash> {
        (0..n).map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes()).collect()
    }

    proptest! {
        #[test]
        fn roots_follow_the_rfc_and_every_leaf_proves(n in 1usize..70) {
            let tree = Tree::new(leaves(n)).unwrap();
            prop_assert_eq!(tree.root(), naive_root(&leaves(n)));
            for (i, leaf) in leaves(n).iter().enumerate() {
                prop_assert!(verify(&tree.root(), leaf, i, n, &tree.path(i)));
            }
        }

        #[test]
        fn a_proof_holds_for_its_leaf_place_and_count_only(n in 2usize..40, i in 0usize..40, j in 0usize..40, m in 1usize..80) {
            let (i, j) = (i % n, j % n);
            let tree = Tree::new(leaves(n)).unwrap();
            let path = tree.path(i);
            let leaf = leaves(n)[i];
            if i != j {
                prop_assert!(!verify(&tree.root(), &leaf, j, n, &path));
                prop_assert!(!verify(&tree.root(), &leaves(n)[j], i, n, &path));
            }
            let mut longer = path.clone();
            longer.push([0; 32]);
            prop_assert!(!verify(&tree.root(), &leaf, i, n, &longer));
            prop_assert!(!verify(&tree.root(), &leaf, i, n, &path[..path.len() - 1]));
            prop_assert!(!verify(&tree.root(), &leaf, m.max(n), n, &path));
        }
    }

    #[test]
    fn the_context_is_part_of_the_leaf() {
        let context = LeafContext { job_id: [1; 32], boundary: 4, position: 0 };
        let row = [1.0, 2.0];
        assert_ne!(leaf(&context, &row), leaf(&LeafContext { position: 1, ..context }, &row));
        assert_ne!(leaf(&context, &row), leaf(&LeafContext { boundary: 3, ..context }, &row));
        assert_ne!(leaf(&context, &row), leaf(&LeafContext { job_id: [2; 32], ..context }, &row));
        assert_ne!(leaf(&context, &row), leaf(&context, &[1.0, 2.0, 0.0]));
    }
}
