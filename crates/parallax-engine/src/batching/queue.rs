//! The waiting requests of several users: a fair order between them.
//!
//! Each user has a counter of the work done for it (Sheng et al. 2024, "Fairness in serving large language models"): a
//! row of prompt counts 1, a generated token 2. Among the highest waiting priority, the user with the lowest counter is
//! next; among equals, the oldest request. Whoever comes back after a pause starts at the lowest counter in use, so that
//! nobody saves up a claim.

use std::collections::{BTreeMap, VecDeque};

use crate::sequence::Sequence;

/// Users whose counters are remembered; beyond, the ones without requests are forgotten.
const USERS_MAX: usize = 4096;

#[derive(Debug, Default)]
struct User {
    served: u64,
    /// Requests in the engine, running ones too.
    active: usize,
    /// By priority, then by arrival.
    waiting: VecDeque<Sequence>,
}

/// Waiting sequences by user.
#[derive(Debug, Default)]
pub struct FairQueue {
    users: BTreeMap<String, User>,
    len: usize,
}

impl FairQueue {
    /// Sequences that wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nobody waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The waiting sequences, in no particular order between users.
    pub fn iter(&self) -> impl Iterator<Item = &Sequence> {
        self.users.values().flat_map(|user| &user.waiting)
    }

    /// The waiting sequences, to change what they will run with.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.users.values_mut().flat_map(|user| &mut user.waiting)
    }

    /// A new sequence, behind those of its user and priority.
    pub fn push(&mut self, sequence: Sequence) {
        let lowest = self.users.values().filter(|u| u.active > 0).map(|u| u.served).min();
        if self.users.len() >= USERS_MAX && !self.users.contains_key(sequence.user()) {
            self.users.retain(|_, user| user.active > 0);
        }
        let user = self.users.entry(sequence.user().to_owned()).or_default();
        if user.active == 0 {
            user.served = user.served.max(lowest.unwrap_or(0));
        }
        user.active += 1;
        let place = user.waiting.partition_point(|s| s.priority() >= sequence.priority());
        user.waiting.insert(place, sequence);
        self.len += 1;
    }

    /// A sequence that was running, before those of its user and priority.
    pub fn push_back_in(&mut self, sequence: Sequence) {
        let user = self.users.entry(sequence.user().to_owned()).or_default();
        let place = user.waiting.partition_point(|s| s.priority() > sequence.priority());
        user.waiting.insert(place, sequence);
        self.len += 1;
    }

    /// The next sequence in order among those that are `ready`.
    pub fn peek(&self, ready: impl Fn(&Sequence) -> bool) -> Option<&Sequence> {
        let heads = self.users.values().filter_map(|user| {
            let head = user.waiting.iter().find(|s| ready(s))?;
            Some(((std::cmp::Reverse(head.priority()), user.served, head.id()), head))
        });
        heads.min_by_key(|(key, _)| *key).map(|(_, head)| head)
    }

    /// Takes a waiting sequence out; its user still counts it as active.
    pub fn take(&mut self, id: swarm_wire::RequestId) -> Option<Sequence> {
        for user in self.users.values_mut() {
            if let Some(i) = user.waiting.iter().position(|s| s.id() == id) {
                self.len -= 1;
                return user.waiting.remove(i);
            }
        }
        None
    }

    /// Work was done for a user.
    pub fn charge(&mut self, user: &str, work: u64) {
        if let Some(user) = self.users.get_mut(user) {
            user.served = user.served.saturating_add(work);
        }
    }

    /// A request of `user` has left the engine.
    pub fn left(&mut self, user: &str) {
        if let Some(user) = self.users.get_mut(user) {
            user.active = user.active.saturating_sub(1);
        }
        if self.users.values().all(|user| user.active == 0) {
            self.users.clear();
        }
    }

    /// Takes all sequences out, oldest first, and forgets the users.
    pub fn drain(&mut self) -> Vec<Sequence> {
        self.len = 0;
        let users = std::mem::take(&mut self.users);
        let mut all: Vec<Sequence> = users.into_values().flat_map(|user| user.waiting).collect();
        all.sort_by_key(Sequence::id);
        all
    }
}
