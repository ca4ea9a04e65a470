//! An image on a disk with sectors that cannot be read until they are written.

use std::collections::BTreeSet;
use std::sync::Mutex;

use protocol::{Epoch, Position, Seq};

use super::*;
use crate::disk::file::{Caching, SystemFile};

const SIZE: u64 = 64 << 10;

/// A file of whose blocks some cannot be read, nor written in part.
struct BadSectors {
    file: SystemFile,
    bad: Mutex<BTreeSet<u64>>,
}

impl BadSectors {
    fn touched(&self, offset: u64, length: usize) -> bool {
        let range = ByteRange { offset, length: length as u64 };
        let block = |at: &u64| ByteRange { offset: *at, length: BLOCK_BYTES };
        self.bad.lock().unwrap().iter().any(|at| block(at).overlaps(range))
    }
}

impl RawFile for BadSectors {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if self.touched(offset, buffer.len()) {
            return Err(io::Error::other("bad sector"));
        }
        self.file.read_at(offset, buffer)
    }

    fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.read_at(offset, buffer).is_ok()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset + data.len() as u64;
        self.bad.lock().unwrap().retain(|at| *at < offset || *at + BLOCK_BYTES > end);
        if self.touched(offset, data.len()) {
            return Err(io::Error::other("bad sector"));
        }
        self.file.write_at(offset, data)
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_durable_at(offset, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn grow(&self, length: u64) -> io::Result<()> {
        self.file.grow(length)
    }

    fn zero_range(&self, offset: u64, length: u64, keep_allocated: bool) -> io::Result<()> {
        self.file.zero_range(offset, length, keep_allocated)
    }

    fn allocated_in(&self, range: ByteRange) -> io::Result<Option<ByteRange>> {
        self.file.allocated_in(range)
    }

    fn read_ahead(&self, range: ByteRange) {
        self.file.read_ahead(range);
    }

    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }
}

struct Fixture {
    dir: tempfile::TempDir,
    file: Arc<BadSectors>,
    image: Image,
}

fn file(dir: &tempfile::TempDir, name: &str) -> SystemFile {
    SystemFile::open(&dir.path().join(name), Caching::Buffered).unwrap()
}

/// An image of ones, of which some blocks cannot be read.
fn with_bad(bad: &[u64]) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [("i", SIZE), ("c", checksum_file_bytes(SIZE))] {
        std::fs::File::create(dir.path().join(name)).unwrap().set_len(bytes).unwrap();
    }
    let image = Arc::new(BadSectors { file: file(&dir, "i"), bad: Mutex::default() });
    let fixture = Fixture { image: Image::of(image.clone(), Arc::new(file(&dir, "c"))), file: image, dir };
    fixture.image.apply(&write(0, &[1; SIZE as usize]), Trust::Verified).unwrap();
    fixture.image.write_back().unwrap();
    fixture.file.bad.lock().unwrap().extend(bad);
    fixture
}

/// The process dies, and another comes.
fn die(f: Fixture) -> Fixture {
    Fixture { image: Image::of(f.file.clone(), Arc::new(file(&f.dir, "c"))), ..f }
}

fn write(offset: u64, data: &[u8]) -> Record {
    let range = ByteRange { offset, length: data.len() as u64 };
    Record::new(Position { epoch: Epoch(1), seq: Seq(1) }, RecordKind::Write, range, data.to_vec().into())
}

fn read(f: &Fixture, offset: u64, length: u64) -> ReadOutcome {
    f.image.read(ReadKind::Data, ByteRange { offset, length })
}

#[test]
fn a_block_that_cannot_be_read_is_named_and_its_neighbours_are_read() {
    let f = with_bad(&[8192, 20_480]);
    assert_eq!(read(&f, 0, SIZE), ReadOutcome::Unreadable { offset: 8192 });
    assert_eq!(read(&f, 12_300, 20_000), ReadOutcome::Unreadable { offset: 20_480 });
    assert!(matches!(read(&f, 0, 8192), ReadOutcome::Data { .. }));
    f.image.apply(&write(8192, &[2; 4096]), Trust::Verified).unwrap();
    assert!(matches!(read(&f, 0, 20_480), ReadOutcome::Data { .. }), "written whole it is good");
}

#[test]
fn a_write_of_part_of_an_unreadable_block_leaves_it_bad_also_after_a_replay() {
    for trust in [Trust::Verified, Trust::InDoubt] {
        let f = with_bad(&[8192]);
        let partial = write(8000, &[2; 1000]);
        f.image.apply(&partial, trust).unwrap();
        assert_eq!(read(&f, 8192, 4096), ReadOutcome::Unreadable { offset: 8192 });
        assert!(matches!(read(&f, 0, 8192), ReadOutcome::Data { .. }), "its neighbour took the write");

        // The disk can read it again, and has what was there before.
        let f = die(f);
        f.file.bad.lock().unwrap().clear();
        for record in [partial, write(12_000, &[3; 1000])] {
            f.image.apply(&record, Trust::InDoubt).unwrap();
            assert_eq!(read(&f, 8192, 4096), ReadOutcome::ChecksumMismatch { offset: 8192 });
        }
        f.image.apply(&write(8192, &[4; 4096]), Trust::InDoubt).unwrap();
        assert!(matches!(read(&f, 0, SIZE), ReadOutcome::Data { .. }));
    }
}

#[test]
fn a_block_that_is_known_to_be_bad_is_so_whatever_a_crash_leaves_of_it() {
    let f = with_bad(&[]);
    // It rots, and is found to be bad by a write of a part.
    f.file.write_at(8192, &[9; 7]).unwrap();
    f.image.apply(&write(8192, &[2; 1000]), Trust::Verified).unwrap();
    // A crash leaves any state of it; records before and after are replayed.
    for content in [[1; BLOCK], [2; BLOCK], [0; BLOCK]] {
        f.file.write_at(8192, &content).unwrap();
        let f = Fixture {
            image: Image::of(f.file.clone(), Arc::new(file(&f.dir, "c"))),
            file: f.file.clone(),
            dir: tempfile::tempdir().unwrap(),
        };
        for record in [write(8192, &[2; 1000]), write(8200, &[5; 100])] {
            f.image.apply(&record, Trust::InDoubt).unwrap();
            assert_eq!(read(&f, 8192, 4096), ReadOutcome::ChecksumMismatch { offset: 8192 });
        }
    }
}
