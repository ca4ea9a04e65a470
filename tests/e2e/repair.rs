//! Blocks that go bad under a running volume: clients read what they wrote, and the block is made good in place.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::nbd::Client;
use crate::plan::Plan;
use crate::scratch;
use crate::status::http_get;

const LIMIT: Duration = Duration::from_secs(60);
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 64;

/// What a block holds.
fn content(block: u64) -> Vec<u8> {
    vec![block as u8 + 1; BLOCK as usize]
}

/// A cluster whose replicas all have so many blocks in their images.
fn written(read: &'static str) -> (Cluster, Client) {
    let cluster = Cluster::serving(Plan { read, ..Plan::default() });
    let mut client = cluster.connect();
    for block in 0..BLOCKS {
        client.write(block * BLOCK, &content(block), 0).expect("a write");
    }
    for name in cluster.names() {
        cluster.wait_caught_up(name);
        scratch::wait_until("the image holds what was written", LIMIT, || {
            (0..BLOCKS).all(|block| on_disk(&cluster.agent(name).image(), block) == content(block))
        });
    }
    (cluster, client)
}

fn on_disk(image: &Path, block: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK as usize];
    File::open(image).and_then(|file| file.read_exact_at(&mut bytes, block * BLOCK)).expect("a block of the image");
    bytes
}

/// Flips bits of a byte through the file, so that the page cache has them as well.
fn flip(image: &Path, offset: u64) {
    let file = File::options().read(true).write(true).open(image).expect("the image");
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).expect("a byte of it");
    file.write_all_at(&[byte[0] ^ 0x24], offset).expect("a flipped bit");
}

#[test]
fn a_flipped_bit_is_never_seen_and_is_repaired_in_the_image() {
    let _turn = scratch::shared_machine();
    let (mut cluster, mut client) = written("adaptive");
    let image = cluster.agent("a").image();
    let bad = [3, 17, 40];
    for block in bad {
        flip(&image, block * BLOCK + 1234);
    }
    // Any member may be asked; all of them are before long.
    scratch::wait_until("all of them are found", LIMIT, || {
        for block in 0..BLOCKS {
            assert_eq!(client.read(block * BLOCK, BLOCK as u32).expect("a read"), content(block));
        }
        cluster.status().replica("a").repaired_blocks == bad.len() as u64
    });
    scratch::wait_until("they are good on disk", LIMIT, || {
        bad.into_iter().all(|block| on_disk(&image, block) == content(block))
    });
    let status = cluster.status();
    assert_eq!((status.replica("a").checksum_errors, status.replica("a").repaired_blocks), (3, 3));
    assert!(["b", "c"].into_iter().all(|name| status.replica(name).checksum_errors == 0));
    assert_eq!(status.view, ["a", "b", "c"]);
    for block in bad {
        cluster.assert_event(&["a: ", &format!("the block at byte {}", block * BLOCK), "does not match its checksum"]);
        cluster.assert_event(&["a: ", &format!("the block at byte {}", block * BLOCK), "is good again"]);
    }
    let metrics = http_get(cluster.admin_port, "/metrics").expect("metrics");
    for name in ["nbdcast_replica_checksum_errors_total", "nbdcast_replica_repaired_blocks_total"] {
        let line = format!("{name}{{volume=\"vol0\",replica=\"a\"}} 3");
        assert!(metrics.contains(&line), "no {line} in {metrics}");
    }
    client.disconnect();
    cluster.end_well();
}

#[test]
fn a_block_that_is_bad_on_all_replicas_fails_alone_until_it_is_written() {
    let _turn = scratch::shared_machine();
    let (mut cluster, mut client) = written("adaptive");
    for name in cluster.names() {
        flip(&cluster.agent(name).image(), 7 * BLOCK + 99);
    }
    for block in 0..BLOCKS {
        let read = client.read(block * BLOCK, BLOCK as u32);
        match block {
            7 => assert!(read.is_err(), "an error of the disk, and never wrong bytes"),
            _ => assert_eq!(read.expect("its neighbours are read"), content(block)),
        }
    }
    cluster.assert_event(&[&format!("no member has a good copy of the block at byte {}", 7 * BLOCK)]);
    client.write(7 * BLOCK, &content(7), 0).expect("a write");
    assert_eq!(client.read(7 * BLOCK, BLOCK as u32).expect("a read"), content(7));
    scratch::wait_until("it is good everywhere", LIMIT, || {
        cluster.status().replicas.iter().all(|r| (r.checksum_errors, r.repaired_blocks) == (1, 1))
    });
    client.disconnect();
    cluster.end_well();
}

/// Puts one block in the place of another, with its checksum, as a disk does that mixes up where it writes. The agent must
/// not run.
fn misplace(replica: &Path, from: u64, to: u64) {
    for (name, bytes) in [("image.raw", BLOCK), ("checksums", 4)] {
        let file = File::options().read(true).write(true).open(replica.join(name)).expect("a file of the replica");
        let mut content = vec![0; bytes as usize];
        file.read_exact_at(&mut content, from * bytes).expect("a block of it");
        file.write_all_at(&content, to * bytes).expect("another block of it");
        file.sync_all().expect("another block of it");
    }
}

#[test]
fn a_write_that_a_disk_put_elsewhere_is_found_by_comparing_and_repaired() {
    let _turn = scratch::shared_machine();
    let (mut cluster, mut client) = written("verify");
    cluster.agent_mut("c").stop();
    misplace(&cluster.agent("c").replica(), 9, 4);
    cluster.agent_mut("c").start();
    cluster.wait_caught_up("c");
    for block in 0..BLOCKS {
        assert_eq!(client.read(block * BLOCK, BLOCK as u32).expect("a read"), content(block), "block {block}");
    }
    scratch::wait_until("it is repaired", LIMIT, || cluster.status().replica("c").repaired_blocks == 1);
    cluster.assert_event(&["c: ", &format!("the block at byte {}", 4 * BLOCK), "is not what most members hold"]);
    let errors = |name: &str| cluster.status().replica(name).checksum_errors;
    assert_eq!(["a", "b", "c"].map(errors), [0, 0, 1]);
    client.disconnect();
    cluster.end_well();
}

#[test]
fn all_read_policies_answer_what_was_written_while_a_replica_hangs() {
    let _turn = scratch::shared_machine();
    for read in ["adaptive", "hedged", "multicast", "verify"] {
        let (mut cluster, mut client) = written(read);
        cluster.agent("a").process().freeze();
        for block in 0..3 {
            assert_eq!(client.read(block * BLOCK, BLOCK as u32).expect("a read"), content(block), "{read}");
        }
        cluster.agent("a").process().thaw();
        for block in 0..BLOCKS {
            assert_eq!(client.read(block * BLOCK, BLOCK as u32).expect("a read"), content(block), "{read}");
        }
        client.disconnect();
        cluster.end_well();
    }
}
