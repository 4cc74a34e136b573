//! Repeatable random numbers for tasks: a BLAKE3 stream keyed by what is drawn and the seed, the same on every machine.

/// A stream of random numbers.
#[derive(Debug, Clone)]
pub struct Draws(blake3::OutputReader);

impl Draws {
    /// The stream of `seed` for the purpose `context`.
    pub fn new(context: &str, seed: u64) -> Self {
        Self::keyed(context, seed, &[])
    }

    /// The stream of `seed` and further `key` bytes.
    pub fn keyed(context: &str, seed: u64, key: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(context);
        hasher.update(&seed.to_le_bytes()).update(key);
        Self(hasher.finalize_xof())
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Uniform below `n`, which must not be 0. The bias is below `n / 2^64`.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// Uniform in `low..=high`.
    pub fn between(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1).max(1) as usize) as i64
    }

    /// Uniform in 0..1.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Puts `items` into a random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Whether a problem with this content belongs to the evaluation: one in ten does, by hash, so that a problem is never
/// on both sides however often it is drawn.
pub fn held_out(context: &str, content: &[u8]) -> bool {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    hasher.update(content);
    let word = u32::from_le_bytes(hasher.finalize().as_bytes()[..4].try_into().expect("four bytes"));
    word % 10 == 0
}

/// Draws until `content` of the result belongs to the side of `seed`. One draw in ten is held out, so the bound on the
/// tries is never met in practice; where a side is empty, the last draw stands. `None` once `draw` finds nothing.
pub fn draw_on_side<T>(
    context: &str,
    seed: u64,
    tries: usize,
    mut draw: impl FnMut(&mut Draws) -> Option<T>,
    content: impl Fn(&T) -> Vec<u8>,
) -> Option<T> {
    let mut draws = Draws::new(context, seed);
    let mut drawn = draw(&mut draws)?;
    for _ in 1..tries {
        if held_out(context, &content(&drawn)) == (seed >= super::HELD_OUT_SEEDS) {
            break;
        }
        drawn = draw(&mut draws)?;
    }
    Some(drawn)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_repeat_differ_and_cover_their_range() {
        let all = |context, seed| {
            (0..200).scan(Draws::new(context, seed), |d, _| Some(d.below(6))).collect::<Vec<_>>()
        };
        assert_eq!(all("a", 1), all("a", 1));
        assert_ne!(all("a", 1), all("a", 2));
        assert_ne!(all("a", 1), all("b", 1));
        assert!((0..6).all(|n| all("a", 3).contains(&n)));
        let mut cards: Vec<u8> = (0..52).collect();
        Draws::new("a", 4).shuffle(&mut cards);
        assert_ne!(cards, (0..52).collect::<Vec<u8>>());
        cards.sort_unstable();
        assert_eq!(cards, (0..52).collect::<Vec<u8>>());
    }
}
