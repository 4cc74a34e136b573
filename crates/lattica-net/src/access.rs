//! Who may be a peer at all. A private swarm shares a key; every connection proves it, both ways, before anything else is
//! said, and an allow-list may narrow the circle further.
//!
//! Pure: the bytes of the handshake and what they prove. `service/gate` carries them.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use swarm_wire::PeerId;

/// First bytes of the handshake, sent by the end that dialled. Framed as a message of 15 bytes: a node that expects a
/// stream of the open network then knows at once that this is none, instead of waiting for more.
pub const MAGIC: [u8; 16] = *b"\x0flattica-swarm1\n";
/// Length of a nonce and of a proof.
pub const FIELD_BYTES: usize = 32;
/// The dialler's first message: magic and its nonce.
pub const HELLO_BYTES: usize = MAGIC.len() + FIELD_BYTES;

/// A nonce: 32 bytes that nobody used before.
pub type Nonce = [u8; FIELD_BYTES];

/// The secret that the members of a private swarm share: 32 random bytes, written as 64 hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub struct SwarmKey([u8; 32]);

/// Not a swarm key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a swarm key is 64 hexadecimal digits, not {got} characters of which {wrong} are something else")]
pub struct SwarmKeyError {
    /// Characters given.
    pub got: usize,
    /// How many of them are not hexadecimal digits.
    pub wrong: usize,
}

impl SwarmKey {
    /// The key with these bytes. They have to be random: a short password can be guessed from one handshake.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key as it is written to a file.
    pub fn to_text(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn mac(&self, prover: Role, session: &Session<'_>) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        mac.update(&MAGIC);
        mac.update(&[prover as u8]);
        for part in [
            session.network.as_bytes(),
            session.dialler.as_bytes(),
            session.listener.as_bytes(),
            session.dialler_nonce,
            session.listener_nonce,
        ] {
            // With its length, so that no byte can move from one part into the next.
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        mac
    }

    /// What `prover` sends to show that it knows the key: HMAC-SHA-256 over the role, the network's name, both peer ids
    /// and both nonces.
    pub fn prove(&self, prover: Role, session: &Session<'_>) -> [u8; FIELD_BYTES] {
        self.mac(prover, session).finalize().into_bytes().into()
    }

    /// Whether `proof` is what `prover` would send. Takes the same time for any proof.
    pub fn verify(&self, prover: Role, session: &Session<'_>, proof: &[u8; FIELD_BYTES]) -> bool {
        self.mac(prover, session).verify_slice(proof).is_ok()
    }
}

impl fmt::Debug for SwarmKey {
    /// The secret never reaches a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SwarmKey(..)")
    }
}

impl FromStr for SwarmKey {
    type Err = SwarmKeyError;

    fn from_str(text: &str) -> Result<Self, SwarmKeyError> {
        let text = text.trim();
        let wrong = text.chars().filter(|c| !c.is_ascii_hexdigit()).count();
        let bad = || SwarmKeyError { got: text.chars().count(), wrong };
        if wrong > 0 || text.len() != 64 {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| bad())?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| bad())?;
        }
        Ok(Self(bytes))
    }
}

/// Which end of a connection proves something. A proof of one end is none for the other, so it cannot be sent back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The end that dialled.
    Dialler = 1,
    /// The end that was dialled.
    Listener = 2,
}

/// What a proof is bound to.
#[derive(Debug, Clone, Copy)]
pub struct Session<'a> {
    /// Name of the network.
    pub network: &'a str,
    /// The end that dialled, as the encrypted connection has proved it.
    pub dialler: &'a PeerId,
    /// The end that was dialled, likewise.
    pub listener: &'a PeerId,
    /// Fresh from the dialler.
    pub dialler_nonce: &'a Nonce,
    /// Fresh from the listener.
    pub listener_nonce: &'a Nonce,
}

/// Whom a node talks to. The default is everybody.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Peers must know this key. `None`: an open swarm.
    pub key: Option<SwarmKey>,
    /// Peers must be on this list. `None`: whoever knows the key, if there is one.
    pub allow: Option<BTreeSet<PeerId>>,
}

impl Access {
    /// Whether everybody may connect.
    pub fn is_open(&self) -> bool {
        self.key.is_none() && self.allow.is_none()
    }

    /// Whether the list lets `peer` in.
    pub fn allows(&self, peer: &PeerId) -> bool {
        self.allow.as_ref().is_none_or(|list| list.contains(peer))
    }
}

/// Why a connection was refused before anything was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The two ends have different keys, or the networks have different names.
    #[error("its swarm key or network name is not ours")]
    WrongKey,
    /// The peer is not on our allow-list.
    #[error("it is not on our allow-list")]
    NotAllowed,
    /// We are not on the peer's allow-list.
    #[error("we are not on its allow-list")]
    NotAllowedThere,
    /// The other end does not speak the handshake: it is not set up for a private swarm.
    #[error("it did not prove that it knows the swarm key")]
    NoProof,
    /// The connection broke before the handshake was done.
    #[error("the connection broke during the swarm handshake")]
    Broken,
    /// The other end was silent.
    #[error("it did not finish the swarm handshake in time")]
    Timeout,
}

/// The byte in front of an answer or a proof: all is well, or why not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The fields of the message follow.
    Go = 0,
    /// The proof was wrong.
    WrongKey = 1,
    /// The peer that reads this is not on the list.
    NotAllowed = 2,
}

impl Verdict {
    /// What a verdict byte of the other end means for us.
    ///
    /// # Errors
    /// When it refuses us, or is no verdict at all.
    pub fn check(byte: u8) -> Result<(), Refusal> {
        match byte {
            0 => Ok(()),
            1 => Err(Refusal::WrongKey),
            2 => Err(Refusal::NotAllowedThere),
            _ => Err(Refusal::NoProof),
        }
    }
}

/// The dialler's first message.
pub fn hello(nonce: &Nonce) -> [u8; HELLO_BYTES] {
    let mut bytes = [0; HELLO_BYTES];
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[MAGIC.len()..].copy_from_slice(nonce);
    bytes
}

/// The nonce in a dialler's first message.
///
/// # Errors
/// When the message is not one of ours.
pub fn read_hello(bytes: &[u8; HELLO_BYTES]) -> Result<Nonce, Refusal> {
    let (magic, nonce) = bytes.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err(Refusal::NoProof);
    }
    nonce.try_into().map_err(|_| Refusal::NoProof)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_ed25519(&[n; 32])
    }

    // RFC 2104 over the documented transcript, computed with Python's hmac and hashlib.
    #[test]
    fn the_transcript_is_pinned() {
        let (dialler, listener) = (peer(1), peer(2));
        let session = Session {
            network: "lab",
            dialler: &dialler,
            listener: &listener,
            dialler_nonce: &[3; 32],
            listener_nonce: &[4; 32],
        };
        let key = SwarmKey::from_bytes([9; 32]);
        let text: String = key.prove(Role::Listener, &session).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(text, "1dbbc6635e6185dc6aee29ba0d79141c40fb570497fe60ec4027f1448dfd3d50");
    }

    #[test]
    fn keys_are_read_and_written_as_hexadecimal_and_never_shown() {
        let key = SwarmKey::from_bytes(std::array::from_fn(|i| i as u8 * 7));
        assert_eq!(format!(" {}\n", key.to_text()).parse(), Ok(key.clone()));
        assert_eq!(format!("{key:?}"), "SwarmKey(..)");
        for bad in ["", "00", &"0".repeat(63), &"g".repeat(64), &"é".repeat(32)] {
            assert!(bad.parse::<SwarmKey>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_allow_list_names_who_may_come() {
        assert!(Access::default().is_open() && Access::default().allows(&peer(1)));
        let access = Access { allow: Some([peer(1)].into()), ..Access::default() };
        assert!(!access.is_open() && access.allows(&peer(1)) && !access.allows(&peer(2)));
    }

    proptest! {
        // A proof holds for exactly one role, pair of peers, pair of nonces, network and key.
        #[test]
        fn a_proof_is_worth_nothing_anywhere_else(change in 0usize..8, nonce in any::<[u8; 32]>(), flip in 0usize..32) {
            let (a, b, c) = (peer(1), peer(2), peer(3));
            let other = { let mut n = nonce; n[flip] ^= 1; n };
            let session = Session { network: "n", dialler: &a, listener: &b, dialler_nonce: &nonce, listener_nonce: &nonce };
            let key = SwarmKey::from_bytes([5; 32]);
            let proof = key.prove(Role::Dialler, &session);
            prop_assert!(key.verify(Role::Dialler, &session, &proof));
            let mut forged = proof;
            let (mut role, mut elsewhere, mut key) = (Role::Dialler, session, key);
            match change {
                0 => role = Role::Listener,
                1 => elsewhere.dialler = &c,
                2 => elsewhere.listener = &c,
                3 => elsewhere.dialler_nonce = &other,
                4 => elsewhere.listener_nonce = &other,
                5 => elsewhere.network = "m",
                6 => key = SwarmKey::from_bytes([6; 32]),
                _ => forged[flip] ^= 1,
            }
            prop_assert!(!key.verify(role, &elsewhere, &forged));
        }
    }

    #[test]
    fn strangers_first_bytes_are_no_hello() {
        let nonce = [8; 32];
        assert_eq!(read_hello(&hello(&nonce)), Ok(nonce));
        let mut stock = [0; HELLO_BYTES];
        stock[..20].copy_from_slice(b"\x13/multistream/1.0.0\n");
        assert_eq!(read_hello(&stock), Err(Refusal::NoProof));
        assert_eq!(Verdict::check(9), Err(Refusal::NoProof));
    }
}
