//! The page cache against a naive model that knows what is written on every page and what every recurrent state has seen:
//! nobody's positions change under it, and what the prefix index hands out is what was asked for.

use std::collections::BTreeMap;

use parallax_engine::kv_cache::{BlockHash, KvCache};
use proptest::prelude::*;
use swarm_wire::RequestId;

/// What a position was computed from: the chain's root and all tokens up to it.
type Written = Option<(BlockHash, Vec<u32>)>;

#[derive(Debug, Clone)]
struct Life {
    root: BlockHash,
    tokens: Vec<u32>,
    prompt: usize,
    written: usize,
    /// Nothing has made the index forget since it began.
    indexed: bool,
}

#[derive(Debug, Clone)]
enum Operation {
    /// A request with these tokens comes in.
    Begin {
        request: u64,
        salt: bool,
        tokens: Vec<u32>,
    },
    /// It writes so many more of its positions; if they were guessed, the last ones turn out wrong.
    Write {
        request: u64,
        rows: usize,
        wrong: usize,
    },
    /// It gets more tokens.
    Grow {
        request: u64,
        token: u32,
    },
    Publish(u64),
    Fork {
        parent: u64,
        child: u64,
    },
    Release(u64),
    Forget,
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    let request = || 0u64..5;
    let begin = (request(), any::<bool>(), proptest::collection::vec(0u32..2, 1..30))
        .prop_map(|(request, salt, tokens)| Operation::Begin { request, salt, tokens });
    let write = (request(), 1usize..12, 0usize..4).prop_map(|(request, rows, wrong)| Operation::Write {
        request,
        rows,
        wrong,
    });
    let grow = (request(), 0u32..2).prop_map(|(request, token)| Operation::Grow { request, token });
    let fork = (request(), request()).prop_map(|(parent, child)| Operation::Fork { parent, child });
    let operation = prop_oneof![
        4 => begin,
        6 => write,
        3 => grow,
        4 => request().prop_map(Operation::Publish),
        2 => fork,
        3 => request().prop_map(Operation::Release),
        1 => Just(Operation::Forget),
    ];
    proptest::collection::vec(operation, 0..120)
}

struct Model {
    page_tokens: usize,
    cache: KvCache,
    store: Vec<Written>,
    states: Vec<Written>,
    lives: BTreeMap<u64, Life>,
}

impl Model {
    fn slot(&self, request: u64, position: usize) -> usize {
        let page = self.cache.pages(RequestId(request))[position / self.page_tokens] as usize;
        page * self.page_tokens + position % self.page_tokens
    }

    fn write(&mut self, request: u64, rows: usize, wrong: usize) {
        let Some(mut life) = self.lives.get(&request).cloned() else { return };
        let end = (life.written + rows).min(life.tokens.len());
        let (id, free) = (RequestId(request), self.cache.n_free());
        let held = self.cache.pages(id).to_vec();
        let reserved = self.cache.reserve(id, life.written, end);
        for copy in self.cache.take_copies() {
            let (from, to) = (copy.from as usize * self.page_tokens, copy.to as usize * self.page_tokens);
            for i in 0..self.page_tokens {
                self.store[to + i] = self.store[from + i].clone();
            }
        }
        for copy in self.cache.take_state_copies() {
            self.states[copy.to as usize] = self.states[copy.from as usize].clone();
        }
        if let Err(refused) = reserved {
            assert!(refused.needed > refused.free, "refused with {free} pages to take");
            assert_eq!(self.cache.pages(id), held, "nothing has changed");
            return;
        }
        for position in life.written..end {
            let slot = self.slot(request, position);
            self.store[slot] = Some((life.root, life.tokens[..=position].to_vec()));
        }
        if !self.states.is_empty() && end > life.written {
            self.recur(request, &life, end);
        }
        // A guess that was wrong is replaced and written again.
        let stays = end.saturating_sub(wrong).max(life.written + 1).min(end);
        life.tokens[stays..end].iter_mut().for_each(|token| *token = 9 - *token);
        life.written = stays;
        if !self.states.is_empty() {
            let state = self.cache.state(id) as usize;
            self.states[state] = Some((life.root, life.tokens[..stays].to_vec()));
            if life.indexed {
                self.cache.publish(id, life.root, &life.tokens[..stays]);
            }
        }
        self.lives.insert(request, life);
    }

    /// The state stands before the rows; copies are kept on the way.
    fn recur(&mut self, request: u64, life: &Life, end: usize) {
        let id = RequestId(request);
        let seen = |n: usize| Some((life.root, life.tokens[..n].to_vec()));
        if life.written > 0 {
            assert_eq!(self.states[self.cache.state(id) as usize], seen(life.written), "state of {request}");
        }
        if life.indexed {
            let rows = life.written..end;
            for save in self.cache.plan_saves(id, rows.clone(), life.tokens.len(), life.prompt) {
                assert!(rows.contains(&(save.position as usize)), "states are kept on the way");
                self.states[save.slot as usize] = seen(save.position as usize);
            }
        }
    }

    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Begin { request, salt, tokens } => {
                if self.lives.contains_key(&request) {
                    return;
                }
                let root = BlockHash::root("m", 1, None, if salt { "salt" } else { "" });
                let Ok(written) = self.cache.attach(RequestId(request), root, &tokens) else {
                    assert!(self.cache.states().n_available() < 2, "one to begin with, one for itself");
                    return;
                };
                assert!(written < tokens.len(), "the last token always runs");
                let prompt = tokens.len();
                self.lives.insert(request, Life { root, tokens, prompt, written, indexed: true });
            }
            Operation::Write { request, rows, wrong } => self.write(request, rows, wrong),
            Operation::Grow { request, token } => {
                if let Some(life) = self.lives.get_mut(&request) {
                    life.tokens.push(token);
                }
            }
            Operation::Publish(request) => {
                if let Some(life) = self.lives.get(&request).filter(|life| life.indexed) {
                    self.cache.publish(RequestId(request), life.root, &life.tokens[..life.written]);
                }
            }
            Operation::Fork { parent, child } => {
                if let (Some(life), false) =
                    (self.lives.get(&parent).cloned(), self.lives.contains_key(&child))
                {
                    match self.cache.fork(RequestId(parent), RequestId(child), life.written) {
                        Ok(()) => drop(self.lives.insert(child, life)),
                        Err(_) => assert_eq!(self.cache.states().n_available(), 0),
                    }
                }
            }
            Operation::Release(request) => {
                self.lives.remove(&request);
                self.cache.release(RequestId(request));
            }
            Operation::Forget => {
                self.cache.forget();
                assert_eq!((self.cache.n_indexed(), self.cache.states().n_kept()), (0, 0));
                self.lives.values_mut().for_each(|life| life.indexed = false);
            }
        }
    }

    fn check(&self) {
        self.cache.check_integrity();
        for (request, life) in &self.lives {
            for position in 0..life.written {
                let written = &self.store[self.slot(*request, position)];
                let expected = Some((life.root, life.tokens[..=position].to_vec()));
                assert_eq!(written, &expected, "position {position} of request {request}");
            }
        }
        let held: std::collections::BTreeSet<u32> =
            self.lives.keys().flat_map(|r| self.cache.pages(RequestId(*r)).to_vec()).collect();
        assert_eq!(self.cache.n_free(), self.cache.n_pages() - held.len());
        for page in 0..self.cache.n_pages() {
            if let Some(slot) = self.cache.states().kept(page as u32) {
                let end = &self.store[(page + 1) * self.page_tokens - 1];
                assert_eq!(&self.states[slot as usize], end, "the state at the end of page {page}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn pages_hold_what_was_written(
        n_pages in 1usize..20,
        page_tokens in 1usize..6,
        slots in prop_oneof![Just(0usize), 1usize..9],
        operations in operations(),
    ) {
        let (store, states) = (vec![None; n_pages * page_tokens], vec![None; slots]);
        let cache = KvCache::new(n_pages, page_tokens, slots);
        let mut model = Model { page_tokens, cache, store, states, lives: BTreeMap::new() };
        for operation in operations {
            model.apply(operation);
            model.check();
        }
    }
}

#[test]
fn pages_that_are_idle_for_longest_go_first_and_ends_go_before_beginnings() {
    let root = BlockHash::root("m", 0, None, "");
    let mut cache = KvCache::new(4, 2, 0);
    let (old, new) = ([1, 2, 3, 4, 5], [6, 7, 8]);
    for (id, tokens) in [(1, &old[..]), (2, &new[..])] {
        let id = RequestId(id);
        assert_eq!(cache.attach(id, root, tokens), Ok(0));
        let whole = tokens.len() / 2 * 2;
        cache.reserve(id, 0, whole).unwrap();
        cache.publish(id, root, &tokens[..whole]);
        cache.release(id);
    }
    assert_eq!((cache.n_indexed(), cache.n_free()), (3, 4));
    // Two pages: the free one, and the end of the older chain.
    cache.reserve(RequestId(3), 0, 4).unwrap();
    assert_eq!(cache.attach(RequestId(4), root, &old), Ok(2));
    assert_eq!(cache.attach(RequestId(5), root, &new), Ok(2));
    assert_eq!(cache.n_free(), 0);
    cache.check_integrity();
}
