//! Training runs of several machines, each a program of its own.
#![expect(clippy::unwrap_used, reason = "a broken expectation ends the test")]

mod assistants;
mod audits;
mod program;
