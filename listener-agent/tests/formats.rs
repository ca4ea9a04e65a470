//! What a released version wrote stays readable: the files of two small replicas of each format version, kept in
//! `fixtures/v*/` as text.
//!
//! `crashed` was never checkpointed: its records are in the journal alone, its image and checksums are still zeroes.
//! `clean` was closed in good order. Both hold the same records, so one story is told of both, whatever their version.
//! `in_place`, from version 2 on, crashed after a large write had gone to the image, and nothing else had.
//!
//! When the format version rises, `NBDCAST_WRITE_FIXTURES=1 cargo test -p listener-agent --test formats` writes the
//! fixtures of the new version; those of earlier versions are never written again.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Once, mpsc};
use std::time::{Duration, Instant};

use listener_agent::directory::{self, CHECKSUMS, DIRTY, IMAGE, JOURNAL, NewReplica, SUPERBLOCK};
use listener_agent::host::{Reach, ReplicaHost, SmallReads};
use listener_agent::image::checksum_file_bytes;
use listener_agent::inspect::{self, InspectReport, TrackedReport};
use listener_agent::superblock::{self, FORMAT_VERSION, Identity};
use protocol::quorum::AckPolicies;
use protocol::ranges::{ByteRange, DIRTY_UNIT_BYTES};
use protocol::record::{DirtyChange, DirtyStep, Resize, ViewChange};
use protocol::{AckPolicy, Epoch, Position, Record, RecordKind, Seq, ToAgent, ToEngine, View, VolumeUuid};

const SIZE_BYTES: u64 = 64 * 1024;
/// What the volume is grown to.
const GROWN_BYTES: u64 = 128 * 1024;
const JOURNAL_BYTES: u64 = 128 * 1024;
const PATIENCE: Duration = Duration::from_secs(10);
const BYTES_PER_LINE: usize = 32;

/// The files of a replica and their sizes. A crash came before the volume was grown on disk.
fn files(clean: bool) -> [(&'static str, u64); 5] {
    let size = if clean { GROWN_BYTES } else { SIZE_BYTES };
    let dirty_bytes = if clean { 4096 } else { 0 };
    [
        (SUPERBLOCK, superblock::FILE_BYTES),
        (JOURNAL, JOURNAL_BYTES),
        (IMAGE, size),
        (CHECKSUMS, checksum_file_bytes(size)),
        (DIRTY, dirty_bytes),
    ]
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Offset and bytes of each line that is not all zeroes, in hexadecimal.
fn to_text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (line, chunk) in bytes.chunks(BYTES_PER_LINE).enumerate().filter(|(_, chunk)| chunk.iter().any(|b| *b != 0)) {
        write!(text, "{:08x} ", line * BYTES_PER_LINE).expect("a string takes everything");
        for byte in chunk {
            write!(text, "{byte:02x}").expect("a string takes everything");
        }
        text.push('\n');
    }
    text
}

fn from_text(text: &str, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    for line in text.lines() {
        let (offset, digits) = line.split_once(' ').expect("an offset and bytes");
        let offset = usize::from_str_radix(offset, 16).expect("an offset");
        for (index, pair) in digits.as_bytes().chunks(2).enumerate() {
            let pair = std::str::from_utf8(pair).expect("two digits");
            bytes[offset + index] = u8::from_str_radix(pair, 16).expect("two digits");
        }
    }
    bytes
}

fn names(names: &[&str]) -> View {
    View::new(names.iter().map(|name| name.parse().expect("a name")).collect()).expect("a view")
}

fn payload() -> Vec<u8> {
    (0..600).map(|i| (i % 251) as u8).collect()
}

/// One record of each kind, in order from place 1.
fn records() -> Vec<Record> {
    let name = |name: &str| name.parse().expect("a name");
    let change = ViewChange {
        view: names(&["a", "b"]),
        subject: name("c"),
        acknowledged: Seq(2),
        unacknowledged: vec![ByteRange { offset: 0, length: SIZE_BYTES }],
        forced: false,
    };
    let follow = |ranges| DirtyChange { subject: name("c"), step: DirtyStep::Follow { ranges } };
    let copied =
        DirtyChange { subject: name("c"), step: DirtyStep::Copied { until: DIRTY_UNIT_BYTES, followed: Seq(7) } };
    let forget = DirtyChange { subject: name("d"), step: DirtyStep::Forget };
    let at = |offset, length| ByteRange { offset, length };
    let parts = [
        (
            RecordKind::EpochStart,
            at(0, 0),
            AckPolicies { write: AckPolicy::First, flush: AckPolicy::Majority }.encode().to_vec(),
        ),
        (RecordKind::Write, at(5000, 600), payload()),
        (RecordKind::Write, at(16_384, 600), payload()),
        (RecordKind::Trim, at(16_384, 100), Vec::new()),
        (RecordKind::ViewChange, at(0, 0), change.encode().to_vec()),
        (RecordKind::WriteZeroes, at(5100, 10), Vec::new()),
        (RecordKind::DirtyChange, at(0, 0), follow(vec![at(0, 4096)]).encode().to_vec()),
        (RecordKind::DirtyChange, at(0, 0), copied.encode().to_vec()),
        (RecordKind::DirtyChange, at(0, 0), forget.encode().to_vec()),
        (RecordKind::Resize, at(0, 0), Resize { size_bytes: GROWN_BYTES }.encode().to_vec()),
        (RecordKind::Write, at(GROWN_BYTES - 600, 600), payload()),
    ];
    let record = |(seq, (kind, range, payload)): (u64, (RecordKind, ByteRange, Vec<u8>))| {
        Record::new(Position { epoch: Epoch(1), seq: Seq(seq) }, kind, range, payload.into())
    };
    (1..).zip(parts).map(record).collect()
}

/// The volume as these records leave it.
fn content() -> Vec<u8> {
    let mut bytes = vec![0; GROWN_BYTES as usize];
    bytes[5000..5600].copy_from_slice(&payload());
    bytes[16_384..16_984].copy_from_slice(&payload());
    bytes[16_384..16_484].fill(0);
    bytes[5100..5110].fill(0);
    bytes[GROWN_BYTES as usize - 600..].copy_from_slice(&payload());
    bytes
}

/// Records of which one is journaled as an intent, and one changes a part of what that wrote.
fn records_in_place() -> Vec<Record> {
    let parts = [
        (RecordKind::EpochStart, 0, AckPolicies { write: AckPolicy::First, flush: AckPolicy::All }.encode().to_vec()),
        (RecordKind::Write, 5000, payload()),
        (RecordKind::Write, IN_PLACE, large()),
        (RecordKind::Write, IN_PLACE + 4000, payload()),
    ];
    let record = |(seq, (kind, offset, payload)): (u64, (RecordKind, u64, Vec<u8>))| {
        let length = if kind == RecordKind::Write { payload.len() as u64 } else { 0 };
        let position = Position { epoch: Epoch(1), seq: Seq(seq) };
        Record::new(position, kind, ByteRange { offset, length }, payload.into())
    };
    (1..).zip(parts).map(record).collect()
}

/// Where the large write goes.
const IN_PLACE: u64 = 16_384;

fn large() -> Vec<u8> {
    (0..8192_u32).map(|i| (i * 7 % 241) as u8).collect()
}

/// Makes a replica in `dir`, as this release does, that holds these records durably.
fn make(dir: &Path, records: Vec<Record>, closed_in_good_order: bool) {
    let identity = Identity {
        uuid: VolumeUuid([0x5a; 16]),
        volume: "fixture".parse().expect("a name"),
        replica: "a".parse().expect("a name"),
        size_bytes: SIZE_BYTES,
        journal_bytes: JOURNAL_BYTES,
    };
    let new = NewReplica { identity, view: names(&["a", "b", "c"]), image: None, syncing: false };
    directory::create(dir, &new).expect("created");
    let host = ReplicaHost::open(dir, Reach::Network).expect("opened");
    let (said, heard) = mpsc::channel();
    let engine = [7; 16];
    let session = host.open_session(
        engine,
        Arc::new(move |message| {
            // The last words of a session may come when nobody listens any more.
            let _ = said.send(message);
        }),
    );
    let wait_for = |wanted: &dyn Fn(&ToEngine) -> bool| {
        while !wanted(&heard.recv_timeout(PATIENCE).expect("an answer")) {}
    };
    session.send([ToAgent::Promise { epoch: Epoch(1), engine, lease_ms: 3000 }], SmallReads::AtOnce);
    wait_for(&|message| matches!(message, ToEngine::Promised(_)));
    let last = Seq(records.len() as u64);
    session.send(records.into_iter().map(ToAgent::Append), SmallReads::AtOnce);
    wait_for(&|message| *message == ToEngine::Durable { seq: last });
    if closed_in_good_order {
        assert!(host.close(Instant::now() + PATIENCE), "closed in time");
    }
}

fn write_fixtures() {
    for (story, clean) in [("crashed", false), ("clean", true)] {
        let place = tempfile::tempdir().expect("temporary directory");
        make(place.path(), records(), clean);
        let kept = fixtures().join(format!("v{FORMAT_VERSION}")).join(story);
        fs::create_dir_all(&kept).expect("a directory for the fixture");
        for (name, _) in files(clean) {
            // What a crash leaves in image and checksums is anything between nothing and everything.
            let lost = !clean && (name == IMAGE || name == CHECKSUMS || name == DIRTY);
            let bytes = if lost { Vec::new() } else { fs::read(place.path().join(name)).expect("a file") };
            fs::write(kept.join(name), to_text(&bytes)).expect("a fixture");
        }
    }
    let place = tempfile::tempdir().expect("temporary directory");
    make(place.path(), records_in_place(), false);
    let kept = fixtures().join(format!("v{FORMAT_VERSION}")).join("in_place");
    fs::create_dir_all(&kept).expect("a directory for the fixture");
    for name in [SUPERBLOCK, JOURNAL] {
        let bytes = fs::read(place.path().join(name)).expect("a file");
        fs::write(kept.join(name), to_text(&bytes)).expect("a fixture");
    }
    let mut image = vec![0; SIZE_BYTES as usize];
    image[IN_PLACE as usize..][..large().len()].copy_from_slice(&large());
    fs::write(kept.join(IMAGE), to_text(&image)).expect("a fixture");
    [CHECKSUMS, DIRTY].iter().for_each(|name| fs::write(kept.join(name), "").expect("a fixture"));
}

/// The replica of a fixture, in a directory of its own.
fn replica(fixture: &Path, clean: bool) -> tempfile::TempDir {
    let place = tempfile::tempdir().expect("temporary directory");
    for (name, length) in files(clean) {
        let text = fs::read_to_string(fixture.join(name)).expect("a fixture");
        fs::write(place.path().join(name), from_text(&text, length)).expect("a file");
    }
    place
}

/// The fixtures of all versions; those of this one are written first if that was asked for.
fn versions() -> Vec<PathBuf> {
    static WRITTEN: Once = Once::new();
    WRITTEN.call_once(|| {
        if std::env::var_os("NBDCAST_WRITE_FIXTURES").is_some() {
            write_fixtures();
        }
    });
    let entries = fs::read_dir(fixtures()).expect("the fixtures");
    entries.map(|entry| entry.expect("an entry").path()).filter(|path| path.is_dir()).collect()
}

fn check_report(report: &InspectReport, clean: bool) {
    let last = Position { epoch: Epoch(1), seq: Seq(11) };
    assert_eq!((report.volume.as_str(), report.replica.as_str()), ("fixture", "a"));
    assert_eq!(report.uuid, VolumeUuid([0x5a; 16]).to_string());
    assert_eq!((report.size_bytes, report.position, report.promised), (GROWN_BYTES, last, Epoch(1)));
    assert_eq!((&report.views.view, &report.views.previous), (&names(&["a", "b"]), &names(&["a", "b", "c"])));
    assert_eq!((report.views.seq, report.syncing, report.clean), (Seq(5), false, clean));
    assert_eq!(report.history.entries().len(), 1);
    assert_eq!((report.journal.records, report.journal.changes, report.journal.view_changes), (11, 5, 1));
    let checkpoint = if clean { last } else { Position::default() };
    assert_eq!(report.checkpoint, checkpoint);
    assert_eq!(report.journal.unapplied_records, last.seq.ahead_of(checkpoint.seq));
    let tracked = TrackedReport { replica: "c".to_owned(), acknowledged: Seq(7), dirty_bytes: SIZE_BYTES };
    assert_eq!(report.tracked, [tracked], "the last write");
}

#[test]
fn replicas_of_every_released_version_can_be_read() {
    let versions = versions();
    assert!(versions.iter().any(|path| path.ends_with(format!("v{FORMAT_VERSION}"))), "no fixture of this version");
    for version in versions {
        for (story, clean) in [("crashed", false), ("clean", true)] {
            println!("fixture {} {story}", version.display());
            let place = replica(&version.join(story), clean);
            check_report(&inspect::inspect(place.path()).expect("it can be inspected"), clean);
            let verified = inspect::verify(place.path(), &mut |_, _| {}).expect("it can be verified");
            assert_eq!(verified.bad, []);
            if clean {
                fs::remove_file(place.path().join(DIRTY)).expect("the bitmaps");
                drop(directory::open(place.path()).expect("it can be opened"));
                let report = inspect::inspect(place.path()).expect("it can be inspected");
                assert_eq!(report.tracked, [], "of c nothing is known any more, so it is given everything");
            }

            drop(directory::open(place.path()).expect("it can be opened"));
            assert_eq!(fs::read(place.path().join(IMAGE)).expect("the image"), content());
            let replayed = inspect::verify(place.path(), &mut |_, _| {}).expect("it can be verified");
            assert_eq!(replayed.bad, []);
        }
    }
}

#[test]
fn an_intent_of_every_version_that_has_some_is_found_in_the_image() {
    let versions: Vec<PathBuf> = versions().into_iter().filter(|version| version.join("in_place").exists()).collect();
    assert!(!versions.is_empty());
    for version in versions {
        let place = replica(&version.join("in_place"), false);
        let journal = fs::read(place.path().join(JOURNAL)).expect("the journal");
        assert!(!journal.windows(100).any(|window| window == &large()[..100]), "its bytes are in the image alone");
        let report = inspect::inspect(place.path()).expect("it can be inspected");
        assert_eq!((report.journal.records, report.position.seq), (4, Seq(4)));
        drop(directory::open(place.path()).expect("it can be opened"));
        let image = fs::read(place.path().join(IMAGE)).expect("the image");
        let mut expected = large();
        expected[4000..4600].copy_from_slice(&payload());
        assert!(image[IN_PLACE as usize..][..expected.len()] == expected && image[5000..5600] == payload());
        assert_eq!(inspect::verify(place.path(), &mut |_, _| {}).expect("it can be verified").bad, []);
    }
}

#[test]
fn the_text_form_gives_back_every_byte() {
    let mut bytes = vec![0; 200];
    (bytes[0], bytes[63], bytes[199]) = (1, 255, 16);
    assert_eq!(from_text(&to_text(&bytes), 200), bytes);
}
