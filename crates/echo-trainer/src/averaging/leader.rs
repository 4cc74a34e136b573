//! Who takes part in a step, and when all of them have come to the same sum.

use std::collections::BTreeMap;

use swarm_wire::PeerId;

use super::{Attempt, Hash, MAX_MEMBERS, Message};

/// How long members are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderConfig {
    /// A member that has not reported so long after an attempt began is left out.
    pub patience_ms: u64,
    /// `Begin` is said again this often, so that a lost message costs no member.
    pub repeat_ms: u64,
}

/// Why a member was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Exclusion {
    /// Its share or its report did not come in time, or was none.
    #[error("its share or its report did not come in time")]
    Late,
    /// It sent one share to the leader and calls another one its own.
    #[error("it sent different shares to different members")]
    Share,
    /// It says that it has another share of somebody than that one and the leader have.
    #[error("it reports a share that its owner did not send")]
    Report,
    /// It has the same shares and comes to another sum.
    #[error("it comes to another sum of the same shares")]
    Sum,
    /// Its weights or moments are not those that the step begins with.
    #[error("its state is not the one that the step begins with; it needs the leader's")]
    Behind,
}

/// What the leader is to do.
#[derive(Debug, Clone, PartialEq)]
pub enum LeaderAction {
    /// Tell a peer, or the member in the same process.
    Send {
        /// Whom.
        to: PeerId,
        /// What.
        message: Message,
    },
    /// A member was left out; the step is attempted again.
    Excluded {
        /// The member.
        peer: PeerId,
        /// Why.
        why: Exclusion,
    },
}

#[derive(Debug, Clone, PartialEq)]
struct Trial {
    attempt: Attempt,
    state: Hash,
    /// Hashes of the shares, and of their sum.
    reports: BTreeMap<PeerId, (Vec<Hash>, Hash)>,
    until_ms: u64,
    repeat_at_ms: u64,
    /// All agreed; the leader's own member applies the sum.
    agreed: bool,
}

/// Leads the steps of one run.
#[derive(Debug, Clone, PartialEq)]
pub struct Leader {
    config: LeaderConfig,
    me: PeerId,
    /// Without the leader, which is always there.
    others: Vec<PeerId>,
    committed: Option<Attempt>,
    trial: Option<Trial>,
}

impl Leader {
    /// Leads as `me`; [`Leader::admit`] brings others in.
    pub fn new(me: PeerId, config: LeaderConfig) -> Self {
        Self { config, me, others: Vec::new(), committed: None, trial: None }
    }

    /// `peer`, which has the leader's state, takes part from the next step on. False when there are too many.
    pub fn admit(&mut self, peer: PeerId) -> bool {
        let room = self.others.len() + 1 < MAX_MEMBERS;
        if room && peer != self.me && !self.others.contains(&peer) {
            self.others.push(peer);
        }
        room
    }

    /// Who takes part, the leader first.
    pub fn members(&self) -> Vec<PeerId> {
        std::iter::once(&self.me).chain(&self.others).cloned().collect()
    }

    /// Whether a step is being made.
    pub fn is_busy(&self) -> bool {
        self.trial.is_some()
    }

    /// Begins `step` from `state`.
    pub fn begin(&mut self, now_ms: u64, step: u64, state: Hash) -> Vec<LeaderAction> {
        self.attempt(now_ms, Attempt { step, number: 0 }, state)
    }

    /// Something came from a member. What does not fit is ignored.
    pub fn handle(&mut self, now_ms: u64, from: &PeerId, message: Message) -> Vec<LeaderAction> {
        let ours = *from == self.me || self.others.contains(from);
        let Some(trial) = self.trial.as_mut().filter(|t| ours && !t.agreed) else { return Vec::new() };
        match message {
            Message::Sum { attempt, shares, sum } if attempt == trial.attempt => {
                trial.reports.entry(from.clone()).or_insert((shares, sum));
                self.judge(now_ms)
            }
            Message::Behind { attempt } if attempt == trial.attempt && *from != self.me => {
                self.again(now_ms, &[(from.clone(), Exclusion::Behind)])
            }
            _ => Vec::new(),
        }
    }

    /// Time has passed; `missing` is whose shares the leader's own member lacks ([`super::Member::missing`]).
    pub fn handle_time(&mut self, now_ms: u64, missing: &[PeerId]) -> Vec<LeaderAction> {
        let Some(trial) = self.trial.as_mut().filter(|t| !t.agreed) else { return Vec::new() };
        if now_ms >= trial.until_ms {
            // Where a share is missing nobody can report, so only its owner is to blame.
            let late = |peer: &&PeerId| match missing.is_empty() {
                true => !trial.reports.contains_key(*peer),
                false => missing.contains(peer),
            };
            let late: Vec<_> =
                self.others.iter().filter(late).map(|p| (p.clone(), Exclusion::Late)).collect();
            if !late.is_empty() {
                return self.again(now_ms, &late);
            }
            // The leader itself is slow.
            trial.until_ms = now_ms + self.config.patience_ms;
        }
        if now_ms >= trial.repeat_at_ms {
            trial.repeat_at_ms = now_ms + self.config.repeat_ms;
            return self.say_begin();
        }
        Vec::new()
    }

    /// The leader's own state after the step is on disk: others may apply it.
    pub fn handle_applied(&mut self) -> Vec<LeaderAction> {
        let Some(trial) = self.trial.take_if(|t| t.agreed) else { return Vec::new() };
        let attempt = trial.attempt;
        self.committed = Some(attempt);
        let commit =
            |to: &PeerId| LeaderAction::Send { to: to.clone(), message: Message::Commit { attempt } };
        self.others.iter().map(commit).collect()
    }

    fn attempt(&mut self, now_ms: u64, attempt: Attempt, state: Hash) -> Vec<LeaderAction> {
        self.trial = Some(Trial {
            attempt,
            state,
            reports: BTreeMap::new(),
            until_ms: now_ms + self.config.patience_ms,
            repeat_at_ms: now_ms + self.config.repeat_ms,
            agreed: false,
        });
        self.say_begin()
    }

    fn say_begin(&self) -> Vec<LeaderAction> {
        let Some(trial) = &self.trial else { return Vec::new() };
        let members = self.members();
        let begin = |to: &PeerId| LeaderAction::Send {
            to: to.clone(),
            message: Message::Begin {
                attempt: trial.attempt,
                members: members.clone(),
                state: trial.state,
                committed: self.committed,
            },
        };
        members.iter().map(begin).collect()
    }

    /// Leaves these out and attempts the step again.
    fn again(&mut self, now_ms: u64, out: &[(PeerId, Exclusion)]) -> Vec<LeaderAction> {
        let Some(trial) = &self.trial else { return Vec::new() };
        let attempt = Attempt { number: trial.attempt.number + 1, ..trial.attempt };
        let state = trial.state;
        self.others.retain(|peer| out.iter().all(|(gone, _)| gone != peer));
        let excluded =
            |(peer, why): &(PeerId, Exclusion)| LeaderAction::Excluded { peer: peer.clone(), why: *why };
        let mut actions: Vec<LeaderAction> = out.iter().map(excluded).collect();
        actions.extend(self.attempt(now_ms, attempt, state));
        actions
    }

    /// When all have reported: whether they agree, and else who is wrong. The leader believes what it received itself.
    fn judge(&mut self, now_ms: u64) -> Vec<LeaderAction> {
        let Some(trial) = &self.trial else { return Vec::new() };
        let members = self.members();
        if trial.reports.len() < members.len() {
            return Vec::new();
        }
        let (shares, sum) = &trial.reports[&self.me];
        let mut out: BTreeMap<PeerId, Exclusion> = BTreeMap::new();
        for peer in &self.others {
            let (theirs, their_sum) = &trial.reports[peer];
            if theirs.len() != shares.len() {
                out.insert(peer.clone(), Exclusion::Report);
                continue;
            }
            let differing = (0..shares.len()).filter(|place| theirs[*place] != shares[*place]);
            let mut agrees = true;
            for place in differing {
                agrees = false;
                let owner = &members[place];
                // The owner says itself what it sent.
                let own = trial.reports[owner].0.get(place);
                let (who, why) = if owner == peer || own != Some(&shares[place]) {
                    (owner, Exclusion::Share)
                } else {
                    (peer, Exclusion::Report)
                };
                out.entry(who.clone()).or_insert(why);
            }
            if agrees && their_sum != sum {
                out.insert(peer.clone(), Exclusion::Sum);
            }
        }
        if !out.is_empty() {
            return self.again(now_ms, &out.into_iter().collect::<Vec<_>>());
        }
        let attempt = trial.attempt;
        if let Some(trial) = &mut self.trial {
            trial.agreed = true;
        }
        vec![LeaderAction::Send { to: self.me.clone(), message: Message::Commit { attempt } }]
    }
}
