//! The admin HTTP server: `/status` and `/events` (JSON), `/metrics` (Prometheus text), `/healthz`, and orders under
//! `/volumes/`.
//!
//! Owns the listening socket, the bounds on what a client may cost, who may give orders, and the answers. Carries out no
//! order itself: a `Control` does.

pub mod client;
pub mod control;
mod metrics;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, ORIGIN};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use listener_agent::config::Endpoint;
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::status::StatusSource;
use control::{Control, Route};

/// Connections at a time; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 32;
/// From accept to the last byte of the answer, unless an order is being carried out. One request per connection, so
/// nothing honest needs longer.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);
/// From accept to the end of the request's head.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// Request line and headers together, in bytes. hyper's own lower bound is 8 KiB.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Header lines of a request.
const HEADERS_MAX: usize = 64;
/// Body of an order, in bytes.
const BODY_BYTES_MAX: usize = 64 * 1024;
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
    pub async fn serve(self, control: Arc<dyn Control>, mut stop: watch::Receiver<bool>) {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {}
            () = self.accept_all(control) => {}
        }
    }

    async fn accept_all(self, control: Arc<dyn Control>) {
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
                    let control = Arc::clone(&control);
                    connections.spawn(async move {
                        serve_connection(stream, control).await;
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

async fn serve_connection(stream: TcpStream, control: Arc<dyn Control>) {
    let carrying_out = AtomicBool::new(false);
    let service = service_fn(|request: Request<Incoming>| {
        let (control, carrying_out) = (control.as_ref(), &carrying_out);
        async move { Ok::<_, Infallible>(answer(request, control, carrying_out).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    loop {
        match tokio::time::timeout(CONNECTION_TIME_MAX, connection.as_mut()).await {
            Ok(Ok(())) => return,
            Ok(Err(error)) => return tracing::debug!(%error, "an admin connection failed"),
            // Orders have limits of their own.
            Err(_) if carrying_out.load(Ordering::Relaxed) => {}
            Err(_) => return tracing::debug!("an admin connection took too long"),
        }
    }
}

/// The answer to one request. A body is read only if it may be an order's.
async fn answer<B>(request: Request<B>, control: &dyn Control, carrying_out: &AtomicBool) -> Response<Full<Bytes>>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let path = request.uri().path().to_owned();
    if let Some((volume, route)) = Route::of(&path) {
        return take_order(request, volume, route, control, carrying_out).await;
    }
    let endpoint: fn(&dyn Control) -> Answer = match path.as_str() {
        "/status" => |control| json("the status", &control.status()),
        "/events" => |control| json("the events", &control.events()),
        "/metrics" => |control| metrics(control),
        "/healthz" => |control| health(control),
        path => {
            let text = format!("there is no {path}; try /status, /events, /metrics or /healthz\n");
            return Answer::text(StatusCode::NOT_FOUND, text).into_response();
        }
    };
    // hyper leaves the body out of an answer to HEAD.
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return not_allowed("GET", "GET, HEAD");
    }
    endpoint(control).into_response()
}

fn not_allowed(possible: &str, allow: &'static str) -> Response<Full<Bytes>> {
    let text = format!("only {possible} is possible here\n");
    let mut response = Answer::text(StatusCode::METHOD_NOT_ALLOWED, text).into_response();
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
    response
}

/// Why a request may not give orders: a page in a browser on this machine could send it.
fn refuse_browser<B>(request: &Request<B>) -> Option<Answer> {
    if request.headers().contains_key(ORIGIN) {
        let text = "orders of web pages are not taken: the request has an Origin header\n".to_owned();
        return Some(Answer::text(StatusCode::FORBIDDEN, text));
    }
    let content_type = request.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let is_json = content_type.split(';').next().is_some_and(|t| t.trim().eq_ignore_ascii_case("application/json"));
    // A page cannot send DELETE without being asked for its origin first.
    (request.method() == Method::POST && !is_json).then(|| {
        let text = "the request needs Content-Type: application/json\n".to_owned();
        Answer::text(StatusCode::UNSUPPORTED_MEDIA_TYPE, text)
    })
}

async fn take_order<B>(
    request: Request<B>,
    volume: &str,
    route: Route<'_>,
    control: &dyn Control,
    carrying_out: &AtomicBool,
) -> Response<Full<Bytes>>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    if request.method().as_str() != route.method() {
        return not_allowed(route.method(), route.method());
    }
    if let Some(refusal) = refuse_browser(&request) {
        return refusal.into_response();
    }
    let body = match Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            let text = format!("the body is longer than {BODY_BYTES_MAX} bytes\n");
            return Answer::text(StatusCode::PAYLOAD_TOO_LARGE, text).into_response();
        }
        Err(error) => {
            return Answer::text(StatusCode::BAD_REQUEST, format!("the body broke off: {error}\n")).into_response();
        }
    };
    let order = match route.order(&body) {
        Ok(order) => order,
        Err(fault) => return Answer::text(StatusCode::BAD_REQUEST, format!("{fault}\n")).into_response(),
    };
    tracing::info!(volume, ?order, "an order came in");
    carrying_out.store(true, Ordering::Relaxed);
    let outcome = control.order(volume, order).await;
    carrying_out.store(false, Ordering::Relaxed);
    match outcome {
        Ok(message) => json("the answer", &serde_json::json!({ "message": message })).into_response(),
        Err(refusal) => {
            tracing::info!(volume, reason = refusal.message, "the order is refused");
            refusal.answer().into_response()
        }
    }
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

fn json<T: Serialize>(what: &str, value: &T) -> Answer {
    match serde_json::to_string(value) {
        Ok(body) => Answer { code: StatusCode::OK, content_type: "application/json", body },
        Err(error) => {
            let text = format!("{what} cannot be written: {error}\n");
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, text)
        }
    }
}

fn metrics<S: StatusSource + ?Sized>(source: &S) -> Answer {
    match metrics::render(&source.status()) {
        Ok(body) => Answer { code: StatusCode::OK, content_type: metrics::CONTENT_TYPE, body },
        Err(error) => {
            let text = format!("the metrics cannot be written: {error}\n");
            Answer::text(StatusCode::INTERNAL_SERVER_ERROR, text)
        }
    }
}

fn health<S: StatusSource + ?Sized>(source: &S) -> Answer {
    let complaints = source.status().complaints();
    if complaints.is_empty() {
        return Answer::text(StatusCode::OK, "ok\n".to_owned());
    }
    let text = format!("{}\n", complaints.join("\n"));
    Answer::text(StatusCode::SERVICE_UNAVAILABLE, text)
}

#[cfg(test)]
mod tests;
