//! A simulated disk: five files, each with what is durable and what only the page cache holds. It loses, keeps or tears
//! what was not made durable sector by sector, and fails where it is told to.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use listener_agent::directory::{NewReplica, first_superblock};
use listener_agent::disk::{RawFile, ReplicaFiles};
use listener_agent::image::checksum_file_bytes;
use listener_agent::{journal, superblock};

use protocol::ranges::ByteRange;

use crate::rng::Rng;

/// The unit that a disk writes as a whole, bytes.
pub const SECTOR: usize = 512;

/// What goes wrong, for all files of a disk.
#[derive(Debug)]
struct Faults {
    rng: Rng,
    /// Image, checksums and dirty bitmaps have no room.
    full: bool,
    /// The next durable write, or sync, fails.
    fail_next: bool,
    /// The next sync of the image or its checksums fails.
    fail_next_image_sync: bool,
    /// Durable writes are cut off: the machine dies.
    torn: bool,
    /// The process dies after so many more writes; the last of them is cut short if it is to memory.
    writes_left: Option<u64>,
    /// A bit flips in the next bytes that are written in place.
    flip_next_in_place: bool,
}

#[derive(Debug)]
struct Bytes {
    durable: Vec<u8>,
    cached: Vec<u8>,
    dirty: BTreeSet<usize>,
    /// What is behind may be cut off by a power cut.
    durable_length: usize,
    /// Blocks that cannot be read, nor written in part.
    unreadable: BTreeSet<usize>,
    /// Blocks that were written whole since and are unreadable again if that is lost.
    rewritten: BTreeSet<usize>,
}

/// Blocks of the disk that cannot be read go by so many bytes.
const BLOCK: usize = 4096;

/// A file of the disk.
#[derive(Debug)]
pub struct SimFile {
    bytes: Mutex<Bytes>,
    faults: Arc<Mutex<Faults>>,
    can_be_full: bool,
}

fn broken() -> io::Error {
    io::Error::other("injected I/O error")
}

impl SimFile {
    fn new(length: usize, faults: &Arc<Mutex<Faults>>, can_be_full: bool) -> Arc<SimFile> {
        let (durable, cached) = (vec![0; length], vec![0; length]);
        let bytes = Bytes::new(durable, cached);
        Arc::new(SimFile { bytes: Mutex::new(bytes), faults: faults.clone(), can_be_full })
    }

    fn lock(&self) -> (MutexGuard<'_, Faults>, MutexGuard<'_, Bytes>) {
        (self.faults.lock().unwrap(), self.bytes.lock().unwrap())
    }

    /// The bytes as a reader would see them.
    pub fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().cached.clone()
    }

    /// Changes a byte behind everybody's back.
    pub fn rot(&self, offset: usize) {
        let mut bytes = self.bytes.lock().unwrap();
        bytes.durable[offset] ^= 0x40;
        bytes.cached[offset] ^= 0x40;
    }

    /// Makes a block unreadable until it is written whole.
    pub fn spoil(&self, offset: usize) {
        self.bytes.lock().unwrap().unreadable.insert(offset / BLOCK);
    }

    /// Whether a block can be read.
    pub fn is_readable(&self, offset: usize) -> bool {
        !self.bytes.lock().unwrap().unreadable.contains(&(offset / BLOCK))
    }

    /// Writes to memory; what dies meanwhile leaves some of the `unit`s written.
    fn write_cut_at(&self, offset: u64, data: &[u8], unit: usize) -> io::Result<()> {
        let (mut faults, mut bytes) = self.lock();
        let Faults { rng, full, writes_left, .. } = &mut *faults;
        let mut outcome = Ok(());
        let mut length = data.len();
        if *full && self.can_be_full {
            outcome = Err(io::ErrorKind::StorageFull.into());
            length = rng.below(data.len() as u64 + 1) as usize;
        }
        if let Some(left) = writes_left {
            match *left {
                0 => return Err(broken()),
                1 => {
                    length = rng.below((data.len() / unit) as u64 + 1) as usize * unit;
                    outcome = Err(broken());
                }
                _ => {}
            }
            *left -= 1;
        }
        bytes.rewrite(offset as usize, length);
        if bytes.is_unreadable(offset as usize, length) {
            return outcome.and(Err(broken()));
        }
        bytes.put(offset as usize, &data[..length], rng);
        outcome
    }

    fn power_cut(&self, keep_percent: u64) {
        let (mut faults, mut bytes) = self.lock();
        for sector in std::mem::take(&mut bytes.dirty) {
            if faults.rng.percent(keep_percent) {
                bytes.settle(sector);
            } else {
                bytes.lose(sector);
            }
        }
        if faults.rng.percent(50) {
            let length = bytes.durable_length;
            bytes.durable.truncate(length);
            bytes.cached.truncate(length);
        }
        bytes.durable_length = bytes.cached.len();
    }
}

impl Bytes {
    fn new(durable: Vec<u8>, cached: Vec<u8>) -> Bytes {
        let durable_length = durable.len();
        let (dirty, unreadable, rewritten) = Default::default();
        Bytes { durable, cached, dirty, durable_length, unreadable, rewritten }
    }

    fn is_unreadable(&self, offset: usize, length: usize) -> bool {
        self.unreadable.range(offset / BLOCK..(offset + length).div_ceil(BLOCK)).next().is_some()
    }

    fn rewrite(&mut self, offset: usize, length: usize) {
        for block in offset.div_ceil(BLOCK)..(offset + length) / BLOCK {
            if self.unreadable.remove(&block) {
                self.rewritten.insert(block);
            }
        }
    }

    fn grow(&mut self, length: usize) {
        let length = length.next_multiple_of(SECTOR).max(self.cached.len());
        self.durable.resize(length, 0);
        self.cached.resize(length, 0);
    }

    fn settle(&mut self, sector: usize) {
        let at = sector * SECTOR..(sector + 1) * SECTOR;
        self.durable[at.clone()].copy_from_slice(&self.cached[at]);
    }

    fn lose(&mut self, sector: usize) {
        let at = sector * SECTOR..(sector + 1) * SECTOR;
        self.cached[at.clone()].copy_from_slice(&self.durable[at]);
        let block = sector * SECTOR / BLOCK;
        if self.rewritten.remove(&block) {
            self.unreadable.insert(block);
        }
    }

    fn put(&mut self, offset: usize, data: &[u8], rng: &mut Rng) {
        if data.is_empty() {
            return;
        }
        self.grow(offset + data.len());
        for sector in offset / SECTOR..=(offset + data.len() - 1) / SECTOR {
            // The system may have written the earlier version back at any time.
            if !self.dirty.insert(sector) && rng.percent(30) {
                self.settle(sector);
            }
        }
        self.cached[offset..offset + data.len()].copy_from_slice(data);
    }
}

impl RawFile for SimFile {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        let at = offset as usize;
        if bytes.is_unreadable(at, buffer.len()) {
            return Err(broken());
        }
        let found = bytes.cached.get(at..at + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(found);
        Ok(())
    }

    fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.read_at(offset, buffer).is_ok()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.write_cut_at(offset, data, 1)
    }

    fn write_soon_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut data = data.to_vec();
        let middle = data.len() / 2;
        data[middle] ^= u8::from(std::mem::take(&mut self.faults.lock().unwrap().flip_next_in_place));
        // The system takes it page by page; a power cut divides sectors from each other.
        let mut pages = data.chunks(BLOCK).zip(0..);
        pages.try_for_each(|(page, index)| self.write_cut_at(offset + index * BLOCK as u64, page, SECTOR))
    }

    fn reserve(&self, _range: ByteRange) -> io::Result<()> {
        let faults = self.faults.lock().unwrap();
        if faults.full && self.can_be_full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(offset.is_multiple_of(4096) && data.len().is_multiple_of(4096), "direct I/O goes by blocks");
        assert!(data.as_ptr().addr().is_multiple_of(4096), "direct I/O wants aligned memory");
        let (mut faults, mut bytes) = self.lock();
        if let Some(left) = &mut faults.writes_left {
            *left = left.checked_sub(1).ok_or_else(broken)?;
        }
        let fails = std::mem::take(&mut faults.fail_next) || faults.torn;
        let percent = if fails { faults.rng.pick(&[0, 20, 50, 80, 100]) } else { 100 };
        for (index, sector) in data.chunks_exact(SECTOR).enumerate() {
            if faults.rng.percent(percent) {
                let at = offset as usize + index * SECTOR;
                bytes.durable[at..at + SECTOR].copy_from_slice(sector);
                bytes.cached[at..at + SECTOR].copy_from_slice(sector);
            }
        }
        if fails { Err(broken()) } else { Ok(()) }
    }

    fn sync(&self) -> io::Result<()> {
        let (mut faults, mut bytes) = self.lock();
        if let Some(left) = &mut faults.writes_left {
            *left = left.checked_sub(1).filter(|left| *left > 0).ok_or_else(broken)?;
        }
        let image_fails = self.can_be_full && std::mem::take(&mut faults.fail_next_image_sync);
        let fails = std::mem::take(&mut faults.fail_next) || faults.torn || image_fails;
        for sector in std::mem::take(&mut bytes.dirty) {
            // After a failed sync a page may be durable, thrown away, or be tried again.
            match if fails { faults.rng.below(3) } else { 0 } {
                0 => bytes.settle(sector),
                1 => bytes.lose(sector),
                _ => {
                    bytes.dirty.insert(sector);
                }
            }
        }
        if fails {
            return Err(broken());
        }
        bytes.durable_length = bytes.cached.len();
        bytes.rewritten.clear();
        Ok(())
    }

    fn grow(&self, length: u64) -> io::Result<()> {
        self.bytes.lock().unwrap().grow(length as usize);
        Ok(())
    }

    fn zero_range(&self, offset: u64, length: u64, _keep_allocated: bool) -> io::Result<()> {
        self.write_at(offset, &vec![0; length as usize])
    }

    /// Of what holds zeroes the filesystem keeps some as holes, and the rest as it is.
    fn allocated_in(&self, range: ByteRange) -> io::Result<Option<ByteRange>> {
        let bytes = self.bytes.lock().unwrap();
        let is_hole = |sector: &u64| {
            let at = *sector as usize * SECTOR;
            sector / 16 % 3 != 2 && bytes.cached[at..at + SECTOR].iter().all(|byte| *byte == 0)
        };
        let sector = SECTOR as u64;
        let mut sectors = range.offset / sector..range.end().div_ceil(sector);
        let Some(first) = sectors.find(|sector| !is_hole(sector)) else { return Ok(None) };
        let start = (first * sector).max(range.offset);
        let end = sectors.find(is_hole).map_or(range.end(), |hole| hole * sector);
        Ok(Some(ByteRange { offset: start, length: end - start }))
    }

    fn read_ahead(&self, _range: ByteRange) {}

    fn length(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().cached.len() as u64)
    }
}

/// The files of a replica.
#[derive(Debug)]
pub struct Disk {
    faults: Arc<Mutex<Faults>>,
    pub superblock: Arc<SimFile>,
    pub journal: Arc<SimFile>,
    pub image: Arc<SimFile>,
    pub checksums: Arc<SimFile>,
    pub dirty: Arc<SimFile>,
}

impl Disk {
    /// A disk with a new replica on it, in the form that `directory::create` gives it.
    pub fn format(new: &NewReplica, rng: Rng) -> Disk {
        let faults = Faults {
            rng,
            full: false,
            fail_next: false,
            fail_next_image_sync: false,
            torn: false,
            writes_left: None,
            flip_next_in_place: false,
        };
        let faults = Arc::new(Mutex::new(faults));
        let identity = &new.identity;
        let checksum_bytes = checksum_file_bytes(identity.size_bytes).next_multiple_of(SECTOR as u64);
        let disk = Disk {
            superblock: SimFile::new(superblock::FILE_BYTES as usize, &faults, false),
            journal: SimFile::new(identity.journal_bytes as usize, &faults, false),
            image: SimFile::new(identity.size_bytes as usize, &faults, true),
            checksums: SimFile::new(checksum_bytes as usize, &faults, true),
            dirty: SimFile::new(0, &faults, true),
            faults,
        };
        let header = journal::encode_header(identity.uuid);
        disk.journal.write_durable_at(0, header.as_slice()).unwrap();
        first_superblock(new).write(disk.superblock.as_ref()).unwrap();
        disk
    }

    pub fn files(&self) -> ReplicaFiles {
        ReplicaFiles {
            superblock: self.superblock.clone(),
            journal: self.journal.clone(),
            image: self.image.clone(),
            checksums: self.checksums.clone(),
            dirty: self.dirty.clone(),
        }
    }

    fn all_files(&self) -> [&Arc<SimFile>; 5] {
        [&self.superblock, &self.journal, &self.image, &self.checksums, &self.dirty]
    }

    /// The bytes of all files as a reader would see them.
    pub fn snapshot(&self) -> Vec<Vec<u8>> {
        self.all_files().iter().map(|file| file.content()).collect()
    }

    /// Puts back an older state, durably.
    pub fn restore(&self, snapshot: &[Vec<u8>]) {
        for (file, content) in self.all_files().into_iter().zip(snapshot) {
            let mut bytes = file.bytes.lock().unwrap();
            let (durable, cached) = (content.clone(), content.clone());
            *bytes = Bytes::new(durable, cached);
        }
    }

    pub fn set_full(&self, full: bool) {
        self.faults.lock().unwrap().full = full;
    }

    pub fn fail_next(&self) {
        self.faults.lock().unwrap().fail_next = true;
    }

    pub fn fail_next_image_sync(&self) {
        self.faults.lock().unwrap().fail_next_image_sync = true;
    }

    pub fn flip_next_in_place(&self) {
        self.faults.lock().unwrap().flip_next_in_place = true;
    }

    /// Does `work` on a machine that dies in its midst.
    pub fn torn(&self, work: impl FnOnce()) {
        self.faults.lock().unwrap().torn = true;
        work();
        self.faults.lock().unwrap().torn = false;
    }

    /// Does `work` in a process that dies after `writes` writes.
    pub fn cut_short<R>(&self, writes: u64, work: impl FnOnce() -> R) -> R {
        self.faults.lock().unwrap().writes_left = Some(writes);
        let outcome = work();
        self.faults.lock().unwrap().writes_left = None;
        outcome
    }

    /// The machine dies: what was not made durable is lost or not.
    pub fn power_cut(&self) {
        let keep = self.faults.lock().unwrap().rng.pick(&[0, 30, 50, 90]);
        for file in self.all_files() {
            file.power_cut(keep);
        }
    }

    /// Takes back faults that are still to come.
    pub fn heal(&self) {
        let mut faults = self.faults.lock().unwrap();
        (faults.full, faults.fail_next) = (false, false);
    }
}
