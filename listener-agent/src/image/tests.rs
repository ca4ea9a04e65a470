//! What is written is read back and verified; what is bad stays bad, and what changed in memory is not taken.

use super::*;
use crate::disk::file::{Caching, SystemFile};
use protocol::checksum::{crc32, stored_block_checksum};
use protocol::{Epoch, Position, Seq};

const SIZE: u64 = 1 << 20;

pub(super) struct Fixture {
    pub(super) dir: tempfile::TempDir,
    pub(super) image: Image,
}

pub(super) fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [("i", SIZE), ("c", checksum_file_bytes(SIZE))] {
        std::fs::File::create(dir.path().join(name)).unwrap().set_len(bytes).unwrap();
    }
    Fixture { image: open(&dir), dir }
}

fn open(dir: &tempfile::TempDir) -> Image {
    let open = |name| Arc::new(SystemFile::open(&dir.path().join(name), Caching::Buffered).unwrap());
    Image::of(open("i"), open("c"))
}

/// The process dies, and another comes.
pub(super) fn die(f: Fixture) -> Fixture {
    Fixture { image: open(&f.dir), dir: f.dir }
}

fn record(kind: RecordKind, offset: u64, length: u64, payload: Vec<u8>) -> Record {
    Record::new(Position { epoch: Epoch(1), seq: Seq(1) }, kind, ByteRange { offset, length }, payload.into())
}

pub(super) fn write(offset: u64, data: &[u8]) -> Record {
    record(RecordKind::Write, offset, data.len() as u64, data.to_vec())
}

pub(super) fn read(f: &Fixture, offset: u64, length: u64) -> Bytes {
    f.image.read_verified(ByteRange { offset, length }).unwrap().expect("checksums match").data
}

#[test]
fn writes_of_any_alignment_are_read_back_and_match_their_checksums() {
    let f = fixture();
    let mut model = vec![0; SIZE as usize];
    for (offset, length) in [(0, 4096), (512, 1024), (4095, 2), (8192, 12288), (5000, 9001), (SIZE - 1, 1)] {
        let data = vec![(offset % 251) as u8 + 1; length as usize];
        f.image.apply(&write(offset, &data), Trust::Verified).unwrap();
        model[offset as usize..][..data.len()].copy_from_slice(&data);
    }
    assert_eq!(read(&f, 0, SIZE), model);
    assert_eq!(read(&f, 4095, 2), model[4095..4097]);
}

#[test]
fn zeroed_ranges_read_as_zeroes_to_the_byte() {
    for kind in [RecordKind::Trim, RecordKind::WriteZeroes] {
        let f = fixture();
        f.image.apply(&write(0, &vec![7; SIZE as usize]), Trust::Verified).unwrap();
        let mut model = vec![7; SIZE as usize];
        for (offset, length) in [(100, 50), (4000, 200), (10_000, 20_000), (40_960, 8192)] {
            f.image.apply(&record(kind, offset, length, vec![]), Trust::Verified).unwrap();
            model[offset as usize..(offset + length) as usize].fill(0);
        }
        assert_eq!(read(&f, 0, SIZE), model);
    }
}

#[test]
fn copies_are_whole_blocks_or_zeroes_and_heal_a_bad_block() {
    let f = fixture();
    f.image.apply(&write(0, &[1; 16_384]), Trust::Verified).unwrap();
    f.image.image.write_at(5000, &[9]).unwrap();
    let copy = |offset, length, data: &[u8]| {
        let data = Bytes::copy_from_slice(data);
        let crc = crc32(&data);
        f.image.copy(&Copy { id: 1, range: ByteRange { offset, length }, data, crc }).unwrap();
    };
    copy(4096, 4096, &[2; 4096]);
    copy(8192, 8192, &[]);
    assert_eq!(read(&f, 4000, 5000), [&[1; 96][..], &[2; 4096], &[0; 808]].concat());
}

#[test]
fn what_a_volume_grows_by_is_zero_whatever_lay_there() {
    let f = fixture();
    f.image.apply(&write(0, &[1; 3 << 18]), Trust::Verified).unwrap();
    f.image.grow(SIZE / 2, 2 * SIZE).unwrap();
    assert_eq!(read(&f, SIZE / 2 - 1, 2), [1, 0][..]);
    assert!(read(&f, SIZE / 2, SIZE / 2).iter().all(|byte| *byte == 0));
    assert!(read(&f, SIZE, SIZE).iter().all(|byte| *byte == 0));
    f.image.extend(SIZE).unwrap();
    assert_eq!(f.image.image.length().unwrap(), 2 * SIZE);
}

#[test]
fn a_flipped_bit_is_named_and_a_partial_write_does_not_hide_it() {
    let f = fixture();
    f.image.apply(&write(0, &[1; 8192]), Trust::Verified).unwrap();
    f.image.image.write_at(5000, &[9]).unwrap();
    let all = ByteRange { offset: 0, length: 8192 };
    assert_eq!(f.image.read(ReadKind::Data, all), ReadOutcome::ChecksumMismatch { offset: 4096 });
    f.image.apply(&write(4096, &[2; 512]), Trust::Verified).unwrap();
    assert_eq!(f.image.read(ReadKind::Data, all), ReadOutcome::ChecksumMismatch { offset: 4096 });
    f.image.apply(&write(4096, &[2; 4096]), Trust::Verified).unwrap();
    assert!(matches!(f.image.read(ReadKind::Data, all), ReadOutcome::Data { .. }));
}

#[test]
fn a_replay_does_not_make_a_block_good_that_was_found_bad() {
    let f = fixture();
    f.image.apply(&write(0, &[1; 8192]), Trust::Verified).unwrap();
    f.image.image.write_at(5000, &[9]).unwrap();
    let all = ByteRange { offset: 0, length: 8192 };
    let partial = [write(4096, &[2; 512]), write(6000, &[3; 512])];
    for trust in [Trust::Verified, Trust::InDoubt] {
        for record in &partial {
            f.image.apply(record, trust).unwrap();
        }
        assert_eq!(f.image.read(ReadKind::Data, all), ReadOutcome::ChecksumMismatch { offset: 4096 }, "{trust:?}");
    }
    f.image.apply(&write(4096, &[2; 4096]), Trust::InDoubt).unwrap();
    assert!(matches!(f.image.read(ReadKind::Data, all), ReadOutcome::Data { .. }));
}

#[test]
fn checksums_of_records_die_with_the_process_unless_they_were_written_back() {
    let all = ByteRange { offset: 0, length: 8192 };
    for is_written_back in [false, true] {
        let f = fixture();
        let record = write(0, &[1; 8192]);
        f.image.apply(&record, Trust::Verified).unwrap();
        if is_written_back {
            f.image.write_back().unwrap();
        }
        let f = die(f);
        assert_eq!(f.image.read_verified(all).unwrap().is_ok(), is_written_back);
        f.image.apply(&record, Trust::InDoubt).unwrap();
        assert_eq!(read(&f, 0, 8192), [1; 8192][..], "the journal brings them back");
    }
}

#[test]
fn what_no_journal_knows_outlives_the_process() {
    let f = fixture();
    f.image.apply(&write(0, &[1; 65_536]), Trust::Verified).unwrap();
    f.image.write_back().unwrap();
    f.image.image.write_at(5000, &[9]).unwrap();
    let partial = write(4096, &[2; 512]);
    f.image.apply(&partial, Trust::Verified).unwrap();
    let data = Bytes::from(vec![3; 8192]);
    let range = |offset, length| ByteRange { offset, length };
    f.image.copy(&Copy { id: 1, range: range(8192, 8192), crc: crc32(&data), data }).unwrap();
    f.image.copy(&Copy { id: 2, range: range(20_480, 4096), crc: 0, data: Bytes::new() }).unwrap();

    let f = die(f);
    assert_eq!(read(&f, 8192, 16_384), [&[3; 8192][..], &[1; 4096], &[0; 4096]].concat(), "copies");
    for _ in 0..2 {
        let bad = f.image.read_verified(ByteRange { offset: 4096, length: 4096 }).unwrap();
        assert_eq!(bad, Err(4096), "a block that was found bad is known to be, also to a replay");
        f.image.apply(&partial, Trust::InDoubt).unwrap();
    }
}

#[test]
fn a_scrub_calls_no_block_bad_after_a_failed_sync() {
    let f = fixture();
    f.image.apply(&write(0, &[1; 8192]), Trust::Verified).unwrap();
    f.image.image.write_at(5000, &[9]).unwrap();
    let all = ByteRange { offset: 0, length: 8192 };
    let found = f.image.read(ReadKind::Scrub, all);
    let sound = BlockFound::Sound { checksum: stored_block_checksum(&[1; 4096]) };
    assert_eq!(found, ReadOutcome::Scrubbed(vec![sound, BlockFound::Mismatch]));
    f.image.sync_failed.store(true, Ordering::SeqCst);
    assert_eq!(f.image.read(ReadKind::Scrub, all), ReadOutcome::Failed);
}
