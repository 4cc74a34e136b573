//! The page cache against a naive model: a set of free pages and a list per sequence.

use std::collections::{BTreeMap, BTreeSet};

use parallax_engine::kv_cache::KvCache;
use proptest::prelude::*;
use swarm_wire::RequestId;

#[derive(Debug, Clone)]
enum Operation {
    Reserve(u64, usize),
    Release(u64),
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let reserve = (0u64..6, 0usize..60).prop_map(|(request, tokens)| Operation::Reserve(request, tokens));
    let release = (0u64..6).prop_map(Operation::Release);
    proptest::collection::vec(prop_oneof![3 => reserve, 1 => release], 0..80)
}

proptest! {
    #[test]
    fn the_cache_behaves_as_a_set_of_pages(n_pages in 0usize..24, page_tokens in 1usize..9, operations in operations()) {
        let mut cache = KvCache::new(n_pages, page_tokens);
        let mut free: BTreeSet<u32> = (0..n_pages as u32).collect();
        let mut held: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
        for operation in operations {
            match operation {
                Operation::Reserve(request, tokens) => {
                    let mine = held.entry(request).or_default();
                    let missing = tokens.div_ceil(page_tokens).saturating_sub(mine.len());
                    let result = cache.reserve(RequestId(request), tokens);
                    prop_assert_eq!(result.is_ok(), missing <= free.len());
                    let pages = cache.pages(RequestId(request)).to_vec();
                    prop_assert_eq!(&pages[..mine.len()], &mine[..], "pages keep their positions");
                    prop_assert_eq!(pages.len(), mine.len() + if result.is_ok() { missing } else { 0 });
                    for page in &pages[mine.len()..] {
                        prop_assert!(free.remove(page), "only free pages are taken");
                    }
                    *mine = pages;
                }
                Operation::Release(request) => {
                    let mine = held.remove(&request).unwrap_or_default();
                    prop_assert_eq!(cache.release(RequestId(request)), mine.len());
                    free.extend(mine);
                }
            }
            prop_assert_eq!(cache.n_free(), free.len());
            cache.check_integrity();
        }
    }
}
