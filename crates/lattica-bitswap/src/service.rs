//! The async shell: blocks on disk, and the exchange over lattica-net streams.
