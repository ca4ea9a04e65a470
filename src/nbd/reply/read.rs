//! The content chunks of a READ: data, and holes in place of whole blocks of zeroes.
//!
//! Blocks are those of the export, not of the request, so that a client that copies finds holes where they are. Looking
//! for zeroes costs hardly anything where there are none: a block is given up at its first other byte.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use bytes::Bytes;

use super::super::constants::*;
use super::{Chunk, Envelope, Reply};

const BLOCK_BYTES: usize = BLOCK_BYTES_PREFERRED as usize;
const ZEROES: [u8; BLOCK_BYTES] = [0; BLOCK_BYTES];

/// A part of what was read that goes into one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    len: usize,
    is_hole: bool,
}

/// Cuts what was read into runs, in order.
struct Runs<'a> {
    rest: &'a [u8],
    /// Bytes until the next block of the export begins.
    to_boundary: usize,
}

pub(super) fn reply(envelope: Envelope, data: Bytes, unfragmented: bool) -> Reply {
    if unfragmented {
        let is_hole = data.chunks(BLOCK_BYTES).all(is_zero);
        let only = Run { len: data.len(), is_hole };
        return content(envelope, 0, only, &data, true).into();
    }
    let mut runs = Runs::new(envelope.offset, &data);
    let mut at = 0;
    let mut next = |left: usize| {
        // A reply is bounded in chunks: what is left when only one more fits is data.
        let is_last = left == 1;
        let run = if is_last { Run { len: data.len() - at, is_hole: false } } else { runs.next()? };
        let start = at;
        at += run.len;
        (run.len > 0).then(|| content(envelope, start, run, &data, at == data.len()))
    };
    let Some(first) = next(READ_CHUNKS_MAX) else {
        return envelope.done();
    };
    let rest = (1..READ_CHUNKS_MAX).rev().map_while(next).collect();
    Reply { first, rest }
}

/// The chunk for the run that begins `start` bytes into what was read.
fn content(envelope: Envelope, start: usize, run: Run, data: &Bytes, is_last: bool) -> Chunk {
    let flags = if is_last { REPLY_FLAG_DONE } else { 0 };
    let offset = envelope.offset.saturating_add(start as u64).to_be_bytes();
    if run.is_hole {
        // At most as long as a read.
        let length = (run.len as u32).to_be_bytes();
        return envelope.chunk(flags, CHUNK_OFFSET_HOLE, &[&offset, &length], Bytes::new());
    }
    envelope.chunk(flags, CHUNK_OFFSET_DATA, &[&offset], data.slice(start..start + run.len))
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes == &ZEROES[..bytes.len()]
}

impl<'a> Runs<'a> {
    fn new(offset: u64, data: &'a [u8]) -> Self {
        let into_block = (offset % BLOCK_BYTES as u64) as usize;
        Self { rest: data, to_boundary: (BLOCK_BYTES - into_block) % BLOCK_BYTES }
    }

    /// Length of the whole blocks of zeroes, or of everything up to such a block, that begin at `at`.
    fn run_len(&self, is_hole: bool) -> usize {
        let mut len = if is_hole { 0 } else { self.to_boundary.min(self.rest.len()) };
        while let Some(block) = self.rest.get(len..len + BLOCK_BYTES)
            && is_zero(block) == is_hole
        {
            len += BLOCK_BYTES;
        }
        let is_part = self.rest.len() - len < BLOCK_BYTES;
        if is_part && !is_hole { self.rest.len() } else { len }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        if self.rest.is_empty() {
            return None;
        }
        let hole = if self.to_boundary == 0 { self.run_len(true) } else { 0 };
        let run = match hole {
            0 => Run { len: self.run_len(false), is_hole: false },
            len => Run { len, is_hole: true },
        };
        self.rest = &self.rest[run.len..];
        self.to_boundary = 0;
        Some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ReplyStyle;
    use super::*;
    use proptest::prelude::*;

    fn runs(offset: u64, data: &[u8]) -> Vec<(usize, bool)> {
        Runs::new(offset, data).map(|run| (run.len, run.is_hole)).collect()
    }

    fn blocks(pattern: &[u8]) -> Vec<u8> {
        pattern.iter().flat_map(|byte| [*byte; BLOCK_BYTES]).collect()
    }

    #[test]
    fn whole_blocks_of_zeroes_are_holes() {
        assert_eq!(runs(0, &blocks(&[0])), [(4096, true)]);
        assert_eq!(runs(8192, &blocks(&[1, 0, 0, 1])), [(4096, false), (8192, true), (4096, false)]);
        assert_eq!(runs(0, &[1]), [(1, false)]);
        let mut last_byte = blocks(&[0, 0]);
        last_byte[8191] = 1;
        assert_eq!(runs(0, &last_byte), [(4096, true), (4096, false)]);
    }

    #[test]
    fn blocks_are_those_of_the_export() {
        let zeroes = [0; 3 * BLOCK_BYTES];
        assert_eq!(runs(1, &zeroes), [(4095, false), (8192, true), (1, false)]);
        assert_eq!(runs(4095, &zeroes[..4096]), [(4096, false)]);
        assert_eq!(runs(100, &zeroes[..200]), [(200, false)]);
    }

    /// What a client makes of the chunks.
    fn reassemble(reply: &Reply, offset: u64, length: usize) -> Vec<u8> {
        let mut content = vec![0xee; length];
        let mut covered = 0;
        for chunk in reply.chunks() {
            let head = chunk.head.as_bytes();
            let kind = u16::from_be_bytes([head[6], head[7]]);
            let start = (u64::from_be_bytes(head[20..28].try_into().unwrap()) - offset) as usize;
            let len = match kind {
                CHUNK_OFFSET_DATA => chunk.data.len(),
                _ => u32::from_be_bytes(head[28..32].try_into().unwrap()) as usize,
            };
            match kind {
                CHUNK_OFFSET_DATA => content[start..start + len].copy_from_slice(&chunk.data),
                _ => content[start..start + len].fill(0),
            }
            covered += len;
        }
        assert_eq!(covered, length);
        content
    }

    fn flags(reply: &Reply) -> Vec<u16> {
        reply.chunks().map(|chunk| u16::from_be_bytes([chunk.head.as_bytes()[4], chunk.head.as_bytes()[5]])).collect()
    }

    fn envelope(offset: u64) -> Envelope {
        Envelope { style: ReplyStyle::Structured, cookie: 1, offset }
    }

    #[test]
    fn a_reply_is_bounded_in_chunks_and_the_rest_is_data() {
        let pattern: Vec<u8> = (0..1000).map(|i| (i % 2) as u8).collect();
        let data = Bytes::from(blocks(&pattern));
        let reply = reply(envelope(0), data.clone(), false);
        assert_eq!(reply.chunks().count(), READ_CHUNKS_MAX);
        assert!(reassemble(&reply, 0, data.len()) == data);
    }

    #[test]
    fn unfragmented_is_one_chunk_whatever_there_is() {
        let mixed = Bytes::from(blocks(&[0, 1, 0]));
        let mixed_reply = reply(envelope(0), mixed.clone(), true);
        assert_eq!(mixed_reply.chunks().map(|chunk| &chunk.data).collect::<Vec<_>>(), [&mixed]);
        let zeroes = reply(envelope(3), Bytes::from_static(&[0; 5000]), true);
        assert_eq!(flags(&zeroes), [REPLY_FLAG_DONE]);
        assert_eq!(zeroes.len_bytes(), STRUCTURED_REPLY_BYTES + 12);
    }

    proptest! {
        /// Whatever is read arrives, in chunks of which the last says so.
        #[test]
        fn every_read_is_reassembled(
            offset in 0u64..10_000,
            pattern in prop::collection::vec(0u8..2, 1..90),
            cut in 0usize..4096,
            unfragmented: bool,
        ) {
            let mut data = Bytes::from(blocks(&pattern));
            data.truncate(data.len() - cut);
            let reply = reply(envelope(offset), data.clone(), unfragmented);
            prop_assert!(reassemble(&reply, offset, data.len()) == data);
            let flags = flags(&reply);
            prop_assert!(flags.len() <= READ_CHUNKS_MAX && (!unfragmented || flags.len() == 1));
            prop_assert_eq!(flags.iter().position(|flags| *flags == REPLY_FLAG_DONE), Some(flags.len() - 1));
        }
    }
}
