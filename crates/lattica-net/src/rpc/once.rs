//! Calls run at most once, however often they are sent. A caller whose path died sends its calls again on another one;
//! the receiver knows them by their numbers, runs none twice, and answers those that are done from memory.
//!
//! Pure. What a caller acknowledges, by [`Outgoing::done_below`], is forgotten; so is what passes the limits, and calls that
//! may be among the forgotten are refused, never run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Incarnations of one peer that are told apart. More than one live only while two nodes use one key.
const SESSIONS_MAX: usize = 4;

/// The caller's side: numbers for calls to one peer.
#[derive(Debug)]
pub struct Outgoing {
    next_id: u64,
    open: BTreeSet<u64>,
}

impl Default for Outgoing {
    fn default() -> Self {
        Self { next_id: 1, open: BTreeSet::new() }
    }
}

impl Outgoing {
    /// A number that no other call to the peer has or had.
    pub fn begin(&mut self) -> u64 {
        let call_id = self.next_id;
        self.next_id += 1;
        self.open.insert(call_id);
        call_id
    }

    /// Call `call_id` is over and will not be sent again.
    pub fn end(&mut self, call_id: u64) {
        self.open.remove(&call_id);
    }

    /// Every call with a smaller number is over.
    pub fn done_below(&self) -> u64 {
        self.open.first().copied().unwrap_or(self.next_id)
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
    /// It may have been done and forgotten: refuse it.
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
    /// Calls below that are not in the map are over.
    floor: u64,
    /// `None` while the call runs, then its answer and what that weighs.
    calls: BTreeMap<u64, Option<(A, usize)>>,
    n_answers: usize,
    n_bytes: usize,
}

impl<A: Clone> Once<A> {
    /// Keeps at most `answers_limit` answers of `bytes_limit` bytes in all, for each incarnation of the peer.
    pub fn new(answers_limit: usize, bytes_limit: usize) -> Self {
        Self { sessions: VecDeque::new(), answers_limit, bytes_limit }
    }

    /// A call arrived, whole; its caller is done with all below `done_below`.
    pub fn handle_call(&mut self, incarnation: u64, call_id: u64, done_below: u64) -> Arrival<A> {
        let session = self.session(incarnation);
        session.forget_below(done_below.min(call_id));
        match session.calls.get(&call_id) {
            Some(None) => Arrival::Running,
            Some(Some((answer, _))) => Arrival::Done(answer.clone()),
            None if call_id < session.floor => Arrival::Stale,
            None => {
                session.calls.insert(call_id, None);
                Arrival::New
            }
        }
    }

    /// A running call has its answer, of `n_bytes`. An answer over the limits is forgotten at once.
    pub fn handle_answer(&mut self, incarnation: u64, call_id: u64, answer: A, n_bytes: usize) {
        let (answers_limit, bytes_limit) = (self.answers_limit, self.bytes_limit);
        let Some(session) = self.sessions.iter_mut().find(|s| s.incarnation == incarnation) else { return };
        let Some(slot @ None) = session.calls.get_mut(&call_id) else { return };
        *slot = Some((answer, n_bytes));
        session.n_answers += 1;
        session.n_bytes += n_bytes;
        if call_id < session.floor {
            session.forget_below(session.floor);
        }
        while session.n_answers > answers_limit || session.n_bytes > bytes_limit {
            let Some(oldest) = session.calls.iter().find(|(_, a)| a.is_some()).map(|(id, _)| *id) else {
                break;
            };
            session.forget(oldest);
            session.floor = session.floor.max(oldest + 1);
        }
    }

    /// Forgets every answer; their calls are stale from now on.
    pub fn forget_answers(&mut self) {
        for session in &mut self.sessions {
            let highest = session.calls.iter().rev().find(|(_, a)| a.is_some()).map(|(id, _)| *id);
            if let Some(highest) = highest {
                session.forget_below(highest + 1);
            }
        }
    }

    /// Answers that are kept, and their bytes.
    pub fn kept(&self) -> (usize, usize) {
        self.sessions.iter().fold((0, 0), |(n, bytes), s| (n + s.n_answers, bytes + s.n_bytes))
    }

    fn session(&mut self, incarnation: u64) -> &mut Session<A> {
        let found = self.sessions.iter().position(|s| s.incarnation == incarnation);
        let session = found.and_then(|i| self.sessions.remove(i)).unwrap_or_else(|| Session {
            incarnation,
            floor: 0,
            calls: BTreeMap::new(),
            n_answers: 0,
            n_bytes: 0,
        });
        self.sessions.truncate(SESSIONS_MAX - 1);
        self.sessions.push_front(session);
        self.sessions.front_mut().expect("it was just put there")
    }
}

impl<A> Session<A> {
    fn forget_below(&mut self, floor: u64) {
        self.floor = self.floor.max(floor);
        let over: Vec<u64> =
            self.calls.range(..floor).filter(|(_, answer)| answer.is_some()).map(|(id, _)| *id).collect();
        for call_id in over {
            self.forget(call_id);
        }
    }

    fn forget(&mut self, call_id: u64) {
        if let Some(Some((_, n_bytes))) = self.calls.remove(&call_id) {
            self.n_answers -= 1;
            self.n_bytes -= n_bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone)]
    enum Step {
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
            let (mut caller, mut receiver) = (Outgoing::default(), Once::new(8, 200));
            let mut open: Vec<u64> = Vec::new();
            let mut runs: HashMap<u64, bool> = HashMap::new();
            for step in steps {
                match step {
                    Step::Call => {
                        let id = caller.begin();
                        open.push(id);
                        match receiver.handle_call(1, id, caller.done_below()) {
                            Arrival::New => prop_assert!(runs.insert(id, false).is_none()),
                            other => prop_assert!(false, "{:?} for a fresh call", other),
                        }
                    }
                    Step::Again(i) if !open.is_empty() => {
                        let id = open[i % open.len()];
                        match receiver.handle_call(1, id, caller.done_below()) {
                            Arrival::New => prop_assert!(false, "call {} runs twice", id),
                            Arrival::Running => prop_assert_eq!(runs[&id], false),
                            Arrival::Done(answer) => prop_assert!(runs[&id] && answer == id * 10),
                            Arrival::Stale => prop_assert!(runs[&id]),
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
