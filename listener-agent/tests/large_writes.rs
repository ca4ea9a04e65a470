//! A replica with its threads and files, and large writes that go straight to its image: what it gives of them to an engine,
//! and what is left of them when the process dies.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use listener_agent::directory::{self, CHECKSUMS, DIRTY, IMAGE, JOURNAL, NewReplica, SUPERBLOCK};
use listener_agent::host::{Reach, ReplicaHost, Session, SmallReads};
use listener_agent::superblock::Identity;
use protocol::message::{FetchKind, ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::{Epoch, Position, Record, RecordKind, Seq, ToAgent, ToEngine, View, VolumeUuid};

const PATIENCE: Duration = Duration::from_secs(30);
const MIB: u64 = 1 << 20;

struct Engine {
    session: Session,
    heard: mpsc::Receiver<ToEngine>,
}

impl Engine {
    fn of(host: &ReplicaHost, epoch: u64) -> Engine {
        let (said, heard) = mpsc::channel();
        let engine = [7; 16];
        // The last words of a session may come when nobody listens any more.
        let session = host.open_session(engine, Arc::new(move |message| _ = said.send(message)));
        let it = Engine { session, heard };
        it.say(ToAgent::Promise { epoch: Epoch(epoch), engine, lease_ms: 3000 });
        it.wait_for(|said| matches!(said, ToEngine::Promised(_)));
        it
    }

    fn say(&self, message: ToAgent) {
        self.session.send([message], SmallReads::ByThreads);
    }

    fn wait_for(&self, wanted: impl Fn(&ToEngine) -> bool) {
        while !wanted(&self.hear()) {}
    }

    fn hear(&self) -> ToEngine {
        self.heard.recv_timeout(PATIENCE).expect("an answer")
    }

    /// Writes `length` bytes that are all `seq`, and waits until they are durable.
    fn write(&self, seq: u64, offset: u64, length: u64) {
        let position = Position { epoch: Epoch(1), seq: Seq(seq) };
        let payload = vec![seq as u8; length as usize];
        let range = ByteRange { offset, length };
        self.say(ToAgent::Append(Record::new(position, RecordKind::Write, range, payload.into())));
        self.wait_for(|said| *said == ToEngine::Durable { seq: Seq(seq) });
    }

    /// Reads the first block, which waits until everything is applied.
    fn read(&self) -> ReadOutcome {
        self.say(ToAgent::Read { id: 1, what: ReadKind::Data, offset: 0, length: 4096 });
        loop {
            if let ToEngine::ReadDone { outcome, .. } = self.hear() {
                return outcome;
            }
        }
    }
}

fn make(dir: &Path, size_bytes: u64, journal_bytes: u64) -> ReplicaHost {
    let identity = Identity {
        uuid: VolumeUuid([0x5a; 16]),
        volume: "volume".parse().expect("a name"),
        replica: "a".parse().expect("a name"),
        size_bytes,
        journal_bytes,
    };
    let view = View::new(["a", "b"].map(|name| name.parse().expect("a name")).to_vec()).expect("a view");
    directory::create(dir, &NewReplica { identity, view, image: None, syncing: false }).expect("created");
    ReplicaHost::open(dir, Reach::Network).expect("opened")
}

fn place() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("temporary directory")
}

#[test]
fn however_little_of_the_journal_they_take_large_writes_are_given_in_parts() {
    let place = place();
    let host = make(&place.path().join("a"), 16 * MIB, 64 * MIB);
    let engine = Engine::of(&host, 1);
    let count = 40;
    (1..=count).for_each(|seq| engine.write(seq, seq % 16 * MIB, MIB));
    let mut next = Seq(1);
    let mut parts = 0;
    while next <= Seq(count) {
        engine.say(ToAgent::Fetch { from: next, to: Seq(count), what: FetchKind::Records });
        let mut bytes = 0;
        let end = loop {
            match engine.hear() {
                ToEngine::Fetched(record) => bytes += record.payload.len() as u64,
                ToEngine::FetchEnd { next } => break next,
                _ => {}
            }
        };
        assert!(end > next && bytes <= 8 * MIB, "{bytes} bytes of records {next} to {end}");
        (next, parts) = (end, parts + 1);
    }
    assert!(parts >= 5);
}

#[test]
fn a_bad_block_that_was_written_whole_and_then_in_place_is_good_after_a_crash() {
    let place = place();
    let dir = place.path().join("a");
    let host = make(&dir, MIB, 128 << 10);
    let engine = Engine::of(&host, 1);
    engine.write(1, 0, 4096);
    engine.read();
    let image = std::fs::OpenOptions::new().write(true).open(dir.join(IMAGE)).expect("the image");
    image.write_all_at(&[99], 3000).expect("a byte rots");
    // This finds it, and marks the block; the next makes it good.
    engine.write(2, 0, 512);
    assert!(matches!(engine.read(), ReadOutcome::ChecksumMismatch { offset: 0 }));
    engine.write(3, 0, 4096);
    engine.read();
    engine.write(4, 0, 8192);
    engine.write(5, 0, 512);
    engine.read();
    // The process dies: what it has in memory alone is lost.
    let crashed = place.path().join("crashed");
    std::fs::create_dir(&crashed).expect("a directory");
    for name in [SUPERBLOCK, JOURNAL, IMAGE, CHECKSUMS, DIRTY] {
        std::fs::copy(dir.join(name), crashed.join(name)).expect("a copy");
    }
    let opened = ReplicaHost::open(&crashed, Reach::Network).expect("opened");
    let ReadOutcome::Data { data, .. } = Engine::of(&opened, 2).read() else { panic!("the block is good") };
    assert!(data[..512] == [5; 512] && data[512..] == [4; 3584]);
}
