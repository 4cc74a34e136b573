//! The coordinator on a network: heartbeats in, plans out.
