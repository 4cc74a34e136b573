//! Anyone can check what was computed: a worker commits to the hidden states behind its answer, an auditor draws
//! positions afterwards, recomputes them with one prefill and compares.
//!
//! ```
//! use veri_verify::{Answer, Audit, Challenge, Job, Profile, Prover, Replay, Sampling, Verdict};
//!
//! let key = ed25519_dalek::SigningKey::from_bytes(&[7; 32]);
//! let job = Job { model_id: "m".into(), policy_version: 3, adapter_hash: None, prompt: vec![1, 2],
//!                 sampling: Sampling::default(), nonce: 42 };
//! let answer = Answer::new(vec![5, 6], vec![-0.5, -0.25]);
//! // The worker: one hidden row per output token.
//! let rows = [[0.5_f32, 1.0], [2.0, -1.0]];
//! let mut prover = Prover::new(&job, 4, 2);
//! rows.iter().for_each(|row| prover.record(row));
//! let signed = prover.commit(&answer, &key)?;
//! // The auditor: randomness only now, then the opening, then its own recomputation.
//! let audit = Audit::begin(&job, &answer, &signed, None, [9; 32], 2).unwrap();
//! let opening = prover.open(audit.challenge())?;
//! let replay = Replay { rows: rows.iter().map(|r| r.to_vec()).collect(), logprobs: answer.logprobs.clone(), tokens: None };
//! assert!(matches!(audit.judge(&opening, &replay, &Profile::f32()), Verdict::Pass { .. }));
//! # Ok::<(), veri_verify::ProveError>(())
//! ```
//!
//! Map: [`job`] (what was asked and answered), [`merkle`] (tree and proofs), [`prover`] and [`verifier`] (the two
//! sides), [`commitment`] (what is signed), [`challenge`] (positions from both sides' bytes), [`compare`] (distances and
//! thresholds), [`verdict`] (outcome and evidence), [`wire`] (bytes to types). With feature `service`: [`service`], an
//! auditor that recomputes on this machine.

pub mod challenge;
pub mod commitment;
pub mod compare;
pub mod config;
pub mod error;
pub mod job;
pub mod merkle;
pub mod prover;
#[cfg(feature = "service")]
pub mod service;
pub mod verdict;
pub mod verifier;
pub mod wire;

pub use challenge::Challenge;
pub use commitment::{Commitment, SignedCommitment};
pub use config::Profile;
pub use error::ProveError;
pub use job::{Answer, Job, Sampling};
pub use prover::{Opening, Prover};
pub use verdict::{Evidence, Verdict};
pub use verifier::{Audit, Replay};
