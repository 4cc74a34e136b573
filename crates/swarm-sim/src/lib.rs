//! Virtual time, links, faults and seeds: run a whole swarm deterministically inside one test.
//!
//! A [`Node`] is a state machine that gets messages and timers and puts what it wants to do into a [`Context`]. The
//! [`World`] moves time from event to event; nothing waits and nothing is random but the seed. The same seed gives the
//! same [`World::digest`].
//!
//! ```
//! use swarm_sim::{Context, LinkConfig, Node, NodeId, World};
//!
//! /// Answers every number with its successor, up to ten.
//! struct Counter;
//! impl Node for Counter {
//!     type Message = u32;
//!     fn on_message(&mut self, context: &mut Context<'_, u32>, from: NodeId, message: u32) {
//!         if message < 10 {
//!             context.send(from, message + 1, 4);
//!         }
//!     }
//! }
//!
//! let mut world = World::new(7, LinkConfig::default());
//! let (a, b) = (world.add(Counter), world.add(Counter));
//! world.send(a, b, 0, 4);
//! world.run_until(1_000_000);
//! assert_eq!(world.delivered(), 11);
//! ```
//!
//! Map: [`seed`] (independent named streams), [`clock`] (virtual time, timer heap), [`link`] (latency, bandwidth, loss,
//! reordering), [`fault`] (crash, restart, partition), [`world`] (the event loop), [`digest`] (hash of the event log).

pub mod clock;
pub mod digest;
pub mod fault;
pub mod link;
pub mod seed;
pub mod world;

pub use clock::Timers;
pub use digest::Digest;
pub use fault::Fault;
pub use link::LinkConfig;
pub use seed::{Seed, Stream};
pub use world::{Context, Node, NodeId, World};
