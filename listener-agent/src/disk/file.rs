//! Files and block devices of the operating system.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use protocol::ranges::ByteRange;
use rustix::fs::{Advice, FallocateFlags, OFlags, SeekFrom, fadvise, fallocate, fdatasync, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2};

use super::RawFile;
use super::write_out::{self, WriteOut};

/// How writes reach the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caching {
    /// Through the page cache.
    Buffered,
    /// Past the page cache, if the filesystem can.
    Direct,
}

/// An open file.
#[derive(Debug)]
pub struct SystemFile {
    /// Reads, and all writes if there is no `direct`.
    buffered: File,
    /// Durable writes, past the page cache.
    direct: Option<File>,
    /// The filesystem does not tell what memory has.
    cannot_tell_cached: AtomicBool,
    /// Held while the length is compared and changed: of two who make the file longer neither may cut off the other.
    growing: Mutex<()>,
    write_out: WriteOut,
}

/// Handed to the page cache at a time, bytes. It keeps what it is handed at once in one folio if it can, and some
/// filesystems (ext4 since Linux 6.16) look at the state of every block of a folio whenever one of them is written: in one of
/// 1 MiB that takes four times as long as the write itself, in one of this size next to nothing.
const WRITE_PIECE_BYTES: usize = 16 << 10;
/// Zeroes written at a time where a filesystem cannot zero a range itself, bytes.
const ZERO_CHUNK_BYTES: usize = 1 << 20;

impl SystemFile {
    /// Opens an existing file for reading and writing.
    pub fn open(path: &Path, caching: Caching) -> io::Result<SystemFile> {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if fs::metadata(path)?.file_type().is_block_device() {
            // Held for ourselves as long as it is open: nobody can mount it or use it for another replica.
            options.custom_flags(OFlags::EXCL.bits() as i32);
        }
        let buffered = options.open(path)?;
        let direct = match caching {
            Caching::Buffered => None,
            Caching::Direct => open_direct(path)?,
        };
        Ok(SystemFile {
            buffered,
            direct,
            cannot_tell_cached: AtomicBool::new(false),
            growing: Mutex::default(),
            write_out: WriteOut::default(),
        })
    }

    /// Opens an existing file for reading only.
    pub fn open_read_only(path: &Path) -> io::Result<SystemFile> {
        Ok(SystemFile {
            buffered: File::open(path)?,
            direct: None,
            cannot_tell_cached: AtomicBool::new(false),
            growing: Mutex::default(),
            write_out: WriteOut::default(),
        })
    }

    fn write_in_pieces(&self, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let left_of_piece = WRITE_PIECE_BYTES - offset as usize % WRITE_PIECE_BYTES;
            let (piece, rest) = data.split_at(left_of_piece.min(data.len()));
            self.buffered.write_all_at(piece, offset)?;
            (offset, data) = (offset + piece.len() as u64, rest);
        }
        Ok(())
    }

    /// The file descriptor, for locks.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.buffered
    }
}

fn open_direct(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::DIRECT.bits() as i32;
    match OpenOptions::new().write(true).custom_flags(flags).open(path) {
        Ok(file) => Ok(Some(file)),
        // A filesystem without direct I/O: the page cache with a flush after each write is as durable.
        Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => Ok(None),
        Err(e) => Err(e),
    }
}

fn write_durably(file: &File, mut offset: u64, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        match pwritev2(file, &[IoSlice::new(data)], offset, ReadWriteFlags::DSYNC) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                data = &data[written..];
            }
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                file.write_all_at(data, offset)?;
                return Ok(fdatasync(file)?);
            }
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

impl RawFile for SystemFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.buffered.read_exact_at(buffer, offset)
    }

    fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> bool {
        if self.cannot_tell_cached.load(Ordering::Relaxed) {
            return false;
        }
        let length = buffer.len();
        let read = preadv2(&self.buffered, &mut [IoSliceMut::new(buffer)], offset, ReadWriteFlags::NOWAIT);
        if matches!(read, Err(Errno::OPNOTSUPP | Errno::NOSYS)) {
            self.cannot_tell_cached.store(true, Ordering::Relaxed);
        }
        read == Ok(length)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_out.note(ByteRange { offset, length: data.len() as u64 });
        self.write_in_pieces(offset, data)
    }

    fn write_soon_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_in_pieces(offset, data)?;
        write_out::begin(&self.buffered, ByteRange { offset, length: data.len() as u64 });
        Ok(())
    }

    fn reserve(&self, range: ByteRange) -> io::Result<()> {
        if self.allocated_in(range)? == Some(range) {
            return Ok(());
        }
        Ok(fallocate(&self.buffered, FallocateFlags::KEEP_SIZE, range.offset, range.length)?)
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        write_durably(self.direct.as_ref().unwrap_or(&self.buffered), offset, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.write_out.run(&self.buffered)?;
        Ok(fdatasync(&self.buffered)?)
    }

    fn zero_range(&self, offset: u64, length: u64, keep_allocated: bool) -> io::Result<()> {
        if length == 0 {
            return Ok(());
        }
        let how = if keep_allocated { FallocateFlags::ZERO_RANGE } else { FallocateFlags::PUNCH_HOLE };
        match fallocate(&self.buffered, how | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => {
                let zeroes = vec![0; ZERO_CHUNK_BYTES.min(length as usize)];
                let mut done = 0;
                while done < length {
                    let step = (length - done).min(zeroes.len() as u64);
                    self.buffered.write_all_at(&zeroes[..step as usize], offset + done)?;
                    done += step;
                }
                Ok(())
            }
            Err(e) => Err(e.into()),
        }
    }

    fn grow(&self, length: u64) -> io::Result<()> {
        let _growing = self.growing.lock().expect("no thread panicked with the lock");
        let found = self.length()?;
        if found >= length {
            return Ok(());
        }
        if !self.buffered.metadata()?.is_file() {
            let text = format!("the device has {found} bytes where {length} are needed");
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        self.buffered.set_len(length)
    }

    fn allocated_in(&self, range: ByteRange) -> io::Result<Option<ByteRange>> {
        // The place in the file is moved, which nobody goes by.
        let start = match seek(&self.buffered, SeekFrom::Data(range.offset)) {
            Ok(start) if start < range.end() => start,
            Ok(_) | Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(range)),
            Err(e) => return Err(e.into()),
        };
        let end = seek(&self.buffered, SeekFrom::Hole(start))?.clamp(start + 1, range.end());
        Ok(Some(ByteRange { offset: start, length: end - start }))
    }

    fn read_ahead(&self, range: ByteRange) {
        // Whatever comes of it, the bytes can be read later.
        let _ = fadvise(&self.buffered, range.offset, NonZeroU64::new(range.length), Advice::WillNeed);
    }

    fn length(&self) -> io::Result<u64> {
        // Seeking tells the size of block devices too, which their metadata does not.
        use std::io::Seek;
        (&self.buffered).seek(io::SeekFrom::End(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::aligned::AlignedBuffer;

    fn file_of(bytes: u64, caching: Caching) -> (tempfile::TempDir, SystemFile) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        File::create(&path).unwrap().set_len(bytes).unwrap();
        let file = SystemFile::open(&path, caching).unwrap();
        (dir, file)
    }

    #[test]
    fn durable_writes_are_read_back_whatever_the_caching() {
        for caching in [Caching::Buffered, Caching::Direct] {
            let (_dir, file) = file_of(16384, caching);
            let mut buffer = AlignedBuffer::with_capacity(4096);
            buffer.put(&[9; 4096]);
            file.write_durable_at(8192, buffer.as_slice()).unwrap();
            let mut back = [0; 4096];
            file.read_at(8192, &mut back).unwrap();
            assert_eq!(back, [9; 4096]);
            assert_eq!(file.length().unwrap(), 16384);
        }
    }

    #[test]
    fn what_is_written_in_pieces_is_all_there_and_nothing_beside_it() {
        let piece = WRITE_PIECE_BYTES as u64;
        let (_dir, file) = file_of(4 * piece, Caching::Buffered);
        let (start, end) = (piece / 2 + 1, 3 * piece + 5);
        file.write_at(start, &vec![7; (end - start) as usize]).unwrap();
        let mut back = vec![9; 4 * piece as usize];
        file.read_at(0, &mut back).unwrap();
        let expected = (0..4 * piece).map(|at| if (start..end).contains(&at) { 7 } else { 0 });
        assert!(back.into_iter().eq(expected));
    }

    #[test]
    fn what_is_reserved_takes_space_and_holds_what_it_did() {
        let (_dir, file) = file_of(1 << 20, Caching::Buffered);
        file.write_soon_at(8192, &[7; 4096]).unwrap();
        let range = ByteRange { offset: 4096, length: 128 << 10 };
        // Some filesystems cannot reserve; they say so and leave all as it is.
        if file.reserve(range).is_ok() {
            use std::os::unix::fs::MetadataExt;
            assert!(file.file().metadata().unwrap().blocks() * 512 >= range.length);
        }
        assert_eq!(file.length().unwrap(), 1 << 20);
        let mut back = vec![9; range.length as usize];
        file.read_at(range.offset, &mut back).unwrap();
        assert!(back[..4096].iter().all(|b| *b == 0) && back[4096..8192].iter().all(|b| *b == 7));
        assert!(back[8192..].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_file_only_grows_and_a_device_does_not() {
        let (_dir, file) = file_of(8192, Caching::Buffered);
        file.write_at(4096, &[1; 4096]).unwrap();
        file.grow(4096).unwrap();
        assert_eq!(file.length().unwrap(), 8192);
        file.grow(12288).unwrap();
        let mut back = [7; 8192];
        file.read_at(4096, &mut back).unwrap();
        assert_eq!((file.length().unwrap(), back[4095], back[4096]), (12288, 1, 0));
        let device = SystemFile::open(Path::new("/dev/null"), Caching::Buffered).unwrap();
        assert_eq!(device.grow(4096).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn what_the_cache_holds_is_read_without_waiting() {
        let (_dir, file) = file_of(8192, Caching::Buffered);
        file.write_at(4096, &[7; 4096]).unwrap();
        let mut back = [0; 4000];
        // Some filesystems cannot tell; those that can have it.
        if file.read_cached_at(4096, &mut back) {
            assert_eq!(back, [7; 4000]);
        }
        assert!(!file.read_cached_at(4196, &mut back), "behind the end of the file");
    }

    #[test]
    fn what_takes_space_is_found_up_to_the_end_of_the_range() {
        let (_dir, file) = file_of(1 << 20, Caching::Buffered);
        file.write_at(65536, &[1; 65536]).unwrap();
        let all = ByteRange { offset: 0, length: 1 << 20 };
        assert_eq!(file.allocated_in(all).unwrap(), Some(ByteRange { offset: 65536, length: 65536 }));
        let part = ByteRange { offset: 70000, length: 1000 };
        assert_eq!(file.allocated_in(part).unwrap(), Some(part));
        assert_eq!(file.allocated_in(ByteRange { offset: 0, length: 65536 }).unwrap(), None);
        assert_eq!(file.allocated_in(ByteRange { offset: 131_072, length: 65536 }).unwrap(), None);
        assert_eq!(file.allocated_in(ByteRange { offset: 2 << 20, length: 1 }).unwrap(), None, "behind its end");
        file.read_ahead(all);
    }

    #[test]
    fn a_zeroed_range_reads_as_zeroes() {
        for keep in [false, true] {
            let (_dir, file) = file_of(16384, Caching::Buffered);
            file.write_at(0, &[1; 16384]).unwrap();
            file.zero_range(4096, 8192, keep).unwrap();
            let mut back = [7; 16384];
            file.read_at(0, &mut back).unwrap();
            assert!(back[4096..12288].iter().all(|b| *b == 0));
            assert_eq!((back[4095], back[12288]), (1, 1));
        }
    }
}
