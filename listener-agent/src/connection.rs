//! Frames over a byte stream: reading many with one system call, writing many with one. Both sides of the protocol use
//! it; what the messages mean is not its business.

use std::io;

use bytes::{BufMut, Bytes, BytesMut};
use protocol::wire::{Frame, PREFIX_BYTES, Prefix, WireError};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Read from the stream at a time, bytes.
const READ_BYTES: usize = 256 * 1024;
/// With less room than this left, a new buffer is begun.
const SPARE_BYTES_MIN: usize = 16 * 1024;
/// Bulk data up to this size is copied behind its frame's head, so that small frames share a system call.
const COPY_BYTES_MAX: usize = 16 * 1024;
const WRITE_BYTES: usize = 256 * 1024;
/// A TLS record begins with its type, from this one ...
const TLS_ALERT: u8 = 21;
/// ... to this one, and a version.
const TLS_DATA: u8 = 23;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The other side closed it.
    #[error("the connection was closed by the other side")]
    Closed,
    /// The system reported an error.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// What came is not the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// What came is TLS, and this side has none.
    #[error("the other side speaks TLS, and this side does not")]
    SpeaksTls,
    /// This side does not want the other; why, in words.
    #[error("{0}")]
    Refused(String),
}

/// Reads frames.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> FrameReader<R> {
        FrameReader { stream, buffer: BytesMut::new() }
    }

    /// The next message, and all others that have arrived whole. Bulk data is not copied out of the read buffer.
    /// Cancel-safe: what was read stays in the buffer.
    pub async fn read<M>(
        &mut self,
        decode: impl Fn(&Prefix, Bytes) -> Result<M, WireError>,
    ) -> Result<Vec<M>, ConnectionError> {
        let mut messages = Vec::new();
        loop {
            let mut missing = PREFIX_BYTES;
            while let Some(bytes) = self.buffer.first_chunk::<PREFIX_BYTES>() {
                let prefix = Prefix::decode(bytes).map_err(|e| self.unreadable(e.into()))?;
                let frame_bytes = PREFIX_BYTES + prefix.rest_bytes();
                if self.buffer.len() < frame_bytes {
                    missing = frame_bytes - self.buffer.len();
                    break;
                }
                let rest = self.buffer.split_to(frame_bytes).freeze().slice(PREFIX_BYTES..);
                messages.push(decode(&prefix, rest)?);
            }
            if !messages.is_empty() {
                return Ok(messages);
            }
            // The prefix bounds what a frame can make us reserve. What is left of a buffer is used up first: payloads
            // that are still in use keep it from being reclaimed.
            let spare = self.buffer.capacity() - self.buffer.len();
            if spare < missing.max(SPARE_BYTES_MIN) {
                self.buffer.reserve(missing.max(READ_BYTES));
            }
            if self.stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(self.unreadable(ConnectionError::Closed));
            }
        }
    }

    /// Why nothing more can be read: a side that has TLS and one that has none must not look like a broken network.
    fn unreadable(&self, error: ConnectionError) -> ConnectionError {
        let is_tls = matches!(self.buffer[..], [TLS_ALERT..=TLS_DATA, 3, 0..=4, ..]);
        if is_tls { ConnectionError::SpeaksTls } else { error }
    }
}

/// Writes frames, small ones together.
pub async fn write_frames(stream: &mut (impl AsyncWrite + Unpin), frames: Vec<Frame>) -> io::Result<()> {
    let mut small = BytesMut::new();
    for frame in frames {
        small.put_slice(&frame.head);
        if frame.bulk.len() <= COPY_BYTES_MAX {
            small.put_slice(&frame.bulk);
        } else {
            stream.write_all(&small.split()).await?;
            stream.write_all(&frame.bulk).await?;
        }
        if small.len() >= WRITE_BYTES {
            stream.write_all(&small.split()).await?;
        }
    }
    if !small.is_empty() {
        stream.write_all(&small).await?;
    }
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::ranges::ByteRange;
    use protocol::wire::frame_to_agent;
    use protocol::{Epoch, Position, Record, RecordKind, Seq, ToAgent};

    fn append(seq: u64, length: u64) -> ToAgent {
        let position = Position { epoch: Epoch(1), seq: Seq(seq) };
        let payload = vec![seq as u8; length as usize];
        ToAgent::Append(Record::new(position, RecordKind::Write, ByteRange { offset: 0, length }, payload.into()))
    }

    #[tokio::test]
    async fn frames_of_all_sizes_arrive_in_order() {
        let (mut there, here) = tokio::io::duplex(10_000);
        let sent: Vec<ToAgent> =
            [1, 100_000, 16_384, 16_385, 1 << 20, 7].into_iter().zip(1..).map(|(l, s)| append(s, l)).collect();
        let frames = sent.iter().map(frame_to_agent).collect();
        let writer = tokio::spawn(async move { write_frames(&mut there, frames).await });
        let mut reader = FrameReader::new(here);
        let mut received = Vec::new();
        while received.len() < sent.len() {
            received.extend(reader.read(Prefix::to_agent).await.unwrap());
        }
        assert_eq!(received, sent);
        writer.await.unwrap().unwrap();
        assert!(matches!(reader.read(Prefix::to_agent).await, Err(ConnectionError::Closed)));
    }

    #[tokio::test]
    async fn a_stream_of_something_else_is_refused() {
        let (mut there, here) = tokio::io::duplex(1000);
        there.write_all(&[b'G'; 100]).await.unwrap();
        let outcome = FrameReader::new(here).read(Prefix::to_agent).await;
        assert!(matches!(outcome, Err(ConnectionError::Wire(WireError::Magic))));
    }
}
