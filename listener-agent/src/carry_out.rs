//! What the jobs of a replica do to its files, and in which order it becomes durable. Decides nothing; threads
//! ([`crate::host`]) or a simulation call it.

use std::io;

use crate::disk::ReplicaFiles;
use crate::image::Image;
use crate::replica::{ApplyJob, Changes, JobError, MetadataJob};

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
