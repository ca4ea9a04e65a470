//! Which members get records at once, and when the others do.
//!
//! An answer waits for W members only. So many, those that are ahead, form the *front*: they get every record at once. The
//! other members get what has come together in a short time. That spares processors, networks and disks of work record by
//! record, where it is in the way of the answers if hardware is shared, and costs other members nothing that anybody waits
//! for. Who falls behind leaves the front by that alone.
//!
//! Owns no rule of the order: a record that is held back is a record on its way, and a read that has to see it goes after it.

use std::cmp::Reverse;

use protocol::ranges::ByteRange;
use protocol::{BLOCK_BYTES, Seq, ToAgent};

use super::{Peer, PeerId, Phase, Role, Time, Volume};

/// How long records come together for a member behind the front.
const TOGETHER_MAX: Time = Time::from_millis(2);
/// How much of them may, journal bytes: more at once is no better.
const TOGETHER_BYTES_MAX: u64 = 256 << 10;
/// Of so many records that were not sent it is looked up whether a read has to see them.
const LOOKED_AT_MAX: u64 = 256;

impl<T> Volume<T> {
    /// When [`Volume::take_outbox`] should be called next, which may be a moment that is over; `None` if it would give
    /// nothing.
    #[must_use]
    pub fn outbox_due(&self, now: Time, peer: PeerId) -> Option<Time> {
        let at = &self.peers[peer];
        if at.has_message() {
            return Some(now);
        }
        at.has_output(self.log.as_ref()).then(|| self.held_back_until(peer, at).unwrap_or(now))
    }

    /// Takes messages for a peer's connection, in order, until `bytes_max` of records are taken; no records that are held
    /// back.
    pub fn take_outbox(&mut self, now: Time, peer: PeerId, bytes_max: u64) -> Vec<ToAgent> {
        let is_held_back = self.held_back_until(peer, &self.peers[peer]).is_some_and(|until| now < until);
        let log = self.log.as_ref().filter(|_| !is_held_back);
        self.peers[peer].take(log, bytes_max)
    }

    /// Behind which record a member must do a read of `range` to show what it would behind all that were given out: the
    /// last that changes any of its blocks, if that was not sent yet. So it need not wait for records that are held back.
    pub(super) fn read_after(&self, peer: PeerId, range: ByteRange) -> Seq {
        let Some(log) = &self.log else { return Seq(0) };
        let sent = self.peers[peer].sent();
        if log.last().ahead_of(sent) > LOOKED_AT_MAX {
            return log.last();
        }
        log.last_to_be_seen(sent, range.aligned(BLOCK_BYTES)).unwrap_or(sent.min(log.last()))
    }

    fn held_back_until(&self, peer: PeerId, at: &Peer) -> Option<Time> {
        let log = self.log.as_ref()?;
        let serves = matches!(self.phase, Phase::Serving) && !self.stopping;
        let can_wait = serves
            && at.role == Role::Member
            && !self.front.contains(&peer)
            && !at.needs_records()
            && !self.flush_waits_for_all_behind()
            && log.bytes_between(at.sent(), log.last()) < TOGETHER_BYTES_MAX;
        can_wait.then(|| log.queued_at(at.sent().next())).flatten().map(|queued_at| queued_at + TOGETHER_MAX)
    }

    /// Whether a flush waits for more members than a change does.
    fn flush_waits_for_all_behind(&self) -> bool {
        let members = self.peers.len();
        !self.flush_acks.is_empty() && self.settings.ack_flush.needed(members) > self.settings.ack_write.needed(members)
    }

    /// Looks anew who is ahead. Of those that are equally far, who was ahead stays so.
    pub(super) fn choose_front(&mut self) {
        let Some(membership) = &self.membership else { return };
        let needed = self.settings.ack_write.needed(membership.in_force.len());
        let mut ready: Vec<PeerId> = (0..self.peers.len()).filter(|id| self.peers[*id].is_ready_member()).collect();
        ready.sort_by_key(|id| (Reverse(self.peers[*id].durable), !self.front.contains(id)));
        ready.truncate(needed);
        self.front = ready;
    }
}
