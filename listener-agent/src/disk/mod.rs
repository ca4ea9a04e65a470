//! What a replica needs of storage: five byte ranges that can be read, written, and written durably. [`file`] is the real
//! one; a simulation brings its own, which loses what was not made durable.

pub mod aligned;
pub mod file;
pub mod write_back;
mod write_out;

use std::io;
use std::sync::Arc;

use protocol::ranges::ByteRange;

/// A file or block device. All offsets and lengths are bytes.
///
/// **Invariant:** what [`RawFile::write_at`] wrote may be lost or torn by a power cut until [`RawFile::sync`] returned;
/// what [`RawFile::write_durable_at`] wrote may not, once it returned. After an error of either of the two nothing is
/// known about what is durable, and they are never tried again.
pub trait RawFile: Send + Sync {
    /// Fills `buffer` from `offset`; an error if the file ends before.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
    /// Fills `buffer` from `offset` if memory has it. If it returns false `buffer` may hold anything, and [`RawFile::read_at`]
    /// tells more. It waits for no device, but may have it begin to read, which can wait if its queue is full.
    fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> bool;
    /// Writes to where the system keeps dirty pages. A file that ends before becomes longer.
    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// As [`RawFile::write_at`], of what is to be durable soon: the device may begin to write it at once.
    fn write_soon_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_at(offset, data)
    }
    /// Sees to it that what is written to a range finds space, without changing what it holds: an error if there is none, or
    /// if nobody can say so.
    fn reserve(&self, _range: ByteRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Writes and returns when it is durable. `offset`, `data` and its address are multiples of a block.
    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()>;
    /// Makes everything written before durable.
    fn sync(&self) -> io::Result<()>;
    /// Makes the range read as zeroes; gives its space back unless `keep_allocated`.
    fn zero_range(&self, offset: u64, length: u64, keep_allocated: bool) -> io::Result<()>;
    /// Makes it at least this long, never shorter; what is new reads as zeroes. Durable after [`RawFile::sync`]. A device
    /// that is too short is [`io::ErrorKind::StorageFull`].
    fn grow(&self, length: u64) -> io::Result<()>;
    /// The first part of `range` that takes space, up to the next hole or the end of `range`; `None` if there is none. What
    /// lies before it takes none and reads as zeroes. Where that cannot be told, everything takes space.
    fn allocated_in(&self, range: ByteRange) -> io::Result<Option<ByteRange>>;
    /// The range will be read soon: a hint, which may be lost.
    fn read_ahead(&self, range: ByteRange);
    /// The size.
    fn length(&self) -> io::Result<u64>;
}

/// The five files of a replica.
#[derive(Clone)]
pub struct ReplicaFiles {
    /// Identity, promises, checkpoint.
    pub superblock: Arc<dyn RawFile>,
    /// The write-ahead log.
    pub journal: Arc<dyn RawFile>,
    /// The volume's bytes, as they are.
    pub image: Arc<dyn RawFile>,
    /// Four bytes for each block of the image.
    pub checksums: Arc<dyn RawFile>,
    /// What replicas out of the view lack. Only as long as it had to be so far.
    pub dirty: Arc<dyn RawFile>,
}
