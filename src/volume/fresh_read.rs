//! A read at a member whose bytes go to others behind all records given out by then. They may do so only if no record that
//! overlaps them was given out since the read was queued: the bytes would take such a record back. It is read again then,
//! and after a few tries new changes to the range wait for that read. Pure bookkeeping: whom to ask, and what becomes of
//! the bytes, is decided by whoever keeps it ([`super::copying`], [`super::repair`]).

use protocol::ranges::ByteRange;

use super::Time;

/// Reads that changes made useless before changes wait.
const TRIES_BEFORE_HOLD: u32 = 3;
/// Changes wait for a read so long, at most, at its first try of that sort; with each further one twice as long, so that
/// a slow disk ends it, and one that hangs is not waited for.
pub(super) const HOLD_FIRST: Time = Time::from_millis(100);
const HOLD_DOUBLINGS_MAX: u32 = 4;

#[derive(Debug)]
struct Asked {
    read: u64,
    asked_at: Time,
    /// A record changed the range since.
    overlapped: bool,
}

/// The read, asked or not.
#[derive(Debug)]
pub(super) struct FreshRead {
    pub(super) range: ByteRange,
    tries: u32,
    asked: Option<Asked>,
}

impl FreshRead {
    pub(super) fn new(range: ByteRange) -> FreshRead {
        FreshRead { range, tries: 0, asked: None }
    }

    /// A member was asked, by the read of this name.
    pub(super) fn ask(&mut self, read: u64, now: Time) {
        self.asked = Some(Asked { read, asked_at: now, overlapped: false });
    }

    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// Whether a member was asked, and no record came since that changes the range.
    pub(super) fn is_fresh(&self) -> bool {
        self.asked.as_ref().is_some_and(|asked| !asked.overlapped)
    }

    /// Whether this is the name under which a member was asked.
    pub(super) fn is_named(&self, read: u64) -> bool {
        self.asked.as_ref().is_some_and(|asked| asked.read == read)
    }

    /// The read that a member was asked, if it has taken longer than that.
    pub(super) fn late(&self, now: Time, patience: Time) -> Option<u64> {
        self.asked.as_ref().filter(|asked| now.saturating_sub(asked.asked_at) > patience).map(|asked| asked.read)
    }

    /// A record was given out that changes `range`.
    pub(super) fn overlap(&mut self, range: ByteRange) {
        if let Some(asked) = &mut self.asked
            && self.range.overlaps(range)
        {
            asked.overlapped = true;
        }
    }

    /// The bytes are there; whether they may be given out. If not, a member must be asked again.
    pub(super) fn finish(&mut self) -> bool {
        let is_fresh = self.asked.take().is_some_and(|asked| !asked.overlapped);
        self.tries += u32::from(!is_fresh);
        is_fresh
    }

    /// The member will not answer, or could not read it.
    pub(super) fn lose(&mut self) {
        self.asked = None;
    }

    /// Whether changes of `range` must wait for it.
    pub(super) fn holds(&self, range: ByteRange, now: Time) -> bool {
        let Some(asked) = self.asked.as_ref().filter(|a| !a.overlapped && self.tries >= TRIES_BEFORE_HOLD) else {
            return false;
        };
        let doublings = (self.tries - TRIES_BEFORE_HOLD).min(HOLD_DOUBLINGS_MAX);
        self.range.overlaps(range) && now.saturating_sub(asked.asked_at) < HOLD_FIRST * 2_u32.pow(doublings)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_a_record_changed_meanwhile_are_read_again_and_then_held() {
        let range = |offset| ByteRange { offset, length: 4096 };
        let mut read = FreshRead::new(range(4096));
        for number in 0..3 {
            read.ask(number, Time::ZERO);
            assert!(read.is_named(number) && !read.holds(range(4096), Time::ZERO));
            read.overlap(range(0));
            read.overlap(range(8191));
            assert!(!read.finish());
        }
        read.ask(3, Time::ZERO);
        assert!(read.holds(range(8191), Time::ZERO) && !read.holds(range(8192), Time::ZERO));
        assert!(!read.holds(range(4096), HOLD_FIRST), "a member that hangs is not waited for");
        assert!(read.finish() && !read.holds(range(4096), Time::ZERO));
    }
}
