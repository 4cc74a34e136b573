//! Journal entries: a command with its time, as bytes and back.

use swarm_wire::generated::echo::v1 as proto;
use swarm_wire::generated::echo::v1::journal_entry::Command as C;
use swarm_wire::prost::Message;
use swarm_wire::{DecodeError, PeerId, PolicyVersion};

use super::{message, trajectory};
use crate::dispatcher::{AuditOutcome, Command};
use crate::lease::LeaseId;

/// A command at `now_ms` as bytes.
pub fn encode_entry(now_ms: u64, command: &Command) -> Vec<u8> {
    let mut by: Option<&PeerId> = None;
    let mut of = |worker| by = Some(worker);
    let command = match command {
        Command::OpenGroups { task_seeds } => {
            C::OpenGroups(proto::OpenGroups { task_seeds: task_seeds.clone() })
        }
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
        Command::Submit { trajectory, refused } => {
            of(trajectory.worker());
            let refused = if *refused { "refused" } else { "" };
            C::Submit(proto::SubmitCommand {
                trajectory: Some(trajectory.into()),
                refused: refused.to_owned(),
            })
        }
        Command::Fail { worker, lease } => {
            of(worker);
            C::Fail(proto::FailedLease { lease: lease.0, reason: String::new() })
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
            };
            C::Verdict(proto::VerdictCommand { lease: lease.0, verdict: verdict.into() })
        }
        Command::Take { step, max_groups } => {
            C::Take(proto::TakeCommand { step: *step, max_groups: *max_groups })
        }
        Command::Commit { step } => C::Commit(*step),
        Command::Recover { steps } => C::Recover(*steps),
    };
    let worker = by.map(|p| p.as_bytes().to_vec()).unwrap_or_default().into();
    proto::JournalEntry { now_ms, worker, command: Some(command) }.encode_to_vec()
}

/// An entry back from its bytes. Files can be damaged, so nothing in them is trusted either.
///
/// # Errors
/// When the bytes are no entry.
pub fn decode_entry(bytes: &[u8]) -> Result<(u64, Command), DecodeError> {
    let entry: proto::JournalEntry = message("journal entry", bytes)?;
    let worker = || PeerId::from_bytes(&entry.worker);
    let absent = || DecodeError::invalid("journal entry", "without a command");
    let command = match entry.command.ok_or_else(absent)? {
        C::OpenGroups(m) => Command::OpenGroups { task_seeds: m.task_seeds },
        C::SetVersion(version) => Command::SetVersion(PolicyVersion(version)),
        C::Register(incarnation) => Command::Register { worker: worker()?, incarnation },
        C::Acknowledge(version) => {
            Command::Acknowledge { worker: worker()?, version: PolicyVersion(version) }
        }
        C::Lease(max) => Command::Lease { worker: worker()?, max },
        C::Submit(m) => Command::Submit {
            trajectory: trajectory(m.trajectory.ok_or_else(absent)?, &worker()?)?,
            refused: !m.refused.is_empty(),
        },
        C::Fail(m) => Command::Fail { worker: worker()?, lease: LeaseId(m.lease) },
        C::Disconnect(_) => Command::Disconnect { worker: worker()? },
        C::Tick(_) => Command::Tick,
        C::Verdict(m) => {
            let verdict = match m.verdict() {
                proto::Verdict::Pass => AuditOutcome::Pass,
                proto::Verdict::Fail => AuditOutcome::Fail,
                proto::Verdict::Inconclusive | proto::Verdict::Withheld => AuditOutcome::Unproven,
                proto::Verdict::Unspecified => return Err(DecodeError::invalid("verdict", m.verdict)),
            };
            Command::Verdict { lease: LeaseId(m.lease), verdict }
        }
        C::Take(m) => Command::Take { step: m.step, max_groups: m.max_groups },
        C::Commit(step) => Command::Commit { step },
        C::Recover(steps) => Command::Recover { steps },
    };
    Ok((entry.now_ms, command))
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
            Command::OpenGroups { task_seeds: vec![1, 2] },
            Command::SetVersion(PolicyVersion(0)),
            Command::Register { worker: worker.clone(), incarnation: 0 },
            Command::Acknowledge { worker: worker.clone(), version: PolicyVersion(0) },
            Command::Lease { worker: worker.clone(), max: 0 },
            Command::Submit { trajectory: trajectory.clone(), refused: true },
            Command::Submit { trajectory, refused: false },
            Command::Fail { worker: worker.clone(), lease: LeaseId(0) },
            Command::Disconnect { worker },
            Command::Tick,
            Command::Verdict { lease: LeaseId(1), verdict: AuditOutcome::Pass },
            Command::Verdict { lease: LeaseId(1), verdict: AuditOutcome::Fail },
            Command::Verdict { lease: LeaseId(1), verdict: AuditOutcome::Unproven },
            Command::Take { step: 0, max_groups: 0 },
            Command::Commit { step: 0 },
            Command::Recover { steps: 0 },
        ];
        for command in commands {
            let bytes = encode_entry(17, &command);
            assert_eq!(decode_entry(&bytes).unwrap(), (17, command));
        }
        assert!(decode_entry(&[]).is_err());
    }
}
