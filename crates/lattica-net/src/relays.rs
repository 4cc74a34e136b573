//! At which relays a node keeps slots: a few, the nearest ones, and another at once when one is lost. Pure: time is an
//! argument; `R` names a relay.

use std::time::Duration;

/// Relays that are remembered.
pub const CANDIDATES_MAX: usize = 32;
/// Pause after the first vain try at a relay; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Chooses relays. Call [`RelayPlan::next`] at every tick and tell it what became of each try.
#[derive(Debug, Clone)]
pub struct RelayPlan<R> {
    slots: usize,
    candidates: Vec<Candidate<R>>,
}

#[derive(Debug, Clone)]
struct Candidate<R> {
    relay: R,
    state: State,
    try_at: Duration,
    pause: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Asked,
    Held,
}

impl<R: Clone + PartialEq> RelayPlan<R> {
    /// Keeps `slots` slots. With none, no relay is ever asked.
    pub fn new(slots: usize) -> Self {
        Self { slots, candidates: Vec::new() }
    }

    /// A relay is known; the first ones named are tried first while nothing is measured. Beyond 32 none is added.
    /// Whether it is remembered now.
    pub fn add(&mut self, relay: R) -> bool {
        let known = self.candidates.iter().any(|c| c.relay == relay);
        let room = self.candidates.len() < CANDIDATES_MAX;
        if !known && room {
            self.candidates.push(Candidate {
                relay,
                state: State::Idle,
                try_at: Duration::ZERO,
                pause: FIRST_PAUSE,
            });
        }
        known || room
    }

    /// The relay to ask for a slot now, which counts as asked from then on. `None` when there are slots enough, kept or on
    /// their way, or nobody can be asked yet. `rtt` is the round trip to a relay, as far as it is known.
    pub fn next(&mut self, now: Duration, rtt: impl Fn(&R) -> Option<Duration>) -> Option<R> {
        let taken = self.candidates.iter().filter(|c| c.state != State::Idle).count();
        if taken >= self.slots {
            return None;
        }
        let ready = self.candidates.iter_mut().filter(|c| c.state == State::Idle && c.try_at <= now);
        // Those that failed least, then the nearest; `min_by_key` takes the first of equals.
        let chosen = ready.min_by_key(|c| (c.pause, rtt(&c.relay).unwrap_or(Duration::MAX)))?;
        chosen.state = State::Asked;
        Some(chosen.relay.clone())
    }

    /// The relay keeps a slot for us.
    pub fn handle_held(&mut self, relay: &R) {
        if let Some(candidate) = self.find(relay) {
            candidate.state = State::Held;
            candidate.pause = FIRST_PAUSE;
        }
    }

    /// There is no slot, or none any more.
    pub fn handle_lost(&mut self, relay: &R, now: Duration) {
        if let Some(candidate) = self.find(relay) {
            candidate.state = State::Idle;
            candidate.try_at = now + candidate.pause;
            candidate.pause = (candidate.pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Relays that keep a slot.
    pub fn held(&self) -> Vec<R> {
        self.candidates.iter().filter(|c| c.state == State::Held).map(|c| c.relay.clone()).collect()
    }

    fn find(&mut self, relay: &R) -> Option<&mut Candidate<R>> {
        self.candidates.iter_mut().find(|c| c.relay == *relay)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn unknown(_: &u32) -> Option<Duration> {
        None
    }

    fn plan(relays: u32) -> RelayPlan<u32> {
        let mut plan = RelayPlan::new(2);
        for relay in 0..relays {
            plan.add(relay);
        }
        plan
    }

    #[test]
    fn the_two_nearest_are_asked_and_no_more() {
        let mut plan = plan(4);
        let rtt = |relay: &u32| Some((100 - relay * 10) * MS);
        assert_eq!((plan.next(MS, rtt), plan.next(MS, rtt), plan.next(MS, rtt)), (Some(3), Some(2), None));
        plan.handle_held(&3);
        plan.handle_held(&2);
        assert_eq!((plan.held(), plan.next(MS, unknown)), (vec![2, 3], None));
    }

    #[test]
    fn unmeasured_relays_are_asked_in_the_order_of_their_naming() {
        let mut plan = plan(3);
        assert_eq!((plan.next(MS, unknown), plan.next(MS, unknown)), (Some(0), Some(1)));
    }

    #[test]
    fn a_lost_slot_is_replaced_at_once_by_another_relay() {
        let mut plan = plan(3);
        for _ in 0..2 {
            let relay = plan.next(MS, unknown).unwrap();
            plan.handle_held(&relay);
        }
        plan.handle_lost(&0, 1000 * MS);
        assert_eq!(plan.next(1000 * MS, unknown), Some(2));
        // The lost one is only asked again when it is needed, and after a pause.
        plan.handle_lost(&2, 1000 * MS);
        assert_eq!(plan.next(1000 * MS, unknown), None);
        assert!(plan.next(1500 * MS, unknown).is_some());
    }

    #[test]
    fn a_relay_that_always_refuses_is_asked_ever_more_rarely() {
        let mut plan = plan(1);
        let mut tries = 0;
        for step in 0..(600_000 / 250) {
            let now = step * 250 * MS;
            if plan.next(now, unknown).is_some() {
                tries += 1;
                plan.handle_lost(&0, now);
            }
        }
        // 0.5 + 1 + 2 + 4 + 8 + 16 s, then every 30 s of ten minutes.
        assert!((20..=30).contains(&tries), "{tries}");
    }

    proptest! {
        // Whatever happens, never more slots are kept or asked for than wanted, and with enough willing relays never fewer for long.
        #[test]
        fn slots_are_never_exceeded(events in proptest::collection::vec((0u32..6, any::<bool>()), 0..200)) {
            let mut plan = plan(6);
            let mut taken: Vec<u32> = Vec::new();
            for (i, (relay, lost)) in events.into_iter().enumerate() {
                let now = i as u32 * 250 * MS;
                while let Some(asked) = plan.next(now, unknown) {
                    prop_assert!(!taken.contains(&asked));
                    taken.push(asked);
                }
                prop_assert!(taken.len() <= 2);
                if taken.contains(&relay) {
                    if lost {
                        plan.handle_lost(&relay, now);
                        taken.retain(|t| *t != relay);
                    } else {
                        plan.handle_held(&relay);
                    }
                }
            }
            let late = Duration::from_secs(600);
            while let Some(asked) = plan.next(late, unknown) {
                taken.push(asked);
            }
            prop_assert_eq!(taken.len(), 2);
        }
    }
}
