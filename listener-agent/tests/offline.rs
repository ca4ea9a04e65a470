//! `verify` and `rebuild-checksums`: what they say of a replica whose image or checksums are damaged, shortened or gone.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use listener_agent::directory::{self, CHECKSUMS, IMAGE, NewReplica};
use listener_agent::image::{Trust, checksum_file_bytes};
use listener_agent::superblock::Identity;
use protocol::ranges::ByteRange;
use protocol::{Epoch, Position, Record, RecordKind, Seq, View, VolumeUuid};

const BLOCK: u64 = 4096;
const SIZE: u64 = 64 << 20;
/// Blocks that hold something.
const WRITTEN: [u64; 5] = [0, 1, 700, 9_000, SIZE / BLOCK - 1];

/// A replica with data in a few blocks and holes between them.
struct Replica {
    place: tempfile::TempDir,
}

impl Replica {
    fn new() -> Replica {
        let place = tempfile::tempdir().expect("a place");
        let identity = Identity {
            uuid: VolumeUuid([1; 16]),
            volume: "v".parse().expect("a name"),
            replica: "a".parse().expect("a name"),
            size_bytes: SIZE,
            journal_bytes: 1 << 20,
        };
        let view = View::new(vec!["a".parse().expect("a name")]).expect("a view");
        let dir = place.path().join("v");
        directory::create(&dir, &NewReplica { identity, view, image: None, syncing: false }).expect("a new replica");
        let opened = directory::open(&dir).expect("it opens");
        for block in WRITTEN {
            let position = Position { epoch: Epoch(1), seq: Seq(1) };
            let range = ByteRange { offset: block * BLOCK, length: BLOCK };
            let payload = vec![(block % 250) as u8 + 1; BLOCK as usize].into();
            let record = Record::new(position, RecordKind::Write, range, payload);
            opened.image.apply(&record, Trust::Verified).expect("it is applied");
        }
        opened.image.write_back().expect("checksums are written");
        Replica { place }
    }

    fn dir(&self) -> PathBuf {
        self.place.path().join("v")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    fn flip(&self, name: &str, offset: u64) {
        let file = File::options().read(true).write(true).open(self.file(name)).expect("a file of the replica");
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).expect("a byte");
        file.write_all_at(&[byte[0] ^ 0x20], offset).expect("a flipped bit");
    }

    /// Exit code, standard output, standard error.
    fn run(&self, words: &[&str]) -> (i32, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_listener-agent"))
            .arg(words[0])
            .arg(self.dir())
            .args(&words[1..])
            .output()
            .expect("the program starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
        (output.status.code().expect("it ended by itself"), text(output.stdout), text(output.stderr))
    }

    fn verified_well(&self) {
        let (code, out, err) = self.run(&["verify"]);
        assert_eq!(code, 0, "{out}{err}");
        assert!(out.contains("16384 blocks, all good"), "{out}");
    }
}

fn bytes_of(path: &Path) -> Vec<u8> {
    fs::read(path).expect("a file of the replica")
}

#[test]
fn every_bad_block_is_named_wherever_its_bit_flipped() {
    let replica = Replica::new();
    replica.verified_well();
    // In data, in a hole of the image, in a checksum, in a hole of the checksums.
    replica.flip(IMAGE, 700 * BLOCK + 4095);
    replica.flip(IMAGE, 3_000 * BLOCK + 5);
    replica.flip(CHECKSUMS, 4 * 9_000 + 3);
    replica.flip(CHECKSUMS, 4 * 12_000);
    let (code, out, err) = replica.run(&["verify"]);
    assert_eq!(code, 1);
    let named: Vec<&str> = out.lines().filter(|line| line.starts_with("bad block at byte ")).collect();
    let expected = [700, 3_000, 9_000, 12_000].map(|b| format!("bad block at byte {} (block {b})", b * BLOCK));
    assert_eq!(named, expected);
    assert!(err.contains("4 of 16384 blocks are bad") && err.contains("remedy: "), "{err}");
}

#[test]
fn more_bad_blocks_than_a_screen_holds_are_all_named() {
    let replica = Replica::new();
    (0..300).for_each(|block| replica.flip(IMAGE, block * BLOCK));
    let (code, out, _) = replica.run(&["verify"]);
    assert_eq!((code, out.lines().count()), (1, 300));
}

#[test]
fn a_checksum_file_that_is_missing_or_short_is_named() {
    let replica = Replica::new();
    let file = File::options().write(true).open(replica.file(CHECKSUMS)).expect("the checksums");
    file.set_len(1000).expect("a short file");
    let (code, _, err) = replica.run(&["verify"]);
    let needed = checksum_file_bytes(SIZE);
    assert!(code == 1 && err.contains(&format!("v/checksums has 1000 bytes where {needed} are needed")), "{err}");
    assert!(err.contains("rebuild-checksums"), "{err}");
    fs::remove_file(replica.file(CHECKSUMS)).expect("it is removed");
    let (code, _, err) = replica.run(&["verify"]);
    assert!(code == 1 && err.contains("v/checksums is missing") && err.contains("rebuild-checksums"), "{err}");
    assert!(!replica.file(CHECKSUMS).exists(), "nothing was made in its place");
}

#[test]
fn a_checksum_file_that_is_too_long_is_said() {
    let replica = Replica::new();
    let file = File::options().write(true).open(replica.file(CHECKSUMS)).expect("the checksums");
    file.set_len(checksum_file_bytes(SIZE) + 4096).expect("a long file");
    let (code, out, _) = replica.run(&["verify"]);
    assert!(code == 0 && out.contains("v/checksums is 4096 bytes longer than needed"), "{out}");
}

#[test]
fn lost_checksums_are_made_anew_as_they_were_and_say_what_is_taken_on_trust() {
    let replica = Replica::new();
    let (checksums, image) = (bytes_of(&replica.file(CHECKSUMS)), bytes_of(&replica.file(IMAGE)));
    for is_short in [false, true] {
        if is_short {
            let file = File::options().write(true).open(replica.file(CHECKSUMS)).expect("the checksums");
            file.set_len(4096).expect("a short file");
        } else {
            fs::remove_file(replica.file(CHECKSUMS)).expect("it is removed");
        }
        let (code, out, err) = replica.run(&["rebuild-checksums"]);
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("taken on trust") && out.contains("nbdcast scrub"), "{out}");
        assert_eq!(out.contains("checksums.old"), is_short, "{out}");
        assert!(bytes_of(&replica.file(CHECKSUMS)) == checksums, "the same as before");
        assert!(bytes_of(&replica.file(IMAGE)) == image, "the image is as it was");
        replica.verified_well();
        directory::open(&replica.dir()).expect("it can be served again");
    }
}

#[test]
fn checksums_that_are_there_are_made_anew_only_if_it_is_said() {
    let replica = Replica::new();
    replica.flip(IMAGE, 700 * BLOCK);
    let before = bytes_of(&replica.file(CHECKSUMS));
    let (code, _, err) = replica.run(&["rebuild-checksums"]);
    assert!(code == 1 && err.contains("checksums is there") && err.contains("--force"), "{err}");
    assert!(bytes_of(&replica.file(CHECKSUMS)) == before);
    let (code, out, _) = replica.run(&["rebuild-checksums", "--force"]);
    assert!(code == 0 && out.contains("checksums.old"), "{out}");
    replica.verified_well();
    assert!(bytes_of(&replica.file("checksums.old")) == before, "the ones before are kept");
}

#[test]
fn a_replica_that_is_served_is_left_alone() {
    let replica = Replica::new();
    fs::remove_file(replica.file(CHECKSUMS)).expect("it is removed");
    let _served = directory::read_superblock(&replica.dir()).expect("its lock");
    for words in [["verify"], ["rebuild-checksums"]] {
        let (code, _, err) = replica.run(&words);
        assert!(code == 1 && err.contains("in use by another process"), "{err}");
    }
}
