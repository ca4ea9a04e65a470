//! Bits that flip in memory between the image, its checksums and those who read and write: none passes for good.

use std::sync::Mutex;

use protocol::checksum::crc32;
use protocol::{Seq, ToEngine};

use super::tests::{Fixture, die, fixture, read, write};
use super::*;
use crate::disk::aligned::AlignedBuffer;
use crate::disk::file::{Caching, SystemFile};
use crate::journal::group::{Salt, encode_into};

/// A file of which one bit flips in memory on its way: in bytes that are written, or in those that were read.
struct Flipping {
    file: Arc<dyn RawFile>,
    /// Byte of the file, and whether it is to flip when it is next written (or else read).
    next: Mutex<Option<(u64, bool)>>,
}

impl Flipping {
    fn flip(&self, offset: u64, bytes: &mut [u8], is_write: bool) {
        let mut next = self.next.lock().unwrap();
        if let Some((at, on_write)) = *next
            && on_write == is_write
            && (offset..offset + bytes.len() as u64).contains(&at)
        {
            bytes[(at - offset) as usize] ^= 0x10;
            *next = None;
        }
    }
}

impl RawFile for Flipping {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, buffer)?;
        self.flip(offset, buffer, false);
        Ok(())
    }

    fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.read_at(offset, buffer).is_ok()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut data = data.to_vec();
        self.flip(offset, &mut data, true);
        self.file.write_at(offset, &data)
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_durable_at(offset, data)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn zero_range(&self, offset: u64, length: u64, keep_allocated: bool) -> io::Result<()> {
        self.file.zero_range(offset, length, keep_allocated)
    }

    fn grow(&self, length: u64) -> io::Result<()> {
        self.file.grow(length)
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

/// Image and checksums that flip bits when they are told to, around four blocks of ones.
fn flipping() -> (Fixture, Arc<Flipping>, Arc<Flipping>) {
    let f = fixture();
    let open = |name| -> Arc<Flipping> {
        let file = Arc::new(SystemFile::open(&f.dir.path().join(name), Caching::Buffered).unwrap());
        Arc::new(Flipping { file, next: Mutex::default() })
    };
    let (image, checksums) = (open("i"), open("c"));
    let f = Fixture { image: Image::of(image.clone(), checksums.clone()), dir: f.dir };
    f.image.apply(&write(0, &[1; 16_384]), Trust::Verified).unwrap();
    (f, image, checksums)
}

const FOUR: ByteRange = ByteRange { offset: 0, length: 16_384 };

/// Writes of whole blocks, of a part of one, over an edge, and with both edges.
const SHAPES: [(u64, usize); 5] = [(4096, 4096), (0, 16_384), (4608, 512), (4000, 200), (100, 12_000)];

#[test]
fn a_payload_that_changed_in_memory_is_not_applied() {
    for (offset, length) in SHAPES {
        for at in [0, length / 2, length - 1] {
            let (f, ..) = flipping();
            let mut record = write(offset, &vec![2; length]);
            let mut changed = record.payload.to_vec();
            changed[at] ^= 0x04;
            record.payload = changed.into();
            for trust in [Trust::Verified, Trust::InDoubt] {
                let refused = f.image.apply(&record, trust).unwrap_err();
                assert_eq!(refused.to_string(), "payload of record 1 does not match its checksum");
            }
            assert_eq!(read(&f, 0, 16_384), [1; 16_384][..], "nothing of it is in the image");
        }
    }
}

#[test]
fn a_copy_that_changed_in_memory_is_not_applied() {
    let (f, ..) = flipping();
    let mut copy = Copy { id: 1, range: FOUR, data: vec![2; 16_384].into(), crc: crc32(&[2; 16_384]) };
    f.image.copy(&copy).unwrap();
    copy.data = [&[2; 9000][..], &[3], &[2; 7383]].concat().into();
    assert!(f.image.copy(&copy).is_err());
    assert_eq!(read(&f, 0, 16_384), [2; 16_384][..]);
}

#[test]
fn what_flips_on_its_way_into_the_image_or_its_checksums_is_not_read_for_good() {
    for (offset, length) in SHAPES {
        let in_image = [offset, offset + length as u64 - 1];
        for (at, is_image) in [(in_image[0], true), (in_image[1], true), (offset / 4096 * 4, false)] {
            let (f, image, checksums) = flipping();
            let file = if is_image { image } else { checksums };
            file.next.lock().unwrap().replace((at, true));
            f.image.apply(&write(offset, &vec![2; length]), Trust::Verified).unwrap();
            f.image.write_back().unwrap();
            assert_eq!(*file.next.lock().unwrap(), None, "it flipped");
            let bad = if is_image { at / 4096 } else { offset / 4096 };
            assert_eq!(die(f).image.read_verified(FOUR).unwrap(), Err(bad * 4096), "{offset}+{length} at {at}");
        }
    }
}

#[test]
fn what_flips_on_its_way_out_of_the_image_is_not_sent() {
    for (offset, length) in SHAPES {
        let range = ByteRange { offset, length: length as u64 };
        for at in [offset / 4096 * 4096, offset, offset + length as u64 - 1] {
            let (f, image, _) = flipping();
            image.next.lock().unwrap().replace((at, false));
            assert_eq!(f.image.read_verified(range).unwrap(), Err(at / 4096 * 4096));
            assert!(f.image.read_verified(range).unwrap().is_ok(), "the block itself is good");
        }
    }
}

#[test]
fn the_edge_of_a_partial_write_that_flips_in_memory_does_not_pass_for_good() {
    for (offset, length) in [(4608, 512), (4000, 200), (100, 12_000)] {
        let (f, image, _) = flipping();
        image.next.lock().unwrap().replace((offset - 1, false));
        f.image.apply(&write(offset, &vec![2; length]), Trust::Verified).unwrap();
        assert_eq!(f.image.read_verified(FOUR).unwrap(), Err((offset - 1) / 4096 * 4096));
    }
}

#[test]
fn a_read_of_any_alignment_goes_out_with_the_checksum_of_its_bytes_and_what_flips_then_is_noticed() {
    let (f, ..) = flipping();
    for (offset, length) in SHAPES {
        let range = ByteRange { offset, length: length as u64 };
        let ReadOutcome::Data { data, crc } = f.image.read(ReadKind::Data, range) else { panic!("{range:?}") };
        assert_eq!(crc, crc32(&data));
        let mut changed = data.to_vec();
        changed[length / 3] ^= 1;
        let answer =
            |data: Bytes| ToEngine::ReadDone { id: 1, applied: Seq(1), outcome: ReadOutcome::Data { data, crc } };
        assert_eq!(answer(data.clone()).checked(), answer(data));
        let damaged = ToEngine::ReadDone { id: 1, applied: Seq(1), outcome: ReadOutcome::Damaged };
        assert_eq!(answer(changed.into()).checked(), damaged);
    }
}

/// What the checks cost, beside the calls of the system: `cargo test --release -p listener-agent -- --ignored cost`.
#[test]
#[ignore = "prints figures, and proves nothing"]
fn cost_of_writes_and_reads_by_size() {
    let f = fixture();
    for length in [512, 4096, 65_536, 1 << 20] {
        let offset = if length < 4096 { 512 } else { 0 };
        let record = write(offset, &vec![7; length]);
        let range = ByteRange { offset, length: length as u64 };
        let file = &f.image.image;
        let mut buffer = vec![0; length];
        let mut group = AlignedBuffer::with_capacity(0);
        let salt = Salt::of(protocol::VolumeUuid([1; 16]));
        let records = [record];
        let rounds = (4 << 20) / length.max(4096);
        // The best of many: others use the machine too.
        let time = |work: &mut dyn FnMut()| {
            let mut batch = || {
                let begun = std::time::Instant::now();
                (0..rounds).for_each(|_| work());
                begun.elapsed().as_nanos() / rounds as u128
            };
            (0..50).map(|_| batch()).min().unwrap()
        };
        let raw_write = time(&mut || file.write_at(offset, &records[0].payload).unwrap());
        let apply = time(&mut || f.image.apply(&records[0], Trust::Verified).unwrap());
        let raw_read = time(&mut || file.read_at(offset, &mut buffer).unwrap());
        let read = time(&mut || _ = std::hint::black_box(f.image.read(ReadKind::Data, range)));
        let crc = time(&mut || _ = std::hint::black_box(crc32(&records[0].payload)));
        let encode = time(&mut || _ = encode_into(salt, 1, &records, &[], &mut group));
        println!(
            "{length} bytes: apply {apply} ns (write alone {raw_write}), read {read} ns (read alone {raw_read}), \
             encoding for the journal {encode} ns; one CRC {crc} ns"
        );
    }
}
