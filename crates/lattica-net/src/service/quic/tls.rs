//! Who is at the other end. Each side shows a certificate that signs for itself and carries, in an extension of libp2p's, the
//! peer's key and its signature over the certificate's key (<https://github.com/libp2p/specs/blob/master/tls/tls.md>). Whether
//! it is the peer that was meant, the swarm asks, which then knows who answered instead.

use std::sync::Arc;

use libp2p::PeerId;
use libp2p::identity::Keypair;
use libp2p_tls::certificate;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::rustls;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{self, cipher_suite};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, SignatureScheme, SupportedCipherSuite,
};

/// What both sides say they speak.
const PROTOCOL: &[u8] = b"libp2p";

/// The two sides' parts of the handshake, with one certificate.
pub(super) fn configs(keypair: &Keypair) -> Result<(QuicClientConfig, QuicServerConfig), Error> {
    let (certificate, key) =
        certificate::generate(keypair).map_err(|error| Error::General(error.to_string()))?;
    let key = aws_lc_rs::sign::any_ecdsa_type(&key)?;
    let certified = Arc::new(CertifiedKey::new(vec![certificate], key));
    let resolver = Arc::new(SingleCertAndKey::from(certified));
    let provider = CryptoProvider { cipher_suites: cipher_suites(), ..aws_lc_rs::default_provider() };
    let provider = Arc::new(provider);

    let mut client = rustls::ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier))
        .with_client_cert_resolver(resolver.clone());
    client.alpn_protocols = vec![PROTOCOL.to_vec()];
    // All peers go by the same name here: what one of them gave out is of no use with the next.
    client.resumption = Resumption::disabled();
    client.enable_sni = false;

    let mut server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(Verifier))
        .with_cert_resolver(resolver);
    server.alpn_protocols = vec![PROTOCOL.to_vec()];
    server.send_tls13_tickets = 0;
    // A stock libp2p client names ChaCha20 first, whatever its processor can do.
    server.ignore_client_order = true;

    let unusable = |_| Error::General("QUIC begins with AES-128".to_owned());
    let client = QuicClientConfig::try_from(client).map_err(unusable)?;
    Ok((client, QuicServerConfig::try_from(server).map_err(unusable)?))
}

/// The best first: AES where the processor has instructions for it, ChaCha20 elsewhere.
fn cipher_suites() -> Vec<SupportedCipherSuite> {
    let aes = [cipher_suite::TLS13_AES_128_GCM_SHA256, cipher_suite::TLS13_AES_256_GCM_SHA384];
    let chacha = [cipher_suite::TLS13_CHACHA20_POLY1305_SHA256];
    if has_aes() { [&aes[..], &chacha].concat() } else { [&chacha[..], &aes].concat() }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(target_arch = "aarch64")]
fn has_aes() -> bool {
    std::arch::is_aarch64_feature_detected!("aes")
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_aes() -> bool {
    false
}

/// The peer at the other end of an established connection.
pub(super) fn peer(connection: &quinn::Connection) -> Result<PeerId, Error> {
    let shown = connection.peer_identity().and_then(|shown| shown.downcast::<Vec<CertificateDer<'_>>>().ok());
    let certificates = shown.ok_or(Error::NoCertificatesPresented)?;
    only(&certificates)
}

fn only(certificates: &[CertificateDer<'_>]) -> Result<PeerId, Error> {
    let [certificate] = certificates else { return Err(Error::NoCertificatesPresented) };
    Ok(certificate::parse(certificate)?.peer_id())
}

/// Takes certificates of any peer, as long as they are its own.
#[derive(Debug)]
struct Verifier;

impl Verifier {
    fn certificate(end: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<(), Error> {
        if !others.is_empty() {
            return Err(CertificateError::BadEncoding.into());
        }
        certificate::parse(end)?;
        Ok(())
    }

    fn signature(
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        certificate::parse(certificate)?.verify_signature(signed.scheme, message, signed.signature())?;
        Ok(HandshakeSignatureValid::assertion())
    }

    fn old() -> Error {
        Error::PeerIncompatible(rustls::PeerIncompatible::Tls12NotOfferedOrEnabled)
    }

    /// What certificates are signed with: ours with the second, those of others with any of them.
    fn schemes() -> Vec<SignatureScheme> {
        vec![
            SignatureScheme::ED25519,
            SignatureScheme::ECDSA_NISTP256_SHA256,
            SignatureScheme::ECDSA_NISTP384_SHA384,
            SignatureScheme::RSA_PSS_SHA256,
            SignatureScheme::RSA_PSS_SHA384,
            SignatureScheme::RSA_PSS_SHA512,
            SignatureScheme::RSA_PKCS1_SHA256,
            SignatureScheme::RSA_PKCS1_SHA384,
            SignatureScheme::RSA_PKCS1_SHA512,
        ]
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Self::certificate(end, others).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Self::old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Self::certificate(end, others).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Self::old())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        Self::schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_names_its_peer_and_stands_alone() {
        let keypair = Keypair::generate_ed25519();
        let (certificate, _) = certificate::generate(&keypair).unwrap();
        let peer = keypair.public().to_peer_id();
        assert_eq!(only(std::slice::from_ref(&certificate)), Ok(peer));
        assert!(Verifier::certificate(&certificate, &[]).is_ok());
        assert!(Verifier::certificate(&certificate, std::slice::from_ref(&certificate)).is_err());
        assert!(only(&[]).is_err() && only(&[certificate.clone(), certificate.clone()]).is_err());
        // Any byte of it that is changed breaks one of its two signatures, or its form.
        for at in (0..certificate.len()).step_by(7) {
            let mut changed = certificate.to_vec();
            changed[at] ^= 1;
            assert!(only(&[changed.into()]) != Ok(peer), "byte {at}");
        }
    }

    #[test]
    fn the_cipher_of_the_processor_comes_first_and_none_is_left_out() {
        let suites = cipher_suites();
        assert_eq!(suites.len(), 3);
        let chacha = suites.iter().position(|suite| *suite == cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
        assert_eq!(chacha, Some(if has_aes() { 2 } else { 0 }));
    }
}
