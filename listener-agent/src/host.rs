//! The threads that do a replica's work: one writes the journal, one applies to the image, one writes superblocks, and
//! a few read. Small reads of what memory has are done by whoever asks, if he may. The state machine in [`crate::replica`] decides what they do; this file owns no rule of its own.
//!
//! Sessions come from connections of engines, or from an engine in the same process. Messages to an engine go to the
//! session's sink, called without any lock held, so that a sink may call back.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use protocol::message::{Condition, EngineId, ReadOutcome};
use protocol::{BLOCK_BYTES, Epoch, ToAgent, ToEngine, View};
use tracing::{error, info};

use crate::carry_out;
use crate::directory::{self, DirectoryError};
use crate::disk::ReplicaFiles;
use crate::disk::aligned::AlignedBuffer;
use crate::image::Image;
use crate::replica::{ApplyJob, ExtendJob, FetchJob, Found, GroupOutcome, JobError, ReadJob, Replica, SessionId, Time};
use crate::superblock::Identity;

/// Takes messages for an engine. Must not block.
pub type Sink = Arc<dyn Fn(ToEngine) + Send + Sync>;

const READER_THREADS: usize = 2;
/// A read of so many bytes is done at once if memory has them: to call a thread for it costs more.
const READ_AT_ONCE_BYTES_MAX: u64 = 64 << 10;
/// Of reads that come together no more than this, bytes read for them: other threads may be free for the others.
const READS_AT_ONCE_BYTES_MAX: u64 = 256 << 10;
/// How often the threads look at the clock when nothing happens.
const IDLE_LOOK: Duration = Duration::from_millis(250);
/// How often at most.
const LOOK_MIN: Duration = Duration::from_millis(5);
/// What nobody waits for is applied after this time. Together it costs less than one by one, of processor time that
/// whoever waits for the journal can use.
const APPLY_DELAY: Duration = Duration::from_millis(5);

struct State {
    replica: Replica,
    sinks: BTreeMap<SessionId, Sink>,
    next_session: SessionId,
    /// Since when there is something to apply.
    apply_since: Option<Time>,
    stopping: bool,
}

/// Work of one sort, which a thread or several wait for. To call one costs a system call, even if none waits.
#[derive(Default)]
struct Work {
    called: Condvar,
    /// Threads that wait. Changes under the lock only.
    waiting: AtomicUsize,
    /// Until when they wait if nobody calls, us since the start. Likewise.
    until_us: AtomicU64,
}

impl Work {
    /// Whether somebody is to be called for what is there now.
    fn has_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// Whether somebody is to be called who would not look before `due`.
    fn sleeps_past(&self, due: Time) -> bool {
        self.has_waiting() && u128::from(self.until_us.load(Ordering::Relaxed)) > due.as_micros()
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, now: Time, time: Duration) -> MutexGuard<'a, State> {
        self.until_us.store(u64::try_from((now + time).as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let state = self.called.wait_timeout(state, time).expect("no thread panicked with the lock").0;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        state
    }
}

struct Shared {
    state: Mutex<State>,
    journal_work: Work,
    apply_work: Work,
    metadata_work: Work,
    read_work: Work,
    closed: Condvar,
    files: ReplicaFiles,
    image: Image,
    started: Instant,
    label: String,
}

/// A replica at work. Dropping it stops the threads without a last checkpoint; see [`ReplicaHost::close`].
pub struct ReplicaHost {
    shared: Arc<Shared>,
    identity: Identity,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// An engine's session with a replica. Dropping it ends the session.
pub struct Session {
    shared: Arc<Shared>,
    id: SessionId,
}

/// Who does small reads of what memory has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SmallReads {
    /// Whoever hands over the message that asks for them.
    AtOnce,
    /// Threads of the replica: the caller has other things to do, for others.
    ByThreads,
}

/// Who else may know this replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Engines in this process only: one that ran before has died with its process.
    ThisProcess,
    /// Engines anywhere.
    Network,
}

impl ReplicaHost {
    /// Opens the replica in `dir` and starts its threads.
    pub fn open(dir: &Path, reach: Reach) -> Result<ReplicaHost, DirectoryError> {
        let begun = Instant::now();
        let opened = directory::open(dir)?;
        let identity = opened.superblock.identity.clone();
        let label = format!("volume {} replica {}", identity.volume, identity.replica);
        info!("{label}: opened at position {} in {:?}", opened.durable, begun.elapsed());
        let old_engines_gone = reach == Reach::ThisProcess;
        let (superblock, ring, dirty) = (opened.superblock, opened.ring, opened.dirty);
        let replica = Replica::new(superblock, ring, opened.durable, dirty, Time::ZERO, old_engines_gone);
        let state = State { replica, sinks: BTreeMap::new(), next_session: 1, apply_since: None, stopping: false };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            journal_work: Work::default(),
            apply_work: Work::default(),
            metadata_work: Work::default(),
            read_work: Work::default(),
            closed: Condvar::new(),
            image: opened.image,
            files: opened.files,
            started: begun,
            label,
        });
        // From here on an error drops the host, which ends the threads there are and gives the files back.
        let host = ReplicaHost { shared, identity, threads: Mutex::default() };
        let start = |name: &str, work: fn(&Shared)| {
            let shared = host.shared.clone();
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&shared));
            let thread = thread.map_err(|cause| DirectoryError::Io { path: dir.to_owned(), cause })?;
            host.threads.lock().expect("no thread panicked with the lock").push(thread);
            Ok(())
        };
        start("journal", write_journal)?;
        start("apply", apply_changes)?;
        start("metadata", write_metadata)?;
        for _ in 0..READER_THREADS {
            start("read", serve_reads)?;
        }
        Ok(host)
    }

    /// Who the replica is. The volume may have grown since it was opened.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Whether no engine was ever promised anything: there is no data in it.
    #[must_use]
    pub fn is_pristine(&self) -> bool {
        self.shared.lock().replica.superblock().promised == Epoch(0)
    }

    /// The last view that it knows of.
    #[must_use]
    pub fn view(&self) -> View {
        self.shared.lock().replica.superblock().views.view.clone()
    }

    /// Whether a durable write failed: the replica takes nothing until it is opened anew.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.shared.lock().replica.condition() == Condition::Poisoned
    }

    /// Begins a session; the answer to `Hello` goes to `sink`.
    #[must_use]
    pub fn open_session(&self, engine: EngineId, sink: Sink) -> Session {
        let now = self.shared.now();
        let mut state = self.shared.lock();
        let id = state.next_session;
        state.next_session += 1;
        state.sinks.insert(id, sink);
        state.replica.open_session(id, engine, now);
        self.shared.after_change(state);
        Session { shared: self.shared.clone(), id }
    }

    /// Ends all sessions, applies what is durable, and marks the replica clean. Returns whether that was done before
    /// `deadline`; if not, the next opening replays the journal.
    pub fn close(&self, deadline: Instant) -> bool {
        let mut state = self.shared.lock();
        state.replica.close();
        self.shared.after_change(state);
        let mut state = self.shared.lock();
        while !state.replica.is_closed() && state.replica.condition() != Condition::Poisoned {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { break };
            state = self.shared.closed.wait_timeout(state, left).expect("no thread panicked with the lock").0;
        }
        let clean = state.replica.is_closed();
        drop(state);
        self.stop_threads();
        clean
    }

    fn stop_threads(&self) {
        self.shared.lock().stopping = true;
        let shared = &self.shared;
        for work in [&shared.journal_work, &shared.apply_work, &shared.metadata_work, &shared.read_work] {
            work.called.notify_all();
        }
        for thread in self.threads.lock().expect("no thread panicked with the lock").drain(..) {
            // A panic of a worker was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for ReplicaHost {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

impl Session {
    /// Hands messages to the replica, in order. Small reads that memory can answer may be done before this returns.
    pub fn send(&self, messages: impl IntoIterator<Item = ToAgent>, small_reads: SmallReads) {
        let now = self.shared.now();
        let mut state = self.shared.lock();
        for message in messages {
            state.replica.handle(now, self.id, message);
        }
        let reads = match small_reads {
            SmallReads::AtOnce => state.next_reads_at_once(),
            SmallReads::ByThreads => Vec::new(),
        };
        self.shared.after_change(state);
        if !reads.is_empty() {
            self.shared.read_at_once(reads);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.sinks.remove(&self.id);
        state.replica.close_session(self.id);
        self.shared.after_change(state);
    }
}

impl State {
    /// Whether the thread that applies has to know that there is something for it.
    fn begins_to_have_apply(&mut self, now: Time) -> bool {
        let is_known = self.apply_since.is_some();
        if self.replica.has_apply(now) {
            self.apply_since.get_or_insert(now);
            !is_known || self.replica.is_apply_urgent()
        } else {
            false
        }
    }

    fn next_reads_at_once(&mut self) -> Vec<ReadJob> {
        let mut left = READS_AT_ONCE_BYTES_MAX;
        let mut reads = Vec::new();
        while let Some(job) = self.replica.next_read_at_once(left.min(READ_AT_ONCE_BYTES_MAX)) {
            left = left.saturating_sub(job.range.aligned(BLOCK_BYTES).length);
            reads.push(job);
        }
        reads
    }

    fn apply_due_at(&self) -> Option<Time> {
        self.apply_since.map(|since| since + APPLY_DELAY)
    }

    fn next_apply(&mut self, now: Time) -> Option<ApplyJob> {
        if !self.replica.has_apply(now) {
            self.apply_since = None;
            return None;
        }
        let since = *self.apply_since.get_or_insert(now);
        if !self.replica.is_apply_urgent() && now < since + APPLY_DELAY {
            return None;
        }
        self.apply_since = None;
        self.replica.next_apply(now)
    }
}

impl Shared {
    fn now(&self) -> Time {
        self.started.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panicked with the lock")
    }

    /// Wakes whoever has work now and delivers what is to be said.
    fn after_change(&self, mut state: MutexGuard<'_, State>) {
        let now = self.now();
        let mut said = Vec::new();
        while let Some((session, message)) = state.replica.poll_outbox() {
            if let Some(sink) = state.sinks.get(&session) {
                said.push((sink.clone(), message));
            }
        }
        let applies = state.begins_to_have_apply(now) && self.apply_work.has_waiting();
        let replica = &state.replica;
        let journals = replica.has_group() && self.journal_work.has_waiting();
        let writes_metadata = (replica.has_metadata(now) && self.metadata_work.has_waiting())
            || replica.metadata_due_at().is_some_and(|due| self.metadata_work.sleeps_past(due));
        let reads = (replica.has_read() || replica.has_fetch() || replica.has_extend()) && self.read_work.has_waiting();
        if replica.is_closed() || replica.condition() == Condition::Poisoned {
            self.closed.notify_all();
        }
        drop(state);
        let called = [
            (journals, &self.journal_work),
            (reads, &self.read_work),
            (applies, &self.apply_work),
            (writes_metadata, &self.metadata_work),
        ];
        for (_, work) in called.iter().filter(|(is_called, _)| *is_called) {
            work.called.notify_one();
        }
        for (sink, message) in said {
            sink(message);
        }
    }

    /// Waits until `take` has a job, which it may have at `due` although nothing happens until then; `None` when the
    /// replica stops.
    fn next_job<J>(
        &self,
        work: &Work,
        due: fn(&State) -> Option<Time>,
        take: impl Fn(&mut State, Time) -> Option<J>,
    ) -> Option<J> {
        let mut state = self.lock();
        loop {
            if state.stopping {
                return None;
            }
            let now = self.now();
            if let Some(job) = take(&mut state, now) {
                return Some(job);
            }
            // A journal without room asks for a checkpoint.
            if state.replica.has_metadata(now) && self.metadata_work.has_waiting() {
                self.metadata_work.called.notify_one();
            }
            let due_in = due(&state).map_or(IDLE_LOOK, |due| due.saturating_sub(now));
            // It may be due and not possible yet: whoever makes it possible says so.
            let wait = due_in.clamp(LOOK_MIN, IDLE_LOOK);
            state = work.wait(state, now, wait);
        }
    }

    fn change(&self, change: impl FnOnce(&mut Replica, Time)) {
        let mut state = self.lock();
        change(&mut state.replica, self.now());
        self.after_change(state);
    }

    /// Answers those of the reads that memory has everything for, and leaves the others to the threads that read.
    fn read_at_once(&self, reads: Vec<ReadJob>) {
        let outcomes = reads.iter().map(|job| self.image.read_cached(job.range)).collect::<Vec<_>>();
        let mut state = self.lock();
        for (job, outcome) in reads.into_iter().zip(outcomes) {
            match outcome {
                Some(outcome) => state.replica.read_done(job, outcome),
                None => state.replica.not_cached(job),
            }
        }
        self.after_change(state);
    }

    fn report(&self, what: &str, outcome: &io::Result<()>) {
        if let Err(e) = outcome {
            error!("{}: {what}: {e}; the replica leaves service until it is restarted", self.label);
        }
    }

    fn fetch(&self, job: &FetchJob) -> Vec<Found> {
        carry_out::fetch(&self.files, &self.image, job).unwrap_or_else(|e| {
            error!("{}: reading the journal for another replica: {e}", self.label);
            Vec::new()
        })
    }
}

fn write_journal(shared: &Shared) {
    let mut buffer = AlignedBuffer::with_capacity(0);
    while let Some(job) = shared.next_job(&shared.journal_work, |_| None, |state, _| state.replica.next_group()) {
        let (outcome, cause) = carry_out::write_group(&shared.files, &shared.image, &job, &mut buffer);
        if outcome == GroupOutcome::Failed {
            shared.report("writing the journal", &cause);
        }
        // The payloads are kept by the state machine until they are applied.
        drop(job);
        shared.change(|r, _| r.group_done(outcome));
    }
}

fn apply_changes(shared: &Shared) {
    while let Some(job) = shared.next_job(&shared.apply_work, State::apply_due_at, State::next_apply) {
        let outcome = carry_out::apply(&shared.image, &job);
        let result = outcome.as_ref().copied().map_err(carry_out::job_error);
        if result == Err(JobError::Failed) {
            shared.report("applying to the image", &outcome);
        }
        shared.change(|r, now| r.apply_done(now, result));
    }
}

fn write_metadata(shared: &Shared) {
    let metadata_due_at = |state: &State| state.replica.metadata_due_at();
    while let Some(job) =
        shared.next_job(&shared.metadata_work, metadata_due_at, |state, now| state.replica.next_metadata(now))
    {
        let outcome = carry_out::write_metadata(&shared.files, &shared.image, &job);
        let result = match outcome {
            Ok(()) => Ok(()),
            Err(e) => {
                if e.error == JobError::Failed {
                    shared.report("taking a checkpoint", &Err(e.cause));
                }
                Err(e.error)
            }
        };
        shared.change(|r, now| r.metadata_done(now, &job, result));
    }
}

enum ReadWork {
    Image(ReadJob),
    Journal(FetchJob),
    Room(ExtendJob),
}

fn serve_reads(shared: &Shared) {
    let take = |state: &mut State, _: Time| {
        let r = &mut state.replica;
        let read = r.next_read().map(ReadWork::Image);
        let fetch = read.or_else(|| r.next_fetch().map(ReadWork::Journal));
        fetch.or_else(|| r.next_extend().map(ReadWork::Room))
    };
    while let Some(work) = shared.next_job(&shared.read_work, |_| None, take) {
        match work {
            ReadWork::Image(job) => {
                let outcome = shared.image.read(job.what, job.range);
                if let ReadOutcome::ChecksumMismatch { offset } = &outcome {
                    error!("{}: the block at byte {offset} does not match its checksum", shared.label);
                } else if let ReadOutcome::Unreadable { offset } = &outcome {
                    error!("{}: the disk reports an error for the block at byte {offset}", shared.label);
                }
                shared.change(|r, _| r.read_done(job, outcome));
            }
            ReadWork::Journal(job) => {
                let found = shared.fetch(&job);
                shared.change(|r, _| r.fetch_done(&job, found));
            }
            ReadWork::Room(job) => {
                let outcome = carry_out::extend(&shared.image, job.size_bytes).map_err(|e| (e.error, e.to_string()));
                shared.change(|r, _| r.extend_done(job, outcome));
            }
        }
    }
}
