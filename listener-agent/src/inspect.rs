//! Looking at a replica without serving it: who it is and where it stands, and ([`verify`]) whether every block matches its
//! checksum. Nothing is written; the directory is locked while it is looked at.

mod verify;

use std::fmt;
use std::path::{Path, PathBuf};

use protocol::quorum::AckPolicies;
use protocol::ranges::ByteRange;
use protocol::{Epoch, EpochHistory, Position, RecordKind, Seq, ViewState};
use serde::Serialize;

use crate::directory::{self, DIRTY, DirectoryError, JOURNAL};
use crate::dirty_file;
use crate::disk::ReplicaFiles;
use crate::image::Image;
use crate::journal::capacity_bytes;
use crate::journal::group::Entry;
use crate::journal::recover::{RecoverError, Recovered, scan};
use crate::recovery;
use crate::replica::dirty::DirtyCount;
use crate::replica::note_durable;
use crate::replica::unsettled::unsettle;
use crate::superblock::Superblock;

pub use verify::{BadBlock, Fault, VerifyReport, verify};

/// Why a replica cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// The journal cannot be read.
    #[error("{path}: {cause}")]
    Journal {
        /// The journal.
        path: PathBuf,
        /// What is wrong.
        cause: RecoverError,
    },
    /// The image cannot be read.
    #[error("{path}: {cause}")]
    Image {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        cause: std::io::Error,
    },
}

impl InspectError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            InspectError::Directory(e) => e.remedy(),
            InspectError::Journal { .. } => Some(
                "keep the directory as it is; the other replicas hold the data, this one must be made anew from them"
                    .to_owned(),
            ),
            InspectError::Image { .. } => Some("check the disk".to_owned()),
        }
    }
}

/// What is known of a replica that nobody serves.
#[derive(Clone, Debug, Serialize)]
pub struct InspectReport {
    /// The volume's name.
    pub volume: String,
    /// The volume's identity.
    pub uuid: String,
    /// The replica's name.
    pub replica: String,
    /// Size of the volume as of the last durable record, bytes.
    pub size_bytes: u64,
    /// The last durable record.
    pub position: Position,
    /// The highest promise.
    pub promised: Epoch,
    /// The views of the latest view record.
    pub views: ViewState,
    /// Which epoch gave out which places.
    pub history: EpochHistory,
    /// The ack policies that its latest epoch served by; none if it never served.
    pub acks: Option<AckPolicies>,
    /// Whether the replica is being copied to.
    pub syncing: bool,
    /// Bytes that a crash in the midst of a large write may have left ahead of the log: the next engine settles them.
    pub unsettled_bytes: u64,
    /// Whether it was closed in good order.
    pub clean: bool,
    /// How often it was opened.
    pub generation: u64,
    /// The journal.
    pub journal: JournalReport,
    /// The last record that is durable in the image.
    pub checkpoint: Position,
    /// Up to here every member held the order.
    pub stable: Seq,
    /// The replicas out of the view.
    pub tracked: Vec<TrackedReport>,
}

/// What is kept of a replica out of the view.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TrackedReport {
    /// Its name.
    pub replica: String,
    /// It is known to hold everything up to here.
    pub acknowledged: Seq,
    /// What would have to be copied to it if it came back now, bytes.
    pub dirty_bytes: u64,
}

/// What a journal holds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct JournalReport {
    /// Room for records, bytes.
    pub capacity_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// First record in it; none if it is empty.
    pub first: Option<Seq>,
    /// Records in it.
    pub records: u64,
    /// Records that are not durable in the image yet.
    pub unapplied_records: u64,
    /// Of all records: writes, trims and zeroings.
    pub changes: u64,
    /// Of all records: view changes.
    pub view_changes: u64,
}

impl fmt::Display for InspectReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let journal = &self.journal;
        writeln!(f, "volume      {} ({})", self.volume, self.uuid)?;
        writeln!(f, "replica     {}, {} bytes", self.replica, self.size_bytes)?;
        writeln!(f, "position    epoch {}, record {}", self.position.epoch, self.position.seq)?;
        writeln!(f, "promised    epoch {}", self.promised)?;
        writeln!(f, "view        {}", self.views.view)?;
        if self.views.previous != self.views.view {
            writeln!(f, "  before    {} (until record {})", self.views.previous, self.views.seq)?;
        }
        writeln!(f, "checkpoint  record {}", self.checkpoint.seq)?;
        writeln!(f, "stable      record {}", self.stable)?;
        let percent = journal.used_bytes as f64 * 100.0 / journal.capacity_bytes as f64;
        writeln!(f, "journal     {} records, {percent:.1} % of {} bytes", journal.records, journal.capacity_bytes)?;
        writeln!(f, "  unapplied {} records", journal.unapplied_records)?;
        let closed = if self.clean { "yes" } else { "no (the next start replays the journal)" };
        writeln!(f, "clean       {closed}")?;
        write!(f, "syncing     {}", if self.syncing { "yes" } else { "no" })?;
        if self.unsettled_bytes > 0 {
            write!(f, "\nunsettled   {} bytes (the next engine settles them)", self.unsettled_bytes)?;
        }
        self.tracked.iter().try_for_each(|tracked| {
            let TrackedReport { replica, acknowledged, dirty_bytes } = tracked;
            write!(
                f,
                "\nout of view {replica}: {dirty_bytes} bytes to copy, holds everything up to record {acknowledged}"
            )
        })
    }
}

struct Opened {
    superblock: Superblock,
    files: ReplicaFiles,
}

fn open(dir: &Path) -> Result<Opened, DirectoryError> {
    let (superblock, file) = directory::read_superblock(dir)?;
    let files = directory::open_files(dir, &superblock, file)?;
    Ok(Opened { superblock, files })
}

/// Goes through what counts of the journal; gives what does not, too.
fn scan_journal(
    dir: &Path,
    opened: &Opened,
    on_record: &mut dyn FnMut(&protocol::Record) -> std::io::Result<()>,
) -> Result<(Recovered, Vec<ByteRange>), InspectError> {
    let found = recovery::find(&opened.files, &Image::new(&opened.files), &opened.superblock);
    let scanned = found.and_then(|found| {
        let on_entry = &mut |entry: Entry| on_record(&entry.record);
        Ok((scan(opened.files.journal.as_ref(), found.start, on_entry)?, found.cut_off().collect()))
    });
    scanned.map_err(|cause| InspectError::Journal { path: dir.join(JOURNAL), cause })
}

/// Reads who the replica in `dir` is and where it stands.
pub fn inspect(dir: &Path) -> Result<InspectReport, InspectError> {
    let opened = open(dir)?;
    let mut superblock = opened.superblock.clone();
    let checkpoint = superblock.checkpoint;
    let mut journal =
        JournalReport { capacity_bytes: capacity_bytes(superblock.identity.journal_bytes), ..JournalReport::default() };
    let dirty_file = opened.files.dirty.as_ref();
    let mut dirty = dirty_file::load(dirty_file, &superblock)
        .map_err(|cause| InspectError::Image { path: dir.join(DIRTY), cause })?;
    let mut position = checkpoint;
    let (recovered, cut_off) = scan_journal(dir, &opened, &mut |record| {
        position = record.header.position();
        note_durable(&mut superblock, &mut dirty, record).map_err(std::io::Error::other)?;
        journal.records += 1;
        journal.unapplied_records += u64::from(record.seq() > checkpoint.seq);
        match record.header.kind {
            RecordKind::Write | RecordKind::Trim | RecordKind::WriteZeroes => journal.changes += 1,
            RecordKind::ViewChange => journal.view_changes += 1,
            RecordKind::EpochStart | RecordKind::DirtyChange | RecordKind::Resize => {}
        }
        Ok(())
    })?;
    unsettle(&mut superblock, cut_off.into_iter());
    journal.used_bytes = recovered.ring.used_bytes();
    journal.first = recovered.ring.first();
    let identity = superblock.identity;
    Ok(InspectReport {
        volume: identity.volume.into(),
        uuid: identity.uuid.to_string(),
        replica: identity.replica.into(),
        size_bytes: dirty.size_bytes(),
        position,
        promised: superblock.promised,
        views: superblock.views,
        history: superblock.history,
        acks: superblock.acks,
        syncing: superblock.syncing,
        unsettled_bytes: superblock.unsettled.iter().map(|range| range.length).sum(),
        clean: superblock.clean,
        generation: superblock.generation,
        journal,
        checkpoint,
        stable: superblock.stable,
        tracked: dirty.counts().into_iter().map(tracked_report).collect(),
    })
}

fn tracked_report(count: DirtyCount) -> TrackedReport {
    let DirtyCount { name, acknowledged, dirty_bytes } = count;
    TrackedReport { replica: name.into(), acknowledged, dirty_bytes }
}
