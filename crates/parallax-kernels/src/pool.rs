//! The process-wide fork-join pool: spins briefly between kernels, then parks, so an idle process uses no CPU.
//!
//! A run is published as one ticket word, `epoch << 24 | next task`. Workers claim a task by compare-and-swap on the
//! whole word, so a late worker can never touch a finished run, and the caller never waits for a worker that is asleep:
//! it waits only for tasks that were claimed. Which thread runs which task never changes a result.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, Thread};

/// Most threads that a pool will ever use.
pub const MAX_THREADS: usize = 256;

/// Bits of the ticket that count tasks.
const TASK_BITS: u32 = 24;
/// Task index of a ticket that hands out nothing.
const CLOSED: u64 = (1 << TASK_BITS) - 1;
/// Pauses before a worker parks; tens of microseconds, longer than the gaps between the kernels of one step.
const WORKER_SPINS: u32 = 2_000;
/// Pauses before the caller of a run parks while it waits for the last claimed tasks; longer than any task should take
/// unless its thread has lost its core, in which case spinning would only keep it from getting one back.
const CALLER_SPINS: u32 = 4_000;

thread_local! {
    /// True while this thread executes a task: a nested run is then executed in place.
    static IN_TASK: Cell<bool> = const { Cell::new(false) };
}

/// Calls `task(i)` for every `i` in `0..n_tasks`, spread over the pool's threads, and returns when all are done.
///
/// A run inside a task is executed on the spot by the same thread. Two threads that call at once take turns.
///
/// # Panics
/// When a task panics, with the payload of the first panic, after every other task has finished. Also when `n_tasks`
/// reaches 2^24 - 1.
pub fn run<F: Fn(usize) + Sync>(n_tasks: usize, task: F) {
    let pool = pool();
    let threads = pool.active.load(Ordering::Relaxed);
    if n_tasks <= 1 || threads <= 1 || IN_TASK.get() {
        for i in 0..n_tasks {
            task(i);
        }
        return;
    }
    pool.run(n_tasks, threads, &task);
}

/// Sets how many threads, the caller included, take part in later runs; clamped to 1..=[`MAX_THREADS`].
///
/// May be called before and after the first run. Results do not depend on it.
pub fn set_threads(n: usize) {
    pool().active.store(n.clamp(1, MAX_THREADS), Ordering::Relaxed);
}

/// Threads, the caller included, that take part in a run. The default is the machine's available parallelism.
pub fn threads() -> usize {
    pool().active.load(Ordering::Relaxed)
}

/// One run, on the stack of its caller; alive until `remaining` is zero.
struct Job<'a> {
    task: &'a (dyn Fn(usize) + Sync),
    n_tasks: u64,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

impl Job<'_> {
    fn execute(&self, index: usize) {
        let outer = IN_TASK.replace(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.task)(index)));
        IN_TASK.set(outer);
        if let Err(payload) = outcome {
            lock(&self.panic).get_or_insert(payload);
        }
    }
}

/// What the caller and the workers share.
struct Shared {
    ticket: AtomicU64,
    /// The current run; may only be dereferenced by a thread that holds a claimed task of it.
    job: AtomicPtr<Job<'static>>,
    /// Tasks in the current run; read without a claim to see whether a claim is worth trying.
    n_tasks: AtomicU64,
    remaining: AtomicU64,
    caller_waits: AtomicBool,
    done: (Mutex<()>, Condvar),
}

/// A worker as the caller sees it.
struct Worker {
    thread: Thread,
    asleep: Arc<AtomicBool>,
}

struct Pool {
    active: AtomicUsize,
    shared: Arc<Shared>,
    /// Also serialises the callers.
    workers: Mutex<Vec<Worker>>,
}

fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| {
        let default = thread::available_parallelism().map_or(1, usize::from);
        Pool {
            active: AtomicUsize::new(default.min(MAX_THREADS)),
            shared: Arc::new(Shared {
                ticket: AtomicU64::new(CLOSED),
                job: AtomicPtr::new(std::ptr::null_mut()),
                n_tasks: AtomicU64::new(0),
                remaining: AtomicU64::new(0),
                caller_waits: AtomicBool::new(false),
                done: (Mutex::new(()), Condvar::new()),
            }),
            workers: Mutex::new(Vec::new()),
        }
    })
}

impl Pool {
    fn run(&self, n_tasks: usize, threads: usize, task: &(dyn Fn(usize) + Sync)) {
        assert!((n_tasks as u64) < CLOSED, "pool::run: {n_tasks} tasks are too many for one run");
        let job = Job { task, n_tasks: n_tasks as u64, panic: Mutex::new(None) };
        let mut workers = lock(&self.workers);
        self.grow(&mut workers, threads - 1);
        let shared = &*self.shared;
        let epoch = (shared.ticket.load(Ordering::Relaxed) >> TASK_BITS) + 1;
        // Close the ticket before the description of the run changes: a worker that reads the new description
        // together with the old ticket then fails its claim.
        shared.ticket.store(epoch << TASK_BITS | CLOSED, Ordering::SeqCst);
        shared.job.store((&raw const job).cast_mut().cast(), Ordering::Release);
        shared.n_tasks.store(job.n_tasks, Ordering::Release);
        shared.remaining.store(job.n_tasks, Ordering::Release);
        shared.ticket.store(epoch << TASK_BITS, Ordering::SeqCst);
        for worker in workers.iter().take((threads - 1).min(n_tasks - 1)) {
            if worker.asleep.swap(false, Ordering::SeqCst) {
                worker.thread.unpark();
            }
        }
        while shared.work_once() {}
        shared.wait_for_claimed_tasks();
        drop(workers);
        let panic = lock(&job.panic).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Makes sure that `wanted` workers exist. A thread that the system refuses is simply missing: the run still
    /// completes, on fewer threads.
    fn grow(&self, workers: &mut Vec<Worker>, wanted: usize) {
        while workers.len() < wanted {
            let shared = Arc::clone(&self.shared);
            let asleep = Arc::new(AtomicBool::new(false));
            let flag = Arc::clone(&asleep);
            let name = format!("kernels-{}", workers.len() + 1);
            let Ok(handle) = thread::Builder::new().name(name).spawn(move || shared.work_forever(&flag))
            else {
                return;
            };
            workers.push(Worker { thread: handle.thread().clone(), asleep });
        }
    }
}

impl Shared {
    /// Claims one task and executes it; false when there is nothing to claim.
    fn work_once(&self) -> bool {
        let ticket = self.ticket.load(Ordering::Acquire);
        let n_tasks = self.n_tasks.load(Ordering::Acquire);
        let job = self.job.load(Ordering::Acquire);
        let index = ticket & CLOSED;
        if index >= n_tasks || index == CLOSED {
            return false;
        }
        if self.ticket.compare_exchange(ticket, ticket + 1, Ordering::SeqCst, Ordering::Relaxed).is_err() {
            // Somebody else took it; there may be more.
            return true;
        }
        // SAFETY: the claim succeeded, so the run of this ticket is still open and `job` belongs to it (the ticket is
        // closed before `job` changes); its caller keeps it alive until the `remaining` of this task is counted down.
        let job = unsafe { &*job };
        debug_assert!(index < job.n_tasks);
        job.execute(index as usize);
        if self.remaining.fetch_sub(1, Ordering::SeqCst) == 1 && self.caller_waits.load(Ordering::SeqCst) {
            drop(lock(&self.done.0));
            self.done.1.notify_all();
        }
        true
    }

    fn wait_for_claimed_tasks(&self) {
        for _ in 0..CALLER_SPINS {
            if self.remaining.load(Ordering::Acquire) == 0 {
                return;
            }
            std::hint::spin_loop();
        }
        self.caller_waits.store(true, Ordering::SeqCst);
        let mut guard = lock(&self.done.0);
        while self.remaining.load(Ordering::SeqCst) != 0 {
            guard = self.done.1.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        self.caller_waits.store(false, Ordering::SeqCst);
    }

    fn work_forever(&self, asleep: &AtomicBool) {
        let mut idle = 0;
        loop {
            if self.work_once() {
                idle = 0;
                continue;
            }
            idle += 1;
            if idle < WORKER_SPINS {
                std::hint::spin_loop();
                continue;
            }
            asleep.store(true, Ordering::SeqCst);
            let open = self.ticket.load(Ordering::SeqCst) & CLOSED;
            if open < self.n_tasks.load(Ordering::SeqCst) {
                asleep.store(false, Ordering::SeqCst);
            } else {
                // A caller that publishes from here on sees the flag and unparks; spurious wake-ups only spin.
                thread::park();
                asleep.store(false, Ordering::SeqCst);
            }
            idle = 0;
        }
    }
}

/// A lock whose poisoning means nothing: the guarded data is replaced whole or not at all.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
