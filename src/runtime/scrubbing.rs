//! When a volume is scrubbed, and what is remembered of it: how far the scrub of the engine before was, and how the last
//! one ended.
//!
//! Owns the schedule and one small file per volume in the state directory, if there is one. What is lost with the file is how
//! far a scrub was: nothing that a replica holds. How a scrub is done is the state machine's (`volume/scrub.rs`).

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protocol::BLOCK_BYTES;
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tracing::warn;

use super::volume_task::VolumeTask;
use crate::status::{ScrubCounts, ScrubResult, ScrubState, ScrubStatus};
use crate::volume::{Command, CommandRefusal, ScrubFound, ScrubMark, ScrubSnapshot, VolumeSnapshot, VolumeState};

/// How often it is looked whether a scrub is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it is written down how far a scrub is.
const KEEP_EVERY: Duration = Duration::from_secs(5);
/// What is longer is no such file.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// What outlives the engine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Kept {
    /// Of which volume.
    uuid: String,
    /// Since when the schedule counts if no scrub has ended, ms since 1970.
    since_ms: u64,
    running: Option<Running>,
    last: Option<ScrubResult>,
}

/// A scrub that has not ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Running {
    began_ms: u64,
    position: u64,
    counts: ScrubCounts,
    /// Whose copies were compared below the position, but for what is counted as incomplete.
    #[serde(default)]
    members: BTreeSet<String>,
}

/// The scrubs of one volume.
pub(super) struct Scrubbing {
    interval: Option<Duration>,
    file: Option<PathBuf>,
    state: Mutex<State>,
    /// Held by who writes the file.
    writing: Mutex<()>,
}

#[derive(Default)]
struct State {
    kept: Kept,
    written: Kept,
    tried_at_ms: u64,
    /// The volume serves, and what an engine before was at goes on.
    is_resumed: bool,
    /// The last attempt to write it down failed, and that was said.
    is_warned: bool,
    /// At the last look there was no scrub, and nobody had said that it ended.
    is_astray: bool,
}

impl State {
    fn end(&mut self, mark: ScrubMark, is_finished: bool) {
        let ended_ms = now_ms();
        let began_ms = self.kept.running.take().map_or(ended_ms, |running| running.began_ms);
        self.kept.last = Some(ScrubResult {
            began_ms,
            ended_ms,
            is_finished,
            done_bytes: mark.position,
            counts: counts(mark.found),
        });
    }
}

fn now_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

fn counts(found: ScrubFound) -> ScrubCounts {
    let ScrubFound { bad_blocks, differing_blocks, repaired_blocks, unrepaired_blocks, incomplete_bytes } = found;
    ScrubCounts { bad_blocks, differing_blocks, repaired_blocks, unrepaired_blocks, incomplete_bytes }
}

fn view(snapshot: &VolumeSnapshot) -> BTreeSet<String> {
    snapshot.view.iter().map(ToString::to_string).collect()
}

fn mark(running: &Running) -> ScrubMark {
    let ScrubCounts { bad_blocks, differing_blocks, repaired_blocks, unrepaired_blocks, incomplete_bytes } =
        running.counts;
    let found = ScrubFound { bad_blocks, differing_blocks, repaired_blocks, unrepaired_blocks, incomplete_bytes };
    ScrubMark { position: running.position, found }
}

impl Kept {
    /// With times of the future, which a clock that was wrong left, made to be now: else no scrub would be due for long.
    fn not_after(mut self, now_ms: u64) -> Kept {
        let running = self.running.as_mut().map(|running| &mut running.began_ms);
        let last = self.last.as_mut().map(|last| [&mut last.began_ms, &mut last.ended_ms]);
        for time_ms in [&mut self.since_ms].into_iter().chain(running).chain(last.into_iter().flatten()) {
            *time_ms = (*time_ms).min(now_ms);
        }
        self
    }
}

impl Running {
    /// Whether a scrub of a volume of this size can be there.
    fn fits(&self, size_bytes: u64) -> bool {
        self.position <= size_bytes && self.position.is_multiple_of(BLOCK_BYTES)
    }

    /// What was found, to go on from with these members: one that is new has looked at nothing so far.
    fn mark_for(&self, members: &BTreeSet<String>) -> ScrubMark {
        let mut mark = mark(self);
        if !members.is_subset(&self.members) {
            mark.found.incomplete_bytes = mark.found.incomplete_bytes.max(self.position);
        }
        mark
    }
}

impl Scrubbing {
    /// Takes up what an engine before left in `directory`.
    pub(super) fn new(volume: &str, interval: Option<Duration>, directory: Option<&Path>) -> Scrubbing {
        let file = directory.map(|directory| directory.join(format!("scrub-{volume}.json")));
        let kept = file.as_deref().and_then(|file| match read(file) {
            Ok(kept) => kept,
            Err(error) => {
                warn!("volume {volume}: {} cannot be used, scrubs begin anew: {error}", file.display());
                None
            }
        });
        let now_ms = now_ms();
        let kept = kept.map_or_else(|| Kept { since_ms: now_ms, ..Kept::default() }, |kept| kept.not_after(now_ms));
        let state = State { kept, ..State::default() };
        Scrubbing { interval, file, state: Mutex::new(state), writing: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panicked with the lock")
    }

    /// A scrub began at this byte, or goes on there.
    pub(super) fn begun(&self, position: u64) {
        let mut state = self.lock();
        // One that somebody orders before takes the place of what an engine before was at.
        state.is_resumed = true;
        let before = state.kept.running.take().filter(|running| running.position == position && position > 0);
        let new = Running { began_ms: now_ms(), position, ..Running::default() };
        state.kept.running = Some(before.unwrap_or(new));
    }

    /// A scrub ended.
    pub(super) fn ended(&self, mark: ScrubMark, is_finished: bool) {
        self.lock().end(mark, is_finished);
    }

    /// The volume served no more when it was to begin or to go on.
    fn not_begun(&self) {
        self.lock().is_resumed = false;
    }

    /// Ends what an engine before was at, if that has not gone on yet; whether there was such a scrub of this volume.
    fn stop_kept(&self, uuid: Option<&str>) -> bool {
        let mut state = self.lock();
        let is_of_this = state.kept.uuid.is_empty() || uuid.is_none_or(|uuid| state.kept.uuid == uuid);
        if state.is_resumed || !is_of_this {
            return false;
        }
        let Some(mark) = state.kept.running.as_ref().map(mark) else { return false };
        state.end(mark, false);
        true
    }

    /// Brings it up to the volume as it is; returns what the volume is to do.
    fn look(&self, snapshot: &VolumeSnapshot, now_ms: u64) -> Option<Command> {
        let serves = matches!(snapshot.state, VolumeState::Serving | VolumeState::Frozen);
        let uuid = snapshot.uuid.filter(|_| serves)?.to_string();
        let mut state = self.lock();
        if state.kept.uuid != uuid {
            // Of another volume that had this name.
            let is_other = !state.kept.uuid.is_empty();
            let kept = if is_other { Kept { since_ms: now_ms, ..Kept::default() } } else { state.kept.clone() };
            state.kept = Kept { uuid, ..kept };
        }
        // The clock may have been set back.
        state.kept = std::mem::take(&mut state.kept).not_after(now_ms);
        state.tried_at_ms = state.tried_at_ms.min(now_ms);
        if !std::mem::replace(&mut state.is_resumed, true)
            && let Some(running) = &state.kept.running
        {
            if running.fits(snapshot.size_bytes) {
                return Some(Command::Scrub { from: running.mark_for(&view(snapshot)) });
            }
            warn!("the scrub of the engine before cannot have been at byte {}: it begins anew", running.position);
            state.kept.running = None;
            return Some(Command::Scrub { from: ScrubMark::default() });
        }
        match &snapshot.scrub {
            Some(scrub) => {
                state.is_astray = false;
                // None if its end was told since the snapshot was taken.
                if let Some(running) = &mut state.kept.running {
                    (running.position, running.counts) = (scrub.mark.position, counts(scrub.mark.found));
                    // One that joined in the midst is counted by the scrub.
                    running.members = view(snapshot);
                }
                None
            }
            None if state.kept.running.is_some() && !state.is_astray => {
                // Its end is being told just now.
                state.is_astray = true;
                None
            }
            None => {
                state.is_astray = false;
                state.kept.running = None;
                let is_due = due_ms(&state.kept, self.interval).is_some_and(|due| now_ms >= due);
                is_due.then(|| Command::Scrub { from: ScrubMark::default() })
            }
        }
    }

    /// Writes down what changed: now and then while a scrub is under way, else at once.
    fn keep(&self, now_ms: u64, at_once: bool) {
        let Some(file) = &self.file else { return };
        let _writing = self.writing.lock().expect("no thread panicked with the lock");
        let kept = {
            let mut state = self.lock();
            let is_new = state.kept.last != state.written.last
                || state.kept.running.is_some() != state.written.running.is_some()
                || state.kept.uuid != state.written.uuid;
            let is_time = u128::from(now_ms.saturating_sub(state.tried_at_ms)) >= KEEP_EVERY.as_millis();
            // What failed is not tried again at once.
            let is_due = is_time || at_once || (is_new && !state.is_warned);
            if state.kept == state.written || !is_due {
                return;
            }
            state.tried_at_ms = now_ms;
            state.kept.clone()
        };
        let result = write(file, &kept);
        let mut state = self.lock();
        let was_warned = std::mem::replace(&mut state.is_warned, result.is_err());
        match result {
            Ok(()) => state.written = kept,
            Err(error) if !was_warned => {
                warn!("{} cannot be written, so that a scrub begins anew after a restart: {error}", file.display());
            }
            Err(_) => {}
        }
    }

    /// For people and programs.
    pub(super) fn status(&self, snapshot: Option<&ScrubSnapshot>) -> ScrubStatus {
        let state = self.lock();
        let last = state.kept.last;
        let Some(scrub) = snapshot else {
            if let Some(running) = &state.kept.running {
                return ScrubStatus {
                    state: ScrubState::Waiting,
                    waits_for: Some("the volume".to_owned()),
                    done_bytes: running.position,
                    found: running.counts,
                    last,
                    ..ScrubStatus::default()
                };
            }
            let next_ms = due_ms(&state.kept, self.interval);
            return ScrubStatus { last, next_ms, ..ScrubStatus::default() };
        };
        ScrubStatus {
            state: if scrub.waits_for.is_some() { ScrubState::Waiting } else { ScrubState::Running },
            waits_for: scrub.waits_for.clone(),
            done_bytes: scrub.mark.position,
            total_bytes: scrub.total_bytes,
            bytes_per_second: scrub.bytes_per_second,
            eta_seconds: scrub.eta_seconds,
            found: counts(scrub.mark.found),
            last,
            next_ms: None,
        }
    }
}

/// When the next scrub is due by the schedule, ms since 1970.
fn due_ms(kept: &Kept, interval: Option<Duration>) -> Option<u64> {
    let since = kept.last.map_or(kept.since_ms, |last| last.ended_ms);
    let interval = u64::try_from(interval?.as_millis()).unwrap_or(u64::MAX);
    Some(since.saturating_add(interval))
}

fn read(file: &Path) -> io::Result<Option<Kept>> {
    let found = match std::fs::File::open(file) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    found.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(Some(serde_json::from_str(&text)?))
}

/// Puts the file in the place of the one before as a whole.
fn write(file: &Path, kept: &Kept) -> io::Result<()> {
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory)?;
    }
    let new = file.with_extension("json.new");
    let mut out = std::fs::File::create(&new)?;
    out.write_all(serde_json::to_string(kept)?.as_bytes())?;
    out.sync_all()?;
    std::fs::rename(&new, file)
}

/// Looks after the scrubs of a volume for as long as there is one.
pub(super) async fn look_after(task: Weak<VolumeTask>) {
    let mut interval = tokio::time::interval(LOOK_EVERY);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(task) = task.upgrade() else { return };
        let (snapshot, _) = task.snapshot();
        if let Some(command) = task.scrubbing.look(&snapshot, now_ms())
            && task.command(command) == Err(CommandRefusal::NotServing)
        {
            task.scrubbing.not_begun();
        }
        // A state directory may be on a slow disk. One that panics keeps nothing.
        let _ = tokio::task::spawn_blocking(move || task.scrubbing.keep(now_ms(), false)).await;
    }
}

impl VolumeTask {
    /// Begins a scrub, or ends the one under way.
    pub(super) fn order_scrub(&self, stop: bool) -> Result<String, CommandRefusal> {
        let (snapshot, _) = self.snapshot();
        if stop {
            let uuid = snapshot.uuid.map(|uuid| uuid.to_string());
            if !self.scrubbing.stop_kept(uuid.as_deref()) {
                self.command(Command::StopScrub)?;
            }
            return Ok(format!("the scrub of volume {} is stopped", self.name()));
        }
        // What an engine before was at goes on.
        let kept = self.scrubbing.look(&snapshot, now_ms());
        let is_kept = kept.is_some();
        let begun = self.command(kept.unwrap_or(Command::Scrub { from: ScrubMark::default() }));
        if is_kept && begun == Err(CommandRefusal::NotServing) {
            self.scrubbing.not_begun();
        }
        begun?;
        Ok(format!("volume {} is being scrubbed", self.name()))
    }

    /// Begins to write down how far a scrub is; when this is ready, it is done. A disk may never be done with it.
    pub(super) fn keep_scrub(self: &Arc<Self>) -> JoinHandle<()> {
        // What it would have the volume do now is left to the next engine.
        let _ = self.scrubbing.look(&self.snapshot().0, now_ms());
        let task = self.clone();
        tokio::task::spawn_blocking(move || task.scrubbing.keep(now_ms(), true))
    }
}

/// Waits until all is written down, or gives up: how far a scrub was is not worth waiting for a disk that hangs.
pub(super) async fn kept(keeping: Vec<JoinHandle<()>>, deadline: Instant) {
    for keeping in keeping {
        let _ = tokio::time::timeout_at(deadline, keeping).await;
    }
}

#[cfg(test)]
mod tests {
    use protocol::{Epoch, Seq, VolumeUuid};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const HOUR_MS: u64 = 3_600_000;
    const MIB: u64 = 1 << 20;

    fn snapshot(uuid: u8, scrub: Option<u64>) -> VolumeSnapshot {
        let found = ScrubFound { bad_blocks: 2, ..ScrubFound::default() };
        let scrub = scrub.map(|position| ScrubSnapshot {
            mark: ScrubMark { position, found },
            total_bytes: 8 * MIB,
            bytes_per_second: 0,
            eta_seconds: None,
            waits_for: None,
        });
        VolumeSnapshot {
            uuid: Some(VolumeUuid([uuid; 16])),
            epoch: Epoch(1),
            seq: Seq(1),
            view: vec![],
            state: VolumeState::Serving,
            exposed_bytes: 0,
            peers: vec![],
            size_bytes: 8 * MIB,
            blocked: None,
            reads: 0,
            writes: 0,
            statuses: 0,
            prefetches: 0,
            scrub,
        }
    }

    fn begins_at(command: Option<Command>) -> Option<u64> {
        command.map(|command| match command {
            Command::Scrub { from } => from.position,
            other => panic!("a scrub, not {other:?}"),
        })
    }

    #[test]
    fn a_scrub_goes_on_after_a_restart_where_it_was() {
        let dir = tempfile::tempdir().expect("a directory");
        let open = || Scrubbing::new("v", Some(HOUR), Some(dir.path()));
        let before = open();
        assert_eq!(before.look(&snapshot(1, None), now_ms()), None);
        before.begun(0);
        before.look(&snapshot(1, Some(3 * MIB)), now_ms());
        before.keep(now_ms(), true);
        let after = open();
        let waiting = after.status(None);
        assert_eq!((waiting.state, waiting.done_bytes), (ScrubState::Waiting, 3 * MIB));
        let Some(Command::Scrub { from }) = after.look(&snapshot(1, None), now_ms()) else { panic!("it goes on") };
        assert_eq!((from.position, from.found.bad_blocks), (3 * MIB, 2));
        after.begun(3 * MIB);
        let began_ms = before.lock().kept.running.as_ref().expect("it runs").began_ms;
        after.ended(ScrubMark { position: 8 * MIB, ..from }, true);
        assert_eq!(after.status(None).last.map(|last| (last.began_ms, last.counts.bad_blocks)), Some((began_ms, 2)));
        after.keep(now_ms(), false);
        assert_eq!(open().status(None), after.status(None), "how it ended is remembered too");
        assert_eq!(begins_at(open().look(&snapshot(1, None), now_ms())), None);
    }

    #[test]
    fn what_is_kept_of_another_volume_of_the_same_name_is_not_gone_by() {
        let dir = tempfile::tempdir().expect("a directory");
        let open = || Scrubbing::new("v", None, Some(dir.path()));
        let other = open();
        other.look(&snapshot(1, Some(3 * MIB)), 0);
        other.keep(0, true);
        let scrubbing = open();
        assert_eq!(scrubbing.look(&snapshot(2, None), 0), None);
        assert_eq!(scrubbing.status(None), ScrubStatus::default());
    }

    #[test]
    fn a_scrub_is_due_an_interval_after_the_last_one_or_the_first_start() {
        let dir = tempfile::tempdir().expect("a directory");
        let open = |interval| Scrubbing::new("v", interval, Some(dir.path()));
        let first = now_ms();
        let scrubbing = open(Some(HOUR));
        assert_eq!(begins_at(scrubbing.look(&snapshot(1, None), first)), None);
        scrubbing.keep(first, true);
        let scrubbing = open(Some(HOUR));
        assert_eq!(begins_at(scrubbing.look(&snapshot(1, None), first + HOUR_MS - 1)), None, "restarts do not count");
        assert_eq!(begins_at(scrubbing.look(&snapshot(1, None), first + HOUR_MS + 1000)), Some(0));
        assert_eq!(begins_at(open(None).look(&snapshot(1, None), first + HOUR_MS * 100_000)), None, "it is off");
        scrubbing.begun(0);
        assert_eq!(begins_at(scrubbing.look(&snapshot(1, Some(0)), first + HOUR_MS * 9)), None, "one is under way");
        scrubbing.ended(ScrubMark::default(), false);
        let ended = scrubbing.status(None).last.expect("it ended").ended_ms;
        assert_eq!(scrubbing.status(None).next_ms, Some(ended + HOUR_MS));
    }

    #[test]
    fn a_file_that_makes_no_sense_and_a_directory_that_cannot_be_written_cost_the_memory_only() {
        let dir = tempfile::tempdir().expect("a directory");
        for text in ["", "{", "null", &"9".repeat(100_000)] {
            std::fs::write(dir.path().join("scrub-v.json"), text).expect("it can be written");
            let scrubbing = Scrubbing::new("v", Some(HOUR), Some(dir.path()));
            assert_eq!(begins_at(scrubbing.look(&snapshot(1, None), now_ms())), None);
        }
        let nowhere = dir.path().join("scrub-v.json/below-a-file");
        let scrubbing = Scrubbing::new("v", Some(HOUR), Some(&nowhere));
        scrubbing.begun(0);
        scrubbing.look(&snapshot(1, Some(MIB)), now_ms());
        scrubbing.keep(now_ms(), true);
        assert_eq!(scrubbing.status(None).done_bytes, MIB);
    }

    #[test]
    fn what_could_not_be_written_is_written_when_it_can_be() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("state");
        std::fs::write(&file, "in the way").expect("it can be written");
        let open = || Scrubbing::new("v", Some(HOUR), Some(&file));
        let scrubbing = open();
        scrubbing.begun(0);
        scrubbing.look(&snapshot(1, Some(MIB)), 0);
        scrubbing.keep(0, true);
        assert!(scrubbing.lock().is_warned && scrubbing.lock().written == Kept::default());
        std::fs::remove_file(&file).expect("it can be removed");
        scrubbing.keep(KEEP_EVERY.as_millis() as u64, false);
        assert!(!scrubbing.lock().is_warned, "the next failure is told again");
        assert_eq!(open().status(None).done_bytes, MIB);
    }

    #[test]
    fn a_look_that_is_late_does_not_bring_back_a_scrub_that_ended_and_one_that_was_not_taken_up_is_tried_again() {
        let scrubbing = Scrubbing::new("v", None, None);
        scrubbing.begun(0);
        scrubbing.ended(ScrubMark { position: 8 * MIB, ..ScrubMark::default() }, true);
        scrubbing.look(&snapshot(1, Some(MIB)), now_ms());
        assert_eq!(scrubbing.status(None).state, ScrubState::Idle);
        let scrubbing = Scrubbing::new("v", None, None);
        let members = view(&snapshot(1, None));
        scrubbing.lock().kept.running = Some(Running { position: MIB, members, ..Running::default() });
        for _ in 0..3 {
            assert_eq!(begins_at(scrubbing.look(&snapshot(1, None), now_ms())), Some(MIB));
            scrubbing.not_begun();
        }
    }

    #[test]
    fn a_position_that_no_scrub_can_have_been_at_is_not_gone_by() {
        for (position, from) in [(8 * MIB, 8 * MIB), (8 * MIB + BLOCK_BYTES, 0), (u64::MAX, 0), (MIB + 1, 0)] {
            let scrubbing = Scrubbing::new("v", None, None);
            let counts = ScrubCounts { bad_blocks: u64::MAX, ..ScrubCounts::default() };
            scrubbing.lock().kept.running =
                Some(Running { began_ms: 0, position, counts, members: view(&snapshot(1, None)) });
            let Some(Command::Scrub { from: mark }) = scrubbing.look(&snapshot(1, None), 0) else { panic!("a scrub") };
            assert_eq!((mark.position, mark.found.bad_blocks), (from, if from == 0 { 0 } else { u64::MAX }));
        }
    }

    #[test]
    fn a_member_that_joined_between_two_engines_is_not_called_in_order_where_it_did_not_look() {
        let dir = tempfile::tempdir().expect("a directory");
        let of = |view: &[&str], scrub| {
            let view = view.iter().map(|name| name.parse().expect("a name")).collect();
            VolumeSnapshot { view, ..snapshot(1, scrub) }
        };
        let before = Scrubbing::new("v", None, Some(dir.path()));
        before.begun(0);
        before.look(&of(&["a", "b"], Some(3 * MIB)), 0);
        before.keep(0, true);
        for (view, incomplete_bytes) in [(&["a", "b"][..], 0), (&["a"], 0), (&["a", "b", "c"], 3 * MIB)] {
            let after = Scrubbing::new("v", None, Some(dir.path()));
            let Some(Command::Scrub { from }) = after.look(&of(view, None), 0) else { panic!("it goes on") };
            assert_eq!((from.position, from.found.incomplete_bytes), (3 * MIB, incomplete_bytes), "{view:?}");
        }
    }

    #[test]
    fn times_of_the_future_are_taken_to_be_now() {
        let dir = tempfile::tempdir().expect("a directory");
        let last = ScrubResult {
            began_ms: u64::MAX,
            ended_ms: u64::MAX,
            is_finished: true,
            done_bytes: 0,
            counts: ScrubCounts::default(),
        };
        let kept = Kept { uuid: String::new(), since_ms: u64::MAX, running: None, last: Some(last) };
        write(&dir.path().join("scrub-v.json"), &kept).expect("it can be written");
        let before = now_ms();
        let next_ms = Scrubbing::new("v", Some(HOUR), Some(dir.path())).status(None).next_ms.expect("it is planned");
        assert!((before + HOUR_MS..=now_ms() + HOUR_MS).contains(&next_ms));
    }

    #[test]
    fn a_clock_that_is_set_back_puts_no_scrub_off_and_holds_up_no_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let scrubbing = Scrubbing::new("v", Some(HOUR), Some(dir.path()));
        scrubbing.ended(ScrubMark::default(), true);
        scrubbing.keep(now_ms(), true);
        let earlier = now_ms() - 100 * HOUR_MS;
        scrubbing.begun(0);
        assert_eq!(begins_at(scrubbing.look(&snapshot(1, Some(MIB)), earlier)), None);
        scrubbing.keep(earlier, false);
        scrubbing.look(&snapshot(1, Some(2 * MIB)), earlier + 5000);
        scrubbing.keep(earlier + 5000, false);
        assert_eq!(Scrubbing::new("v", Some(HOUR), Some(dir.path())).status(None).done_bytes, 2 * MIB);
        scrubbing.lock().kept.running = None;
        assert_eq!(begins_at(scrubbing.look(&snapshot(1, None), earlier + HOUR_MS)), Some(0));
    }

    #[tokio::test]
    async fn a_disk_that_hangs_is_not_waited_for_longer_than_the_deadline() {
        let (release, released) = std::sync::mpsc::channel::<()>();
        let hangs = tokio::task::spawn_blocking(move || assert!(released.recv().is_err()));
        kept(vec![tokio::spawn(async {}), hangs], Instant::now() + Duration::from_millis(10)).await;
        drop(release);
    }

    #[test]
    fn what_an_engine_before_was_at_can_be_stopped_before_it_goes_on() {
        let running = Running { began_ms: 5, position: 3 * MIB, ..Running::default() };
        let uuid = snapshot(1, None).uuid.expect("it has one").to_string();
        let scrubbing = Scrubbing::new("v", None, None);
        scrubbing.lock().kept = Kept { uuid, running: Some(running), ..Kept::default() };
        let other = snapshot(2, None).uuid.expect("it has one").to_string();
        assert!(!scrubbing.stop_kept(Some(&other)));
        assert!(scrubbing.stop_kept(None));
        let last = scrubbing.status(None).last.expect("it is told how that ended");
        assert_eq!((last.began_ms, last.done_bytes, last.is_finished), (5, 3 * MIB, false));
        assert!(!scrubbing.stop_kept(None), "there is none any more");
        assert_eq!(begins_at(scrubbing.look(&snapshot(1, None), 0)), None);
    }
}
