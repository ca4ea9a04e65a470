//! Single faults, told as stories.

use nbdcast::volume::{DropReason, Failure, StartRefusal};
use protocol::{AckPolicy, Epoch, Seq};

use crate::check;
use crate::oracle::{Token, payload};
use crate::scenario::{LONG, serving};
use crate::wild::setup;
use crate::world::{Setup, ms};

#[test]
fn a_stalled_member_is_dropped_at_the_lag_limit_and_writes_go_on() {
    let mut w = serving(Setup::quiet(1, AckPolicy::First));
    w.stall_agent(2, ms(60_000));
    let mut slowest = ms(0);
    for i in 0..40 {
        let (token, asked) = (w.write(0, i * 6, 6, false), w.now);
        w.done(0, token);
        slowest = slowest.max(w.now - asked);
    }
    // At the limit a member that was there until just now is waited for until its silence tells: 100 ms and a tick.
    assert!(slowest < ms(130), "the stalled member shows: {slowest:?}");
    assert!(w.run_until(LONG, |w| w.view(0) == "a b"));
    assert!(w.dropped_for(DropReason::LagBytes));
    assert!(w.durable(2) < w.durable(0));
    w.agents[2].stalled_until = w.now;
    w.everyone_is_back(0);
    w.settle_and_compare();
}

#[test]
fn a_killed_agent_returns_within_limits_and_catches_up_without_leaving_the_view() {
    let mut w = serving(Setup::quiet(2, AckPolicy::First));
    w.kill_agent(1, false);
    for i in 0..5 {
        let token = w.write(0, i * 8, 8, false);
        w.done(0, token);
    }
    w.start_agent(1);
    assert!(w.run_until(ms(1000), |w| w.durable(1) == w.durable(0)));
    assert_eq!(w.view(0), "a b c");
    w.settle_and_compare();
}

#[test]
fn an_unacknowledged_tail_of_the_longest_log_is_chosen_for_all_and_stays() {
    let mut w = serving(Setup::quiet(3, AckPolicy::All));
    let first = w.write(0, 0, 8, false);
    w.done(0, first);
    w.cut_off(1, ms(500));
    w.cut_off(2, ms(500));
    let tail = w.write(0, 0, 8, false);
    assert!(w.run_until(LONG, |w| w.durable(0) > w.durable(1)));
    w.kill_engine(0);
    assert!(w.answer(0, tail).is_none());
    let e = w.next_engine();
    assert_eq!(w.read_now(e, 0, 8), payload(tail, 0, 8));
    w.kill_engine(e);
    let e = w.next_engine();
    assert_eq!(w.read_now(e, 0, 8), payload(tail, 0, 8));
    w.settle_and_compare();
}

#[test]
fn a_zombie_engine_answers_neither_reads_nor_writes_after_a_take_over() {
    let mut w = serving(Setup::quiet(4, AckPolicy::First));
    w.freeze_engine(0, ms(3000));
    let e = w.next_engine();
    let token = w.write(e, 0, 8, false);
    w.done(e, token);
    w.engines[0].frozen_until = w.now;
    let (read, write) = (w.read(0, 0, 8), w.write(0, 0, 8, false));
    w.run_for(ms(4000));
    assert!(!w.engines[0].alive, "it learned that it is fenced");
    assert!(w.answer(0, read).is_some_and(Result::is_err));
    assert!(w.answer(0, write).is_some_and(Result::is_err));
    assert_eq!(w.read_now(e, 0, 8), payload(token, 0, 8));
}

#[test]
fn an_engine_on_the_wrong_side_of_a_split_network_answers_no_read() {
    for lease in [300, 4000] {
        let mut w = serving(Setup { lease: ms(lease), ..Setup::quiet(35, AckPolicy::Majority) });
        let before = w.write(0, 0, 8, false);
        w.done(0, before);
        assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
        w.supplant_behind_a_split();
        let read = w.read(0, 0, 8);
        w.run_for(ms(1000));
        assert!(w.answer(0, read).is_none_or(Result::is_err), "with a lease of {lease} ms");
    }
}

#[test]
fn an_engine_that_may_lack_acknowledged_writes_does_not_start_and_says_who_is_missing() {
    let mut w = serving(Setup::quiet(5, AckPolicy::First));
    let token = w.lose_what_c_alone_holds(0);
    let e = w.start_engine(true);
    w.run_for(ms(25_000));
    assert!(!w.engines[e].is_serving());
    w.kill_engine(e);
    let Some(StartRefusal::Missing { missing, needed: 3, .. }) = w.refusals.last() else { panic!("{:?}", w.refusals) };
    assert_eq!(missing[0].replica.as_str(), "c");
    w.start_agent(2);
    let e = w.next_engine();
    assert_eq!(w.read_now(e, 0, 8), payload(token, 0, 8));
    w.settle_and_compare();
}

#[test]
fn a_changed_ack_policy_does_not_let_an_engine_start_without_what_the_one_before_acknowledged() {
    let mut w = serving(Setup::quiet(15, AckPolicy::First));
    let token = w.lose_what_c_alone_holds(0);
    (w.setup.ack_write, w.setup.ack_flush) = (AckPolicy::Majority, AckPolicy::Majority);
    let e = w.start_engine(true);
    w.run_for(ms(25_000));
    assert!(!w.engines[e].is_serving(), "two of three would do for what a majority acknowledged, but one alone has");
    assert!(matches!(w.refusals.last(), Some(StartRefusal::Missing { needed: 3, .. })), "{:?}", w.refusals);
    w.kill_engine(e);
    w.start_agent(2);
    let e = w.next_engine();
    assert_eq!(w.read_now(e, 0, 8), payload(token, 0, 8));
    w.settle_and_compare();
}

#[test]
fn an_engine_with_a_weaker_ack_policy_serves_only_when_none_can_go_by_the_stronger_one_any_more() {
    // Two of three stop at some moment of the start, so that the first record of the epoch reaches one alone.
    for moment in 0..60 {
        let mut w = serving(Setup::quiet(16 + moment, AckPolicy::Majority));
        let before = w.durable(0).max(w.durable(1)).max(w.durable(2));
        w.kill_engine(0);
        (w.setup.ack_write, w.setup.ack_flush) = (AckPolicy::First, AckPolicy::First);
        let e = w.start_engine(true);
        w.run_for(ms(moment));
        w.stall_agent(1, ms(500));
        w.stall_agent(2, ms(500));
        assert!(w.run_until(LONG, |w| w.engines[e].is_serving()));
        let holding = (0..3).filter(|agent| w.durable(*agent) > before).count();
        assert!(holding >= 2, "stopped after {moment} ms: {holding} of three knows the policy");
    }
}

#[test]
fn a_view_change_that_one_member_alone_holds_is_finished_by_the_next_engine() {
    let mut w = serving(Setup::quiet(6, AckPolicy::Majority));
    w.kill_agent(2, false);
    assert!(w.run_until(LONG, |w| w.dropped_for(DropReason::LagTime)));
    w.stall_agent(1, ms(5000));
    assert!(w.run_until(LONG, |w| w.agents[0].replica().superblock().views.view.len() == 2));
    assert_eq!(w.view(0), "a b c", "one of three is not enough");
    w.kill_engine(0);
    w.kill_agent(0, true);
    w.start_agent(0);
    let e = w.next_engine();
    assert!(w.run_until(LONG, |w| w.view(e) == "a b"));
    w.start_agent(2);
    w.settle_and_compare();
}

#[test]
fn a_journal_that_is_full_and_goes_round_survives_crashes() {
    let small = Setup {
        journal_bytes: 128 << 10,
        lag_bytes_max: 32 << 10,
        throttle: true,
        ..Setup::quiet(7, AckPolicy::First)
    };
    let mut w = serving(small);
    let mut engine = 0;
    for round in 0..30 {
        let tokens: Vec<Token> = (0..20).map(|i| w.write(engine, (round + i * 11) % 224, 17, false)).collect();
        w.run_for(ms(5));
        let agent = round % 3;
        w.kill_agent(agent, round % 2 == 0);
        w.start_agent(agent);
        tokens.iter().for_each(|token| drop(w.done(engine, *token)));
        if round % 10 == 9 {
            w.kill_engine(engine);
            engine = w.next_engine();
        }
    }
    let sent: u64 = w.records.values().map(|r| r.header.journal_bytes_max()).sum();
    assert!(sent > 10 * w.setup.journal_bytes, "it went round");
    assert_eq!(w.view(engine), "a b c");
    w.settle_and_compare();
}

#[test]
fn a_replica_whose_durable_write_fails_leaves_and_never_tries_again() {
    let mut w = serving(Setup::quiet(8, AckPolicy::First));
    w.agents[1].disk.fail_next();
    let token = w.write(0, 0, 8, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| w.view(0) == "a c"));
    let (durable, groups) = (w.durable(1), w.agents[1].replica().counters().groups);
    let token = w.write(0, 8, 8, false);
    w.done(0, token);
    w.run_for(ms(3000));
    assert_eq!((w.durable(1), w.agents[1].replica().counters().groups), (durable, groups));
    w.kill_agent(1, false);
    w.start_agent(1);
    w.everyone_is_back(0);
    w.settle_and_compare();
}

#[test]
fn a_full_disk_makes_one_replica_leave_and_fails_writes_only_when_all_are_full() {
    let mut w = serving(Setup::quiet(9, AckPolicy::First));
    w.agents[2].disk.set_full(true);
    let token = w.write(0, 0, 8, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| w.view(0) == "a b"));
    assert!(w.dropped_for(DropReason::NoSpace));
    (0..2).for_each(|a| w.agents[a].disk.set_full(true));
    let journaled = w.write(0, 8, 8, false);
    w.done(0, journaled);
    w.run_for(ms(50));
    let refused = w.write(0, 16, 8, false);
    assert!(w.run_until(LONG, |w| w.answer(0, refused) == Some(&Err(Failure::NoSpace))));
    (0..3).for_each(|a| w.agents[a].disk.set_full(false));
    w.run_for(ms(1000));
    assert_eq!(w.read_now(0, 8, 8), payload(journaled, 8, 8));
    w.settle_and_compare();
}

#[test]
fn a_power_cut_of_all_machines_takes_back_nothing_that_was_acknowledged() {
    for seed in 10..30 {
        let ack = [AckPolicy::First, AckPolicy::Majority, AckPolicy::All][seed as usize % 3];
        let mut w = serving(Setup::quiet(seed, ack));
        let acknowledged: Vec<Token> = (0..8).map(|i| w.write(0, i * 8 + 3, 8, false)).collect();
        acknowledged.iter().for_each(|token| drop(w.done(0, *token)));
        for i in 0..10 {
            w.write(0, 100 + i, 3, false);
        }
        w.kill_engine(0);
        (0..3).for_each(|a| w.kill_agent(a, true));
        (0..3).for_each(|a| w.start_agent(a));
        let e = w.next_engine();
        for (i, token) in acknowledged.into_iter().enumerate() {
            assert_eq!(w.read_now(e, i * 8 + 3, 8), payload(token, i * 8 + 3, 8));
        }
        w.read_now(e, 0, 256);
        w.settle_and_compare();
    }
}

#[test]
fn a_read_with_majority_never_shows_what_a_later_engine_takes_back() {
    let mut w = serving(Setup::quiet(31, AckPolicy::Majority));
    w.cut_off(1, ms(400));
    w.cut_off(2, ms(400));
    let write = w.write(0, 0, 8, false);
    assert!(w.run_until(LONG, |w| w.agents[0].replica().applied().seq > w.durable(1)));
    let read = w.read(0, 0, 8);
    w.run_for(ms(100));
    assert!(w.answer(0, read).is_none() && w.answer(0, write).is_none(), "one of three holds the write");
    w.kill_engine(0);
    w.kill_agent(0, true);
    let e = w.next_engine();
    assert_eq!(w.read_now(e, 0, 8), vec![0; 4096]);
    w.start_agent(0);
    assert!(w.run_until(LONG, |w| w.view(e) == "b c"), "its log is not a prefix of the true one");
    w.settle_and_compare();
}

#[test]
fn a_log_that_was_left_behind_does_not_count_as_a_holder_of_new_records() {
    let mut w = serving(Setup::quiet(32, AckPolicy::Majority));
    // The first holds a long tail that the others never saw, and is not there when they go on.
    w.cut_off(1, ms(400));
    w.cut_off(2, ms(400));
    for i in 0..20 {
        w.write(0, i, 1, false);
    }
    assert!(w.run_until(LONG, |w| w.durable(0) > Seq(20)));
    w.kill_engine(0);
    w.kill_agent(0, false);
    let e = w.start_engine(true);
    assert!(w.run_until(LONG, |w| w.durable(1).max(w.durable(2)) > Seq(1) && w.engines[e].is_serving()));
    w.kill_engine(e);
    w.start_agent(0);
    w.cut_off(2, ms(10));
    let e = w.next_engine();
    w.cut_off(2, ms(1000));
    let token = w.write(e, 0, 8, false);
    w.run_for(ms(300));
    assert!(w.answer(e, token).is_none(), "the log of a is another one, c cannot be reached: b is alone");
    w.done(e, token);
    w.settle_and_compare();
}

#[test]
fn a_log_that_is_as_long_as_the_true_one_and_differs_takes_no_part() {
    let mut w = serving(Setup::quiet(36, AckPolicy::Majority));
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    let before = w.durable(0);
    w.cut_off(1, ms(400));
    w.cut_off(2, ms(400));
    w.write(0, 0, 8, false);
    assert!(w.run_until(LONG, |w| w.durable(0) == before.next()));
    // Nobody else gets what is on its way.
    (1..3).flat_map(|agent| w.conns_of_agent(agent)).collect::<Vec<_>>().into_iter().for_each(|c| w.cut(c, false));
    w.kill_engine(0);
    w.kill_agent(0, false);
    // The next engine gives out its first record, for the same place, and dies before it can drop a.
    let e = w.start_engine(true);
    assert!(w.run_until(LONG, |w| w.durable(1).max(w.durable(2)) == before.next()));
    w.kill_engine(e);
    w.start_agent(0);
    let e = w.next_engine();
    let token = w.write(e, 8, 8, false);
    w.done(e, token);
    w.everyone_is_back(e);
    w.settle_and_compare();
}

#[test]
fn an_engine_that_stops_in_good_order_is_followed_without_a_wait() {
    let mut w = serving(Setup { lease: ms(5000), ..Setup::quiet(33, AckPolicy::First) });
    let token = w.write(0, 0, 8, true);
    w.done(0, token);
    w.stop_engine(0);
    w.run_for(ms(300));
    let e = w.start_engine(false);
    assert!(w.run_until(ms(1000), |w| w.engines[e].is_serving()));
    assert_eq!(w.read_now(e, 0, 8), payload(token, 0, 8));
    assert!(w.agents[0].replica().superblock().promised > Epoch(1));
    w.settle_and_compare();
}

#[test]
fn a_flipped_bit_is_never_read_and_another_member_answers() {
    let mut w = serving(Setup::quiet(34, AckPolicy::First));
    let token = w.write(0, 0, 8, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    for agent in 0..2 {
        w.agents[agent].disk.image.rot(77);
        w.agents[agent].rotten.push(0);
    }
    for _ in 0..5 {
        assert_eq!(w.read_now(0, 0, 8), payload(token, 0, 8));
    }
}

#[test]
fn setups_of_random_runs_are_of_every_kind() {
    let setups: Vec<Setup> = (0..200).map(setup).collect();
    for ack in [AckPolicy::First, AckPolicy::Majority, AckPolicy::All] {
        assert!(setups.iter().any(|s| s.ack_write == ack && s.replicas == 3));
    }
    assert!(setups.iter().any(|s| s.throttle) && setups.iter().any(|s| s.min_replicas == 2));
}

#[test]
fn a_view_is_not_changed_before_the_epoch_is_on_record() {
    // Of four, the first engine's drop of d is on a alone. The second engine finds b, c and d and must not drop a before
    // enough of them hold its first record: the third engine finds a and b.
    for moment in 0..40 {
        let mut w = serving(Setup { replicas: 4, ..Setup::quiet(900 + moment, AckPolicy::Majority) });
        w.kill_agent(3, false);
        assert!(w.run_until(LONG, |w| w.dropped_for(DropReason::LagTime)));
        w.stall_agent(1, ms(20));
        w.stall_agent(2, ms(20));
        assert!(w.run_until(LONG, |w| w.agents[0].replica().superblock().views.view.len() == 3));
        w.kill_engine(0);
        w.kill_agent(0, false);
        w.start_agent(3);
        let e = w.start_engine(true);
        w.run_until(ms(2000), |w| w.engines[e].volume.snapshot(w.now).seq > Seq(0));
        w.stall_agent(1, ms(3000));
        w.run_for(ms(moment));
        let token = w.engines[e].is_serving().then(|| w.write(e, 0, 8, false));
        w.run_for(ms(2500));
        let acknowledged = token.filter(|token| w.answer(e, *token).is_some());
        w.kill_engine(e);
        w.kill_agent(2, false);
        w.kill_agent(3, false);
        w.start_agent(0);
        let e = w.start_engine(true);
        w.run_for(ms(3000));
        w.start_agent(2);
        w.start_agent(3);
        assert!(w.run_until(LONG, |w| w.engines[e].is_serving()), "{:?}", w.refusals);
        let now = w.read_now(e, 0, 8);
        assert!(acknowledged.is_none_or(|token| now == payload(token, 0, 8)), "moment {moment}");
        w.everyone_is_back(e);
        w.settle_and_compare();
    }
}

#[test]
fn a_failed_sync_that_throws_pages_away_makes_no_block_bad() {
    // Records that change parts of blocks are applied while the sync fails. The restart replays them onto what the disk
    // has; a block that did not match its checksum for that moment must not be taken for a bad one.
    for moment in 0..100 {
        let mut w = serving(Setup { replicas: 1, ..Setup::quiet(1000 + moment, AckPolicy::First) });
        for i in 0..20 {
            let token = w.write(0, i * 8 + 1, 3, false);
            w.done(0, token);
        }
        w.agents[0].disk.fail_next_image_sync();
        w.run_for(ms(4960));
        let tokens: Vec<Token> = (0..20).map(|i| w.write(0, i * 8 + 2, 3, false)).collect();
        while w.agents[0].replica().condition() != protocol::message::Condition::Poisoned {
            w.run_for(ms(2));
            w.write(0, (moment as usize % 20) * 8 + 5, 1, false);
        }
        w.run_for(ms(5));
        w.kill_agent(0, false);
        w.start_agent(0);
        tokens.into_iter().for_each(|token| drop(w.done(0, token)));
        w.read_now(0, 0, 160);
        w.settle_and_compare();
    }
}

#[test]
fn a_read_fails_when_the_member_that_might_have_a_good_copy_leaves() {
    let mut w = serving(Setup { replicas: 2, ..Setup::quiet(35, AckPolicy::First) });
    let token = w.write(0, 0, 8, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    w.agents[0].disk.image.rot(77);
    w.agents[0].rotten.push(0);
    w.kill_agent(1, false);
    let read = w.read(0, 0, 8);
    assert!(w.run_until(LONG, |w| w.view(0) == "a"));
    assert!(w.run_until(ms(100), |w| w.answer(0, read) == Some(&Err(Failure::Io))), "nobody is left to ask");
}
