//! Large writes to a file go past the page cache; small ones, and all reads, go through it.
//!
//! Through the cache a large write is copied by the processor, and lies there until a sync wants all of it at once, in the
//! way of a journal on the same device. And it leaves large folios behind, in which some filesystems (ext4 since Linux 6.16)
//! look at the state of every block for each later write of one: with 1 MiB of them that takes longer than the write itself.
//!
//! Makes nothing durable: where the bytes lie may be known to memory alone, and a device may have a cache of its own. A sync
//! must follow.
//!
//! **Invariant:** only one thread at a time changes the file. The system then writes out what the cache holds of a range
//! before it is written past it, and drops it afterwards, so that reads through the cache see what was written.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;

use protocol::BLOCK_BYTES;
use protocol::ranges::ByteRange;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::aligned::AlignedBuffer;

/// From so many bytes on a write is large. Below, the cache joins what is written to neighbours, and a device that is
/// waited for each time would take longer.
const LARGE_BYTES_MIN: u64 = 128 << 10;
/// Handed to the device at a time, bytes.
const PIECE_BYTES: usize = 1 << 20;

/// The way past the page cache.
#[derive(Debug)]
pub(super) struct LargeWrites {
    file: File,
    /// What is written has to lie at a multiple of a block.
    buffer: Mutex<AlignedBuffer>,
}

/// Opens a file for writing past the page cache; `None` where the filesystem cannot.
pub(super) fn open_direct(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::DIRECT.bits() as i32;
    match OpenOptions::new().write(true).custom_flags(flags).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if is_not_possible(&e) => Ok(None),
        Err(e) => Err(e),
    }
}

fn is_not_possible(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::INVAL.raw_os_error())
}

/// The blocks of a range that are written whole, if there are so many that it counts as large.
fn large_part(range: ByteRange) -> Option<ByteRange> {
    let offset = range.offset.next_multiple_of(BLOCK_BYTES);
    let end = range.end() / BLOCK_BYTES * BLOCK_BYTES;
    let length = end.checked_sub(offset)?;
    (length >= LARGE_BYTES_MIN).then_some(ByteRange { offset, length })
}

impl LargeWrites {
    pub(super) fn open(path: &Path) -> io::Result<Option<LargeWrites>> {
        let file = open_direct(path)?;
        Ok(file.map(|file| LargeWrites { file, buffer: Mutex::new(AlignedBuffer::with_capacity(0)) }))
    }

    /// Writes what is large of it; returns the range that was written. After an error any part of the range may be.
    pub(super) fn write(&self, offset: u64, data: &[u8]) -> io::Result<Option<ByteRange>> {
        let Some(part) = large_part(ByteRange { offset, length: data.len() as u64 }) else { return Ok(None) };
        let bytes = &data[(part.offset - offset) as usize..][..part.length as usize];
        let mut buffer = self.buffer.lock().expect("no thread panicked with the lock");
        for (number, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            buffer.reset(PIECE_BYTES);
            buffer.put(piece);
            match self.file.write_all_at(buffer.as_slice(), part.offset + (number * PIECE_BYTES) as u64) {
                // A device with blocks larger than ours.
                Err(e) if is_not_possible(&e) => return Ok(None),
                outcome => outcome?,
            }
        }
        Ok(Some(part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_of_large_writes_go_past_the_cache() {
        let part = |offset, length| large_part(ByteRange { offset, length }).map(|part| (part.offset, part.length));
        assert_eq!(part(4096, LARGE_BYTES_MIN), Some((4096, LARGE_BYTES_MIN)));
        assert_eq!(part(4096, LARGE_BYTES_MIN - 1), None);
        assert_eq!(part(4095, LARGE_BYTES_MIN + 2), Some((4096, LARGE_BYTES_MIN)));
        assert_eq!(part(4097, LARGE_BYTES_MIN + 4096), None, "of its blocks too few are whole");
        assert_eq!((part(5000, 10), part(0, 0)), (None, None));
    }

    #[test]
    fn what_is_written_past_the_cache_is_read_through_it_whatever_it_held() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, vec![1; 4 << 20]).unwrap();
        let cached = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let Some(large) = LargeWrites::open(&path).unwrap() else {
            eprintln!("skipped: no direct I/O in {}", dir.path().display());
            return;
        };
        let mut model = std::fs::read(&path).unwrap();
        for (offset, length, value) in [(0, 2 << 20, 2), (1 << 20, 3 << 20, 3), (700_001, 1_500_000, 4)] {
            cached.write_all_at(&[9; 100], offset + 500_000).unwrap();
            model[offset as usize + 500_000..][..100].fill(9);
            let written = large.write(offset, &vec![value; length]).unwrap().expect("large enough");
            model[written.offset as usize..written.end() as usize].fill(value);
            assert!(written.offset - offset < BLOCK_BYTES && offset + length as u64 - written.end() < BLOCK_BYTES);
            let mut back = vec![0; model.len()];
            cached.read_exact_at(&mut back, 0).unwrap();
            assert!(back == model, "{offset}+{length}");
        }
    }
}
