//! Calls run at most once, however often they are sent. A caller whose path died sends its calls again on another one;
//! the receiver knows them by their numbers, runs none twice, and answers those that are done from memory.
//!
//! Pure. What a caller acknowledges, by [`Outgoing::done_below`], is forgotten; so is what passes the limits, and calls that
//! are among the forgotten are refused, never run. A call may come long after younger ones: its number is taken before it waits
//! for a place.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Incarnations of one peer that are told apart. More than one live only while two nodes use one key.
const SESSIONS_MAX: usize = 4;
/// Runs of forgotten calls that are told apart. Between two runs lie calls that their caller still has open, so an honest
/// caller has no more of them than it may have calls under way.
const RUNS_MAX: usize = 4096;

/// The caller's side: which numbers are open at one peer. The numbers themselves come from one counter for all peers, so
/// that a peer that was forgotten and met again is not given the same number twice.
#[derive(Debug, Default)]
pub struct Outgoing {
    highest: u64,
    open: BTreeSet<u64>,
}

impl Outgoing {
    /// Call `call_id` begins. Numbers only grow.
    pub fn begin(&mut self, call_id: u64) {
        debug_assert!(call_id > self.highest, "numbers grow");
        self.highest = call_id;
        self.open.insert(call_id);
    }

    /// Call `call_id` is over and will not be sent again.
    pub fn end(&mut self, call_id: u64) {
        self.open.remove(&call_id);
    }

    /// Every call with a smaller number is over.
    pub fn done_below(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.highest + 1)
    }
}

/// What a call that arrives is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrival<A> {
    /// Not seen before: run it. It counts as running from now on.
    New,
    /// It runs: send its answer to where it came from this time.
    Running,
    /// It is done: send this answer again.
    Done(A),
    /// It was done and is forgotten: refuse it.
    Stale,
}

/// The receiver's side: the calls of one peer. `A` is an answer.
#[derive(Debug)]
pub struct Once<A> {
    /// The last used first.
    sessions: VecDeque<Session<A>>,
    answers_limit: usize,
    bytes_limit: usize,
}

#[derive(Debug)]
struct Session<A> {
    incarnation: u64,
    /// Calls below that are not running are over.
    floor: u64,
    running: BTreeSet<u64>,
    /// Answers and what they weigh.
    answers: BTreeMap<u64, (A, usize)>,
    n_bytes: usize,
    /// Calls that were done and whose answers were given up.
    forgotten: Runs,
}

impl<A: Clone> Once<A> {
    /// Keeps at most `answers_limit` answers of `bytes_limit` bytes in all, for each incarnation of the peer.
    pub fn new(answers_limit: usize, bytes_limit: usize) -> Self {
        Self { sessions: VecDeque::new(), answers_limit, bytes_limit }
    }

    /// A call arrived whose caller is done with all below `done_below`. A call that is new is not entered.
    pub fn look(&mut self, incarnation: u64, call_id: u64, done_below: u64) -> Arrival<A> {
        let session = self.session(incarnation);
        session.forget_below(done_below.min(call_id));
        if session.running.contains(&call_id) {
            Arrival::Running
        } else if let Some((answer, _)) = session.answers.get(&call_id) {
            Arrival::Done(answer.clone())
        } else if call_id < session.floor || session.forgotten.contains(call_id) {
            Arrival::Stale
        } else {
            Arrival::New
        }
    }

    /// As [`Once::look`]; a new call counts as running from now on.
    pub fn handle_call(&mut self, incarnation: u64, call_id: u64, done_below: u64) -> Arrival<A> {
        let arrival = self.look(incarnation, call_id, done_below);
        if matches!(arrival, Arrival::New) {
            self.session(incarnation).running.insert(call_id);
        }
        arrival
    }

    /// A running call has its answer, of `n_bytes`. An answer over the limits is forgotten at once.
    pub fn handle_answer(&mut self, incarnation: u64, call_id: u64, answer: A, n_bytes: usize) {
        let (answers_limit, bytes_limit) = (self.answers_limit, self.bytes_limit);
        let Some(session) = self.sessions.iter_mut().find(|s| s.incarnation == incarnation) else { return };
        if !session.running.remove(&call_id) || call_id < session.floor {
            return;
        }
        session.answers.insert(call_id, (answer, n_bytes));
        session.n_bytes += n_bytes;
        while session.answers.len() > answers_limit || session.n_bytes > bytes_limit {
            session.forget_oldest();
        }
    }

    /// Forgets every answer; their calls are stale from now on, those that never came are not.
    pub fn forget_answers(&mut self) {
        for session in &mut self.sessions {
            while !session.answers.is_empty() {
                session.forget_oldest();
            }
        }
    }

    /// Answers that are kept, and their bytes.
    pub fn kept(&self) -> (usize, usize) {
        self.sessions.iter().fold((0, 0), |(n, bytes), s| (n + s.answers.len(), bytes + s.n_bytes))
    }

    fn session(&mut self, incarnation: u64) -> &mut Session<A> {
        let found = self.sessions.iter().position(|s| s.incarnation == incarnation);
        let session = found.and_then(|i| self.sessions.remove(i)).unwrap_or_else(|| Session {
            incarnation,
            floor: 0,
            running: BTreeSet::new(),
            answers: BTreeMap::new(),
            n_bytes: 0,
            forgotten: Runs::default(),
        });
        self.sessions.truncate(SESSIONS_MAX - 1);
        self.sessions.push_front(session);
        self.sessions.front_mut().expect("it was just put there")
    }
}

impl<A> Session<A> {
    fn forget_below(&mut self, floor: u64) {
        if floor <= self.floor {
            return;
        }
        self.floor = floor;
        while let Some(entry) = self.answers.first_entry().filter(|e| *e.key() < floor) {
            self.n_bytes -= entry.remove().1;
        }
        self.forgotten.remove_below(floor);
    }

    fn forget_oldest(&mut self) {
        let Some((call_id, (_, n_bytes))) = self.answers.pop_first() else { return };
        self.n_bytes -= n_bytes;
        self.forgotten.insert(call_id);
        if let Some(end) = self.forgotten.first_end().filter(|_| self.forgotten.len() > RUNS_MAX) {
            self.forget_below(end);
        }
    }
}

/// Numbers as runs without gaps: start and end (half-open) of each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Runs(BTreeMap<u64, u64>);

impl Runs {
    fn contains(&self, number: u64) -> bool {
        self.0.range(..=number).next_back().is_some_and(|(_, end)| number < *end)
    }

    fn insert(&mut self, number: u64) {
        if self.contains(number) {
            return;
        }
        // Call u64::MAX ends where it begins to count as one more run; it has no successor to be told apart from.
        let after = number.saturating_add(1);
        let end = self.0.remove(&after).unwrap_or(after);
        match self.0.range_mut(..number).next_back().filter(|(_, e)| **e == number) {
            Some((_, before)) => *before = end,
            None => drop(self.0.insert(number, end)),
        }
    }

    fn remove_below(&mut self, floor: u64) {
        while let Some((start, end)) =
            self.0.first_key_value().map(|(s, e)| (*s, *e)).filter(|(s, _)| *s < floor)
        {
            self.0.remove(&start);
            if end > floor {
                self.0.insert(floor, end);
            }
        }
    }

    fn first_end(&self) -> Option<u64> {
        self.0.first_key_value().map(|(_, end)| *end)
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
        /// The caller takes a number, for a call that it sends later.
        Begin,
        /// The caller begins a call and sends it.
        Call,
        /// A call that is open is sent again.
        Again(usize),
        /// A running call is finished.
        Finish(usize, usize),
        /// The caller gets an answer.
        Answered(usize),
        /// Everything is forgotten.
        Forget,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => Just(Step::Begin),
            6 => Just(Step::Call),
            5 => any::<usize>().prop_map(Step::Again),
            5 => (any::<usize>(), 0usize..60).prop_map(|(i, n)| Step::Finish(i, n)),
            4 => any::<usize>().prop_map(Step::Answered),
            1 => Just(Step::Forget),
        ];
        proptest::collection::vec(step, 0..200)
    }

    proptest! {
        // Against a model that remembers every call for ever: none runs twice, answers are the right ones, memory is bounded.
        #[test]
        fn no_call_runs_twice(steps in steps()) {
            let (mut caller, mut receiver, mut next) = (Outgoing::default(), Once::new(8, 200), 0);
            let mut open: Vec<u64> = Vec::new();
            let mut runs: HashMap<u64, bool> = HashMap::new();
            for step in steps {
                match step {
                    Step::Begin => {
                        next += 1;
                        caller.begin(next);
                        open.push(next);
                    }
                    Step::Call => {
                        next += 1;
                        let id = next;
                        caller.begin(id);
                        open.push(id);
                        match receiver.handle_call(1, id, caller.done_below()) {
                            Arrival::New => prop_assert!(runs.insert(id, false).is_none()),
                            other => prop_assert!(false, "{:?} for a fresh call", other),
                        }
                    }
                    Step::Again(i) if !open.is_empty() => {
                        let id = open[i % open.len()];
                        match receiver.handle_call(1, id, caller.done_below()) {
                            Arrival::New => prop_assert!(runs.insert(id, false).is_none(), "call {} runs twice", id),
                            Arrival::Running => prop_assert_eq!(runs.get(&id), Some(&false)),
                            Arrival::Done(answer) => prop_assert!(runs.get(&id) == Some(&true) && answer == id * 10),
                            // Also never for a call that was not delivered before.
                            Arrival::Stale => prop_assert_eq!(runs.get(&id), Some(&true)),
                        }
                    }
                    Step::Finish(i, n_bytes) => {
                        let mut running: Vec<u64> = runs.iter().filter(|(_, done)| !**done).map(|(id, _)| *id).collect();
                        running.sort_unstable();
                        if !running.is_empty() {
                            let id = running[i % running.len()];
                            receiver.handle_answer(1, id, id * 10, n_bytes);
                            runs.insert(id, true);
                        }
                    }
                    Step::Answered(i) if !open.is_empty() => {
                        let id = open.swap_remove(i % open.len());
                        caller.end(id);
                    }
                    Step::Forget => receiver.forget_answers(),
                    Step::Again(_) | Step::Answered(_) => {}
                }
                let (answers, n_bytes) = receiver.kept();
                prop_assert!(answers <= 8 && n_bytes <= 200);
            }
        }
    }

    proptest! {
        #[test]
        fn runs_are_a_set_of_numbers(steps in proptest::collection::vec((any::<bool>(), 0u64..60), 0..120)) {
            let (mut runs, mut set) = (Runs::default(), BTreeSet::new());
            for (add, number) in steps {
                if add {
                    runs.insert(number);
                    set.insert(number);
                } else {
                    let floor = number / 4;
                    runs.remove_below(floor);
                    set.retain(|n| *n >= floor);
                }
                for n in 0..61 {
                    prop_assert_eq!(runs.contains(n), set.contains(&n));
                }
                let gaps = set.iter().filter(|n| !set.contains(&(**n + 1))).count();
                prop_assert_eq!(runs.len(), gaps);
            }
        }
    }

    #[test]
    fn a_call_that_waited_at_its_caller_runs_however_many_were_forgotten_meanwhile() {
        let mut receiver = Once::new(2, 1000);
        for id in 10..20_000 {
            assert_eq!(receiver.handle_call(1, id, 9), Arrival::New);
            receiver.handle_answer(1, id, (), 0);
        }
        assert_eq!(receiver.handle_call(1, 10, 9), Arrival::Stale);
        assert_eq!(receiver.handle_call(1, 9, 9), Arrival::New);
    }

    // A hostile caller leaves every second number out: what is remembered of it stays bounded.
    #[test]
    fn gaps_without_end_take_no_memory_without_end() {
        let mut receiver = Once::new(2, 1000);
        for id in 0..3 * RUNS_MAX as u64 {
            receiver.handle_call(1, id * 2 + 1, 0);
            receiver.handle_answer(1, id * 2 + 1, (), 0);
        }
        assert!(receiver.sessions[0].forgotten.len() <= RUNS_MAX);
    }

    #[test]
    fn an_open_call_is_answered_again_until_it_is_acknowledged() {
        let mut receiver = Once::new(8, 1000);
        assert_eq!(receiver.handle_call(1, 1, 1), Arrival::New);
        assert_eq!(receiver.handle_call(1, 1, 1), Arrival::Running);
        receiver.handle_answer(1, 1, "one", 3);
        assert_eq!(receiver.handle_call(1, 1, 1), Arrival::Done("one"));
        assert_eq!(receiver.handle_call(1, 2, 2), Arrival::New);
        assert_eq!((receiver.kept(), receiver.handle_call(1, 1, 1)), ((0, 0), Arrival::Stale));
    }

    #[test]
    fn another_incarnation_has_numbers_of_its_own() {
        let mut receiver = Once::new(8, 1000);
        assert_eq!(receiver.handle_call(1, 1, 1), Arrival::New);
        receiver.handle_answer(1, 1, "old", 3);
        assert_eq!(receiver.handle_call(2, 1, 1), Arrival::New);
        assert_eq!(receiver.handle_call(1, 1, 1), Arrival::Done("old"));
        for incarnation in 3..100 {
            receiver.handle_call(incarnation, 1, 1);
        }
        assert!(receiver.sessions.len() <= SESSIONS_MAX);
    }

    // A hostile caller names a floor above its own call: the call itself still counts.
    #[test]
    fn a_floor_never_passes_the_call_that_names_it() {
        let mut receiver = Once::new(8, 1000);
        assert_eq!(receiver.handle_call(1, 5, u64::MAX), Arrival::New);
        receiver.handle_answer(1, 5, (), 0);
        assert_eq!(receiver.handle_call(1, 5, u64::MAX), Arrival::Done(()));
    }
}
