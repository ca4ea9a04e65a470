//! The copying of a resync: asking members what is dirty and for its bytes, sending these on, and letting members take
//! note of how far it is.

use bytes::Bytes;
use protocol::checksum::crc32_of_zeroes;
use protocol::message::{Copy, Dirty, ReadKind, ReadOutcome};
use protocol::ranges::ByteRange;
use protocol::record::DirtyStep;
use protocol::{Seq, ToAgent};

use super::super::copying::ChunkRead;
use super::super::log::Log;
use super::super::peer::{Peer, READS_OUTSTANDING_MAX, Role};
use super::super::repair::{Damage, bad_block};
use super::super::{PeerId, Phase, Time, Volume};
use super::{FinishState, LIST_PATIENCE, Resync, SPEED_OVER, Step, TELL_EVERY};

impl<T> Volume<T> {
    pub(super) fn advance_copying(&mut self, now: Time) {
        self.list_dirty(now);
        self.begin_chunks(now);
        self.ask_for_chunks(now);
        self.measure_speed(now);
        let tell = self.resync.as_ref().is_some_and(|r| now.saturating_sub(r.told_at) >= TELL_EVERY);
        if tell {
            self.tell_copied(now);
        }
        let Some(resync) = &mut self.resync else { return };
        let Step::Copy { from, copying } = &resync.step else { return };
        let from = *from;
        if copying.is_under_way() {
            resync.rate.copying(now);
        }
        if copying.is_done() {
            let progress = copying.progress();
            self.tell_copied(now);
            self.enter_resync(now, Step::Finish { from, progress, state: FinishState::CatchUp });
        }
    }

    /// Members that hold what the copying starts from and can be asked.
    fn sources(&self) -> Vec<PeerId> {
        let Some(Resync { step: Step::Copy { from, .. }, .. }) = &self.resync else { return Vec::new() };
        let Some(membership) = &self.membership else { return Vec::new() };
        let can = |id: &PeerId| {
            let peer = &self.peers[*id];
            peer.is_ready_member() && membership.in_force.contains(&peer.name) && peer.durable >= *from
        };
        (0..self.peers.len()).filter(can).collect()
    }

    /// Members of the view in force, in reach or not.
    fn members(&self) -> impl Iterator<Item = PeerId> {
        let in_force = self.membership.as_ref().map(|m| &m.in_force);
        let is_member = move |p: &Peer| p.role == Role::Member && in_force.is_some_and(|view| view.contains(&p.name));
        self.peers.iter().enumerate().filter(move |(_, p)| is_member(p)).map(|(id, _)| id)
    }

    fn list_dirty(&mut self, now: Time) {
        let Some(resync) = &mut self.resync else { return };
        let subject = self.peers[resync.peer].name.clone();
        let Some(copying) = resync.copying() else { return };
        copying.take_list(now, LIST_PATIENCE);
        let Some((from, source)) = copying.to_list() else { return };
        let sources = self.sources();
        let asked: Vec<PeerId> = match source.filter(|s| sources.contains(s)) {
            Some(source) => vec![source],
            None => sources,
        };
        if asked.is_empty() {
            return;
        }
        for id in &asked {
            self.peers[*id].push_urgent(ToAgent::ListDirty { subject: subject.clone(), from });
        }
        if let Some(copying) = self.resync.as_mut().and_then(Resync::copying) {
            copying.listing(asked, now);
        }
    }

    pub(in crate::volume) fn on_dirty(&mut self, now: Time, peer: PeerId, dirty: Dirty) {
        let Some(resync) = &mut self.resync else { return };
        if self.peers[resync.peer].name == dirty.subject
            && let Some(copying) = resync.copying()
        {
            copying.listed(peer, dirty);
            copying.take_list(now, LIST_PATIENCE);
        }
    }

    fn begin_chunks(&mut self, now: Time) {
        let Some(log) = &self.log else { return };
        let Some(resync) = &mut self.resync else { return };
        // Records go first: a replica that falls behind its records would never join.
        let behind = log.bytes_between(self.peers[resync.peer].durable, log.last());
        if behind > (self.settings.lag_bytes_max / 8).max(1 << 16) {
            return;
        }
        let Step::Copy { copying, .. } = &mut resync.step else { return };
        while let Some(range) = copying.peek() {
            if !resync.rate.take(range.length, now) {
                return;
            }
            copying.begin();
        }
    }

    /// Asks members for the chunks that nobody was asked for.
    fn ask_for_chunks(&mut self, now: Time) {
        let unasked = self.resync.as_mut().and_then(Resync::copying).map(|c| c.unasked()).unwrap_or_default();
        if unasked.is_empty() {
            return;
        }
        let sources = self.sources();
        let members: Vec<PeerId> = self.members().collect();
        let last = self.log.as_ref().map_or(Seq(0), Log::last);
        for offset in unasked {
            let Some(copying) = self.resync.as_mut().and_then(Resync::copying) else { return };
            let Some(chunk) = copying.chunk(offset) else { continue };
            let range = chunk.read.range;
            let can = |id: &&PeerId| {
                let has_room = self.peers[**id].reads.len() < READS_OUTSTANDING_MAX;
                has_room && !chunk.failed.contains(id) && !self.repairs.differs_at(**id, range, last)
            };
            let cost = |id: &&PeerId| (last.ahead_of(self.peers[**id].durable) / 64, self.peers[**id].reads.len());
            let Some(source) = sources.iter().filter(can).min_by_key(cost).copied() else {
                if members.iter().all(|id| chunk.failed.contains(id) || self.repairs.is_lost_at(*id, range)) {
                    // Those that could read it have left meanwhile.
                    return self.end_resync(now, "no member has a good copy of what it lacks".to_owned());
                }
                continue;
            };
            let id = self.reads.id();
            copying.asked(offset, id, now);
            self.peers[source].ask(last, last, id, ReadKind::Data, range);
        }
    }

    /// A member answered a read; whether it was one of the copying.
    pub(in crate::volume) fn on_chunk_read(
        &mut self,
        now: Time,
        peer: PeerId,
        id: u64,
        seen: Seq,
        outcome: &ReadOutcome,
    ) -> bool {
        let Some(resync) = &mut self.resync else { return false };
        let target = resync.peer;
        let Some(copying) = resync.copying() else { return false };
        let (data, crc) = match outcome {
            ReadOutcome::Data { data, crc } => (data, *crc),
            ReadOutcome::Extents(_)
            | ReadOutcome::Prefetched
            | ReadOutcome::Scrubbed(_)
            | ReadOutcome::ChecksumMismatch { .. }
            | ReadOutcome::Unreadable { .. }
            | ReadOutcome::Cancelled
            | ReadOutcome::Failed
            | ReadOutcome::Damaged => {
                let Some((range, failed)) = copying.read_failed(id, peer) else { return false };
                self.chunk_failed(now, peer, seen, bad_block(outcome, range), failed);
                return true;
            }
        };
        match copying.read_done(id) {
            ChunkRead::Unknown => return false,
            ChunkRead::Again => {}
            ChunkRead::Send { range, .. } if data.len() as u64 != range.length => {
                self.end_resync(now, "a member answered a read with another length".to_owned());
            }
            ChunkRead::Send { copy, range } => {
                let (data, crc) = if is_zero(data, crc) { (Bytes::new(), 0) } else { (data.clone(), crc) };
                let last = self.log.as_ref().map_or(Seq(0), Log::last);
                self.peers[target].push_after(last, ToAgent::Copy(Copy { id: copy, range, data, crc }));
            }
        }
        true
    }

    fn chunk_failed(&mut self, now: Time, peer: PeerId, seen: Seq, bad: Option<(u64, Damage)>, failed: usize) {
        self.note_read_failed(peer, seen, bad);
        if failed >= self.sources().len() {
            let at = bad.map_or_else(String::new, |(offset, _)| format!(" at byte {offset}"));
            self.end_resync(now, format!("no member has a good copy of what it lacks{at}"));
        }
    }

    pub(in crate::volume) fn chunk_read_lost(&mut self, id: u64) {
        if let Some(copying) = self.resync.as_mut().and_then(Resync::copying) {
            copying.read_lost(id);
        }
    }

    /// What is being read of `range` is not to be copied.
    pub(in crate::volume) fn lose_chunks(&mut self, range: ByteRange) {
        if let Some(copying) = self.resync.as_mut().and_then(Resync::copying) {
            copying.lose_reads(range);
        }
    }

    pub(in crate::volume) fn on_copied(&mut self, now: Time, peer: PeerId, id: u64) {
        let Some(resync) = self.resync.as_mut().filter(|r| r.peer == peer) else { return };
        let Some(copying) = resync.copying() else { return };
        if id > copying.last_copy() {
            return self.end_resync(now, format!("it acknowledged copy {id}, which was not sent"));
        }
        copying.copied(id);
    }

    /// A record was given out that changes what a chunk being read must show.
    pub(in crate::volume) fn overlap_chunks(&mut self, range: ByteRange) {
        if let Some(copying) = self.resync.as_mut().and_then(Resync::copying) {
            copying.overlap(range);
        }
    }

    /// Whether a change must wait for the read of a chunk that changes have made useless too often.
    pub(in crate::volume) fn is_held_for_copy(&self, range: ByteRange, now: Time) -> bool {
        match &self.resync {
            Some(Resync { step: Step::Copy { copying, .. }, .. }) => copying.holds(range, now),
            Some(_) | None => false,
        }
    }

    /// Lets members take note of what is durable at the syncing replica.
    pub(super) fn tell_copied(&mut self, now: Time) {
        let serving = matches!(self.phase, Phase::Serving);
        let Some(resync) = self.resync.as_mut().filter(|_| serving) else { return };
        let Step::Copy { copying, .. } = &resync.step else { return };
        let until = copying.durable_until();
        resync.told_at = now;
        let peer = &self.peers[resync.peer];
        let (subject, followed) = (peer.name.clone(), peer.durable);
        // Nothing but the record that said so: a volume that stands still must not fill its log.
        if (until, followed) <= resync.told {
            return;
        }
        self.tracked.insert(subject.clone(), followed);
        let seq = self.append_dirty(now, subject, DirtyStep::Copied { until, followed });
        if let Some(resync) = &mut self.resync {
            resync.told = (until, seq);
        }
    }

    fn measure_speed(&mut self, now: Time) {
        let Some(resync) = &mut self.resync else { return };
        let Step::Copy { copying, .. } = &resync.step else { return };
        let (done, _) = copying.progress();
        let (from, since) = resync.speed_from;
        let passed = now.saturating_sub(since);
        if passed >= SPEED_OVER {
            resync.bytes_per_second = ((done - from) as f64 / passed.as_secs_f64()) as u64;
            resync.speed_from = (done, now);
        }
    }

    /// A client's request was answered.
    pub(in crate::volume) fn note_client(&mut self, asked_at: Time, now: Time) {
        if let Some(resync) = &mut self.resync {
            resync.rate.client_answered(asked_at, now);
        }
        self.scrub_notes_client(asked_at, now);
    }
}

/// Whether nothing but zeroes was read, by the bytes as they are now and by the checksum that came with them.
fn is_zero(data: &[u8], crc: u32) -> bool {
    data.iter().all(|byte| *byte == 0) && crc == crc32_of_zeroes(data.len() as u64)
}
