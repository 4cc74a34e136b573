//! How a worker gets to its trainer: whoever does not answer is tried again, with growing pauses, for a while.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use lattica_net::{CallError, DialError, Node};
use swarm_wire::PeerId;

use crate::{network, program};

/// Pause after the first vain try; it doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// How long to wait after `failed` vain tries (at least 1), `elapsed` after the first was begun; `None` once `patience` is
/// over. The last try is made when it ends.
fn pause_after(failed: u32, elapsed: Duration, patience: Duration) -> Option<Duration> {
    let left = patience.checked_sub(elapsed).filter(|left| !left.is_zero())?;
    let doublings = failed.saturating_sub(1).min(16);
    Some((FIRST_PAUSE * 2u32.pow(doublings)).min(LONGEST_PAUSE).min(left))
}

/// Whether the same try can end better later: nobody there, or a member of our swarm that went away just now.
fn may_pass(error: &anyhow::Error) -> bool {
    let silent = |dial: &DialError| matches!(dial, DialError::Unreachable { .. } | DialError::Timeout { .. });
    error.downcast_ref().is_some_and(silent) || error.is::<CallError>()
}

/// Dials the trainer at `address`, again and again for `patience`, and says so.
///
/// # Errors
/// Nobody answers there in that time; at once: an address that is none, another peer or another swarm at it, a private
/// swarm without its key.
pub(crate) async fn reach(node: &Node, address: &str, patience: Duration) -> anyhow::Result<PeerId> {
    let began = Instant::now();
    let mut failed = 0;
    loop {
        let error = match network::contact(node, address).await {
            Ok(peer) => return Ok(peer),
            Err(error) => error,
        };
        if !may_pass(&error) {
            return Err(error).with_context(|| format!("trainer {address}"));
        }
        failed += 1;
        let elapsed = began.elapsed();
        let Some(pause) = pause_after(failed, elapsed, patience) else {
            anyhow::bail!(
                "no trainer answers at {address} (tries: {failed}, {:.0} s): {error}; start it, give the address that \
                 it says when it is ready as --trainer, or wait longer with --patience-s",
                elapsed.as_secs_f64()
            );
        };
        program::say(&format!(
            "trainer {address} does not answer; next try in {:.2} s, for {:.0} s at most",
            pause.as_secs_f64(),
            patience.saturating_sub(elapsed).as_secs_f64()
        ));
        tracing::debug!(%error, failed, "trainer not reached");
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// When tries are begun that take `dial` each and all fail, and when the last has failed.
    fn tries(dial: Duration, patience: Duration) -> (Vec<Duration>, Duration) {
        let (mut now, mut begun) = (Duration::ZERO, Vec::new());
        loop {
            begun.push(now);
            now += dial;
            match pause_after(u32::try_from(begun.len()).unwrap(), now, patience) {
                Some(pause) => now += pause,
                None => return (begun, now),
            }
        }
    }

    #[test]
    fn pauses_grow_to_a_bound_and_the_last_try_is_made_when_patience_ends() {
        let minute = Duration::from_secs(60);
        let (begun, ended) = tries(Duration::ZERO, minute);
        let pauses: Vec<u128> = begun.windows(2).map(|w| (w[1] - w[0]).as_millis()).collect();
        assert_eq!(pauses[..7], [250, 500, 1000, 2000, 4000, 5000, 5000]);
        assert!(pauses.iter().all(|p| *p <= 5000) && pauses.len() < 20, "{pauses:?}");
        assert_eq!((begun.last(), ended), (Some(&minute), minute));
        assert_eq!(pause_after(u32::MAX, Duration::ZERO, minute), Some(LONGEST_PAUSE));
    }

    #[test]
    fn slow_tries_end_one_try_after_the_patience_at_most_and_without_patience_there_is_one() {
        let (dial, patience) = (Duration::from_secs(10), Duration::from_secs(25));
        let (begun, ended) = tries(dial, patience);
        assert!(ended <= patience + dial && *begun.last().unwrap() <= patience, "{begun:?} {ended:?}");
        assert_eq!(tries(dial, Duration::ZERO).0.len(), 1);
    }

    #[test]
    fn what_no_waiting_mends_is_said_at_once() {
        let address = DialError::Address { address: "x".to_owned(), reason: "no".to_owned() };
        let silent = DialError::Unreachable { target: "x".to_owned(), reason: "refused".to_owned() };
        assert!(!may_pass(&address.into()) && may_pass(&silent.into()));
        assert!(!may_pass(&anyhow::anyhow!("it hangs up")), "a private swarm stays one");
    }
}
