//! Chunks of a scrub: how looks at them end, what is counted, who is waited for.

use super::*;

const CHUNK_BYTES: u64 = 256 * 1024;
const BLOCK_0: ByteRange = ByteRange { offset: 0, length: BLOCK_BYTES };
const SOUND: BlockFound = BlockFound::Sound { checksum: 7 };
const OTHER: BlockFound = BlockFound::Sound { checksum: 8 };

fn ms(count: u64) -> Time {
    Time::from_millis(count)
}

fn nobody_differs(_: PeerId, _: ByteRange, _: Seq) -> bool {
    false
}

fn chunks(bytes: u64) -> Chunks {
    Chunks::new(bytes, 0, ScrubFound::default())
}

fn ask(chunks: &mut Chunks, offset: u64, read: u64, members: &[PeerId], in_force: usize) {
    chunks.asked(ms(0), offset, Question { read, members, seen: Seq(5), in_force });
}

/// Looks at a chunk of one block when that is due; members 0, 1, ... find this.
fn look(chunks: &mut Chunks, now: Time, found: &[Option<BlockFound>]) -> Looked {
    look_of(chunks, now, found.len(), found)
}

/// The same, when so many members are in force.
fn look_of(chunks: &mut Chunks, now: Time, in_force: usize, found: &[Option<BlockFound>]) -> Looked {
    let due = chunks.due(now);
    let members: Vec<PeerId> = (0..found.len()).collect();
    ask(chunks, due[0].offset, 9, &members, in_force);
    let mut looked = None;
    for (peer, found) in found.iter().enumerate() {
        assert!(looked.is_none() && chunks.waits_for(9, peer));
        looked = chunks.answered(now, 9, peer, found.map(|found| vec![found]), nobody_differs);
    }
    looked.expect("all have answered")
}

#[test]
fn a_volume_is_looked_at_chunk_by_chunk_to_its_end() {
    let mut chunks = chunks(CHUNK_BYTES * 2 + BLOCK_BYTES);
    let mut lengths = Vec::new();
    while let Some(range) = chunks.peek(CHUNK_BYTES) {
        lengths.push(range.length);
        chunks.begin(range, ms(0));
    }
    assert_eq!(lengths, [CHUNK_BYTES, CHUNK_BYTES, BLOCK_BYTES]);
    assert_eq!((chunks.position(), chunks.is_done()), (0, false));
    let blocks = |bytes: u64| Some(vec![SOUND; (bytes / BLOCK_BYTES) as usize]);
    for (read, offset) in [(1, 0), (2, CHUNK_BYTES), (3, 2 * CHUNK_BYTES)] {
        ask(&mut chunks, offset, read, &[0, 1], 2);
    }
    for (read, bytes, position) in
        [(2, CHUNK_BYTES, 0), (1, CHUNK_BYTES, 2 * CHUNK_BYTES), (3, BLOCK_BYTES, 2 * CHUNK_BYTES + BLOCK_BYTES)]
    {
        assert_eq!(chunks.answered(ms(0), read, 0, blocks(bytes), nobody_differs), None, "one has not answered");
        assert_eq!(chunks.answered(ms(0), read, 1, blocks(bytes), nobody_differs).expect("both have").faults, []);
        assert_eq!(chunks.position(), position);
    }
    assert!(chunks.is_done());
    assert_eq!(chunks.found(), ScrubFound::default());
}

#[test]
fn a_bad_copy_counts_once_and_as_repaired_only_when_a_later_look_shows_it() {
    let mut chunks = chunks(BLOCK_BYTES);
    chunks.begin(BLOCK_0, ms(0));
    let bad = Some(BlockFound::Mismatch);
    let first = look(&mut chunks, ms(0), &[bad, Some(SOUND)]);
    assert_eq!(first.faults[0].bad, [(0, Damage::ChecksumMismatch)]);
    assert_eq!(first.seen, Seq(5));
    assert!(chunks.due(ms(49)).is_empty(), "a repair takes its time");
    look(&mut chunks, ms(50), &[bad, Some(SOUND)]);
    assert!(chunks.due(ms(149)).is_empty());
    assert!(!chunks.is_done());
    look(&mut chunks, ms(150), &[Some(SOUND), Some(SOUND)]);
    assert!(chunks.is_done());
    let found = chunks.found();
    assert_eq!((found.bad_blocks, found.repaired_blocks, found.unrepaired_blocks), (1, 1, 0));
}

#[test]
fn what_no_repair_helps_is_given_up_and_counted() {
    let mut chunks = chunks(BLOCK_BYTES);
    chunks.begin(BLOCK_0, ms(0));
    let mut now = ms(0);
    for _ in 0..LOOKS_MAX {
        look(&mut chunks, now, &[Some(OTHER), Some(SOUND), Some(SOUND)]);
        now += ms(10_000);
    }
    assert!(chunks.is_done());
    let found = chunks.found();
    assert_eq!((found.differing_blocks, found.repaired_blocks, found.unrepaired_blocks), (1, 0, 1));
}

#[test]
fn a_tie_and_a_block_without_a_good_copy_are_not_looked_at_again() {
    for (found, is_tie, bad) in [([SOUND, OTHER], true, 0), ([BlockFound::Mismatch, BlockFound::Unreadable], false, 2)]
    {
        let mut chunks = chunks(BLOCK_BYTES);
        chunks.begin(BLOCK_0, ms(0));
        assert_eq!(look(&mut chunks, ms(0), &found.map(Some)).ties, if is_tie { vec![0] } else { vec![] });
        assert!(chunks.is_done());
        let found = chunks.found();
        assert_eq!((found.bad_blocks, found.unrepaired_blocks), (bad, 1));
    }
}

#[test]
fn a_member_that_does_not_answer_makes_a_chunk_incomplete_after_a_few_tries() {
    let mut chunks = chunks(BLOCK_BYTES);
    chunks.begin(BLOCK_0, ms(0));
    for attempt in 0..u64::from(LOST_MAX) {
        assert!(!chunks.is_done());
        look(&mut chunks, ms(attempt * 500), &[None, Some(SOUND)]);
    }
    assert!(chunks.is_done());
    assert_eq!(chunks.found(), ScrubFound { incomplete_bytes: BLOCK_BYTES, ..ScrubFound::default() });
}

#[test]
fn a_member_that_was_not_asked_makes_a_chunk_incomplete_at_once() {
    let mut chunks = chunks(BLOCK_BYTES);
    chunks.begin(BLOCK_0, ms(0));
    look_of(&mut chunks, ms(0), 2, &[Some(SOUND)]);
    assert!(chunks.is_done(), "it was waited for before");
    assert_eq!(chunks.found(), ScrubFound { incomplete_bytes: BLOCK_BYTES, ..ScrubFound::default() });
}

#[test]
fn what_was_done_before_a_member_joined_is_incomplete_and_what_is_under_way_is_looked_at_again() {
    let mut chunks = chunks(3 * BLOCK_BYTES);
    while let Some(range) = chunks.peek(BLOCK_BYTES) {
        chunks.begin(range, ms(0));
    }
    for block in [0, 2] {
        ask(&mut chunks, block * BLOCK_BYTES, block, &[0], 1);
        chunks.answered(ms(0), block, 0, Some(vec![SOUND]), nobody_differs);
    }
    ask(&mut chunks, BLOCK_BYTES, 1, &[0], 1);
    chunks.joined(2);
    chunks.joined(2);
    assert_eq!(chunks.found().incomplete_bytes, BLOCK_BYTES, "below what is under way");
    assert!(chunks.answered(ms(0), 1, 0, Some(vec![SOUND]), nobody_differs).is_some() && !chunks.is_done());
    look(&mut chunks, ms(500), &[Some(SOUND), Some(SOUND)]);
    assert_eq!((chunks.is_done(), chunks.found().incomplete_bytes), (true, 2 * BLOCK_BYTES));
    chunks.grow(4 * BLOCK_BYTES);
    assert_eq!(chunks.peek(CHUNK_BYTES), Some(ByteRange { offset: 3 * BLOCK_BYTES, length: BLOCK_BYTES }));
}

#[test]
fn a_tie_is_none_before_whoever_did_not_answer_was_asked_again() {
    let mut chunks = chunks(BLOCK_BYTES);
    chunks.begin(BLOCK_0, ms(0));
    let first = look(&mut chunks, ms(0), &[None, Some(SOUND), Some(OTHER)]);
    assert!(first.ties.is_empty() && first.faults[0].is_tie && !chunks.is_done());
    let second = look(&mut chunks, ms(500), &[Some(SOUND), Some(SOUND), Some(OTHER)]);
    assert_eq!(second.faults[0].bad, [(2, Damage::Differs)]);
    look(&mut chunks, ms(2000), &[Some(SOUND); 3]);
    let found = chunks.found();
    assert_eq!((found.differing_blocks, found.repaired_blocks, found.unrepaired_blocks), (1, 1, 0));
}

#[test]
fn a_tie_without_a_member_that_never_answers_is_told_once() {
    let mut chunks = chunks(BLOCK_BYTES);
    chunks.begin(BLOCK_0, ms(0));
    let mut told = Vec::new();
    for attempt in 0..u64::from(LOST_MAX) {
        told.extend(look(&mut chunks, ms(attempt * 500), &[None, Some(SOUND), Some(OTHER)]).ties);
    }
    assert_eq!(told, [0]);
    let found = chunks.found();
    let counts = (found.differing_blocks, found.unrepaired_blocks, found.incomplete_bytes);
    assert_eq!((chunks.is_done(), counts), (true, (1, 1, BLOCK_BYTES)));
}

#[test]
fn who_has_not_answered_for_so_long_is_named() {
    let mut chunks = chunks(BLOCK_BYTES);
    chunks.begin(BLOCK_0, ms(0));
    ask(&mut chunks, 0, 9, &[0, 1], 2);
    chunks.answered(ms(10), 9, 0, Some(vec![SOUND]), nobody_differs);
    assert_eq!(chunks.late(ms(99), ms(100)), []);
    assert_eq!(chunks.late(ms(100), ms(100)), [(9, 1)]);
    chunks.answered(ms(100), 9, 1, None, nobody_differs);
    assert!(chunks.late(ms(200), ms(100)).is_empty() && !chunks.waits_for(9, 1), "a late answer is none");
}

#[test]
fn what_was_found_above_a_chunk_that_is_under_way_does_not_count_for_its_position() {
    let mut chunks = chunks(3 * BLOCK_BYTES);
    while let Some(range) = chunks.peek(BLOCK_BYTES) {
        chunks.begin(range, ms(0));
    }
    for (block, found) in [(2, [SOUND, OTHER]), (1, [BlockFound::Mismatch; 2])] {
        ask(&mut chunks, block * BLOCK_BYTES, block, &[0, 1], 2);
        found
            .into_iter()
            .enumerate()
            .for_each(|(peer, found)| _ = chunks.answered(ms(0), block, peer, Some(vec![found]), nobody_differs));
        assert_eq!((chunks.position(), chunks.found()), (0, ScrubFound::default()), "all is looked at from there on");
    }
    look(&mut chunks, ms(0), &[Some(SOUND); 2]);
    let found = ScrubFound { bad_blocks: 2, differing_blocks: 1, unrepaired_blocks: 2, ..ScrubFound::default() };
    assert_eq!((chunks.position(), chunks.found()), (3 * BLOCK_BYTES, found));
}

#[test]
fn an_answer_of_another_length_is_none() {
    let mut chunks = chunks(BLOCK_BYTES);
    chunks.begin(BLOCK_0, ms(0));
    ask(&mut chunks, 0, 9, &[0], 1);
    chunks.answered(ms(0), 9, 0, Some(vec![SOUND; 2]), nobody_differs);
    assert!(!chunks.is_done(), "it is asked again");
}

#[test]
fn what_records_made_the_same_everywhere_since_members_were_asked_is_known() {
    let mut chunks = chunks(8 * BLOCK_BYTES);
    chunks.begin(ByteRange { offset: 0, length: 4 * BLOCK_BYTES }, ms(0));
    chunks.begin(ByteRange { offset: 4 * BLOCK_BYTES, length: 4 * BLOCK_BYTES }, ms(0));
    chunks.overlap(ByteRange { offset: 0, length: 8 * BLOCK_BYTES });
    ask(&mut chunks, 4 * BLOCK_BYTES, 9, &[0], 1);
    chunks.overlap(ByteRange { offset: BLOCK_BYTES, length: BLOCK_BYTES });
    chunks.overlap(ByteRange { offset: 4 * BLOCK_BYTES - 1, length: 2 * BLOCK_BYTES });
    chunks.overlap(ByteRange { offset: 6 * BLOCK_BYTES, length: 9 * BLOCK_BYTES });
    let looked = chunks.answered(ms(0), 9, 0, Some(vec![SOUND; 4]), nobody_differs).expect("all have answered");
    assert!(looked.is_whole);
    assert_eq!(looked.rewritten.into_iter().collect::<Vec<_>>(), [0, 2, 3]);
}
