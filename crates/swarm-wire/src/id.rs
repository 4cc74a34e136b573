//! Who and which: peers, requests, runs and policy versions, as types that cannot be mixed up.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::DecodeError;

/// A peer's identity: the libp2p peer id, a multihash of its public key. For Ed25519 keys, which is what our nodes use,
/// the key itself is inside, so that a signature can be checked with the peer id alone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(Vec<u8>);

/// Identity multihash header and protobuf key header in front of a 32-byte Ed25519 key (libp2p peer id specification).
const ED25519_PREFIX: [u8; 6] = [0x00, 0x24, 0x08, 0x01, 0x12, 0x20];
/// A peer id is at most a 64-byte digest with its multihash header.
const PEER_ID_MAX_BYTES: usize = 66;

impl PeerId {
    /// The peer id of an Ed25519 public key.
    pub fn from_ed25519(public_key: &[u8; 32]) -> Self {
        let mut bytes = ED25519_PREFIX.to_vec();
        bytes.extend_from_slice(public_key);
        Self(bytes)
    }

    /// Reads the multihash bytes of a peer id.
    ///
    /// # Errors
    /// When the bytes are not one multihash of a sane length.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        if bytes.len() < 3 || bytes.len() > PEER_ID_MAX_BYTES || usize::from(bytes[1]) != bytes.len() - 2 {
            return Err(DecodeError::invalid("peer id", format!("{} bytes", bytes.len())));
        }
        Ok(Self(bytes.to_vec()))
    }

    /// The multihash bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The Ed25519 public key inside, if this is such a peer.
    pub fn ed25519_public_key(&self) -> Option<[u8; 32]> {
        self.0.strip_prefix(&ED25519_PREFIX)?.try_into().ok()
    }

    /// The last eight characters, for logs and tables.
    pub fn short(&self) -> String {
        let text = self.to_string();
        text[text.len().saturating_sub(8)..].to_owned()
    }
}

impl fmt::Display for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&bs58::encode(&self.0).into_string())
    }
}

impl fmt::Debug for PeerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PeerId({self})")
    }
}

impl FromStr for PeerId {
    type Err = DecodeError;

    fn from_str(text: &str) -> Result<Self, DecodeError> {
        let bytes = bs58::decode(text).into_vec().map_err(|_| DecodeError::invalid("peer id", text))?;
        Self::from_bytes(&bytes)
    }
}

impl Serialize for PeerId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PeerId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number_id!(
    /// One inference request, unique on the head that took it.
    RequestId, "r"
);
number_id!(
    /// One training run.
    RunId, "run-"
);
number_id!(
    /// Weights after this many learner steps; 0 is the base model.
    PolicyVersion, "v"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ed25519_peer_ids_carry_their_key_and_read_as_libp2p_writes_them() {
        let peer = PeerId::from_ed25519(&[0; 32]);
        assert_eq!(peer.ed25519_public_key(), Some([0; 32]));
        assert!(peer.to_string().starts_with("12D3KooW"), "{peer}");
        assert_eq!(peer.to_string().parse::<PeerId>().unwrap(), peer);
        assert_eq!(PeerId::from_bytes(peer.as_bytes()).unwrap(), peer);
    }

    #[test]
    fn malformed_peer_ids_are_refused() {
        for bytes in [&[][..], &[0, 1], &[0, 9, 1, 2], &[0x12; 80]] {
            assert!(PeerId::from_bytes(bytes).is_err());
        }
        assert!("not base58 0OIl".parse::<PeerId>().is_err());
    }
}
