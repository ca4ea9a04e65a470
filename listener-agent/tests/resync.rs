//! A replica with its threads and files, brought back by an engine: from the first message to the last superblock.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use bytes::Bytes;
use listener_agent::directory::{self, IMAGE, NewReplica};
use listener_agent::host::{Reach, ReplicaHost, Session, SmallReads};
use listener_agent::inspect;
use listener_agent::superblock::Identity;
use protocol::checksum::crc32;
use protocol::message::{Begin, Copy};
use protocol::quorum::AckPolicies;
use protocol::ranges::ByteRange;
use protocol::record::Resize;
use protocol::{
    AckPolicy, Epoch, EpochHistory, Position, Record, RecordKind, Seq, ToAgent, ToEngine, View, ViewState, VolumeUuid,
};

const SIZE_BYTES: u64 = 1 << 20;
const GROWN_BYTES: u64 = 2 << 20;
const PATIENCE: Duration = Duration::from_secs(10);

struct Engine {
    session: Session,
    heard: mpsc::Receiver<ToEngine>,
}

impl Engine {
    fn of(host: &ReplicaHost) -> Engine {
        let (said, heard) = mpsc::channel();
        let engine = [7; 16];
        // The last words of a session may come when nobody listens any more.
        let session = host.open_session(engine, Arc::new(move |message| _ = said.send(message)));
        session.send([ToAgent::Promise { epoch: Epoch(1), engine, lease_ms: 3000 }], SmallReads::AtOnce);
        Engine { session, heard }
    }

    fn wait_for(&self, wanted: &dyn Fn(&ToEngine) -> bool) {
        self.wait_for_all(&[wanted]);
    }

    /// Waits until each of these was said, in any order.
    fn wait_for_all(&self, wanted: &[&dyn Fn(&ToEngine) -> bool]) {
        let mut missing = wanted.to_vec();
        while !missing.is_empty() {
            let said = self.heard.recv_timeout(PATIENCE).expect("an answer");
            missing.retain(|wanted| !wanted(&said));
        }
    }

    fn append(&self, seq: u64, kind: RecordKind, range: ByteRange, payload: Bytes) {
        let record = Record::new(Position { epoch: Epoch(1), seq: Seq(seq) }, kind, range, payload);
        self.session.send([ToAgent::Append(record)], SmallReads::AtOnce);
    }
}

fn make(dir: &Path) -> ReplicaHost {
    let identity = Identity {
        uuid: VolumeUuid([5; 16]),
        volume: "v".parse().expect("a name"),
        replica: "c".parse().expect("a name"),
        size_bytes: SIZE_BYTES,
        journal_bytes: SIZE_BYTES,
    };
    let view = View::new(vec!["a".parse().expect("a name")]).expect("a view");
    directory::create(dir, &NewReplica { identity, view, image: None, syncing: true }).expect("created");
    ReplicaHost::open(dir, Reach::Network).expect("opened")
}

fn begin() -> Begin {
    let position = Position { epoch: Epoch(1), seq: Seq(40) };
    let mut history = EpochHistory::default();
    history.note(Position { epoch: Epoch(1), seq: Seq(1) });
    Begin {
        position,
        size_bytes: SIZE_BYTES,
        views: ViewState::initial(View::new(vec!["a".parse().expect("a name")]).expect("a view")),
        history,
        acks: AckPolicies { write: AckPolicy::First, flush: AckPolicy::First },
        tracked: vec![("b".parse().expect("a name"), Seq(12))],
    }
}

#[test]
fn a_new_replica_follows_is_copied_to_grows_and_is_in_sync() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let host = make(dir.path());
    let engine = Engine::of(&host);
    engine.wait_for(&|m| matches!(m, ToEngine::Promised(p) if p.syncing));
    engine.session.send([ToAgent::Begin(begin())], SmallReads::AtOnce);
    engine.wait_for(&|m| *m == ToEngine::Begun);

    let range = |offset, length| ByteRange { offset, length };
    let copy = |id, at, byte: u8| {
        let data = Bytes::from(vec![byte; 65_536]);
        ToAgent::Copy(Copy { id, range: range(at, 65_536), crc: crc32(&data), data })
    };
    engine.append(41, RecordKind::Write, range(0, 512), Bytes::from(vec![1; 512]));
    engine.session.send([copy(1, 0, 2), copy(2, 65_536, 3)], SmallReads::AtOnce);
    engine.append(42, RecordKind::Write, range(65_536, 512), Bytes::from(vec![4; 512]));
    engine.wait_for(&|m| *m == ToEngine::Copied { id: 2 });
    engine.session.send([ToAgent::Extend { size_bytes: GROWN_BYTES }], SmallReads::AtOnce);
    engine.wait_for(&|m| matches!(m, ToEngine::Extended { refused, .. } if refused.is_empty()));
    let nowhere = range(0, 0);
    engine.append(43, RecordKind::Resize, nowhere, Resize { size_bytes: GROWN_BYTES }.encode());
    engine.append(44, RecordKind::Write, range(GROWN_BYTES - 512, 512), Bytes::from(vec![5; 512]));
    engine.session.send([ToAgent::Synced], SmallReads::AtOnce);
    // Being in sync says nothing of records that came after the last copy: each of those is answered for itself.
    engine.wait_for_all(&[&|m| *m == ToEngine::InSync, &|m| *m == ToEngine::Durable { seq: Seq(44) }]);
    assert!(host.close(Instant::now() + PATIENCE), "closed in time");
    drop((engine, host));

    let report = inspect::inspect(dir.path()).expect("it can be inspected");
    assert_eq!((report.syncing, report.size_bytes, report.position.seq), (false, GROWN_BYTES, Seq(44)));
    assert_eq!((report.tracked[0].replica.as_str(), report.tracked[0].dirty_bytes), ("b", SIZE_BYTES + 65_536));
    assert_eq!(inspect::verify(dir.path(), &mut |_, _| {}).expect("it can be verified").bad, []);
    let image = std::fs::read(dir.path().join(IMAGE)).expect("the image");
    assert_eq!((image[0], image[65_535], image[65_536], image[66_048]), (2, 2, 4, 3));
    assert_eq!(image[GROWN_BYTES as usize - 1], 5);
}
