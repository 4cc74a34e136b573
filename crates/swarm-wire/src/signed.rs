//! Signed statements: the exact bytes that an Ed25519 signature covers. Signing and checking happen where keys live
//! (lattica-net, echo-rollout, veri-verify); the covered bytes are defined once, here.

/// The bytes that a signature in `domain` over `payload` covers: a fixed tag, the domain with its length, the payload.
pub fn signed_bytes(domain: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"swarm-signed-v1".to_vec();
    bytes.extend_from_slice(&(domain.len() as u64).to_le_bytes());
    bytes.extend_from_slice(domain.as_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn domain_and_payload_cannot_be_shifted_into_each_other() {
        assert_ne!(signed_bytes("ab", b"c"), signed_bytes("a", b"bc"));
    }
}
