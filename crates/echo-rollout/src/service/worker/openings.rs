//! Commitments that may still be challenged, bounded in number and in memory.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use lattica_net::Status;
use swarm_wire::PeerId;
use swarm_wire::generated::echo::v1 as proto;

use super::Opener;
use crate::lease::LeaseId;
use crate::service::encode;
use crate::wire;

/// The newest commitments of one run.
pub(super) struct Openings {
    kept: BTreeMap<LeaseId, Box<dyn Opener>>,
    bytes: usize,
    most: usize,
    most_bytes: usize,
}

impl Openings {
    pub(super) fn new(most: usize, most_bytes: usize) -> Self {
        Self { kept: BTreeMap::new(), bytes: 0, most, most_bytes }
    }

    /// Forgets all of them.
    pub(super) fn clear(&mut self) {
        self.kept.clear();
        self.bytes = 0;
    }

    /// Keeps one; the oldest go while there are too many.
    pub(super) fn keep(&mut self, lease: LeaseId, opener: Box<dyn Opener>) {
        self.bytes += opener.bytes();
        if let Some(before) = self.kept.insert(lease, opener) {
            self.bytes -= before.bytes();
        }
        while self.kept.len() > self.most || self.bytes > self.most_bytes {
            let Some((_, oldest)) = self.kept.pop_first() else { return };
            self.bytes -= oldest.bytes();
        }
    }
}

pub(super) fn lock(openings: &Mutex<Openings>) -> MutexGuard<'_, Openings> {
    openings.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers a challenge that the trainer passes on.
pub(super) fn open(
    openings: &Mutex<Openings>,
    trainer: &PeerId,
    peer: &PeerId,
    body: &[u8],
) -> Result<Bytes, Status> {
    if peer != trainer {
        return Err(Status::permission_denied("only the trainer passes challenges on"));
    }
    let request: proto::OpenRequest =
        wire::message("open request", body).map_err(Status::invalid_argument)?;
    let openings = lock(openings);
    let opener = openings.kept.get(&LeaseId(request.lease));
    let opener = opener
        .ok_or_else(|| Status::not_found(format!("no commitment to lease {} is kept", request.lease)))?;
    let opening = opener.open(&request.challenge).map_err(Status::invalid_argument)?;
    Ok(encode(&proto::OpenReply { opening }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::CommitError;

    struct Sized(usize);

    impl Opener for Sized {
        fn open(&self, _: &[u8]) -> Result<Bytes, CommitError> {
            Ok(Bytes::new())
        }

        fn bytes(&self) -> usize {
            self.0
        }
    }

    fn kept(openings: &Openings) -> Vec<u64> {
        openings.kept.keys().map(|id| id.0).collect()
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many_or_too_large_ones() {
        let mut openings = Openings::new(3, 100);
        (0..5).for_each(|id| openings.keep(LeaseId(id), Box::new(Sized(10))));
        assert_eq!(kept(&openings), [2, 3, 4]);
        openings.keep(LeaseId(5), Box::new(Sized(85)));
        assert_eq!((kept(&openings), openings.bytes), (vec![4, 5], 95));
        openings.keep(LeaseId(5), Box::new(Sized(20)));
        assert_eq!(openings.bytes, 30);
        // A new run counts its leases from 0 again.
        openings.clear();
        openings.keep(LeaseId(0), Box::new(Sized(10)));
        assert_eq!((kept(&openings), openings.bytes), (vec![0], 10));
    }
}
