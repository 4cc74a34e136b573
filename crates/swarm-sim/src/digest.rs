//! The hash of everything that happened, in order: two runs are the same if their digests are.

/// A running hash of an event log.
#[derive(Debug, Clone)]
pub struct Digest {
    hasher: blake3::Hasher,
    events: u64,
}

impl Default for Digest {
    fn default() -> Self {
        Self { hasher: blake3::Hasher::new_derive_key("swarm-sim event log v1"), events: 0 }
    }
}

impl Digest {
    /// Takes in one event; parts cannot be shifted into each other, because each carries its length.
    pub fn event(&mut self, at_us: u64, kind: &str, parts: &[&[u8]]) {
        self.events += 1;
        self.hasher.update(&at_us.to_le_bytes());
        for part in std::iter::once(kind.as_bytes()).chain(parts.iter().copied()) {
            self.hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
    }

    /// How many events there were.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// The digest so far, as 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.hasher.finalize().to_hex().to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_time_and_cut_matter() {
        let digest = |events: &[(u64, &str, &[&[u8]])]| {
            let mut digest = Digest::default();
            events.iter().for_each(|(at, kind, parts)| digest.event(*at, kind, parts));
            digest.hex()
        };
        let base = digest(&[(1, "a", &[b"xy", b"z"]), (2, "b", &[])]);
        assert_eq!(base, digest(&[(1, "a", &[b"xy", b"z"]), (2, "b", &[])]));
        assert_ne!(base, digest(&[(1, "a", &[b"x", b"yz"]), (2, "b", &[])]));
        assert_ne!(base, digest(&[(2, "b", &[]), (1, "a", &[b"xy", b"z"])]));
        assert_ne!(base, digest(&[(1, "a", &[b"xy", b"z"]), (3, "b", &[])]));
    }
}
