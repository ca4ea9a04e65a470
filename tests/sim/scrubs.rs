//! Scrubs of a volume at work, told as stories: members are compared as of one place in the order, and what differs is a
//! fault of a disk.

use listener_agent::disk::RawFile;
use nbdcast::volume::{Command, CommandRefusal, Damage, Notice, ScrubFound, ScrubMark};
use protocol::AckPolicy;
use protocol::checksum::stored_block_checksum;

use crate::check;
use crate::scenario::{LONG, serving};
use crate::world::{Happening, Setup, World, ms};

impl World {
    /// Begins a scrub, or goes on with one, and says whether it did.
    pub fn scrub(&mut self, engine: usize, from: ScrubMark) -> Result<(), CommandRefusal> {
        self.trace(|| format!("e{engine} is to scrub from {}", from.position));
        self.command(engine, Command::Scrub { from })
    }

    /// In a random run with scrubs, the next one comes soon.
    pub fn plan_scrub(&mut self, engine: usize) {
        if self.wild && self.setup.scrubs {
            let delay = self.rng.within(1, 150);
            self.after(ms(delay), Happening::Scrub { engine });
        }
    }

    pub fn scrub_again(&mut self, engine: usize) {
        if self.wild && self.engines[engine].is_serving() {
            // One that another engine began may be somewhere in the midst.
            let blocks = self.setup.size_bytes / 4096;
            let position = if self.rng.percent(25) { self.rng.below(blocks) * 4096 } else { 0 };
            let outcome = self.scrub(engine, ScrubMark { position, ..ScrubMark::default() });
            self.trace(|| format!("e{engine}: {outcome:?}"));
        }
    }

    /// The ends of scrubs that looked at the whole volume.
    pub fn scrubs_finished(&self) -> Vec<ScrubFound> {
        let finished = |notice: &Notice| match notice {
            Notice::ScrubEnded { mark, is_finished: true } => Some(mark.found),
            _other => None,
        };
        self.notices.iter().filter_map(finished).collect()
    }

    /// Begins a scrub and returns where it is when it has got through 1 MiB.
    fn scrub_some(&mut self, engine: usize) -> u64 {
        self.scrub(engine, ScrubMark::default()).expect("no scrub is under way");
        let position = |w: &World| w.engines[engine].volume.snapshot(w.now).scrub.map(|s| s.mark.position);
        assert!(self.run_until(LONG, |w| position(w).is_some_and(|at| at > 1 << 20)));
        position(self).expect("it is under way")
    }

    /// Scrubs all of the volume and returns what was found.
    pub fn scrub_all(&mut self, engine: usize) -> ScrubFound {
        let before = self.scrubs_finished().len();
        self.scrub(engine, ScrubMark::default()).expect("no scrub is under way");
        let is_over = self.run_until(ms(120_000), |w| w.scrubs_finished().len() > before);
        assert!(is_over, "the scrub does not end: {:?}", self.engines[engine].volume.snapshot(self.now).scrub);
        self.scrubs_finished()[before]
    }
}

/// Bytes that match their checksum and are not what the other replicas hold.
fn forge(w: &mut World, agent: usize, block: u64) {
    let bytes = [0xbd; 4096];
    w.agents[agent].disk.image.write_at(block * 4096, &bytes).unwrap();
    let stored = stored_block_checksum(&bytes).to_le_bytes();
    w.agents[agent].disk.checksums.write_at(block * 4, &stored).unwrap();
}

fn found_of(w: &World) -> Vec<(String, Damage, u64)> {
    let found = |n: &Notice| match n {
        Notice::BadBlock { replica, what, offset } => Some((replica.to_string(), *what, *offset)),
        _other => None,
    };
    w.notices.iter().filter_map(found).collect()
}

#[test]
fn members_that_hold_one_order_are_found_equal() {
    let mut w = serving(Setup::quiet(3001, AckPolicy::First));
    for i in 0..10 {
        let write = w.write(0, i * 11, 7, false);
        w.done(0, write);
    }
    assert_eq!(w.scrub_all(0), ScrubFound::default());
}

#[test]
fn a_member_that_gets_a_scrub_and_the_writes_around_it_at_once_shows_no_later_one() {
    let mut w = serving(Setup::quiet(3002, AckPolicy::First));
    w.stall_agent(1, ms(100));
    // While the first is journaled the others come together.
    for first in [64, 0] {
        let before = w.write(0, first, 8, false);
        w.done(0, before);
    }
    w.scrub(0, ScrubMark::default()).unwrap();
    let after = w.write(0, 0, 8, false);
    w.done(0, after);
    assert!(w.run_until(LONG, |w| !w.scrubs_finished().is_empty()));
    assert_eq!(w.scrubs_finished(), [ScrubFound::default()], "b could apply both writes before it looked");
    w.settle_and_compare();
}

#[test]
fn a_scrub_during_writes_of_the_same_few_blocks_finds_nothing() {
    let mut w = serving(Setup { slowest: ms(4), ..Setup::quiet(3003, AckPolicy::First) });
    for round in 0..60 {
        w.scrub(0, ScrubMark::default()).unwrap();
        for i in 0..12 {
            w.write(0, (round * 7 + i * 3) % 40, 5, false);
            w.run_for(ms(1));
        }
        assert!(w.run_until(LONG, |w| w.scrubs_finished().len() > round));
    }
    assert!(w.scrubs_finished().iter().all(|found| *found == ScrubFound::default()));
    w.settle_and_compare();
}

#[test]
fn a_scrub_goes_on_where_one_of_an_earlier_engine_was() {
    let mut w = serving(large(3004));
    w.scrub_some(0);
    let mark = w.engines[0].volume.snapshot(w.now).scrub.expect("it is under way").mark;
    w.kill_engine(0);
    let e = w.next_engine();
    w.scrub(e, mark).unwrap();
    assert!(w.notices.contains(&Notice::Scrubbing { position: mark.position }));
    assert!(w.run_until(LONG, |w| !w.scrubs_finished().is_empty()));
    assert_eq!(w.scrubs_finished(), [ScrubFound::default()]);
}

#[test]
fn one_scrub_at_a_time_and_it_can_be_stopped() {
    let mut w = serving(Setup::quiet(3005, AckPolicy::First));
    assert_eq!(w.command(0, Command::StopScrub), Err(CommandRefusal::NotScrubbing));
    w.scrub(0, ScrubMark::default()).unwrap();
    assert_eq!(w.scrub(0, ScrubMark::default()), Err(CommandRefusal::Scrubbing));
    w.command(0, Command::StopScrub).unwrap();
    w.run_for(ms(500));
    assert_eq!(w.scrubs_finished(), []);
    assert_eq!(w.scrub_all(0), ScrubFound::default());
}

#[test]
fn a_member_out_of_reach_is_waited_for_until_it_is_back() {
    let mut w = serving(Setup { lag_max: ms(10_000), ..Setup::quiet(3006, AckPolicy::First) });
    w.kill_agent(2, false);
    w.run_for(ms(50));
    w.scrub(0, ScrubMark::default()).unwrap();
    w.run_for(ms(2000));
    let scrub = w.engines[0].volume.snapshot(w.now).scrub.expect("it waits");
    assert!(scrub.waits_for.is_some_and(|what| what.contains("replica c")), "nothing was compared with c");
    w.start_agent(2);
    assert!(w.run_until(LONG, |w| !w.scrubs_finished().is_empty()));
    assert_eq!(w.scrubs_finished(), [ScrubFound::default()]);
}

#[test]
fn each_member_out_of_reach_is_waited_for_a_minute() {
    let mut w = serving(Setup { lag_max: ms(600_000), ..Setup::quiet(3018, AckPolicy::First) });
    w.kill_agent(1, false);
    w.run_for(ms(50));
    w.scrub(0, ScrubMark::default()).unwrap();
    w.run_for(ms(50_000));
    w.kill_agent(2, false);
    w.start_agent(1);
    w.run_for(ms(30_000));
    let scrub = w.engines[0].volume.snapshot(w.now).scrub.expect("it waits for c now");
    assert_eq!(scrub.waits_for.as_deref(), Some("replica c cannot be reached"));
    w.start_agent(2);
    assert!(w.run_until(LONG, |w| !w.scrubs_finished().is_empty()));
    assert_eq!(w.scrubs_finished(), [ScrubFound::default()]);
}

#[test]
fn a_replica_out_of_the_view_is_not_compared() {
    let mut w = serving(Setup::quiet(3007, AckPolicy::First));
    w.kill_agent(2, false);
    assert!(w.run_until(LONG, |w| w.view(0) == "a b"));
    let write = w.write(0, 0, 8, false);
    w.done(0, write);
    assert_eq!(w.scrub_all(0), ScrubFound::default());
}

/// A volume that takes seconds to scrub.
fn large(seed: u64) -> Setup {
    Setup { size_bytes: 4 << 20, scrub_rate_min: 1 << 20, ..Setup::quiet(seed, AckPolicy::First) }
}

#[test]
fn a_member_that_joins_in_the_midst_is_not_called_in_order_where_it_did_not_look() {
    let mut w = serving(large(3013));
    w.kill_agent(2, false);
    assert!(w.run_until(LONG, |w| w.view(0) == "a b"));
    let position = w.scrub_some(0);
    w.start_agent(2);
    w.everyone_is_back(0);
    assert!(w.run_until(LONG, |w| !w.scrubs_finished().is_empty()));
    let found = w.scrubs_finished()[0];
    assert!((position..4 << 20).contains(&found.incomplete_bytes), "{found:?}");
    assert_eq!(ScrubFound { incomplete_bytes: 0, ..found }, ScrubFound::default());
    assert_eq!(w.scrub_all(0), ScrubFound::default());
}

#[test]
fn what_a_volume_grows_by_in_the_midst_is_looked_at_as_well() {
    let mut w = serving(large(3014));
    w.scrub_some(0);
    w.command(0, Command::Resize { size_bytes: 6 << 20 }).unwrap();
    assert!(w.run_until(LONG, |w| w.engines[0].volume.size_bytes() == 6 << 20));
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    w.agents[1].disk.image.rot((5 << 20) + 77);
    w.agents[1].rotten.push(5 << 20);
    assert!(w.run_until(LONG, |w| !w.scrubs_finished().is_empty()));
    assert_eq!(w.scrubs_finished(), [ScrubFound { bad_blocks: 1, repaired_blocks: 1, ..ScrubFound::default() }]);
}

#[test]
fn a_member_whose_reads_hang_is_named_and_not_waited_for_for_ever() {
    let mut w = serving(Setup::quiet(3015, AckPolicy::First));
    w.agents[2].reads_hang_until = ms(600_000);
    w.scrub(0, ScrubMark::default()).unwrap();
    w.run_for(ms(3000));
    let scrub = w.engines[0].volume.snapshot(w.now).scrub.expect("it waits");
    assert_eq!(scrub.waits_for.as_deref(), Some("replica c to answer"));
    assert!(w.run_until(ms(120_000), |w| !w.scrubs_finished().is_empty()));
    assert!(w.now > ms(90_000), "it had 30 s to answer, and a minute more");
    let incomplete_bytes = w.setup.size_bytes;
    assert_eq!(w.scrubs_finished(), [ScrubFound { incomplete_bytes, ..ScrubFound::default() }]);
    w.run_for(ms(600_000));
    assert_eq!(w.reads_outstanding(0), 0, "answers that come late are taken for nothing");
    assert_eq!(w.scrub_all(0), ScrubFound::default());
}

#[test]
fn a_scrub_asks_no_more_of_a_member_than_it_may_have_outstanding() {
    let mut w = serving(Setup { in_flight_max: 1000, lag_max: ms(60_000), ..Setup::quiet(3020, AckPolicy::First) });
    w.stall_agent(2, ms(8000));
    for _ in 0..150 {
        w.scrub(0, ScrubMark::default()).unwrap();
        w.run_for(ms(5));
        w.command(0, Command::StopScrub).unwrap();
    }
    assert_eq!(w.reads_outstanding(0), 80, "as many as clients may have, and those of a scrub");
    w.scrub(0, ScrubMark::default()).unwrap();
    let scrub = w.engines[0].volume.snapshot(w.now).scrub.expect("it waits");
    assert_eq!(scrub.waits_for.as_deref(), Some("replica c to answer"));
    assert!(w.run_until(LONG, |w| !w.scrubs_finished().is_empty()));
    assert_eq!(w.scrubs_finished(), [ScrubFound::default()], "it goes on when c does");
}

#[test]
fn looks_of_a_scrub_that_is_stopped_are_cancelled() {
    let mut w = serving(large(3021));
    w.agents[2].reads_hang_until = ms(3_600_000);
    for _ in 0..40 {
        w.scrub(0, ScrubMark::default()).unwrap();
        w.run_for(ms(50));
        w.command(0, Command::StopScrub).unwrap();
        w.run_for(ms(50));
    }
    // What is at work at the member cannot be taken back, the others can.
    assert!((1..=4).contains(&w.reads_outstanding(0)), "{} are outstanding", w.reads_outstanding(0));
}

#[test]
fn a_member_whose_reads_hang_does_not_slow_down_the_scrub_of_the_others() {
    let mut w = serving(Setup { size_bytes: 16 << 20, ..Setup::quiet(3022, AckPolicy::First) });
    w.agents[2].reads_hang_until = ms(6_000_000);
    w.scrub(0, ScrubMark::default()).unwrap();
    assert!(w.run_until(ms(120_000), |w| !w.scrubs_finished().is_empty()), "each chunk waits for c");
    assert_eq!(w.scrubs_finished(), [ScrubFound { incomplete_bytes: 16 << 20, ..ScrubFound::default() }]);
}

#[test]
fn while_a_client_waits_for_its_answer_a_scrub_looks_once_at_a_time() {
    for (is_write, looks) in [(true, 1), (false, 4)] {
        let mut w = serving(Setup { lag_max: ms(60_000), ..large(3023) });
        w.scrub(0, ScrubMark::default()).unwrap();
        (0..3).for_each(|agent| w.stall_agent(agent, ms(3000)));
        let write = is_write.then(|| w.write(0, 0, 8, false));
        w.run_for(ms(2000));
        assert_eq!(w.reads_outstanding(0), 3 * looks, "looks at three members each");
        write.into_iter().for_each(|write| drop(w.done(0, write)));
        assert!(w.run_until(LONG, |w| !w.scrubs_finished().is_empty()));
    }
}

#[test]
fn a_scrub_waits_while_nothing_can_be_repaired() {
    let mut w = serving(Setup::quiet(3016, AckPolicy::Majority));
    w.agents[0].disk.image.rot(77);
    w.agents[0].rotten.push(0);
    [1, 2].into_iter().for_each(|agent| w.cut_off(agent, ms(110_000)));
    let is_frozen = |w: &World| w.notices.contains(&Notice::Frozen(true));
    assert!(w.run_until(LONG, is_frozen));
    w.scrub(0, ScrubMark::default()).unwrap();
    w.run_for(ms(90_000));
    let scrub = w.engines[0].volume.snapshot(w.now).scrub.expect("it waits");
    assert_eq!(scrub.waits_for.as_deref(), Some("the volume is frozen"));
    assert_eq!(scrub.mark, ScrubMark::default(), "more than a minute later");
    assert!(w.run_until(ms(60_000), |w| !w.scrubs_finished().is_empty()));
    assert_eq!(w.scrubs_finished(), [ScrubFound { bad_blocks: 1, repaired_blocks: 1, ..ScrubFound::default() }]);
}

#[test]
fn two_sound_copies_that_differ_are_nobodys_guess() {
    let mut w = serving(Setup { replicas: 2, ..Setup::quiet(3008, AckPolicy::First) });
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    forge(&mut w, 0, 3);
    let found = w.scrub_all(0);
    assert_eq!(found, ScrubFound { differing_blocks: 1, unrepaired_blocks: 1, ..ScrubFound::default() });
    assert!(w.notices.contains(&Notice::NoMajority { offset: 3 * 4096 }));
}

#[test]
fn what_one_of_three_says_alone_is_named_and_overruled() {
    let mut w = serving(Setup::quiet(3009, AckPolicy::First));
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    forge(&mut w, 1, 3);
    let found = w.scrub_all(0);
    assert_eq!(found, ScrubFound { differing_blocks: 1, repaired_blocks: 1, ..ScrubFound::default() });
    assert_eq!(found_of(&w), [("b".to_owned(), Damage::Differs, 3 * 4096)]);
    w.settle_and_compare();
}

#[test]
fn what_a_member_lacks_that_was_away_does_not_come_from_one_that_is_wrong() {
    let mut w = serving(Setup::quiet(3019, AckPolicy::First));
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    forge(&mut w, 0, 3);
    w.scrub(0, ScrubMark::default()).unwrap();
    assert!(w.run_until(LONG, |w| !found_of(w).is_empty()));
    w.kill_agent(1, false);
    assert!(w.run_until(LONG, |w| w.view(0) == "a c"));
    // What b lacks of the block it gets from whoever is there.
    let write = w.write(0, 24, 1, false);
    w.done(0, write);
    w.start_agent(1);
    w.everyone_is_back(0);
    w.run_for(ms(10_000));
    let forged = |agent: &usize| w.agents[*agent].disk.image.content()[4 * 4096 - 1] == 0xbd;
    assert_eq!((0..3).filter(forged).collect::<Vec<usize>>(), Vec::<usize>::new(), "what one of three said");
    w.settle_and_compare();
}

#[test]
fn a_majority_of_those_in_reach_does_not_overrule_who_is_away() {
    let long = ms(600_000);
    let setup = Setup { replicas: 4, lag_max: long, freeze: long, ..Setup::quiet(3012, AckPolicy::First) };
    let mut w = serving(setup);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    [1, 2].into_iter().for_each(|agent| forge(&mut w, agent, 3));
    w.kill_agent(3, false);
    w.run_for(ms(100));
    let found = w.scrub_all(0);
    assert_eq!((found.differing_blocks, found.repaired_blocks, found.unrepaired_blocks), (1, 0, 1));
    assert_eq!(found.incomplete_bytes, w.setup.size_bytes);
    assert_eq!(found_of(&w), [], "nobody is called wrong");
    let ties = w.notices.iter().filter(|n| **n == Notice::NoMajority { offset: 3 * 4096 }).count();
    assert_eq!(ties, 1);
    let block = |w: &World, agent: usize| w.agents[agent].disk.image.content()[3 * 4096..4 * 4096].to_vec();
    assert_ne!(block(&w, 0), block(&w, 1), "what a and d hold is not overwritten");
    assert_eq!(block(&w, 0), block(&w, 3));
    w.start_agent(3);
    let found = w.scrub_all(0);
    assert_eq!((found.differing_blocks, found.unrepaired_blocks), (1, 1), "two against two");
}

#[test]
fn flipped_bits_are_found_and_repaired_wherever_they_are() {
    let mut w = serving(Setup::quiet(3010, AckPolicy::First));
    let write = w.write(0, 0, 256, false);
    w.done(0, write);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    for (agent, block) in [(0, 1), (1, 1), (2, 30)] {
        w.agents[agent].disk.image.rot(block * 4096 + 77);
        w.agents[agent].rotten.push(block as u64 * 4096);
    }
    let found = w.scrub_all(0);
    assert_eq!(found, ScrubFound { bad_blocks: 3, repaired_blocks: 3, ..ScrubFound::default() });
    let bad = Damage::ChecksumMismatch;
    assert_eq!(
        found_of(&w),
        [("a".to_owned(), bad, 4096), ("b".to_owned(), bad, 4096), ("c".to_owned(), bad, 30 * 4096)]
    );
    w.agents.iter_mut().for_each(|agent| agent.rotten.clear());
    assert_eq!(w.scrub_all(0), ScrubFound::default());
    w.settle_and_compare();
}

#[test]
fn a_copy_that_is_good_again_repairs_those_that_are_not() {
    let mut w = serving(Setup::quiet(3017, AckPolicy::First));
    let write = w.write(0, 0, 64, false);
    w.done(0, write);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    (0..3).for_each(|agent| w.rot(agent, 2 * 4096 + 9));
    let found = w.scrub_all(0);
    assert_eq!((found.bad_blocks, found.unrepaired_blocks), (3, 1));
    assert!(w.run_until(LONG, |w| w.notices.contains(&Notice::NoGoodCopy { offset: 2 * 4096 })));
    // The same bit flips back.
    w.rot(0, 2 * 4096 + 9);
    let found = w.scrub_all(0);
    assert_eq!(found, ScrubFound { bad_blocks: 2, repaired_blocks: 2, ..ScrubFound::default() });
    assert_eq!((0..3).map(|agent| w.found_and_repaired(0, agent)).collect::<Vec<_>>(), [(1, 1); 3]);
    w.agents.iter_mut().for_each(|agent| agent.rotten.clear());
    assert_eq!(w.scrub_all(0), ScrubFound::default());
    w.settle_and_compare();
}

#[test]
fn a_block_that_is_bad_everywhere_is_reported_and_can_be_overwritten() {
    let mut w = serving(Setup::quiet(3011, AckPolicy::First));
    let write = w.write(0, 0, 64, false);
    w.done(0, write);
    assert!(w.run_until(LONG, |w| check::is_quiet(w, 0)));
    for agent in 0..3 {
        w.agents[agent].disk.image.rot(2 * 4096);
        w.agents[agent].rotten.push(2 * 4096);
    }
    let found = w.scrub_all(0);
    assert_eq!(found, ScrubFound { bad_blocks: 3, unrepaired_blocks: 1, ..ScrubFound::default() });
    assert!(w.notices.contains(&Notice::NoGoodCopy { offset: 2 * 4096 }));
    let write = w.write(0, 16, 8, false);
    w.done(0, write);
    assert_eq!(w.scrub_all(0), ScrubFound::default());
}
