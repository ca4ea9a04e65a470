//! The one chunk that answers a BLOCK_STATUS, made from what the backend says.
//!
//! Checks that the backend keeps its contract: a client acts on extents by skipping what they call empty.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use bytes::Bytes;

use super::super::backend::{Allocation, Extent};
use super::super::constants::*;
use super::{Envelope, Reply, ReplyStyle};

/// The backend broke its contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ExtentsError {
    /// No extent at all.
    #[error("the volume named no extent")]
    None,
    /// An extent of no length.
    #[error("the volume named an extent of no length")]
    Empty,
    /// Together they reach beyond what was asked for.
    #[error("the volume named extents beyond the {length} bytes asked for")]
    TooLong {
        /// Bytes asked for.
        length: u64,
    },
}

fn state(allocation: Allocation) -> u32 {
    match allocation {
        Allocation::Data => 0,
        Allocation::Zeroes => STATE_ZERO,
        Allocation::Hole => STATE_HOLE | STATE_ZERO,
    }
}

pub(super) fn reply(envelope: Envelope, extents: &[Extent], length: u64, one: bool) -> Result<Reply, ExtentsError> {
    let extents_max = if one { 1 } else { EXTENTS_MAX };
    let merged = merge(extents, length, extents_max)?;
    let context = CONTEXT_ALLOCATION_ID.to_be_bytes();
    let chunk = match envelope.style {
        ReplyStyle::Simple | ReplyStyle::Structured => {
            let mut body = Vec::with_capacity(merged.len() * 8);
            for extent in merged {
                // A request with a compact header asks for less than 4 GiB.
                let length = u32::try_from(extent.length).unwrap_or(u32::MAX);
                body.extend(length.to_be_bytes());
                body.extend(state(extent.allocation).to_be_bytes());
                if u64::from(length) < extent.length {
                    break;
                }
            }
            envelope.chunk(REPLY_FLAG_DONE, CHUNK_BLOCK_STATUS, &[&context], Bytes::from(body))
        }
        ReplyStyle::Extended => {
            let count = (merged.len() as u32).to_be_bytes();
            let mut body = Vec::with_capacity(merged.len() * 16);
            for extent in merged {
                body.extend(extent.length.to_be_bytes());
                body.extend(u64::from(state(extent.allocation)).to_be_bytes());
            }
            envelope.chunk(REPLY_FLAG_DONE, CHUNK_BLOCK_STATUS_EXT, &[&context, &count], Bytes::from(body))
        }
    };
    Ok(chunk.into())
}

/// The first `extents_max` extents, neighbours of one kind taken together. Looks at all of them.
fn merge(extents: &[Extent], length: u64, extents_max: usize) -> Result<Vec<Extent>, ExtentsError> {
    let mut merged: Vec<Extent> = Vec::with_capacity(extents.len().min(extents_max));
    let (mut left, mut is_full) = (length, false);
    for extent in extents {
        if extent.length == 0 {
            return Err(ExtentsError::Empty);
        }
        left = left.checked_sub(extent.length).ok_or(ExtentsError::TooLong { length })?;
        let has_room = merged.len() < extents_max;
        match merged.last_mut() {
            Some(_) if is_full => {}
            Some(last) if last.allocation == extent.allocation => last.length += extent.length,
            Some(_) | None if has_room => merged.push(*extent),
            Some(_) | None => is_full = true,
        }
    }
    if merged.is_empty() { Err(ExtentsError::None) } else { Ok(merged) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use Allocation::{Data, Hole, Zeroes};

    fn extents(list: &[(u64, Allocation)]) -> Vec<Extent> {
        list.iter().map(|&(length, allocation)| Extent { length, allocation }).collect()
    }

    fn envelope(style: ReplyStyle) -> Envelope {
        Envelope { style, cookie: 7, offset: 4096 }
    }

    /// (length, flags) of each descriptor.
    fn descriptors(reply: &Reply, style: ReplyStyle) -> Vec<(u64, u64)> {
        let chunk = reply.chunks().next().unwrap();
        let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
        let width = if style == ReplyStyle::Extended { 8 } else { 4 };
        chunk.data.chunks(2 * width).map(|pair| (number(&pair[..width]), number(&pair[width..]))).collect()
    }

    #[test]
    fn both_forms_tell_the_same() {
        let told = extents(&[(4096, Data), (4096, Zeroes), (8192, Hole), (4096, Hole)]);
        let expected = [(4096, 0), (4096, 2), (12288, 3)];
        for style in [ReplyStyle::Structured, ReplyStyle::Extended] {
            let reply = envelope(style).status(&told, 1 << 20, false).unwrap();
            assert_eq!(descriptors(&reply, style), expected);
        }
    }

    #[test]
    fn the_heads_are_those_of_the_protocol() {
        let told = extents(&[(512, Hole)]);
        let structured = envelope(ReplyStyle::Structured).status(&told, 512, false).unwrap();
        let head = structured.chunks().next().unwrap().head.as_bytes().to_vec();
        assert_eq!(head, b"\x66\x8e\x33\xef\0\x01\0\x05\0\0\0\0\0\0\0\x07\0\0\0\x0c\0\0\0\x01");
        let extended = envelope(ReplyStyle::Extended).status(&told, 512, false).unwrap();
        let head = extended.chunks().next().unwrap().head.as_bytes().to_vec();
        let expected = b"\x6e\x8a\x27\x8c\0\x01\0\x06\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x18\
                         \0\0\0\x01\0\0\0\x01";
        assert_eq!(head, expected);
    }

    #[test]
    fn one_is_the_first_run() {
        let told = extents(&[(10, Hole), (20, Hole), (5, Data), (5, Hole)]);
        let style = ReplyStyle::Structured;
        let reply = envelope(style).status(&told, 100, true).unwrap();
        assert_eq!(descriptors(&reply, style), [(30, 3)]);
    }

    #[test]
    fn a_broken_contract_is_an_error() {
        let status = |list: &[(u64, Allocation)]| envelope(ReplyStyle::Extended).status(&extents(list), 100, true);
        assert_eq!(status(&[]).unwrap_err(), ExtentsError::None);
        assert_eq!(status(&[(10, Data), (0, Hole)]).unwrap_err(), ExtentsError::Empty);
        let too_long = ExtentsError::TooLong { length: 100 };
        assert_eq!(status(&[(10, Data), (91, Hole)]).unwrap_err(), too_long);
        assert_eq!(status(&[(10, Data), (u64::MAX, Hole)]).unwrap_err(), too_long);
    }

    #[test]
    fn what_does_not_fit_is_left_for_the_next_question() {
        let style = ReplyStyle::Structured;
        let huge = envelope(style).status(&extents(&[(1 << 40, Hole), (1, Data)]), u64::MAX, false).unwrap();
        assert_eq!(descriptors(&huge, style), [(u64::from(u32::MAX), 3)]);
        let many: Vec<_> = (0..10_000).map(|i| (1, if i % 2 == 0 { Data } else { Hole })).collect();
        let reply = envelope(style).status(&extents(&many), 10_000, false).unwrap();
        assert_eq!(descriptors(&reply, style).len(), EXTENTS_MAX);
    }

    proptest! {
        /// Descriptors cover a beginning of what was asked for and tell of each byte what the volume told.
        #[test]
        fn descriptors_tell_what_the_volume_told(
            list in prop::collection::vec((1u64..50, prop_oneof![Just(Data), Just(Zeroes), Just(Hole)]), 1..40),
            spare in 0u64..50,
            one: bool,
            extended: bool,
        ) {
            let style = if extended { ReplyStyle::Extended } else { ReplyStyle::Structured };
            let told = extents(&list);
            let length = told.iter().map(|extent| extent.length).sum::<u64>() + spare;
            let reply = envelope(style).status(&told, length, one).unwrap();
            let of_bytes = |runs: &[(u64, u64)]| -> Vec<u64> {
                runs.iter().flat_map(|&(length, flags)| (0..length).map(move |_| flags)).collect()
            };
            let descriptors = descriptors(&reply, style);
            let given = of_bytes(&descriptors);
            let told: Vec<_> = told.iter().map(|e| (e.length, u64::from(state(e.allocation)))).collect();
            prop_assert!(of_bytes(&told).starts_with(&given));
            prop_assert!(!one || descriptors.len() == 1);
            prop_assert!(descriptors.windows(2).all(|pair| pair[0].1 != pair[1].1));
        }
    }
}
