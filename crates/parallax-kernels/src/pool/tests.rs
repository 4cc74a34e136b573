//! The pool under repeated, nested, concurrent and panicking runs.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::{run, threads};
use crate::testing::with_threads;

#[test]
fn every_task_runs_exactly_once() {
    for n_threads in [1, 2, 5] {
        with_threads(n_threads, || {
            assert_eq!(threads(), n_threads);
            for n_tasks in [0, 1, 2, 3, 17, 1000] {
                let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
                run(n_tasks, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                let once = counts.iter().all(|c| c.load(Ordering::Relaxed) == 1);
                assert!(once, "{n_tasks} tasks, {n_threads} threads");
            }
        });
    }
}

#[test]
fn many_short_runs_complete() {
    let total = AtomicUsize::new(0);
    with_threads(3, || {
        for _ in 0..20_000 {
            run(4, |i| {
                total.fetch_add(i, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(total.load(Ordering::Relaxed), 20_000 * 6);
}

#[test]
fn a_panic_reaches_the_caller_after_the_other_tasks() {
    let finished = AtomicUsize::new(0);
    let outcome = with_threads(3, || {
        std::panic::catch_unwind(|| {
            run(8, |i| {
                assert!(i != 3, "task three");
                finished.fetch_add(1, Ordering::Relaxed);
            });
        })
    });
    let payload = outcome.expect_err("the panic must propagate");
    assert_eq!(payload.downcast_ref::<&str>(), Some(&"task three"));
    assert_eq!(finished.load(Ordering::Relaxed), 7);
    // The pool is usable afterwards.
    run(8, |_| {
        finished.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(finished.load(Ordering::Relaxed), 15);
}

#[test]
fn a_nested_run_is_executed_in_place() {
    let total = AtomicUsize::new(0);
    with_threads(3, || {
        run(6, |_| {
            let here = std::thread::current().id();
            run(5, |_| {
                assert_eq!(std::thread::current().id(), here);
                total.fetch_add(1, Ordering::Relaxed);
            });
        });
    });
    assert_eq!(total.load(Ordering::Relaxed), 30);
}

#[test]
fn callers_from_several_threads_take_turns() {
    let total = AtomicUsize::new(0);
    with_threads(2, || {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        run(3, |_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
    });
    assert_eq!(total.load(Ordering::Relaxed), 4 * 500 * 3);
}

#[test]
fn idle_workers_park() {
    with_threads(3, || {
        run(64, |_| {});
        // Nothing is published while the lock is held; each worker gives up after its spins and goes to sleep.
        let workers = super::lock(&super::pool().workers);
        assert!(!workers.is_empty());
        for worker in workers.iter() {
            let mut waits = 0u64;
            while !worker.asleep.load(Ordering::SeqCst) {
                std::thread::yield_now();
                waits += 1;
                assert!(waits < 1 << 32, "a worker keeps spinning");
            }
        }
    });
}
