//! What a host's certificate is checked against, and which one we show.
//!
//! An identity is the *content* of the files, not their names: a file that changes makes another identity and with it
//! another client, and two hosts with equal settings share connections.

mod client_pairs;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{
    CryptoProvider, WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::{Failure, FailureKind};
use crate::settings::Verify;
use client_pairs::ClientPairs;

/// The largest PEM file that is read, in bytes.
const MAX_PEM: u64 = 4 << 20;

/// TLS settings of a host, by content.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
pub(crate) struct TlsIdentity {
    /// PEM texts of authorities, beside the system's.
    pub(crate) authorities: Vec<Vec<u8>>,
    /// PEM texts of client certificates, each with its key, most preferred first.
    pub(crate) clients: Vec<(Vec<u8>, Vec<u8>)>,
    /// Whether the host's own certificate is checked.
    pub(crate) verify: Verify,
    /// Whether those of other hosts are, where this one leads.
    pub(crate) verify_elsewhere: Verify,
}

/// The system's trust, read once.
#[derive(Debug, Default)]
pub(crate) struct Roots(OnceLock<Arc<RootCertStore>>);

impl Roots {
    fn get(&self) -> Arc<RootCertStore> {
        let store = self.0.get_or_init(|| {
            // Honours SSL_CERT_FILE and SSL_CERT_DIR.
            let found = rustls_native_certs::load_native_certs();
            for error in &found.errors {
                tracing::warn!(%error, "a part of the system's trusted certificates cannot be read");
            }
            let mut store = RootCertStore::empty();
            let (added, ignored) = store.add_parsable_certificates(found.certs);
            if added == 0 {
                tracing::warn!(
                    ignored,
                    "the system trusts no certificate authority: install ca-certificates"
                );
            }
            Arc::new(store)
        });
        Arc::clone(store)
    }
}

/// Reads a PEM file of bounded size.
pub(crate) fn read_pem(path: &Path) -> Result<Vec<u8>, TlsError> {
    let unreadable = |source| TlsError::Unreadable { path: path.to_owned(), source };
    let len = std::fs::metadata(path).map_err(unreadable)?.len();
    if len > MAX_PEM {
        return Err(TlsError::TooLarge { path: path.to_owned(), len });
    }
    std::fs::read(path).map_err(unreadable)
}

/// A certificate or key that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("cannot read {path}")]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("{path} of {len} bytes is larger than the limit of {MAX_PEM} bytes for a PEM file")]
    TooLarge { path: PathBuf, len: u64 },
}

impl TlsIdentity {
    /// Returns the same trust without the client certificates, which are for one origin.
    pub(crate) fn without_clients(&self) -> Self {
        Self { clients: Vec::new(), ..self.clone() }
    }

    /// Returns the trust for another host, where this one leads: its token server, the storage of its blobs. Authorities
    /// that were added for the host stay; that its own certificate is not checked says nothing about others.
    pub(crate) fn elsewhere(&self) -> Self {
        Self { verify: self.verify_elsewhere, ..self.without_clients() }
    }

    /// Returns the settings of a connection.
    pub(crate) fn client_config(&self, roots: &Roots) -> Result<ClientConfig, Failure> {
        let local = |message: &str, source: Box<dyn std::error::Error + Send + Sync>| {
            Failure::because(FailureKind::Local, message, source)
        };
        let provider = provider();
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| local("TLS cannot be set up", error.into()))?;
        let builder = match self.verify {
            Verify::Skip => {
                let verifier = NoVerifier(provider.signature_verification_algorithms);
                builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier))
            }
            Verify::Yes => {
                let mut store = roots.get();
                if !self.authorities.is_empty() {
                    let own = Arc::make_mut(&mut store);
                    for pem in &self.authorities {
                        for certificate in CertificateDer::pem_slice_iter(pem) {
                            let certificate = certificate
                                .map_err(|error| local("a ca file is not PEM", Box::new(error)))?;
                            own.add(certificate).map_err(|error| {
                                local("a ca file holds a malformed certificate", error.into())
                            })?;
                        }
                    }
                }
                builder.with_root_certificates(store)
            }
        };
        let clients = ClientPairs::read(&self.clients, &provider)?;
        let mut config = builder.with_client_cert_resolver(Arc::new(clients));
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// Returns the one crypto provider, and makes it the process's default if there is none yet.
fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    let provider = PROVIDER.get_or_init(|| {
        // Another part of the process may have installed the same one: that is no error.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Arc::new(rustls::crypto::ring::default_provider())
    });
    Arc::clone(provider)
}

/// Accepts every certificate: `skip_verify`. Signatures of the handshake are still checked.
#[derive(Debug)]
struct NoVerifier(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for NoVerifier {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsIdentity")
            .field("authorities", &self.authorities.len())
            .field("clients", &self.clients.len())
            .field("verify", &self.verify)
            .field("verify_elsewhere", &self.verify_elsewhere)
            .finish()
    }
}
