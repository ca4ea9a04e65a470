//! The transmission phase of one connection: requests in, replies on their way.
//!
//! Requests are submitted in the order in which they arrive, without waiting for each other; replies leave in the
//! order of completion. Owns no knowledge of what a request may do: that is in `request`.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;

use super::backend::{Answer, Backend, Completion, IoError, Request};
use super::budget::{Charge, Share};
use super::constants::{CONTEXT_FILTER_BYTES, EXTENTS_MAX};
use super::handshake::Agreement;
use super::intake::{Fill, Intake};
use super::outbox::{Cork, Outbox, QueuedReply};
use super::pulse::Moment;
use super::refusals::Refusals;
use super::reply::{Envelope, Failure, Reply, ReplyStyle, WireError, failure};
use super::request::{BadMagic, ExportRules, Operation, Refusal, RequestHeader, Verdict, judge};
use super::server::Shared;
use super::session::SessionEnd;

/// What a BLOCK_STATUS is charged: not its answer, which is shorter, but what replicas may read for it. Clients could
/// else ask for hours of reading in a few KiB, in front of everybody's reads.
const STATUS_CHARGE_BYTES: u32 = 4 << 20;
const _: () = assert!(STATUS_CHARGE_BYTES as usize >= EXTENTS_MAX * 16);

/// The reading side of the transmission phase.
pub(super) struct Transmission {
    intake: Intake,
    outbox: Arc<Outbox>,
    cork: Option<Cork>,
    shared: Arc<Shared>,
    budget: Share,
    shutdown: watch::Receiver<bool>,
    backend: Arc<dyn Backend>,
    read_only: bool,
    agreement: Agreement,
    refusals: Refusals,
    /// Standstills before this moment hide nothing of this connection any more.
    settled_at: Moment,
}

impl Transmission {
    /// `settled_at` is when the handshake began at the latest: a client can hang up as soon as it knows of its end.
    pub(super) fn new(
        intake: Intake,
        outbox: Arc<Outbox>,
        shared: Arc<Shared>,
        shutdown: watch::Receiver<bool>,
        backend: Arc<dyn Backend>,
        agreement: Agreement,
        settled_at: Moment,
    ) -> Self {
        let read_only = backend.export().read_only;
        let refusals = Refusals::default();
        let budget = shared.budget.share(shared.limits.connection_bytes_max);
        Self {
            intake,
            outbox,
            cork: None,
            shared,
            budget,
            shutdown,
            backend,
            read_only,
            agreement,
            refusals,
            settled_at,
        }
    }

    /// Up to the end of the connection.
    pub(super) async fn take_in_requests(&mut self) -> SessionEnd {
        loop {
            match self.take_in_batch().await {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// Throws away whatever still comes, until the peer has closed too.
    pub(super) async fn discard_to_end(&mut self) -> io::Result<()> {
        self.intake.discard_to_end().await
    }

    /// Everything one read has brought, then the next read.
    async fn take_in_batch(&mut self) -> Result<(), SessionEnd> {
        while let Some(header) = self.next_header()? {
            if self.cork.is_none() {
                self.cork = Some(self.outbox.cork());
            }
            self.take_in(header).await?;
        }
        self.uncork();
        match self.intake.fill().await? {
            Fill::Read => Ok(()),
            Fill::EndOfStream => Err(SessionEnd::Closed),
        }
    }

    fn next_header(&mut self) -> Result<Option<RequestHeader>, BadMagic> {
        match self.agreement.style {
            ReplyStyle::Simple | ReplyStyle::Structured => {
                self.intake.take().map(|bytes| RequestHeader::parse(&bytes)).transpose()
            }
            ReplyStyle::Extended => self.intake.take().map(|bytes| RequestHeader::parse_extended(&bytes)).transpose(),
        }
    }

    /// Lets waiting replies go. Before every wait, as those who wait for them may be who we wait for.
    pub(super) fn uncork(&mut self) {
        self.cork = None;
    }

    fn stopping(&self) -> bool {
        *self.shutdown.borrow()
    }

    fn rules(&self) -> ExportRules {
        let Agreement { style, has_context, .. } = self.agreement;
        ExportRules { size_bytes: self.backend.size_bytes(), read_only: self.read_only, style, has_context }
    }

    fn judge(&self, header: &RequestHeader) -> Verdict {
        judge(header, self.rules(), self.stopping())
    }

    async fn take_in(&mut self, header: RequestHeader) -> Result<(), SessionEnd> {
        let limit = self.shared.limits.requests_per_connection_max;
        if self.outbox.outstanding() >= limit {
            self.uncork();
            self.intake.read_ahead_during(self.outbox.outstanding_below(limit)).await;
        }
        self.outbox.begin();
        let done = self.carry_out(header).await;
        if done.is_err() {
            self.outbox.abandon();
        }
        done
    }

    async fn carry_out(&mut self, mut header: RequestHeader) -> Result<(), SessionEnd> {
        let mut verdict = self.judge(&header);
        if verdict == Verdict::ReadFilter {
            let Some(filtered) = self.read_filter(header).await? else {
                self.answer_refusal(&header, Refusal::UNKNOWN_CONTEXT);
                return Ok(());
            };
            header = filtered;
            verdict = self.judge(&header);
        }
        match verdict {
            Verdict::Disconnect => Err(SessionEnd::Goodbye),
            Verdict::HangUp | Verdict::ReadFilter => Err(SessionEnd::PayloadTooLong { length: header.length }),
            Verdict::Nothing => {
                let envelope = self.envelope(&header);
                self.answer_at_once(envelope, Ok(envelope.done()));
                Ok(())
            }
            Verdict::Reject(refusal) => self.refuse(header, refusal).await,
            Verdict::Submit(operation) => self.submit(header, operation).await,
        }
    }

    /// The payload of a BLOCK_STATUS that names contexts; `None` if it names others than the one there is.
    async fn read_filter(&mut self, header: RequestHeader) -> Result<Option<RequestHeader>, SessionEnd> {
        let payload = self.read_payload(CONTEXT_FILTER_BYTES as u32).await?;
        Ok(payload.first_chunk().and_then(|payload| header.with_filter(payload)))
    }

    /// Stays in step with a client whose request is refused.
    async fn refuse(&mut self, header: RequestHeader, refusal: Refusal) -> Result<(), SessionEnd> {
        // The verdict would be another if this were more than a little.
        let payload_bytes = usize::try_from(header.payload_bytes()).unwrap_or(usize::MAX);
        if payload_bytes > 0 {
            self.uncork();
            let stall_timeout = self.shared.limits.stall_timeout;
            self.intake.discard(payload_bytes, stall_timeout).await?;
        }
        self.answer_refusal(&header, refusal);
        Ok(())
    }

    fn answer_refusal(&mut self, header: &RequestHeader, refusal: Refusal) {
        let rules = self.rules();
        self.refusals.note(header, rules, refusal, &self.shared.refusal_log);
        self.answer_at_once(self.envelope(header), Err(refusal.failure()));
    }

    fn envelope(&self, header: &RequestHeader) -> Envelope {
        Envelope { style: self.agreement.style, cookie: header.cookie, offset: header.offset }
    }

    fn answer_at_once(&self, envelope: Envelope, result: Result<Reply, Failure>) {
        self.shared.counters.on_answered(&result);
        let reply = result.unwrap_or_else(|failure| envelope.failed(failure));
        let charge = None;
        self.outbox.send(QueuedReply { reply, charge });
    }

    /// Takes in the payload, if there is one, and hands the request to the backend.
    async fn submit(&mut self, header: RequestHeader, operation: Operation) -> Result<(), SessionEnd> {
        let data_bytes = match operation {
            Operation::Read { length, .. } | Operation::Write { length, .. } => length,
            Operation::BlockStatus { .. } => STATUS_CHARGE_BYTES,
            Operation::Flush | Operation::Trim { .. } | Operation::WriteZeroes { .. } | Operation::Cache => 0,
        };
        let charge = match self.budget.try_charge(data_bytes) {
            Some(charge) => charge,
            None => {
                self.uncork();
                let charge = self.intake.read_ahead_during(self.budget.charge(data_bytes)).await;
                charge.ok_or(SessionEnd::Stopping)?
            }
        };
        let data = match operation {
            Operation::Write { length, .. } => self.read_payload(length).await?,
            Operation::Read { .. }
            | Operation::Flush
            | Operation::Trim { .. }
            | Operation::WriteZeroes { .. }
            | Operation::BlockStatus { .. }
            | Operation::Cache => Bytes::new(),
        };
        if self.stopping() {
            self.answer_refusal(&header, Refusal::STOPPING);
            return Ok(());
        }
        let done = self.completion(&header, operation, charge);
        self.submit_unless_stale(request(&header, operation, data), done).await?;
        self.shared.counters.on_submitted(operation);
        Ok(())
    }

    /// Of a client that has hung up no change is submitted. While it cannot be known whether it has, none either.
    async fn submit_unless_stale(&mut self, mut request: Request, mut done: Completion) -> Result<(), SessionEnd> {
        loop {
            let has_hung_up = || self.intake.has_ended() || self.outbox.stream().peer_hung_up();
            let is_stale = || self.may_hide_its_end() || has_hung_up();
            let Err(stale) = self.backend.submit(request, done, &is_stale) else {
                return Ok(());
            };
            if has_hung_up() {
                stale.done.forget();
                return Err(SessionEnd::StaleChange);
            }
            (request, done) = (stale.request, stale.done);
            self.uncork();
            self.settled_at = self.intake.read_ahead_to_silence().await;
        }
    }

    /// Whether the connection may have ended without a sign of it, as its socket was full while the process stood still.
    fn may_hide_its_end(&self) -> bool {
        self.outbox.stream().can_hide_its_end() && self.shared.pulse.stood_still_since(self.settled_at, Moment::now())
    }

    async fn read_payload(&mut self, length: u32) -> Result<Bytes, SessionEnd> {
        let length = length as usize;
        let stall_timeout = self.shared.limits.stall_timeout;
        if !self.intake.holds(length) {
            self.uncork();
        }
        Ok(self.intake.read_payload(length, stall_timeout).await?)
    }

    fn completion(&self, header: &RequestHeader, operation: Operation, charge: Charge) -> Completion {
        let outbox = Arc::clone(&self.outbox);
        let shared = Arc::clone(&self.shared);
        let (envelope, length) = (self.envelope(header), header.length);
        Completion::new(move |answer| {
            let result = reply(envelope, operation, length, answer);
            shared.counters.on_answered(&result);
            let reply = result.unwrap_or_else(|failure| envelope.failed(failure));
            let charge = Some(charge);
            outbox.send(QueuedReply { reply, charge });
        })
    }
}

/// The request as the backend sees it.
fn request(header: &RequestHeader, operation: Operation, data: Bytes) -> Request {
    let (offset, length) = (header.offset, header.length);
    match operation {
        Operation::Read { length, .. } => Request::Read { offset, length },
        Operation::Write { fua, .. } => Request::Write { offset, data, fua },
        Operation::Flush => Request::Flush,
        Operation::Trim { fua } => Request::Trim { offset, length, fua },
        Operation::WriteZeroes { fua, no_hole } => Request::WriteZeroes { offset, length, fua, no_hole },
        Operation::BlockStatus { one } => Request::BlockStatus { offset, length, one },
        Operation::Cache => Request::Cache { offset, length },
    }
}

/// What the client is told of the backend's answer.
fn reply(
    envelope: Envelope,
    operation: Operation,
    length: u64,
    answer: Result<Answer, IoError>,
) -> Result<Reply, Failure> {
    let broken = Failure { error: WireError::Io, text: "the volume gave no proper answer" };
    match (operation, answer.map_err(failure)?) {
        (Operation::Read { length, unfragmented }, Answer::Data(data)) if data.len() == length as usize => {
            Ok(envelope.read(data, unfragmented))
        }
        (Operation::BlockStatus { one }, Answer::Extents(extents)) => {
            envelope.status(&extents, length, one).map_err(|error| {
                tracing::error!(offset = envelope.offset, length, %error, "the volume answered a block status badly");
                broken
            })
        }
        (
            Operation::Write { .. }
            | Operation::Flush
            | Operation::Trim { .. }
            | Operation::WriteZeroes { .. }
            | Operation::Cache,
            Answer::Done,
        ) => Ok(envelope.done()),
        (operation, Answer::Data(_) | Answer::Extents(_) | Answer::Done) => {
            tracing::error!(?operation, "the volume answered what was not asked for");
            Err(broken)
        }
    }
}
