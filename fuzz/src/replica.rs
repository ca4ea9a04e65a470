//! A replica whose engines say anything, in any order, while its disk works and time passes: it never panics.

use std::time::Duration;

use bytes::Bytes;
use listener_agent::directory::{self, NewReplica};
use listener_agent::journal::{self, FILE_BYTES_MIN, ring::Ring};
use listener_agent::replica::dirty::DirtyMaps;
use listener_agent::replica::{GroupOutcome, JobError, Replica};
use listener_agent::superblock::{Identity, Superblock};
use protocol::message::ReadOutcome;
use protocol::ranges::ByteRange;
use protocol::{Epoch, Position, Record, RecordKind, ReplicaName, Seq, ToAgent, View, VolumeUuid};

use super::input::Input;

const SIZE_BYTES: u64 = 1 << 20;

fn names() -> Vec<ReplicaName> {
    ["a", "b", "c"].map(|name| name.parse().expect("a name")).to_vec()
}

fn new_replica(syncing: bool) -> Replica {
    let identity = Identity {
        uuid: VolumeUuid([3; 16]),
        volume: "v".parse().expect("a name"),
        replica: names()[0].clone(),
        size_bytes: SIZE_BYTES,
        journal_bytes: FILE_BYTES_MIN,
    };
    let view = View::new(names()).expect("a view");
    let new = directory::first_superblock(&NewReplica { identity, view, image: None, syncing });
    // Opened, but never promised to anybody.
    let superblock = Superblock { write_count: 2, generation: 1, clean: false, ..new };
    let ring = Ring::empty(journal::capacity_bytes(FILE_BYTES_MIN));
    let dirty = DirtyMaps::of(&superblock);
    Replica::new(superblock, ring, Position::default(), dirty, Duration::ZERO, false)
}

pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let mut replica = new_replica(input.u8() % 2 == 1);
    let mut now = Duration::ZERO;
    // What an honest engine would send next.
    let mut next = Position { epoch: Epoch(1), seq: Seq(1) };
    while !input.is_empty() {
        let session = u64::from(input.u8() % 3);
        let engine = [session as u8 + 1; 16];
        match input.u8() % 10 {
            0 => replica.open_session(session, engine, now),
            1 => replica.close_session(session),
            2 => now += Duration::from_millis(input.number().min(100_000)),
            3 => work(&mut replica, now, input.u8()),
            4 => {
                let (number, body, bulk) = input.message();
                if let Ok(message) = ToAgent::decode(number, body, bulk) {
                    replica.handle(now, session, message);
                }
            }
            5 => {
                next.epoch = Epoch(input.number());
                replica.handle(now, session, ToAgent::Promise { epoch: next.epoch, engine, lease_ms: 1000 });
            }
            6 => next.seq = Seq(input.number()),
            7 | 8 => {
                let kind = [RecordKind::Write, RecordKind::Trim, RecordKind::WriteZeroes][usize::from(input.u8() % 3)];
                let (offset, length) = (input.number(), input.number());
                let payload = match kind {
                    RecordKind::Write => Bytes::from(vec![1; length.min(1 << 16) as usize]),
                    _ => Bytes::new(),
                };
                let range = ByteRange { offset, length };
                replica.handle(now, session, ToAgent::Append(Record::new(next, kind, range, payload)));
                next.seq = Seq(next.seq.0.wrapping_add(1));
            }
            _ => {
                let payload_bytes = usize::from(input.u8());
                let payload = Bytes::copy_from_slice(input.take(payload_bytes));
                let kinds =
                    [RecordKind::EpochStart, RecordKind::ViewChange, RecordKind::DirtyChange, RecordKind::Resize];
                let kind = kinds[usize::from(input.u8() % 4)];
                let nowhere = ByteRange { offset: 0, length: 0 };
                replica.handle(now, session, ToAgent::Append(Record::new(next, kind, nowhere, payload)));
                next.seq = Seq(next.seq.0.wrapping_add(1));
            }
        }
        while replica.poll_outbox().is_some() {}
    }
}

/// The disk does what there is to do; some of it fails.
fn work(replica: &mut Replica, now: Duration, outcomes: u8) {
    let outcome = |bit: u8| match outcomes & (1 << bit) {
        0 => Ok(()),
        _ if outcomes & 128 != 0 => Err(JobError::Failed),
        _ => Err(JobError::NoSpace),
    };
    if let Some(job) = replica.next_group() {
        replica.group_done(match outcomes & (32 | 64) {
            0 | 96 => GroupOutcome::Durable,
            32 if job.intents.is_empty() => GroupOutcome::Durable,
            32 => GroupOutcome::NotBegun,
            _ => GroupOutcome::Failed,
        });
    }
    if let Some(job) = replica.next_metadata(now) {
        replica.metadata_done(now, &job, outcome(0));
    }
    if replica.next_apply(now).is_some() {
        replica.apply_done(now, outcome(1));
    }
    if let Some(job) = replica.next_read() {
        replica.read_done(job, ReadOutcome::Failed);
    }
    if let Some(job) = replica.next_fetch() {
        replica.fetch_done(&job, Vec::new());
    }
    if let Some(job) = replica.next_extend() {
        replica.extend_done(job, outcome(2).map_err(|error| (error, "no room".to_owned())));
    }
}
