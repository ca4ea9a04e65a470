//! TLS on an NBD connection: whether clients may or must use it, and turning a connection into an encrypted one.

use std::io;
use std::sync::Arc;

use rustls::ServerConfig;

use super::stream::Stream;

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
    let _ = (stream, config);
    Err(io::ErrorKind::Unsupported.into())
}
