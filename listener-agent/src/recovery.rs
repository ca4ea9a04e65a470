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
//!    nothing could bring them again. Such blocks are left out of the record ([`Intents::spared`]).
//!
//! **Invariants**
//! * A log once cut off stays cut off: its last group is erased before anything else is done, and the superblock says
//!   before that what it left unsettled. A crash in between has it judged again, when nobody was told anything yet.
//! * Bytes are not called durable for having been read: what proves the last group is written again and made durable first,
//!   as a system may keep in memory what it failed to write.

use std::collections::VecDeque;
use std::io;

use bytes::Bytes;
use protocol::ranges::{ByteRange, merge_in_units};
use protocol::record::{Amended, Resize};
use protocol::{BLOCK_BYTES, Record, RecordHeader, RecordKind, Seq};

use crate::directory::OpenReplica;
use crate::dirty_file;
use crate::disk::ReplicaFiles;
use crate::image::{Image, Trust};
use crate::journal::INTENTS_MAX;
use crate::journal::group::Entry;
use crate::journal::intents::Intents;
use crate::journal::recover::{LastGroup, RecoverError, ScanStart, erase_group, scan};
use crate::replica::note_durable;
use crate::replica::unsettled::unsettle;
use crate::superblock::Superblock;

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
    /// All that count.
    intents: Intents,
    /// The group before which the log must be cut off, and its intents.
    cut: Option<(LastGroup, Vec<LastIntent>)>,
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
    let mut found = Found { start, intents: Intents::default(), cut: None, proof: Vec::new() };
    if let Some(group) = recovered.last_group.filter(|group| start.durable_at_least < group.first) {
        last.retain(|intent| intent.header.seq >= group.first);
        found.judge(image, group, last.into());
    }
    let end = found.start.end;
    intents.into_iter().filter(|(seq, _)| *seq <= end).for_each(|(seq, range)| found.intents.note(range, seq));
    Ok(found)
}

impl Found {
    /// What the intents that do not count may have written.
    pub(crate) fn cut_off(&self) -> impl Iterator<Item = ByteRange> {
        self.cut.iter().flat_map(|(_, intents)| intents).map(|intent| intent.header.range())
    }

    /// Whether the last group, of which these are the intents, counts.
    fn judge(&mut self, image: &Image, group: LastGroup, intents: Vec<LastIntent>) {
        let bytes = intents.iter().map(|intent| image.holds(intent.header.offset, &intent.stored));
        match bytes.collect::<Option<Vec<Bytes>>>() {
            Some(bytes) => self.proof = intents.iter().map(|intent| intent.header.offset).zip(bytes).collect(),
            None => {
                self.start.end = Seq(group.first.0 - 1);
                self.cut = Some((group, intents));
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
            return replay(&image, &found.intents, &superblock.unsettled, &entry);
        }
        let to = Resize::decode(&entry.record.payload).map_err(io::Error::other)?.size_bytes;
        let added = ByteRange { offset: image_bytes, length: to.saturating_sub(image_bytes) };
        if added.length > 0 && found.intents.spared(added, Seq(0)) != [added] {
            // They are made when the superblock has the size. One of its slots was lost, and the other knows less.
            return Err(io::Error::other("a large write lies behind the image that the superblock knows"));
        }
        image.grow(image_bytes, to)?;
        image_bytes = image_bytes.max(to);
        Ok(())
    })?;
    assert!(durable.seq == recovered.last, "the scan counts what it hands over");
    if let Some((_, intents)) = &found.cut {
        note_checksums(&image, intents)?;
        unsettle(&mut superblock, intents.iter().map(|intent| intent.header.range()));
        superblock.unsettled_seq = durable.seq;
    }
    superblock.generation += 1;
    superblock.write_count += 1;
    superblock.clean = false;
    superblock.write(files.superblock.as_ref())?;
    if let Some((group, _)) = &found.cut {
        // Nothing else says what is unsettled, once the group is gone: both slots do.
        superblock.write_count += 1;
        superblock.write(files.superblock.as_ref())?;
        erase_group(files.journal.as_ref(), group.offset)?;
    }
    Ok(OpenReplica { files, image, superblock, ring: recovered.ring, durable, dirty })
}

/// Does to the image what a record did, but for what a later intent did.
fn replay(image: &Image, intents: &Intents, unsettled: &[ByteRange], entry: &Entry) -> io::Result<()> {
    let Entry { record, intent } = entry;
    let header = &record.header;
    if let Some(stored) = intent {
        // Blocks that are ahead of the log keep the checksums that were stored when they were found to be so.
        let may_be_ahead = unsettled.iter().any(|range| range.overlaps(header.range()));
        let put = if may_be_ahead { Image::put_checksums_where_they_match } else { Image::put_checksums_again };
        return put(image, header.offset, stored);
    }
    if header.amended {
        let Amended { blocks } = Amended::of(record).map_err(io::Error::other)?;
        let of = |offset| ByteRange { offset, length: BLOCK_BYTES };
        let blocks = blocks.into_iter().filter(|(offset, _)| !intents.spared(of(*offset), header.seq).is_empty());
        return blocks
            .map(|(offset, bytes)| {
                Amended { blocks: vec![(offset, bytes)] }.record(&RecordHeader {
                    offset,
                    length: BLOCK_BYTES,
                    ..*header
                })
            })
            .try_for_each(|block| image.apply(&block, Trust::InDoubt));
    }
    let spared = intents.spared(header.range(), header.seq);
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
fn note_checksums(image: &Image, intents: &[LastIntent]) -> io::Result<()> {
    for intent in intents {
        image.put_checksums_where_they_match(intent.header.offset, &intent.stored)?;
    }
    // Nothing in the journal would bring these checksums again.
    image.write_back()?;
    image.sync()
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
    changed.extend(found.cut_off());
    Ok(merge_in_units(changed, BLOCK_BYTES))
}
