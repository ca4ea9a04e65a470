//! Stories of copies of a block that all match their checksums and are not the same: who is wrong is not asked, and nobody
//! guesses.

use nbdcast::volume::{Command, Damage, Failure, Notice, ReadSpread, ScrubFound, ScrubMark};
use protocol::AckPolicy;

use crate::check;
use crate::oracle::payload;
use crate::policies::{replace, with};
use crate::scenario::LONG;
use crate::world::{Setup, World, ms, replica_name};

const BLOCK: usize = 8;
const AT: usize = 2 * 4096;

fn on_disk(w: &World, agent: usize) -> Vec<u8> {
    w.agents[agent].disk.image.content()[AT..AT + 4096].to_vec()
}

fn told(w: &World, notice: &Notice) -> usize {
    w.notices.iter().filter(|n| *n == notice).count()
}

/// A world in which a and b differ in a block, and c's copy was found bad by a read of a client after a scrub found that.
fn tied(seed: u64) -> World {
    let mut w = with(ReadSpread::Adaptive, Setup::quiet(seed, AckPolicy::First));
    replace(&mut w, 0, 2);
    w.rot(2, AT as u64 + 9);
    let found = w.scrub_all(0);
    assert_eq!((found.differing_blocks, found.repaired_blocks), (1, 0));
    assert!(w.notices.contains(&Notice::NoMajority { offset: AT as u64 }));
    // Only c is left to be asked at first, and then b.
    w.stall_agent(0, ms(900));
    w.stall_agent(1, ms(100));
    w.read_now(0, 2 * BLOCK, BLOCK);
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 2).0 == 1), "the read finds it");
    w
}

#[test]
fn a_bad_copy_is_not_made_good_from_one_of_two_that_differ() {
    let mut w = tied(5000);
    let before = on_disk(&w, 2);
    for scrubs in 0..2 {
        w.run_for(ms(3000));
        assert_eq!(w.found_and_repaired(0, 2), (1, 0), "it would make a guess the majority");
        assert!(on_disk(&w, 2) == before);
        let told = told(&w, &Notice::NoMajority { offset: AT as u64 });
        assert_eq!(told, 2 + scrubs, "by each scrub, and once that it cannot be repaired");
        let found = w.scrub_all(0);
        assert_eq!((found.differing_blocks, found.repaired_blocks, found.unrepaired_blocks), (1, 0, 1));
    }
}

#[test]
fn a_tie_ends_when_an_operator_has_the_wrong_copy_made_anew() {
    let mut w = tied(5001);
    w.run_for(ms(1000));
    let right = on_disk(&w, 1);
    w.command(0, Command::Resync { replica: replica_name(0), full: true }).unwrap();
    assert!(w.run_until(LONG, |w| w.view(0) == "b c"));
    w.everyone_is_back(0);
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 2) == (1, 1)));
    (0..3).for_each(|agent| assert!(on_disk(&w, agent) == right));
    w.agents[2].rotten.clear();
    assert_eq!(w.scrub_all(0), ScrubFound::default());
    w.settle_and_compare();
}

#[test]
fn a_tie_ends_when_the_block_is_written() {
    let mut w = tied(5002);
    w.run_for(ms(1000));
    let token = w.write(0, 2 * BLOCK, BLOCK, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 2) == (1, 1)));
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    w.agents[2].rotten.clear();
    // What is bad from now on is made good again.
    w.rot(1, AT as u64 + 77);
    assert_eq!(w.scrub_all(0), ScrubFound { bad_blocks: 1, repaired_blocks: 1, ..ScrubFound::default() });
    assert_eq!(w.read_now(0, 2 * BLOCK, BLOCK), payload(token, 2 * BLOCK, BLOCK));
    w.agents[1].rotten.clear();
    w.settle_and_compare();
}

#[test]
fn a_tie_does_not_end_because_one_of_the_two_is_away_for_a_while() {
    let mut w = tied(5003);
    w.kill_agent(0, false);
    assert!(w.run_until(LONG, |w| w.view(0) == "b c"));
    w.run_for(ms(1000));
    assert_eq!(w.found_and_repaired(0, 2), (1, 0), "a may come back with the right one");
    w.start_agent(0);
    w.everyone_is_back(0);
    w.run_for(ms(1000));
    assert_eq!(w.found_and_repaired(0, 2), (1, 0));
}

/// A world in which a's copy of a block is not what the others hold, a scrub found that, and the repair waits for b.
fn differing(setup: Setup) -> World {
    let mut w = with(ReadSpread::Adaptive, setup);
    replace(&mut w, 0, 2);
    w.scrub(0, ScrubMark::default()).unwrap();
    let (replica, offset, what) = (replica_name(0), AT as u64, Damage::Differs);
    let found = Notice::BadBlock { replica, offset, what };
    assert!(w.run_until(LONG, |w| w.notices.contains(&found)));
    w.agents[1].reads_hang_until = w.now + ms(3000);
    w
}

#[test]
fn a_member_that_differs_is_not_asked_until_it_is_repaired() {
    let mut w = differing(Setup::quiet(5010, AckPolicy::First));
    let right = on_disk(&w, 2);
    for _ in 0..50 {
        // None of them is a's, which would be the best to ask.
        assert!(w.read_now(0, 2 * BLOCK, BLOCK) == right);
        w.read_now(0, BLOCK, 2 * BLOCK + 3);
        assert_eq!(w.status_now(0, 2 * BLOCK, BLOCK), "DDDDDDDD");
    }
    assert_eq!(w.found_and_repaired(0, 0), (1, 0), "the repair came too soon to show anything");
    let before = w.agents[0].reads_done;
    (0..10).for_each(|_| drop(w.read_now(0, 0, BLOCK)));
    assert!(w.agents[0].reads_done > before, "of other blocks it is asked");
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1)));
    w.settle_and_compare();
}

#[test]
fn what_only_a_member_has_that_differs_is_an_error_until_another_is_back() {
    let mut w = differing(Setup::quiet(5011, AckPolicy::First));
    let right = on_disk(&w, 2);
    (1..3).for_each(|agent| w.kill_agent(agent, false));
    let io = Some(Err(Failure::Io));
    for _ in 0..3 {
        let read = w.read(0, 2 * BLOCK, BLOCK);
        assert!(w.run_until(LONG, |w| w.answer(0, read).is_some()), "it is not waited for for ever");
        assert_eq!(w.answer(0, read).cloned(), io);
        let status = w.status(0, 2 * BLOCK, 2 * BLOCK);
        assert!(w.run_until(LONG, |w| w.answer(0, status).cloned() == io));
        w.run_for(ms(3000));
    }
    w.read_now(0, 0, 2 * BLOCK);
    w.read_now(0, 3 * BLOCK, BLOCK);
    assert_eq!(w.status_now(0, BLOCK, 2 * BLOCK), "DDDDDDDD????????");
    (1..3).for_each(|agent| w.start_agent(agent));
    w.everyone_is_back(0);
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1)));
    assert!(w.read_now(0, 2 * BLOCK, BLOCK) == right);
    w.settle_and_compare();
}

#[test]
fn a_copy_that_was_outvoted_is_not_believed_by_a_scrub_that_finds_no_other() {
    let mut w = differing(Setup::quiet(5014, AckPolicy::First));
    let (wrong, right) = (on_disk(&w, 0), on_disk(&w, 2));
    w.command(0, Command::StopScrub).unwrap();
    w.rot(1, AT as u64 + 9);
    w.kill_agent(2, false);
    assert!(w.run_until(LONG, |w| w.view(0) == "a b" && told(w, &Notice::NoGoodCopy { offset: AT as u64 }) == 1));
    let found = w.scrub_all(0);
    assert_eq!((found.repaired_blocks, found.unrepaired_blocks), (0, 1));
    w.run_for(ms(3000));
    assert!(on_disk(&w, 1) != wrong, "b has it from a");
    let read = w.read(0, 2 * BLOCK, BLOCK);
    assert!(w.run_until(LONG, |w| w.answer(0, read) == Some(&Err(Failure::Io))), "{:?}", w.answer(0, read));
    w.start_agent(2);
    w.everyone_is_back(0);
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1) && w.found_and_repaired(0, 1) == (1, 1)));
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    (0..3).for_each(|agent| assert!(on_disk(&w, agent) == right));
    w.agents[1].rotten.clear();
    w.settle_and_compare();
}

#[test]
fn what_differs_is_not_copied_to_a_replica_that_is_brought_back() {
    let mut w = differing(Setup { replicas: 4, ..Setup::quiet(5012, AckPolicy::First) });
    let (wrong, right) = (on_disk(&w, 0), on_disk(&w, 2));
    w.command(0, Command::StopScrub).unwrap();
    w.command(0, Command::Resync { replica: replica_name(3), full: true }).unwrap();
    assert!(w.run_until(LONG, |w| w.view(0) == "a b c"));
    let is_back = w.run_until(LONG, |w| {
        assert!(on_disk(w, 3) != wrong, "d has it from a");
        w.view(0) == "a b c d"
    });
    assert!(is_back && on_disk(&w, 3) == right);
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1)));
    w.settle_and_compare();
}

#[test]
fn a_comparison_does_not_believe_a_member_alone_that_is_known_to_differ() {
    let mut w = with(ReadSpread::Verify, Setup::quiet(5013, AckPolicy::First));
    replace(&mut w, 0, 2);
    let right = w.read_now(0, 2 * BLOCK, BLOCK);
    // The others hold the right one, and no repair can be made from it.
    (1..3).for_each(|agent| w.agents[agent].reads_hang_until = w.now + ms(1000));
    let read = w.read(0, 2 * BLOCK, BLOCK);
    w.run_for(ms(100));
    (1..3).for_each(|agent| w.kill_agent(agent, false));
    assert!(w.run_until(LONG, |w| w.answer(0, read) == Some(&Err(Failure::Io))), "{:?}", w.answer(0, read));
    (1..3).for_each(|agent| w.start_agent(agent));
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1)));
    assert!(w.read_now(0, 2 * BLOCK, BLOCK) == right);
}
