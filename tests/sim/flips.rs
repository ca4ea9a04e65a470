//! A bit flips: on the network, in the memory of a hop, in a file of a replica. For each place it is shown what notices it,
//! what the client sees, and what becomes of it, as the table of docs/integrity.md says.

use nbdcast::volume::Notice;
use protocol::checksum::stored_block_checksum;
use protocol::message::{Condition, ReadOutcome};
use protocol::{AckPolicy, RecordKind, ToAgent, ToEngine};

use crate::check;
use crate::fault_point::{Part, Spot};
use crate::integrity_table::seen;
use crate::oracle::{Token, payload};
use crate::scenario::{LONG, serving};
use crate::world::{Setup, World, ms};

/// Sectors of a block.
const BLOCK: usize = 8;
/// Sectors that the stories are about.
const FOUR: usize = 4 * BLOCK;

/// What the client sees.
const NOTHING: &str = "nothing";
const BY_ANOTHER: &str = "nothing: another member answers";
/// What becomes of it.
const SENT_AGAIN: &str = "the connection is made anew, and what was lost is sent again";
const NO_TRACE: &str = "nothing is stored";
const REFUSED: &str = "the replica is refused, leaves, and is to be made anew";
const REPAIRED: &str = "repaired by a record";
const REPLAYED: &str = "the replica leaves; a restart replays its journal";
const TAKEN_AGAIN: &str = "the replica leaves; restarted, it gets the record again";

fn is_write(message: &ToAgent) -> bool {
    matches!(message, ToAgent::Append(record) if record.header.kind == RecordKind::Write)
}

fn is_answer(message: &ToEngine) -> bool {
    matches!(message, ToEngine::ReadDone { outcome: ReadOutcome::Data { .. }, .. })
}

fn is_fetched(message: &ToEngine) -> bool {
    matches!(message, ToEngine::Fetched(record) if record.header.kind == RecordKind::Write)
}

/// A world in which four blocks hold something, and all members the same.
fn written(seed: u64, ack: AckPolicy) -> (World, Token) {
    let mut w = serving(Setup::quiet(seed, ack));
    let token = w.write(0, 0, FOUR, false);
    w.done(0, token);
    w.rest();
    (w, token)
}

impl World {
    fn rest(&mut self) {
        assert!(self.run_until(LONG, |w| check::is_quiet(w, 0)), "members do not become equal");
    }

    /// The bit flipped, once; everything settles and all disks hold what they should.
    fn ends_well(&mut self) {
        assert_eq!(self.fault_point.sprung, 1, "the bit flipped");
        self.everyone_is_back(0);
        self.rest();
        self.settle_and_compare();
    }

    fn is_poisoned(&self, agent: usize) -> bool {
        self.agents[agent].process.as_ref().is_some_and(|p| p.replica.condition() == Condition::Poisoned)
    }

    /// A replica is poisoned by what flipped, leaves, and is a member again once somebody restarted its agent.
    fn comes_back_after_a_restart(&mut self, agent: usize) {
        assert!(self.run_until(LONG, |w| w.is_poisoned(agent)), "it goes on with what changed");
        assert!(self.run_until(LONG, |w| w.view(0).len() == 3), "it leaves");
        self.start_agent(agent);
        self.ends_well();
    }

    fn read_is(&mut self, token: Token) {
        assert_eq!(self.read_now(0, 0, FOUR), payload(token, 0, FOUR));
    }

    fn first_block_is(&mut self, token: Token) {
        assert_eq!(self.read_now(0, 0, BLOCK), payload(token, 0, BLOCK));
    }

    fn answer_was_damaged(&self) -> bool {
        self.notices.iter().any(|n| matches!(n, Notice::DamagedAnswer { .. }))
    }

    /// The engine dies while only the journals of a and b have a write.
    fn lose_engine_while_c_lacks_a_write(&mut self) -> Token {
        self.cut_off(2, ms(300));
        let token = self.write(0, 0, FOUR, false);
        self.done(0, token);
        self.kill_engine(0);
        self.run_for(ms(400));
        token
    }

    /// The agent is down while `damage` is done to its disk.
    fn damaged_while_down(&mut self, agent: usize, damage: impl FnOnce(&mut World)) {
        self.kill_agent(agent, false);
        self.agents[agent].is_damaged = true;
        damage(self);
        self.start_agent(agent);
    }
}

// ---- on the network --------------------------------------------------------------------------------------------

#[test]
fn a_frame_of_a_write_that_changed_on_its_way_is_sent_again() {
    for part in [Part::Prefix, Part::Body, Part::Bulk] {
        for seed in 4000..4010 {
            let (mut w, _) = written(seed, AckPolicy::All);
            w.arm(1, Spot::ToAgent(is_write, part));
            let token = w.write(0, 0, FOUR, false);
            w.done(0, token);
            assert_eq!(w.unreadable_frames, 1, "the agent refuses it");
            w.ends_well();
            w.read_is(token);
        }
    }
    seen("Append on the network: prefix or header", "the agent, by the frame's CRC", NOTHING, SENT_AGAIN);
    seen("Append on the network: payload", "the agent, by the payload's CRC", NOTHING, SENT_AGAIN);
}

#[test]
fn an_answer_that_changed_on_its_way_is_given_by_another_member() {
    for seed in 4020..4030 {
        for part in [Part::Prefix, Part::Body, Part::Bulk] {
            let (mut w, token) = written(seed, AckPolicy::First);
            w.arm(0, Spot::ToEngine(is_answer, part));
            w.read_is(token);
            let (unreadable, damaged) = (w.unreadable_frames, w.answer_was_damaged());
            assert_eq!((unreadable, damaged), if part == Part::Bulk { (0, true) } else { (1, false) });
            w.ends_well();
        }
    }
    seen("ReadDone on the network: prefix or body", "the engine, by the frame's CRC", BY_ANOTHER, SENT_AGAIN);
    seen("ReadDone on the network: data", "the engine, by the answer's CRC", BY_ANOTHER, NO_TRACE);
}

#[test]
fn a_copy_that_changed_on_its_way_is_sent_again() {
    for part in [Part::Prefix, Part::Body, Part::Bulk] {
        let (mut w, token) = dropped(4040);
        let is_copy = |message: &ToAgent| matches!(message, ToAgent::Copy(copy) if !copy.data.is_empty());
        w.arm(2, Spot::ToAgent(is_copy, part));
        w.start_agent(2);
        w.everyone_is_back(0);
        assert_eq!(w.unreadable_frames, 1, "the agent refuses it");
        w.ends_well();
        w.read_is(token);
    }
    seen("Copy on the network", "the agent, by the frame's or the copy's CRC", NOTHING, "the resync goes on anew");
}

#[test]
fn a_record_for_another_member_that_changed_on_its_way_is_asked_for_again() {
    for part in [Part::Prefix, Part::Body, Part::Bulk] {
        // c lacks a record that only the others' journals have.
        let (mut w, _) = written(4050, AckPolicy::Majority);
        w.arm(None, Spot::ToEngine(is_fetched, part));
        let token = w.lose_engine_while_c_lacks_a_write();
        let e = w.next_engine();
        w.everyone_is_back(e);
        assert_eq!(w.read_now(e, 0, FOUR), payload(token, 0, FOUR));
        assert_eq!((w.fault_point.sprung, w.unreadable_frames), (1, 1));
        w.settle_and_compare();
    }
    seen("Fetched on the network", "the engine, by the frame's or the payload's CRC", NOTHING, "it is asked for again");
}

#[test]
fn whichever_frame_changes_nothing_is_lost() {
    for (seed, agent) in (4100..4400).zip((0..3).cycle()) {
        let mut w = serving(Setup::quiet(seed, AckPolicy::Majority));
        let mut tokens = Vec::new();
        let to_agent = seed % 2 == 0;
        for round in 0..6 {
            if round == seed % 6 {
                let part = [Part::Prefix, Part::Body][seed as usize / 12 % 2];
                let has_body = |m: &ToAgent| !matches!(m, ToAgent::Goodbye | ToAgent::Synced);
                let spot = if to_agent {
                    Spot::ToAgent(has_body, part)
                } else {
                    Spot::ToEngine(|m| !matches!(m, ToEngine::Begun | ToEngine::InSync | ToEngine::Formatted), part)
                };
                w.arm(agent, spot);
            }
            tokens.push(w.write(0, round as usize * BLOCK, BLOCK, false));
            w.read(0, 0, FOUR);
            w.run_for(ms(3));
        }
        tokens.into_iter().for_each(|token| drop(w.done(0, token)));
        assert!(w.run_until(LONG, |w| w.unreadable_frames == 1), "seed {seed}: no frame was changed");
        w.ends_well();
        assert_eq!(w.unreadable_frames, 1);
    }
    seen("any other frame", "the receiver, by the frame's CRC", NOTHING, SENT_AGAIN);
}

// ---- in memory -------------------------------------------------------------------------------------------------

#[test]
fn a_write_that_changes_in_an_agents_memory_before_it_is_journaled_is_not_durable_there() {
    let (mut w, _) = written(4500, AckPolicy::Majority);
    let before = w.durable(1);
    w.arm(1, Spot::BeforeJournal);
    let token = w.write(0, 0, FOUR, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| w.is_poisoned(1)));
    assert_eq!(w.durable(1), before, "it acknowledged nothing of it");
    w.comes_back_after_a_restart(1);
    w.read_is(token);
    seen(
        "agent's memory, between the network and the journal",
        "the agent, before it writes the group",
        NOTHING,
        TAKEN_AGAIN,
    );
}

#[test]
fn a_write_that_changes_in_an_agents_memory_before_it_is_applied_is_not_applied() {
    for (first, count) in [(0, BLOCK), (3, 2), (5, 20)] {
        let (mut w, _) = written(4510, AckPolicy::All);
        let image = w.agents[1].disk.image.content();
        w.arm(1, Spot::BeforeImage);
        let token = w.write(0, first, count, false);
        w.done(0, token);
        assert!(w.run_until(LONG, |w| w.is_poisoned(1)));
        assert!(w.agents[1].disk.image.content() == image, "the image is as it was");
        assert_eq!(w.read_now(0, first, count), payload(token, first, count));
        w.comes_back_after_a_restart(1);
    }
    seen("agent's memory, between the journal and the image", "the agent, as it applies", NOTHING, REPLAYED);
}

#[test]
fn a_copy_that_changes_in_an_agents_memory_is_not_applied() {
    let (mut w, token) = dropped(4520);
    w.arm(2, Spot::BeforeCopyImage);
    w.start_agent(2);
    assert!(w.run_until(LONG, |w| w.is_poisoned(2)));
    w.start_agent(2);
    w.ends_well();
    w.read_is(token);
    seen(
        "memory of an agent that is being copied to",
        "the agent, as it applies",
        NOTHING,
        "the resync goes on once it is restarted",
    );
}

#[test]
fn an_answer_that_changes_in_an_agents_memory_is_given_by_another_member() {
    let (mut w, token) = written(4530, AckPolicy::First);
    w.arm(0, Spot::AfterRead);
    w.read_is(token);
    assert!(w.answer_was_damaged() && w.unreadable_frames == 0);
    w.ends_well();
    seen(
        "agent's memory, between the check of a block and the network",
        "the engine, by the answer's CRC",
        BY_ANOTHER,
        NO_TRACE,
    );
}

#[test]
fn a_copy_that_changes_in_the_engines_memory_is_refused_and_made_again() {
    let (mut w, token) = dropped(4540);
    w.arm(None, Spot::EngineAnswer(|bytes| bytes > 32 << 10));
    w.start_agent(2);
    w.everyone_is_back(0);
    assert_eq!(w.unreadable_frames, 1, "the agent refuses the copy");
    w.ends_well();
    w.read_is(token);
    seen(
        "engine's memory, between the check of what it copies and the network",
        "the agent, by the copy's CRC",
        NOTHING,
        "the resync goes on anew",
    );
}

#[test]
fn a_record_that_changes_in_the_engines_memory_is_taken_by_nobody_and_ends_the_engine() {
    // A repair: its record carries the checksum of the read that it is made from.
    let (mut w, token) = written(4550, AckPolicy::First);
    w.rot(0, 5000);
    w.arm(None, Spot::EngineAnswer(|bytes| bytes == 4096));
    w.read(0, 0, FOUR);
    assert!(w.run_until(LONG, |w| !w.engines[0].alive), "it finds out");
    assert!(w.fault_point.sprung == 1 && w.unreadable_frames > 0, "those who were sent the record refused it");
    let e = w.next_engine();
    assert_eq!(w.read_now(e, 0, FOUR), payload(token, 0, FOUR));
    assert!(w.run_until(LONG, |w| w.found_and_repaired(e, 0) == (1, 1)));
    assert!(w.run_until(LONG, |w| check::is_quiet(w, e)));
    w.agents[0].rotten.clear();
    w.settle_and_compare();
    seen(
        "engine's memory, between its CRC and the network",
        "every agent, by the payload's CRC; then the engine",
        "the connection breaks: the engine stops and says why",
        "nothing is stored; the engine is to be started again",
    );
}

// ---- in files --------------------------------------------------------------------------------------------------

#[test]
fn a_bit_of_image_or_checksums_is_answered_by_another_member_and_repaired() {
    for is_image in [true, false] {
        let (mut w, token) = written(4600, AckPolicy::First);
        if is_image {
            w.rot(0, 5000);
        } else {
            // Checksums that are in the file, and not in the memory of the agent.
            w.agents[0].process.as_ref().unwrap().image.write_back().unwrap();
            w.run_for(ms(6000));
            w.damaged_while_down(0, |w| {
                w.agents[0].disk.checksums.rot(4);
                w.agents[0].rotten.push(4096);
            });
            w.run_for(ms(500));
        }
        w.read_is(token);
        assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1)));
        w.rest();
        w.agents[0].rotten.clear();
        w.settle_and_compare();
    }
    seen("image", "the agent, by the block's checksum", BY_ANOTHER, REPAIRED);
    seen("checksums", "the agent, by the block's checksum", BY_ANOTHER, REPAIRED);
}

#[test]
fn a_bit_of_one_slot_of_the_superblock_costs_nothing_and_of_both_the_replica() {
    for slot in [0, 1] {
        for seed in 4610..4620 {
            let (mut w, _) = written(seed, AckPolicy::Majority);
            w.run_for(ms(seed % 7 * 1000));
            let token = w.write(0, 0, FOUR, false);
            w.done(0, token);
            w.damaged_while_down(1, |w| w.agents[1].disk.superblock.rot(slot * (64 << 10) + 40));
            assert_eq!(w.agents[1].refusal, None);
            w.everyone_is_back(0);
            w.rest();
            w.settle_and_compare();
            w.read_is(token);
        }
    }
    seen(
        "superblock, one slot",
        "the agent as it opens, by the slot's CRC",
        NOTHING,
        "the other slot counts, and this one is written next",
    );

    let (mut w, token) = written(4620, AckPolicy::Majority);
    w.damaged_while_down(1, |w| [40, (64 << 10) + 40].into_iter().for_each(|at| w.agents[1].disk.superblock.rot(at)));
    w.is_refused(1, "neither copy of the superblock is whole", token);
    seen("superblock, both slots", "the agent as it opens, by the slots' CRCs", NOTHING, REFUSED);
}

#[test]
fn a_bit_of_a_durable_record_costs_the_replica_and_that_of_the_last_is_noticed() {
    // In the payload, and in the header before it.
    for at in [100, -30] {
        let (mut w, token) = two_groups(4630);
        w.damaged_while_down(1, |w| w.rot_journal(1, token, at));
        w.is_refused(1, "the journal is damaged at record", token);
    }
    seen(
        "journal, a record with later groups behind it",
        "the agent as it opens, by the record's CRCs",
        NOTHING,
        REFUSED,
    );

    for at in [100, -30] {
        let (mut w, first) = two_groups(4631);
        let last = w.write(0, 0, BLOCK, false);
        w.done(0, last);
        w.rest();
        w.damaged_while_down(1, |w| w.rot_journal(1, last, at));
        w.is_copied_anew(1);
        assert!(w.read_now(0, 0, BLOCK) == payload(last, 0, BLOCK) && first != last);
    }
    seen(
        "journal, its last group",
        "the engine: the replica holds less than it acknowledged",
        NOTHING,
        "all of the replica is copied anew",
    );
}

#[test]
fn a_bit_of_an_intent_costs_as_much_as_one_of_a_record() {
    // In the checksums that it holds, and in the header before them.
    for at in [9, -30] {
        let (mut w, token) = written(4635, AckPolicy::Majority);
        w.write_two_groups_more();
        w.damaged_while_down(1, |w| w.rot_intent(1, token, at));
        w.is_refused(1, "the journal is damaged at record", token);

        let (mut w, token) = written(4636, AckPolicy::Majority);
        w.damaged_while_down(1, |w| w.rot_intent(1, token, at));
        w.is_copied_anew(1);
        w.read_is(token);
    }
    seen(
        "journal, an intent of a large write",
        "as any record: the agent as it opens, or the engine",
        NOTHING,
        "as any record: the replica is refused, or copied anew",
    );
}

#[test]
fn a_large_write_that_changes_on_its_way_into_the_image_is_answered_by_another_member_and_repaired() {
    let (mut w, _) = written(4640, AckPolicy::First);
    w.agents[0].disk.flip_next_in_place();
    let token = w.write(0, 0, FOUR, false);
    w.done(0, token);
    w.rest();
    w.agents[0].rotten.push(2 * 4096);
    w.read_is(token);
    assert!(w.run_until(LONG, |w| w.found_and_repaired(0, 0) == (1, 1)));
    w.rest();
    w.agents[0].rotten.clear();
    w.settle_and_compare();
    seen(
        "agent's memory, as a large write goes to the image",
        "the agent, by the block's checksum, when the block is read",
        BY_ANOTHER,
        REPAIRED,
    );
}

#[test]
fn a_bit_of_the_journals_header_costs_the_replica_and_one_that_nobody_reads_nothing() {
    let (mut w, token) = two_groups(4640);
    w.damaged_while_down(1, |w| w.agents[1].disk.journal.rot(9));
    w.is_refused(1, "journal", token);
    seen("journal, its header", "the agent as it opens, by the header's CRC", NOTHING, REFUSED);

    let (mut w, token) = two_groups(4641);
    w.damaged_while_down(1, |w| {
        let end = w.agents[1].disk.journal.content().len();
        (1..40).for_each(|back| w.agents[1].disk.journal.rot(end - back * 100));
    });
    assert_eq!(w.agents[1].refusal, None);
    w.rest();
    w.first_block_is(token);
    w.settle_and_compare();
    seen("journal, where no record is in use", "nobody, as nobody reads it", NOTHING, "written over");
}

#[test]
fn a_bit_of_the_bitmaps_makes_more_to_be_copied_and_nothing_less() {
    let (mut w, token) = dropped(4650);
    // A checkpoint brings the bitmaps to disk.
    w.run_for(ms(6000));
    for agent in 0..2 {
        let length = w.agents[agent].disk.dirty.content().len();
        assert!(length > 0, "there are bitmaps on disk");
        w.damaged_while_down(agent, |w| (100..length).step_by(4096).for_each(|at| w.agents[agent].disk.dirty.rot(at)));
        assert!(w.run_until(LONG, |w| w.durable(0) == w.durable(1)));
        w.run_for(ms(500));
    }
    w.start_agent(2);
    w.everyone_is_back(0);
    assert_eq!(w.copied_bytes, w.setup.size_bytes, "all that the page is of");
    w.rest();
    w.settle_and_compare();
    w.read_is(token);
    seen("dirty", "the agent as it opens, by the page's CRC", NOTHING, "what the page is of is copied");
}

impl World {
    /// Flips a bit of the journal, counted from the payload of the latest record with that of a write.
    fn rot_journal(&mut self, agent: usize, token: Token, at: isize) {
        let journal = &self.agents[agent].disk.journal;
        let payload = payload(token, 0, BLOCK);
        let content = journal.content();
        let found = content.windows(64).rposition(|window| window == &payload[..64]).expect("the journal has it");
        journal.rot(found.strict_add_signed(at));
    }

    /// Flips a bit of the journal, counted from the checksums of the latest intent of that write.
    fn rot_intent(&mut self, agent: usize, token: Token, at: isize) {
        let payload = payload(token, 0, FOUR);
        let stored = payload.chunks(4096).flat_map(|block| stored_block_checksum(block).to_le_bytes());
        let stored: Vec<u8> = stored.collect();
        let journal = &self.agents[agent].disk.journal;
        let content = journal.content();
        let found = content.windows(stored.len()).rposition(|window| window == stored).expect("the journal has it");
        journal.rot(found.strict_add_signed(at));
    }

    /// Writes elsewhere, so that two groups lie behind all that the journals have.
    fn write_two_groups_more(&mut self) {
        for first in [100, 120] {
            let later = self.write(0, first, 8, false);
            self.done(0, later);
            self.rest();
        }
    }

    /// The replica is opened with less than it acknowledged; the engine notices, and all of it is copied.
    fn is_copied_anew(&mut self, agent: usize) {
        assert_eq!(self.agents[agent].refusal, None, "it looks like a torn write");
        assert!(self.run_until(LONG, |w| w.notices.iter().any(|n| matches!(n, Notice::LostData { .. }))));
        self.everyone_is_back(0);
        self.rest();
        self.settle_and_compare();
    }

    /// The replica is not opened, and says why; it leaves, and the others go on.
    fn is_refused(&mut self, agent: usize, words: &str, token: Token) {
        let refusal = self.agents[agent].refusal.clone().expect("it is refused");
        assert!(refusal.contains(words), "{refusal}");
        let name = crate::world::replica_name(agent);
        let later = self.write(0, 100, 8, false);
        self.done(0, later);
        assert!(self.run_until(LONG, |w| !w.engines[0].volume.snapshot(w.now).view.contains(&name)), "it leaves");
        self.first_block_is(token);
    }
}

/// A world in which the journals have the write in a group with others behind it.
fn two_groups(seed: u64) -> (World, Token) {
    let (mut w, _) = written(seed, AckPolicy::Majority);
    let token = w.write(0, 0, BLOCK, false);
    w.done(0, token);
    w.rest();
    w.write_two_groups_more();
    (w, token)
}

/// A world in which c is out of the view and lacks a write.
fn dropped(seed: u64) -> (World, Token) {
    let (mut w, _) = written(seed, AckPolicy::First);
    w.kill_agent(2, false);
    let token = w.write(0, 0, FOUR, false);
    w.done(0, token);
    assert!(w.run_until(LONG, |w| w.view(0) == "a b"));
    w.rest();
    (w, token)
}
