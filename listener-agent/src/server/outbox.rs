//! What waits to be written to an engine: bounded, and durability said once.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};

use protocol::ToEngine;
use protocol::message::ReadOutcome;
use protocol::ranges::ByteRange;
use tokio::sync::Notify;

/// An engine that takes so little of what it asked for that more than this waits for it is cut off.
const OUTBOX_BYTES_MAX: usize = 128 << 20;

/// What waits to be written to an engine.
#[derive(Default)]
pub(super) struct Outbox {
    waiting: Mutex<Waiting>,
    news: Notify,
}

#[derive(Default)]
struct Waiting {
    messages: VecDeque<ToEngine>,
    bytes: usize,
    overrun: bool,
}

fn bulk_bytes(message: &ToEngine) -> usize {
    match message {
        ToEngine::ReadDone { outcome: ReadOutcome::Data { data, .. }, .. } => data.len() + 64,
        ToEngine::ReadDone { outcome: ReadOutcome::Extents(extents), .. } => size_of_val(&extents[..]) + 64,
        ToEngine::Fetched(record) => record.payload.len() + 64,
        ToEngine::Dirty(dirty) => dirty.ranges.len() * size_of::<ByteRange>() + 64,
        ToEngine::ReadDone { .. }
        | ToEngine::Welcome(_)
        | ToEngine::Formatted
        | ToEngine::Promised(_)
        | ToEngine::Durable { .. }
        | ToEngine::Pong { .. }
        | ToEngine::Changed { .. }
        | ToEngine::FetchEnd { .. }
        | ToEngine::Condition(_)
        | ToEngine::Begun
        | ToEngine::Copied { .. }
        | ToEngine::InSync
        | ToEngine::Extended { .. }
        | ToEngine::Refused(_) => 64,
    }
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().expect("no thread panicked with the lock")
    }

    pub(super) fn push(&self, message: ToEngine) {
        let mut waiting = self.lock();
        // Durability is cumulative: the later message says it all.
        if let (ToEngine::Durable { seq }, Some(ToEngine::Durable { seq: last })) =
            (&message, waiting.messages.back_mut())
        {
            *last = (*last).max(*seq);
            return;
        }
        waiting.bytes += bulk_bytes(&message);
        if waiting.bytes > OUTBOX_BYTES_MAX {
            waiting.overrun = true;
            waiting.messages.clear();
        } else {
            waiting.messages.push_back(message);
        }
        drop(waiting);
        self.news.notify_one();
    }

    /// Waits for messages; `None` if the engine is to be cut off.
    pub(super) async fn take(&self) -> Option<Vec<ToEngine>> {
        loop {
            {
                let mut waiting = self.lock();
                if waiting.overrun {
                    return None;
                }
                if !waiting.messages.is_empty() {
                    waiting.bytes = 0;
                    return Some(std::mem::take(&mut waiting.messages).into());
                }
            }
            self.news.notified().await;
        }
    }
}
