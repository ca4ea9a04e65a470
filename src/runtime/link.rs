//! The connection to a listener agent: has it dialled, greets, writes what the volume has for the agent, reads what it says, and
//! dials again when the connection is lost. What is said is the volume's business.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use listener_agent::connection::{ConnectionError, FrameReader, write_frames};
use protocol::wire::{Prefix, frame_to_agent};
use tokio::io::AsyncWriteExt;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::dial::{Reader, Trouble, Way, Writer};
use super::seat::{Outgoing, Seat};

const REDIAL_MIN: Duration = Duration::from_millis(50);
const REDIAL_MAX: Duration = Duration::from_secs(1);
/// Records taken for one write to the socket, bytes.
const BATCH_BYTES: u64 = 1 << 20;

#[derive(Default)]
struct Signals {
    /// The volume has something for the agent.
    news: Notify,
    /// It is known that it has something that need not go at once.
    knows_later: AtomicBool,
    /// The volume wants the connection closed.
    disconnect: Notify,
    /// The engine stops: what is left is written, then the connection ends.
    finishing: AtomicBool,
    finished: Notify,
}

/// A link to an agent.
pub(super) struct AgentLink {
    way: Arc<Way>,
    signals: Arc<Signals>,
    task: OnceLock<AbortHandle>,
}

impl AgentLink {
    pub(super) fn new(way: Way) -> AgentLink {
        AgentLink { way: Arc::new(way), signals: Arc::default(), task: OnceLock::new() }
    }

    pub(super) fn start(&self, seat: Arc<Seat>) {
        let dialer = Dialer { way: self.way.clone(), signals: self.signals.clone(), seat };
        let _ = self.task.set(tokio::spawn(dialer.run()).abort_handle());
    }

    pub(super) fn wake(&self) {
        self.signals.news.notify_one();
    }

    /// As [`AgentLink::wake`], for what need not go at once.
    pub(super) fn wake_later(&self) {
        if !self.signals.knows_later.load(Ordering::SeqCst) {
            self.signals.news.notify_one();
        }
    }

    pub(super) fn disconnect(&self) {
        self.signals.disconnect.notify_one();
    }

    /// Writes what is left and ends the link.
    pub(super) async fn finish(&self, deadline: Instant) {
        self.signals.finishing.store(true, Ordering::SeqCst);
        self.signals.news.notify_one();
        // An agent that does not take it will wait for the lease instead.
        let _ = tokio::time::timeout_at(deadline, self.signals.finished.notified()).await;
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

impl Drop for AgentLink {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

struct Dialer {
    way: Arc<Way>,
    signals: Arc<Signals>,
    seat: Arc<Seat>,
}

impl Dialer {
    async fn run(self) {
        let mut wait = REDIAL_MIN;
        while !self.signals.finishing.load(Ordering::SeqCst) {
            let begun = Instant::now();
            let reason = self.connect_and_serve().await;
            if !self.seat.disconnected(reason) {
                break;
            }
            // A connection that held was not the agent's trouble.
            wait = if begun.elapsed() > REDIAL_MAX * 2 { REDIAL_MIN } else { (wait * 2).min(REDIAL_MAX) };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = self.signals.news.notified(), if self.signals.finishing.load(Ordering::SeqCst) => {}
            }
        }
        self.signals.finished.notify_one();
    }

    /// Returns why the connection ended.
    async fn connect_and_serve(&self) -> String {
        match self.way.connect().await {
            Ok((reader, writer)) => self.serve(reader, writer).await,
            Err(trouble) => format!("{}: {}", self.way.endpoint, trouble.line()),
        }
    }

    async fn serve(&self, reader: Reader, writer: Writer) -> String {
        let endpoint = &self.way.endpoint;
        // What was wanted of an earlier connection does not concern this one.
        let mut ended_by_volume = pin!(self.signals.disconnect.notified());
        if ended_by_volume.as_mut().enable() {
            ended_by_volume.set(self.signals.disconnect.notified());
            ended_by_volume.as_mut().enable();
        }
        if !self.seat.connected() {
            return "the replica was removed, or the engine stopped".to_owned();
        }
        let ended = tokio::select! {
            ended = self.write(writer) => ended,
            ended = self.read(FrameReader::new(reader)) => ended,
            () = ended_by_volume => return format!("the connection to {endpoint} was closed by the engine"),
        };
        match ended {
            Ok(()) => format!("the connection to {endpoint} ended"),
            Err(e) => format!("{endpoint}: {}", Trouble::from(e).line()),
        }
    }

    async fn read(&self, mut reader: FrameReader<Reader>) -> Result<(), ConnectionError> {
        loop {
            let messages = reader.read(Prefix::to_engine).await?;
            if !self.seat.received(messages) {
                return Ok(());
            }
        }
    }

    async fn write(&self, mut writer: Writer) -> Result<(), ConnectionError> {
        loop {
            let finishing = self.signals.finishing.load(Ordering::SeqCst);
            match self.seat.take_outbox(BATCH_BYTES) {
                Some(Outgoing::Messages(messages)) => {
                    write_frames(&mut writer, messages.iter().map(frame_to_agent).collect()).await?;
                }
                Some(Outgoing::Later(wait)) => {
                    self.signals.knows_later.store(true, Ordering::SeqCst);
                    let _ = tokio::time::timeout(wait, self.signals.news.notified()).await;
                    self.signals.knows_later.store(false, Ordering::SeqCst);
                }
                Some(Outgoing::Nothing) if !finishing => self.signals.news.notified().await,
                Some(Outgoing::Nothing) | None => return Ok(writer.shutdown().await?),
            }
        }
    }
}
