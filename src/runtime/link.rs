//! The connection to a listener agent: dials, greets, writes what the volume has for the agent, reads what it says, and
//! dials again when the connection is lost. What is said is the volume's business.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use listener_agent::config::Endpoint;
use listener_agent::connection::{ConnectionError, FrameReader, write_frames};
use protocol::wire::{Prefix, frame_to_agent};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::seat::Seat;

const DIAL_MAX: Duration = Duration::from_secs(2);
const REDIAL_MIN: Duration = Duration::from_millis(50);
const REDIAL_MAX: Duration = Duration::from_secs(1);
/// Records taken for one write to the socket, bytes.
const BATCH_BYTES: u64 = 1 << 20;

#[derive(Default)]
struct Signals {
    /// The volume has something for the agent.
    news: Notify,
    /// The volume wants the connection closed.
    disconnect: Notify,
    /// The engine stops: what is left is written, then the connection ends.
    finishing: AtomicBool,
    finished: Notify,
}

/// A link to an agent.
pub(super) struct AgentLink {
    endpoint: Endpoint,
    signals: Arc<Signals>,
    task: OnceLock<AbortHandle>,
}

impl AgentLink {
    pub(super) fn new(endpoint: Endpoint) -> AgentLink {
        AgentLink { endpoint, signals: Arc::default(), task: OnceLock::new() }
    }

    pub(super) fn start(&self, seat: Arc<Seat>) {
        let dialer = Dialer { endpoint: self.endpoint.clone(), signals: self.signals.clone(), seat };
        let _ = self.task.set(tokio::spawn(dialer.run()).abort_handle());
    }

    pub(super) fn wake(&self) {
        self.signals.news.notify_one();
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
    endpoint: Endpoint,
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
        let endpoint = &self.endpoint;
        match endpoint {
            Endpoint::Tcp { host, port } => {
                match tokio::time::timeout(DIAL_MAX, TcpStream::connect((host.as_str(), *port))).await {
                    Ok(Ok(stream)) => {
                        if let Err(e) = stream.set_nodelay(true) {
                            return format!("cannot use the connection to {endpoint}: {e}");
                        }
                        let (reader, writer) = stream.into_split();
                        self.serve(reader, writer).await
                    }
                    Ok(Err(e)) => format!("cannot connect to {endpoint}: {e}"),
                    Err(_) => format!("cannot connect to {endpoint}: no answer within {DIAL_MAX:?}"),
                }
            }
            Endpoint::Unix(path) => match UnixStream::connect(path).await {
                Ok(stream) => {
                    let (reader, writer) = stream.into_split();
                    self.serve(reader, writer).await
                }
                Err(e) => format!("cannot connect to {endpoint}: {e}"),
            },
        }
    }

    async fn serve<R, W>(&self, reader: R, writer: W) -> String
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
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
            () = ended_by_volume => return format!("the connection to {} was closed by the engine", self.endpoint),
        };
        match ended {
            Ok(()) => format!("the connection to {} ended", self.endpoint),
            Err(e) => format!("{}: {e}", self.endpoint),
        }
    }

    async fn read<R: AsyncRead + Unpin>(&self, mut reader: FrameReader<R>) -> Result<(), ConnectionError> {
        loop {
            let messages = reader.read(Prefix::to_engine).await?;
            if !self.seat.received(messages) {
                return Ok(());
            }
        }
    }

    async fn write<W: AsyncWrite + Unpin>(&self, mut writer: W) -> Result<(), ConnectionError> {
        loop {
            let finishing = self.signals.finishing.load(Ordering::SeqCst);
            let Some(messages) = self.seat.take_outbox(BATCH_BYTES) else { return Ok(writer.shutdown().await?) };
            if !messages.is_empty() {
                write_frames(&mut writer, messages.iter().map(frame_to_agent).collect()).await?;
            } else if finishing {
                return Ok(writer.shutdown().await?);
            } else {
                self.signals.news.notified().await;
            }
        }
    }
}
