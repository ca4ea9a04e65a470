//! A volume at work. Its state machine lies behind one lock; whoever has an event for it (a client's session, a link to
//! an agent, the journal thread of a replica in this process, the clock) takes the lock, tells it, and then carries out
//! what it wants with the lock released: answer clients, wake links. That saves a task switch on every write.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use listener_agent::directory::DirectoryError;
use protocol::ReplicaName;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinHandle};
use tracing::{error, info, warn};

use super::StartError;
use super::dial::Agents;
use super::events::EventLog;
use super::front::{Figures, Token};
use super::scrubbing::{self, Scrubbing};
use super::seat::{Link, Slot, Slots, address_of, name};
use crate::config::{OnLag, ReadPolicy, ReplicaPlace, VolumeConfig};
use crate::nbd::ExportInfo;
use crate::nbd::access::AccessRules;
use crate::status::EventSeverity;
use crate::volume::{
    Command, CommandRefusal, Event, Notice, PeerId, ReadSpread, Severity, StartRefusal, Time, Volume, VolumeSettings,
    VolumeSnapshot,
};

const TICK: Duration = Duration::from_millis(5);
/// The same where answers that are late by a millisecond are not waited for.
const TICK_HEDGED: Duration = Duration::from_millis(1);
/// Small reads that go to one agent before the next is asked.
const READS_TOGETHER: usize = 8;
/// A removed replica may take so long to be marked clean.
const RETIRE_MAX: Duration = Duration::from_secs(3);
/// How long replicas may take to answer at start, at least.
const START_TIMEOUT_MIN: Duration = Duration::from_secs(10);

/// What became of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Not known yet.
    Starting,
    /// It waits for replicas; it may serve yet.
    Blocked(StartRefusal),
    /// It serves.
    Serving,
    /// It did not start.
    Refused(StartRefusal),
    /// Another engine took over.
    Fenced { promised: u64, replica: String },
    /// The memory of this engine cannot be trusted.
    Corrupt { seq: u64 },
}

/// What the lock is around: each peer of the volume has its slot under the same number.
struct Core {
    volume: Volume<Token>,
    slots: Slots,
}

/// A volume at work.
pub(super) struct VolumeTask {
    core: Mutex<Core>,
    this: Weak<VolumeTask>,
    /// Threads outside of the runtime drive the volume too.
    runtime: Handle,
    started: Instant,
    pub(super) settings: VolumeSettings,
    pub(super) journal_bytes: u64,
    pub(super) agents: Arc<Agents>,
    name: String,
    /// What clients are told of it, but for its size.
    pub(super) export: ExportInfo,
    /// The volume's size, as its state machine said last.
    size_bytes: AtomicU64,
    outcome: watch::Sender<Outcome>,
    resized: watch::Sender<Option<Result<u64, String>>>,
    events: Arc<EventLog>,
    pub(super) figures: Figures,
    pub(super) scrubbing: Scrubbing,
    ticking: OnceLock<AbortHandle>,
    /// Removed replicas that are being closed.
    retiring: Mutex<Vec<JoinHandle<()>>>,
    /// Held while an order that takes its time is carried out.
    pub(super) ordering: tokio::sync::Mutex<()>,
}

fn settings(config: &VolumeConfig, take_over: bool) -> VolumeSettings {
    // Several threads may read from different replicas of this process at the same time, but not from one.
    let is_remote = config.replicas.iter().all(|replica| matches!(replica.place, ReplicaPlace::Agent { .. }));
    VolumeSettings {
        name: name(&config.name),
        size_bytes: config.size.bytes(),
        replicas: config.replicas.iter().map(|r| name(&r.name)).collect(),
        ack_write: config.ack.write,
        ack_flush: config.ack.flush,
        read: match config.read {
            ReadPolicy::Adaptive => ReadSpread::Adaptive,
            ReadPolicy::Multicast => ReadSpread::Multicast,
            ReadPolicy::Hedged => ReadSpread::Hedged,
            ReadPolicy::Verify => ReadSpread::Verify,
        },
        reads_together: if is_remote { READS_TOGETHER } else { 1 },
        lag_bytes_max: config.lag_bytes_max.bytes(),
        lag_max: config.lag_max(),
        throttle: match config.on_lag {
            OnLag::Drop => false,
            OnLag::Throttle => true,
        },
        min_replicas: config.min_replicas as usize,
        freeze: config.freeze(),
        lease: config.lease(),
        start_timeout: START_TIMEOUT_MIN.max(config.lease() * 2),
        resync_rate_min: config.resync_rate_min.bytes(),
        checksum_errors_max: config.checksum_errors_max,
        scrub_rate_min: config.scrub_rate_min.bytes(),
        take_over,
        engine: *uuid::Uuid::new_v4().as_bytes(),
    }
}

impl VolumeTask {
    /// Opens the replicas in this process, connects to the others, and begins the activation.
    pub(super) async fn start(
        config: &VolumeConfig,
        agents: Arc<Agents>,
        take_over: bool,
        state_directory: Option<&Path>,
        events: Arc<EventLog>,
    ) -> Result<Arc<VolumeTask>, StartError> {
        let settings = settings(config, take_over);
        let (mut links, mut failed) = (Vec::new(), Vec::new());
        for replica in &config.replicas {
            let (link, cause) = Link::to(replica, &config.name, &agents).await;
            links.push((replica.place.clone(), link));
            failed.extend(cause.map(|cause| (replica.name.clone(), cause)));
        }
        refuse_hopeless(config, failed)?;
        let task = Arc::new_cyclic(|this: &Weak<VolumeTask>| VolumeTask {
            core: Mutex::new(Core {
                volume: Volume::new(settings.clone(), Time::ZERO),
                slots: (links.into_iter().enumerate())
                    .map(|(peer, (place, link))| Some(Slot::new(this.clone(), peer, place, link)))
                    .collect(),
            }),
            this: this.clone(),
            runtime: Handle::current(),
            started: Instant::now(),
            journal_bytes: config.journal_size().bytes(),
            agents,
            name: config.name.clone(),
            export: export(config),
            size_bytes: AtomicU64::new(settings.size_bytes),
            settings,
            outcome: watch::Sender::new(Outcome::Starting),
            resized: watch::Sender::new(None),
            events,
            figures: Figures::new(),
            scrubbing: Scrubbing::new(&config.name, config.scrub_interval.0, state_directory),
            ticking: OnceLock::new(),
            retiring: Mutex::default(),
            ordering: tokio::sync::Mutex::new(()),
        });
        for slot in task.slots().iter().flatten() {
            slot.start();
        }
        tokio::spawn(scrubbing::look_after(Arc::downgrade(&task)));
        let every = if config.read == ReadPolicy::Hedged { TICK_HEDGED } else { TICK };
        let ticking = tokio::spawn(tick(Arc::downgrade(&task), every));
        let _ = task.ticking.set(ticking.abort_handle());
        Ok(task)
    }

    fn lock(&self) -> MutexGuard<'_, Core> {
        self.core.lock().expect("no thread panicked with the lock")
    }

    pub(super) fn now(&self) -> Time {
        self.started.elapsed()
    }

    fn slots(&self) -> Slots {
        self.lock().slots.clone()
    }

    /// Asks the volume something that has no consequences.
    pub(super) fn peek<R>(&self, ask: impl FnOnce(&mut Volume<Token>) -> R) -> R {
        ask(&mut self.lock().volume)
    }

    /// Tells the volume something and carries out what it wants.
    pub(super) fn drive(&self, tell: impl FnOnce(&mut Volume<Token>, Time)) {
        self.drive_core(|core, now| tell(&mut core.volume, now));
    }

    fn drive_core(&self, tell: impl FnOnce(&mut Core, Time)) {
        let (mut events, mut removed) = (Vec::new(), Vec::new());
        let (mut awake, mut awake_later): (u32, u32) = (0, 0);
        let slots = {
            let mut core = self.lock();
            let now = self.now();
            tell(&mut core, now);
            while let Some(event) = core.volume.poll_event() {
                match event {
                    // At once, as the next replica may get its number.
                    Event::Removed(peer) => removed.extend(core.vacate(peer)),
                    event => events.push(event),
                }
            }
            for peer in 0..core.slots.len() {
                match core.volume.outbox_due(now, peer) {
                    Some(due) if due <= now => awake |= 1 << peer,
                    Some(_) => awake_later |= 1 << peer,
                    None => {}
                }
            }
            self.size_bytes.store(core.volume.size_bytes(), Ordering::Relaxed);
            core.slots.clone()
        };
        for event in events {
            self.carry_out(event, &slots);
        }
        for slot in removed {
            self.retire(slot);
        }
        for (peer, slot) in slots.iter().enumerate() {
            let Some(slot) = slot else { continue };
            if awake & (1 << peer) != 0 {
                slot.wake();
            } else if awake_later & (1 << peer) != 0 {
                slot.wake_later();
            }
        }
    }

    fn carry_out(&self, event: Event<Token>, slots: &Slots) {
        match event {
            Event::Completed(token, outcome) => self.figures.answer(token, outcome),
            Event::Serving => {
                info!("volume {}: serving", self.name());
                self.note(None, EventSeverity::Info, "serves".to_owned());
                self.outcome.send_replace(Outcome::Serving);
            }
            Event::StartBlocked(refusal) => {
                self.note(None, EventSeverity::Error, format!("does not start: {refusal}"));
                self.outcome.send_if_modified(|outcome| {
                    let waits = matches!(outcome, Outcome::Starting | Outcome::Blocked(_));
                    if waits {
                        *outcome = Outcome::Blocked(refusal);
                    }
                    waits
                });
            }
            Event::StartRefused(refusal) => {
                self.note(None, EventSeverity::Error, format!("does not start: {refusal}"));
                self.outcome.send_replace(Outcome::Refused(refusal));
            }
            Event::Fenced { promised, replica } => {
                let text = format!("another engine took over with epoch {promised}; this one stops");
                self.note(Some(replica.to_string()), EventSeverity::Error, text);
                self.outcome.send_replace(Outcome::Fenced { promised: promised.0, replica: replica.to_string() });
            }
            Event::Corrupt { seq } => {
                let text = format!("record {seq} changed in the memory of this engine, which stops");
                self.note(None, EventSeverity::Error, text);
                self.outcome.send_replace(Outcome::Corrupt { seq: seq.0 });
            }
            Event::Disconnect(peer) => {
                if let Some(slot) = slots.get(peer).and_then(Option::as_ref) {
                    slot.disconnect();
                }
            }
            // Its slot was taken away with the volume locked.
            Event::Removed(_) => {}
            Event::Notice(notice) => self.on_notice(&notice),
        }
    }

    /// Closes a removed replica.
    fn retire(&self, slot: Arc<Slot>) {
        let name = self.name.clone();
        let deadline = tokio::time::Instant::now() + RETIRE_MAX;
        let task = self.runtime.spawn(async move { slot.retire(&name, deadline).await });
        let mut retiring = self.retiring.lock().expect("no thread panicked with the lock");
        retiring.retain(|task| !task.is_finished());
        retiring.push(task);
    }

    /// Waits until removed replicas are closed and their directories free.
    pub(super) async fn retired(&self) {
        let retiring = std::mem::take(&mut *self.retiring.lock().expect("no thread panicked with the lock"));
        for task in retiring {
            // One that panicked has closed its files too.
            let _ = task.await;
        }
    }

    fn on_notice(&self, notice: &Notice) {
        let volume = self.name();
        let replica = notice.replica().map_or_else(String::new, |replica| format!(", replica {replica}"));
        let severity = match notice.severity() {
            Severity::Info => {
                info!("volume {volume}{replica}: {notice}");
                EventSeverity::Info
            }
            Severity::Warning => {
                warn!("volume {volume}{replica}: {notice}");
                EventSeverity::Warning
            }
            Severity::Error => {
                error!("volume {volume}{replica}: {notice}");
                EventSeverity::Error
            }
        };
        self.note(notice.replica().map(ReplicaName::to_string), severity, notice.to_string());
        match notice {
            Notice::Resized { size_bytes } => drop(self.resized.send_replace(Some(Ok(*size_bytes)))),
            Notice::ResizeFailed { .. } => drop(self.resized.send_replace(Some(Err(notice.to_string())))),
            Notice::Scrubbing { position } => self.scrubbing.begun(*position),
            Notice::ScrubEnded { mark, is_finished } => self.scrubbing.ended(*mark, *is_finished),
            Notice::ViewInForce { .. }
            | Notice::Dropping { .. }
            | Notice::Replaying { .. }
            | Notice::Settling { .. }
            | Notice::LostData { .. }
            | Notice::ReadFailed { .. }
            | Notice::DamagedAnswer { .. }
            | Notice::BadBlock { .. }
            | Notice::Repaired { .. }
            | Notice::NoGoodCopy { .. }
            | Notice::NoMajority { .. }
            | Notice::Waiting { .. }
            | Notice::Lost { .. }
            | Notice::Refuses { .. }
            | Notice::Back { .. }
            | Notice::Resyncing { .. }
            | Notice::ResyncEnded { .. }
            | Notice::Removed { .. }
            | Notice::GivenUp { .. }
            | Notice::SizeDiffers { .. }
            | Notice::Frozen(_)
            | Notice::Space { .. } => {}
        }
    }

    fn note(&self, replica: Option<String>, severity: EventSeverity, text: String) {
        self.events.note(&self.name, replica, severity, text);
    }

    // ---- for orders --------------------------------------------------------------------------------------------

    /// Begins what an operator asks for.
    pub(super) fn command(&self, command: Command) -> Result<(), CommandRefusal> {
        let mut begun = Ok(());
        self.drive(|volume, now| begun = volume.command(now, command));
        begun
    }

    /// Gives a new replica its seat and begins to connect to it.
    pub(super) fn seat(&self, replica: ReplicaName, place: ReplicaPlace, link: Link) -> Result<(), CommandRefusal> {
        let name = replica.to_string();
        let mut seated = Err(CommandRefusal::NotServing);
        self.drive_core(|core, now| {
            seated = core.volume.add_replica(now, replica).map(|peer| {
                let slot = Slot::new(self.this.clone(), peer, place, link);
                core.fill(peer, slot.clone());
                slot
            });
        });
        let slot = seated?;
        let text = format!("added at {}", address_of(&slot.place));
        info!("volume {}, replica {name}: {text}", self.name());
        self.note(Some(name), EventSeverity::Info, text);
        slot.start();
        Ok(())
    }

    /// The replica at `place` was made anew.
    pub(super) async fn reopen(&self, place: &ReplicaPlace) {
        let slots = self.slots();
        if let Some(slot) = slots.iter().flatten().find(|slot| slot.place == *place) {
            slot.reopen().await;
        }
    }

    /// How the last growth ended, and how the next will.
    pub(super) fn resized(&self) -> watch::Receiver<Option<Result<u64, String>>> {
        self.resized.subscribe()
    }

    // ---- for the engine ----------------------------------------------------------------------------------------

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// The volume as it is now, without replicas that were removed, and where each of its peers is.
    pub(super) fn snapshot(&self) -> (VolumeSnapshot, Vec<ReplicaPlace>) {
        let (mut snapshot, slots) = {
            let core = self.lock();
            (core.volume.snapshot(self.now()), core.slots.clone())
        };
        let mut seated = slots.iter().map(Option::is_some);
        snapshot.peers.retain(|_| seated.next().unwrap_or(false));
        (snapshot, slots.iter().flatten().map(|slot| slot.place.clone()).collect())
    }

    /// What becomes of the volume.
    pub(super) fn outcome(&self) -> watch::Receiver<Outcome> {
        self.outcome.subscribe()
    }

    /// Takes no more requests, waits until members have caught up or `deadline`, and takes leave of them.
    pub(super) async fn stop(&self, deadline: tokio::time::Instant) {
        self.drive(|volume, now| volume.stop(now));
        while !self.lock().volume.is_quiet() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(TICK).await;
        }
        self.drive(|volume, _| volume.goodbye());
    }

    /// Ends the links and marks replicas in this process clean; returns whether all are.
    pub(super) async fn close(&self, deadline: tokio::time::Instant) -> bool {
        // All at once: a disk that hangs must not keep the others from being marked clean.
        let slots = self.slots();
        let closing: Vec<_> = (slots.iter().flatten().cloned())
            .map(|slot| tokio::spawn(async move { slot.close(deadline).await }))
            .collect();
        let mut clean = true;
        for slot in closing {
            clean &= slot.await.unwrap_or(false);
        }
        let _ = tokio::time::timeout_at(deadline, self.retired()).await;
        if let Some(ticking) = self.ticking.get() {
            ticking.abort();
        }
        clean
    }
}

impl Core {
    /// Takes the slot of a removed replica away.
    fn vacate(&mut self, peer: PeerId) -> Option<Arc<Slot>> {
        let mut slots: Vec<_> = self.slots.iter().cloned().collect();
        let slot = slots.get_mut(peer)?.take();
        if let Some(slot) = &slot {
            slot.vacate();
        }
        self.slots = slots.into();
        slot
    }

    /// Puts a new replica under its number, which is the next or one that is vacant.
    fn fill(&mut self, peer: PeerId, slot: Arc<Slot>) {
        let mut slots: Vec<_> = self.slots.iter().cloned().collect();
        slots.resize(slots.len().max(peer + 1), None);
        slots[peer] = Some(slot);
        self.slots = slots.into();
    }
}

/// What clients are told of a volume, its size left open, and which of them may use it.
fn export(config: &VolumeConfig) -> ExportInfo {
    let access = AccessRules { addresses: config.allow_addresses.clone(), names: config.allow_names.clone() };
    ExportInfo {
        name: config.name.clone(),
        description: config.description.clone(),
        size_bytes: 0,
        read_only: config.read_only,
        rotational: config.rotational,
        access,
    }
}

/// Replicas in this process that cannot be opened: an error if waiting for them makes no sense.
fn refuse_hopeless(config: &VolumeConfig, failed: Vec<(String, DirectoryError)>) -> Result<(), StartError> {
    let none_is_left = failed.len() == config.replicas.len();
    for (replica, cause) in failed {
        let is_mistake = matches!(cause, DirectoryError::InUse { .. } | DirectoryError::OtherReplica { .. });
        if is_mistake || none_is_left {
            return Err(StartError::Replica { volume: config.name.clone(), replica, cause });
        }
        error!("volume {}, replica {replica}: {cause}", config.name);
    }
    Ok(())
}

async fn tick(task: Weak<VolumeTask>, every: Duration) {
    let mut interval = tokio::time::interval(every);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(task) = task.upgrade() else { return };
        task.drive(|volume, now| volume.tick(now));
    }
}
