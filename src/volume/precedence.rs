//! Which members get records at once, and when the others do.
//!
//! An answer waits for W members only. So many, those that are ahead, form the *front*: they get every record at once. The
//! other members get what has come together in a short time. That spares processors, networks and disks of work record by
//! record, where it is in the way of the answers if hardware is shared, and costs other members nothing that anybody waits
//! for. Who falls behind leaves the front by that alone.
//!
//! Owns no rule of the order: a record that is held back is a record on its way.

use std::cmp::Reverse;

use super::{Peer, PeerId, Phase, Role, Time, Volume};

/// How long records come together for a member behind the front.
const TOGETHER_MAX: Time = Time::from_millis(2);
/// How much of them may, journal bytes: more at once is no better.
const TOGETHER_BYTES_MAX: u64 = 256 << 10;

impl<T> Volume<T> {
    /// When [`Volume::take_outbox`] should be called next, which may be a moment that is over; `None` if it would give
    /// nothing.
    #[must_use]
    pub fn outbox_due(&self, now: Time, peer: PeerId) -> Option<Time> {
        let at = &self.peers[peer];
        at.has_output(self.log.as_ref()).then(|| self.held_back_until(peer, at).unwrap_or(now))
    }

    fn held_back_until(&self, peer: PeerId, at: &Peer) -> Option<Time> {
        let log = self.log.as_ref()?;
        let serves = matches!(self.phase, Phase::Serving) && !self.stopping;
        let can_wait = serves
            && at.role == Role::Member
            && !self.front.contains(&peer)
            && !at.has_messages()
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
