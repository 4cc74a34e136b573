//! Virtual time, links, faults and seeds: run a whole swarm deterministically inside one test.
