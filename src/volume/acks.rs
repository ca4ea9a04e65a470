//! Changes and flushes that wait for their ack policy to be met.

use std::collections::VecDeque;

use protocol::Seq;

use super::Time;

#[derive(Debug)]
struct Waiting<T> {
    seq: Seq,
    token: T,
    asked_at: Time,
}

/// Requests of one policy, in order of the place that must be held.
#[derive(Debug)]
pub(super) struct Acks<T> {
    waiting: VecDeque<Waiting<T>>,
}

impl<T> Acks<T> {
    pub(super) fn new() -> Acks<T> {
        Acks { waiting: VecDeque::new() }
    }

    pub(super) fn push(&mut self, seq: Seq, token: T, asked_at: Time) {
        assert!(self.waiting.back().is_none_or(|last| last.seq <= seq), "places are given out in order");
        self.waiting.push_back(Waiting { seq, token, asked_at });
    }

    /// Takes the next request whose place is at most `committed`, and when it was made.
    pub(super) fn pop_committed(&mut self, committed: Seq) -> Option<(T, Time)> {
        self.waiting.front().filter(|w| w.seq <= committed)?;
        let waiting = self.waiting.pop_front()?;
        Some((waiting.token, waiting.asked_at))
    }

    /// Takes the next request.
    pub(super) fn pop(&mut self) -> Option<T> {
        self.waiting.pop_front().map(|w| w.token)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}
