//! A trainer's part in a step: compute a share, collect the others', add them in order, apply what the leader commits.

use std::collections::BTreeMap;
use std::sync::Arc;

use swarm_wire::PeerId;

use super::{Attempt, Hash, MAX_MEMBERS, Message, hash};
use crate::parameters::Gradients;

/// What a member is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum MemberAction {
    /// Compute this share of the step's batch and report it with [`Member::handle_computed`].
    Compute {
        /// Of which attempt.
        attempt: Attempt,
        /// The member's place.
        place: usize,
        /// Of how many.
        of: usize,
    },
    /// Tell a peer.
    Send {
        /// Whom.
        to: PeerId,
        /// What.
        message: Message,
    },
    /// Apply this sum to the weights and report the new state with [`Member::handle_applied`].
    Apply {
        /// The attempt.
        attempt: Attempt,
        /// The sum of all shares.
        sum: Arc<Gradients>,
    },
}

/// An attempt that this member takes part in.
#[derive(Debug, Clone, PartialEq)]
struct Trial {
    attempt: Attempt,
    members: Vec<PeerId>,
    /// This member's place.
    place: usize,
    /// By place.
    shares: BTreeMap<usize, (Hash, Arc<Gradients>)>,
    sum: Option<(Hash, Arc<Gradients>)>,
    /// The sum was committed and is being applied.
    applying: bool,
}

impl Trial {
    /// Adds the shares in the order of the places, once all are here.
    fn add_up(&mut self) {
        if self.sum.is_some() || self.shares.len() < self.members.len() {
            return;
        }
        let mut shares = self.shares.values().map(|(_, share)| share);
        let Some(first) = shares.next() else { return };
        let mut sum = Gradients::clone(first);
        shares.for_each(|share| sum.add(share));
        self.sum = Some((hash(&sum), Arc::new(sum)));
    }
}

/// A trainer among others.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    me: PeerId,
    leader: PeerId,
    /// Values of each parameter; shares of another shape are none.
    lengths: Vec<usize>,
    /// Hash of the present weights and moments.
    state: Hash,
    /// Steps that made it.
    step: u64,
    trial: Option<Trial>,
    /// A `Begin` that has to wait for a sum to be applied first.
    waits: Option<(PeerId, Message)>,
    /// Shares of an attempt that this member has not heard of yet; at most one of each peer.
    early: BTreeMap<PeerId, (Attempt, Arc<Gradients>)>,
}

impl Member {
    /// A trainer after `step` steps, whose weights and moments hash to `state`; parameters have these `lengths`.
    pub fn new(me: PeerId, leader: PeerId, lengths: Vec<usize>, step: u64, state: Hash) -> Self {
        Self { me, leader, lengths, state, step, trial: None, waits: None, early: BTreeMap::new() }
    }

    /// Steps so far.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Hash of the present state.
    pub fn state(&self) -> Hash {
        self.state
    }

    /// Whose shares have not come, of the attempt that is being made.
    pub fn missing(&self) -> Vec<PeerId> {
        let Some(trial) = &self.trial else { return Vec::new() };
        let absent =
            |(place, peer): (usize, &PeerId)| (!trial.shares.contains_key(&place)).then(|| peer.clone());
        trial.members.iter().enumerate().filter_map(absent).collect()
    }

    /// Something came. What does not fit is ignored: repeated, late, from strangers, of another shape.
    pub fn handle(&mut self, from: &PeerId, message: Message) -> Vec<MemberAction> {
        match message {
            Message::Begin { attempt, members, state, committed } if *from == self.leader => {
                self.begin(attempt, members, state, committed)
            }
            Message::Share { attempt, gradients } => self.take(from, attempt, gradients),
            Message::Commit { attempt } if *from == self.leader => self.commit(attempt),
            _ => Vec::new(),
        }
    }

    /// The share that was asked for is computed.
    pub fn handle_computed(&mut self, attempt: Attempt, gradients: Gradients) -> Vec<MemberAction> {
        let Some(trial) = self.trial.as_mut().filter(|t| t.attempt == attempt) else { return Vec::new() };
        let gradients = Arc::new(gradients);
        trial.shares.entry(trial.place).or_insert_with(|| (hash(&gradients), gradients));
        trial.add_up();
        let mut actions = self.repeat();
        // Those that were faster than `Begin`.
        let early: Vec<_> = std::mem::take(&mut self.early).into_iter().collect();
        for (peer, (of, gradients)) in early.into_iter().filter(|(_, (of, _))| *of >= attempt) {
            actions.extend(self.take(&peer, of, gradients));
        }
        actions
    }

    /// The sum is applied, the checkpoint written: the state is this one now.
    pub fn handle_applied(&mut self, attempt: Attempt, state: Hash) -> Vec<MemberAction> {
        if self.trial.as_ref().is_none_or(|t| t.attempt != attempt) {
            return Vec::new();
        }
        self.trial = None;
        self.state = state;
        self.step = attempt.step + 1;
        match self.waits.take() {
            Some((from, begin)) => self.handle(&from, begin),
            None => Vec::new(),
        }
    }

    /// The leader's state was taken over: the trainer is as one that made `step` steps.
    pub fn reset(&mut self, step: u64, state: Hash) {
        (self.step, self.state) = (step, state);
        (self.trial, self.waits) = (None, None);
        self.early.clear();
    }

    fn begin(
        &mut self,
        attempt: Attempt,
        members: Vec<PeerId>,
        state: Hash,
        committed: Option<Attempt>,
    ) -> Vec<MemberAction> {
        if let Some(trial) = &self.trial {
            if trial.attempt == attempt {
                return self.repeat();
            }
            if trial.attempt > attempt {
                return Vec::new();
            }
            // A commit that was not heard.
            if committed == Some(trial.attempt) && trial.sum.is_some() {
                let of = trial.attempt;
                self.waits =
                    Some((self.leader.clone(), Message::Begin { attempt, members, state, committed }));
                return self.commit(of);
            }
        }
        if attempt.step < self.step {
            return Vec::new();
        }
        self.trial = None;
        let place = members.iter().position(|member| *member == self.me);
        let Some(place) = place.filter(|_| members.len() <= MAX_MEMBERS) else { return Vec::new() };
        if attempt.step != self.step || state != self.state {
            return vec![self.tell(Message::Behind { attempt })];
        }
        let of = members.len();
        self.trial =
            Some(Trial { attempt, members, place, shares: BTreeMap::new(), sum: None, applying: false });
        vec![MemberAction::Compute { attempt, place, of }]
    }

    /// Says again what was said in this attempt.
    fn repeat(&self) -> Vec<MemberAction> {
        let Some(trial) = &self.trial else { return Vec::new() };
        let Some((_, own)) = trial.shares.get(&trial.place) else { return Vec::new() };
        let others = trial.members.iter().filter(|member| **member != self.me);
        let share = |to: &PeerId| MemberAction::Send {
            to: to.clone(),
            message: Message::Share { attempt: trial.attempt, gradients: Arc::clone(own) },
        };
        let mut actions: Vec<MemberAction> = others.map(share).collect();
        actions.extend(self.report());
        actions
    }

    fn take(&mut self, from: &PeerId, attempt: Attempt, gradients: Arc<Gradients>) -> Vec<MemberAction> {
        let fits = gradients.values.iter().map(Vec::len).eq(self.lengths.iter().copied());
        if !fits || gradients.values.iter().flatten().any(|g| !g.is_finite()) {
            return Vec::new();
        }
        let ours = self.trial.as_ref().is_some_and(|t| t.attempt == attempt);
        if !ours {
            let newer = self.trial.as_ref().is_none_or(|t| attempt > t.attempt) && attempt.step >= self.step;
            if newer && (self.early.contains_key(from) || self.early.len() < MAX_MEMBERS) {
                self.early.insert(from.clone(), (attempt, gradients));
            }
            return Vec::new();
        }
        let Some(trial) = &mut self.trial else { return Vec::new() };
        let Some(place) = trial.members.iter().position(|member| member == from) else { return Vec::new() };
        // The first counts: who sends another one later has told others something else.
        if place == trial.place || trial.shares.contains_key(&place) {
            return Vec::new();
        }
        trial.shares.insert(place, (hash(&gradients), gradients));
        trial.add_up();
        self.report().into_iter().collect()
    }

    /// The sum, once all shares are here.
    fn report(&self) -> Option<MemberAction> {
        let trial = self.trial.as_ref()?;
        let (sum, _) = trial.sum.as_ref()?;
        let shares = trial.shares.values().map(|(hash, _)| *hash).collect();
        Some(self.tell(Message::Sum { attempt: trial.attempt, shares, sum: *sum }))
    }

    fn commit(&mut self, attempt: Attempt) -> Vec<MemberAction> {
        let Some(trial) = self.trial.as_mut().filter(|t| t.attempt == attempt && !t.applying) else {
            return Vec::new();
        };
        let Some((_, sum)) = &trial.sum else { return Vec::new() };
        trial.applying = true;
        vec![MemberAction::Apply { attempt, sum: Arc::clone(sum) }]
    }

    fn tell(&self, message: Message) -> MemberAction {
        MemberAction::Send { to: self.leader.clone(), message }
    }
}
