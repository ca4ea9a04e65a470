//! How the volume tells clients what is data and what reads as zeroes, told as stories: as fresh as a read, and never by a
//! member that could be wrong.

use listener_agent::disk::RawFile;
use nbdcast::volume::{Answer, DropReason, ReadSpread, Zeroing};
use protocol::checksum::stored_block_checksum;
use protocol::extents::{Allocation, EXTENTS_MAX, Extent};
use protocol::message::ReadOutcome;
use protocol::{AckPolicy, Seq, ToEngine};

use crate::check;
use crate::oracle::payload;
use crate::scenario::{LONG, serving};
use crate::world::{Setup, ms};

#[test]
fn a_status_tells_blocks_that_were_written_from_those_that_are_zero() {
    let mut w = serving(Setup::quiet(2001, AckPolicy::First));
    assert_eq!(w.status_now(0, 0, 256), "0".repeat(256));
    let write = w.write(0, 12, 2, false);
    w.done(0, write);
    assert_eq!(w.status_now(0, 0, 24), "00000000DDDDDDDD00000000", "blocks are eight sectors");
    assert_eq!(w.status_now(0, 11, 7), "DDDDD00", "clipped to what was asked for");
    let zero = w.zero(0, 8, 8, Zeroing::ZeroKeepAllocated, false);
    w.done(0, zero);
    assert_eq!(w.status_now(0, 0, 256), "0".repeat(256));
    w.settle_and_compare();
}

#[test]
fn a_status_right_after_a_write_shows_it_though_the_other_members_stand_still() {
    for (seed, read) in [(2002, ReadSpread::Adaptive), (2003, ReadSpread::Multicast)] {
        let mut w = serving(Setup { read, ..Setup::quiet(seed, AckPolicy::First) });
        // They are asked first, and have neither the record nor the time.
        w.stall_agent(0, ms(1500));
        w.stall_agent(1, ms(1500));
        let write = w.write(0, 0, 8, false);
        w.done(0, write);
        assert!(w.durable(2) > w.durable(0).max(w.durable(1)));
        let asked = w.now;
        assert_eq!(w.status_now(0, 0, 16), "DDDDDDDD00000000");
        assert!(w.now - asked < ms(500), "the members that stand still show");
        w.run_for(ms(1500));
        assert_eq!(w.status_now(0, 0, 16), "DDDDDDDD00000000");
        w.settle_and_compare();
    }
}

#[test]
fn a_member_that_was_left_behind_answers_no_status() {
    let mut w = serving(Setup::quiet(2004, AckPolicy::First));
    w.stall_agent(1, ms(60_000));
    for i in 0..40 {
        let write = w.write(0, i * 6, 6, false);
        w.done(0, write);
    }
    assert!(w.run_until(LONG, |w| w.view(0) == "a c"));
    assert!(w.dropped_for(DropReason::LagBytes));
    w.agents[1].stalled_until = w.now;
    w.kill_agent(0, false);
    w.kill_agent(2, false);
    let status = w.status(0, 0, 256);
    w.run_for(ms(1500));
    assert!(w.answer(0, status).is_none(), "b alone is there, and behind");
    w.start_agent(0);
    let Answer::Extents(found) = w.done(0, status) else { panic!("it is answered") };
    assert_eq!(found[0], Extent { length: 240 * 512, allocation: Allocation::Data });
}

#[test]
fn a_status_with_majority_never_shows_zeroes_that_a_later_engine_takes_back() {
    let mut w = serving(Setup::quiet(2005, AckPolicy::Majority));
    let write = w.write(0, 0, 8, false);
    w.done(0, write);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    w.cut_off(1, ms(400));
    w.cut_off(2, ms(400));
    let trim = w.zero(0, 0, 8, Zeroing::Trim, false);
    assert!(w.run_until(LONG, |w| w.agents[0].replica().applied().seq > w.durable(1)));
    let status = w.status(0, 0, 8);
    w.run_for(ms(100));
    assert!(w.answer(0, status).is_none() && w.answer(0, trim).is_none(), "one of three has the zeroes");
    w.kill_engine(0);
    w.kill_agent(0, true);
    let e = w.next_engine();
    assert_eq!(w.status_now(e, 0, 8), "DDDDDDDD");
}

#[test]
fn an_engine_without_a_lease_tells_of_no_zeroes() {
    let mut w = serving(Setup { lease: ms(4000), ..Setup::quiet(2006, AckPolicy::Majority) });
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    w.supplant_behind_a_split();
    let status = w.status(0, 0, 8);
    w.run_for(ms(1000));
    assert!(w.answer(0, status).is_none_or(Result::is_err), "c knows nothing of the write");
}

#[test]
fn an_answer_that_cannot_be_counts_as_none_and_another_member_is_asked() {
    let hole = |length| Extent { length, allocation: Allocation::Hole };
    let forged = [
        ReadOutcome::Extents(vec![hole(4097)]),
        ReadOutcome::Extents(vec![hole(4096), hole(1)]),
        ReadOutcome::Extents(vec![hole(u64::MAX), hole(2)]),
        ReadOutcome::Extents(vec![]),
        ReadOutcome::Extents(vec![hole(0)]),
        ReadOutcome::Extents(vec![hole(1); EXTENTS_MAX + 1]),
        ReadOutcome::Prefetched,
        ReadOutcome::Data { data: vec![0; 4096].into(), crc: 0 },
        ReadOutcome::Failed,
    ];
    for outcome in forged {
        let mut w = serving(Setup::quiet(2007, AckPolicy::First));
        let write = w.write(0, 0, 8, false);
        w.done(0, write);
        assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
        w.stall_agent(0, ms(300));
        let status = w.status(0, 0, 8);
        // Which number the question has is the engine's affair.
        for id in 0..50 {
            let read = ToEngine::ReadDone { id, applied: Seq(0), outcome: outcome.clone() };
            let now = w.engine_now(0);
            w.engines[0].volume.peer_message(now, 0, read);
        }
        w.pump_engine(0);
        let asked = w.now;
        let data = Extent { length: 4096, allocation: Allocation::Data };
        assert_eq!(w.done(0, status), Answer::Extents(vec![data]), "after {outcome:?}");
        assert!(w.now - asked < ms(10), "another member is asked at once");
    }
}

#[test]
fn a_block_that_only_has_the_checksum_of_zeroes_is_shown_as_data() {
    // The polynomial of the CRC itself, as 33 bits with the highest power in the lowest one: it has no effect.
    let mut block = vec![0; 4096];
    block[1000..1005].copy_from_slice(&[0x41, 0x06, 0x71, 0xdb, 0x01]);
    assert_eq!(stored_block_checksum(&block), 0);
    let mut w = serving(Setup::quiet(2009, AckPolicy::First));
    let write = w.write_bytes(0, 4096, block);
    w.done(0, write);
    assert_eq!(w.status_now(0, 0, 24), "00000000DDDDDDDD00000000");
}

#[test]
fn a_part_of_an_image_that_was_lost_is_shown_as_data_and_read_from_another_member() {
    let mut w = serving(Setup::quiet(2010, AckPolicy::First));
    let write = w.write(0, 8, 8, false);
    w.done(0, write);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    w.agents[0].disk.image.write_at(4096, &[0; 4096]).unwrap();
    w.agents[0].rotten.push(4096);
    assert_eq!(w.status_now(0, 0, 24), "00000000DDDDDDDD00000000");
    assert_eq!(w.read_now(0, 8, 8), payload(write, 8, 8));
}

#[test]
fn a_prefetch_is_answered_whatever_is_there() {
    let mut w = serving(Setup::quiet(2008, AckPolicy::First));
    let write = w.write(0, 0, 8, false);
    w.done(0, write);
    w.stall_agent(0, ms(1000));
    w.stall_agent(1, ms(1000));
    let prefetch = w.prefetch(0, 0, 256);
    let asked = w.now;
    assert_eq!(w.done(0, prefetch), Answer::Done);
    assert!(w.now - asked < ms(500));
}
