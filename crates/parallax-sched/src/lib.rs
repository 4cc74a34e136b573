//! Which layers run on which machine, and which machines serve which request.
//!
//! The planner cuts a model's layers into contiguous ranges, one per node, so that chains of nodes (pipelines) cover
//! every layer once and the slowest stage is as fast as the nodes' measured speed and memory allow. The coordinator
//! keeps the truth about membership and turns it into numbered plans. Both are pure: time is an argument.
//!
//! ```
//! use parallax_sched::{ModelProfile, NodeProfile, PlanOptions, RttMatrix, plan};
//!
//! let model = ModelProfile::uniform("toy", 12, 100 << 20);
//! let fast = NodeProfile::new("fast", 8 << 30, 2.0);
//! let slow = NodeProfile::new("slow", 8 << 30, 4.0);
//! let options = PlanOptions { max_pipelines: 1, ..PlanOptions::default() };
//! let plan = plan(&model, &[fast, slow], &RttMatrix::default(), &options)?;
//! let layers: Vec<u32> = plan.pipelines[0].stages.iter().map(|s| s.layers.len()).collect();
//! assert_eq!(layers.iter().sum::<u32>(), 12);
//! assert!(layers.contains(&8) && layers.contains(&4)); // twice as fast, twice as many
//! # Ok::<(), parallax_sched::PlanError>(())
//! ```
//!
//! Map: [`profile`] (what models and nodes cost), [`mod@plan`] (a plan, its checks and bounds), [`planner`] (choosing
//! one: `planner/exact.rs` for few nodes, `planner/cover.rs` for many), [`split`] (one chain's layers), [`order`]
//! (stages by round-trip time), [`coordinator`] (membership to numbered plans), [`routing`] (requests to pipelines),
//! [`wire`] (messages from members, checked), [`service`] (the coordinator on a network; feature `service`).

pub mod config;
pub mod coordinator;
pub mod error;
pub mod order;
pub mod plan;
pub mod planner;
pub mod profile;
pub mod routing;
#[cfg(feature = "service")]
pub mod service;
pub mod split;
pub mod wire;

pub use config::{Algorithm, CoordinatorConfig, PlanOptions};
pub use coordinator::{Coordinator, Incarnation, Member, MemberState, PlanView, Report, Staged};
pub use error::{JoinError, PlanError, StagingError};
pub use plan::{Pipeline, Plan, StagePlan};
pub use planner::plan;
pub use profile::{ModelProfile, NodeId, NodeProfile, RttMatrix};
pub use routing::Router;
