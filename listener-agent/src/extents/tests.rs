//! Extents of images in every state that a disk can leave them in.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use protocol::checksum::{crc32, stored_block_checksum};
use protocol::extents::covered;

use super::*;
use crate::disk::file::{Caching, SystemFile};
use crate::image::Image;

const SIZE: u64 = 1 << 20;

/// An image and checksums that agree on what was written through them, on a filesystem that has holes.
struct Fixture {
    dir: tempfile::TempDir,
    image: SystemFile,
    checksums: SystemFile,
}

fn fixture(size: u64) -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let open = |name: &str, bytes: u64| {
        let path = dir.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
        SystemFile::open(&path, Caching::Buffered).unwrap()
    };
    let (image, checksums) = (open("i", size), open("c", checksum_file_bytes(size)));
    Fixture { dir, image, checksums }
}

impl Fixture {
    fn write(&self, offset: u64, block: &[u8]) {
        self.image.write_at(offset, block).unwrap();
        let stored = stored_block_checksum(block).to_le_bytes();
        self.checksums.write_at(checksum_file_bytes(offset), &stored).unwrap();
    }

    fn survey(&self) -> Survey<'_> {
        Survey { image: &self.image, checksums: &self.checksums, budget: Budget::ANSWER }
    }

    fn show(&self, offset: u64, length: u64) -> String {
        shown(&self.survey().of(ByteRange { offset, length }).unwrap())
    }
}

fn shown(found: &[Extent]) -> String {
    let one = |e: &Extent| format!("{:?} {}", e.allocation, e.length);
    found.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// A block that is not zeroes and has their checksum.
fn block_with_the_checksum_of_zeroes() -> Vec<u8> {
    // Checksums of blocks of one length differ by a linear function of how the blocks differ: of 33 single bits some
    // combination has no effect.
    let mut basis: BTreeMap<u32, (u32, Vec<usize>)> = BTreeMap::new();
    for bit in 0..33 {
        let mut block = vec![0; BLOCK];
        block[1000 + bit / 8] = 1 << (bit % 8);
        let (mut rest, mut bits) = (stored_block_checksum(&block), vec![bit]);
        while let Some((value, with)) = basis.get(&rest.leading_zeros()).filter(|_| rest != 0) {
            rest ^= value;
            bits.extend(with);
        }
        if rest != 0 {
            basis.insert(rest.leading_zeros(), (rest, bits));
            continue;
        }
        let mut block = vec![0; BLOCK];
        bits.iter().for_each(|bit| block[1000 + bit / 8] ^= 1 << (bit % 8));
        return block;
    }
    unreachable!("33 vectors of 32 dimensions depend on each other")
}

#[test]
fn an_empty_volume_is_one_hole_however_large() {
    let f = fixture(1 << 40);
    assert_eq!(f.show(4096, 64 << 30), format!("Hole {}", 64_u64 << 30));
    f.write(10 << 30, &[1; BLOCK]);
    let lengths = [10 << 30, 4096, (54_u64 << 30) - 4096];
    assert_eq!(f.show(0, 64 << 30), format!("Hole {}, Data {}, Hole {}", lengths[0], lengths[1], lengths[2]));
}

#[test]
fn data_zeroes_and_holes_are_told_apart() {
    let f = fixture(SIZE);
    f.write(8192, &[1; BLOCK]);
    f.write(12288, &[0; BLOCK]);
    f.write(16384, &[2; BLOCK]);
    assert_eq!(f.show(0, 65536), "Hole 8192, Data 4096, Zeroes 4096, Data 4096, Hole 45056");
    f.image.zero_range(8192, BLOCK_BYTES, false).unwrap();
    f.checksums.zero_range(checksum_file_bytes(8192), CHECKSUM_BYTES, true).unwrap();
    assert_eq!(f.show(0, 65536), "Hole 12288, Zeroes 4096, Data 4096, Hole 45056", "after a trim");
}

#[test]
fn ranges_that_end_within_blocks_are_told_of_these_blocks() {
    let f = fixture(SIZE);
    f.write(8192, &[1; BLOCK]);
    assert_eq!(f.show(8191, 2), "Hole 1, Data 1");
    assert_eq!(f.show(12287, 2), "Data 1, Hole 1");
    assert_eq!(f.show(9000, 100), "Data 100");
    assert_eq!(f.show(100, 20000), "Hole 8092, Data 4096, Hole 7812");
    assert_eq!(f.show(SIZE - 1, 1), "Hole 1");
}

#[test]
fn a_block_that_only_has_the_checksum_of_zeroes_is_data() {
    let block = block_with_the_checksum_of_zeroes();
    assert!(crc32(&block) == crc32(&[0; BLOCK]) && block.iter().any(|byte| *byte != 0));
    let f = fixture(SIZE);
    f.write(8192, &block);
    assert_eq!(f.show(0, 16384), "Hole 8192, Data 4096, Hole 4096");
}

#[test]
fn a_part_of_the_image_that_was_lost_is_data() {
    let f = fixture(SIZE);
    f.write(8192, &[1; BLOCK]);
    f.image.zero_range(0, SIZE, false).unwrap();
    assert_eq!(f.show(0, 16384), "Hole 8192, Data 4096, Hole 4096", "a read of it finds the mismatch");
}

#[test]
fn behind_the_end_of_a_file_that_was_cut_off_nothing_is_known() {
    for name in ["i", "c"] {
        let f = fixture(SIZE);
        let half = if name == "i" { SIZE / 2 } else { checksum_file_bytes(SIZE) / 2 };
        std::fs::File::options().write(true).open(f.dir.path().join(name)).unwrap().set_len(half).unwrap();
        assert!(f.survey().of(ByteRange { offset: 0, length: SIZE }).is_err());
        assert_eq!(f.show(0, SIZE / 2), format!("Hole {}", SIZE / 2));
    }
}

#[test]
fn an_answer_that_would_cost_too_much_ends_early_and_the_next_goes_on() {
    let f = fixture(SIZE);
    f.image.write_at(0, &vec![0; SIZE as usize]).unwrap();
    let all = ByteRange { offset: 0, length: SIZE };
    let small = Survey { budget: Budget { checksum_bytes: 1 << 20, image_bytes: 100 << 10 }, ..f.survey() };
    assert_eq!(shown(&small.of(all).unwrap()), "Zeroes 102400", "of the image");
    f.checksums.write_at(0, &[1; 1024]).unwrap();
    let small = Survey { budget: Budget { checksum_bytes: 512, image_bytes: 4 << 20 }, ..f.survey() };
    assert_eq!(shown(&small.of(all).unwrap()), "Data 524288", "of the checksums");
}

#[test]
fn there_are_never_too_many_extents_and_they_cover_the_beginning() {
    let blocks = EXTENTS_MAX as u64 + 100;
    let f = fixture(blocks * BLOCK_BYTES);
    for block in (0..blocks).step_by(2) {
        f.write(block * BLOCK_BYTES, &[1; BLOCK]);
    }
    let found = f.survey().of(ByteRange { offset: 512, length: blocks * BLOCK_BYTES - 512 }).unwrap();
    assert_eq!(found.len(), EXTENTS_MAX);
    assert_eq!(covered(&found), EXTENTS_MAX as u64 * BLOCK_BYTES - 512);
    assert!(found.iter().enumerate().all(|(i, e)| (e.allocation == Allocation::Data) == (i % 2 == 0)));
}

/// A disk without holes, as a block device is; it counts what is read.
struct Device {
    file: SystemFile,
    bytes_read: Mutex<u64>,
}

impl RawFile for Device {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        *self.bytes_read.lock().unwrap() += buffer.len() as u64;
        self.file.read_at(offset, buffer)
    }
    fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.read_at(offset, buffer).is_ok()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write_at(offset, data)
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
        Ok(Some(range))
    }
    fn read_ahead(&self, _range: ByteRange) {}
    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }
}

#[test]
fn where_there_are_no_holes_zeroes_are_read_up_to_a_limit() {
    let Fixture { dir: _dir, image, checksums } = fixture(64 << 20);
    let device = Device { file: image, bytes_read: Mutex::new(0) };
    let survey = Survey { image: &device, checksums: &checksums, budget: Budget::ANSWER };
    let found = survey.of(ByteRange { offset: 0, length: 64 << 20 }).unwrap();
    assert_eq!(shown(&found), format!("Zeroes {}", 4 << 20));
    assert_eq!(*device.bytes_read.lock().unwrap(), 4 << 20);
}

proptest::proptest! {
    #[test]
    fn nothing_is_called_zero_that_does_not_read_as_zeroes(
        writes in proptest::collection::vec((0_u64..64, 0_u8..4), 0..40),
        offset in 0_u64..SIZE / 4,
        length in 1_u64..SIZE / 4,
    ) {
        let f = fixture(SIZE);
        let crafted = block_with_the_checksum_of_zeroes();
        for (block, what) in writes {
            let at = block * BLOCK_BYTES;
            match what {
                0 => f.write(at, &[0; BLOCK]),
                1 => f.write(at, &crafted),
                2 => f.write(at, &[7; BLOCK]),
                _ => f.image.zero_range(at, BLOCK_BYTES, false).unwrap(),
            }
        }
        let image = Image::of(Arc::new(f.image), Arc::new(f.checksums));
        let found = image.extents(ByteRange { offset, length }).unwrap();
        proptest::prop_assert_eq!(covered(&found), length);
        let mut at = offset;
        for extent in found {
            let read = image.read_verified(ByteRange { offset: at, length: extent.length }).unwrap();
            let is_zero = read.is_ok_and(|read| read.data.iter().all(|byte| *byte == 0));
            proptest::prop_assert!(is_zero || extent.allocation == Allocation::Data);
            at += extent.length;
        }
    }
}
