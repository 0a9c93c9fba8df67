//! Our certificates for a host, of which a server gets the one that it takes.
//!
//! A server that asks for a certificate says which authorities it accepts and which signatures it can check. The first
//! pair whose chain names such an authority is shown, and without one the first whose key fits: servers' lists are
//! incomplete, and not to show anything is to be refused for certain.

use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use rustls::{DistinguishedName, SignatureScheme};
use webpki::EndEntityCert;

use crate::transport::{Failure, FailureKind};

/// Certificates with their keys, most preferred first.
#[derive(Debug)]
pub(super) struct ClientPairs(Vec<Pair>);

#[derive(Debug)]
struct Pair {
    key: Arc<CertifiedKey>,
    /// Who signed the certificates of the chain.
    issuers: Vec<DistinguishedName>,
}

impl ClientPairs {
    /// Reads PEM texts, each of certificates and of their key.
    ///
    /// # Errors
    /// When one of them is malformed, or a certificate and its key do not belong together.
    pub(super) fn read(pems: &[(Vec<u8>, Vec<u8>)], provider: &CryptoProvider) -> Result<Self, Failure> {
        pems.iter().map(|(chain, key)| Pair::read(chain, key, provider)).collect::<Result<_, _>>().map(Self)
    }
}

impl Pair {
    fn read(chain: &[u8], key: &[u8], provider: &CryptoProvider) -> Result<Self, Failure> {
        let local = |message: &str, source: Box<dyn std::error::Error + Send + Sync>| {
            Failure::because(FailureKind::Local, message, source)
        };
        let chain = CertificateDer::pem_slice_iter(chain)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| local("a client certificate is not PEM", error.into()))?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|error| local("a client key is not PEM", error.into()))?;
        let issuers = chain.iter().filter_map(issuer).collect();
        let key = CertifiedKey::from_der(chain, key, provider)
            .map_err(|error| local("client certificate and key do not fit", error.into()))?;
        Ok(Self { key: Arc::new(key), issuers })
    }
}

/// Returns who signed a certificate. One that cannot be read is still shown, as somebody asked for it.
fn issuer(certificate: &CertificateDer<'_>) -> Option<DistinguishedName> {
    let certificate = EndEntityCert::try_from(certificate).ok()?;
    Some(DistinguishedName::in_sequence(certificate.issuer()))
}

impl ResolvesClientCert for ClientPairs {
    fn resolve(&self, accepted: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let mut fitting = self.0.iter().filter(|pair| pair.key.key.choose_scheme(schemes).is_some());
        let first = fitting.clone().next()?;
        let named =
            fitting.find(|pair| pair.issuers.iter().any(|issuer| accepted.contains(&issuer.as_ref())));
        Some(Arc::clone(&named.unwrap_or(first).key))
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use soci_testkit::tls::TestCa;

    #[test]
    fn the_pair_of_an_accepted_authority_is_shown_and_else_the_first_whose_key_fits() {
        let provider = rustls::crypto::ring::default_provider();
        let authorities = ["a", "b"].map(|name| TestCa::new(name).unwrap());
        let pems: Vec<_> = authorities
            .iter()
            .map(|ca| ca.issue(&[]).unwrap())
            .map(|identity| (identity.certificate_pem.into_bytes(), identity.key_pem.into_bytes()))
            .collect();
        let pairs = ClientPairs::read(&pems, &provider).unwrap();
        let [a, b] = [0, 1].map(|at| pairs.0[at].issuers[0].as_ref().to_vec());
        assert_ne!(a, b);
        let shown = |accepted: &[&[u8]], scheme| {
            let shown = pairs.resolve(accepted, &[scheme])?;
            pairs.0.iter().position(|pair| Arc::ptr_eq(&pair.key, &shown))
        };
        let scheme = SignatureScheme::ECDSA_NISTP256_SHA256;
        for (accepted, expected) in [
            (&[a.as_slice()][..], 0),
            (&[b.as_slice()], 1),
            (&[b"unknown".as_slice(), &b], 1),
            (&[b"unknown".as_slice()], 0),
            (&[], 0),
        ] {
            assert_eq!(shown(accepted, scheme), Some(expected), "{accepted:?}");
        }
        assert_eq!(shown(&[&a], SignatureScheme::ED25519), None, "no key can sign that way");
    }

    #[test]
    fn a_pair_that_does_not_belong_together_is_named_as_that() {
        let provider = rustls::crypto::ring::default_provider();
        let ca = TestCa::new("a").unwrap();
        let [one, other] = [0; 2].map(|_| ca.issue(&[]).unwrap());
        let mixed = [(one.certificate_pem.clone().into_bytes(), other.key_pem.into_bytes())];
        let error = ClientPairs::read(&mixed, &provider).unwrap_err();
        assert!(error.to_string().contains("do not fit"), "{error}");
        let empty = [(one.certificate_pem.into_bytes(), b"no key".to_vec())];
        let error = ClientPairs::read(&empty, &provider).unwrap_err();
        assert!(error.to_string().contains("not PEM"), "{error}");
    }
}
