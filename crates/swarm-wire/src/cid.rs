//! Content identifiers: CIDv1 over raw bytes, hashed with BLAKE3 (ours) or SHA2-256 (what IPFS peers know).
//!
//! The hash functions themselves live in lattica-bitswap; here is only the identifier.

pub use cid::Cid;
use cid::multihash::Multihash;

use crate::DecodeError;

/// Multicodec of raw bytes.
pub const CODEC_RAW: u64 = 0x55;
/// Multihash code of BLAKE3.
pub const HASH_BLAKE3: u64 = 0x1e;
/// Multihash code of SHA2-256.
pub const HASH_SHA2_256: u64 = 0x12;

/// The CIDv1 of raw bytes whose 32-byte digest under `hash_code` is `digest`.
pub fn raw(hash_code: u64, digest: &[u8; 32]) -> Cid {
    let hash = Multihash::wrap(hash_code, digest).expect("32 bytes fit a 64-byte multihash");
    Cid::new_v1(CODEC_RAW, hash)
}

/// Reads a CID that a peer sent; only digests of 32 bytes under a hash that we can check are taken.
///
/// # Errors
/// When the bytes are no CID, or its hash is neither BLAKE3 nor SHA2-256 with 32 bytes.
pub fn decode(bytes: &[u8]) -> Result<Cid, DecodeError> {
    let cid = Cid::try_from(bytes).map_err(|e| DecodeError::invalid("content id", e))?;
    let hash = cid.hash();
    if hash.digest().len() != 32 || !matches!(hash.code(), HASH_BLAKE3 | HASH_SHA2_256) {
        return Err(DecodeError::invalid(
            "content id hash",
            format!("code {:#x}, {} bytes", hash.code(), hash.digest().len()),
        ));
    }
    Ok(cid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_cids_round_trip_and_identity_hashes_are_refused() {
        let cid = raw(HASH_BLAKE3, &[7; 32]);
        assert_eq!(decode(&cid.to_bytes()).unwrap(), cid);
        let identity = Cid::new_v1(CODEC_RAW, Multihash::wrap(0, b"hello").unwrap());
        assert!(decode(&identity.to_bytes()).is_err());
        assert!(decode(&[1, 0x55]).is_err());
    }
}
