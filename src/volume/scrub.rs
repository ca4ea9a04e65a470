//! Scrub: all of a volume is read at all members, chunk by chunk, while clients work, and compared.
//!
//! Each member in force is asked for what its disk holds of a chunk, behind the same record of those that change it. As replicas apply
//! no later record to the chunk before they have looked, all of them look at the same state, and a difference is a fault. A
//! copy that does not match its checksum or cannot be read is repaired from a sound one, one that differs from what a majority of
//! the members in force says from one of these, and the chunk is looked at again until that shows. Else nobody guesses.
//!
//! One scrub at a time. It slows down for clients as a resync does, waits while a replica is brought back, and for a
//! while for a member that is out of reach. Knows no calendar and keeps nothing over a restart: whoever commands it does.

mod chunks;
mod verdict;

use std::collections::BTreeMap;
use std::time::Duration;

use protocol::message::{ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::scrub::BlockFound;
use protocol::{BLOCK_BYTES, ReplicaName, Seq};

use super::log::Log;
use super::peer::READS_OUTSTANDING_MAX;
use super::rate::Rate;
use super::repair::Finding;
use super::{CommandRefusal, Damage, Notice, PeerId, Phase, Time, Volume};
use chunks::{Chunks, Looked, Question};

/// Chunks under way, at most, and bytes of one, while no client asks for anything.
const IDLE: (usize, u64) = (4, 256 * 1024);
/// The same while clients are at work: none of them waits for more than one read, nor a record for being applied.
const BUSY: (usize, u64) = (1, 256 * 1024);
/// Chunks that are not done with, at most: of some a bad copy is being repaired.
const CHUNKS_MAX: usize = 16;
/// A member in force that is out of reach is waited for so long: it comes back, or leaves the view.
const MEMBER_PATIENCE: Duration = Duration::from_secs(60);
/// A member that has not answered for so long does not answer.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// After this time it is said that the scrub waits for it.
const ANSWER_USUAL: Duration = Duration::from_secs(2);
const SPEED_OVER: Duration = Duration::from_secs(2);
/// A member with so many reads outstanding is not asked: looks have room beside what clients may have there, so that many
/// reads of theirs do not end a scrub, and no more, if it answers none.
const OUTSTANDING_MAX: usize = READS_OUTSTANDING_MAX + CHUNKS_MAX;

/// What a scrub found. Blocks are counted once for each replica whose copy is concerned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubFound {
    /// Copies that did not match their checksum or could not be read.
    pub bad_blocks: u64,
    /// Copies that matched their checksum and were not what the majority said; blocks, where there was no majority.
    pub differing_blocks: u64,
    /// Of all these, copies that a later look showed to be in order.
    pub repaired_blocks: u64,
    /// Copies that were still not in order when they were given up; blocks, where no copy could be believed.
    pub unrepaired_blocks: u64,
    /// Bytes that some member did not look at.
    pub incomplete_bytes: u64,
}

impl ScrubFound {
    /// Whether everything was looked at and is in order now.
    #[must_use]
    pub fn is_well(&self) -> bool {
        self.unrepaired_blocks == 0 && self.incomplete_bytes == 0
    }
}

/// How far a scrub is: enough to go on from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubMark {
    /// Everything below this byte is done with.
    pub position: u64,
    /// What was found there.
    pub found: ScrubFound,
}

/// A scrub at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubSnapshot {
    /// How far it is.
    pub mark: ScrubMark,
    /// Bytes to look at in all.
    pub total_bytes: u64,
    /// How fast it is.
    pub bytes_per_second: u64,
    /// How much longer, seconds; not known while nothing moves.
    pub eta_seconds: Option<u64>,
    /// What it waits for, if it does.
    pub waits_for: Option<String>,
}

/// A scrub.
#[derive(Debug)]
pub(super) struct Scrub {
    chunks: Chunks,
    /// The view in force, as of the last look at it.
    members: Vec<ReplicaName>,
    rate: Rate,
    /// Members that are out of reach or answer nothing, and since when each is or does.
    absent: BTreeMap<ReplicaName, Time>,
    /// Reads that were given up and that members still owe an answer to: until then these are out of reach, or each chunk
    /// would take as long as this one.
    owed: Vec<(u64, PeerId)>,
    speed_from: (u64, Time),
    bytes_per_second: u64,
}

impl Scrub {
    fn mark(&self) -> ScrubMark {
        ScrubMark { position: self.chunks.position(), found: self.chunks.found() }
    }

    fn measure_speed(&mut self, now: Time) {
        let (from, since) = self.speed_from;
        let passed = now.saturating_sub(since);
        if passed >= SPEED_OVER {
            let done = self.chunks.position();
            self.bytes_per_second = ((done - from) as f64 / passed.as_secs_f64()) as u64;
            self.speed_from = (done, now);
        }
    }
}

impl<T> Volume<T> {
    /// Begins a scrub, or goes on with one of before.
    pub(super) fn begin_scrub(&mut self, now: Time, from: ScrubMark) -> Result<(), CommandRefusal> {
        if self.scrub.is_some() {
            return Err(CommandRefusal::Scrubbing);
        }
        let chunks = Chunks::new(self.size_bytes, from.position, from.found);
        let position = chunks.position();
        let rate = Rate::with_rests(self.settings.scrub_rate_min, BUSY.1, now);
        let members = self.scrub_view();
        let speed_from = (position, now);
        self.scrub = Some(Scrub {
            chunks,
            members,
            rate,
            absent: BTreeMap::new(),
            owed: vec![],
            speed_from,
            bytes_per_second: 0,
        });
        self.notice(Notice::Scrubbing { position });
        Ok(())
    }

    pub(super) fn stop_scrub(&mut self) -> Result<(), CommandRefusal> {
        let scrub = self.scrub.take().ok_or(CommandRefusal::NotScrubbing)?;
        for (id, peer) in scrub.chunks.unanswered() {
            self.peers[peer].cancel(id);
        }
        self.notice(Notice::ScrubEnded { mark: scrub.mark(), is_finished: false });
        Ok(())
    }

    pub(super) fn advance_scrub(&mut self, now: Time) {
        if !matches!(self.phase, Phase::Serving) || self.stopping || self.scrub.is_none() {
            return;
        }
        self.pace_scrub(now);
        self.look_for_joined();
        self.give_up_late_looks(now);
        self.look_for_absent(now);
        if self.scrub_waits_for(now).is_none() {
            self.begin_scrub_chunks(now);
            self.ask_for_scrub_chunks(now);
        }
        let Some(scrub) = &mut self.scrub else { return };
        scrub.measure_speed(now);
        scrub.rate.looking(scrub.chunks.asking() > 0, now);
        if scrub.chunks.is_done() {
            let mark = scrub.mark();
            self.scrub = None;
            self.notice(Notice::ScrubEnded { mark, is_finished: true });
        }
    }

    fn pace_scrub(&mut self, now: Time) {
        let is_idle = self.held.is_empty() && self.write_acks.is_empty() && self.flush_acks.is_empty();
        let clients_wait = !(is_idle && self.reads.is_empty());
        let Some(scrub) = &mut self.scrub else { return };
        if clients_wait {
            scrub.rate.clients_wait(now);
        }
        scrub.rate.looking(scrub.chunks.asking() > 0, now);
    }

    /// Members in force that can be asked, and how many there are in force.
    fn scrub_members(&self) -> (Vec<PeerId>, usize) {
        let Some(membership) = &self.membership else { return (Vec::new(), 0) };
        let owed = self.scrub.as_ref().map_or(&[][..], |scrub| &scrub.owed);
        let can = |id: &PeerId| {
            let peer = &self.peers[*id];
            let has_room = peer.reads.len() < OUTSTANDING_MAX && !owed.iter().any(|(_, owing)| owing == id);
            peer.is_ready_member() && membership.in_force.contains(&peer.name) && has_room
        };
        ((0..self.peers.len()).filter(can).collect(), membership.in_force.len())
    }

    fn scrub_view(&self) -> Vec<ReplicaName> {
        self.membership.as_ref().map(|m| m.in_force.members().to_vec()).unwrap_or_default()
    }

    /// Takes note of members and of bytes that were not there when the scrub began.
    fn look_for_joined(&mut self) {
        let (members, size_bytes) = (self.scrub_view(), self.size_bytes);
        let Some(scrub) = &mut self.scrub else { return };
        scrub.chunks.grow(size_bytes);
        if members.iter().any(|name| !scrub.members.contains(name)) {
            scrub.chunks.joined(members.len());
        }
        scrub.members = members;
    }

    fn look_for_absent(&mut self, now: Time) {
        let (members, _) = self.scrub_members();
        let in_force = self.membership.iter().flat_map(|m| m.in_force.members());
        let is_absent = |name: &&ReplicaName| members.iter().all(|id| self.peers[*id].name != **name);
        let absent: Vec<ReplicaName> = in_force.filter(is_absent).cloned().collect();
        if let Some(scrub) = &mut self.scrub {
            let before = std::mem::take(&mut scrub.absent);
            let since = |name: &ReplicaName| before.get(name).copied().unwrap_or(now);
            scrub.absent = absent.into_iter().map(|name| (name.clone(), since(&name))).collect();
        }
    }

    /// Why nothing new is looked at just now.
    fn scrub_waits_for(&self, now: Time) -> Option<String> {
        if let Some(resync) = &self.resync {
            return Some(format!("replica {} is being brought back", self.peers[resync.peer].name));
        }
        if self.scrub_members().0.is_empty() {
            return Some("no member can be reached".to_owned());
        }
        if let Some(why) = self.repairs_wait_for() {
            // What is found bad meanwhile could not be repaired, and would be given up.
            return Some(why.to_owned());
        }
        let is_waited_for = |(_, since): &(&ReplicaName, &Time)| now.saturating_sub(**since) < MEMBER_PATIENCE;
        let (name, _) = self.scrub.as_ref()?.absent.iter().find(is_waited_for)?;
        let is_there = self.peers.iter().any(|p| p.name == *name && p.is_ready_member());
        Some(if is_there { format!("replica {name} to answer") } else { format!("replica {name} cannot be reached") })
    }

    fn begin_scrub_chunks(&mut self, now: Time) {
        let Some(scrub) = &mut self.scrub else { return };
        let (chunks_max, chunk_bytes) = if scrub.rate.is_idle(now) { IDLE } else { BUSY };
        while scrub.chunks.asking() < chunks_max
            && scrub.chunks.len() < CHUNKS_MAX
            && let Some(range) = scrub.chunks.peek(chunk_bytes)
            && scrub.rate.take(range.length, now)
        {
            scrub.chunks.begin(range, now);
        }
    }

    fn ask_for_scrub_chunks(&mut self, now: Time) {
        let due = self.scrub.as_ref().map(|s| s.chunks.due(now)).unwrap_or_default();
        if due.is_empty() {
            return;
        }
        let (members, in_force) = self.scrub_members();
        let last = self.log.as_ref().map_or(Seq(0), Log::last);
        let room = members.iter().map(|id| OUTSTANDING_MAX - self.peers[*id].reads.len()).min().unwrap_or(0);
        for range in due.into_iter().take(room) {
            let id = self.reads.id();
            for member in &members {
                let after = self.read_after(*member, range);
                self.peers[*member].ask(after, last, id, ReadKind::Scrub, range);
            }
            if let Some(scrub) = &mut self.scrub {
                let question = Question { read: id, members: &members, seen: last, in_force };
                scrub.chunks.asked(now, range.offset, question);
            }
        }
    }

    /// A record was given out that changes `range`.
    pub(super) fn overlap_scrub(&mut self, range: ByteRange) {
        if let Some(scrub) = &mut self.scrub {
            scrub.chunks.overlap(range);
        }
    }

    /// A member answered a read; whether it was one of the scrub.
    pub(super) fn on_scrub_read(&mut self, now: Time, peer: PeerId, id: u64, seen: Seq, outcome: &ReadOutcome) -> bool {
        let found = match outcome {
            ReadOutcome::Scrubbed(found) => Some(found.clone()),
            ReadOutcome::Data { .. }
            | ReadOutcome::Extents(_)
            | ReadOutcome::Prefetched
            | ReadOutcome::ChecksumMismatch { .. }
            | ReadOutcome::Unreadable { .. }
            | ReadOutcome::Cancelled
            | ReadOutcome::Damaged
            | ReadOutcome::Failed => None,
        };
        let waits = self.scrub.as_ref().is_some_and(|s| s.chunks.waits_for(id, peer));
        if waits && found.is_none() {
            self.note_read_failed(peer, seen, None);
        }
        self.scrub_answered(now, id, peer, found);
        waits
    }

    /// A member will not answer.
    pub(super) fn scrub_read_lost(&mut self, now: Time, peer: PeerId, id: u64) {
        self.scrub_answered(now, id, peer, None);
    }

    /// Goes on without answers that take too long.
    fn give_up_late_looks(&mut self, now: Time) {
        let late = self.scrub.as_ref().map(|s| s.chunks.late(now, ANSWER_MAX)).unwrap_or_default();
        for (id, peer) in &late {
            self.peers[*peer].cancel(*id);
            self.scrub_answered(now, *id, *peer, None);
        }
        if let Some(scrub) = &mut self.scrub {
            scrub.owed.extend(late);
            scrub.owed.retain(|(id, peer)| self.peers[*peer].reads.contains_key(id));
        }
    }

    /// A member whose answer takes unusually long.
    fn scrub_waits_for_answer(&self, now: Time) -> Option<String> {
        let (_, peer) = *self.scrub.as_ref()?.chunks.late(now, ANSWER_USUAL).first()?;
        Some(format!("replica {} to answer", self.peers[peer].name))
    }

    fn scrub_answered(&mut self, now: Time, id: u64, peer: PeerId, found: Option<Vec<BlockFound>>) {
        let Some(scrub) = self.scrub.as_mut().filter(|s| s.chunks.waits_for(id, peer)) else { return };
        let repairs = &self.repairs;
        let differs = |peer: PeerId, block: ByteRange, seen: Seq| repairs.differs_at(peer, block, seen);
        if let Some(looked) = scrub.chunks.answered(now, id, peer, found, differs) {
            self.draw_scrub_consequences(&looked);
        }
    }

    /// Has repaired what can be, and says what cannot.
    fn draw_scrub_consequences(&mut self, looked: &Looked) {
        let at = |index: usize| looked.range.offset + index as u64 * BLOCK_BYTES;
        if looked.is_whole {
            let is_open = |block| looked.faults.iter().any(|f| at(f.index) == block && f.good.is_empty());
            self.repairs.agreed(looked.range, looked.seen, is_open);
        }
        for fault in looked.faults.iter().filter(|f| f.is_tie && !looked.rewritten.contains(&f.index)) {
            let is_bad = |peer| fault.bad.iter().any(|(bad, _)| *bad == peer);
            self.note_tie(at(fault.index), is_bad, looked.seen);
        }
        // Where sound copies differ without a majority, a repair would be a guess.
        for fault in looked.faults.iter().filter(|fault| !fault.is_tie) {
            let offset = at(fault.index);
            let differs = fault.bad.iter().any(|(_, what)| *what == Damage::Differs);
            for (bad, what) in fault.bad.iter().copied() {
                let blocks = ByteRange { offset, length: BLOCK_BYTES };
                let good = fault.good.first().copied().filter(|_| differs);
                self.repair(Finding { blocks, bad, what, good, sound: fault.good.clone(), seen: looked.seen });
            }
        }
        for offset in &looked.ties {
            self.notice(Notice::NoMajority { offset: *offset });
        }
    }

    /// A client's request was answered.
    pub(super) fn scrub_notes_client(&mut self, asked_at: Time, now: Time) {
        if let Some(scrub) = &mut self.scrub {
            scrub.rate.client_answered(asked_at, now);
        }
    }

    pub(super) fn scrub_snapshot(&self, now: Time) -> Option<ScrubSnapshot> {
        let scrub = self.scrub.as_ref()?;
        let (mark, total_bytes) = (scrub.mark(), scrub.chunks.size_bytes());
        let bytes_per_second = scrub.bytes_per_second;
        let eta_seconds = (total_bytes - mark.position).checked_div(bytes_per_second);
        let waits_for = self.scrub_waits_for(now).or_else(|| self.scrub_waits_for_answer(now));
        Some(ScrubSnapshot { mark, total_bytes, bytes_per_second, eta_seconds, waits_for })
    }
}
