//! One client's connection from greeting to close: the tokio shell around the handshake, and what ends a session.
//!
//! The stream is whole until the handshake is over, as it can turn into an encrypted one until then. Requests are taken
//! in by `transmission`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use super::access::Client;
use super::admission::Place;
use super::backend::{Backend, ExportInfo};
use super::constants::{OPTION_DATA_BYTES_MAX, OPTION_HEADER_BYTES};
use super::handshake::{Agreement, Handshake, HandshakeError, Offer, Progress, TlsMode, greeting};
use super::intake::Intake;
use super::outbox::Outbox;
use super::pulse::Moment;
use super::request::BadMagic;
use super::server::Shared;
use super::stream::Stream;
use super::tls::{self, Tls};
use super::transmission::Transmission;

/// How long to wait for a client to close after the server is done: closing earlier, with bytes of the client unread,
/// would take back replies that are still on their way. Also how long a client in the handshake may take to send what
/// can be refused.
const LINGER_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a session ends. All but `Goodbye` and `Closed` are logged by name.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionEnd {
    #[error("the client said goodbye")]
    Goodbye,
    #[error("the client closed the connection")]
    Closed,
    #[error("the server is stopping")]
    Stopping,
    #[error("the client left the handshake unfinished for {0:?}")]
    HandshakeTimeout(Duration),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    BadMagic(#[from] BadMagic),
    #[error("a payload of {length} bytes is too long even to refuse")]
    PayloadTooLong { length: u64 },
    #[error("the client hung up before its change could be taken in; the change may be stale and was dropped")]
    StaleChange,
    #[error("too many clients are connected")]
    TooMany,
    #[error("TLS could not be started: {0}")]
    Tls(#[source] io::Error),
    #[error("connection lost: {0}")]
    Io(#[from] io::Error),
}

/// Closes the socket when the session ends, however it ends; completions still to come may hold on to the outbox.
struct CloseOnDrop(Arc<Outbox>);

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Completes when the server is told to stop, or when nobody is left to tell it.
pub(super) async fn stopped(mut shutdown: watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// Serves one connection to its end.
pub(super) async fn serve_connection(
    stream: Stream,
    shared: Arc<Shared>,
    exports: Arc<[Arc<dyn Backend>]>,
    mut place: Place,
    shutdown: watch::Receiver<bool>,
) {
    let handshake_timeout = shared.limits.handshake_timeout;
    let negotiated = tokio::select! {
        negotiated = negotiate(stream, &shared, &exports, &shutdown) => negotiated,
        () = tokio::time::sleep(handshake_timeout) => {
            Err(SessionEnd::HandshakeTimeout(handshake_timeout))
        }
        () = async {
            stopped(shutdown.clone()).await;
            tokio::time::sleep(LINGER_TIMEOUT).await;
        } => Err(SessionEnd::Stopping),
    };
    let end = match negotiated {
        Ok(negotiated) if place.become_client() => transmit(negotiated, Arc::clone(&shared), &exports, shutdown).await,
        Ok(_) => SessionEnd::TooMany,
        Err(end) => end,
    };
    drop(place);
    log_end(&shared, &end);
}

/// Says why a session ended, unless too much is said about connections already.
fn log_end(shared: &Shared, end: &SessionEnd) {
    match end {
        SessionEnd::Goodbye | SessionEnd::Closed | SessionEnd::Stopping => {
            if let Some(suppressed) = shared.log.pass() {
                tracing::info!(suppressed, "NBD connection closed: {end}");
            }
        }
        SessionEnd::HandshakeTimeout(_)
        | SessionEnd::Handshake(_)
        | SessionEnd::BadMagic(_)
        | SessionEnd::PayloadTooLong { .. }
        | SessionEnd::StaleChange
        | SessionEnd::TooMany
        | SessionEnd::Tls(_)
        | SessionEnd::Io(_) => {
            if let Some(suppressed) = shared.trouble_log.pass() {
                tracing::warn!(suppressed, "NBD connection closed: {end}");
            }
        }
    }
}

/// A connection whose handshake is over.
struct Negotiated {
    stream: Stream,
    /// Before anything of the client was read.
    begun: Moment,
    client: Client,
    agreement: Agreement,
    /// What was read beyond the handshake.
    rest: BytesMut,
}

async fn negotiate(
    mut stream: Stream,
    shared: &Shared,
    exports: &[Arc<dyn Backend>],
    shutdown: &watch::Receiver<bool>,
) -> Result<Negotiated, SessionEnd> {
    let begun = Moment::now();
    let infos: Vec<ExportInfo> = exports.iter().map(|backend| backend.export()).collect();
    let (tls, config) = match &shared.tls {
        Tls::Off => (TlsMode::Off, None),
        Tls::On(config) => (TlsMode::On, Some(config)),
        Tls::Require(config) => (TlsMode::Require, Some(config)),
    };
    let default_export = shared.default_export.as_deref();
    let offer = Offer { exports: infos.iter().collect(), default_export, tls };
    let client = Client { address: stream.peer_ip(), is_tls: false, names: Vec::new() };
    let mut handshake = Handshake::new(offer, client);
    let mut chunk = [0; 4096];
    let input_bytes_max = OPTION_HEADER_BYTES + OPTION_DATA_BYTES_MAX as usize;
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    stream.write_all(&greeting()).await?;
    loop {
        if *shutdown.borrow() {
            handshake.stop();
        }
        let progress = handshake.advance(&mut input, &mut output)?;
        stream.write_all(&output).await?;
        output.clear();
        match progress {
            Progress::Again => {}
            Progress::NeedInput => {
                let wanted = (input_bytes_max - input.len()).min(chunk.len());
                let read_bytes = stream.read(&mut chunk[..wanted]).await?;
                if read_bytes == 0 {
                    return Err(SessionEnd::Closed);
                }
                input.extend_from_slice(&chunk[..read_bytes]);
            }
            Progress::Aborted => return Err(SessionEnd::Goodbye),
            Progress::StartTls => {
                let config = config.ok_or_else(|| SessionEnd::Tls(io::ErrorKind::Unsupported.into()))?;
                let encrypted = tls::start(stream, config).await.map_err(SessionEnd::Tls)?;
                stream = encrypted.stream;
                handshake.on_tls(encrypted.names);
            }
            Progress::Chosen(agreement) => {
                let client = handshake.client().clone();
                return Ok(Negotiated { stream, begun, client, agreement, rest: input });
            }
        }
    }
}

/// The transmission phase, up to the last reply.
async fn transmit(
    negotiated: Negotiated,
    shared: Arc<Shared>,
    exports: &[Arc<dyn Backend>],
    shutdown: watch::Receiver<bool>,
) -> SessionEnd {
    let Negotiated { stream, begun, client, agreement, rest } = negotiated;
    let backend = Arc::clone(&exports[agreement.export]);
    if let Some(suppressed) = shared.log.pass() {
        tracing::info!(
            peer = %client,
            tls = client.is_tls,
            names = ?client.names,
            export = backend.export().name,
            style = ?agreement.style,
            suppressed,
            "NBD client connected"
        );
    }
    let (read, write) = stream.split();
    let intake = Intake::new(read, &rest, shared.budget.loan());
    let outbox = Arc::new(Outbox::new(write, Arc::clone(&shared)));
    let closer = CloseOnDrop(Arc::clone(&outbox));
    let stall_timeout = shared.limits.stall_timeout;
    let mut transmission =
        Transmission::new(intake, Arc::clone(&outbox), shared, shutdown.clone(), backend, agreement, begun);
    let serve = async {
        let end = tokio::select! {
            end = transmission.take_in_requests() => end,
            () = async {
                stopped(shutdown).await;
                outbox.outstanding_below(1).await;
            } => SessionEnd::Stopping,
        };
        transmission.uncork();
        outbox.outstanding_below(1).await;
        if !matches!(end, SessionEnd::Io(_)) {
            let linger = async {
                outbox.stream().shut_down_writing().await?;
                transmission.discard_to_end().await
            };
            let _ = tokio::time::timeout(LINGER_TIMEOUT, linger).await;
        }
        end
    };
    let end = tokio::select! {
        end = serve => end,
        () = outbox.write_parked(stall_timeout) => SessionEnd::Closed,
    };
    drop(closer);
    end
}
