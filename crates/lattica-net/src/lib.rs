//! Peer-to-peer network: identity, encrypted connections, discovery, relays, RPC, tensor streams and link measurements.
