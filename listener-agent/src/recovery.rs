//! What a journal means for the image after a stop or a crash, and making the image so.
//!
//! The bytes of an *intent* are not in the journal. They were written to the image after the group with the intent was
//! durable, and the next group was written only when they were. So there are two things to find out before anything is
//! replayed:
//!
//! 1. *Whether the last group counts.* Of every group but the last all bytes reached the image. The last one counts if the
//!    superblock knows that it was durable, or if the blocks of each of its intents hold what the intent says. If not,
//!    nobody was told of any record of the group, and the log is *cut off* before it. What its intents may have written is
//!    *unsettled*: each block is as it was or as it would have been.
//! 2. *What must not be replayed.* A record before an intent would take the intent's bytes back where the two touch, and
//!    nothing could bring them again. Such blocks are left out of the record ([`Later`]).
//!
//! **Invariants**
//! * A log once cut off stays cut off: the superblock says where before anything else is done.
//! * Bytes are not called durable for having been read: what proves the last group is written again and made durable first,
//!   as a system may keep in memory what it failed to write.

use std::collections::{BTreeMap, VecDeque};
use std::io;

use bytes::Bytes;
use protocol::ranges::{ByteRange, merge_in_units};
use protocol::record::Resize;
use protocol::{BLOCK_BYTES, Record, RecordHeader, RecordKind, Seq};

use crate::directory::OpenReplica;
use crate::dirty_file;
use crate::disk::ReplicaFiles;
use crate::image::{Image, Trust};
use crate::journal::group::Entry;
use crate::journal::INTENTS_MAX;
use crate::journal::recover::{LastGroup, RecoverError, ScanStart, scan};
use crate::replica::note_durable;
use crate::superblock::{Cut, Superblock, UNSETTLED_MAX};

/// Which part of the volume was last written by which intent.
#[derive(Debug, Default)]
pub(crate) struct Later {
    /// By the first byte: the byte after the last, and the intent. No two overlap.
    parts: BTreeMap<u64, (u64, Seq)>,
}

impl Later {
    /// Notes an intent; they come in order.
    fn note(&mut self, range: ByteRange, seq: Seq) {
        let overlapping = self.parts.range(..range.end()).rev().take_while(|(_, (end, _))| *end > range.offset);
        let overlapping: Vec<(u64, u64, Seq)> = overlapping.map(|(start, (end, seq))| (*start, *end, *seq)).collect();
        for (start, end, earlier) in overlapping {
            self.parts.remove(&start);
            if start < range.offset {
                self.parts.insert(start, (range.offset, earlier));
            }
            if end > range.end() {
                self.parts.insert(range.end(), (end, earlier));
            }
        }
        self.parts.insert(range.offset, (range.end(), seq));
    }

    /// What of a range no intent after `seq` wrote, in ascending order.
    fn spared(&self, range: ByteRange, seq: Seq) -> Vec<ByteRange> {
        let overlapping = self.parts.range(..range.end()).rev().take_while(|(_, (end, _))| *end > range.offset);
        let mut taken: Vec<(u64, u64)> =
            overlapping.filter(|(_, (_, later))| *later > seq).map(|(start, (end, _))| (*start, *end)).collect();
        taken.reverse();
        let mut spared = Vec::new();
        let mut from = range.offset;
        for (start, end) in taken {
            if from < start {
                spared.push(ByteRange { offset: from, length: start - from });
            }
            from = from.max(end);
        }
        if from < range.end() {
            spared.push(ByteRange { offset: from, length: range.end() - from });
        }
        spared
    }
}

/// An intent of the last group.
#[derive(Debug)]
struct LastIntent {
    header: RecordHeader,
    stored: Vec<u32>,
}

/// What a journal holds, and how much of it counts.
#[derive(Debug)]
pub(crate) struct Found {
    /// From where on the journal is to be read, and how far.
    pub(crate) start: ScanStart,
    later: Later,
    /// Where the log must be cut off, and the intents that were.
    cut: Option<(Cut, Vec<LastIntent>)>,
    /// What proves that the last group counts, with its bytes.
    proof: Vec<(u64, Bytes)>,
}

/// Reads the journal once, and of the image what the last group's intents name. Changes nothing.
pub(crate) fn find(files: &ReplicaFiles, image: &Image, superblock: &Superblock) -> Result<Found, RecoverError> {
    let start = ScanStart::of(superblock);
    let checkpoint = superblock.checkpoint.seq;
    let mut intents: Vec<(Seq, ByteRange)> = Vec::new();
    // A group has no more than these.
    let mut last: VecDeque<LastIntent> = VecDeque::new();
    let recovered = scan(files.journal.as_ref(), start, &mut |entry| {
        let header = entry.record.header;
        if let Some(stored) = entry.intent
            && header.seq > checkpoint
        {
            intents.push((header.seq, header.range()));
            last.push_back(LastIntent { header, stored });
            if last.len() > INTENTS_MAX {
                last.pop_front();
            }
        }
        Ok(())
    })?;
    let mut found = Found { start, later: Later::default(), cut: None, proof: Vec::new() };
    if let Some(group) = recovered.last_group.filter(|group| start.durable_at_least < group.first) {
        last.retain(|intent| intent.header.seq >= group.first);
        found.judge(image, group, last.into());
    }
    let end = found.cut.as_ref().map_or(recovered.last, |(cut, _)| cut.after);
    intents.into_iter().filter(|(seq, _)| *seq <= end).for_each(|(seq, range)| found.later.note(range, seq));
    Ok(found)
}

impl Found {
    /// Whether the last group, of which these are the intents, counts.
    fn judge(&mut self, image: &Image, group: LastGroup, intents: Vec<LastIntent>) {
        let bytes = intents.iter().map(|intent| image.holds(intent.header.offset, &intent.stored));
        match bytes.collect::<Option<Vec<Bytes>>>() {
            Some(bytes) => self.proof = intents.iter().map(|intent| intent.header.offset).zip(bytes).collect(),
            None => {
                let cut = Cut { after: Seq(group.first.0 - 1), generation: group.generation };
                self.start.cut = cut;
                self.cut = Some((cut, intents));
            }
        }
    }
}

/// Replays the journal and begins a new generation.
pub fn recover(files: ReplicaFiles, mut superblock: Superblock) -> Result<OpenReplica, RecoverError> {
    // After a mere crash of the process the system may hold journal bytes that are not on disk yet. They become durable
    // here, before anything is said about them.
    files.journal.sync()?;
    let image = Image::new(&files);
    let found = find(&files, &image, &superblock)?;
    if !found.proof.is_empty() {
        image.write_in_place(found.proof.iter().map(|(offset, data)| (*offset, data)))?;
    }
    let mut dirty = dirty_file::load(files.dirty.as_ref(), &superblock)?;
    let checkpoint = superblock.checkpoint;
    let mut durable = checkpoint;
    let mut image_bytes = superblock.image_bytes;
    let recovered = scan(files.journal.as_ref(), found.start, &mut |entry| {
        durable = entry.record.header.position();
        note_durable(&mut superblock, &mut dirty, &entry.record).map_err(io::Error::other)?;
        if entry.record.seq() <= checkpoint.seq {
            return Ok(());
        }
        if entry.record.header.kind != RecordKind::Resize {
            return replay(&image, &found.later, &entry);
        }
        let to = Resize::decode(&entry.record.payload).map_err(io::Error::other)?.size_bytes;
        image.grow(image_bytes, to)?;
        image_bytes = image_bytes.max(to);
        Ok(())
    })?;
    assert!(durable.seq == recovered.last, "the scan counts what it hands over");
    if let Some((cut, intents)) = found.cut {
        unsettle(&image, &mut superblock, cut, &intents)?;
    }
    superblock.generation += 1;
    superblock.write_count += 1;
    superblock.clean = false;
    superblock.write(files.superblock.as_ref())?;
    Ok(OpenReplica { files, image, superblock, ring: recovered.ring, durable, dirty })
}

/// Does to the image what a record did, but for what a later intent did.
fn replay(image: &Image, later: &Later, entry: &Entry) -> io::Result<()> {
    let Entry { record, intent } = entry;
    let header = &record.header;
    if let Some(stored) = intent {
        return image.put_checksums(header.offset, stored);
    }
    let spared = later.spared(header.range(), header.seq);
    if spared == [header.range()] || header.length == 0 {
        return image.apply(record, Trust::InDoubt);
    }
    spared.into_iter().try_for_each(|part| {
        let payload = match header.kind {
            RecordKind::Write => {
                let start = (part.offset - header.offset) as usize;
                record.payload.slice(start..start + part.length as usize)
            }
            _ => Bytes::new(),
        };
        let mut of_part = Record::new(header.position(), header.kind, part, payload);
        of_part.header.no_hole = header.no_hole;
        image.apply(&of_part, Trust::InDoubt)
    })
}

/// The log ends before these intents. Blocks that hold what an intent wrote get its checksum, others keep theirs: one that
/// the crash tore in its midst matches neither, and is bad.
fn unsettle(image: &Image, superblock: &mut Superblock, cut: Cut, intents: &[LastIntent]) -> io::Result<()> {
    for intent in intents {
        image.put_checksums_where_they_match(intent.header.offset, &intent.stored)?;
    }
    // Nothing in the journal would bring these checksums again.
    image.write_back()?;
    image.sync()?;
    let ranges = intents.iter().map(|intent| intent.header.range()).chain(superblock.unsettled.iter().copied());
    superblock.unsettled = merge_in_units(ranges, BLOCK_BYTES);
    let mut unit = BLOCK_BYTES;
    while superblock.unsettled.len() > UNSETTLED_MAX {
        unit *= 2;
        superblock.unsettled = merge_in_units(std::mem::take(&mut superblock.unsettled), unit);
    }
    superblock.cut = cut;
    Ok(())
}

/// What records since the checkpoint changed, and what those that do not count may have: nothing there need match its
/// checksum before the replica was opened.
pub(crate) fn changed_since_checkpoint(
    files: &ReplicaFiles,
    image: &Image,
    superblock: &Superblock,
) -> Result<Vec<ByteRange>, RecoverError> {
    let found = find(files, image, superblock)?;
    let mut changed: Vec<ByteRange> = Vec::new();
    scan(files.journal.as_ref(), found.start, &mut |entry| {
        if entry.record.seq() > superblock.checkpoint.seq && entry.record.header.length > 0 {
            changed.push(entry.record.header.range());
        }
        Ok(())
    })?;
    changed.extend(found.cut.iter().flat_map(|(_, intents)| intents).map(|intent| intent.header.range()));
    Ok(merge_in_units(changed, BLOCK_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange { offset, length }
    }

    #[test]
    fn an_intent_spares_what_it_did_not_write_and_what_came_after_it() {
        let mut later = Later::default();
        later.note(range(4096, 8192), Seq(5));
        assert_eq!(later.spared(range(0, 16384), Seq(4)), [range(0, 4096), range(12288, 4096)]);
        assert_eq!(later.spared(range(5000, 100), Seq(4)), []);
        assert_eq!(later.spared(range(4000, 200), Seq(4)), [range(4000, 96)]);
        assert_eq!(later.spared(range(4000, 200), Seq(6)), [range(4000, 200)], "it came after the intent");
    }

    #[test]
    fn of_intents_that_overlap_the_last_counts_block_by_block() {
        let mut later = Later::default();
        later.note(range(0, 16384), Seq(3));
        later.note(range(4096, 4096), Seq(7));
        later.note(range(12288, 8192), Seq(9));
        let of = |seq| later.spared(range(0, 24576), Seq(seq));
        assert_eq!(of(2), [range(20480, 4096)]);
        assert_eq!(of(5), [range(0, 4096), range(8192, 4096), range(20480, 4096)]);
        assert_eq!(of(8), [range(0, 12288), range(20480, 4096)]);
        assert_eq!(of(9), [range(0, 24576)]);
    }
}
