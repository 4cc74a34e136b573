//! prost messages, one module per protobuf package. Written by `cargo xtask codegen` from proto/: do not edit.
#![allow(
    missing_docs,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    reason = "generated code"
)]
pub mod bitswap {
    include!("generated/bitswap.rs");
}
pub mod dcutr {
    include!("generated/dcutr.rs");
}
pub mod echo {
    pub mod v1 {
        include!("generated/echo.v1.rs");
    }
}
pub mod lattica {
    pub mod v1 {
        include!("generated/lattica.v1.rs");
    }
}
pub mod parallax {
    pub mod v1 {
        include!("generated/parallax.v1.rs");
    }
}
pub mod rendezvous {
    include!("generated/rendezvous.rs");
}
pub mod swarm {
    pub mod v1 {
        include!("generated/swarm.v1.rs");
    }
}
pub mod veri {
    pub mod v1 {
        include!("generated/veri.v1.rs");
    }
}
