//! A replica's directory: making one, opening one, and refusing one that is not what was asked for.
//!
//! ```text
//! DATA/VOLUME/superblock   identity, promise, views, checkpoint (see superblock)
//!             journal      the write-ahead log (see journal)
//!             image.raw    the volume's bytes; a symbolic link if the replica lives on a block device
//!             checksums    four bytes per block of the image
//!             dirty        what replicas out of the view lack (see replica::dirty)
//! ```

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Epoch, EpochHistory, Position, Seq, View, ViewState, VolumeUuid};
use rustix::fs::{FlockOperation, SeekFrom, flock};
use rustix::io::Errno;

use crate::disk::file::{Caching, SystemFile};
use crate::disk::{RawFile, ReplicaFiles};
use crate::image::{Image, checksum_file_bytes};
use crate::journal::recover::RecoverError;
use crate::journal::ring::Ring;
use crate::journal::{self, HeaderError};
use crate::recovery::{changed_since_checkpoint, recover};
use crate::replica::dirty::DirtyMaps;
use crate::superblock::{self, Identity, JournalTail, Superblock, SuperblockError};

/// Names of the files.
pub const SUPERBLOCK: &str = "superblock";
/// See [`SUPERBLOCK`].
pub const JOURNAL: &str = "journal";
/// See [`SUPERBLOCK`].
pub const IMAGE: &str = "image.raw";
/// See [`SUPERBLOCK`].
pub const CHECKSUMS: &str = "checksums";
/// See [`SUPERBLOCK`].
pub const DIRTY: &str = "dirty";

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The system refused.
    #[error("{path}: {cause}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Nothing is there.
    #[error("{path} holds no replica")]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// A replica with data is there already.
    #[error("{path} already holds replica {replica} of volume {volume} ({uuid})")]
    HasData {
        /// The directory.
        path: PathBuf,
        /// Its volume.
        volume: String,
        /// Its replica.
        replica: String,
        /// Its volume's identity.
        uuid: VolumeUuid,
    },
    /// An image with data lies there, but nothing says whose it is.
    #[error("{path} holds data, and the superblock that should be beside it is missing")]
    StrayImage {
        /// The image.
        path: PathBuf,
    },
    /// It is another replica than the one asked for.
    #[error("{path} holds replica {replica} of volume {volume}, which is not the one asked for")]
    OtherReplica {
        /// The directory.
        path: PathBuf,
        /// Its volume.
        volume: String,
        /// Its replica.
        replica: String,
    },
    /// Another process has it open.
    #[error("{path} is in use by another process")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The superblock is damaged or of another release.
    #[error("{path}: {cause}")]
    Superblock {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        cause: SuperblockError,
    },
    /// The device that the image should be on holds something else.
    #[error("{path}: {device} does not hold the image of this replica", device = device.display(), path = path.display())]
    ForeignDevice {
        /// The directory.
        path: PathBuf,
        /// The device that `image.raw` names.
        device: PathBuf,
    },
    /// One of the files is not there.
    #[error("{path} is missing", path = path.display())]
    Lost {
        /// Which file.
        path: PathBuf,
    },
    /// A file has another size than the superblock says.
    #[error("{path} has {found} bytes where {expected} are needed")]
    Size {
        /// Which file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The size needed.
        expected: u64,
    },
    /// The journal is not this volume's.
    #[error("{path}: {cause}")]
    JournalHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: HeaderError,
    },
    /// The journal cannot be recovered.
    #[error("{path}: {cause}")]
    Recover {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: RecoverError,
    },
}

impl DirectoryError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        let text = match self {
            DirectoryError::Io { cause, .. } if cause.kind() == io::ErrorKind::StorageFull => {
                "make room on the disk, or choose another directory"
            }
            DirectoryError::Io { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => {
                "run as a user who may write there, or change the owner of the directory"
            }
            DirectoryError::Io { cause, .. } if cause.kind() == io::ErrorKind::ResourceBusy => {
                "unmount the device, or stop what else uses it: it may be the image of another replica"
            }
            DirectoryError::Io { .. } => "check the path and the disk",
            DirectoryError::Missing { .. } => {
                "check the path (DATA/VOLUME); `nbdcast create --config FILE` makes the replicas of a new volume"
            }
            DirectoryError::HasData { .. } => {
                "to begin anew, move the directory away first; its data is lost to nbdcast then"
            }
            DirectoryError::StrayImage { .. } => {
                "keep the image: it is the plain content of a disk; move it away to make a new replica there"
            }
            DirectoryError::OtherReplica { .. } => "correct `path` of the replica in the configuration",
            DirectoryError::InUse { .. } => "stop the engine or agent that serves it",
            DirectoryError::Superblock { cause: SuperblockError::Version { .. }, .. } => {
                "use the release that wrote it, or a later one"
            }
            DirectoryError::Superblock { .. } | DirectoryError::Recover { .. } => {
                "keep the directory as it is; the other replicas hold the data, this one must be made anew from them"
            }
            DirectoryError::ForeignDevice { .. } => {
                "the name may mean another disk now: let the link image.raw name the right one (/dev/disk/by-id/...)"
            }
            DirectoryError::Lost { path } | DirectoryError::Size { path, .. } if path.ends_with(CHECKSUMS) => {
                "move the directory away and let `nbdcast replica resync` make the replica anew from the others; if there \
                 are none, `listener-agent rebuild-checksums DIR` makes checksums from the image, which it takes on trust"
            }
            DirectoryError::Lost { .. } => {
                "put it back, or move the directory away and let `nbdcast replica resync` make the replica anew"
            }
            DirectoryError::Size { .. } => "give a file or device that is large enough",
            DirectoryError::JournalHeader { .. } => "put back the journal that belongs to this replica",
        };
        Some(text.to_owned())
    }
}

pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> DirectoryError {
    let path = path.to_owned();
    move |cause| DirectoryError::Io { path, cause }
}

/// A replica to be made.
#[derive(Clone, Debug)]
pub struct NewReplica {
    /// Who it is.
    pub identity: Identity,
    /// The volume's first view.
    pub view: View,
    /// A block device to keep the image on; a file of its own if `None`.
    pub image: Option<PathBuf>,
    /// Whether it is to be copied to first and cannot stand for the volume until then.
    pub syncing: bool,
}

/// A replica that was opened and recovered.
pub struct OpenReplica {
    /// Its files. The superblock is locked as long as they are open.
    pub files: ReplicaFiles,
    /// The image with all records applied, some of it in memory alone.
    pub image: Image,
    /// The superblock written for this opening, brought up to `durable`.
    pub superblock: Superblock,
    /// The journal.
    pub ring: Ring,
    /// The last record.
    pub durable: Position,
    /// What replicas out of the view lack, as of that record.
    pub dirty: DirtyMaps,
}

/// Whether `dir` holds a replica, pristine or not.
#[must_use]
pub fn holds_replica(dir: &Path) -> bool {
    dir.join(SUPERBLOCK).exists()
}

/// Refuses a directory with a replica that has served: [`create`] would refuse it too.
pub fn refuse_data(dir: &Path) -> Result<(), DirectoryError> {
    lock_unserved(dir).map(drop)
}

/// As [`refuse_data`]; gives the lock on a replica that is there and never served.
fn lock_unserved(dir: &Path) -> Result<Option<SystemFile>, DirectoryError> {
    if !holds_replica(dir) {
        return refuse_stray_image(&dir.join(IMAGE)).map(|()| None);
    }
    let (superblock, lock) = read_superblock(dir)?;
    if superblock.promised == Epoch(0) {
        return Ok(Some(lock));
    }
    let Identity { uuid, volume, replica, .. } = superblock.identity;
    Err(DirectoryError::HasData { path: dir.to_owned(), volume: volume.into(), replica: replica.into(), uuid })
}

/// An unfinished attempt leaves an image without a byte in it. One with data has lost its superblock.
fn refuse_stray_image(path: &Path) -> Result<(), DirectoryError> {
    let is_file = fs::symlink_metadata(path).is_ok_and(|m| m.is_file());
    if !is_file {
        return Ok(());
    }
    let file = File::open(path).map_err(at(path))?;
    match rustix::fs::seek(&file, SeekFrom::Data(0)) {
        Err(Errno::NXIO) => Ok(()),
        Ok(_) => Err(DirectoryError::StrayImage { path: path.to_owned() }),
        Err(e) => Err(at(path)(e.into())),
    }
}

/// Keeps others from making a replica in `dir` as long as the file is open.
fn lock_directory(dir: &Path) -> Result<File, DirectoryError> {
    let file = File::open(dir).map_err(at(dir))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(DirectoryError::InUse { path: dir.to_owned() }),
        Err(e) => Err(at(dir)(e.into())),
    }
}

/// Makes a new replica in `dir`. A replica that never served is made anew; one that did is left alone and refused.
/// The superblock is written last, so that a directory without one is known to be unfinished.
pub fn create(dir: &Path, new: &NewReplica) -> Result<(), DirectoryError> {
    fs::create_dir_all(dir).map_err(at(dir))?;
    let _making = lock_directory(dir)?;
    // Held to the end: nobody may open the old replica while its files are replaced.
    let _unserved = lock_unserved(dir)?;
    let superblock_path = dir.join(SUPERBLOCK);
    if superblock_path.exists() {
        fs::remove_file(&superblock_path).map_err(at(&superblock_path))?;
    }
    let identity = &new.identity;
    create_image(&dir.join(IMAGE), new)?;
    let checksums = dir.join(CHECKSUMS);
    create_sized(&checksums, checksum_file_bytes(identity.size_bytes))?;
    create_sized(&dir.join(DIRTY), 0)?;
    create_journal(&dir.join(JOURNAL), identity)?;
    // Made under another name, so that a directory with a superblock holds a whole replica.
    let unfinished = dir.join("superblock.new");
    create_sized(&unfinished, superblock::FILE_BYTES)?;
    let file = SystemFile::open(&unfinished, Caching::Buffered).map_err(at(&unfinished))?;
    // All of its space is taken now: a checkpoint must not fail on a full disk.
    file.write_at(0, &vec![0; superblock::FILE_BYTES as usize]).map_err(at(&unfinished))?;
    first_superblock(new).write(&file).map_err(at(&unfinished))?;
    file.file().sync_all().map_err(at(&unfinished))?;
    fs::rename(&unfinished, &superblock_path).map_err(at(&superblock_path))?;
    [Some(dir), dir.parent()].into_iter().flatten().try_for_each(sync_directory)
}

pub(crate) fn sync_directory(directory: &Path) -> Result<(), DirectoryError> {
    let shown = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    File::open(shown).and_then(|d| d.sync_all()).map_err(at(shown))
}

/// The superblock of a replica that never served.
#[must_use]
pub fn first_superblock(new: &NewReplica) -> Superblock {
    Superblock {
        identity: new.identity.clone(),
        write_count: 1,
        generation: 0,
        clean: true,
        promised: Epoch(0),
        engine: [0; 16],
        lease_ms: 0,
        syncing: new.syncing,
        checkpoint: Position::default(),
        image_bytes: new.identity.size_bytes,
        views: ViewState::initial(new.view.clone()),
        history: EpochHistory::default(),
        acks: None,
        tail: JournalTail { offset: 0, seq: Seq(1), generation: 1 },
        stable: Seq(0),
        tracked: Vec::new(),
        tracked_seq: Seq(0),
        unsettled: Vec::new(),
        unsettled_seq: Seq(0),
    }
}

pub(crate) fn create_sized(path: &Path, bytes: u64) -> Result<(), DirectoryError> {
    // Truncated first: what an unfinished attempt left must read as zeroes.
    let file = OpenOptions::new().write(true).create(true).truncate(true).open(path).map_err(at(path))?;
    file.set_len(bytes).and_then(|()| file.sync_all()).map_err(at(path))
}

fn create_image(path: &Path, new: &NewReplica) -> Result<(), DirectoryError> {
    let size = new.identity.size_bytes;
    // An earlier attempt may have left a link to a device, which must not be written through.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(at(path)(e)),
        Ok(()) | Err(_) => {}
    }
    let Some(device) = &new.image else { return create_sized(path, size) };
    let file = SystemFile::open(device, Caching::Buffered).map_err(at(device))?;
    let found = file.length().map_err(at(device))?;
    if found < size {
        return Err(DirectoryError::Size { path: device.clone(), found, expected: size });
    }
    file.zero_range(0, size, false).and_then(|()| file.sync()).map_err(at(device))?;
    std::os::unix::fs::symlink(device, path).map_err(at(path))
}

/// Writes every byte of the journal, so that later durable writes change no metadata of the filesystem.
fn create_journal(path: &Path, identity: &Identity) -> Result<(), DirectoryError> {
    create_sized(path, identity.journal_bytes)?;
    let file = SystemFile::open(path, Caching::Buffered).map_err(at(path))?;
    let zeroes = vec![0; 4 << 20];
    let mut offset = 0;
    while offset < identity.journal_bytes {
        let step = (identity.journal_bytes - offset).min(zeroes.len() as u64);
        file.write_at(offset, &zeroes[..step as usize]).map_err(at(path))?;
        offset += step;
    }
    file.write_at(0, journal::encode_header(identity.uuid).as_slice()).map_err(at(path))?;
    file.file().sync_all().map_err(at(path))
}

/// Reads the superblock of `dir` and locks it against other processes.
pub fn read_superblock(dir: &Path) -> Result<(Superblock, SystemFile), DirectoryError> {
    let path = dir.join(SUPERBLOCK);
    let file = match SystemFile::open(&path, Caching::Buffered) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(DirectoryError::Missing { path: dir.to_owned() });
        }
        other => other.map_err(at(&path))?,
    };
    if flock(file.file(), FlockOperation::NonBlockingLockExclusive).is_err() {
        return Err(DirectoryError::InUse { path: dir.to_owned() });
    }
    let superblock =
        Superblock::read(&file).map_err(|cause| DirectoryError::Superblock { path: dir.to_owned(), cause })?;
    Ok((superblock, file))
}

/// One of the files of `dir`, of at least `expected` bytes.
pub(crate) fn open_file(
    dir: &Path,
    name: &str,
    caching: Caching,
    expected: u64,
) -> Result<Arc<dyn RawFile>, DirectoryError> {
    let path = dir.join(name);
    let file = match SystemFile::open(&path, caching) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(DirectoryError::Lost { path }),
        other => other.map_err(at(&path))?,
    };
    let found = file.length().map_err(at(&path))?;
    if found < expected {
        return Err(DirectoryError::Size { path, found, expected });
    }
    Ok(Arc::new(file))
}

/// The five files of `dir`, sizes checked. `superblock_file` comes from [`read_superblock`].
pub fn open_files(
    dir: &Path,
    superblock: &Superblock,
    superblock_file: SystemFile,
) -> Result<ReplicaFiles, DirectoryError> {
    let open = |name: &str, caching, expected: u64| open_file(dir, name, caching, expected);
    let identity = &superblock.identity;
    let files = ReplicaFiles {
        journal: open(JOURNAL, Caching::Direct, identity.journal_bytes)?,
        // A resize after the checkpoint may not have reached them: the journal makes them larger.
        image: open(IMAGE, Caching::Buffered, superblock.image_bytes)?,
        checksums: open(CHECKSUMS, Caching::Buffered, checksum_file_bytes(superblock.image_bytes))?,
        dirty: open(DIRTY, Caching::Buffered, 0)?,
        superblock: Arc::new(superblock_file),
    };
    let path = dir.join(JOURNAL);
    journal::check_header(files.journal.as_ref(), identity.uuid)
        .map_err(|cause| DirectoryError::JournalHeader { path, cause })?;
    Ok(files)
}

/// Opens the replica in `dir`: takes the lock, replays the journal, and writes the superblock of a new generation.
pub fn open(dir: &Path) -> Result<OpenReplica, DirectoryError> {
    let (mut superblock, file) = read_superblock(dir)?;
    restore_dirty_file(dir, &mut superblock, &file)?;
    let files = open_files(dir, &superblock, file)?;
    refuse_foreign_device(dir, &files, &superblock)?;
    recover(files, superblock).map_err(|cause| DirectoryError::Recover { path: dir.join(JOURNAL), cause })
}

/// Makes the file of dirty bitmaps anew if it is gone. What it said is not known then: the replicas out of the view are
/// forgotten first, as one of which nothing is known is given all of the volume.
fn restore_dirty_file(dir: &Path, superblock: &mut Superblock, file: &SystemFile) -> Result<(), DirectoryError> {
    let path = dir.join(DIRTY);
    if path.try_exists().map_err(at(&path))? {
        return Ok(());
    }
    if !superblock.tracked.is_empty() {
        superblock.tracked.clear();
        superblock.write_count += 1;
        superblock.write(file).map_err(at(&dir.join(SUPERBLOCK)))?;
    }
    create_sized(&path, 0)?;
    sync_directory(dir)
}

/// Blocks looked at to tell whether a device holds the image.
const DEVICE_SAMPLES: u64 = 64;

/// The name of a device may mean another disk than when the replica was made. Replaying onto that would destroy what is
/// on it, so blocks that the journal will not write are compared with their checksums first.
fn refuse_foreign_device(dir: &Path, files: &ReplicaFiles, superblock: &Superblock) -> Result<(), DirectoryError> {
    let path = dir.join(IMAGE);
    let Ok(device) = fs::read_link(&path) else { return Ok(()) };
    let image = Image::new(files);
    let in_journal = changed_since_checkpoint(files, &image, superblock)
        .map_err(|cause| DirectoryError::Recover { path: dir.join(JOURNAL), cause })?;
    let size_bytes = superblock.image_bytes;
    let stride = (size_bytes / DEVICE_SAMPLES).next_multiple_of(BLOCK_BYTES).max(BLOCK_BYTES);
    let (mut good, mut bad) = (0, 0);
    for start in (0..size_bytes).step_by(stride as usize) {
        let part = ByteRange { offset: start, length: stride.min(size_bytes - start) };
        // Blocks that were never written count as well: they must be zeroes.
        let first = ByteRange { offset: start, length: BLOCK_BYTES };
        let written = image.first_written(part).map_err(at(&path))?.filter(|block| *block != first);
        for block in [Some(first), written].into_iter().flatten() {
            if in_journal.iter().all(|r| !r.overlaps(block)) {
                let matches = image.read_verified(block).map_err(at(&path))?.is_ok();
                (good, bad) = (good + u32::from(matches), bad + u32::from(!matches));
            }
        }
    }
    // A few bad blocks are rot, which is dealt with block by block.
    if bad * 4 > good + bad { Err(DirectoryError::ForeignDevice { path: dir.to_owned(), device }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Trust;

    fn new_replica() -> NewReplica {
        let identity = Identity {
            uuid: VolumeUuid([1; 16]),
            volume: "v".parse().unwrap(),
            replica: "a".parse().unwrap(),
            size_bytes: 1 << 20,
            journal_bytes: 1 << 20,
        };
        let view = View::new(vec!["a".parse().unwrap()]).unwrap();
        NewReplica { identity, view, image: None, syncing: false }
    }

    #[test]
    fn an_image_that_lost_its_superblock_is_not_made_anew() {
        let data = tempfile::tempdir().unwrap();
        let dir = data.path().join("v");
        create(&dir, &new_replica()).unwrap();
        fs::remove_file(dir.join(SUPERBLOCK)).unwrap();
        create(&dir, &new_replica()).expect("an unfinished attempt is begun anew");
        fs::remove_file(dir.join(SUPERBLOCK)).unwrap();
        SystemFile::open(&dir.join(IMAGE), Caching::Buffered).unwrap().write_at(4096, b"precious").unwrap();
        for refused in [create(&dir, &new_replica()), refuse_data(&dir)] {
            assert!(matches!(refused, Err(DirectoryError::StrayImage { .. })), "{refused:?}");
        }
        assert_eq!(fs::read(dir.join(IMAGE)).unwrap()[4096..4104], *b"precious");
    }

    #[test]
    fn a_device_that_is_another_disk_now_is_refused() {
        let data = tempfile::tempdir().unwrap();
        let dir = data.path().join("v");
        create(&dir, &new_replica()).unwrap();
        let (device, other) = (data.path().join("device"), data.path().join("other"));
        fs::rename(dir.join(IMAGE), &device).unwrap();
        fs::write(&other, vec![7; 1 << 20]).unwrap();
        let name_device = |target: &Path| {
            let _ = fs::remove_file(dir.join(IMAGE));
            std::os::unix::fs::symlink(target, dir.join(IMAGE)).unwrap();
        };
        name_device(&device);
        let opened = open(&dir).unwrap();
        let position = Position { epoch: Epoch(1), seq: Seq(1) };
        let range = ByteRange { offset: 8192, length: 4096 };
        let record = protocol::Record::new(position, protocol::RecordKind::Write, range, vec![9; 4096].into());
        opened.image.apply(&record, Trust::Verified).unwrap();
        opened.image.write_back().unwrap();
        drop(opened);
        open(&dir).expect("it is the device that was written");
        name_device(&other);
        assert!(matches!(open(&dir), Err(DirectoryError::ForeignDevice { .. })));
        assert!(fs::read(&other).unwrap().iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_replica_in_the_making_or_in_use_is_not_made_by_another() {
        let data = tempfile::tempdir().unwrap();
        let dir = data.path().join("v");
        fs::create_dir(&dir).unwrap();
        let making = lock_directory(&dir).unwrap();
        assert!(matches!(create(&dir, &new_replica()), Err(DirectoryError::InUse { .. })));
        drop(making);
        create(&dir, &new_replica()).unwrap();
        let opened = open(&dir).unwrap();
        assert!(matches!(create(&dir, &new_replica()), Err(DirectoryError::InUse { .. })));
        drop(opened);
        create(&dir, &new_replica()).unwrap();
    }
}
