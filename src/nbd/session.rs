//! One client's connection from greeting to close: the tokio shell around handshake, request and reply.
//!
//! Requests are submitted in the order in which they arrive, without waiting for each other; replies leave in the
//! order of completion. Owns no knowledge of what a request may do: that is in `request`.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::sync::watch;

use super::backend::{Answer, Backend, Completion, ExportInfo, Request, Stale};
use super::budget::Charge;
use super::constants::{CMD_READ, CMD_WRITE, OPTION_DATA_BYTES_MAX, OPTION_HEADER_BYTES, REQUEST_HEADER_BYTES};
use super::handshake::{Handshake, HandshakeError, Progress, greeting};
use super::intake::{Fill, Intake};
use super::outbox::{Cork, Outbox, QueuedReply};
use super::reply::{ReplyStyle, WireError, wire_error};
use super::request::{BadMagic, ExportRules, Operation, RequestHeader, Verdict, judge};
use super::server::Shared;
use super::stream::{ReadHalf, Stream, WriteHalf};

/// How long to wait for a client to close after the server is done: closing earlier, with bytes of the client unread,
/// would take back replies that are still on their way.
const LINGER_TIMEOUT: Duration = Duration::from_millis(500);

/// Why a session ends. All but `Goodbye` and `Closed` are logged by name.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
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
    #[error("a WRITE of {length} bytes is too long even to refuse")]
    PayloadTooLong { length: u32 },
    #[error("the client hung up before its change could be taken in; the change may be stale and was dropped")]
    StaleChange,
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
    shutdown: watch::Receiver<bool>,
) {
    let (mut read, write) = stream.split();
    let handshake_timeout = shared.limits.handshake_timeout;
    let negotiated = tokio::select! {
        negotiated = negotiate(&mut read, &write, &exports) => negotiated,
        () = tokio::time::sleep(handshake_timeout) => {
            Err(SessionEnd::HandshakeTimeout(handshake_timeout))
        }
        () = stopped(shutdown.clone()) => Err(SessionEnd::Stopping),
    };
    let end = match negotiated {
        Ok((index, rest)) => {
            let export = exports[index].export();
            tracing::info!(export = export.name, "NBD client connected");
            let intake = Intake::new(read, &rest);
            let backend = Arc::clone(&exports[index]);
            transmit(intake, write, shared, backend, shutdown).await
        }
        Err(end) => end,
    };
    match end {
        SessionEnd::Goodbye | SessionEnd::Closed | SessionEnd::Stopping => {
            tracing::info!("NBD connection closed: {end}");
        }
        SessionEnd::HandshakeTimeout(_)
        | SessionEnd::Handshake(_)
        | SessionEnd::BadMagic(_)
        | SessionEnd::PayloadTooLong { .. }
        | SessionEnd::StaleChange
        | SessionEnd::Io(_) => tracing::warn!("NBD connection closed: {end}"),
    }
}

/// The handshake: which export, and what was read beyond it.
async fn negotiate(
    read: &mut ReadHalf,
    write: &WriteHalf,
    exports: &[Arc<dyn Backend>],
) -> Result<(usize, BytesMut), SessionEnd> {
    let infos: Vec<ExportInfo> = exports.iter().map(|backend| backend.export()).collect();
    let mut handshake = Handshake::new(infos.iter().collect());
    let mut chunk = [0; 4096];
    let input_bytes_max = OPTION_HEADER_BYTES + OPTION_DATA_BYTES_MAX as usize;
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    write.write_all(&greeting()).await?;
    loop {
        let progress = handshake.advance(&mut input, &mut output)?;
        write.write_all(&output).await?;
        output.clear();
        match progress {
            Progress::Again => {}
            Progress::NeedInput => {
                let wanted = (input_bytes_max - input.len()).min(chunk.len());
                let read_bytes = read.read(&mut chunk[..wanted]).await?;
                if read_bytes == 0 {
                    return Err(SessionEnd::Closed);
                }
                input.extend_from_slice(&chunk[..read_bytes]);
            }
            Progress::Aborted => return Err(SessionEnd::Goodbye),
            Progress::Chosen(index) => return Ok((index, input)),
        }
    }
}

/// The transmission phase, up to the last reply.
async fn transmit(
    intake: Intake,
    write: WriteHalf,
    shared: Arc<Shared>,
    backend: Arc<dyn Backend>,
    shutdown: watch::Receiver<bool>,
) -> SessionEnd {
    let outbox = Arc::new(Outbox::new(write));
    let closer = CloseOnDrop(Arc::clone(&outbox));
    let stall_timeout = shared.limits.stall_timeout;
    let mut transmission = Transmission::new(intake, Arc::clone(&outbox), shared, shutdown.clone(), backend);
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
        if !matches!(end, SessionEnd::Closed | SessionEnd::Io(_)) {
            outbox.stream().shut_down_writing();
            let linger = transmission.intake.discard_to_end();
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

/// The reading side of the transmission phase.
struct Transmission {
    intake: Intake,
    outbox: Arc<Outbox>,
    cork: Option<Cork>,
    shared: Arc<Shared>,
    shutdown: watch::Receiver<bool>,
    backend: Arc<dyn Backend>,
    read_only: bool,
    style: ReplyStyle,
}

impl Transmission {
    fn new(
        intake: Intake,
        outbox: Arc<Outbox>,
        shared: Arc<Shared>,
        shutdown: watch::Receiver<bool>,
        backend: Arc<dyn Backend>,
    ) -> Self {
        let read_only = backend.export().read_only;
        Self { intake, outbox, cork: None, shared, shutdown, backend, read_only, style: ReplyStyle::Simple }
    }

    async fn take_in_requests(&mut self) -> SessionEnd {
        loop {
            match self.take_in_batch().await {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// Everything one read has brought, then the next read.
    async fn take_in_batch(&mut self) -> Result<(), SessionEnd> {
        while let Some(bytes) = self.intake.take::<REQUEST_HEADER_BYTES>() {
            let header = RequestHeader::parse(&bytes)?;
            if self.cork.is_none() {
                self.cork = Some(self.outbox.cork());
            }
            self.take_in(header).await?;
        }
        self.uncork();
        match self.intake.fill().await? {
            Fill::Read { .. } => Ok(()),
            Fill::EndOfStream => Err(SessionEnd::Closed),
        }
    }

    /// Lets waiting replies go. Before every wait, as those who wait for them may be who we wait for.
    fn uncork(&mut self) {
        self.cork = None;
    }

    fn stopping(&self) -> bool {
        *self.shutdown.borrow()
    }

    async fn take_in(&mut self, header: RequestHeader) -> Result<(), SessionEnd> {
        let mut waited = false;
        let limit = self.shared.limits.requests_per_connection_max;
        if self.outbox.outstanding() >= limit {
            self.uncork();
            self.outbox.outstanding_below(limit).await;
            waited = true;
        }
        let rules = ExportRules { size_bytes: self.backend.size_bytes(), read_only: self.read_only };
        let done = match judge(&header, rules, self.stopping()) {
            Verdict::Disconnect => return Err(SessionEnd::Goodbye),
            Verdict::HangUp => {
                let length = header.length;
                return Err(SessionEnd::PayloadTooLong { length });
            }
            Verdict::Nothing => {
                self.outbox.begin();
                self.answer_at_once(header.cookie, Ok(Bytes::new()));
                Ok(())
            }
            Verdict::Reject(error) => {
                self.outbox.begin();
                self.refuse(header, error).await
            }
            Verdict::Submit(operation) => {
                self.outbox.begin();
                self.submit(header, operation, waited).await
            }
        };
        if done.is_err() {
            self.outbox.abandon();
        }
        done
    }

    /// Stays in step with a client whose request is refused.
    async fn refuse(&mut self, header: RequestHeader, error: WireError) -> Result<(), SessionEnd> {
        let payload_bytes = header.payload_bytes() as usize;
        if payload_bytes > 0 {
            self.uncork();
            let stall_timeout = self.shared.limits.stall_timeout;
            self.intake.discard(payload_bytes, stall_timeout).await?;
        }
        self.answer_at_once(header.cookie, Err(error));
        Ok(())
    }

    fn answer_at_once(&self, cookie: u64, result: Result<Bytes, WireError>) {
        self.shared.counters.on_answered(&result);
        let reply = self.style.encode(cookie, result);
        let charge = None;
        self.outbox.send(QueuedReply { reply, charge });
    }

    /// Takes in the payload, if there is one, and hands the request to the backend.
    async fn submit(
        &mut self,
        header: RequestHeader,
        operation: Operation,
        mut waited: bool,
    ) -> Result<(), SessionEnd> {
        let data_bytes = match header.command {
            CMD_READ | CMD_WRITE => header.length,
            _ => 0,
        };
        let charge = match self.shared.budget.try_charge(data_bytes) {
            Some(charge) => charge,
            None => {
                self.uncork();
                waited = true;
                let charge = self.shared.budget.charge(data_bytes).await;
                charge.ok_or(SessionEnd::Stopping)?
            }
        };
        let data = match operation {
            Operation::Write { .. } => self.read_payload(header.length, &mut waited).await?,
            Operation::Read | Operation::Flush | Operation::Trim { .. } | Operation::WriteZeroes { .. } => Bytes::new(),
        };
        if waited && self.stopping() {
            self.answer_at_once(header.cookie, Err(WireError::Shutdown));
            return Ok(());
        }
        let request = request(&header, operation, data);
        let is_stale = || self.outbox.stream().peer_hung_up();
        let submitted = self.backend.submit(request, self.completion(&header, charge), &is_stale);
        submitted.map_err(|_: Stale| SessionEnd::StaleChange)?;
        self.shared.counters.on_submitted(operation);
        Ok(())
    }

    async fn read_payload(&mut self, length: u32, waited: &mut bool) -> Result<Bytes, SessionEnd> {
        let length = length as usize;
        let stall_timeout = self.shared.limits.stall_timeout;
        if !self.intake.holds(length) {
            self.uncork();
        }
        let payload = self.intake.read_payload(length, stall_timeout).await?;
        *waited |= payload.waited;
        Ok(payload.data)
    }

    fn completion(&self, header: &RequestHeader, charge: Charge) -> Completion {
        let outbox = Arc::clone(&self.outbox);
        let shared = Arc::clone(&self.shared);
        let (style, cookie) = (self.style, header.cookie);
        let read_bytes = (header.command == CMD_READ).then_some(header.length as usize);
        Completion::new(move |result| {
            let result = match (result, read_bytes) {
                (Ok(Answer::Data(data)), Some(wanted)) if data.len() == wanted => Ok(data),
                (Ok(Answer::Done), None) => Ok(Bytes::new()),
                (Ok(_), _) => {
                    tracing::error!(wanted = read_bytes, "the volume answered what was not asked for");
                    Err(WireError::Io)
                }
                (Err(error), _) => Err(wire_error(error)),
            };
            shared.counters.on_answered(&result);
            let reply = style.encode(cookie, result);
            let charge = Some(charge);
            outbox.send(QueuedReply { reply, charge });
        })
    }
}

/// The request as the backend sees it.
fn request(header: &RequestHeader, operation: Operation, data: Bytes) -> Request {
    let (offset, length) = (header.offset, u64::from(header.length));
    match operation {
        Operation::Read => Request::Read { offset, length: header.length },
        Operation::Write { fua } => Request::Write { offset, data, fua },
        Operation::Flush => Request::Flush,
        Operation::Trim { fua } => Request::Trim { offset, length, fua },
        Operation::WriteZeroes { fua, no_hole } => Request::WriteZeroes { offset, length, fua, no_hole },
    }
}
