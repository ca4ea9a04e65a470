//! TLS: from a directory of PEM files, named as QEMU and nbdkit name them, to what a connection needs.
//!
//! Owns which files are read and what is wrong with them. Opens no connection, makes no certificate, and never shows
//! anything of a private key.

mod words;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, TrustAnchor, UnixTime};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tracing::warn;
use webpki::{EndEntityCert, KeyUsage};

pub use words::{in_words, reason};

const CA: &str = "ca-cert.pem";
const REVOKED: &str = "ca-crl.pem";
/// Certificates and keys take a few KiB; a list of revoked certificates can be long.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Bits of a file's mode by which others than its owner may use it.
const MODE_OF_OTHERS: u32 = 0o077;

/// Whether a server asks its clients for a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificates {
    /// Anybody may connect.
    NotAsked,
    /// Who has no certificate of the CA in `ca-cert.pem` is refused.
    Required,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is missing or cannot be read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// A file is no PEM, or broken.
    #[error("{} is not a PEM file, or is cut off", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
    },
    /// A PEM file holds something else than it should.
    #[error("there is no {wanted} in {}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What should be in it, in words.
        wanted: &'static str,
    },
    /// The key is that of another certificate.
    #[error("the private key in {} does not belong to the certificate beside it", key.display())]
    KeyMismatch {
        /// The file of the key.
        key: PathBuf,
    },
    /// The certificate is over.
    #[error("the certificate in {} has expired", path.display())]
    Expired {
        /// The file.
        path: PathBuf,
    },
    /// The certificate's time has not come, or the clock is wrong.
    #[error("the certificate in {} is not valid yet", path.display())]
    NotYetValid {
        /// The file.
        path: PathBuf,
    },
    /// A certificate, key or list of a kind that cannot be used here.
    #[error("{} cannot be used: {cause}", path.display())]
    Unfit {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: String,
    },
}

impl TlsError {
    /// What to do about it, as one line.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            TlsError::Read { cause, .. } if cause.kind() == io::ErrorKind::NotFound => {
                "check the directory; `nbdcast certs` makes all files that are needed".to_owned()
            }
            TlsError::Read { .. } => "make the file readable for the user that runs this program".to_owned(),
            TlsError::NotPem { .. } | TlsError::Empty { .. } => {
                "copy the file again from where it was made, whole; `nbdcast certs` makes such files".to_owned()
            }
            TlsError::KeyMismatch { .. } => "copy certificate and key from one place, both anew".to_owned(),
            TlsError::Expired { .. } => {
                "make a new certificate: remove its directory where `nbdcast certs` made it, run that again, copy the result"
                    .to_owned()
            }
            TlsError::NotYetValid { .. } => "check this machine's clock (`timedatectl`)".to_owned(),
            TlsError::Unfit { .. } => {
                "use certificates as `nbdcast certs` makes them: X.509 version 3, with the purpose of their side".to_owned()
            }
        }
    }
}

/// What a server of the certificates in `dir` needs: `server-cert.pem` and `server-key.pem`, and to ask clients for
/// certificates `ca-cert.pem`; `ca-crl.pem` names those that were revoked, if it is there.
pub fn server_config(dir: &Path, clients: ClientCertificates) -> Result<Arc<ServerConfig>, TlsError> {
    let provider = provider();
    let builder = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(|e| unfit(dir, e))?;
    let roots = match clients {
        ClientCertificates::Required => Some(roots(dir)?),
        ClientCertificates::NotAsked => roots_if_any(dir)?,
    };
    let identity = identity(dir, "server", KeyUsage::server_auth(), roots.as_deref())?;
    let builder = match (clients, roots) {
        (ClientCertificates::Required, Some(roots)) => {
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .with_crls(revoked(dir)?)
                .allow_unknown_revocation_status();
            builder.with_client_cert_verifier(verifier.build().map_err(|e| unfit(&dir.join(CA), e))?)
        }
        (ClientCertificates::NotAsked | ClientCertificates::Required, _) => builder.with_no_client_auth(),
    };
    let key_path = identity.key_path;
    let mut config = builder.with_single_cert(identity.chain, identity.key).map_err(|e| unusable_key(&key_path, e))?;
    // A session that is resumed is not checked again, so that a revoked certificate would live on.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// What a client of the certificates in `dir` needs: `ca-cert.pem`, `client-cert.pem` and `client-key.pem`; `ca-crl.pem`
/// as for a server.
pub fn client_config(dir: &Path) -> Result<Arc<ClientConfig>, TlsError> {
    let provider = provider();
    let roots = roots(dir)?;
    let identity = identity(dir, "client", KeyUsage::client_auth(), Some(&roots))?;
    let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
        .with_crls(revoked(dir)?)
        .allow_unknown_revocation_status()
        .build()
        .map_err(|e| unfit(&dir.join(CA), e))?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| unfit(dir, e))?;
    let mut config = builder
        .with_webpki_verifier(verifier)
        .with_client_auth_cert(identity.chain, identity.key)
        .map_err(|e| unusable_key(&identity.key_path, e))?;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The DNS names that a certificate bears; none if it cannot be read.
#[must_use]
pub fn names_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(certificate) = EndEntityCert::try_from(certificate) else { return Vec::new() };
    certificate.valid_dns_names().map(str::to_owned).collect()
}

/// Whether a certificate is issued by an authority, both as PEM, and valid now.
#[must_use]
pub fn is_issued_by(certificate: &str, authority: &str) -> bool {
    let der = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).ok();
    let (Some(certificate), Some(authority)) = (der(certificate), der(authority)) else { return false };
    let mut roots = RootCertStore::empty();
    if roots.add(authority).is_err() {
        return false;
    }
    let chain = [certificate];
    let issued = |purpose| verify(&chain, purpose, &roots.roots) == Some(Ok(()));
    issued(KeyUsage::client_auth()) || issued(KeyUsage::server_auth())
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// A certificate that this program shows, with its key.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    key_path: PathBuf,
}

fn identity(dir: &Path, side: &str, purpose: KeyUsage, roots: Option<&RootCertStore>) -> Result<Identity, TlsError> {
    let (path, key_path) = (dir.join(format!("{side}-cert.pem")), dir.join(format!("{side}-key.pem")));
    let chain = certificates(&path)?;
    check(&path, &chain, purpose, roots)?;
    let key = PrivateKeyDer::from_pem_slice(&read(&key_path)?).map_err(|e| no_pem(&key_path, "private key", &e))?;
    warn_if_open(&key_path);
    Ok(Identity { chain, key, key_path })
}

/// Checks what peers will check: better at the start than with the first connection.
fn check(
    path: &Path,
    chain: &[CertificateDer<'_>],
    purpose: KeyUsage,
    roots: Option<&RootCertStore>,
) -> Result<(), TlsError> {
    let anchors = roots.map_or(&[][..], |roots| &roots.roots);
    match verify(chain, purpose, anchors) {
        None | Some(Ok(())) => Ok(()),
        Some(Err(webpki::Error::CertExpired { .. })) => Err(TlsError::Expired { path: path.to_owned() }),
        Some(Err(webpki::Error::CertNotValidYet { .. })) => Err(TlsError::NotYetValid { path: path.to_owned() }),
        Some(Err(webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey)) => {
            // A server may have its certificate from elsewhere, and trust clients of this CA only.
            if roots.is_some() {
                warn!("{} is not issued by {CA} beside it: peers that know only that CA refuse it", path.display());
            }
            Ok(())
        }
        Some(Err(other)) => Err(unfit(path, other)),
    }
}

/// Verifies the first certificate of a chain; `None` if it is empty.
fn verify(
    chain: &[CertificateDer<'_>],
    purpose: KeyUsage,
    anchors: &[TrustAnchor<'_>],
) -> Option<Result<(), webpki::Error>> {
    let (own, issuers) = chain.split_first()?;
    let verified = EndEntityCert::try_from(own).and_then(|own| {
        let algorithms = webpki::ALL_VERIFICATION_ALGS;
        own.verify_for_usage(algorithms, anchors, issuers, UnixTime::now(), purpose, None, None).map(|_| ())
    });
    Some(verified)
}

fn roots(dir: &Path) -> Result<Arc<RootCertStore>, TlsError> {
    let path = dir.join(CA);
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|e| unfit(&path, e))?;
    }
    Ok(Arc::new(roots))
}

fn roots_if_any(dir: &Path) -> Result<Option<Arc<RootCertStore>>, TlsError> {
    match roots(dir) {
        Err(TlsError::Read { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    }
}

pub(crate) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    let found = found.map_err(|e| no_pem(path, "certificate", &e))?;
    if found.is_empty() {
        return Err(TlsError::Empty { path: path.to_owned(), wanted: "certificate" });
    }
    Ok(found)
}

fn revoked(dir: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, TlsError> {
    let path = dir.join(REVOKED);
    let pem = match read(&path) {
        Err(TlsError::Read { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(&pem).collect();
    let lists = lists.map_err(|e| no_pem(&path, "list of revoked certificates", &e))?;
    // Without a list in it, revoked certificates would be let in unnoticed.
    if lists.is_empty() {
        return Err(TlsError::Empty { path, wanted: "list of revoked certificates" });
    }
    Ok(lists)
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |cause| TlsError::Read { path: path.to_owned(), cause };
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(failed)?;
    let length = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if length as u64 > FILE_BYTES_MAX {
        return Err(failed(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 16 MiB")));
    }
    Ok(bytes)
}

fn warn_if_open(key: &Path) {
    // A file that was read a moment ago: whoever took it away since will hear of it at the next start.
    let Ok(metadata) = std::fs::metadata(key) else { return };
    let mode = metadata.permissions().mode() & 0o777;
    if mode & MODE_OF_OTHERS != 0 {
        let shown = key.display();
        warn!("the private key {shown} is open to other users (mode {mode:03o}); `chmod 600 {shown}`");
    }
}

/// The parser's own words may quote the file, which may be a key.
fn no_pem(path: &Path, wanted: &'static str, error: &rustls::pki_types::pem::Error) -> TlsError {
    let path = path.to_owned();
    match error {
        rustls::pki_types::pem::Error::NoItemsFound => TlsError::Empty { path, wanted },
        _ => TlsError::NotPem { path },
    }
}

fn unusable_key(path: &Path, error: rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => TlsError::KeyMismatch { key: path.to_owned() },
        other => unfit(path, other),
    }
}

fn unfit(path: &Path, cause: impl std::fmt::Display) -> TlsError {
    TlsError::Unfit { path: path.to_owned(), cause: cause.to_string() }
}

#[cfg(test)]
pub(crate) mod authority;
#[cfg(test)]
mod tests;
