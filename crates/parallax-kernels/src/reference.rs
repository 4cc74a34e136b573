//! The kernels as plain loops: the specification. Nothing here is fast, shared out or vectorised.
//!
//! "Equal" in the tests means: bit for bit where the order of a sum is part of the specification (linear layers, matrix
//! products), within a bound that grows with the length of the sums elsewhere.

pub mod attention;
pub mod linear;
pub mod rows;
