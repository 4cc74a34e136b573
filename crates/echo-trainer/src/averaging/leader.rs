//! Who computes which share, how long it is waited for, and who is out.

use std::collections::{BTreeMap, BTreeSet};

use swarm_wire::PeerId;

use super::{Attempt, Exclusion};

/// How long assistants are waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderConfig {
    /// An answer that takes longer is not waited for.
    pub patience_ms: u64,
    /// Who is late so many times in a row is out until the learner is started again.
    pub late_at_most: u32,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    /// Ask an assistant for a share.
    Ask {
        /// Whom.
        peer: PeerId,
        /// For what.
        attempt: Attempt,
    },
    /// Compute these shares here, and report each with [`Leader::handle_own`].
    Own(Vec<usize>),
    /// Wait for answers, until this time at most.
    Wait {
        /// When the next one is late.
        until_ms: u64,
    },
    /// All shares are computed.
    Done,
    /// Somebody was found wrong whose answers of an earlier round of this step were taken. This round is given up: the step is begun
    /// again with its first one, without that peer. At most once for each that may assist.
    Again,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Nobody computes it.
    Open,
    /// An assistant does, or this trainer.
    Taken,
    /// By an assistant, or by this trainer.
    Done(Option<PeerId>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Job {
    attempt: Attempt,
    until_ms: u64,
    /// It is not waited for any more.
    late: bool,
}

/// Gives the shares of one step after the other to assistants and to this trainer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    config: LeaderConfig,
    step: u64,
    round: u64,
    shares: Vec<State>,
    /// Whose answers of earlier rounds of this step were taken. As many as may assist.
    believed: BTreeSet<PeerId>,
    /// One of those was found wrong.
    doubted: bool,
    /// Who is there, with what it has not answered yet.
    assistants: BTreeMap<PeerId, Option<Job>>,
    /// How many answers in a row were late. Kept of those that have gone, too: who joins again is not on time by that. As many as may
    /// assist.
    late: BTreeMap<PeerId, u32>,
    /// Who is out until the learner is started again. As many as may assist.
    dismissed: BTreeMap<PeerId, Exclusion>,
    /// Who was left out since the last time somebody asked.
    news: Vec<(PeerId, Exclusion)>,
}

/// News beyond this are forgotten, the oldest first.
const NEWS_MAX: usize = 256;

impl Leader {
    /// Leads nobody yet.
    pub fn new(config: LeaderConfig) -> Self {
        Self {
            config,
            step: 0,
            round: 0,
            shares: Vec::new(),
            believed: BTreeSet::new(),
            doubted: false,
            assistants: BTreeMap::new(),
            late: BTreeMap::new(),
            dismissed: BTreeMap::new(),
            news: Vec::new(),
        }
    }

    /// `peer` has weights and nothing to do. One that was there already has begun anew.
    ///
    /// # Errors
    /// It is out.
    pub fn join(&mut self, peer: &PeerId) -> Result<(), Exclusion> {
        if let Some(why) = self.dismissed.get(peer) {
            return Err(why.clone());
        }
        let reason = "it joined again".to_owned();
        self.exclude(peer, Exclusion::Gone { reason });
        self.assistants.insert(peer.clone(), None);
        Ok(())
    }

    /// Who is there, busy or not.
    pub fn assistants(&self) -> usize {
        self.assistants.len()
    }

    /// Whether `peer` is there.
    pub fn knows(&self, peer: &PeerId) -> bool {
        self.assistants.contains_key(peer)
    }

    /// What `peer` is asked for and has not answered.
    pub fn asked(&self, peer: &PeerId) -> Option<Attempt> {
        self.assistants.get(peer)?.map(|job| job.attempt)
    }

    /// Why `peer` is out, if it is.
    pub fn dismissed(&self, peer: &PeerId) -> Option<&Exclusion> {
        self.dismissed.get(peer)
    }

    /// Who was left out since this was asked last.
    pub fn take_news(&mut self) -> Vec<(PeerId, Exclusion)> {
        std::mem::take(&mut self.news)
    }

    /// Begins a round with `shares` of `step`, the next one where that is the step of the round before; what is left of others is
    /// given up.
    pub fn begin(&mut self, step: u64, shares: usize) {
        if step != self.step {
            self.forget();
        }
        self.step = step;
        self.round += 1;
        self.shares = vec![State::Open; shares];
    }

    /// The answers of this round were taken: none that comes now counts, whoever is found wrong from now on.
    pub fn end(&mut self) {
        let by = |share: State| match share {
            State::Done(by) => by,
            State::Open | State::Taken => None,
        };
        self.believed.extend(std::mem::take(&mut self.shares).into_iter().filter_map(by));
    }

    /// Of this step nothing was taken yet.
    fn forget(&mut self) {
        self.shares.clear();
        self.believed.clear();
        self.doubted = false;
    }

    /// Which time shares are given out.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// What to do at `now_ms`, when this trainer has nothing to do and can compute `own` shares at a time (at least one). It keeps
    /// the first ones for itself, which need not travel; an only one never does.
    pub fn next(&mut self, now_ms: u64, own: usize) -> Next {
        self.leave_out_late(now_ms);
        if self.doubted {
            self.forget();
            return Next::Again;
        }
        let states = self.shares.iter().enumerate();
        let open: Vec<usize> = states.filter(|(_, s)| **s == State::Open).map(|(share, _)| share).collect();
        let idle = self.assistants.iter().find(|(_, job)| job.is_none()).map(|(peer, _)| peer.clone());
        if let (Some(peer), Some(&share)) = (idle, open.get(own.max(1)..).and_then(<[usize]>::last)) {
            let attempt = Attempt { step: self.step, round: self.round, share };
            let until_ms = now_ms.saturating_add(self.config.patience_ms);
            self.shares[share] = State::Taken;
            self.assistants.insert(peer.clone(), Some(Job { attempt, until_ms, late: false }));
            return Next::Ask { peer, attempt };
        }
        if !open.is_empty() {
            let mine: Vec<usize> = open.into_iter().take(own.max(1)).collect();
            mine.iter().for_each(|share| self.shares[*share] = State::Taken);
            return Next::Own(mine);
        }
        let waited = self.assistants.values().flatten().filter(|job| self.is_awaited(job));
        match waited.map(|job| job.until_ms).min() {
            Some(until_ms) => Next::Wait { until_ms },
            None => Next::Done,
        }
    }

    /// A share was computed here.
    pub fn handle_own(&mut self, share: usize) {
        self.shares[share] = State::Done(None);
    }

    /// `peer` answered as it should; true when the answer counts, false when it came too late.
    pub fn handle_answer(&mut self, peer: &PeerId, attempt: Attempt) -> bool {
        let round = self.round;
        let Some(owed) = self.assistants.get_mut(peer) else { return false };
        let Some(job) = owed.take_if(|job| job.attempt == attempt) else { return false };
        if !job.late {
            self.late.remove(peer);
        }
        let missing = |s: &&mut State| attempt.round == round && !matches!(s, State::Done(_));
        let state = self.shares.get_mut(attempt.share).filter(missing);
        state.map(|state| *state = State::Done(Some(peer.clone()))).is_some()
    }

    /// `peer` is left out; its share goes to somebody else. If [`Exclusion::is_false`], so do those of this round that it has answered,
    /// and where answers of an earlier round of this step were taken from it, the step begins again ([`Next::Again`]). Until the
    /// learner is started again, if [`Exclusion::is_final`], even if it has gone already.
    pub fn exclude(&mut self, peer: &PeerId, why: Exclusion) {
        let gone = self.assistants.remove(peer);
        let known = gone.is_some();
        if let Some(job) = gone.flatten().filter(|job| self.is_awaited(job)) {
            self.shares[job.attempt.share] = State::Open;
        }
        if why.is_false() {
            self.doubted |= self.believed.contains(peer);
            let by_peer = |share: &State| matches!(share, State::Done(Some(by)) if by == peer);
            self.shares.iter_mut().filter(|share| by_peer(share)).for_each(|share| *share = State::Open);
        }
        if why.is_final() && !self.dismissed.contains_key(peer) {
            self.dismissed.insert(peer.clone(), why.clone());
        } else if !known {
            return;
        }
        self.tell(peer.clone(), why);
    }

    fn tell(&mut self, peer: PeerId, why: Exclusion) {
        if self.news.len() == NEWS_MAX {
            self.news.remove(0);
        }
        self.news.push((peer, why));
    }

    /// Whether the step waits for it.
    fn is_awaited(&self, job: &Job) -> bool {
        let Attempt { round, share, .. } = job.attempt;
        !job.late && round == self.round && self.shares.get(share) == Some(&State::Taken)
    }

    fn leave_out_late(&mut self, now_ms: u64) {
        let due = |(peer, job): (&PeerId, &Option<Job>)| {
            job.filter(|job| self.is_awaited(job) && now_ms >= job.until_ms).map(|job| (peer.clone(), job))
        };
        let late: Vec<(PeerId, Job)> = self.assistants.iter().filter_map(due).collect();
        for (peer, job) in late {
            let patience_ms = self.config.patience_ms;
            self.tell(peer.clone(), Exclusion::Late { patience_ms });
            self.shares[job.attempt.share] = State::Open;
            let Some(owed) = self.assistants.get_mut(&peer) else { continue };
            *owed = Some(Job { late: true, ..job });
            let late = self.late.entry(peer.clone()).or_default();
            *late += 1;
            let times = *late;
            if times >= self.config.late_at_most {
                self.exclude(&peer, Exclusion::Slow { times });
            }
        }
    }
}
