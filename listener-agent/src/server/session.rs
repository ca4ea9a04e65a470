//! One engine's connection to the agent: the TLS handshake if there is one, the first message within its time, then
//! messages in both directions.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use protocol::message::{Refused, RefusedReason};
use protocol::wire::{Prefix, frame_to_engine};
use protocol::{ToAgent, ToEngine};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::door::Door;
use super::outbox::Outbox;
use super::replicas::{Replicas, refused};
use crate::connection::{ConnectionError, FrameReader, write_frames};
use crate::host::SmallReads;

/// Within this time the first message must be there, and the TLS handshake before it.
pub(super) const FIRST_MESSAGE_MAX: Duration = Duration::from_secs(10);

/// A connection before anything was said on it.
pub(super) struct Session {
    replicas: Arc<Replicas>,
    /// Turns true with the first promise.
    promised: Arc<AtomicBool>,
}

impl Session {
    pub(super) fn new(replicas: Arc<Replicas>, promised: Arc<AtomicBool>) -> Session {
        Session { replicas, promised }
    }

    /// Lets the engine in and talks with it to the end.
    pub(super) async fn run<S, R, W>(
        self,
        door: Option<&Door>,
        stream: S,
        split: fn(S) -> (R, W),
    ) -> Result<(), ConnectionError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let deadline = Instant::now() + FIRST_MESSAGE_MAX;
        let Some(door) = door else {
            let (reader, writer) = split(stream);
            return self.converse(FrameReader::new(reader), writer, None, deadline).await;
        };
        let (stream, objection) = timeout_at(deadline, door.admit(stream)).await.map_err(timed_out)??;
        let (reader, writer) = tokio::io::split(stream);
        self.converse(FrameReader::new(reader), writer, objection, deadline).await
    }

    async fn converse<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
        self,
        mut reader: FrameReader<R>,
        mut writer: W,
        objection: Option<Refused>,
        deadline: Instant,
    ) -> Result<(), ConnectionError> {
        let first = match timeout_at(deadline, reader.read(Prefix::to_agent)).await.map_err(timed_out)? {
            Err(ConnectionError::SpeaksTls) => {
                // In a form that the engine's TLS tells from TLS, so that it can say what is wrong.
                refuse(&mut writer, refused(RefusedReason::Protocol, "this agent has no TLS".to_owned())).await?;
                return Err(ConnectionError::SpeaksTls);
            }
            other => other?,
        };
        if let Some(objection) = objection {
            let text = objection.text.clone();
            refuse(&mut writer, objection).await?;
            return Err(ConnectionError::Refused(text));
        }
        let mut first = first.into_iter();
        let outbox = Arc::new(Outbox::default());
        let session = match first.next() {
            Some(ToAgent::Hello(hello)) => {
                let (replicas, engine) = (self.replicas.clone(), hello.engine);
                match blocking(move || replicas.greet(&hello)).await? {
                    Ok(host) => {
                        let sink = outbox.clone();
                        let promised = self.promised;
                        let take = move |message| {
                            promised.fetch_or(matches!(message, ToEngine::Promised(_)), Ordering::Relaxed);
                            sink.push(message);
                        };
                        Some(host.open_session(engine, Arc::new(take)))
                    }
                    Err(refused) => {
                        outbox.push(ToEngine::Refused(refused));
                        None
                    }
                }
            }
            Some(ToAgent::Format(format)) => {
                let replicas = self.replicas.clone();
                let outcome = blocking(move || replicas.format(format)).await?;
                let answer = outcome.map_or_else(ToEngine::Refused, |()| ToEngine::Formatted);
                write_frames(&mut writer, vec![frame_to_engine(&answer)]).await?;
                return Ok(writer.shutdown().await?);
            }
            Some(_) | None => {
                let text = "a session begins with Hello or Format".to_owned();
                outbox.push(ToEngine::Refused(refused(RefusedReason::Protocol, text)));
                None
            }
        };
        let Some(session) = session else { return write_outbox(&outbox, &mut writer).await };
        session.send(first, SmallReads::AtOnce);
        tokio::select! {
            ended = write_outbox(&outbox, &mut writer) => ended,
            ended = async {
                loop {
                    session.send(reader.read(Prefix::to_agent).await?, SmallReads::AtOnce);
                }
            } => ended,
        }
    }
}

async fn refuse(writer: &mut (impl AsyncWrite + Unpin), refused: Refused) -> io::Result<()> {
    write_frames(writer, vec![frame_to_engine(&ToEngine::Refused(refused))]).await?;
    writer.shutdown().await
}

fn timed_out(_: tokio::time::error::Elapsed) -> ConnectionError {
    ConnectionError::Io(io::ErrorKind::TimedOut.into())
}

/// Writes what the outbox gives until a refusal, which ends the session.
async fn write_outbox(outbox: &Outbox, writer: &mut (impl AsyncWrite + Unpin)) -> Result<(), ConnectionError> {
    while let Some(messages) = outbox.take().await {
        let last = messages.iter().any(|m| matches!(m, ToEngine::Refused(_)));
        write_frames(writer, messages.iter().map(frame_to_engine).collect()).await?;
        if last {
            writer.shutdown().await?;
            return Ok(());
        }
    }
    Ok(())
}

async fn blocking<R: Send + 'static>(work: impl FnOnce() -> R + Send + 'static) -> Result<R, ConnectionError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| ConnectionError::Io(io::Error::other(e)))
}
