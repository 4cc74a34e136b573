//! What we know of each peer as a partner: bytes in and out, and a score that a lie ruins.

use std::collections::HashMap;

use swarm_wire::PeerId;

/// Peers that are remembered; the one with the least traffic makes room for a new one.
const PEERS_MAX: usize = 4096;
/// A good block earns one point, up to here.
const SCORE_MAX: i32 = 100;
/// What a block that was never asked for costs.
const WRONG_BLOCK_COST: i32 = 200;
/// What a want that ran into its timeout costs.
const STALL_COST: i32 = 5;

/// The account of one peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Account {
    /// Block bytes that came from it.
    pub bytes_in: u64,
    /// Block bytes that went to it.
    pub bytes_out: u64,
    /// Wrong or unasked blocks.
    pub wrong_blocks: u32,
    /// -100 or less: not asked again.
    pub score: i32,
}

/// The accounts of all peers.
#[derive(Debug, Default)]
pub struct Ledger {
    accounts: HashMap<PeerId, Account>,
}

impl Ledger {
    /// A ledger without accounts.
    pub fn new() -> Self {
        Self::default()
    }

    /// A wanted block of `bytes` came from `peer`.
    pub fn received(&mut self, peer: &PeerId, bytes: usize) {
        let account = self.account_mut(peer);
        account.bytes_in += bytes as u64;
        account.score = (account.score + 1).min(SCORE_MAX);
    }

    /// Blocks of `bytes` went to `peer`.
    pub fn sent(&mut self, peer: &PeerId, bytes: u64) {
        self.account_mut(peer).bytes_out += bytes;
    }

    /// `peer` sent a block that it was not asked for, or bytes that are no message.
    pub fn wrong(&mut self, peer: &PeerId) {
        let account = self.account_mut(peer);
        account.wrong_blocks = account.wrong_blocks.saturating_add(1);
        account.score = account.score.saturating_sub(WRONG_BLOCK_COST);
    }

    /// `peer` did not answer in time.
    pub fn stalled(&mut self, peer: &PeerId) {
        let account = self.account_mut(peer);
        // Who has lied is not pardoned for being slow besides.
        if account.score > -SCORE_MAX {
            account.score = (account.score - STALL_COST).max(-SCORE_MAX + 1);
        }
    }

    /// Whether `peer` has lied and is not asked any more. Slowness alone never leads here.
    pub fn is_shunned(&self, peer: &PeerId) -> bool {
        self.account(peer).score <= -SCORE_MAX
    }

    /// The account of `peer`.
    pub fn account(&self, peer: &PeerId) -> Account {
        self.accounts.get(peer).copied().unwrap_or_default()
    }

    fn account_mut(&mut self, peer: &PeerId) -> &mut Account {
        if self.accounts.len() >= PEERS_MAX && !self.accounts.contains_key(peer) {
            let least = self
                .accounts
                .iter()
                .filter(|(_, a)| a.score > -SCORE_MAX)
                .min_by_key(|(_, a)| a.bytes_in + a.bytes_out)
                .or_else(|| self.accounts.iter().next())
                .map(|(p, _)| p.clone())
                .expect("a full ledger has accounts");
            self.accounts.remove(&least);
        }
        self.accounts.entry(peer.clone()).or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_lie_outweighs_all_good_blocks_and_slowness_does_not_shun() {
        let peer = PeerId::from_ed25519(&[1; 32]);
        let mut ledger = Ledger::new();
        for _ in 0..1000 {
            ledger.received(&peer, 10);
        }
        assert_eq!(ledger.account(&peer).score, SCORE_MAX);
        ledger.wrong(&peer);
        assert!(ledger.is_shunned(&peer));
        let slow = PeerId::from_ed25519(&[2; 32]);
        for _ in 0..1000 {
            ledger.stalled(&slow);
        }
        assert!(!ledger.is_shunned(&slow));
    }

    #[test]
    fn a_liar_stays_shunned_however_slow_and_however_long_it_lies() {
        let peer = PeerId::from_ed25519(&[1; 32]);
        let mut ledger = Ledger::new();
        ledger.wrong(&peer);
        ledger.stalled(&peer);
        assert!(ledger.is_shunned(&peer));
        let account = Account { score: i32::MIN + 1, wrong_blocks: u32::MAX, ..Account::default() };
        ledger.accounts.insert(peer.clone(), account);
        ledger.wrong(&peer);
        assert!(ledger.is_shunned(&peer) && ledger.account(&peer).wrong_blocks == u32::MAX);
    }

    #[test]
    fn the_ledger_is_bounded() {
        let mut ledger = Ledger::new();
        for i in 0..PEERS_MAX as u32 + 10 {
            let mut key = [0; 32];
            key[..4].copy_from_slice(&i.to_le_bytes());
            ledger.received(&PeerId::from_ed25519(&key), 1);
        }
        assert_eq!(ledger.accounts.len(), PEERS_MAX);
    }
}
