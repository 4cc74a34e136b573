//! Which rows are opened: drawn from the commitment and the auditor's randomness together, after the commitment.

use crate::merkle::Hash;

/// A request to open rows of a commitment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// Hash of the signed commitment.
    pub commitment_hash: Hash,
    /// The auditor's randomness, fresh for every challenge.
    pub randomness: [u8; 32],
    /// Number of rows to open.
    pub n_positions: u32,
}

impl Challenge {
    /// The rows to open among `n_rows`: sorted, distinct, always with the last one, because in a causal model an early
    /// change moves every later row.
    pub fn positions(&self, n_rows: u32) -> Vec<u32> {
        if n_rows == 0 {
            return Vec::new();
        }
        let wanted = self.n_positions.clamp(1, n_rows) as usize;
        let mut hash = blake3::Hasher::new_derive_key("veri/v1/challenge");
        hash.update(&self.commitment_hash);
        hash.update(&self.randomness);
        let mut stream = hash.finalize_xof();
        let mut positions = vec![n_rows - 1];
        while positions.len() < wanted {
            let mut word = [0; 8];
            stream.fill(&mut word);
            // The bias of the remainder of 64 bits by at most 2^20 rows is below 2^-43.
            let position = u32::try_from(u64::from_le_bytes(word) % u64::from(n_rows)).expect("below n_rows");
            if !positions.contains(&position) {
                positions.push(position);
            }
        }
        positions.sort_unstable();
        positions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_distinct_sorted_and_end_with_the_last_row() {
        for (n_rows, n_positions) in [(1, 8), (5, 8), (100, 8), (100, 1), (3, 0)] {
            let challenge = Challenge { commitment_hash: [1; 32], randomness: [2; 32], n_positions };
            let positions = challenge.positions(n_rows);
            assert_eq!(positions.len(), (n_positions.max(1) as usize).min(n_rows as usize));
            assert!(positions.windows(2).all(|w| w[0] < w[1]));
            assert_eq!(positions.last(), Some(&(n_rows - 1)));
        }
    }

    #[test]
    fn both_sides_move_the_positions() {
        let base = Challenge { commitment_hash: [1; 32], randomness: [2; 32], n_positions: 8 };
        let other_random = Challenge { randomness: [3; 32], ..base.clone() };
        let other_commitment = Challenge { commitment_hash: [3; 32], ..base.clone() };
        assert_ne!(base.positions(1000), other_random.positions(1000));
        assert_ne!(base.positions(1000), other_commitment.positions(1000));
    }
}
