//! The account of replicas out of the view against a naive one, over crashes at any moment.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use protocol::{Epoch, EpochHistory, Position, View, ViewState, VolumeUuid};

use super::*;
use crate::superblock::{Identity, JournalTail};

const UNIT: u64 = DIRTY_UNIT_BYTES;
/// Two pages and a bit; the last unit is cut short.
const SIZE: u64 = 2 * PAGE_COVERS_BYTES + 5 * UNIT + 8192;
const GROWN: u64 = SIZE + 3 * UNIT;

fn name(name: &str) -> ReplicaName {
    name.parse().unwrap()
}

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange { offset, length }
}

fn superblock() -> Superblock {
    let view = View::new(vec![name("a"), name("b"), name("c")]).unwrap();
    Superblock {
        identity: Identity {
            uuid: VolumeUuid([3; 16]),
            volume: name("v"),
            replica: name("a"),
            size_bytes: SIZE,
            journal_bytes: crate::journal::FILE_BYTES_MIN,
        },
        write_count: 1,
        generation: 1,
        clean: false,
        promised: Epoch(1),
        engine: [0; 16],
        lease_ms: 0,
        syncing: false,
        checkpoint: Position::default(),
        image_bytes: SIZE,
        views: ViewState::initial(view),
        history: EpochHistory::default(),
        acks: None,
        tail: JournalTail { offset: 0, seq: Seq(1), generation: 1 },
        stable: Seq(0),
        tracked: Vec::new(),
        tracked_seq: Seq(0),
        unsettled: Vec::new(),
        unsettled_seq: Seq(0),
    }
}

fn record(seq: u64, kind: RecordKind, at: ByteRange, payload: bytes::Bytes) -> Record {
    Record::new(Position { epoch: Epoch(1), seq: Seq(seq) }, kind, at, payload)
}

fn write(seq: u64, at: ByteRange) -> Record {
    record(seq, RecordKind::Trim, at, bytes::Bytes::new())
}

fn dropped(seq: u64, subject: &str, acknowledged: u64, ranges: &[ByteRange]) -> Record {
    let view = View::new(vec![name("a")]).unwrap();
    let change = ViewChange {
        view,
        subject: name(subject),
        acknowledged: Seq(acknowledged),
        unacknowledged: ranges.to_vec(),
        forced: false,
    };
    record(seq, RecordKind::ViewChange, range(0, 0), change.encode())
}

fn added(seq: u64, subject: &str) -> Record {
    let view = View::new(vec![name("a"), name(subject)]).unwrap();
    let change =
        ViewChange { view, subject: name(subject), acknowledged: Seq(0), unacknowledged: vec![], forced: false };
    record(seq, RecordKind::ViewChange, range(0, 0), change.encode())
}

fn step(seq: u64, subject: &str, step: DirtyStep) -> Record {
    let change = DirtyChange { subject: name(subject), step };
    record(seq, RecordKind::DirtyChange, range(0, 0), change.encode())
}

fn resize(seq: u64, size_bytes: u64) -> Record {
    record(seq, RecordKind::Resize, range(0, 0), Resize { size_bytes }.encode())
}

fn maps(records: &[Record]) -> DirtyMaps {
    let mut maps = DirtyMaps::of(&superblock());
    for record in records {
        maps.note(record, 1).unwrap();
    }
    maps
}

fn all_of(maps: &DirtyMaps, subject: &str) -> Vec<ByteRange> {
    let (mut ranges, mut from) = (Vec::new(), 0);
    while from < maps.size_bytes() {
        let part = maps.list(&name(subject), from);
        let listed: u64 = part.ranges.iter().map(|r| r.length).sum();
        let rest = maps.list(&name(subject), part.next).remaining_bytes;
        assert_eq!(part.remaining_bytes, listed + rest, "from {from}");
        ranges.extend(part.ranges);
        from = part.next;
    }
    ranges
}

#[test]
fn a_dropped_replica_lacks_what_it_did_not_acknowledge_and_gets_the_rest_when_it_follows() {
    let mut m = maps(&[dropped(5, "b", 3, &[range(0, UNIT)]), write(6, range(10 * UNIT - 1, 2))]);
    assert_eq!(all_of(&m, "b"), [range(0, UNIT)]);
    assert_eq!(m.counts()[0].dirty_bytes, 3 * UNIT, "recent changes would have to be copied too");
    m.note(&step(7, "b", DirtyStep::Follow { ranges: vec![range(20 * UNIT, UNIT)] }), 1).unwrap();
    assert_eq!(all_of(&m, "b"), [range(0, UNIT), range(9 * UNIT, 2 * UNIT), range(20 * UNIT, UNIT)]);
    assert_eq!(m.acknowledged(), [(name("b"), Seq(3))]);
}

#[test]
fn what_it_may_lose_again_stays_marked_until_it_holds_it_durably() {
    let copied = |seq, until, followed| step(seq, "b", DirtyStep::Copied { until, followed: Seq(followed) });
    let follow = |seq| step(seq, "b", DirtyStep::Follow { ranges: vec![] });
    let mut m = maps(&[dropped(5, "b", 3, &[]), follow(6), write(7, range(0, 1)), copied(8, SIZE, 6)]);
    m.note(&write(9, range(UNIT, 1)), 1).unwrap();
    m.note(&copied(10, SIZE, 7), 1).unwrap();
    let mut back = m.clone();
    back.note(&follow(11), 1).unwrap();
    assert_eq!(all_of(&back, "b"), [range(0, 2 * UNIT)], "7 is in the older ones, 9 in the recent ones");
    m.note(&copied(11, SIZE, 10), 1).unwrap();
    m.note(&follow(12), 1).unwrap();
    assert_eq!(all_of(&m, "b"), [range(UNIT, UNIT)], "7 is there durably; the marks since 8 are older now");
}

#[test]
fn one_of_which_nothing_is_kept_is_given_everything_and_costs_no_memory() {
    let mut m = maps(&[step(5, "x", DirtyStep::Follow { ranges: vec![] })]);
    assert_eq!((all_of(&m, "x"), all_of(&m, "unknown")), (vec![range(0, SIZE)], vec![range(0, SIZE)]));
    assert_eq!(m.list(&name("unknown"), UNIT).ranges, [range(UNIT, SIZE - UNIT)]);
    assert!(m.entries[&name("x")].pages.is_empty());
    m.note(&step(6, "x", DirtyStep::Copied { until: 7 * UNIT, followed: Seq(5) }), 1).unwrap();
    assert_eq!(all_of(&m, "x"), [range(7 * UNIT, SIZE - 7 * UNIT)]);
    m.note(&resize(7, GROWN), 1).unwrap();
    let old_units = SIZE.div_ceil(UNIT) * UNIT;
    assert_eq!(all_of(&m, "x"), [range(7 * UNIT, old_units - 7 * UNIT)], "what is new is clean");
}

#[test]
fn copies_of_a_time_before_the_account_say_nothing() {
    let headers = unknown(&[(name("b"), Seq(3))], Seq(9), 1, SIZE);
    let mut m = DirtyMaps::of(&Superblock { tracked: headers, ..superblock() });
    m.note(&step(10, "b", DirtyStep::Copied { until: SIZE, followed: Seq(8) }), 1).unwrap();
    assert_eq!(all_of(&m, "b"), [range(0, SIZE)], "what record 9 changed may not be there");
    assert_eq!(m.acknowledged(), [(name("b"), Seq(8))]);
    m.note(&step(11, "b", DirtyStep::Copied { until: SIZE, followed: Seq(9) }), 1).unwrap();
    assert_eq!(all_of(&m, "b"), []);
}

#[test]
fn a_page_that_cannot_be_read_may_have_marked_records_on_their_way() {
    let follow = |seq| step(seq, "b", DirtyStep::Follow { ranges: vec![] });
    let mut m = maps(&[dropped(1, "b", 0, &[]), follow(2), write(3, range(0, UNIT))]);
    let mut pages = m.begin_writing(Seq(3));
    m.written();
    let read_back = Superblock { tracked: m.headers(), tracked_seq: Seq(3), ..superblock() };
    pages[0].bytes[100] ^= 1;
    let mut m = DirtyMaps::of(&read_back);
    m.restore(read_back.tracked[0].slot, 0, [&pages[0].bytes, &[0; PAGE_BYTES]], Seq(3));
    m.note(&step(4, "b", DirtyStep::Copied { until: SIZE, followed: Seq(2) }), 1).unwrap();
    m.note(&follow(5), 1).unwrap();
    assert!(all_of(&m, "b").iter().any(|r| r.offset == 0), "record 3 never became durable there");
}

#[test]
fn a_replica_keeps_no_account_of_itself_or_of_members() {
    let follow = |seq, subject| step(seq, subject, DirtyStep::Follow { ranges: vec![] });
    let m = maps(&[dropped(1, "a", 0, &[]), follow(2, "a"), dropped(3, "b", 0, &[]), added(4, "b"), follow(5, "c")]);
    assert_eq!(m.acknowledged(), [(name("c"), Seq(0))]);
    assert!(maps(&[follow(5, "c"), step(6, "c", DirtyStep::Forget)]).acknowledged().is_empty());
}

#[test]
fn the_oldest_account_gives_way_when_there_are_too_many() {
    let records: Vec<Record> = (1..=TRACKED_MAX as u64 + 1).map(|i| dropped(i, &format!("r{i}"), i, &[])).collect();
    let m = maps(&records);
    assert_eq!(m.acknowledged().len(), TRACKED_MAX);
    assert_eq!(all_of(&m, "r1"), [range(0, SIZE)]);
    assert_eq!(all_of(&m, "r2"), []);
}

#[test]
fn a_long_list_comes_in_parts() {
    let ranges: Vec<ByteRange> = (0..3000).map(|i| range(3 * i * UNIT, UNIT)).collect();
    let m = maps(&[dropped(1, "b", 0, &ranges)]);
    let first = m.list(&name("b"), 0);
    assert_eq!((first.ranges.len(), first.next), (Dirty::RANGES_MAX, 3 * Dirty::RANGES_MAX as u64 * UNIT));
    assert_eq!(all_of(&m, "b"), ranges);
    let within = m.list(&name("b"), 3 * UNIT + 100);
    assert_eq!(within.ranges[0], range(3 * UNIT + 100, UNIT - 100));
    assert_eq!(within.remaining_bytes, 2999 * UNIT - 100);
}

// ---- against a naive account ---------------------------------------------------------------------------------------

/// Sets of units per plane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Naive {
    acknowledged: u64,
    id: u64,
    rotated_at: u64,
    planes: [BTreeSet<u64>; 3],
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct NaiveMaps {
    size: u64,
    entries: BTreeMap<String, Naive>,
}

impl NaiveMaps {
    fn units(&self, r: ByteRange) -> BTreeSet<u64> {
        let is_in = |u: &u64| u * UNIT < self.size && r.overlaps(range(u * UNIT, UNIT.min(self.size - u * UNIT)));
        (r.offset / UNIT..).take_while(is_in).collect()
    }

    fn note(&mut self, seq: u64, op: &Op) {
        match op {
            Op::Write(r) => {
                let units = self.units(*r);
                self.entries.values_mut().for_each(|e| e.planes[1].extend(&units));
            }
            Op::Drop(subject, ranges) => {
                let to_copy = ranges.iter().flat_map(|r| self.units(*r)).collect();
                let planes = [to_copy, BTreeSet::new(), BTreeSet::new()];
                let entry = Naive { acknowledged: seq / 2, id: seq, rotated_at: seq, planes };
                self.entries.insert((*subject).to_owned(), entry);
            }
            Op::Add(subject) | Op::Forget(subject) => _ = self.entries.remove(*subject),
            Op::Follow(subject, ranges) => {
                let all = self.units(range(0, self.size));
                let ranges: BTreeSet<u64> = ranges.iter().flat_map(|r| self.units(*r)).collect();
                match self.entries.get_mut(*subject) {
                    Some(e) => {
                        let [to_copy, recent, older] = &mut e.planes;
                        to_copy.extend(std::mem::take(recent).into_iter().chain(std::mem::take(older)).chain(ranges));
                        e.rotated_at = seq;
                    }
                    None => {
                        let planes = [all, BTreeSet::new(), BTreeSet::new()];
                        let entry = Naive { acknowledged: 0, id: seq, rotated_at: seq, planes };
                        self.entries.insert((*subject).to_owned(), entry);
                    }
                }
            }
            Op::Copied(subject, until, behind) => {
                let (size, followed) = (self.size, seq.saturating_sub(*behind));
                let Some(e) = self.entries.get_mut(*subject) else { return };
                e.acknowledged = e.acknowledged.max(followed);
                if followed < e.id {
                    return;
                }
                e.planes[0].retain(|u| *until < size && (u + 1) * UNIT > *until);
                if followed >= e.rotated_at {
                    e.planes[2] = std::mem::take(&mut e.planes[1]);
                    e.rotated_at = seq;
                }
            }
            Op::Grow => self.size = GROWN,
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Write(ByteRange),
    Drop(&'static str, Vec<ByteRange>),
    Add(&'static str),
    Forget(&'static str),
    Follow(&'static str, Vec<ByteRange>),
    /// Until, and how many records behind.
    Copied(&'static str, u64, u64),
    Grow,
}

impl Op {
    fn record(&self, seq: u64) -> Record {
        match self {
            Op::Write(at) => write(seq, *at),
            Op::Drop(subject, ranges) => dropped(seq, subject, seq / 2, ranges),
            Op::Add(subject) => added(seq, subject),
            Op::Forget(subject) => step(seq, subject, DirtyStep::Forget),
            Op::Follow(subject, ranges) => step(seq, subject, DirtyStep::Follow { ranges: ranges.clone() }),
            Op::Copied(subject, until, behind) => {
                let followed = Seq(seq.saturating_sub(*behind));
                step(seq, subject, DirtyStep::Copied { until: *until, followed })
            }
            Op::Grow => resize(seq, GROWN),
        }
    }
}

/// The planes with the solid part, as the naive account has them.
fn planes(maps: &DirtyMaps) -> BTreeMap<String, Naive> {
    let per_page = UNITS_PER_PAGE as u64;
    let entry = |(name, e): (&ReplicaName, &Entry)| {
        let mut planes: [BTreeSet<u64>; 3] = Default::default();
        planes[0].extend(e.solid.clone());
        for (index, page) in &e.pages {
            for (set, plane) in planes.iter_mut().zip(Plane::ALL) {
                let mut bit = page.find(plane, 0, true);
                while bit < UNITS_PER_PAGE {
                    set.insert(index * per_page + bit as u64);
                    bit = page.find(plane, bit + 1, true);
                }
            }
        }
        let (acknowledged, id, rotated_at) = (e.acknowledged.0, e.id.0, e.rotated_at.0);
        (name.to_string(), Naive { acknowledged, id, rotated_at, planes })
    };
    maps.entries.iter().map(entry).collect()
}

/// What happens to the disk.
#[derive(Clone, Debug)]
enum Event {
    Op(Op),
    /// A checkpoint begins, ops follow while it is being written, and it ends well or for want of space.
    Persist {
        meanwhile: Vec<Op>,
        written: bool,
    },
    /// A checkpoint ends in a crash: this page of it is torn, or none, and of the others these are written.
    Crash {
        kept: u64,
        torn: Option<usize>,
    },
}

fn some_range() -> impl Strategy<Value = ByteRange> {
    let edges = [0, PAGE_COVERS_BYTES, 2 * PAGE_COVERS_BYTES, SIZE];
    let near = (0usize..4, 0u64..8 * UNIT, 1..6 * UNIT)
        .prop_map(move |(edge, back, length)| range(edges[edge].saturating_sub(back), length));
    let cut = |r: ByteRange| range(r.offset.min(SIZE - 1), r.length.min(SIZE - r.offset.min(SIZE - 1)));
    prop_oneof![10 => near.prop_map(cut), 1 => Just(range(0, SIZE)), 1 => Just(range(UNIT, 3 * SIZE / 4))]
}

fn some_op() -> impl Strategy<Value = Op> {
    let who = || prop_oneof![Just("b"), Just("c")];
    let wide = prop_oneof![4 => some_range(), 1 => Just(range(0, u64::MAX)), 1 => Just(range(UNIT, u64::MAX - UNIT))];
    let ranges = || proptest::collection::vec(wide.clone(), 0..3);
    let until = prop_oneof![(0..SIZE / UNIT).prop_map(|u| u * UNIT), (0..8u64).prop_map(|u| u * UNIT), Just(SIZE)];
    prop_oneof![
        12 => some_range().prop_map(Op::Write),
        2 => (who(), ranges()).prop_map(|(s, r)| Op::Drop(s, r)),
        1 => who().prop_map(Op::Add),
        1 => who().prop_map(Op::Forget),
        3 => (who(), ranges()).prop_map(|(s, r)| Op::Follow(s, r)),
        8 => (who(), until, 0u64..12).prop_map(|(s, u, b)| Op::Copied(s, u, b)),
        1 => Just(Op::Grow),
    ]
}

fn some_event(torn: bool) -> impl Strategy<Value = Event> {
    let meanwhile = proptest::collection::vec(some_op(), 0..3);
    let tears = prop_oneof![2 => Just(None), 1 => (0usize..4).prop_map(Some)].prop_map(move |t| t.filter(|_| torn));
    prop_oneof![
        12 => some_op().prop_map(Event::Op),
        3 => (meanwhile, proptest::bool::weighted(0.8)).prop_map(|(meanwhile, written)| Event::Persist { meanwhile, written }),
        2 => (proptest::num::u64::ANY, tears).prop_map(|(kept, torn)| Event::Crash { kept, torn }),
    ]
}

/// A replica's disk and what runs on it.
struct World {
    live: DirtyMaps,
    naive: NaiveMaps,
    log: Vec<Op>,
    file: BTreeMap<u64, Vec<u8>>,
    superblock: Superblock,
    torn_ever: bool,
}

impl World {
    fn new() -> World {
        let naive = NaiveMaps { size: SIZE, entries: BTreeMap::new() };
        let (superblock, file) = (superblock(), BTreeMap::new());
        World { live: DirtyMaps::of(&superblock), naive, log: Vec::new(), file, superblock, torn_ever: false }
    }

    fn seq(&self) -> u64 {
        self.log.len() as u64
    }

    fn op(&mut self, op: &Op) {
        self.log.push(op.clone());
        let seq = self.seq();
        self.live.note(&op.record(seq), self.superblock.generation).unwrap();
        self.naive.note(seq, op);
    }

    fn next_superblock(&self) -> Superblock {
        let mut superblock = self.superblock.clone();
        superblock.identity.size_bytes = self.live.size_bytes();
        superblock.tracked = self.live.headers();
        superblock.tracked_seq = Seq(self.seq());
        superblock
    }

    fn persist(&mut self, meanwhile: &[Op], written: bool) {
        let pages = self.live.begin_writing(Seq(self.seq()));
        let superblock = self.next_superblock();
        meanwhile.iter().for_each(|op| self.op(op));
        let held = if written { pages.len() } else { pages.len() / 2 };
        self.file.extend(pages.into_iter().take(held).map(|page| (page.offset, page.bytes)));
        if written {
            self.superblock = superblock;
            self.live.written();
        } else {
            self.live.not_written();
        }
    }

    fn crash(&mut self, kept: u64, torn: Option<usize>) {
        let pages = self.live.begin_writing(Seq(self.seq()));
        for (i, page) in pages.into_iter().enumerate() {
            let mut bytes = self.file.get(&page.offset).cloned().unwrap_or_else(|| vec![0; PAGE_BYTES]);
            if torn == Some(i) {
                bytes[512..2048].copy_from_slice(&page.bytes[512..2048]);
                self.torn_ever = true;
            } else if kept >> (i % 64) & 1 == 1 {
                bytes = page.bytes;
            }
            self.file.insert(page.offset, bytes);
        }
        self.reopen();
    }

    fn reopen(&mut self) {
        self.live = DirtyMaps::of(&self.superblock);
        let zeroes = vec![0; PAGE_BYTES];
        for (slot, index) in self.live.pages() {
            let copies =
                [0, 1].map(|copy| self.file.get(&page_offset(slot, index, copy)).unwrap_or(&zeroes).as_slice());
            self.live.restore(slot, index, copies, self.superblock.tracked_seq);
        }
        let replayed = self.superblock.tracked_seq.0 as usize..self.log.len();
        for seq in replayed {
            self.live.note(&self.log[seq].record(seq as u64 + 1), self.superblock.generation).unwrap();
        }
        self.superblock.generation += 1;
    }

    fn check(&self) {
        let (live, naive) = (planes(&self.live), &self.naive.entries);
        assert_eq!(self.live.size_bytes(), self.naive.size);
        if !self.torn_ever {
            assert_eq!(live, *naive);
        }
        assert!(live.keys().eq(naive.keys()));
        for (subject, naive) in naive {
            let live = &live[subject];
            assert_eq!((live.acknowledged, live.id, live.rotated_at), (naive.acknowledged, naive.id, naive.rotated_at));
            assert!(live.planes[1].is_superset(&naive.planes[1]) && live.planes[2].is_superset(&naive.planes[2]));
            assert!(live.planes[0].is_superset(&naive.planes[0]));
            let listed = all_of(&self.live, subject);
            assert!(listed.windows(2).all(|w| w[0].end() < w[1].offset), "in order and coalesced");
            let units: BTreeSet<u64> = listed.iter().flat_map(|r| self.naive.units(*r)).collect();
            assert_eq!(units, live.planes[0]);
            let any: BTreeSet<u64> = live.planes.iter().flatten().copied().collect();
            let bytes: u64 = any.iter().map(|u| UNIT.min(self.naive.size - u * UNIT)).sum();
            let counts = self.live.counts();
            assert_eq!(counts.iter().find(|c| c.name == name(subject)).unwrap().dirty_bytes, bytes);
        }
    }

    fn live_through(events: &[Event]) {
        let mut world = World::new();
        for event in events {
            match event {
                Event::Op(op) => {
                    world.op(op);
                    continue;
                }
                Event::Persist { meanwhile, written } => world.persist(meanwhile, *written),
                Event::Crash { kept, torn } => world.crash(*kept, *torn),
            }
            world.check();
        }
        world.crash(u64::MAX, None);
        world.check();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn after_any_crash_the_account_is_exactly_that_of_the_log(events in proptest::collection::vec(some_event(false), 1..40)) {
        World::live_through(&events);
    }

    #[test]
    fn after_torn_pages_nothing_is_missing(events in proptest::collection::vec(some_event(true), 1..40)) {
        World::live_through(&events);
    }
}
