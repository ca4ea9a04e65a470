//! A replica that was out of the view, brought back: one story each.

use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use protocol::checksum::crc32;
use protocol::message::{Begin, Condition, Copy, ReadKind, ReadOutcome};
use protocol::quorum::AckPolicies;
use protocol::ranges::{ByteRange, DIRTY_UNIT_BYTES};
use protocol::record::{DirtyChange, DirtyStep, Resize, ViewChange};
use protocol::{
    AckPolicy, EpochHistory, Position, Record, RecordKind, ReplicaName, ToAgent, View, ViewState, VolumeUuid,
};

use super::*;
use crate::carry_out;
use crate::directory::{self, NewReplica};
use crate::disk::ReplicaFiles;
use crate::image::Image;
use crate::journal::{FILE_BYTES_MIN, HEADER_BYTES, group};
use crate::replica::GroupOutcome;
use crate::replica::tests::{
    A, B, BLOCK, NOW, append, apply, promise, promise_given, promised, refusal, said, write_at, write_group,
    write_superblock,
};
use crate::replica::{Changes, JobError, MetadataJob, NO_SPACE_RETRY, RefusedReason, Time};
use crate::superblock::Identity;

const SIZE: u64 = 1 << 20;
const COPY_TIME: Duration = Duration::from_millis(100);

fn name(name: &str) -> ReplicaName {
    name.parse().unwrap()
}

fn at(epoch: u64, seq: u64) -> Position {
    Position { epoch: Epoch(epoch), seq: Seq(seq) }
}

/// Begins anew at a place of epoch 1.
fn begin(seq: u64) -> Begin {
    let mut history = EpochHistory::default();
    history.note(at(1, 1));
    let mut views = ViewState::initial(View::new(vec![name("a"), name("b"), name("c")]).unwrap());
    views.change(View::new(vec![name("b"), name("c")]).unwrap(), false, Seq(2));
    Begin {
        position: at(1, seq),
        size_bytes: SIZE,
        views,
        history,
        acks: AckPolicies { write: AckPolicy::First, flush: AckPolicy::All },
        tracked: vec![(name("a"), Seq(1)), (name("d"), Seq(7))],
    }
}

fn say(r: &mut Replica, message: ToAgent) {
    r.handle(NOW, 1, message);
}

fn copy_message(id: u64, offset: u64, byte: u8) -> ToAgent {
    let range = ByteRange { offset, length: BLOCK };
    let data = Bytes::from(vec![byte; BLOCK as usize]);
    ToAgent::Copy(Copy { id, range, crc: crc32(&data), data })
}

fn record(seq: u64, kind: RecordKind, payload: Bytes) -> ToAgent {
    ToAgent::Append(Record::new(at(1, seq), kind, ByteRange { offset: 0, length: 0 }, payload))
}

/// A replica that follows from record 9 of epoch 1 on.
fn following() -> Replica {
    let mut r = promised();
    say(&mut r, ToAgent::Begin(begin(9)));
    write_superblock(&mut r);
    assert_eq!(said(&mut r), [(1, ToEngine::Begun)]);
    r
}

fn checkpoint(r: &mut Replica, now: Time) {
    let job = r.next_metadata(now).expect("a checkpoint is due");
    assert!(job.sync_image);
    r.metadata_done(now, &job, Ok(()));
}

#[test]
fn beginning_anew_waits_for_what_is_at_work_and_forgets_what_was_only_received() {
    let mut r = promised();
    append(&mut r, 1, 0);
    r.next_group().unwrap();
    append(&mut r, 2, 0);
    say(&mut r, ToAgent::Begin(begin(9)));
    assert!(!r.has_metadata(NOW), "a group is being written");
    r.group_done(GroupOutcome::Durable);
    assert!(r.next_group().is_none());
    let job = r.next_apply(NOW).unwrap();
    assert_eq!(job.changes.ranges().len(), 1);
    assert!(!r.has_metadata(NOW), "it is being applied");
    r.apply_done(NOW, Ok(()));
    said(&mut r);
    let job = r.next_metadata(NOW).unwrap();
    assert_eq!((r.durable(), r.superblock().syncing), (at(1, 1), false), "until it is durable nothing has changed");
    assert!(said(&mut r).is_empty());
    r.metadata_done(NOW, &job, Ok(()));
    assert_eq!(said(&mut r), [(1, ToEngine::Begun)]);
    assert_eq!((r.durable(), r.applied()), (at(1, 9), at(1, 9)));
    append(&mut r, 10, 0);
    write_group(&mut r);
    assert_eq!(said(&mut r), [(1, ToEngine::Durable { seq: Seq(10) })]);
}

#[test]
fn what_it_begins_with_is_what_it_promises_then() {
    let mut r = following();
    assert_eq!(r.tracked(), [(name("d"), Seq(7))], "of itself it keeps nothing");
    r.open_session(2, B, NOW);
    r.handle(NOW, 2, promise(2, B));
    write_superblock(&mut r);
    let said = said(&mut r);
    let promised = promise_given(&said).unwrap();
    assert_eq!((promised.position, promised.syncing, promised.stable), (at(1, 9), true, Seq(0)));
    assert_eq!((promised.journal_first, &promised.views), (Seq(10), &begin(9).views));
    assert_eq!(promised.tracked, [(name("d"), Seq(7))]);
}

#[test]
fn an_engine_that_is_overtaken_does_not_make_the_replica_begin() {
    let mut r = promised();
    say(&mut r, ToAgent::Begin(begin(9)));
    r.open_session(2, B, NOW);
    r.handle(NOW, 2, promise(2, B));
    assert!(!write_superblock(&mut r).syncing);
    assert_eq!(promise_given(&said(&mut r)).unwrap().position, Position::default());
    assert!(!r.has_metadata(NOW));
}

#[test]
fn a_promise_asked_for_meanwhile_tells_the_new_position() {
    let mut r = promised();
    say(&mut r, ToAgent::Begin(begin(9)));
    let job = r.next_metadata(NOW).unwrap();
    r.open_session(2, B, NOW);
    r.handle(NOW, 2, promise(2, B));
    r.metadata_done(NOW, &job, Ok(()));
    assert_eq!(write_superblock(&mut r).promised, Epoch(2));
    let promised = promise_given(&said(&mut r)).unwrap().clone();
    assert_eq!((promised.position, promised.syncing), (at(1, 9), true));
}

#[test]
fn a_begin_that_contradicts_itself_is_refused() {
    type Break = fn(&mut Begin);
    let broken: [Break; 6] = [
        |b| b.position.epoch = Epoch(2),
        |b| b.views.seq = Seq(10),
        |b| b.history.note(at(2, 10)),
        |b| b.size_bytes += 1,
        |b| b.tracked.push((name("d"), Seq(1))),
        |b| b.tracked = (0..=TRACKED_MAX).map(|i| (name(&format!("r{i}")), Seq(1))).collect(),
    ];
    for (i, change) in broken.into_iter().enumerate() {
        let mut r = promised();
        let mut begin = begin(9);
        change(&mut begin);
        say(&mut r, ToAgent::Begin(begin));
        assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Protocol), "case {i}");
    }
    let mut r = promised();
    say(&mut r, ToAgent::Begin(begin(9)));
    append(&mut r, 1, 0);
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Protocol), "no record before it has begun");
}

#[test]
fn copies_are_applied_between_the_records_around_them() {
    let mut r = following();
    append(&mut r, 10, 0);
    say(&mut r, copy_message(1, 0, 1));
    say(&mut r, copy_message(2, 2 * BLOCK, 2));
    append(&mut r, 11, 0);
    assert!(r.next_apply(NOW).is_none(), "the record before is not durable");
    write_group(&mut r);
    for expected in [1, 2, 1] {
        assert_eq!(r.next_apply(NOW).unwrap().changes.ranges().len(), expected);
        r.apply_done(NOW, Ok(()));
    }
    assert_eq!(r.applied(), at(1, 11));
}

#[test]
fn a_read_sees_the_copy_before_it_and_a_copy_waits_for_the_read_of_its_block() {
    let mut r = following();
    say(&mut r, ToAgent::Read { id: 7, what: ReadKind::Data, offset: 0, length: 512 });
    say(&mut r, copy_message(1, 0, 1));
    say(&mut r, ToAgent::Read { id: 8, what: ReadKind::Data, offset: 512, length: 512 });
    let first = r.next_read().unwrap();
    assert_eq!(first.id, 7);
    assert!(r.next_read().is_none() && r.next_apply(NOW).is_none());
    r.read_done(first, ReadOutcome::Failed);
    apply(&mut r);
    assert_eq!(r.next_read().unwrap().id, 8);
}

#[test]
fn copies_are_durable_by_a_checkpoint_that_began_after_them() {
    let mut r = following();
    say(&mut r, copy_message(3, 0, 1));
    say(&mut r, copy_message(5, BLOCK, 1));
    apply(&mut r);
    assert!(!r.has_metadata(NOW));
    assert_eq!(r.metadata_due_at(), Some(NOW + COPY_TIME));
    let job = r.next_metadata(NOW + COPY_TIME).unwrap();
    say(&mut r, copy_message(6, 0, 1));
    apply(&mut r);
    r.metadata_done(NOW + COPY_TIME, &job, Ok(()));
    assert_eq!(said(&mut r), [(1, ToEngine::Copied { id: 5 })]);
    checkpoint(&mut r, NOW + 3 * COPY_TIME);
    assert_eq!(said(&mut r), [(1, ToEngine::Copied { id: 6 })]);
    for id in 7..=7 + 1024 {
        say(&mut r, copy_message(id, 0, 1));
    }
    while r.has_apply(NOW) {
        apply(&mut r);
    }
    assert!(r.has_metadata(NOW), "so many do not wait");
}

#[test]
fn copies_of_an_engine_that_is_gone_are_dropped_and_told_to_nobody() {
    let mut r = following();
    append(&mut r, 10, 0);
    write_group(&mut r);
    apply(&mut r);
    say(&mut r, copy_message(1, 0, 1));
    r.next_apply(NOW).unwrap();
    say(&mut r, copy_message(2, 0, 1));
    said(&mut r);
    r.open_session(2, A, NOW);
    r.handle(NOW, 2, promise(1, A));
    write_superblock(&mut r);
    r.apply_done(NOW, Ok(()));
    assert!(!r.has_apply(NOW));
    checkpoint(&mut r, NOW + 10 * COPY_TIME + Duration::from_secs(5));
    assert!(!said(&mut r).iter().any(|(_, m)| matches!(m, ToEngine::Copied { .. })));
    r.handle(NOW, 2, copy_message(1, 0, 1));
    assert!(r.has_apply(NOW), "the next engine counts from where it likes");
}

#[test]
fn it_is_in_sync_only_when_every_copy_is_durable() {
    let mut r = following();
    say(&mut r, copy_message(1, 0, 1));
    apply(&mut r);
    checkpoint(&mut r, NOW + COPY_TIME);
    said(&mut r);
    say(&mut r, ToAgent::Synced);
    let job = r.next_metadata(NOW).unwrap();
    assert!(!job.superblock.syncing && r.superblock().syncing);
    r.metadata_done(NOW, &job, Ok(()));
    assert_eq!(said(&mut r), [(1, ToEngine::InSync)]);
    say(&mut r, copy_message(2, 0, 1));
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Protocol), "it takes no copies any more");

    let mut r = following();
    say(&mut r, copy_message(1, 0, 1));
    apply(&mut r);
    say(&mut r, ToAgent::Synced);
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Protocol));
}

#[test]
fn copies_that_make_no_sense_are_refused() {
    let data = Bytes::from(vec![1; BLOCK as usize]);
    let copy = |id, offset, length| {
        ToAgent::Copy(Copy { id, range: ByteRange { offset, length }, data: data.clone(), crc: crc32(&data) })
    };
    for (i, bad) in
        [copy(2, SIZE, BLOCK), copy(2, 512, BLOCK), copy(2, 0, 2 * BLOCK), copy(1, 0, BLOCK)].iter().enumerate()
    {
        let mut r = following();
        say(&mut r, copy(1, 0, BLOCK));
        say(&mut r, bad.clone());
        assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Protocol), "case {i}");
    }
    let mut r = promised();
    say(&mut r, copy(1, 0, BLOCK));
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Protocol), "it is not syncing");
}

#[test]
fn a_full_disk_holds_up_copies_and_is_no_matter_once_nobody_wants_them() {
    let mut r = following();
    say(&mut r, copy_message(1, 0, 1));
    r.next_apply(NOW).unwrap();
    r.apply_done(NOW, Err(JobError::NoSpace));
    assert_eq!(said(&mut r), [(1, ToEngine::Condition(Condition::NoSpace))]);
    assert!(
        matches!(r.next_apply(NOW + NO_SPACE_RETRY).unwrap().changes, Changes::Copies(copies) if copies.len() == 1)
    );
    r.close_session(1);
    r.apply_done(NOW, Err(JobError::NoSpace));
    assert_eq!(r.condition(), Condition::Healthy);
    assert!(!r.has_apply(NOW + 2 * NO_SPACE_RETRY));
}

#[test]
fn a_checkpoint_without_space_is_tried_again_with_all_its_pages() {
    let mut r = promised();
    let view = View::new(vec![name("a")]).unwrap();
    let unacknowledged = vec![ByteRange { offset: 0, length: DIRTY_UNIT_BYTES }];
    let change = ViewChange { view, subject: name("b"), acknowledged: Seq(0), unacknowledged, forced: false };
    say(&mut r, record(1, RecordKind::ViewChange, change.encode()));
    write_group(&mut r);
    apply(&mut r);
    said(&mut r);
    let later = NOW + Duration::from_secs(5);
    let job = r.next_metadata(later).unwrap();
    let before = r.superblock().clone();
    r.metadata_done(later, &job, Err(JobError::NoSpace));
    assert_eq!(said(&mut r), [(1, ToEngine::Condition(Condition::NoSpace))]);
    assert_eq!(*r.superblock(), before);
    assert!(!r.has_metadata(later), "not at once");
    let again = r.next_metadata(later + NO_SPACE_RETRY).unwrap();
    assert_eq!((again.dirty_pages.len(), &again.dirty_pages), (1, &job.dirty_pages));
    r.metadata_done(later, &again, Ok(()));
    assert_eq!(said(&mut r), [(1, ToEngine::Condition(Condition::Healthy))]);
    assert_eq!((r.superblock().tracked.len(), r.superblock().tracked_seq), (1, Seq(1)));
}

#[test]
fn members_list_what_is_lacked_and_keep_account_by_the_records() {
    let mut r = promised();
    let follow = DirtyChange { subject: name("b"), step: DirtyStep::Follow { ranges: vec![] } };
    say(&mut r, record(1, RecordKind::DirtyChange, follow.encode()));
    say(&mut r, ToAgent::ListDirty { subject: name("b"), from: 0 });
    write_group(&mut r);
    let copied = DirtyStep::Copied { until: DIRTY_UNIT_BYTES, followed: Seq(1) };
    say(&mut r, record(2, RecordKind::DirtyChange, DirtyChange { subject: name("b"), step: copied }.encode()));
    write_group(&mut r);
    said(&mut r);
    say(&mut r, ToAgent::ListDirty { subject: name("b"), from: 0 });
    let said = said(&mut r);
    let [(1, ToEngine::Dirty(dirty))] = &said[..] else { panic!("{said:?}") };
    let rest = ByteRange { offset: DIRTY_UNIT_BYTES, length: SIZE - DIRTY_UNIT_BYTES };
    assert_eq!((&dirty.ranges[..], dirty.next, dirty.remaining_bytes), (&[rest][..], SIZE, rest.length));
    assert_eq!(r.tracked(), [(name("b"), Seq(1))]);
}

#[test]
fn a_volume_grows_for_the_records_behind_the_resize_and_never_shrinks() {
    let mut r = promised();
    let resize = |seq, size_bytes| record(seq, RecordKind::Resize, Resize { size_bytes }.encode());
    say(&mut r, resize(1, 2 * SIZE));
    say(&mut r, ToAgent::Read { id: 7, what: ReadKind::Data, offset: SIZE, length: 512 });
    append(&mut r, 2, 2 * SIZE - BLOCK);
    write_group(&mut r);
    assert_eq!(r.size_bytes(), 2 * SIZE);
    assert!(r.next_read().is_none(), "the image is not so large yet");
    let job = r.next_apply(NOW).unwrap();
    assert!(matches!(job.changes, Changes::Grow(Growth { from: SIZE, to }) if to == 2 * SIZE));
    r.apply_done(NOW, Ok(()));
    assert_eq!(r.next_read().unwrap().id, 7);
    apply(&mut r);
    assert_eq!(r.superblock().image_bytes, SIZE);
    checkpoint(&mut r, NOW + Duration::from_secs(5));
    assert_eq!((r.superblock().image_bytes, r.superblock().identity.size_bytes), (2 * SIZE, 2 * SIZE));
    say(&mut r, resize(3, SIZE));
    assert_eq!(refusal(&said(&mut r), 1), Some(RefusedReason::Protocol));
}

#[test]
fn a_growth_that_was_only_received_is_forgotten_with_its_engine() {
    let mut r = promised();
    say(&mut r, record(1, RecordKind::Resize, Resize { size_bytes: 2 * SIZE }.encode()));
    r.open_session(2, B, NOW);
    r.handle(NOW, 2, promise(2, B));
    write_superblock(&mut r);
    r.handle(NOW, 2, write_at(2, 1, SIZE, BLOCK));
    assert_eq!(refusal(&said(&mut r), 2), Some(RefusedReason::Protocol));
}

#[test]
fn room_is_made_or_refused_in_words() {
    let mut r = promised();
    say(&mut r, ToAgent::Extend { size_bytes: SIZE + 1 });
    say(&mut r, ToAgent::Extend { size_bytes: 2 * SIZE });
    let job = r.next_extend().unwrap();
    r.extend_done(job, Err((JobError::NoSpace, "the device is full".to_owned())));
    let refused: Vec<String> = said(&mut r)
        .into_iter()
        .filter_map(|(_, m)| if let ToEngine::Extended { refused, .. } = m { Some(refused) } else { None })
        .collect();
    assert_eq!(refused, ["no volume has 1048577 bytes", "the device is full"]);
}

// ---- on files ------------------------------------------------------------------------------------------------------

/// A replica on files, driven by hand.
struct OnDisk {
    replica: Replica,
    files: ReplicaFiles,
    image: Image,
}

impl OnDisk {
    fn create(dir: &Path) -> OnDisk {
        let identity = Identity {
            uuid: VolumeUuid([3; 16]),
            volume: name("v"),
            replica: name("a"),
            size_bytes: SIZE,
            journal_bytes: FILE_BYTES_MIN,
        };
        let view = View::new(vec![name("a"), name("b"), name("c")]).unwrap();
        directory::create(dir, &NewReplica { identity, view, image: None, syncing: false }).unwrap();
        OnDisk::open(dir)
    }

    fn open(dir: &Path) -> OnDisk {
        let opened = directory::open(dir).unwrap();
        let (files, image, superblock) = (opened.files, opened.image, opened.superblock);
        let replica = Replica::new(superblock, opened.ring, opened.durable, opened.dirty, NOW, false);
        let mut on_disk = OnDisk { replica, files, image };
        on_disk.replica.open_session(1, A, NOW);
        on_disk.replica.handle(NOW, 1, promise(1, A));
        on_disk.work();
        said(&mut on_disk.replica);
        on_disk
    }

    fn write_metadata(&mut self, job: &MetadataJob) {
        carry_out::write_metadata(&self.files, &self.image, job).unwrap();
        self.replica.metadata_done(NOW, job, Ok(()));
    }

    fn write_group(&mut self) -> bool {
        let Some(job) = self.replica.next_group() else { return false };
        let bytes = group::encode(job.salt, job.generation, &job.records).unwrap();
        self.files.journal.write_durable_at(HEADER_BYTES + job.offset, bytes.as_slice()).unwrap();
        self.replica.group_done(GroupOutcome::Durable);
        true
    }

    /// Does everything that can be done now.
    fn work(&mut self) {
        loop {
            if let Some(job) = self.replica.next_metadata(NOW) {
                self.write_metadata(&job);
            } else if let Some(job) = self.replica.next_apply(NOW) {
                carry_out::apply(&self.image, &job).unwrap();
                self.replica.apply_done(NOW, Ok(()));
            } else if !self.write_group() {
                return;
            }
        }
    }

    /// Takes the checkpoint that is due after so many seconds.
    fn checkpoint(&mut self, seconds: u64) {
        let job = self.replica.next_metadata(NOW + Duration::from_secs(seconds)).expect("a checkpoint is due");
        self.write_metadata(&job);
    }

    fn append(&mut self, seq: u64, offset: u64) {
        append(&mut self.replica, seq, offset);
        self.work();
    }

    fn byte(&self, offset: u64) -> u8 {
        self.image.read_verified(ByteRange { offset, length: 1 }).unwrap().expect("checksums match").data[0]
    }
}

#[test]
fn a_crash_before_the_begin_is_durable_leaves_the_replica_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let mut r = OnDisk::create(dir.path());
    (1..=5).for_each(|seq| r.append(seq, seq * BLOCK));
    let mut larger = begin(3);
    larger.size_bytes = 2 * SIZE;
    say(&mut r.replica, ToAgent::Begin(larger));
    let job = r.replica.next_metadata(NOW).unwrap();
    carry_out::prepare_image(&r.image, &job).unwrap();
    drop(r);
    let r = OnDisk::open(dir.path());
    assert_eq!((r.replica.durable(), r.replica.superblock().syncing, r.replica.size_bytes()), (at(1, 5), false, SIZE));
    assert_eq!((1..=5).map(|seq| r.byte(seq * BLOCK)).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
}

#[test]
fn what_was_dropped_is_not_taken_for_what_comes_in_its_place() {
    for records in 0..4 {
        let dir = tempfile::tempdir().unwrap();
        let mut r = OnDisk::create(dir.path());
        // Records 1 to 8 lie in the ring; from 3 on they are another engine's.
        (1..=8).for_each(|seq| r.append(seq, seq * BLOCK));
        say(&mut r.replica, ToAgent::Begin(begin(3)));
        r.work();
        (4..4 + records).for_each(|seq| r.append(seq, 20 * BLOCK));
        drop(r);
        let r = OnDisk::open(dir.path());
        assert_eq!(r.replica.durable(), at(1, 3 + records), "{records} records since");
        assert!(r.replica.superblock().syncing);
        assert_eq!(r.replica.tracked(), [(name("d"), Seq(7))]);
        assert_eq!(r.replica.superblock().history, begin(3).history);
        assert_eq!(u64::from(r.byte(20 * BLOCK)), if records == 0 { 0 } else { 3 + records });
    }
}

#[test]
fn the_account_of_a_replica_in_a_dropped_tail_is_not_taken_for_a_later_one() {
    let dropped = |seq, unit: u64| {
        let view = View::new(vec![name("a"), name("c")]).unwrap();
        let unacknowledged = vec![ByteRange { offset: unit * DIRTY_UNIT_BYTES, length: DIRTY_UNIT_BYTES }];
        let change = ViewChange { view, subject: name("b"), acknowledged: Seq(1), unacknowledged, forced: false };
        record(seq, RecordKind::ViewChange, change.encode())
    };
    let dir = tempfile::tempdir().unwrap();
    let mut r = OnDisk::create(dir.path());
    (1..=3).for_each(|seq| r.append(seq, 0));
    say(&mut r.replica, dropped(4, 1));
    r.work();
    // Both places of the page are written, the second as of record 9.
    r.checkpoint(5);
    (5..=9).for_each(|seq| r.append(seq, 5 * DIRTY_UNIT_BYTES));
    r.checkpoint(10);
    say(&mut r.replica, ToAgent::Begin(Begin { tracked: Vec::new(), ..begin(3) }));
    r.work();
    say(&mut r.replica, dropped(4, 2));
    r.append(5, 0);
    r.checkpoint(15);
    (6..=10).for_each(|seq| r.append(seq, 0));
    r.checkpoint(20);
    let expected = r.replica.dirty.counts();
    let listed = r.replica.dirty.list(&name("b"), 0);
    drop(r);
    let r = OnDisk::open(dir.path());
    assert_eq!(r.replica.dirty.counts(), expected);
    assert_eq!(r.replica.dirty.list(&name("b"), 0), listed);
    assert_eq!(listed.ranges, [ByteRange { offset: 2 * DIRTY_UNIT_BYTES, length: DIRTY_UNIT_BYTES }]);
}

#[test]
fn what_lay_behind_the_end_in_a_dropped_tail_is_not_there_when_the_volume_grows() {
    let dir = tempfile::tempdir().unwrap();
    let mut r = OnDisk::create(dir.path());
    let resize = |seq| record(seq, RecordKind::Resize, Resize { size_bytes: 2 * SIZE }.encode());
    say(&mut r.replica, resize(1));
    r.work();
    r.append(2, SIZE + BLOCK);
    assert_eq!(r.byte(SIZE + BLOCK), 2);
    say(&mut r.replica, ToAgent::Begin(begin(3)));
    r.work();
    assert_eq!(r.replica.size_bytes(), SIZE);
    say(&mut r.replica, resize(4));
    r.write_group();
    drop(r);
    let r = OnDisk::open(dir.path());
    assert_eq!((r.replica.size_bytes(), r.byte(SIZE + BLOCK)), (2 * SIZE, 0));
}
