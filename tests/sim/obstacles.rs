//! Stories of what comes in the way of a replica on its way back: growth, bad blocks, members that hang, lateness.

use nbdcast::volume::{Command, Notice, ReadSpread, StartRefusal};
use protocol::AckPolicy;
use protocol::message::Condition;

use crate::oracle::payload;
use crate::scenario::{LONG, serving};
use crate::world::{Setup, World, ms};

const UNIT: u64 = 64 << 10;
/// Sectors of a unit.
const SECTORS: usize = 128;
const GROWN: u64 = 40 * UNIT;

/// A volume of 32 units.
fn wide(seed: u64, ack: AckPolicy) -> Setup {
    Setup { size_bytes: 32 * UNIT, journal_bytes: 1 << 20, lag_bytes_max: 256 << 10, ..Setup::quiet(seed, ack) }
}

impl World {
    fn order(&mut self, engine: usize, command: Command) {
        let now = self.engine_now(engine);
        self.engines[engine].volume.command(now, command).unwrap();
        self.pump_engine(engine);
    }

    fn put(&mut self, engine: usize, unit: usize) {
        let token = self.write(engine, unit * SECTORS + 3, 8, false);
        self.done(engine, token);
    }

    fn drop_by_power_cut(&mut self, agent: usize) {
        self.kill_agent(agent, true);
        let name = crate::world::replica_name(agent);
        assert!(self.run_until(LONG, |w| !w.engines[0].volume.snapshot(w.now).view.contains(&name)));
    }

    fn is_following(&self, agent: usize) -> bool {
        self.agents[agent].process.as_ref().is_some_and(|p| p.replica.superblock().syncing)
    }

    fn sizes(&self) -> Vec<u64> {
        self.agents.iter().map(|a| a.replica().size_bytes()).collect()
    }
}

#[test]
fn a_volume_that_grows_while_a_replica_comes_back_has_one_size_everywhere() {
    for moment in 0..80 {
        let mut w = serving(wide(500 + moment, AckPolicy::First));
        w.drop_by_power_cut(2);
        (0..8).for_each(|unit| w.put(0, unit));
        w.run_for(ms(1000));
        w.start_agent(2);
        w.run_for(ms(195) + std::time::Duration::from_micros(500 * moment));
        w.order(0, Command::Resize { size_bytes: GROWN });
        w.everyone_is_back(0);
        w.settle_and_compare();
        assert_eq!(w.sizes(), [GROWN; 3], "moment {moment}");
    }
}

#[test]
fn a_replica_that_begins_to_follow_behind_a_resize_that_is_not_acknowledged_has_the_new_size() {
    let mut w = serving(wide(600, AckPolicy::All));
    (0..32).for_each(|unit| w.put(0, unit));
    w.drop_by_power_cut(2);
    w.put(0, 3);
    let size = |w: &World, agent: usize| w.agents[agent].replica().size_bytes();
    w.order(0, Command::Resize { size_bytes: GROWN });
    let has_room = |w: &World, agent: usize| w.agents[agent].disk.image.content().len() as u64 >= GROWN;
    assert!(w.run_until(LONG, |w| has_room(w, 0) && has_room(w, 1)));
    w.stall_agent(1, ms(1500));
    w.start_agent(2);
    assert!(w.run_until(LONG, |w| size(w, 0) == GROWN));
    assert!(w.run_until(ms(1200), |w| w.is_following(2)), "it follows while the resize waits for one member");
    assert_ne!(size(&w, 1), GROWN);
    w.everyone_is_back(0);
    w.settle_and_compare();
    assert_eq!(w.sizes(), [GROWN; 3]);
}

#[test]
fn what_a_volume_has_grown_by_can_be_read_at_members_that_do_not_know_of_it_yet() {
    for seed in 700..720 {
        let mut w = serving(Setup { read: ReadSpread::Multicast, ..wide(seed, AckPolicy::First) });
        w.order(0, Command::Resize { size_bytes: GROWN });
        assert!(w.run_until(LONG, |w| w.engines[0].volume.size_bytes() == GROWN));
        let token = w.prefetch(0, 39 * SECTORS, SECTORS);
        w.done(0, token);
        w.run_for(ms(100));
        let lost = w.notices.iter().find(|n| matches!(n, Notice::Lost { .. } | Notice::Refuses { .. }));
        assert_eq!(lost, None, "seed {seed}: a member was asked for what lies behind its end");
    }
}

#[test]
fn an_engine_that_takes_over_while_the_volume_grows_serves_it_at_its_size() {
    for moment in 0..120 {
        let mut w = serving(wide(700 + moment, AckPolicy::First));
        let e = w.start_engine(true);
        w.run_for(std::time::Duration::from_micros(200 * moment));
        if w.engines[0].alive {
            w.order(0, Command::Resize { size_bytes: GROWN });
        }
        assert!(w.run_until(LONG, |w| w.engines[e].is_serving()));
        w.run_for(ms(500));
        let size = w.engines[e].volume.size_bytes();
        assert_eq!(w.sizes(), [size; 3], "moment {moment}");
    }
}

#[test]
fn a_bad_block_on_the_only_member_left_does_not_keep_another_replica_from_coming_back() {
    let mut w = serving(Setup { resync_rate_min: 1 << 20, ..wide(800, AckPolicy::First) });
    (0..32).for_each(|unit| w.put(0, unit));
    w.drop_by_power_cut(2);
    w.put(0, 5);
    w.run_for(ms(200));
    w.agents[0].disk.image.rot(5 * UNIT as usize + 2000);
    w.agents[0].rotten.push(5 * UNIT);
    w.start_agent(2);
    assert!(w.run_until(LONG, |w| w.is_following(2)));
    // The good copy is at one that is about to be lost.
    w.stall_agent(1, ms(60_000));
    w.run_for(ms(100));
    w.put(0, 9);
    w.drop_by_power_cut(1);
    assert_eq!(w.view(0), "a");
    w.start_agent(1);
    w.everyone_is_back(0);
    w.settle_and_compare();
}

#[test]
fn a_member_that_hangs_while_a_chunk_is_read_there_does_not_stop_the_writes() {
    let mut slowest = ms(0);
    for moment in 0..80 {
        let (journal_bytes, lag_bytes_max) = (16 << 20, 4 << 20);
        let setup = Setup { slowest: ms(20), lag_max: ms(5000), ..wide(900 + moment, AckPolicy::First) };
        let setup = Setup { journal_bytes, lag_bytes_max, ..setup };
        let mut w = serving(setup);
        w.drop_by_power_cut(2);
        (0..4).for_each(|unit| w.put(0, unit));
        w.start_agent(2);
        assert!(w.run_until(LONG, |w| w.is_following(2)));
        for i in 0..moment * 3 {
            w.write(0, (i as usize % 4) * SECTORS, 1, false);
            w.run_for(ms(1));
        }
        w.stall_agent(0, ms(4000));
        for unit in (0..4).cycle().take(40) {
            let (token, asked) = (w.write(0, unit * SECTORS, 8, false), w.now);
            w.done(0, token);
            slowest = slowest.max(w.now - asked);
        }
    }
    assert!(slowest < ms(1000), "the member that hangs shows: {slowest:?}");
}

#[test]
fn a_member_that_is_there_after_all_is_not_given_up() {
    for seed in 1000..1040 {
        let mut w = serving(wide(seed, AckPolicy::First));
        let token = w.lose_what_c_alone_holds(0);
        let e = w.start_engine(true);
        w.run_for(ms(21_000));
        assert!(matches!(w.refusals.last(), Some(StartRefusal::Missing { .. })), "{:?}", w.refusals);
        // The machine comes up again just when the operator loses patience.
        let now = w.engine_now(e);
        let replicas = vec!["c".parse().unwrap()];
        w.engines[e].volume.command(now, Command::ActivateWithout { replicas }).unwrap();
        w.start_agent(2);
        w.pump_engine(e);
        assert!(w.run_until(LONG, |w| w.engines[e].is_serving()));
        assert_eq!(w.read_now(e, 0, 8), payload(token, 0, 8), "seed {seed}: what it alone held is lost");
    }
}

#[test]
fn a_sync_that_fails_while_room_is_made_takes_the_replica_out_of_service() {
    for seed in 7000..7040 {
        let mut w = serving(wide(seed, AckPolicy::All));
        (0..8).for_each(|unit| w.put(0, unit));
        w.run_for(ms(100));
        w.agents[1].disk.fail_next_image_sync();
        w.order(0, Command::Resize { size_bytes: GROWN });
        let is_poisoned = |w: &World| w.agents[1].replica().condition() == Condition::Poisoned;
        assert!(w.run_until(ms(1000), is_poisoned), "what was applied before may be lost");
        (0..8).for_each(|unit| w.put(0, unit));
        w.kill_agent(1, false);
        w.start_agent(1);
        w.everyone_is_back(0);
        w.settle_and_compare();
    }
}

#[test]
fn a_large_write_to_what_a_volume_has_just_grown_by_survives_a_crash() {
    for seed in 8900..8910 {
        let mut w = serving(wide(seed, AckPolicy::All));
        w.order(0, Command::Resize { size_bytes: GROWN });
        let size = |w: &World| w.engines[0].volume.snapshot(w.now).size_bytes;
        assert!(w.run_until(LONG, |w| size(w) == GROWN), "the volume grows");
        // As large as a large write is, and behind what the last checkpoint knew.
        let data = vec![7; 120 << 10];
        let token = w.write_bytes(0, 33 * UNIT, data.clone());
        w.done(0, token);
        (0..w.agents.len()).for_each(|agent| w.kill_agent(agent, false));
        w.kill_engine(0);
        (0..w.agents.len()).for_each(|agent| w.start_agent(agent));
        let e = w.next_engine();
        assert!(w.run_until(LONG, |w| crate::check::is_quiet(w, e)));
        for agent in &w.agents {
            assert!(agent.disk.image.content()[33 * UNIT as usize..][..data.len()] == data, "seed {seed}");
        }
    }
}
