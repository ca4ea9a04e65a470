//! Stories of whom reads are sent to, and what becomes of answers that nobody waits for.

use std::time::Duration;

use nbdcast::volume::{Damage, Failure, Notice, PeerState, ReadSpread};
use protocol::ranges::ByteRange;
use protocol::{AckPolicy, Epoch, Position, Record, RecordKind, Seq};

use listener_agent::image::Trust;

use crate::check;
use crate::oracle::payload;
use crate::scenario::{LONG, serving};
use crate::world::{Setup, World, ms, replica_name};

const BLOCK: usize = 8;

pub fn with(read: ReadSpread, setup: Setup) -> World {
    let mut w = serving(Setup { read, ..setup });
    let token = w.write(0, 0, 16 * BLOCK, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    w
}

/// Makes a block of a replica another one, with the checksum of that.
pub fn replace(w: &mut World, agent: usize, block: u64) {
    let range = ByteRange { offset: block * 4096, length: 4096 };
    let position = Position { epoch: Epoch(1), seq: Seq(1) };
    let record = Record::new(position, RecordKind::Write, range, vec![agent as u8 + 1; 4096].into());
    w.agents[agent].process.as_ref().unwrap().image.apply(&record, Trust::Verified).unwrap();
}

#[test]
fn of_members_asked_those_that_lose_are_cancelled_and_all_reads_are_accounted_for() {
    let setup = Setup { in_flight_max: 2, ..Setup::quiet(4000, AckPolicy::First) };
    let mut w = with(ReadSpread::Multicast, setup);
    w.stall_agent(1, ms(500));
    let before = w.agents[1].reads_done;
    for _ in 0..40 {
        w.read_now(0, 0, 8);
    }
    // Those that never left are forgotten, the others wait at the member.
    assert!((1..=8).contains(&w.reads_outstanding(0)), "{} are outstanding", w.reads_outstanding(0));
    assert!(w.run_until(LONG, |w| w.reads_outstanding(0) == 0));
    let done = w.agents[1].reads_done - before;
    assert!(done <= 4, "{done} of 40 reads were done though nobody waited for them");
}

#[test]
fn an_agent_answers_a_cancelled_read_at_once_and_not_twice() {
    let mut w = with(ReadSpread::Multicast, Setup { slowest: ms(40), ..Setup::quiet(4001, AckPolicy::First) });
    for round in 0..60 {
        let reads: Vec<_> = (0..8).map(|i| w.read(0, i * BLOCK, BLOCK)).collect();
        let write = w.write(0, round % 100, 1, false);
        reads.into_iter().for_each(|read| drop(w.done(0, read)));
        w.done(0, write);
    }
    assert!(w.run_until(LONG, |w| w.reads_outstanding(0) == 0));
    let all: u64 = w.agents.iter().map(|a| a.reads_done).sum();
    assert!(all < 3 * 480, "{all} reads were done: none was cancelled");
}

#[test]
fn a_hedged_read_waits_as_long_as_most_reads_take_and_no_longer() {
    let mut w = with(ReadSpread::Hedged, Setup::quiet(4002, AckPolicy::First));
    for _ in 0..100 {
        w.read_now(0, 0, 8);
    }
    let took = |w: &mut World, time: Duration| {
        (0..3).for_each(|agent| w.agents[agent].stalled_until = Duration::ZERO);
        w.run_for(ms(200));
        w.stall_agent(0, time);
        let begun = w.now;
        w.read_now(0, 0, 8);
        w.now - begun
    };
    let late = took(&mut w, ms(150));
    // Most reads take up to 6 ms here, and an engine looks at the clock every 5 ms.
    assert!((ms(1)..ms(25)).contains(&late), "answered after {late:?}");
    assert_eq!(w.reads_outstanding(0), 1, "the one that is late");
    assert!(w.run_until(LONG, |w| w.reads_outstanding(0) == 0));
}

#[test]
fn a_comparison_finds_what_no_checksum_does_and_repairs_it() {
    let mut w = with(ReadSpread::Verify, Setup::quiet(4003, AckPolicy::First));
    replace(&mut w, 0, 2);
    replace(&mut w, 1, 5);
    let token = w.write(0, 3, 1, false);
    w.done(0, token);
    assert_eq!(w.read_now(0, 3, 1), payload(token, 3, 1));
    w.read_now(0, 2 * BLOCK + 1, 5 * BLOCK);
    for (agent, block) in [(0, 2), (1, 5)] {
        assert!(w.run_until(LONG, |w| w.found_and_repaired(0, agent) == (1, 1)));
        let (replica, what) = (replica_name(agent), Damage::Differs);
        assert!(w.notices.contains(&Notice::Repaired { replica, offset: block * 4096, what }));
    }
    w.settle_and_compare();
}

#[test]
fn two_members_that_differ_are_an_error_and_never_a_guess() {
    let mut w = with(ReadSpread::Verify, Setup { replicas: 2, ..Setup::quiet(4004, AckPolicy::First) });
    replace(&mut w, 0, 2);
    let read = w.read(0, 0, 4 * BLOCK);
    assert!(w.run_until(LONG, |w| w.answer(0, read) == Some(&Err(Failure::Io))));
    assert!(w.notices.contains(&Notice::NoMajority { offset: 2 * 4096 }));
    w.read_now(0, 0, 2 * BLOCK);
    w.read_now(0, 3 * BLOCK, BLOCK);
    assert_eq!((w.found_and_repaired(0, 0), w.found_and_repaired(0, 1)), ((0, 0), (0, 0)));
    let token = w.write(0, 2 * BLOCK, BLOCK, false);
    w.done(0, token);
    assert_eq!(w.read_now(0, 0, 4 * BLOCK).len(), 4 * 4096);
    w.settle_and_compare();
}

#[test]
fn comparisons_under_writes_of_the_same_blocks_give_no_false_alarm_and_come_to_an_end() {
    for seed in 4010..4030 {
        let ack = [AckPolicy::First, AckPolicy::Majority][seed as usize % 2];
        let mut w = with(ReadSpread::Verify, Setup { slowest: ms(6), ..Setup::quiet(seed, ack) });
        let (mut reads, mut writes) = (Vec::new(), Vec::new());
        for round in 0..300 {
            writes.push(w.write(0, round % 16, 1, false));
            if round % 10 == 0 {
                reads.push(w.read(0, 3, 9));
            }
            w.run_for(ms(1));
        }
        reads.into_iter().chain(writes).for_each(|token| drop(w.done(0, token)));
        let bad: u64 = (0..3).map(|agent| w.found_and_repaired(0, agent).0).sum();
        assert_eq!(bad, 0, "no block was touched behind the replicas' backs");
        w.settle_and_compare();
    }
}

#[test]
fn a_comparison_does_not_wait_for_a_member_that_hangs() {
    let setup = Setup { lag_max: ms(60_000), ..Setup::quiet(4005, AckPolicy::First) };
    let mut w = with(ReadSpread::Verify, setup);
    w.stall_agent(2, ms(9000));
    let begun = w.now;
    w.read_now(0, 0, 16 * BLOCK);
    assert!((ms(900)..ms(1200)).contains(&(w.now - begun)), "answered after {:?}", w.now - begun);
}

#[test]
fn a_comparison_waits_for_a_member_whose_answer_decides() {
    let setup = Setup { lag_max: ms(60_000), freeze: ms(20_000), ..Setup::quiet(4006, AckPolicy::First) };
    let mut w = with(ReadSpread::Verify, setup);
    let right = w.read_now(0, 2 * BLOCK, BLOCK);
    replace(&mut w, 0, 2);
    w.stall_agent(2, ms(5000));
    let begun = w.now;
    assert_eq!(w.read_now(0, 2 * BLOCK, BLOCK), right);
    assert!((ms(4900)..ms(5200)).contains(&(w.now - begun)), "answered after {:?}", w.now - begun);
    assert!(!w.notices.contains(&Notice::NoMajority { offset: 2 * 4096 }));
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1)));
    w.settle_and_compare();
}

#[test]
fn a_comparison_without_a_majority_ends_once_requests_wait_for_members_no_more() {
    let setup = Setup { freeze: ms(3000), journal_bytes: 8 << 20, ..Setup::quiet(4007, AckPolicy::First) };
    let mut w = with(ReadSpread::Verify, setup);
    replace(&mut w, 0, 2);
    w.agents[2].reads_hang_until = ms(600_000);
    for writes in [false, true] {
        let begun = w.now;
        let read = w.read(0, 2 * BLOCK, BLOCK);
        while w.answer(0, read).is_none() {
            if writes {
                w.write(0, 2 * BLOCK, 1, false);
            }
            w.run_for(ms(20));
        }
        assert_eq!(w.answer(0, read), Some(&Err(Failure::Io)));
        let waited = w.now - begun;
        assert!(waited >= ms(3000) && waited < if writes { ms(15_000) } else { ms(3100) }, "{waited:?}");
    }
    assert!(w.notices.contains(&Notice::NoMajority { offset: 2 * 4096 }));
}

#[test]
fn two_of_four_do_not_overrule_a_third_while_the_fourth_is_away() {
    let setup = Setup { replicas: 4, lag_max: ms(60_000), ..Setup::quiet(4008, AckPolicy::First) };
    let mut w = with(ReadSpread::Verify, setup);
    replace(&mut w, 0, 2);
    w.kill_agent(3, false);
    w.run_for(ms(100));
    let read = w.read(0, 2 * BLOCK, BLOCK);
    assert!(w.run_until(LONG, |w| w.answer(0, read) == Some(&Err(Failure::Io))));
    w.run_for(ms(500));
    assert_eq!(w.found_and_repaired(0, 0), (0, 0), "the fourth may hold the same");
    w.start_agent(3);
    assert!(w.run_until(LONG, |w| w.engines[0].volume.snapshot(w.now).peers[3].state == PeerState::Member));
    w.read_now(0, 2 * BLOCK, BLOCK);
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1)));
    w.settle_and_compare();
}
