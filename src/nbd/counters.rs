//! What the server counts for status and metrics. Counts only; nothing is decided by them.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::reply::Failure;
use super::request::Operation;

/// Live counters, shared by all connections.
#[derive(Debug, Default)]
pub(super) struct Counters {
    connections_open: AtomicU64,
    connections_accepted: AtomicU64,
    connections_refused: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    flushes: AtomicU64,
    trims: AtomicU64,
    write_zeroes: AtomicU64,
    block_statuses: AtomicU64,
    caches: AtomicU64,
    errors: AtomicU64,
}

/// The counters at one moment. All but `connections_open` only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CountersSnapshot {
    /// Connections being served, handshakes included.
    pub connections_open: u64,
    /// Connections taken on since the start.
    pub connections_accepted: u64,
    /// Connections closed at once because there were too many.
    pub connections_refused: u64,
    /// READ requests submitted.
    pub reads: u64,
    /// WRITE requests submitted.
    pub writes: u64,
    /// FLUSH requests submitted.
    pub flushes: u64,
    /// TRIM requests submitted.
    pub trims: u64,
    /// WRITE_ZEROES requests submitted.
    pub write_zeroes: u64,
    /// BLOCK_STATUS requests submitted.
    pub block_statuses: u64,
    /// CACHE requests submitted.
    pub caches: u64,
    /// Requests answered with an error, refused ones included.
    pub errors: u64,
}

impl Counters {
    pub(super) fn on_connection_opened(&self) {
        self.connections_accepted.fetch_add(1, Relaxed);
        self.connections_open.fetch_add(1, Relaxed);
    }

    pub(super) fn on_connection_closed(&self) {
        self.connections_open.fetch_sub(1, Relaxed);
    }

    pub(super) fn on_connection_refused(&self) {
        self.connections_refused.fetch_add(1, Relaxed);
    }

    pub(super) fn on_submitted(&self, operation: Operation) {
        let counter = match operation {
            Operation::Read { .. } => &self.reads,
            Operation::Write { .. } => &self.writes,
            Operation::Flush => &self.flushes,
            Operation::Trim { .. } => &self.trims,
            Operation::WriteZeroes { .. } => &self.write_zeroes,
            Operation::BlockStatus { .. } => &self.block_statuses,
            Operation::Cache => &self.caches,
        };
        counter.fetch_add(1, Relaxed);
    }

    pub(super) fn on_answered<T>(&self, result: &Result<T, Failure>) {
        if result.is_err() {
            self.errors.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn snapshot(&self) -> CountersSnapshot {
        CountersSnapshot {
            connections_open: self.connections_open.load(Relaxed),
            connections_accepted: self.connections_accepted.load(Relaxed),
            connections_refused: self.connections_refused.load(Relaxed),
            reads: self.reads.load(Relaxed),
            writes: self.writes.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            trims: self.trims.load(Relaxed),
            write_zeroes: self.write_zeroes.load(Relaxed),
            block_statuses: self.block_statuses.load(Relaxed),
            caches: self.caches.load(Relaxed),
            errors: self.errors.load(Relaxed),
        }
    }
}
