//! The set of lease numbers that were trained on. Stored as ranges: a run that consumes nearly all leases in order
//! keeps a handful of ranges however long it gets.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A set of numbers, as disjoint half-open ranges that do not touch.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(from = "Vec<(u64, u64)>", into = "Vec<(u64, u64)>")]
pub struct LeaseSet {
    ranges: BTreeMap<u64, u64>,
}

impl LeaseSet {
    /// Whether `lease` is in the set.
    pub fn contains(&self, lease: u64) -> bool {
        self.ranges.range(..=lease).next_back().is_some_and(|(_, end)| lease < *end)
    }

    /// Adds `lease`; false when it was there.
    pub fn insert(&mut self, lease: u64) -> bool {
        if self.contains(lease) || lease == u64::MAX {
            return false;
        }
        let mut range = (lease, lease + 1);
        if let Some((&start, &end)) = self.ranges.range(..lease).next_back()
            && end == lease
        {
            range.0 = start;
        }
        if let Some(end) = self.ranges.remove(&range.1) {
            range.1 = end;
        }
        self.ranges.insert(range.0, range.1);
        true
    }

    /// How many numbers are in the set.
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }

    /// Whether nothing is in the set.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

impl From<Vec<(u64, u64)>> for LeaseSet {
    /// Overlapping or touching ranges are joined, empty ones dropped: a checkpoint's text cannot break the set.
    fn from(mut ranges: Vec<(u64, u64)>) -> Self {
        ranges.retain(|(start, end)| start < end);
        ranges.sort_unstable();
        let mut joined: Vec<(u64, u64)> = Vec::new();
        for (start, end) in ranges {
            match joined.last_mut() {
                Some(last) if start <= last.1 => last.1 = last.1.max(end),
                _ => joined.push((start, end)),
            }
        }
        Self { ranges: joined.into_iter().collect() }
    }
}

impl From<LeaseSet> for Vec<(u64, u64)> {
    fn from(set: LeaseSet) -> Self {
        set.ranges.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_behaves_as_a_plain_set(leases in proptest::collection::vec(0_u64..40, 0..80)) {
            let (mut set, mut naive) = (LeaseSet::default(), BTreeSet::new());
            for lease in leases {
                prop_assert_eq!(set.insert(lease), naive.insert(lease));
                prop_assert_eq!(set.len(), naive.len() as u64);
            }
            for lease in 0..42 {
                prop_assert_eq!(set.contains(lease), naive.contains(&lease));
            }
            let ranges: Vec<(u64, u64)> = set.clone().into();
            prop_assert!(ranges.windows(2).all(|w| w[0].1 < w[1].0));
            prop_assert_eq!(LeaseSet::from(ranges), set);
        }
    }

    #[test]
    fn ranges_from_a_file_are_made_disjoint() {
        let set = LeaseSet::from(vec![(5, 9), (1, 3), (3, 6), (12, 12)]);
        assert_eq!(Vec::from(set.clone()), [(1, 9)]);
        assert_eq!(set.len(), 8);
    }
}
