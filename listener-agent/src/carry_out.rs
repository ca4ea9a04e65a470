//! What the jobs of a replica do to its files, and in which order it becomes durable. Decides nothing; threads
//! ([`crate::host`]) or a simulation call it.

use std::io;

use bytes::Bytes;
use protocol::message::FetchKind;
use protocol::ranges::ByteRange;
use protocol::record::Amended;
use protocol::{BLOCK_BYTES, Record, RecordHeader};

use crate::disk::ReplicaFiles;
use crate::disk::aligned::AlignedBuffer;
use crate::image::{Image, Verified};
use crate::journal::{HEADER_BYTES, group};
use crate::replica::{ApplyJob, Changes, FetchJob, Found, GroupJob, GroupOutcome, JobError, MetadataJob};

/// Writes a group; with intents, what they name to the image, too: first the group, as only it tells what a crash meanwhile
/// leaves in doubt. `buffer` is used for the bytes of the group.
pub fn write_group(
    files: &ReplicaFiles,
    image: &Image,
    job: &GroupJob,
    buffer: &mut AlignedBuffer,
) -> (GroupOutcome, io::Result<()>) {
    if let Err(cause) = job.in_place().try_for_each(|record| image.reserve(record.header.range())) {
        return (GroupOutcome::NotBegun, Err(cause));
    }
    match write_whole_group(files, image, job, buffer) {
        Ok(()) => (GroupOutcome::Durable, Ok(())),
        Err(cause) => (GroupOutcome::Failed, Err(cause)),
    }
}

fn write_whole_group(
    files: &ReplicaFiles,
    image: &Image,
    job: &GroupJob,
    buffer: &mut AlignedBuffer,
) -> io::Result<()> {
    let checksums = group::encode_into(job.salt, job.generation, &job.records, &job.intents, buffer);
    let checksums = checksums.map_err(io::Error::other)?;
    files.journal.write_durable_at(HEADER_BYTES + job.offset, buffer.as_slice())?;
    if job.intents.is_empty() {
        return Ok(());
    }
    image.write_in_place(job.in_place().map(|record| (record.header.offset, &record.payload)))?;
    let mut written = job.in_place().zip(&checksums);
    written.try_for_each(|(record, stored)| image.put_checksums(record.header.offset, stored))
}

/// The record of an intent, with what the image holds there now, which may be ahead of it: by later records, which whoever
/// gets it gets, too, or by what was cut off.
fn from_image(image: &Image, header: &RecordHeader, may_be_ahead: bool) -> Record {
    let range = header.range();
    if !may_be_ahead && let Ok(Ok(Verified { data, crc })) = image.read_verified(range) {
        return Record::carrying(header.position(), header.kind, range, data, crc);
    }
    let read = |offset: u64| {
        let found = image.read_verified(ByteRange { offset, length: BLOCK_BYTES });
        (offset, found.ok().and_then(Result::ok).map(|verified| verified.data))
    };
    Amended { blocks: (range.offset..range.end()).step_by(BLOCK_BYTES as usize).map(read).collect() }.record(header)
}

/// Of records that are asked for, so many bytes are given at once, and what is left of the last group: an intent takes little of
/// the journal, and its bytes are as many as others'.
const FETCHED_BYTES_MAX: u64 = 4 << 20;

/// Reads records from the journal, as far as they can be read.
pub fn fetch(files: &ReplicaFiles, image: &Image, job: &FetchJob) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    let mut payload_bytes = 0;
    for segment in &job.segments {
        if payload_bytes >= FETCHED_BYTES_MAX {
            break;
        }
        let mut bytes = vec![0; segment.bytes as usize];
        files.journal.read_at(HEADER_BYTES + segment.offset, &mut bytes)?;
        for entry in group::decode(job.salt, &Bytes::from(bytes)) {
            let header = entry.record.header;
            payload_bytes += if job.what == FetchKind::Records { u64::from(header.payload_length) } else { 0 };
            found.push(match (job.what, entry.intent) {
                (FetchKind::Ranges, _) => Found::Range(header.seq, header.range()),
                (FetchKind::Records, None) => Found::Record(entry.record),
                (FetchKind::Records, Some(_)) => {
                    let is_ahead = job.unsettled.iter().any(|range| range.overlaps(header.range()));
                    Found::Record(from_image(image, &header, is_ahead || job.overwritten.contains(&header.seq)))
                }
            });
        }
    }
    Ok(found)
}

/// Makes changes to the image.
pub fn apply(image: &Image, job: &ApplyJob) -> io::Result<()> {
    match &job.changes {
        Changes::Records(records) => records.iter().try_for_each(|record| image.apply(record, job.trust)),
        Changes::Copies(copies) => copies.iter().try_for_each(|copy| image.copy(copy)),
        Changes::Grow(growth) => image.grow(growth.from, growth.to),
    }
}

/// What an error of [`apply`] means for the replica.
#[must_use]
pub fn job_error(error: &io::Error) -> JobError {
    if error.kind() == io::ErrorKind::StorageFull { JobError::NoSpace } else { JobError::Failed }
}

/// Why a superblock was not written.
#[derive(Debug, thiserror::Error)]
#[error("{cause}")]
pub struct MetadataError {
    /// What failed.
    pub cause: io::Error,
    /// What it means for the replica.
    pub error: JobError,
}

/// For what can be tried again: nothing that is in force was touched.
fn retry(cause: io::Error) -> MetadataError {
    MetadataError { error: job_error(&cause), cause }
}

/// For what leaves open what is durable.
fn fatal(cause: io::Error) -> MetadataError {
    MetadataError { error: JobError::Failed, cause }
}

/// Writes a superblock, and what must be durable before it.
pub fn write_metadata(files: &ReplicaFiles, image: &Image, job: &MetadataJob) -> Result<(), MetadataError> {
    prepare_image(image, job)?;
    write_pages(files, job)?;
    write_superblock(files, job).map_err(fatal)
}

/// The first step of [`write_metadata`]: the image is as large and as durable as the superblock will say.
pub fn prepare_image(image: &Image, job: &MetadataJob) -> Result<(), MetadataError> {
    if let Some(growth) = job.grow {
        image.grow(growth.from, growth.to).map_err(retry)?;
    }
    if !job.sync_image {
        return Ok(());
    }
    image.write_back().map_err(retry)?;
    image.sync().map_err(fatal)
}

/// Makes room for a volume of `size_bytes`, durably.
pub fn extend(image: &Image, size_bytes: u64) -> Result<(), MetadataError> {
    image.extend(size_bytes).map_err(|cause| MetadataError { error: JobError::NoSpace, cause })?;
    image.sync().map_err(fatal)
}

/// The second step: the pages that the superblock will count on.
pub fn write_pages(files: &ReplicaFiles, job: &MetadataJob) -> Result<(), MetadataError> {
    for page in &job.dirty_pages {
        files.dirty.write_at(page.offset, &page.bytes).map_err(retry)?;
    }
    if job.dirty_pages.is_empty() { Ok(()) } else { files.dirty.sync().map_err(fatal) }
}

/// The last step.
pub fn write_superblock(files: &ReplicaFiles, job: &MetadataJob) -> io::Result<()> {
    job.superblock.write(files.superblock.as_ref())
}
