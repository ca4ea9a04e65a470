//! Which blocks of a replica may be ahead of its log, as its superblock has it. They come to be so by a crash in the midst of
//! a write in place ([`crate::recovery`]), and by records that another member's journal had as later ones left them; they cease
//! to be so by whatever is written there later.

use protocol::message::UNSETTLED_MAX;
use protocol::ranges::{ByteRange, merge_in_units, outside_blocks};
use protocol::{BLOCK_BYTES, RecordHeader};

use crate::superblock::Superblock;

/// Blocks of these ranges may be ahead of the log.
pub(crate) fn unsettle(superblock: &mut Superblock, ranges: impl Iterator<Item = ByteRange>) {
    let all: Vec<ByteRange> = ranges.chain(superblock.unsettled.iter().copied()).collect();
    let mut unit = BLOCK_BYTES;
    loop {
        superblock.unsettled = merge_in_units(all.iter().copied(), unit);
        if superblock.unsettled.len() <= UNSETTLED_MAX {
            return;
        }
        unit *= 2;
    }
}

/// What a durable record changes of that.
pub(super) fn note_settled(superblock: &mut Superblock, header: &RecordHeader) {
    if header.seq <= superblock.unsettled_seq {
        return;
    }
    if header.amended {
        return unsettle(superblock, std::iter::once(header.range()));
    }
    if superblock.unsettled.is_empty() || header.length == 0 {
        return;
    }
    let left = outside_blocks(&superblock.unsettled, header.range());
    // More than a superblock can name: then some stay that need not, which an engine will settle.
    if left.len() <= UNSETTLED_MAX {
        superblock.unsettled = left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::superblock::tests::sample;
    use protocol::{Epoch, Position, Record, RecordKind, Seq};

    const BLOCK: u64 = BLOCK_BYTES;

    fn range(offset: u64, length: u64) -> ByteRange {
        ByteRange { offset, length }
    }

    fn nothing_unsettled_since(seq: u64) -> Superblock {
        Superblock { unsettled: Vec::new(), unsettled_seq: Seq(seq), ..sample() }
    }

    fn trim(seq: u64, range: ByteRange) -> RecordHeader {
        Record::new(Position { epoch: Epoch(1), seq: Seq(seq) }, RecordKind::Trim, range, Vec::new().into()).header
    }

    #[test]
    fn only_later_records_settle_and_only_what_they_change_whole() {
        let mut superblock = nothing_unsettled_since(5);
        unsettle(&mut superblock, [range(0, 4 * BLOCK), range(8 * BLOCK, BLOCK)].into_iter());
        note_settled(&mut superblock, &trim(5, range(0, 9 * BLOCK)));
        assert_eq!(superblock.unsettled, [range(0, 4 * BLOCK), range(8 * BLOCK, BLOCK)]);
        note_settled(&mut superblock, &trim(6, range(BLOCK - 1, 2 * BLOCK)));
        assert_eq!(superblock.unsettled, [range(0, BLOCK), range(2 * BLOCK, 2 * BLOCK), range(8 * BLOCK, BLOCK)]);
        note_settled(&mut superblock, &trim(7, range(0, 9 * BLOCK)));
        assert_eq!(superblock.unsettled, []);
    }

    #[test]
    fn an_amended_record_is_unsettled_until_what_amended_it_is_there() {
        let mut superblock = nothing_unsettled_since(0);
        let mut amended = trim(6, range(0, 3 * BLOCK));
        amended.amended = true;
        note_settled(&mut superblock, &amended);
        assert_eq!(superblock.unsettled, [range(0, 3 * BLOCK)]);
        note_settled(&mut superblock, &trim(7, range(BLOCK, BLOCK)));
        assert_eq!(superblock.unsettled, [range(0, BLOCK), range(2 * BLOCK, BLOCK)]);
    }

    #[test]
    fn more_ranges_than_a_superblock_names_become_fewer_that_cover_them() {
        let mut superblock = nothing_unsettled_since(0);
        unsettle(&mut superblock, (0..3000).map(|index| range(index * 3 * BLOCK, BLOCK)));
        assert!(superblock.unsettled.len() <= UNSETTLED_MAX);
        let covered = |at: u64| superblock.unsettled.iter().any(|r| r.offset <= at && at + BLOCK <= r.end());
        assert!((0..3000).all(|index| covered(index * 3 * BLOCK)));
    }
}
