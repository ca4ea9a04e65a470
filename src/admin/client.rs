//! The other end of the admin server: what `nbdcast status` asks a running engine, and how orders get there.
//!
//! Owns the admin URL and one bounded request. Prints nothing.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use listener_agent::config::{Endpoint, EndpointError};
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;

use crate::status::{EventStatus, StatusReport};

/// For the whole exchange; the engine answers from memory.
const EXCHANGE_TIME_MAX: Duration = Duration::from_secs(5);
/// For an order: formatting a replica writes out its journal.
const ORDER_TIME_MAX: Duration = Duration::from_secs(900);
/// Greatest answer taken, in bytes.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Where a running engine's admin server is: `http://HOST:PORT`, or just `HOST:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminUrl {
    host: String,
    port: u16,
}

/// Why a text is not an admin URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdminUrlError {
    /// Something else than http.
    #[error("`{text}` is not possible; write http://HOST:PORT, such as http://127.0.0.1:10808")]
    Form {
        /// The text as given.
        text: String,
    },
    /// The part after `http://` is not an address.
    #[error(transparent)]
    Address(#[from] EndpointError),
}

impl AdminUrl {
    /// The URL of an engine of this machine whose config says `admin.listen = ADDRESS`.
    ///
    /// None for a Unix socket. "Every interface" means loopback to somebody on the same machine.
    pub fn of_listener(address: &Endpoint) -> Option<AdminUrl> {
        let Endpoint::Tcp { host, port } = address else {
            return None;
        };
        let host = match host.as_str() {
            "0.0.0.0" => "127.0.0.1",
            "::" => "::1",
            host => host,
        };
        Some(AdminUrl { host: host.to_owned(), port: *port })
    }
}

impl From<SocketAddr> for AdminUrl {
    /// The URL of the server that listens at `address`, seen from the same machine.
    fn from(address: SocketAddr) -> AdminUrl {
        let ip = match address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        AdminUrl { host: ip.to_string(), port: address.port() }
    }
}

impl fmt::Display for AdminUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host, port) = (self.host.clone(), self.port);
        write!(f, "http://{}", Endpoint::Tcp { host, port })
    }
}

impl FromStr for AdminUrl {
    type Err = AdminUrlError;

    fn from_str(text: &str) -> Result<AdminUrl, AdminUrlError> {
        let form = || AdminUrlError::Form { text: text.to_owned() };
        let address = text.strip_prefix("http://").unwrap_or(text);
        let address = address.strip_suffix('/').unwrap_or(address);
        if address.contains('/') {
            return Err(form());
        }
        AdminUrl::of_listener(&address.parse()?).ok_or_else(form)
    }
}

/// Why an engine could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nothing listens there.
    #[error("no engine answers at {url}: {source}")]
    Connect {
        /// The address asked.
        url: AdminUrl,
        /// What the operating system said.
        source: io::Error,
    },
    /// Connected, but no complete answer in time.
    #[error("no answer from {url} within {} s", time_max.as_secs())]
    TimedOut {
        /// The address asked.
        url: AdminUrl,
        /// How long it was waited.
        time_max: Duration,
    },
    /// The exchange broke off, or is not HTTP.
    #[error("{url} did not answer as an nbdcast engine does: {reason}")]
    Exchange {
        /// The address asked.
        url: AdminUrl,
        /// What went wrong.
        reason: String,
    },
    /// An HTTP error.
    #[error("{url} answered with {code}")]
    Refused {
        /// The address asked.
        url: AdminUrl,
        /// The HTTP status.
        code: StatusCode,
    },
    /// The engine does not carry out an order.
    #[error("{message}")]
    OrderRefused {
        /// Why, one line.
        message: String,
        /// What to do about it, one line.
        remedy: Option<String>,
    },
}

impl AskError {
    /// What the operator can do about it, as one line.
    pub fn remedy(&self) -> Option<&str> {
        match self {
            AskError::Connect { .. } => Some(
                "is `nbdcast serve` running? Give its admin address with --admin URL, or its config with --config FILE",
            ),
            AskError::TimedOut { .. } => {
                Some("the engine may be overloaded or stopped; look at its log, then try again")
            }
            AskError::Exchange { .. } | AskError::Refused { .. } => {
                Some("another program may listen there; check --admin URL against admin.listen of the engine's config")
            }
            AskError::OrderRefused { remedy, .. } => remedy.as_deref(),
        }
    }
}

/// Asks the engine at `url` for its status.
pub async fn ask_status(url: &AdminUrl) -> Result<StatusReport, AskError> {
    ask(url, "/status").await
}

/// Asks the engine at `url` for its last events, oldest first.
pub async fn ask_events(url: &AdminUrl) -> Result<Vec<EventStatus>, AskError> {
    ask(url, "/events").await
}

async fn ask<T: DeserializeOwned>(url: &AdminUrl, path: &str) -> Result<T, AskError> {
    let (code, body) = exchange(url, Method::GET, path, String::new(), EXCHANGE_TIME_MAX).await?;
    if code != StatusCode::OK {
        return Err(AskError::Refused { url: url.clone(), code });
    }
    serde_json::from_slice(&body).map_err(|error| AskError::Exchange { url: url.clone(), reason: error.to_string() })
}

/// Gives the engine at `url` an order, and waits until it is carried out as far as the engine waits for it. Returns what
/// the engine says to that.
pub async fn give_order(
    url: &AdminUrl,
    method: Method,
    path: &str,
    body: &serde_json::Value,
) -> Result<String, AskError> {
    let (code, body) = exchange(url, method, path, body.to_string(), ORDER_TIME_MAX).await?;
    let text = String::from_utf8_lossy(&body);
    if code.is_client_error() {
        let (message, remedy) = match text.trim_end().split_once("\n  remedy: ") {
            Some((message, remedy)) => (message.to_owned(), Some(remedy.to_owned())),
            None => (text.trim_end().to_owned(), None),
        };
        return Err(AskError::OrderRefused { message, remedy });
    }
    if code != StatusCode::OK {
        return Err(AskError::Refused { url: url.clone(), code });
    }
    let said: Option<serde_json::Value> = serde_json::from_str(&text).ok();
    Ok(said.as_ref().and_then(|said| said["message"].as_str()).unwrap_or("done").to_owned())
}

async fn exchange(
    url: &AdminUrl,
    method: Method,
    path: &str,
    body: String,
    time_max: Duration,
) -> Result<(StatusCode, Bytes), AskError> {
    match tokio::time::timeout(time_max, converse(url, method, path, body)).await {
        Ok(answer) => answer,
        Err(_) => Err(AskError::TimedOut { url: url.clone(), time_max }),
    }
}

async fn converse(url: &AdminUrl, method: Method, path: &str, body: String) -> Result<(StatusCode, Bytes), AskError> {
    let broken = |error: &dyn fmt::Display| AskError::Exchange { url: url.clone(), reason: error.to_string() };
    let connecting = tokio::time::timeout(EXCHANGE_TIME_MAX, TcpStream::connect((url.host.as_str(), url.port)));
    let stream = connecting
        .await
        .map_err(|_| AskError::TimedOut { url: url.clone(), time_max: EXCHANGE_TIME_MAX })?
        .map_err(|source| AskError::Connect { url: url.clone(), source })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| broken(&error))?;
    let authority = url.to_string();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, authority.trim_start_matches("http://"))
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|error| broken(&error))?;
    let ask = async move {
        let response = sender.send_request(request).await.map_err(|e| broken(&e))?;
        let code = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX);
        let body = body.collect().await.map_err(|error| broken(&error))?;
        Ok((code, body.to_bytes()))
    };
    // The connection makes progress only while it is polled; its own error reaches the request as well.
    let (answer, _) = tokio::join!(ask, connection);
    answer
}
