//! What must be true of the disks once everything is quiet: each replica is exactly the state that its log describes,
//! members hold the same, and that is what clients were told.

use listener_agent::disk::RawFile;
use protocol::checksum::stored_block_checksum;
use protocol::{BLOCK_BYTES, EpochHistory, RecordKind, Seq};

use crate::wild::{position, size};
use crate::world::{World, replica_name};

/// Whether every member of the engine's view has applied everything.
pub fn is_quiet(world: &World, engine: usize) -> bool {
    let now = world.engines[engine].volume.snapshot(world.now);
    (0..world.agents.len()).filter(|a| now.view.contains(&replica_name(*a))).all(|a| {
        let Some(process) = &world.agents[a].process else { return false };
        process.replica.durable().seq == now.seq && process.replica.applied() == process.replica.durable()
    })
}

/// The image after the records up to `last` of the log with this history.
fn image_of(world: &World, history: &EpochHistory, last: Seq) -> Vec<u8> {
    let mut image = vec![0; size(world)];
    for seq in (1..=last.0).map(Seq) {
        let at = position(history, seq);
        let record = &world.records.get(&(at.epoch.0, at.seq.0));
        let record = record.unwrap_or_else(|| panic!("the log holds {at}, which nobody sent"));
        let range = record.header.offset as usize..(record.header.offset + record.header.length) as usize;
        match record.header.kind {
            RecordKind::Write => image[range].copy_from_slice(&record.payload),
            RecordKind::Trim | RecordKind::WriteZeroes => image[range].fill(0),
            RecordKind::EpochStart | RecordKind::ViewChange | RecordKind::DirtyChange | RecordKind::Resize => {}
        }
    }
    image
}

/// Compares the images of members with their log, and with what clients know.
pub fn images(world: &mut World) {
    let engine = world.engines.len() - 1;
    // A late answer may have told of a bad block, whose repair is on its way.
    let is_quiet = |w: &World| self::is_quiet(w, engine);
    assert!(world.run_until(world.setup.slowest * 2000, is_quiet), "what is given out is not applied everywhere");
    let now = world.engines[engine].volume.snapshot(world.now);
    let members: Vec<usize> = (0..world.agents.len()).filter(|a| now.view.contains(&replica_name(*a))).collect();
    let log = |agent: usize| {
        let replica = world.agents[agent].replica();
        (replica.superblock().history.clone(), replica.durable())
    };
    let (history, end) = log(members[0]);
    let expected = image_of(world, &history, end.seq);
    world.oracle.check_image(&expected);
    for agent in members {
        assert_eq!(log(agent), (history.clone(), end), "members hold the same log");
        assert!(!world.agents[agent].replica().superblock().syncing, "a member stands for the volume");
        compare(world, agent, &expected);
    }
}

fn compare(world: &World, agent: usize, expected: &[u8]) {
    let at = &world.agents[agent];
    let found = at.disk.image.content();
    let process = at.process.as_ref().expect("members run");
    process.image.write_back().expect("its disk is well");
    let mut stored = vec![0; found.len() / BLOCK_BYTES as usize * 4];
    at.disk.checksums.read_at(0, &mut stored).unwrap();
    let blocks = found.chunks_exact(BLOCK_BYTES as usize).zip(expected.chunks_exact(BLOCK_BYTES as usize));
    for (index, ((found, expected), stored)) in blocks.zip(stored.as_chunks().0).enumerate() {
        let matches = u32::from_le_bytes(*stored) == stored_block_checksum(found);
        let rotten = at.rotten.contains(&(index as u64 * BLOCK_BYTES));
        let readable = at.disk.image.is_readable(index * BLOCK_BYTES as usize);
        assert!((matches && readable) || rotten, "a{agent}: block {index} does not match its checksum");
        assert!(
            found == expected || (rotten && !(matches && readable)),
            "a{agent}: block {index} is not what its log says"
        );
    }
}
