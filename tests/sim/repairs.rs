//! Stories of bad blocks: they are answered from other members, and made good again by a record.

use nbdcast::volume::{Command, CommandRefusal, Damage, DropReason, Failure, Notice, PeerState, ScrubMark};
use protocol::AckPolicy;

use crate::check;
use crate::oracle::payload;
use crate::scenario::{LONG, serving};
use crate::world::{Setup, World, ms, replica_name};

/// Sectors of a block.
const BLOCK: usize = 8;

impl World {
    fn is_quiet(&mut self) {
        assert!(self.run_until(LONG, |w| check::is_quiet(w, 0)), "members do not become equal");
    }

    /// Blocks found bad at a member so far, and those of them that are good again.
    pub fn found_and_repaired(&self, engine: usize, agent: usize) -> (u64, u64) {
        let snapshot = self.engines[engine].volume.snapshot(self.now);
        (snapshot.peers[agent].checksum_errors, snapshot.peers[agent].repaired_blocks)
    }

    fn is_repaired(&mut self, agent: usize, count: u64) {
        let so = |w: &World| w.found_and_repaired(0, agent) == (count, count);
        let found = self.run_until(LONG, so);
        assert!(found, "found and repaired at a{agent}: {:?} of {count}", self.found_and_repaired(0, agent));
    }

    /// Nothing is bad any more: from here on any bad block is news.
    fn all_is_good(&mut self) {
        self.is_quiet();
        self.agents.iter_mut().for_each(|agent| agent.rotten.clear());
        self.settle_and_compare();
    }

    fn has_said(&self, notice: &Notice) -> bool {
        self.notices.contains(notice)
    }
}

#[test]
fn a_bad_block_is_answered_from_another_member_and_repaired_in_place() {
    for (what, seed) in [(Damage::ChecksumMismatch, 3000), (Damage::Unreadable, 3001)] {
        let mut w = serving(Setup::quiet(seed, AckPolicy::First));
        let token = w.write(0, 0, 4 * BLOCK, false);
        w.done(0, token);
        w.is_quiet();
        match what {
            Damage::ChecksumMismatch => w.rot(0, 5000),
            Damage::Unreadable => w.spoil(0, 4096),
            Damage::Differs => unreachable!("not in this story"),
        }
        assert_eq!(w.read_now(0, 0, 4 * BLOCK), payload(token, 0, 4 * BLOCK));
        w.is_repaired(0, 1);
        let replica = replica_name(0);
        assert!(w.has_said(&Notice::BadBlock { replica: replica.clone(), offset: 4096, what }));
        assert!(w.has_said(&Notice::Repaired { replica, offset: 4096, what }));
        w.all_is_good();
    }
}

#[test]
fn a_member_whose_disk_hangs_does_not_keep_a_block_from_being_repaired() {
    let mut w = serving(Setup::quiet(3002, AckPolicy::First));
    let token = w.write(0, 0, BLOCK, false);
    w.done(0, token);
    w.is_quiet();
    w.rot(0, 100);
    w.scrub(0, ScrubMark::default()).unwrap();
    let found = Notice::BadBlock { replica: replica_name(0), offset: 0, what: Damage::ChecksumMismatch };
    assert!(w.run_until(LONG, |w| w.has_said(&found)));
    // The one that is asked for a good copy.
    w.agents[1].reads_hang_until = w.now + ms(3_600_000);
    w.command(0, Command::StopScrub).unwrap();
    w.is_repaired(0, 1);
    assert_eq!(w.read_now(0, 0, BLOCK), payload(token, 0, BLOCK));
}

#[test]
fn a_repair_never_takes_back_a_write_that_came_meanwhile() {
    for moment in 0..120 {
        let mut w = serving(Setup { slowest: ms(8), ..Setup::quiet(3100 + moment, AckPolicy::First) });
        let token = w.write(0, 0, BLOCK, false);
        w.done(0, token);
        w.is_quiet();
        w.rot(0, 100);
        w.read(0, 0, BLOCK);
        w.run_for(std::time::Duration::from_micros(120 * moment));
        // Writes of a part of the block, which do not make it good.
        let writes: Vec<_> = (0..6).map(|i| (i, w.write(0, i, 1, false))).collect();
        for (sector, token) in writes {
            w.done(0, token);
            assert_eq!(w.read_now(0, sector, 1), payload(token, sector, 1));
        }
        w.is_quiet();
        w.read_now(0, 0, BLOCK);
        w.is_quiet();
        w.settle_and_compare();
    }
}

#[test]
fn blocks_that_clients_change_all_the_time_are_repaired_nevertheless() {
    let mut w = serving(Setup { slowest: ms(4), ..Setup::quiet(3300, AckPolicy::First) });
    let token = w.write(0, 0, BLOCK, false);
    w.done(0, token);
    w.is_quiet();
    w.rot(0, 100);
    w.read_now(0, 0, BLOCK);
    let mut writes = Vec::new();
    let until = w.now + LONG;
    while w.found_and_repaired(0, 0) != (1, 1) {
        assert!(w.now < until, "the block is not repaired under writes");
        writes.push(w.write(0, writes.len() % BLOCK, 1, false));
        w.run_for(ms(1));
    }
    assert!(writes.len() > 2, "the repair was too quick to show anything");
    writes.into_iter().for_each(|token| drop(w.done(0, token)));
    w.all_is_good();
}

#[test]
fn a_write_of_the_whole_block_makes_it_good_as_well() {
    let mut w = serving(Setup::quiet(3301, AckPolicy::First));
    let token = w.write(0, 0, BLOCK, false);
    w.done(0, token);
    w.is_quiet();
    (0..3).for_each(|agent| w.rot(agent, 100));
    let read = w.read(0, 0, BLOCK);
    assert!(w.run_until(LONG, |w| w.answer(0, read) == Some(&Err(Failure::Io))));
    assert!(w.run_until(LONG, |w| w.has_said(&Notice::NoGoodCopy { offset: 0 })));
    let part = w.write(0, 0, 1, false);
    w.done(0, part);
    let read = w.read(0, 0, 1);
    assert!(w.run_until(LONG, |w| w.answer(0, read) == Some(&Err(Failure::Io))), "a part of it is not enough");
    let token = w.write(0, 0, BLOCK, false);
    w.done(0, token);
    assert_eq!(w.read_now(0, 0, BLOCK), payload(token, 0, BLOCK));
    (0..3).for_each(|agent| w.is_repaired(agent, 1));
    w.all_is_good();
}

#[test]
fn a_block_that_is_bad_everywhere_fails_alone_and_its_neighbours_are_read() {
    let mut w = serving(Setup::quiet(3302, AckPolicy::Majority));
    let token = w.write(0, 0, 4 * BLOCK, false);
    w.done(0, token);
    w.is_quiet();
    w.rot(0, 4096);
    w.spoil(1, 4096);
    w.rot(2, 8191);
    for block in [0, 2, 3] {
        assert_eq!(w.read_now(0, block * BLOCK, BLOCK), payload(token, block * BLOCK, BLOCK));
    }
    for (first, count) in [(BLOCK, BLOCK), (BLOCK + 3, 1), (0, 4 * BLOCK)] {
        let read = w.read(0, first, count);
        assert!(w.run_until(LONG, |w| w.answer(0, read) == Some(&Err(Failure::Io))));
    }
    let said = w.notices.iter().filter(|n| **n == Notice::NoGoodCopy { offset: 4096 }).count();
    assert_eq!(said, 1, "what is known is not said again");
    assert_eq!((w.found_and_repaired(0, 0), w.found_and_repaired(0, 1)), ((1, 0), (1, 0)));
}

#[test]
fn a_member_that_comes_back_brings_good_copies_of_what_was_lost_without_it() {
    let mut w = serving(Setup { replicas: 2, ..Setup::quiet(3307, AckPolicy::First) });
    let token = w.write(0, 0, 4 * BLOCK, false);
    w.done(0, token);
    w.is_quiet();
    w.rot(0, 4096);
    w.kill_agent(1, false);
    assert!(w.run_until(LONG, |w| w.view(0) == "a"));
    let read = w.read(0, BLOCK, BLOCK);
    assert!(w.run_until(LONG, |w| w.answer(0, read) == Some(&Err(Failure::Io))));
    assert!(w.run_until(LONG, |w| w.has_said(&Notice::NoGoodCopy { offset: 4096 })));
    w.start_agent(1);
    w.everyone_is_back(0);
    assert_eq!(w.read_now(0, BLOCK, BLOCK), payload(token, BLOCK, BLOCK));
    w.is_repaired(0, 1);
    w.all_is_good();
}

#[test]
fn a_range_whose_blocks_are_bad_at_different_members_is_put_together() {
    let mut w = serving(Setup::quiet(3303, AckPolicy::First));
    let token = w.write(0, 0, 16 * BLOCK, false);
    w.done(0, token);
    w.is_quiet();
    for block in 0..12 {
        w.rot(block % 3, block as u64 * 4096 + 7);
    }
    assert_eq!(w.read_now(0, 3, 16 * BLOCK - 5), payload(token, 3, 16 * BLOCK - 5));
    // What was not found on the way is found by reading on.
    for _ in 0..40 {
        w.read_now(0, 0, 16 * BLOCK);
        w.is_quiet();
    }
    let bad: u64 = (0..3).map(|agent| w.found_and_repaired(0, agent).0).sum();
    let repaired: u64 = (0..3).map(|agent| w.found_and_repaired(0, agent).1).sum();
    assert!(bad == repaired && bad >= 6, "{bad} found, {repaired} repaired");
}

#[test]
fn a_write_of_part_of_an_unreadable_block_does_not_cost_the_replica() {
    let mut w = serving(Setup::quiet(3304, AckPolicy::All));
    let token = w.write(0, 0, BLOCK, false);
    w.done(0, token);
    // After a checkpoint no journal has the whole block any more.
    w.run_for(ms(6000));
    w.spoil(1, 0);
    let part = w.write(0, 2, 1, false);
    w.done(0, part);
    w.is_quiet();
    w.kill_agent(1, true);
    let is_there = |w: &World| w.engines[0].volume.snapshot(w.now).peers[1].state == PeerState::Member;
    assert!(w.run_until(LONG, |w| !is_there(w)));
    w.start_agent(1);
    assert!(w.run_until(LONG, is_there));
    w.is_quiet();
    assert_eq!(w.view(0), "a b c");
    // Only b is left to be asked at first.
    w.stall_agent(0, ms(100));
    w.stall_agent(2, ms(100));
    assert_eq!(w.read_now(0, 0, 2), payload(token, 0, 2));
    w.is_repaired(1, 1);
    w.all_is_good();
}

/// A world in which 12 blocks of a replica are bad, and more than 9 are too many.
fn with_many_bad(seed: u64, agents: &[usize]) -> World {
    let mut w = serving(Setup { checksum_errors_max: 9, ..Setup::quiet(seed, AckPolicy::First) });
    let token = w.write(0, 0, 16 * BLOCK, false);
    w.done(0, token);
    w.is_quiet();
    for agent in agents {
        (0..12).for_each(|block| w.rot(*agent, block * 4096));
    }
    w
}

#[test]
fn a_replica_with_too_many_bad_blocks_leaves_and_comes_back_only_when_it_is_copied_anew() {
    let mut w = with_many_bad(3305, &[0]);
    let replica = replica_name(0);
    for block in 0..16 {
        w.read_now(0, block * BLOCK, BLOCK);
    }
    assert!(w.run_until(LONG, |w| w.view(0) == "b c"));
    assert!(w.dropped_for(DropReason::BadBlocks));
    w.run_for(LONG);
    assert_eq!(w.view(0), "b c", "it does not come back by itself");
    let trouble = w.engines[0].volume.snapshot(w.now).peers[0].trouble.clone().unwrap_or_default();
    assert!(trouble.contains("checksum_errors_max"), "{trouble}");
    let refused = w.command(0, Command::Resync { replica: replica.clone(), full: false });
    assert_eq!(refused, Err(CommandRefusal::Damaged { replica: replica.clone() }));
    w.command(0, Command::Resync { replica, full: true }).unwrap();
    w.everyone_is_back(0);
    w.all_is_good();
}

#[test]
fn the_last_member_stays_whatever_is_bad_and_one_that_has_the_good_copies_until_they_are_used() {
    let mut w = with_many_bad(3306, &[0, 1]);
    w.kill_agent(2, false);
    assert!(w.run_until(LONG, |w| w.view(0) == "a b"));
    for block in 0..16 {
        let read = w.read(0, block * BLOCK, BLOCK);
        assert!(w.run_until(LONG, |w| w.answer(0, read).is_some()));
        assert_eq!(w.answer(0, read).unwrap().is_err(), block < 12);
    }
    assert!(w.run_until(LONG, |w| w.view(0).len() == 1), "one of them leaves");
    w.run_for(ms(3000));
    assert_eq!(w.view(0).len(), 1);
    for block in 12..16 {
        w.read_now(0, block * BLOCK, BLOCK);
    }
}
