//! The admin HTTP server: `/status` (JSON), `/metrics` (Prometheus text) and `/healthz`.
//!
//! Owns the listening socket, the bounds on what a client may cost, and the answers. Changes nothing in the engine: it
//! reads a `StatusSource`, and never waits for a volume.

pub mod client;
mod metrics;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use listener_agent::config::Endpoint;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::status::StatusSource;

/// Connections at a time; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 32;
/// From accept to the last byte of the answer. One request per connection, so nothing honest needs longer.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);
/// From accept to the end of the request's head.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// Request line and headers together, in bytes. hyper's own lower bound is 8 KiB.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Header lines of a request.
const HEADERS_MAX: usize = 64;
/// Pause after a failed accept, such as for want of file descriptors, so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why the admin server cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// The address cannot be listened at.
    #[error("cannot listen at the admin address {address}: {source}")]
    Bind {
        /// The configured address.
        address: Endpoint,
        /// What the operating system said.
        source: io::Error,
    },
    /// The address is a Unix socket.
    #[error("cannot listen at the admin address {address}: it is not a TCP address")]
    NotTcp {
        /// The configured address.
        address: Endpoint,
    },
}

impl AdminError {
    /// What the operator can do about it, as one line.
    pub fn remedy(&self) -> &'static str {
        match self {
            AdminError::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                "stop the program that listens there (perhaps another nbdcast), or choose another port: admin.listen in the config, --admin for demo"
            }
            AdminError::Bind { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "choose a port above 1023: admin.listen in the config, --admin for demo"
            }
            AdminError::Bind { .. } | AdminError::NotTcp { .. } => {
                "choose an address of this machine: admin.listen in the config, --admin for demo"
            }
        }
    }
}

/// A listening socket that does not answer yet.
#[derive(Debug)]
pub struct AdminServer {
    listener: TcpListener,
    local_address: SocketAddr,
}

impl AdminServer {
    /// Takes the address, so that a busy port is known before anything else is started.
    pub async fn bind(address: &Endpoint) -> Result<AdminServer, AdminError> {
        let Endpoint::Tcp { host, port } = address else {
            let address = address.clone();
            return Err(AdminError::NotTcp { address });
        };
        let bind = async {
            let listener = TcpListener::bind((host.as_str(), *port)).await?;
            let local_address = listener.local_addr()?;
            Ok(AdminServer { listener, local_address })
        };
        bind.await.map_err(|source| AdminError::Bind { address: address.clone(), source })
    }

    /// Where it listens, with the real port.
    pub fn local_address(&self) -> SocketAddr {
        self.local_address
    }

    /// Answers requests until `stop` becomes true or its sender is gone; open connections are then cut off.
    pub async fn serve(self, source: Arc<dyn StatusSource>, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {}
            () = self.accept_all(source) => {}
        }
    }

    async fn accept_all(self, source: Arc<dyn StatusSource>) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        // Dropped with this future: no connection outlives the server.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return;
            };
            while connections.try_join_next().is_some() {}
            match self.listener.accept().await {
                Ok((stream, _)) => {
                    let source = Arc::clone(&source);
                    connections.spawn(async move {
                        serve_connection(stream, source).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the admin server cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, source: Arc<dyn StatusSource>) {
    let service = service_fn(|request: Request<Incoming>| {
        let response = answer(&request, source.as_ref());
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_TIME_MAX, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an admin connection failed"),
        Err(_) => tracing::debug!("an admin connection took too long"),
    }
}

/// The answer to one request. A body, if any, is never read.
fn answer<B>(request: &Request<B>, source: &dyn StatusSource) -> Response<Full<Bytes>> {
    let endpoint: fn(&dyn StatusSource) -> Answer = match request.uri().path() {
        "/status" => status,
        "/metrics" => metrics,
        "/healthz" => health,
        path => {
            let text = format!("there is no {path}; try /status, /metrics or /healthz\n");
            return Answer::text(StatusCode::NOT_FOUND, text).into_response();
        }
    };
    // hyper leaves the body out of an answer to HEAD.
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let text = "only GET is possible here\n".to_owned();
        let mut response = Answer::text(StatusCode::METHOD_NOT_ALLOWED, text).into_response();
        let allowed = HeaderValue::from_static("GET, HEAD");
        response.headers_mut().insert(ALLOW, allowed);
        return response;
    }
    endpoint(source).into_response()
}

struct Answer {
    code: StatusCode,
    content_type: &'static str,
    body: String,
}

impl Answer {
    fn text(code: StatusCode, body: String) -> Answer {
        Answer { code, content_type: "text/plain; charset=utf-8", body }
    }

    fn into_response(self) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::new(Bytes::from(self.body)));
        *response.status_mut() = self.code;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(self.content_type));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        response
    }
}

fn status(source: &dyn StatusSource) -> Answer {
    match serde_json::to_string(&source.status()) {
        Ok(body) => Answer { code: StatusCode::OK, content_type: "application/json", body },
        Err(error) => {
            let text = format!("the status cannot be written: {error}\n");
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, text)
        }
    }
}

fn metrics(source: &dyn StatusSource) -> Answer {
    match metrics::render(&source.status()) {
        Ok(body) => Answer { code: StatusCode::OK, content_type: metrics::CONTENT_TYPE, body },
        Err(error) => {
            let text = format!("the metrics cannot be written: {error}\n");
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, text)
        }
    }
}

fn health(source: &dyn StatusSource) -> Answer {
    let complaints = source.status().complaints();
    if complaints.is_empty() {
        return Answer::text(StatusCode::OK, "ok\n".to_owned());
    }
    let text = format!("{}\n", complaints.join("\n"));
    Answer::text(StatusCode::SERVICE_UNAVAILABLE, text)
}

#[cfg(test)]
mod tests;
