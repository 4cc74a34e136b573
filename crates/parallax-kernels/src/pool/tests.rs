//! The pool under repeated, nested, concurrent and panicking runs.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{run, set_threads, threads};

/// The thread count is process-wide; tests that set it take turns.
static THREADS: Mutex<()> = Mutex::new(());

#[test]
fn every_task_runs_exactly_once() {
    let _turn = super::lock(&THREADS);
    for n_threads in [1, 2, 5] {
        set_threads(n_threads);
        for n_tasks in [0, 1, 2, 3, 17, 1000] {
            let counts: Vec<AtomicUsize> = (0..n_tasks).map(|_| AtomicUsize::new(0)).collect();
            run(n_tasks, |i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                counts.iter().all(|c| c.load(Ordering::Relaxed) == 1),
                "{n_tasks} tasks, {n_threads} threads"
            );
        }
    }
    set_threads(2);
    assert_eq!(threads(), 2);
}

#[test]
fn many_short_runs_complete() {
    let _turn = super::lock(&THREADS);
    set_threads(3);
    let total = AtomicUsize::new(0);
    for _ in 0..20_000 {
        run(4, |i| {
            total.fetch_add(i, Ordering::Relaxed);
        });
    }
    assert_eq!(total.load(Ordering::Relaxed), 20_000 * 6);
}

#[test]
fn a_panic_reaches_the_caller_after_the_other_tasks() {
    let _turn = super::lock(&THREADS);
    set_threads(3);
    let finished = AtomicUsize::new(0);
    let outcome = std::panic::catch_unwind(|| {
        run(8, |i| {
            assert!(i != 3, "task three");
            finished.fetch_add(1, Ordering::Relaxed);
        });
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
    let _turn = super::lock(&THREADS);
    set_threads(3);
    let total = AtomicUsize::new(0);
    run(6, |_| {
        run(5, |_| {
            total.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(total.load(Ordering::Relaxed), 30);
}

#[test]
fn callers_from_several_threads_take_turns() {
    let _turn = super::lock(&THREADS);
    set_threads(2);
    let total = AtomicUsize::new(0);
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
    assert_eq!(total.load(Ordering::Relaxed), 4 * 500 * 3);
}
