//! Journal entries: a command with its time, as bytes and back.

use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::generated::echo::v1::journal_entry::Command as C;
use swarm_wire::prost::Message;
use swarm_wire::{DecodeError, PeerId, PolicyVersion};

use super::{message, trajectory};
use crate::dispatcher::{AuditOutcome, Command};
use crate::lease::{GroupId, LeaseId};

/// One line of a journal.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "entries are read one by one; nearly all are commands")]
pub enum Entry {
    /// Hash of the settings under which all that follows was carried out.
    Settings([u8; 32]),
    /// A command, with the time on the run's clock.
    Command(u64, Command),
}

/// The entry that a journal begins with.
pub fn encode_settings(hash: &[u8; 32]) -> Vec<u8> {
    let command = Some(C::Settings(hash.to_vec().into()));
    proto::JournalEntry { command, ..Default::default() }.encode_to_vec()
}

/// A command at `now_ms` as bytes.
pub fn encode_entry(now_ms: u64, command: &Command) -> Vec<u8> {
    let mut by: Option<&PeerId> = None;
    let mut of = |worker| by = Some(worker);
    let command = match command {
        Command::OpenGroups { up_to } => C::OpenGroups(*up_to),
        Command::SetVersion(version) => C::SetVersion(version.0),
        Command::Register { worker, incarnation } => {
            of(worker);
            C::Register(*incarnation)
        }
        Command::Acknowledge { worker, version } => {
            of(worker);
            C::Acknowledge(version.0)
        }
        Command::Lease { worker, max } => {
            of(worker);
            C::Lease(*max)
        }
        Command::Submit { trajectory } => {
            of(trajectory.worker());
            C::Submit(trajectory.into())
        }
        Command::Refuse { worker, lease } => {
            of(worker);
            C::Refuse(lease.0)
        }
        Command::Fail { worker, lease, aborted } => {
            of(worker);
            C::Fail(proto::FailedLease { lease: lease.0, reason: String::new(), aborted: *aborted })
        }
        Command::Disconnect { worker } => {
            of(worker);
            C::Disconnect(proto::Empty {})
        }
        Command::Tick => C::Tick(proto::Empty {}),
        Command::Verdict { lease, verdict } => {
            let verdict = match verdict {
                AuditOutcome::Pass => proto::Verdict::Pass,
                AuditOutcome::Fail => proto::Verdict::Fail,
                AuditOutcome::Unproven => proto::Verdict::Inconclusive,
                AuditOutcome::Withheld => proto::Verdict::Withheld,
            };
            C::Verdict(proto::VerdictCommand { lease: lease.0, verdict: verdict.into() })
        }
        Command::Take { step, groups } => C::Take(proto::TakeCommand { step: *step, groups: *groups }),
        Command::GiveBack { step, flat } => {
            C::GiveBack(proto::GiveBackCommand { step: *step, flat: flat.iter().map(|g| g.0).collect() })
        }
        Command::Commit { step } => C::Commit(*step),
        Command::Recover { steps } => C::Recover(*steps),
    };
    let worker = by.map(|p| p.as_bytes().to_vec()).unwrap_or_default().into();
    proto::JournalEntry { now_ms, worker, command: Some(command) }.encode_to_vec()
}

/// What an auditor's word means for the books.
pub(crate) fn audit_outcome(verdict: proto::Verdict) -> Option<AuditOutcome> {
    match verdict {
        proto::Verdict::Pass => Some(AuditOutcome::Pass),
        proto::Verdict::Fail => Some(AuditOutcome::Fail),
        proto::Verdict::Inconclusive => Some(AuditOutcome::Unproven),
        proto::Verdict::Withheld => Some(AuditOutcome::Withheld),
        proto::Verdict::Unspecified => None,
    }
}

/// An entry back from its bytes. Files can be damaged, so nothing in them is trusted either.
///
/// # Errors
/// When the bytes are no entry.
pub fn decode_entry(bytes: &[u8]) -> Result<Entry, DecodeError> {
    let entry: proto::JournalEntry = message("journal entry", bytes)?;
    let worker = || PeerId::from_bytes(&entry.worker);
    let absent = || DecodeError::invalid("journal entry", "without a command");
    let command = match entry.command.ok_or_else(absent)? {
        C::Settings(hash) => {
            let hash = hash[..].try_into().map_err(|_| DecodeError::invalid("settings", hash.len()))?;
            return Ok(Entry::Settings(hash));
        }
        C::OpenGroups(up_to) => Command::OpenGroups { up_to },
        C::SetVersion(version) => Command::SetVersion(PolicyVersion(version)),
        C::Register(incarnation) => Command::Register { worker: worker()?, incarnation },
        C::Acknowledge(version) => {
            Command::Acknowledge { worker: worker()?, version: PolicyVersion(version) }
        }
        C::Lease(max) => Command::Lease { worker: worker()?, max },
        C::Submit(t) => Command::Submit { trajectory: trajectory(t, &worker()?)? },
        C::Refuse(lease) => Command::Refuse { worker: worker()?, lease: LeaseId(lease) },
        C::Fail(m) => Command::Fail { worker: worker()?, lease: LeaseId(m.lease), aborted: m.aborted },
        C::Disconnect(_) => Command::Disconnect { worker: worker()? },
        C::Tick(_) => Command::Tick,
        C::Verdict(m) => {
            let verdict =
                audit_outcome(m.verdict()).ok_or_else(|| DecodeError::invalid("verdict", m.verdict))?;
            Command::Verdict { lease: LeaseId(m.lease), verdict }
        }
        C::Take(m) => Command::Take { step: m.step, groups: m.groups },
        C::GiveBack(m) => Command::GiveBack { step: m.step, flat: m.flat.into_iter().map(GroupId).collect() },
        C::Commit(step) => Command::Commit { step },
        C::Recover(steps) => Command::Recover { steps },
    };
    Ok(Entry::Command(entry.now_ms, command))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::tests::lease;
    use crate::rollout::Trajectory;
    use crate::rollout::tests::sample;

    #[test]
    fn every_command_round_trips() {
        let worker = PeerId::from_ed25519(&[9; 32]);
        let trajectory = Trajectory::new(sample(lease(4), &worker)).unwrap();
        let commands = [
            Command::OpenGroups { up_to: 2 },
            Command::SetVersion(PolicyVersion(0)),
            Command::Register { worker: worker.clone(), incarnation: 0 },
            Command::Acknowledge { worker: worker.clone(), version: PolicyVersion(0) },
            Command::Lease { worker: worker.clone(), max: 0 },
            Command::Submit { trajectory },
            Command::Refuse { worker: worker.clone(), lease: LeaseId(0) },
            Command::Fail { worker: worker.clone(), lease: LeaseId(0), aborted: true },
            Command::Disconnect { worker },
            Command::Tick,
            Command::Verdict { lease: LeaseId(1), verdict: AuditOutcome::Pass },
            Command::Verdict { lease: LeaseId(1), verdict: AuditOutcome::Fail },
            Command::Verdict { lease: LeaseId(1), verdict: AuditOutcome::Unproven },
            Command::Verdict { lease: LeaseId(1), verdict: AuditOutcome::Withheld },
            Command::Take { step: 0, groups: 0 },
            Command::GiveBack { step: 3, flat: vec![GroupId(0), GroupId(7)] },
            Command::Commit { step: 0 },
            Command::Recover { steps: 0 },
        ];
        for command in commands {
            let bytes = encode_entry(17, &command);
            assert_eq!(decode_entry(&bytes).unwrap(), Entry::Command(17, command));
        }
        assert_eq!(decode_entry(&encode_settings(&[7; 32])).unwrap(), Entry::Settings([7; 32]));
        assert!(decode_entry(&[]).is_err());
    }
}
