//! What the example binaries share: logging, reports, ctrl-c.
