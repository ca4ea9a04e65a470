//! Connections to agents: TCP or a Unix socket, encrypted if the configuration says so, and what keeps one from coming
//! about, in words. What is said on them is not its business.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use listener_agent::config::Endpoint;
use listener_agent::connection::ConnectionError;
use listener_agent::tls::{self, TlsError};
use rustls::pki_types::ServerName;
use rustls::{CertificateError, ClientConfig};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use crate::config::{AgentsConfig, InvalidValue, ReplicaConfig};

const DIAL_MAX: Duration = Duration::from_secs(2);
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// What is read from an agent.
pub(super) type Reader = Box<dyn AsyncRead + Send + Unpin>;
/// What is written to an agent.
pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// How the agents of an engine are reached.
#[derive(Debug, Clone)]
pub(super) struct Agents {
    config: AgentsConfig,
    tls: Option<Arc<ClientConfig>>,
}

impl Agents {
    /// Reads the certificates, if there are to be some.
    pub(super) fn new(config: &AgentsConfig) -> Result<Agents, TlsError> {
        let tls = config.certificates.as_deref().map(tls::client_config).transpose()?;
        Ok(Agents { config: config.clone(), tls })
    }

    /// Checks a replica that the configuration does not have.
    pub(super) fn check(&self, replica: &ReplicaConfig) -> Result<(), InvalidValue> {
        self.config.check(replica)
    }

    /// The way to the agent at `address`, whose certificate must bear `name`.
    pub(super) fn way_to(&self, address: &Endpoint, name: &str) -> Way {
        let tls = self.tls.as_ref().map(|config| Tls {
            connector: TlsConnector::from(config.clone()),
            name: ServerName::try_from(name.to_owned())
                .expect("names are checked with the configuration, and with orders"),
        });
        Way { endpoint: address.clone(), tls }
    }
}

struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

/// The way to one agent.
pub(super) struct Way {
    pub(super) endpoint: Endpoint,
    tls: Option<Tls>,
}

/// Why an agent cannot be talked to.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Trouble {
    text: String,
    remedy: Option<&'static str>,
}

impl Trouble {
    /// What to do about it, if there is more to say than that the agent must run.
    #[must_use]
    pub fn remedy(&self) -> Option<&'static str> {
        self.remedy
    }

    /// Everything in one line.
    pub(super) fn line(&self) -> String {
        match self.remedy {
            Some(remedy) => format!("{}; {remedy}", self.text),
            None => self.text.clone(),
        }
    }
}

impl From<String> for Trouble {
    fn from(text: String) -> Trouble {
        Trouble { text, remedy: None }
    }
}

impl From<ConnectionError> for Trouble {
    fn from(error: ConnectionError) -> Trouble {
        match error {
            ConnectionError::SpeaksTls => Trouble {
                text: "the agent speaks TLS, and this engine does not".to_owned(),
                remedy: Some("set `certificates` in [agents] to a directory that `nbdcast certs` made"),
            },
            ConnectionError::Io(error) => match tls::reason(&error) {
                Some(reason) => Trouble { text: tls::in_words(reason, "the agent"), remedy: tls_remedy(reason) },
                None => error.to_string().into(),
            },
            other @ (ConnectionError::Closed | ConnectionError::Wire(_) | ConnectionError::Refused(_)) => {
                other.to_string().into()
            }
        }
    }
}

fn tls_remedy(reason: &rustls::Error) -> Option<&'static str> {
    match reason {
        rustls::Error::InvalidMessage(_) => {
            Some("give it `certificates` in its [tls], or --tls-certificates; `nbdcast certs` makes them")
        }
        rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext { .. }) => Some(
            "check the replica's `address`, give that agent its own certificate, or set the replica's `certificate`",
        ),
        rustls::Error::InvalidCertificate(_) => {
            Some("give that agent a certificate of the CA that `agents.certificates` has, as `nbdcast certs` makes it")
        }
        rustls::Error::AlertReceived(_) => Some(
            "give this engine a certificate of the agent's CA in `agents.certificates`; the agent's log tells more",
        ),
        _ => None,
    }
}

impl Way {
    /// Connects. Takes a bounded time, and may be dropped at any moment.
    pub(super) async fn connect(&self) -> Result<(Reader, Writer), Trouble> {
        let failed = |e: io::Error| Trouble::from(format!("cannot connect: {e}"));
        let late = |_| Trouble::from(format!("cannot connect: no answer within {DIAL_MAX:?}"));
        match &self.endpoint {
            Endpoint::Tcp { host, port } => {
                let dialling = TcpStream::connect((host.as_str(), *port));
                let stream = timeout(DIAL_MAX, dialling).await.map_err(late)?.map_err(failed)?;
                stream.set_nodelay(true).map_err(failed)?;
                self.enter(stream, |stream| boxed(stream.into_split())).await
            }
            Endpoint::Unix(path) => {
                let stream = timeout(DIAL_MAX, UnixStream::connect(path)).await.map_err(late)?.map_err(failed)?;
                self.enter(stream, |stream| boxed(stream.into_split())).await
            }
        }
    }

    async fn enter<S>(&self, stream: S, split: fn(S) -> (Reader, Writer)) -> Result<(Reader, Writer), Trouble>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Some(tls) = &self.tls else { return Ok(split(stream)) };
        match timeout(HANDSHAKE_MAX, tls.connector.connect(tls.name.clone(), stream)).await {
            Ok(Ok(stream)) => Ok(boxed(tokio::io::split(stream))),
            Ok(Err(e)) if e.kind() == io::ErrorKind::UnexpectedEof => Err(Trouble {
                text: "the agent closed the connection during the TLS handshake".to_owned(),
                remedy: Some("the agent's log tells why"),
            }),
            Ok(Err(e)) => Err(ConnectionError::Io(e).into()),
            Err(_) => Err(format!("no TLS with the agent within {HANDSHAKE_MAX:?}").into()),
        }
    }
}

fn boxed<R, W>((reader, writer): (R, W)) -> (Reader, Writer)
where
    R: AsyncRead + Send + Unpin + 'static,
    W: AsyncWrite + Send + Unpin + 'static,
{
    (Box::new(reader), Box::new(writer))
}
