//! How engines are let in over TLS: the handshake, and whether the name in an engine's certificate is one of those that
//! may. What engines do then is the session's business.

use protocol::message::{Refused, RefusedReason};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::replicas::refused;
use crate::config::AgentTls;
use crate::connection::ConnectionError;
use crate::tls::{self, ClientCertificates, TlsError, names_of};

/// What the agent shows, and whom it lets in.
pub(super) struct Door {
    acceptor: TlsAcceptor,
    engines: Vec<String>,
}

impl Door {
    /// The door that the configuration asks for; `None` if it asks for none.
    pub(super) fn of(config: &AgentTls) -> Result<Option<Door>, TlsError> {
        let Some(dir) = &config.certificates else { return Ok(None) };
        let acceptor = TlsAcceptor::from(tls::server_config(dir, ClientCertificates::Required)?);
        Ok(Some(Door { acceptor, engines: config.engines.clone() }))
    }

    /// Does the handshake. With the connection comes what to tell an engine whose name is not on the list.
    pub(super) async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> Result<(TlsStream<S>, Option<Refused>), ConnectionError> {
        let stream = self.acceptor.accept(stream).await.map_err(|e| match tls::reason(&e) {
            Some(reason) => ConnectionError::Refused(tls::in_words(reason, "the engine")),
            None => ConnectionError::Io(e),
        })?;
        let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let names = certificates.first().map(names_of).unwrap_or_default();
        let is_engine = |name: &String| self.engines.iter().any(|engine| engine.eq_ignore_ascii_case(name));
        if names.iter().any(is_engine) {
            return Ok((stream, None));
        }
        let shown = if names.is_empty() { "nobody".to_owned() } else { names.join(", ") };
        let text = format!(
            "the engine's certificate is for {shown}; the agent's `tls.engines` allows {}",
            self.engines.join(", ")
        );
        Ok((stream, Some(refused(RefusedReason::Unusable, text))))
    }
}
