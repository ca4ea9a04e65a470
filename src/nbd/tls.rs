//! TLS on an NBD connection: whether clients may or must use it, and turning a connection into an encrypted one.

use std::io;
use std::sync::Arc;

use rustls::{ServerConfig, ServerConnection};
use tokio_rustls::TlsAcceptor;
use webpki::EndEntityCert;

use super::encrypted::EncryptedStream;
use super::stream::{Stream, split_tcp, split_unix};

/// Whether clients use TLS.
#[derive(Debug, Clone, Default)]
pub enum Tls {
    /// STARTTLS is refused.
    #[default]
    Off,
    /// Clients may.
    On(Arc<ServerConfig>),
    /// Clients must, before they learn anything.
    Require(Arc<ServerConfig>),
}

/// An encrypted connection, and the DNS names in the client's certificate; empty if it showed none.
pub(super) struct Encrypted {
    pub(super) stream: Stream,
    pub(super) names: Vec<String>,
}

/// Does the server's part of the TLS handshake. The caller bounds the time.
pub(super) async fn start(stream: Stream, config: &Arc<ServerConfig>) -> io::Result<Encrypted> {
    let acceptor = TlsAcceptor::from(Arc::clone(config));
    let (halves, connection) = match stream {
        Stream::Tcp(stream) => {
            let (stream, connection) = acceptor.accept(stream).await?.into_inner();
            (split_tcp(stream), connection)
        }
        Stream::Unix(stream) => {
            let (stream, connection) = acceptor.accept(stream).await?.into_inner();
            (split_unix(stream), connection)
        }
        Stream::Tls(_) => return Err(io::Error::new(io::ErrorKind::InvalidInput, "TLS within TLS")),
    };
    let names = names(&connection);
    Ok(Encrypted { stream: Stream::Tls(EncryptedStream::new(halves, connection)), names })
}

/// The DNS names of the client's certificate, which the handshake has verified.
fn names(connection: &ServerConnection) -> Vec<String> {
    let certificate = connection.peer_certificates().and_then(<[_]>::first);
    let Some(Ok(certificate)) = certificate.map(EndEntityCert::try_from) else {
        return Vec::new();
    };
    certificate.valid_dns_names().map(str::to_owned).collect()
}
