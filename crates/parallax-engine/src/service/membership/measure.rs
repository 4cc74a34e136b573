//! How fast this machine reads memory: the prior for the time of a layer before the first real step is measured.

use std::time::Instant;

/// Bytes that every thread reads; far more than its share of the caches.
const BYTES_PER_THREAD: usize = 32 << 20;
/// The best of this many passes counts: others may use the machine, too.
const PASSES: usize = 3;

/// Gigabytes per second with all threads reading. Takes some tens of milliseconds.
pub fn bandwidth_gbps() -> f64 {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(64);
    let buffers: Vec<Vec<u64>> = (0..threads).map(|i| vec![i as u64; BYTES_PER_THREAD / 8]).collect();
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for buffer in &buffers {
                scope.spawn(move || std::hint::black_box(sum(buffer)));
            }
        });
        best = best.min(started.elapsed().as_secs_f64());
    }
    (threads * BYTES_PER_THREAD) as f64 / best.max(1e-9) / 1e9
}

/// Eight chains, so that the additions do not wait for each other.
fn sum(values: &[u64]) -> u64 {
    let mut sums = [0u64; 8];
    for chunk in values.as_chunks::<8>().0 {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_measurement_is_a_plausible_speed() {
        let gbps = bandwidth_gbps();
        assert!((0.05..100_000.0).contains(&gbps), "{gbps}");
        assert_eq!(sum(&[1; 24]), 24);
    }
}
