//! The wide swarm of reinforcement learning: environments, leases, trajectories, policy snapshots.
//!
//! ```
//! use echo_rollout::dispatcher::{Command, Dispatcher, Outcome};
//! use echo_rollout::{Arithmetic, DispatchConfig, Environment};
//! use swarm_wire::{PeerId, PolicyVersion, RunId};
//!
//! let mut dispatcher = Dispatcher::new(DispatchConfig { group_size: 2, ..DispatchConfig::new(RunId(1)) })?;
//! let worker = PeerId::from_ed25519(&[1; 32]);
//! dispatcher.handle(0, Command::OpenGroups { up_to: 1 });
//! dispatcher.handle(0, Command::Register { worker: worker.clone(), incarnation: 1 });
//! dispatcher.handle(1, Command::Acknowledge { worker: worker.clone(), version: PolicyVersion(0) });
//! let Outcome::Leased(leases) = dispatcher.handle(2, Command::Lease { worker, max: 8 }) else { panic!() };
//! assert_eq!(leases.len(), 2);
//! assert!(Arithmetic::default().task(leases[0].task_seed)?.prompt.starts_with("What is"));
//! dispatcher.check_invariants()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Map: [`environment`] (tasks and verifiers), [`text`] (tasks to tokens), [`lease`], [`rollout`] (one sample),
//! [`group`] (the samples of a prompt), [`dispatcher`] (who makes what; exactly once), [`staleness`], [`sync`] (the
//! sequential mode), [`asynchronous`] (rollouts ahead of the learner), [`fleet`] (which workers, at what
//! price), [`snapshot`] (signed policies), [`admission`] (what
//! may be trained on), [`wire`] (bytes to types), [`config`]; with feature `sim`: the whole loop in virtual time; with feature `service`: workers and the trainer's collector on a lattica-net node.

pub mod admission;
pub mod asynchronous;
pub mod config;
pub mod dispatcher;
pub mod environment;
pub mod fleet;
pub mod group;
pub mod lease;
pub mod rollout;
#[cfg(feature = "collector")]
pub mod service;
#[cfg(feature = "sim")]
pub mod simulation;
pub mod snapshot;
pub mod staleness;
pub mod sync;
pub mod text;
pub mod wire;

pub use admission::Admission;
pub use config::{AuditPolicy, DispatchConfig};
pub use dispatcher::Dispatcher;
pub use environment::{Arithmetic, Environment, Reward, Task};
pub use group::Group;
pub use lease::{DropReason, GroupId, Lease, LeaseId, SamplingSpec};
pub use rollout::Trajectory;
pub use snapshot::{SignedSnapshot, SnapshotManifest, Weights};
