//! Stories of replicas that were out of the view and come back.

use nbdcast::volume::{Command, Notice, StartRefusal};
use protocol::{AckPolicy, Seq};

use crate::oracle::payload;
use crate::scenario::{LONG, serving};
use crate::world::{Setup, World, ms};

const UNIT: u64 = 64 << 10;
/// Sectors of a unit.
const SECTORS: usize = 128;

/// A volume of 32 units.
fn wide(seed: u64, ack: AckPolicy) -> Setup {
    Setup { size_bytes: 32 * UNIT, journal_bytes: 1 << 20, lag_bytes_max: 256 << 10, ..Setup::quiet(seed, ack) }
}

impl World {
    /// Writes into a unit and waits for the answer.
    fn change_unit(&mut self, engine: usize, unit: usize) {
        let token = self.write(engine, unit * SECTORS + 3, 8, false);
        self.done(engine, token);
    }

    /// The agent dies and is dropped.
    fn lose(&mut self, engine: usize, agent: usize) {
        self.kill_agent(agent, true);
        let name = crate::world::replica_name(agent);
        assert!(self.run_until(LONG, |w| !w.engines[engine].volume.snapshot(w.now).view.contains(&name)));
    }

    fn lost_data(&self) -> bool {
        self.notices.iter().any(|n| matches!(n, Notice::LostData { .. }))
    }
}

#[test]
fn a_dropped_replica_comes_back_and_only_what_changed_is_copied() {
    let mut w = serving(wide(100, AckPolicy::First));
    (0..32).for_each(|unit| w.change_unit(0, unit));
    assert!(w.run_until(LONG, |w| w.engines[0].volume.snapshot(w.now).peers.iter().all(|p| p.lag_records == 0)));
    w.lose(0, 2);
    [3, 4, 9, 31].into_iter().for_each(|unit| w.change_unit(0, unit));
    w.start_agent(2);
    w.everyone_is_back(0);
    assert_eq!(w.copied_bytes, 4 * UNIT);
    assert!(!w.lost_data());
    w.settle_and_compare();
}

#[test]
fn a_write_while_its_chunk_is_on_its_way_is_not_taken_back_by_the_copy() {
    for moment in 0..80 {
        let mut w = serving(wide(200 + moment, AckPolicy::First));
        w.lose(0, 2);
        (0..8).for_each(|unit| w.change_unit(0, unit));
        w.start_agent(2);
        assert!(w.run_until(LONG, |w| w.is_syncing(2)));
        w.run_for(ms(moment / 4));
        for unit in 0..8 {
            w.write(0, unit * SECTORS + 5, 2, false);
            w.run_for(std::time::Duration::from_micros(300));
        }
        w.everyone_is_back(0);
        w.settle_and_compare();
    }
}

#[test]
fn a_late_answer_to_a_copy_does_not_make_a_unit_clean_that_changed_since() {
    // The follower gets the copy of a unit, and is cut off before a write to the same unit reaches it.
    for moment in 0..60 {
        let mut w = serving(wide(300 + moment, AckPolicy::First));
        w.lose(0, 2);
        (0..16).for_each(|unit| w.change_unit(0, unit));
        w.start_agent(2);
        assert!(w.run_until(LONG, |w| w.is_syncing(2)));
        w.run_for(ms(moment));
        w.stall_agent(2, ms(3000));
        (0..16).for_each(|unit| w.change_unit(0, unit));
        w.kill_agent(2, moment % 2 == 0);
        (0..4).for_each(|unit| w.change_unit(0, unit));
        w.start_agent(2);
        w.everyone_is_back(0);
        w.settle_and_compare();
    }
}

#[test]
fn a_member_that_dies_at_a_checkpoint_still_knows_what_others_lack() {
    for seed in 500..520 {
        let small = Setup { journal_bytes: 128 << 10, lag_bytes_max: 64 << 10, ..wide(seed, AckPolicy::First) };
        let mut w = serving(small);
        w.lose(0, 2);
        (0..8).for_each(|unit| w.change_unit(0, unit));
        // The journal goes round: only the bitmaps know of the changes before.
        (0..60).for_each(|_| w.change_unit(0, 30));
        w.agents[0].dies_at_checkpoint = Some(seed % 2 == 0);
        (0..60).for_each(|i| w.change_unit(0, 29 + i % 3));
        assert!(w.agents[0].dies_at_checkpoint.is_none(), "it took a checkpoint");
        w.start_agent(2);
        w.everyone_is_back(0);
        w.settle_and_compare();
    }
}

#[test]
fn records_that_a_follower_did_not_make_durable_stay_marked_however_often_its_progress_is_told() {
    let mut w = serving(Setup { lag_max: ms(10_000), resync_rate_min: 1 << 20, ..wide(115, AckPolicy::First) });
    w.lose(0, 2);
    (0..32).for_each(|unit| w.change_unit(0, unit));
    w.start_agent(2);
    // A client keeps the rate down.
    while w.copied_bytes < 20 * UNIT {
        w.change_unit(0, 31);
        w.run_for(ms(20));
    }
    w.stall_agent(2, ms(6000));
    (0..8).for_each(|unit| w.change_unit(0, unit));
    w.run_for(ms(3500));
    w.kill_agent(2, true);
    w.start_agent(2);
    w.everyone_is_back(0);
    w.settle_and_compare();
}

#[test]
fn an_engine_that_dies_half_way_is_followed_by_one_that_goes_on() {
    let mut w = serving(Setup { resync_rate_min: 1 << 20, ..wide(101, AckPolicy::First) });
    (0..32).for_each(|unit| w.change_unit(0, unit));
    w.lose(0, 2);
    (0..32).for_each(|unit| w.change_unit(0, unit));
    w.start_agent(2);
    // A client keeps the rate down.
    while w.copied_bytes < 20 * UNIT {
        w.change_unit(0, 0);
        w.run_for(ms(20));
    }
    w.run_for(ms(1200));
    let before = w.copied_bytes;
    w.kill_engine(0);
    let e = w.next_engine();
    w.everyone_is_back(e);
    assert!(w.copied_bytes < 40 * UNIT, "{} units before, {} in all", before / UNIT, w.copied_bytes / UNIT);
    w.settle_and_compare();
}

#[test]
fn a_replica_that_is_being_copied_to_does_not_stand_for_the_volume() {
    let mut w = serving(Setup { resync_rate_min: 1 << 20, ..wide(102, AckPolicy::First) });
    (0..32).for_each(|unit| w.change_unit(0, unit));
    w.lose(0, 1);
    w.lose(0, 2);
    (0..32).for_each(|unit| w.change_unit(0, unit));
    w.start_agent(1);
    w.start_agent(2);
    assert!(w.run_until(LONG, |w| w.is_syncing(1)));
    w.kill_agent(0, true);
    w.kill_engine(0);
    let e = w.start_engine(true);
    w.run_for(ms(30_000));
    assert!(!w.engines[e].is_serving());
    assert!(
        w.refusals
            .iter()
            .any(|r| matches!(r, StartRefusal::Missing { missing, .. } if missing[0].replica.as_str() == "a"))
    );
    w.start_agent(0);
    assert!(w.run_until(LONG, |w| w.engines[e].is_serving()), "it waited for the one that it needs");
    w.everyone_is_back(e);
    w.settle_and_compare();
}

#[test]
fn a_tail_that_nobody_else_has_is_undone_where_it_was_applied() {
    let mut w = serving(wide(103, AckPolicy::Majority));
    (0..32).for_each(|unit| w.change_unit(0, unit));
    w.run_for(ms(200));
    w.cut_off(1, ms(400));
    w.cut_off(2, ms(400));
    for unit in [2, 7, 30] {
        w.write(0, unit * SECTORS, 8, false);
    }
    assert!(w.run_until(LONG, |w| w.agents[0].replica().applied().seq.0 >= w.durable(1).0 + 3));
    w.kill_engine(0);
    w.kill_agent(0, false);
    let e = w.next_engine();
    w.change_unit(e, 9);
    w.start_agent(0);
    w.everyone_is_back(e);
    assert!(w.copied_bytes <= 4 * UNIT, "{} units", w.copied_bytes / UNIT);
    w.settle_and_compare();
}

#[test]
fn a_member_that_was_absent_when_the_engine_started_needs_little_copying() {
    let mut w = serving(wide(104, AckPolicy::Majority));
    (0..32).for_each(|unit| w.change_unit(0, unit));
    w.run_for(ms(200));
    w.kill_agent(2, false);
    w.change_unit(0, 20);
    w.kill_engine(0);
    let e = w.next_engine();
    w.change_unit(e, 5);
    assert!(w.run_until(LONG, |w| w.view(e) == "a b"));
    w.change_unit(e, 6);
    w.start_agent(2);
    w.everyone_is_back(e);
    assert!(w.copied_bytes <= 4 * UNIT, "{} units", w.copied_bytes / UNIT);
    w.settle_and_compare();
}

#[test]
fn copying_waits_until_no_later_engine_can_overlook_that_it_began() {
    // The record that begins the copying reaches one of three members. Had the replica begun anew by then, the others would
    // know nothing of what it holds, and would have to copy all of it.
    for moment in 0..20 {
        let mut w = serving(Setup { replicas: 4, ..wide(400 + moment, AckPolicy::Majority) });
        (0..32).for_each(|unit| w.change_unit(0, unit));
        w.lose(0, 3);
        (0..4).for_each(|unit| w.change_unit(0, unit));
        w.run_for(ms(200));
        w.stall_agent(1, ms(1500));
        w.stall_agent(2, ms(1500));
        w.start_agent(3);
        w.run_for(ms(200 + moment * 40));
        w.kill_engine(0);
        w.kill_agent(0, true);
        w.run_for(ms(1500));
        let e = w.next_engine();
        assert!(w.run_until(LONG, |w| w.view(e) == "b c d"));
        // What was changed while it was away, and what b and c had not got of the units before; not all 32.
        assert!(w.copied_bytes <= 16 * UNIT, "{} units", w.copied_bytes / UNIT);
        w.start_agent(0);
        w.everyone_is_back(e);
        w.settle_and_compare();
    }
}

#[test]
fn a_replica_that_begins_anew_finds_nothing_of_what_it_dropped() {
    // Its own tail is longer than the order that it follows now: sound records with the very places that are to come.
    let mut w = serving(wide(110, AckPolicy::Majority));
    w.cut_off(1, ms(400));
    w.cut_off(2, ms(400));
    (0..30).for_each(|sector| _ = w.write(0, sector, 1, false));
    assert!(w.run_until(LONG, |w| w.durable(0) > Seq(30)));
    w.kill_engine(0);
    w.cut_off(0, ms(4000));
    let e = w.next_engine();
    assert!(w.run_until(LONG, |w| w.is_syncing(0)));
    assert!(w.durable(0) < Seq(20));
    w.kill_agent(0, true);
    w.start_agent(0);
    assert!(w.durable(0) < Seq(20));
    w.everyone_is_back(e);
    w.settle_and_compare();
}

#[test]
fn a_member_that_lags_is_not_lost_because_a_replica_joined_meanwhile() {
    // The journal of the one that joined begins where it began to follow: the other could get nothing from there.
    let mut w = serving(wide(111, AckPolicy::First));
    (0..32).for_each(|unit| w.change_unit(0, unit));
    w.lose(0, 2);
    w.kill_agent(1, false);
    (0..4).for_each(|unit| w.change_unit(0, unit));
    w.start_agent(2);
    w.run_for(ms(1800));
    w.kill_engine(0);
    w.start_agent(1);
    let e = w.next_engine();
    w.everyone_is_back(e);
    let lost = w.notices.iter().any(|n| matches!(n, Notice::Dropping { replica, .. } if replica.as_str() == "b"));
    assert!(!lost, "b was away for less than the limit");
    w.settle_and_compare();
}

#[test]
fn an_older_state_of_a_disk_is_noticed_and_copied_anew() {
    let mut w = serving(wide(105, AckPolicy::Majority));
    (0..4).for_each(|unit| w.change_unit(0, unit));
    assert!(w.run_until(LONG, |w| crate::check::is_quiet(w, 0)));
    w.kill_agent(2, false);
    let old = w.agents[2].disk.snapshot();
    w.start_agent(2);
    (4..32).for_each(|unit| w.change_unit(0, unit));
    assert!(w.run_until(LONG, |w| crate::check::is_quiet(w, 0)));
    w.run_for(ms(200));
    w.kill_agent(2, false);
    w.agents[2].disk.restore(&old);
    w.start_agent(2);
    w.everyone_is_back(0);
    assert!(w.run_until(LONG, |w| w.view(0) == "a b") || w.lost_data());
    w.everyone_is_back(0);
    assert!(w.lost_data());
    w.settle_and_compare();
}

#[test]
fn an_older_state_of_a_disk_is_noticed_when_it_is_out_of_the_view() {
    let mut w = serving(wide(112, AckPolicy::First));
    (0..4).for_each(|unit| w.change_unit(0, unit));
    assert!(w.run_until(LONG, |w| crate::check::is_quiet(w, 0)));
    w.kill_agent(2, false);
    let old = w.agents[2].disk.snapshot();
    w.start_agent(2);
    (4..20).for_each(|unit| w.change_unit(0, unit));
    assert!(w.run_until(LONG, |w| w.durable(2) == w.durable(0)));
    w.lose(0, 2);
    w.agents[2].disk.restore(&old);
    w.start_agent(2);
    w.everyone_is_back(0);
    assert!(w.lost_data());
    w.settle_and_compare();
}

#[test]
fn an_older_state_of_a_disk_is_noticed_though_the_engine_still_has_what_it_lost() {
    // A member lags, so the engine keeps the records that the other one lost.
    let mut w = serving(wide(113, AckPolicy::First));
    (0..4).for_each(|unit| w.change_unit(0, unit));
    assert!(w.run_until(LONG, |w| crate::check::is_quiet(w, 0)));
    w.kill_agent(2, false);
    let old = w.agents[2].disk.snapshot();
    w.start_agent(2);
    w.stall_agent(1, ms(1500));
    (4..8).for_each(|unit| w.change_unit(0, unit));
    assert!(w.run_until(LONG, |w| w.durable(2) == w.durable(0)));
    w.run_for(ms(50));
    w.kill_agent(2, false);
    w.agents[2].disk.restore(&old);
    w.start_agent(2);
    assert!(w.run_until(ms(1000), World::lost_data), "it acknowledged more than it holds");
    w.everyone_is_back(0);
    w.settle_and_compare();
}

#[test]
fn an_older_state_of_a_disk_does_not_count_as_an_answer_at_the_start() {
    let mut w = serving(wide(106, AckPolicy::First));
    w.change_unit(0, 0);
    assert!(w.run_until(LONG, |w| crate::check::is_quiet(w, 0)));
    w.kill_agent(2, false);
    let old = w.agents[2].disk.snapshot();
    w.start_agent(2);
    (1..20).for_each(|unit| w.change_unit(0, unit));
    w.stop_engine(0);
    w.run_for(ms(500));
    w.kill_agent(2, false);
    w.agents[2].disk.restore(&old);
    w.start_agent(2);
    let e = w.start_engine(true);
    w.run_for(ms(30_000));
    let Some(StartRefusal::Missing { missing, .. }) = w.refusals.last() else { panic!("{:?}", w.refusals) };
    assert!(missing[0].replica.as_str() == "c" && missing[0].reason.contains("lost data"), "{missing:?}");
    w.command(e, Command::ActivateWithout { replicas: vec!["c".parse().unwrap()] }).unwrap();
    assert!(w.run_until(LONG, |w| w.engines[e].is_serving()), "it goes on without it when told to");
    w.everyone_is_back(e);
    w.settle_and_compare();
}

#[test]
fn an_operator_may_give_up_what_is_lost_and_it_comes_back_as_a_copy() {
    for ack in [AckPolicy::First, AckPolicy::Majority, AckPolicy::All] {
        let mut w = serving(wide(107, ack));
        (0..32).for_each(|unit| w.change_unit(0, unit));
        assert!(w.run_until(LONG, |w| crate::check::is_quiet(w, 0)));
        w.kill_engine(0);
        w.kill_agent(1, true);
        w.kill_agent(2, true);
        let e = w.start_engine(true);
        w.run_for(ms(21_000));
        assert!(matches!(w.refusals.last(), Some(StartRefusal::Missing { .. })), "{:?}", w.refusals);
        let command = |w: &mut World, names: &[&str]| {
            let replicas = names.iter().map(|n| n.parse().unwrap()).collect();
            w.command(e, Command::ActivateWithout { replicas })
        };
        if ack == AckPolicy::First {
            command(&mut w, &["b"]).unwrap();
            w.run_for(ms(25_000));
            assert!(!w.engines[e].is_serving(), "c is missing as well");
        }
        command(&mut w, &["b", "c"]).unwrap();
        assert!(w.run_until(LONG, |w| w.engines[e].is_serving()), "{ack:?}: {:?}", w.refusals.last());
        assert_eq!(w.view(e), "a");
        let token = w.write(e, 0, 8, true);
        w.done(e, token);
        // The next engine needs neither of them.
        w.kill_engine(e);
        let e = w.next_engine();
        assert_eq!(w.read_now(e, 0, 8), payload(token, 0, 8));
        w.start_agent(1);
        w.start_agent(2);
        w.everyone_is_back(e);
        w.settle_and_compare();
    }
}

#[test]
fn a_replica_that_comes_and_goes_neither_joins_for_moments_nor_is_copied_to_again_and_again() {
    let mut w = serving(Setup { lag_max: ms(500), ..wide(108, AckPolicy::First) });
    (0..32).for_each(|unit| w.change_unit(0, unit));
    let mut before = 0;
    for round in 0..20 {
        w.cut_off(2, ms(1000));
        (0..4).for_each(|unit| w.change_unit(0, unit));
        w.run_for(ms(2000));
        if round == 10 {
            before = w.copied_bytes;
        }
    }
    let views = w.notices.iter().filter(|n| matches!(n, Notice::ViewInForce { .. })).count();
    assert!(views < 16, "{views} views in 40 s");
    assert!(w.copied_bytes - before < 64 * UNIT);
    w.everyone_is_back(0);
    w.settle_and_compare();
}

#[test]
fn a_removed_replica_is_forgotten_and_one_that_is_added_gets_everything() {
    let mut w = serving(wide(109, AckPolicy::First));
    (0..32).for_each(|unit| w.change_unit(0, unit));
    let replica: protocol::ReplicaName = "c".parse().unwrap();
    w.command(0, Command::Remove { replica }).unwrap();
    assert!(w.run_until(LONG, |w| w.notices.iter().any(|n| matches!(n, Notice::Removed { .. }))));
    assert_eq!(w.view(0), "a b");
    w.change_unit(0, 3);
    w.run_for(ms(1000));
    assert!(w.agents[0].replica().tracked().is_empty(), "nothing is kept of it");
    w.add_replica(0, 2);
    w.everyone_is_back(0);
    assert_eq!(w.copied_bytes, 32 * UNIT);
    assert!(w.durable(2) > Seq(0));
    w.settle_and_compare();
}

#[test]
fn a_replica_that_was_given_up_stays_given_up_if_the_engine_dies_at_once() {
    // Whatever of the forced start is on record when the engine dies, the next one either needs the missing replica, and
    // has what it alone acknowledged, or does without it.
    for moment in 0..40 {
        let mut w = serving(wide(500 + moment, AckPolicy::First));
        w.change_unit(0, 0);
        let token = w.lose_what_c_alone_holds(0);
        let e = w.start_engine(true);
        w.run_for(ms(21_000));
        w.command(e, Command::ActivateWithout { replicas: vec!["c".parse().unwrap()] }).unwrap();
        w.run_for(ms(1000));
        w.run_until(LONG, |w| w.engines[e].volume.snapshot(w.now).seq > Seq(0));
        w.run_for(std::time::Duration::from_micros(100 * moment));
        w.kill_engine(e);
        w.start_agent(2);
        let e = w.next_engine();
        w.everyone_is_back(e);
        assert!(w.run_until(LONG, |w| crate::check::is_quiet(w, e)));
        // No change of the view but the forced one: it was forgotten, and then what c held must be there.
        let gave_up = w.agents[0].replica().superblock().views.seq > Seq(0);
        let images: Vec<Vec<u8>> = w.agents.iter().map(|a| a.disk.image.content()).collect();
        assert!(images[0] == images[1] && images[1] == images[2], "moment {moment}");
        let is_there = images[0][..4096] == payload(token, 0, 8);
        assert!(gave_up || is_there, "moment {moment}: lost, and nobody gave it up");
    }
}
