//! The replica's rules, one story each.

use bytes::Bytes;
use protocol::message::{Condition, Promised, ReadKind, ReadOutcome};
use protocol::{EpochHistory, ReplicaName, View, ViewState, VolumeUuid};

use super::*;
use crate::image::Trust;
use crate::journal::{self, FILE_BYTES_MIN};
use crate::superblock::{Identity, JournalTail};

pub(super) const BLOCK: u64 = 4096;
pub(super) const A: EngineId = [1; 16];
pub(super) const B: EngineId = [2; 16];
pub(super) const NOW: Time = Time::from_secs(1);

pub(super) fn replica() -> Replica {
    let name: ReplicaName = "a".parse().unwrap();
    let superblock = Superblock {
        identity: Identity {
            uuid: VolumeUuid([3; 16]),
            volume: "v".parse().unwrap(),
            replica: name.clone(),
            size_bytes: 1 << 20,
            journal_bytes: FILE_BYTES_MIN,
        },
        write_count: 2,
        generation: 1,
        clean: false,
        promised: Epoch(0),
        engine: [0; 16],
        lease_ms: 0,
        syncing: false,
        checkpoint: Position::default(),
        image_bytes: 1 << 20,
        views: ViewState::initial(View::new(vec![name]).unwrap()),
        history: EpochHistory::default(),
        acks: None,
        tail: JournalTail { offset: 0, seq: Seq(1), generation: 1 },
        stable: Seq(0),
        tracked: Vec::new(),
        tracked_seq: Seq(0),
        unsettled: Vec::new(),
        unsettled_seq: Seq(0),
    };
    let ring = Ring::empty(journal::capacity_bytes(FILE_BYTES_MIN));
    let dirty = DirtyMaps::of(&superblock);
    Replica::new(superblock, ring, Position::default(), dirty, NOW, false)
}

/// A replica that promised epoch 1 to session 1 of engine A.
pub(super) fn promised() -> Replica {
    let mut r = replica();
    r.open_session(1, A, NOW);
    r.handle(NOW, 1, promise(1, A));
    write_superblock(&mut r);
    said(&mut r);
    r
}

pub(super) fn promise(epoch: u64, engine: EngineId) -> ToAgent {
    ToAgent::Promise { epoch: Epoch(epoch), engine, lease_ms: 1000 }
}

pub(super) fn write_at(epoch: u64, seq: u64, offset: u64, length: u64) -> ToAgent {
    let position = Position { epoch: Epoch(epoch), seq: Seq(seq) };
    let payload = Bytes::from(vec![seq as u8; length as usize]);
    ToAgent::Append(Record::new(position, RecordKind::Write, ByteRange { offset, length }, payload))
}

pub(super) fn append(r: &mut Replica, seq: u64, offset: u64) {
    r.handle(NOW, 1, write_at(1, seq, offset, BLOCK));
}

pub(super) fn write_group(r: &mut Replica) {
    r.next_group().expect("there is a group to write");
    r.group_done(GroupOutcome::Durable);
}

pub(super) fn apply(r: &mut Replica) {
    r.next_apply(NOW).expect("there are records to apply");
    r.apply_done(NOW, Ok(()));
}

pub(super) fn write_superblock(r: &mut Replica) -> Superblock {
    let job = r.next_metadata(NOW).expect("there is a superblock to write");
    r.metadata_done(NOW, &job, Ok(()));
    job.superblock
}

pub(super) fn said(r: &mut Replica) -> Vec<(SessionId, ToEngine)> {
    std::iter::from_fn(|| r.poll_outbox()).collect()
}

pub(super) fn refusal(said: &[(SessionId, ToEngine)], session: SessionId) -> Option<RefusedReason> {
    said.iter().find_map(|(to, message)| match message {
        ToEngine::Refused(refused) if *to == session => Some(refused.reason),
        _ => None,
    })
}

pub(super) fn promise_given(said: &[(SessionId, ToEngine)]) -> Option<&Promised> {
    said.iter().find_map(|(_, message)| if let ToEngine::Promised(p) = message { Some(p) } else { None })
}

#[test]
fn a_promise_fences_the_older_session_and_fixes_the_position() {
    let mut r = promised();
    append(&mut r, 1, 0);
    let group = r.next_group().unwrap();
    append(&mut r, 2, 0);
    r.open_session(2, B, NOW);
    r.handle(NOW, 2, promise(2, B));
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Fenced { promised: Epoch(2) }));
    append(&mut r, 3, 0);
    assert!(!r.has_metadata(NOW), "the group at work belongs to the position that is told");
    r.group_done(GroupOutcome::Durable);
    assert_eq!(group.records.len(), 1);
    assert!(r.next_group().is_none(), "what was only received is forgotten");
    assert_eq!(write_superblock(&mut r).promised, Epoch(2));
    let said = said(&mut r);
    assert_eq!(promise_given(&said).unwrap().position, Position { epoch: Epoch(1), seq: Seq(1) });
}

#[test]
fn a_promise_is_answered_only_when_it_is_durable() {
    let mut r = replica();
    r.open_session(1, A, NOW);
    r.handle(NOW, 1, promise(5, A));
    let job = r.next_metadata(NOW).unwrap();
    assert!(promise_given(&said(&mut r)).is_none());
    r.metadata_done(NOW, &job, Ok(()));
    assert_eq!(promise_given(&said(&mut r)).unwrap().epoch, Epoch(5));
}

#[test]
fn a_lower_epoch_and_the_same_epoch_of_another_engine_are_refused() {
    let mut r = promised();
    for (session, epoch) in [(2, 0), (3, 1)] {
        r.open_session(session, B, NOW);
        r.handle(NOW, session, promise(epoch, B));
        assert_eq!(refusal(&said(&mut r), session), Some(RefusedReason::Fenced { promised: Epoch(1) }));
    }
    append(&mut r, 1, 0);
    write_group(&mut r);
    assert_eq!(said(&mut r), [(1, ToEngine::Durable { seq: Seq(1) })], "the promise to the first stands");
}

#[test]
fn the_next_engine_learns_how_long_the_one_before_may_count_on_its_lease() {
    let mut r = promised();
    let later = NOW + Duration::from_micros(400_300);
    r.open_session(2, B, later);
    r.handle(later, 2, promise(2, B));
    let job = r.next_metadata(later).unwrap();
    r.metadata_done(later, &job, Ok(()));
    assert_eq!(promise_given(&said(&mut r)).unwrap().lease_remaining_ms, 600, "rounded up, never down");
}

#[test]
fn a_gap_in_the_order_is_refused() {
    let mut r = promised();
    append(&mut r, 1, 0);
    append(&mut r, 3, 0);
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Protocol));
}

#[test]
fn nothing_is_acknowledged_or_applied_before_it_is_durable() {
    let mut r = promised();
    append(&mut r, 1, 0);
    assert!(r.next_apply(NOW).is_none());
    r.next_group().unwrap();
    assert!(r.next_apply(NOW).is_none() && said(&mut r).is_empty());
    r.group_done(GroupOutcome::Durable);
    assert_eq!(said(&mut r), [(1, ToEngine::Durable { seq: Seq(1) })]);
    assert!(r.next_apply(NOW).is_some());
}

#[test]
fn a_read_waits_for_the_record_that_it_must_see_and_no_other() {
    let mut r = promised();
    append(&mut r, 1, 0);
    r.handle(NOW, 1, ToAgent::Read { id: 7, what: ReadKind::Data, offset: 512, length: 512 });
    r.handle(NOW, 1, ToAgent::Read { id: 8, what: ReadKind::Data, offset: 2 * BLOCK, length: 512 });
    assert_eq!(r.next_read().unwrap().id, 8);
    assert!(r.next_read().is_none());
    write_group(&mut r);
    apply(&mut r);
    assert_eq!(r.next_read().unwrap().id, 7);
}

#[test]
fn a_record_waits_for_the_read_of_its_block_at_work_or_about_to_begin() {
    let mut r = promised();
    r.handle(NOW, 1, ToAgent::Read { id: 7, what: ReadKind::Data, offset: 512, length: 512 });
    append(&mut r, 1, 0);
    write_group(&mut r);
    said(&mut r);
    assert!(r.next_apply(NOW).is_none(), "the read may begin at any moment");
    let read = r.next_read().unwrap();
    assert!(r.next_apply(NOW).is_none(), "the read is at work");
    let data = Bytes::from(vec![0; 512]);
    r.read_done(read, ReadOutcome::Data { data, crc: 0 });
    assert!(matches!(said(&mut r)[..], [(1, ToEngine::ReadDone { id: 7, applied: Seq(0), .. })]));
    assert!(r.next_apply(NOW).is_some());
}

#[test]
fn a_status_sees_the_records_before_it_and_holds_up_those_behind_it() {
    let mut r = promised();
    append(&mut r, 1, 0);
    r.handle(NOW, 1, ToAgent::Read { id: 7, what: ReadKind::Extents, offset: 0, length: 4 * BLOCK });
    assert!(r.next_read().is_none(), "it would not show the record");
    write_group(&mut r);
    apply(&mut r);
    let status = r.next_read().unwrap();
    assert_eq!((status.id, status.what), (7, ReadKind::Extents));
    append(&mut r, 2, 0);
    write_group(&mut r);
    assert!(r.next_apply(NOW).is_none(), "blocks and checksums would not match while they are looked at");
    r.read_done(status, ReadOutcome::Failed);
    assert!(r.next_apply(NOW).is_some());
}

#[test]
fn a_cancelled_read_is_answered_once_and_holds_up_nothing_unless_it_is_at_work() {
    let mut r = promised();
    let read = |id| ToAgent::Read { id, what: ReadKind::Data, offset: 0, length: 512 };
    let cancelled = |id, applied| {
        let outcome = ReadOutcome::Cancelled;
        (1, ToEngine::ReadDone { id, applied: Seq(applied), outcome })
    };
    r.handle(NOW, 1, read(6));
    append(&mut r, 1, 0);
    r.handle(NOW, 1, read(7));
    write_group(&mut r);
    said(&mut r);
    for id in [7, 7, 99] {
        r.handle(NOW, 1, ToAgent::CancelRead { id });
    }
    assert_eq!(said(&mut r), [cancelled(7, 0)], "it waited for a record");
    let at_work = r.next_read().unwrap();
    r.handle(NOW, 1, ToAgent::CancelRead { id: 6 });
    assert!(said(&mut r).is_empty() && r.next_apply(NOW).is_none(), "it is at work");
    r.read_done(at_work, ReadOutcome::Failed);
    assert_eq!(said(&mut r).len(), 1);
    apply(&mut r);
    r.handle(NOW, 1, read(8));
    append(&mut r, 2, 0);
    write_group(&mut r);
    said(&mut r);
    r.handle(NOW, 1, ToAgent::CancelRead { id: 8 });
    assert_eq!(said(&mut r), [cancelled(8, 1)], "it was ready");
    assert!(r.next_apply(NOW).is_some());
}

#[test]
fn a_prefetch_waits_for_nothing_and_holds_up_nothing() {
    let mut r = promised();
    append(&mut r, 1, 0);
    r.handle(NOW, 1, ToAgent::Read { id: 7, what: ReadKind::Prefetch, offset: 0, length: BLOCK });
    let prefetch = r.next_read().unwrap();
    write_group(&mut r);
    apply(&mut r);
    said(&mut r);
    r.read_done(prefetch, ReadOutcome::Prefetched);
    let done = ToEngine::ReadDone { id: 7, applied: Seq(1), outcome: ReadOutcome::Prefetched };
    assert_eq!(said(&mut r), [(1, done)]);
}

#[test]
fn a_scrub_is_of_its_place_in_the_order_though_later_records_could_be_applied_with_earlier_ones() {
    let scrub = ToAgent::Read { id: 7, what: ReadKind::Scrub, offset: 0, length: 2 * BLOCK };
    let mut r = promised();
    append(&mut r, 1, 0);
    append(&mut r, 2, 3 * BLOCK);
    r.handle(NOW, 1, scrub);
    append(&mut r, 3, 3 * BLOCK);
    append(&mut r, 4, BLOCK);
    append(&mut r, 5, 3 * BLOCK);
    write_group(&mut r);
    assert!(r.next_read().is_none(), "it must show record 1");
    let applied = |job: Option<ApplyJob>| match job.map(|job| job.changes) {
        Some(Changes::Records(records)) => records.iter().map(|r| r.seq().0).collect(),
        other => panic!("records are due, not {other:?}"),
    };
    let first: Vec<u64> = applied(r.next_apply(NOW));
    assert_eq!(first, [1, 2, 3], "record 4 would show, and nothing overtakes it");
    r.apply_done(NOW, Ok(()));
    assert!(r.next_apply(NOW).is_none(), "the scrub may begin at any moment");
    let read = r.next_read().expect("what it must show is applied");
    r.handle(NOW, 1, ToAgent::Read { id: 8, what: ReadKind::Data, offset: 3 * BLOCK, length: BLOCK });
    assert!(r.next_apply(NOW).is_none(), "the scrub is at work");
    r.read_done(read, ReadOutcome::Failed);
    assert_eq!(applied(r.next_apply(NOW)), [4, 5]);
}

#[test]
fn records_do_not_wait_for_the_scrub_of_a_session_that_is_gone() {
    let mut r = promised();
    append(&mut r, 1, 0);
    r.handle(NOW, 1, ToAgent::Read { id: 7, what: ReadKind::Scrub, offset: 0, length: BLOCK });
    append(&mut r, 2, 0);
    write_group(&mut r);
    r.close_session(1);
    let Some(Changes::Records(records)) = r.next_apply(NOW).map(|job| job.changes) else { panic!("records are due") };
    assert_eq!(records.len(), 2);
}

#[test]
fn a_scrub_of_parts_of_blocks_is_refused() {
    for (offset, length) in [(512, BLOCK), (0, BLOCK + 1)] {
        let mut r = promised();
        r.handle(NOW, 1, ToAgent::Read { id: 7, what: ReadKind::Scrub, offset, length });
        assert!(matches!(said(&mut r)[..], [(1, ToEngine::Refused(_))]), "{offset}+{length}");
    }
}

#[test]
fn nothing_longer_is_read_than_one_answer_may_cost() {
    for what in [ReadKind::Data, ReadKind::Extents, ReadKind::Prefetch, ReadKind::Scrub] {
        for (offset, length) in [(0, 0), (0, what.bytes_max() + 1), (1 << 20, 1), (u64::MAX, 1), (1, u64::MAX)] {
            let mut r = promised();
            r.handle(NOW, 1, ToAgent::Read { id: 7, what, offset, length });
            assert!(matches!(said(&mut r)[..], [(1, ToEngine::Refused(_))]), "{what:?} {offset}+{length}");
            assert!(r.next_read().is_none());
        }
    }
}

#[test]
fn a_full_journal_goes_on_once_records_are_stable_and_a_checkpoint_gave_them_up() {
    let mut r = promised();
    let mut seq = 0;
    loop {
        seq += 1;
        r.handle(NOW, 1, write_at(1, seq, 0, 2 * BLOCK));
        if r.next_group().is_none() {
            break;
        }
        r.group_done(GroupOutcome::Durable);
        apply(&mut r);
    }
    let durable = r.durable();
    write_superblock(&mut r);
    assert!(r.next_group().is_none(), "other members may need the records yet");
    r.handle(NOW, 1, ToAgent::Stable { seq: durable.seq });
    let job = r.next_metadata(NOW).unwrap();
    assert!(job.sync_image && job.superblock.checkpoint == durable);
    assert!(r.next_group().is_none(), "the superblock that gives them up is not durable yet");
    r.metadata_done(NOW, &job, Ok(()));
    assert_eq!(r.next_group().unwrap().records[0].seq(), Seq(seq));
}

#[test]
fn a_group_is_made_smaller_where_room_is_short() {
    let mut r = promised();
    for seq in 1..=9 {
        r.handle(NOW, 1, write_at(1, seq, 1, 2 * BLOCK));
        write_group(&mut r);
    }
    assert_eq!(r.ring.capacity() - r.ring.used_bytes(), 4 * BLOCK);
    for seq in 10..=11 {
        r.handle(NOW, 1, write_at(1, seq, 1, 2 * BLOCK));
    }
    assert_eq!(r.next_group().unwrap().records.len(), 1, "both together take five blocks");
}

#[test]
fn a_failed_durable_write_poisons_for_good() {
    let mut r = promised();
    append(&mut r, 1, 0);
    write_group(&mut r);
    let job = r.next_apply(NOW).unwrap();
    append(&mut r, 2, BLOCK);
    r.next_group().unwrap();
    r.group_done(GroupOutcome::Failed);
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Unusable));
    assert_eq!(job.changes.ranges().len(), 1);
    r.apply_done(NOW, Ok(()));
    assert_eq!(r.condition(), Condition::Poisoned, "what still ends well heals nothing");
    assert!(r.next_group().is_none() && r.next_metadata(NOW).is_none() && r.next_apply(NOW).is_none());
}

#[test]
fn a_full_disk_is_told_and_tried_again_with_blocks_in_doubt() {
    let mut r = promised();
    append(&mut r, 1, 0);
    write_group(&mut r);
    said(&mut r);
    r.next_apply(NOW).unwrap();
    r.apply_done(NOW, Err(JobError::NoSpace));
    assert_eq!(said(&mut r), [(1, ToEngine::Condition(Condition::NoSpace))]);
    assert!(r.next_apply(NOW).is_none(), "not at once");
    let later = NOW + NO_SPACE_RETRY;
    assert_eq!(r.next_apply(later).unwrap().trust, Trust::InDoubt);
    r.apply_done(later, Ok(()));
    assert_eq!(said(&mut r), [(1, ToEngine::Condition(Condition::Healthy))]);
}

#[test]
fn a_close_applies_what_is_durable_and_marks_the_replica_clean() {
    let mut r = promised();
    append(&mut r, 1, 0);
    r.next_group().unwrap();
    append(&mut r, 2, BLOCK);
    r.close();
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Unusable));
    r.group_done(GroupOutcome::Durable);
    assert!(r.next_group().is_none(), "what was only received is forgotten");
    assert!(r.next_metadata(NOW).is_none(), "something is not applied yet");
    apply(&mut r);
    let last = write_superblock(&mut r);
    assert!(last.clean && last.checkpoint.seq == Seq(1) && r.is_closed());
    r.open_session(2, B, NOW);
    assert_eq!(refusal(&said(&mut r), 2), Some(RefusedReason::Unusable));
}

#[test]
fn a_group_that_was_taken_back_leaves_no_superblock_that_points_elsewhere() {
    let mut r = promised();
    // 15 groups of two blocks: one block is left at the end of the ring of 31.
    for seq in 1..=15 {
        append(&mut r, seq, 0);
        write_group(&mut r);
    }
    apply(&mut r);
    r.handle(NOW, 1, ToAgent::Stable { seq: Seq(14) });
    r.checkpoint_due = true;
    write_superblock(&mut r);
    assert_eq!(r.superblock().tail.seq, Seq(15));
    // A small write and a large one that can be an intent: two blocks, so they go to the beginning of the ring.
    append(&mut r, 16, 0);
    r.handle(NOW, 1, write_at(1, 17, 8 * BLOCK, 2 * BLOCK));
    let group = r.next_group().unwrap();
    assert_eq!((group.offset, group.intents.len(), group.records.len()), (0, 1, 2));
    // Meanwhile a checkpoint gives up all that there is.
    r.handle(NOW, 1, ToAgent::Stable { seq: Seq(15) });
    r.checkpoint_due = true;
    write_superblock(&mut r);
    // A new engine comes, and the group is not begun for want of room in the image.
    r.open_session(2, B, NOW);
    r.handle(NOW, 2, promise(2, B));
    r.group_done(GroupOutcome::NotBegun);
    let tail = write_superblock(&mut r).tail;
    assert_eq!(r.durable().seq, Seq(15));
    let position = Position { epoch: Epoch(2), seq: Seq(16) };
    let range = ByteRange { offset: 0, length: 512 };
    r.handle(NOW, 2, ToAgent::Append(Record::new(position, RecordKind::Write, range, vec![1; 512].into())));
    let group = r.next_group().unwrap();
    assert_eq!(group.records[0].seq(), tail.seq);
    assert_eq!(group.offset, tail.offset, "where the superblock says that it is");
}

#[test]
fn places_up_to_which_nothing_is_settled_belong_to_the_log_that_is_left() {
    let mut r = replica();
    r.superblock.unsettled_seq = Seq(100);
    r.superblock.promised = Epoch(1);
    let begin = protocol::message::Begin {
        position: Position { epoch: Epoch(1), seq: Seq(60) },
        size_bytes: 1 << 20,
        views: r.superblock.views.clone(),
        history: EpochHistory::default(),
        acks: AckPolicies { write: protocol::AckPolicy::First, flush: protocol::AckPolicy::First },
        tracked: Vec::new(),
    };
    let job = r.begin_job(&begin, r.superblock.clone());
    let mut superblock = job.superblock;
    // Later, as a member, it is brought up with an amended record.
    superblock.syncing = false;
    let position = Position { epoch: Epoch(2), seq: Seq(70) };
    let mut amended =
        Record::new(position, RecordKind::Write, ByteRange { offset: 0, length: BLOCK }, vec![0; 4096].into()).header;
    amended.amended = true;
    note_settled(&mut superblock, &amended);
    assert_eq!(superblock.unsettled, [ByteRange { offset: 0, length: BLOCK }]);
}
