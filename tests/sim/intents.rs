//! Large writes that go to the image without going through the journal, told as stories: crashes at every point of one, what
//! a replay must leave alone, and what is settled before a volume serves again.

use nbdcast::volume::{Answer, Notice};
use protocol::AckPolicy;

use crate::check;
use crate::oracle::{Token, payload};
use crate::scenario::{LONG, serving};
use crate::wild::settlings;
use crate::world::{Setup, World, ms};

const BLOCK: usize = 8;
/// Sectors of a large write.
const LARGE: usize = 4 * BLOCK;
/// Writes of a large one: of its group, of each block, and to make them durable.
const WRITES: u64 = 1 + 4 + 1;

/// A world in which a large write was acknowledged.
fn written(setup: Setup) -> (World, Token) {
    let mut w = serving(setup);
    let token = w.write(0, 0, LARGE, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    assert!(w.agents.iter().all(|agent| agent.intents > 0), "it was written in place");
    (w, token)
}

impl World {
    /// A large write is given out, and these agents die after so many writes of it; then so does the engine.
    fn die_in_place(&mut self, deaths: &[(usize, u64)]) -> Token {
        for (agent, writes) in deaths {
            self.agents[*agent].dies_in_place = Some(*writes);
        }
        let engine = self.engines.len() - 1;
        let token = self.write(engine, 0, LARGE, false);
        let is_dead = |w: &World, agent: usize| w.agents[agent].process.is_none();
        assert!(self.run_until(LONG, |w| deaths.iter().all(|(agent, _)| is_dead(w, *agent))));
        self.kill_engine(engine);
        token
    }

    /// Waits until every replica is a member and holds all.
    fn all_are_equal(&mut self, engine: usize) {
        let are_equal = |w: &World| w.view(engine) == "a b c" && check::is_quiet(w, engine);
        assert!(self.run_until(LONG * 6, are_equal), "only {} are back", self.view(engine));
    }

    /// How many blocks hold what each of two writes left there, and how many cannot be read.
    fn blocks_of(&mut self, engine: usize, tokens: [Token; 2]) -> [usize; 3] {
        let mut counts = [0, 0, 0];
        for block in 0..4 {
            let read = self.read(engine, block * BLOCK, BLOCK);
            assert!(self.run_until(LONG, |w| w.answer(engine, read).is_some()));
            let which = match self.answer(engine, read).unwrap() {
                Ok(Answer::Data(found)) => {
                    let is_of = |token: &Token| *found == payload(*token, block * BLOCK, BLOCK);
                    tokens.iter().position(is_of).unwrap_or_else(|| panic!("block {block} is of no write"))
                }
                Ok(other) => panic!("a read is answered with {other:?}"),
                Err(_) => 2,
            };
            counts[which] += 1;
        }
        counts
    }
}

#[test]
fn a_crash_at_any_point_of_a_large_write_leaves_each_block_as_before_or_as_after_it() {
    for (writes, replicas) in (0..=WRITES).flat_map(|writes| [(writes, 1), (writes, 3)]) {
        for seed in 5000..5010 {
            let (mut w, before) = written(Setup { replicas, ..Setup::quiet(seed, AckPolicy::All) });
            // The others get nothing of it.
            (1..replicas).for_each(|agent| w.kill_agent(agent, false));
            let token = w.die_in_place(&[(0, writes)]);
            assert!(w.answer(0, token).is_none());
            (0..replicas).for_each(|agent| w.start_agent(agent));
            if seed % 2 == 0 {
                // What was found then is found again.
                w.kill_agent(0, false);
                w.start_agent(0);
            }
            let e = w.next_engine();
            let found @ [old, new, torn] = w.blocks_of(e, [before, token]);
            let expected = match writes {
                0 | 1 => 0..=0,
                // All of it is there.
                WRITES.. => 4..=4,
                // Those that have nothing of it stand for the volume.
                2.. if replicas > 1 => 0..=0,
                // Of the last block so written it is chance how much was.
                2.. => (writes as usize - 2)..=(writes as usize - 1),
            };
            // By chance the last block is whole, and with it the write.
            let is_whole = writes == WRITES - 1 && new == 4;
            assert!((expected.contains(&new) || is_whole) && old + new + torn == 4, "{found:?} after {writes} writes");
            assert!(torn == 0 || (torn == 1 && replicas == 1), "{found:?} after {writes} writes");
            w.settle_and_compare();
            w.kill_engine(e);
            let e = w.next_engine();
            assert_eq!(w.blocks_of(e, [before, token]), found, "what was read once stays");
            w.settle_and_compare();
        }
    }
}

#[test]
fn an_acknowledged_large_write_survives_a_power_cut_of_everything() {
    for seed in 5020..5040 {
        let (mut w, _) = written(Setup::quiet(seed, AckPolicy::First));
        let token = w.write(0, 0, LARGE, false);
        w.done(0, token);
        (0..3).for_each(|agent| w.kill_agent(agent, true));
        w.kill_engine(0);
        (0..3).for_each(|agent| w.start_agent(agent));
        let e = w.next_engine();
        assert_eq!(w.read_now(e, 0, LARGE), payload(token, 0, LARGE));
        w.settle_and_compare();
    }
}

#[test]
fn a_replay_leaves_alone_what_later_large_writes_wrote_and_does_again_what_came_after_them() {
    for seed in 5040..5050 {
        let mut w = serving(Setup::quiet(seed, AckPolicy::All));
        let mut expected = vec![0; (LARGE + 2 * BLOCK) * 512];
        // Around and within the large ones, whole blocks and parts of some, none of it in a checkpoint.
        let writes =
            [(3, 2), (0, BLOCK), (BLOCK, LARGE), (LARGE - 4, 12), (0, LARGE), (5, 2), (0, LARGE), (BLOCK + 1, 9)];
        for (first, count) in writes {
            let token = w.write(0, first, count, false);
            w.done(0, token);
            assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
            expected[first * 512..(first + count) * 512].copy_from_slice(&payload(token, first, count));
        }
        assert!(w.agents.iter().all(|agent| agent.intents == 3));
        (0..3).for_each(|agent| w.kill_agent(agent, seed % 2 == 0));
        w.kill_engine(0);
        (0..3).for_each(|agent| w.start_agent(agent));
        let e = w.next_engine();
        assert!(w.read_now(e, 0, LARGE + 2 * BLOCK) == expected, "seed {seed}");
        w.settle_and_compare();
    }
}

#[test]
fn blocks_that_members_left_differently_are_chosen_once_and_for_all() {
    for seed in 5060..5080 {
        let (mut w, before) = written(Setup::quiet(seed, AckPolicy::Majority));
        let token = w.die_in_place(&[(0, 1), (1, 3), (2, 4)]);
        // Two of them start; the third returns later, with more of the write than was chosen.
        w.start_agent(0);
        w.start_agent(1);
        let e = w.next_engine();
        assert!(settlings(&w) > 0);
        let chosen = w.blocks_of(e, [before, token]);
        w.start_agent(2);
        w.all_are_equal(e);
        assert_eq!(w.blocks_of(e, [before, token]), chosen);
        w.settle_and_compare();
        // Each of them alone tells the same.
        for gone in 0..3 {
            w.kill_agent(gone, false);
            let e = w.engines.len() - 1;
            w.kill_engine(e);
            let e = w.next_engine();
            assert_eq!(w.blocks_of(e, [before, token]), chosen);
            w.start_agent(gone);
            w.all_are_equal(e);
        }
        w.settle_and_compare();
    }
}

#[test]
fn an_engine_that_dies_while_it_settles_has_chosen_nothing() {
    for seed in 5080..5100 {
        let (mut w, before) = written(Setup::quiet(seed, AckPolicy::All));
        let token = w.die_in_place(&[(0, 3), (1, 1), (2, 4)]);
        (0..3).for_each(|agent| w.start_agent(agent));
        let e = w.start_engine(true);
        assert!(w.run_until(LONG, |w| settlings(w) > 0));
        w.run_for(ms(seed % 10));
        w.kill_engine(e);
        let e = w.next_engine();
        let chosen = w.blocks_of(e, [before, token]);
        w.settle_and_compare();
        w.kill_engine(e);
        let e = w.next_engine();
        assert_eq!(w.blocks_of(e, [before, token]), chosen);
    }
}

#[test]
fn a_member_that_dies_in_a_large_write_of_an_engine_that_lives_gets_it_again_and_has_lost_nothing() {
    for writes in 0..=WRITES {
        let (mut w, _) = written(Setup::quiet(5100 + writes, AckPolicy::First));
        w.agents[1].dies_in_place = Some(writes);
        let token = w.write(0, 0, LARGE, false);
        w.done(0, token);
        assert!(w.run_until(LONG, |w| w.agents[1].process.is_none()));
        w.start_agent(1);
        assert!(w.run_until(LONG, |w| check::is_quiet(w, 0) && w.view(0) == "a b c"));
        assert!(!w.notices.iter().any(|n| matches!(n, Notice::LostData { .. })));
        assert_eq!(w.read_now(0, 0, LARGE), payload(token, 0, LARGE));
        assert_eq!(w.agents[1].replica().superblock().unsettled, []);
        w.settle_and_compare();
    }
}

#[test]
fn where_the_image_has_no_room_large_writes_go_through_the_journal() {
    let (mut w, _) = written(Setup::quiet(5120, AckPolicy::All));
    let intents = w.agents[1].intents;
    w.agents[1].disk.set_full(true);
    let token = w.write(0, 0, LARGE, false);
    w.done(0, token);
    assert_eq!(w.agents[1].intents, intents);
    w.agents[1].disk.set_full(false);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    assert_eq!(w.read_now(0, 0, LARGE), payload(token, 0, LARGE));
    w.settle_and_compare();
}

#[test]
fn a_group_that_was_cut_off_is_not_found_again_where_the_one_in_its_place_went_to_the_start_of_the_ring() {
    for groups in 0..40 {
        let (mut w, _) = written(Setup { size_bytes: 256 << 10, ..Setup::quiet(5140, AckPolicy::All) });
        for _ in 0..groups {
            let token = w.write(0, 200, BLOCK, false);
            w.done(0, token);
        }
        assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
        w.agents[1].dies_in_place = Some(1);
        let large = w.write(0, 0, LARGE, false);
        assert!(w.run_until(LONG, |w| w.agents[1].process.is_none()));
        // It comes again with its bytes, so that somewhere it does not fit where the intent was.
        w.start_agent(1);
        w.agents[1].disk.set_full(true);
        w.done(0, large);
        w.agents[1].disk.set_full(false);
        let later = w.write(0, 100, BLOCK, false);
        w.done(0, later);
        w.kill_agent(1, false);
        w.start_agent(1);
        assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)), "after {groups} groups");
        assert!(w.read_now(0, 0, LARGE) == payload(large, 0, LARGE));
        assert_eq!(w.view(0), "a b c", "after {groups} groups");
        w.settle_and_compare();
    }
}

#[test]
fn a_member_that_got_a_record_as_later_ones_left_it_does_not_differ_from_others_at_that_place() {
    let mut ahead = 0;
    for seed in 5200..5240 {
        let (mut w, _) = written(Setup::quiet(seed, AckPolicy::Majority));
        // a and b have the large write, a alone what changes a part of it, c neither.
        w.kill_agent(2, false);
        let large = w.write(0, 0, LARGE, false);
        w.done(0, large);
        let place = w.durable(0);
        assert!(w.run_until(LONG, |w| w.durable(1) == place));
        w.kill_agent(1, false);
        let later = w.write(0, 0, BLOCK, false);
        assert!(w.run_until(LONG, |w| w.durable(0) > place));
        w.kill_engine(0);
        // c gets both from a, and all but c die when it has the first.
        w.start_agent(2);
        let e = w.start_engine(true);
        assert!(w.run_until(LONG, |w| w.durable(2) == place));
        w.kill_engine(e);
        w.kill_agent(0, false);
        w.kill_agent(2, false);
        w.start_agent(2);
        ahead += u64::from(w.durable(2) == place && w.amended > 0);
        w.start_agent(1);
        let e = w.next_engine();
        let [old, new, _] = w.blocks_of(e, [large, later]);
        assert!(old + new == 4 && old >= 3);
        w.settle_and_compare();
        w.start_agent(0);
        w.all_are_equal(e);
        assert_eq!(w.blocks_of(e, [large, later]), [old, new, 0]);
        w.settle_and_compare();
    }
    assert!(ahead > 5, "c was ahead of its log {ahead} times");
}

#[test]
fn a_torn_block_that_nobody_has_sound_does_not_cost_the_only_replica_when_its_connection_breaks() {
    let mut torn_blocks = 0;
    for seed in 5260..5270 {
        let (mut w, before) = written(Setup { replicas: 1, ..Setup::quiet(seed, AckPolicy::First) });
        let token = w.die_in_place(&[(0, 3)]);
        w.start_agent(0);
        let e = w.next_engine();
        let [_, _, torn] = w.blocks_of(e, [before, token]);
        torn_blocks += torn;
        w.conns_of_agent(0).into_iter().for_each(|conn| w.cut(conn, false));
        w.run_for(ms(500));
        let again = w.write(e, 0, LARGE, false);
        w.done(e, again);
        assert!(w.read_now(e, 0, LARGE) == payload(again, 0, LARGE));
        assert!(!w.notices.iter().any(|n| matches!(n, Notice::LostData { .. })));
        w.agents[0].rotten.clear();
        w.settle_and_compare();
    }
    assert!(torn_blocks > 3, "{torn_blocks} blocks were torn");
}

#[test]
fn what_a_replica_alone_has_of_a_large_write_is_copied_over_when_it_returns() {
    for seed in 5280..5290 {
        let (mut w, before) = written(Setup::quiet(seed, AckPolicy::Majority));
        // All know that all have it, so that the engine has no other reason to copy it.
        w.run_for(ms(6000));
        w.kill_agent(0, false);
        w.kill_agent(1, false);
        w.die_in_place(&[(2, 4)]);
        w.start_agent(0);
        w.start_agent(1);
        let e = w.next_engine();
        assert!(w.run_until(LONG, |w| w.view(e) == "a b"));
        w.start_agent(2);
        assert!(!w.agents[2].replica().superblock().unsettled.is_empty());
        w.all_are_equal(e);
        assert!(w.read_now(e, 0, LARGE) == payload(before, 0, LARGE));
        w.settle_and_compare();
    }
}

#[test]
fn a_write_that_was_acknowledged_survives_two_crashes_in_the_midst_of_the_next() {
    for writes in 2..WRITES {
        let (mut w, _) = written(Setup { replicas: 1, ..Setup::quiet(5300 + writes, AckPolicy::All) });
        let acknowledged = w.durable(0);
        w.die_in_place(&[(0, writes)]);
        // Nothing else happens in between: no engine comes.
        for _ in 0..2 {
            w.start_agent(0);
            assert!(w.durable(0) >= acknowledged, "after {writes} writes");
            w.kill_agent(0, false);
        }
    }
}

#[test]
fn what_a_source_gives_of_unsettled_blocks_is_known_to_be_ahead_of_the_log() {
    let mut ahead = 0;
    for seed in 5320..5370 {
        let (mut w, _) = written(Setup::quiet(seed, AckPolicy::Majority));
        // c lacks a large write; of the next one a has a part, and b nothing.
        w.kill_agent(2, false);
        let before = w.write(0, 0, LARGE, false);
        w.done(0, before);
        let place = w.durable(0).max(w.durable(1));
        let have_it = |w: &World| (0..2).all(|agent| w.agents[agent].replica().applied().seq == place);
        assert!(w.run_until(LONG, have_it));
        let token = w.die_in_place(&[(0, 4), (1, 0)]);
        // c gets the first one from a, where the second has been; then the engine and a are gone.
        w.start_agent(0);
        w.start_agent(2);
        let e = w.start_engine(true);
        assert!(w.run_until(LONG, |w| w.durable(2) == place), "{:?}", w.refusals);
        w.kill_engine(e);
        w.kill_agent(0, false);
        ahead += u64::from(!w.agents[2].replica().superblock().unsettled.is_empty());
        w.start_agent(1);
        let e = w.next_engine();
        let found = w.blocks_of(e, [before, token]);
        w.settle_and_compare();
        w.start_agent(0);
        w.all_are_equal(e);
        assert_eq!(w.blocks_of(e, [before, token]), found);
    }
    assert!(ahead > 20, "c was ahead of its log {ahead} times");
}
