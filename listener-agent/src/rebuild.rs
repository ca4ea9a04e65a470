//! Making the checksums of a replica anew from its image, offline, where they are lost. What the image holds is taken on
//! trust: a block that rotted is called good from then on. Never touches the image or any other file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use protocol::BLOCK_BYTES;
use protocol::checksum::stored_block_checksum;
use protocol::ranges::ByteRange;

use crate::directory::{self, CHECKSUMS, DirectoryError, IMAGE, at};
use crate::disk::RawFile;
use crate::disk::file::{Caching, SystemFile};
use crate::image::{checksum_file_bytes, checksums_of};

/// Why checksums are not made anew.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The directory cannot be used.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// They are there: what does not match them is bad, and would be called good.
    #[error("{path} is there and as long as it must be", path = path.display())]
    NotLost {
        /// The file.
        path: PathBuf,
    },
}

impl RebuildError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            RebuildError::Directory(e) => e.remedy(),
            RebuildError::NotLost { .. } => Some(
                "`listener-agent verify DIR` says which blocks do not match; to call them all good nevertheless, give --force"
                    .to_owned(),
            ),
        }
    }
}

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RebuildReport {
    /// Blocks of the image.
    pub blocks: u64,
    /// First bytes of those that the disk reports an error for. They have a checksum that they hardly match.
    pub unreadable: Vec<u64>,
    /// Where the checksums are that were there before.
    pub kept: Option<PathBuf>,
}

const CHUNK_BYTES: u64 = 1 << 20;
const BLOCK: usize = BLOCK_BYTES as usize;
/// Kept for a block of which nothing is known.
const UNKNOWN: u32 = !0;

/// Makes the checksum file of the replica in `dir` anew, if it is missing or too short, or anyway with `force`. The one that
/// was there is kept under another name. What a journal holds is applied on top at the next start, as ever. `progress` is
/// told bytes done and bytes in all.
pub fn rebuild_checksums(
    dir: &Path,
    force: bool,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<RebuildReport, RebuildError> {
    let (superblock, _lock) = directory::read_superblock(dir)?;
    let size = superblock.image_bytes;
    let path = dir.join(CHECKSUMS);
    let kept = match directory::open_file(dir, CHECKSUMS, Caching::Buffered, checksum_file_bytes(size)) {
        Ok(_) if !force => return Err(RebuildError::NotLost { path }),
        Ok(_) | Err(DirectoryError::Size { .. }) => Some(dir.join("checksums.old")),
        Err(DirectoryError::Lost { .. }) => None,
        Err(other) => return Err(other.into()),
    };
    let image = directory::open_file(dir, IMAGE, Caching::Buffered, size)?;
    let unfinished = dir.join("checksums.new");
    directory::create_sized(&unfinished, checksum_file_bytes(size))?;
    let file = SystemFile::open(&unfinished, Caching::Buffered).map_err(at(&unfinished))?;
    let unreadable = write_checksums(image.as_ref(), &file, size, progress).map_err(at(&unfinished))?;
    file.sync().map_err(at(&unfinished))?;
    if let Some(kept) = &kept {
        fs::rename(&path, kept).map_err(at(&path))?;
    }
    fs::rename(&unfinished, &path).map_err(at(&path))?;
    directory::sync_directory(dir)?;
    Ok(RebuildReport { blocks: size / BLOCK_BYTES, unreadable, kept })
}

/// Returns the blocks that cannot be read.
fn write_checksums(
    image: &dyn RawFile,
    file: &dyn RawFile,
    size: u64,
    progress: &mut dyn FnMut(u64, u64),
) -> io::Result<Vec<u64>> {
    let mut unreadable = Vec::new();
    let mut offset = 0;
    // Where the image has holes the new file keeps its own: those of zeroes are zero.
    while let Some(data) = image.allocated_in(ByteRange { offset, length: size - offset })? {
        let start = data.offset / BLOCK_BYTES * BLOCK_BYTES;
        let chunk = ByteRange { offset: start, length: CHUNK_BYTES.min(size - start) };
        let stored = checksums(image, chunk, &mut unreadable);
        if stored.iter().any(|checksum| *checksum != 0) {
            let bytes: Vec<u8> = stored.into_iter().flat_map(u32::to_le_bytes).collect();
            file.write_at(checksums_of(chunk).offset, &bytes)?;
        }
        offset = chunk.end();
        progress(offset, size);
    }
    progress(size, size);
    Ok(unreadable)
}

fn checksums(image: &dyn RawFile, chunk: ByteRange, unreadable: &mut Vec<u64>) -> Vec<u32> {
    let mut bytes = vec![0; chunk.length as usize];
    if image.read_at(chunk.offset, &mut bytes).is_ok() {
        return bytes.chunks_exact(BLOCK).map(stored_block_checksum).collect();
    }
    let mut block = [0; BLOCK];
    let mut of_block = |offset| match image.read_at(offset, &mut block) {
        Ok(()) => stored_block_checksum(&block),
        Err(_) => {
            unreadable.push(offset);
            UNKNOWN
        }
    };
    (chunk.offset..chunk.end()).step_by(BLOCK).map(&mut of_block).collect()
}
