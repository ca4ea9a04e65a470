//! A volume at work. Its state machine lies behind one lock; whoever has an event for it (a client's session, a link to
//! an agent, the journal thread of a replica in this process, the clock) takes the lock, tells it, and then carries out
//! what it wants with the lock released: answer clients, wake links. That saves a task switch on every write.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use protocol::ranges::ByteRange;
use protocol::{AckPolicy, ReplicaName, ToAgent, ToEngine};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tracing::{error, info, warn};

use super::StartError;
use super::embedded::EmbeddedLink;
use super::latency::{Latency, Percentiles};
use super::link::AgentLink;
use crate::config::{OnLag, ReadPolicy, ReplicaPlace, VolumeConfig};
use crate::nbd::{Backend, Completion, ExportInfo, IoError, Request as NbdRequest};
use crate::volume::{
    Event, Failure, Notice, PeerId, ReadSpread, Request, Severity, StartRefusal, Time, Volume, VolumeSettings,
    VolumeSnapshot, Zeroing,
};

const TICK: Duration = Duration::from_millis(5);
/// What a replica that keeps its deadline needs beyond it.
const CLOSE_GRACE: Duration = Duration::from_millis(100);
/// How long replicas may take to answer at start, at least.
const START_TIMEOUT_MIN: Duration = Duration::from_secs(10);

/// What became of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Not known yet.
    Starting,
    /// It serves.
    Serving,
    /// It did not start.
    Refused(StartRefusal),
    /// Another engine took over.
    Fenced { promised: u64, replica: String },
}

/// A client's request.
pub(super) struct Token {
    completion: Completion,
    begun: Instant,
    kind: Kind,
}

/// What its latency is counted as.
#[derive(Clone, Copy)]
enum Kind {
    Read,
    Change,
    Flush,
}

/// How a peer is reached.
pub(super) enum Link {
    Agent(AgentLink),
    Embedded(EmbeddedLink),
}

/// A volume at work.
pub(super) struct VolumeTask {
    core: Mutex<Volume<Token>>,
    started: Instant,
    links: OnceLock<Vec<Link>>,
    addresses: Vec<String>,
    settings: VolumeSettings,
    export: ExportInfo,
    outcome: watch::Sender<Outcome>,
    reads: Latency,
    writes: Latency,
    ticking: OnceLock<AbortHandle>,
}

fn settings(config: &VolumeConfig, take_over: bool) -> VolumeSettings {
    let name = |text: &str| text.parse::<ReplicaName>().expect("names are checked with the configuration");
    VolumeSettings {
        name: name(&config.name),
        size_bytes: config.size.bytes(),
        replicas: config.replicas.iter().map(|r| name(&r.name)).collect(),
        ack_write: config.ack.write,
        ack_flush: config.ack.flush,
        read: match config.read {
            ReadPolicy::Adaptive => ReadSpread::Adaptive,
            ReadPolicy::Multicast => ReadSpread::Multicast,
        },
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
        take_over,
        engine: *uuid::Uuid::new_v4().as_bytes(),
    }
}

impl VolumeTask {
    /// Opens the replicas in this process, connects to the others, and begins the activation.
    pub(super) async fn start(config: &VolumeConfig, take_over: bool) -> Result<Arc<VolumeTask>, StartError> {
        let settings = settings(config, take_over);
        let export = ExportInfo {
            name: config.name.clone(),
            description: config.description.clone(),
            size_bytes: config.size.bytes(),
            read_only: false,
        };
        let address = |place: &ReplicaPlace| match place {
            ReplicaPlace::Agent(endpoint) => endpoint.to_string(),
            ReplicaPlace::Embedded { path, .. } => path.display().to_string(),
        };
        let started = Instant::now();
        let task = Arc::new(VolumeTask {
            core: Mutex::new(Volume::new(settings.clone(), Time::ZERO)),
            started,
            links: OnceLock::new(),
            addresses: config.replicas.iter().map(|r| address(&r.place)).collect(),
            settings,
            export,
            outcome: watch::Sender::new(Outcome::Starting),
            reads: Latency::new(),
            writes: Latency::new(),
            ticking: OnceLock::new(),
        });
        let (mut links, mut failed) = (Vec::new(), Vec::new());
        for (peer, replica) in config.replicas.iter().enumerate() {
            links.push(match &replica.place {
                ReplicaPlace::Agent(endpoint) => Link::Agent(AgentLink::new(endpoint.clone())),
                ReplicaPlace::Embedded { path, .. } => {
                    let opened = EmbeddedLink::open(&path.join(&config.name), &config.name, &replica.name).await;
                    Link::Embedded(opened.unwrap_or_else(|(link, cause)| {
                        failed.push((peer, cause));
                        link
                    }))
                }
            });
        }
        for (peer, cause) in failed {
            task.do_without(peer, &links, cause)?;
        }
        let links = task.links.get_or_init(|| links);
        for (peer, link) in links.iter().enumerate() {
            match link {
                Link::Agent(link) => link.start(Arc::downgrade(&task), peer),
                Link::Embedded(link) => link.start(Arc::downgrade(&task), peer),
            }
        }
        let ticking = tokio::spawn(tick(Arc::downgrade(&task)));
        let _ = task.ticking.set(ticking.abort_handle());
        Ok(task)
    }

    /// A replica in this process cannot be opened: an error if it is certain that the volume cannot start without it.
    /// Where it may have left the view before, activation decides.
    fn do_without(
        &self,
        peer: PeerId,
        links: &[Link],
        cause: listener_agent::directory::DirectoryError,
    ) -> Result<(), StartError> {
        let policy = self.settings.ack_write.weaker(self.settings.ack_flush);
        let replicas = self.settings.replicas.len();
        let replica = &self.settings.replicas[peer];
        let may_have_left = links.iter().any(|link| match link {
            Link::Agent(_) => true,
            Link::Embedded(link) => link.view().is_some_and(|view| !view.contains(replica)),
        });
        if policy.activation(replicas) == replicas && !may_have_left {
            return Err(StartError::Replica { volume: self.name().to_owned(), replica: replica.to_string(), cause });
        }
        error!("volume {}, replica {replica}: {cause}", self.name());
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Volume<Token>> {
        self.core.lock().expect("no thread panicked with the lock")
    }

    fn now(&self) -> Time {
        self.started.elapsed()
    }

    /// Tells the volume something and carries out what it wants.
    pub(super) fn drive(&self, tell: impl FnOnce(&mut Volume<Token>, Time)) {
        let Some(links) = self.links.get() else { return };
        let mut events = Vec::new();
        let mut awake: u32 = 0;
        {
            let mut core = self.lock();
            tell(&mut core, self.now());
            while let Some(event) = core.poll_event() {
                events.push(event);
            }
            for peer in 0..links.len() {
                awake |= u32::from(core.has_outbox(peer)) << peer;
            }
        }
        for event in events {
            self.carry_out(event, links);
        }
        for (peer, link) in links.iter().enumerate() {
            if awake & (1 << peer) != 0 {
                match link {
                    Link::Agent(link) => link.wake(),
                    Link::Embedded(link) => link.pump(self, peer),
                }
            }
        }
    }

    fn carry_out(&self, event: Event<Token>, links: &[Link]) {
        match event {
            Event::Completed(token, outcome) => self.answer(token, outcome),
            Event::Serving => {
                info!("volume {}: serving", self.name());
                self.outcome.send_replace(Outcome::Serving);
            }
            Event::StartBlocked(refusal) => error!("volume {}: {refusal}", self.name()),
            Event::Removed(_) => {}
            Event::StartRefused(refusal) => {
                self.outcome.send_replace(Outcome::Refused(refusal));
            }
            Event::Fenced { promised, replica } => {
                self.outcome.send_replace(Outcome::Fenced { promised: promised.0, replica: replica.to_string() });
            }
            Event::Disconnect(peer) => match &links[peer] {
                Link::Agent(link) => link.disconnect(),
                Link::Embedded(link) => link.disconnect(),
            },
            Event::Notice(notice) => self.log_notice(&notice),
        }
    }

    fn answer(&self, token: Token, outcome: Result<Bytes, Failure>) {
        if outcome.is_ok() {
            match token.kind {
                Kind::Read => self.reads.record(token.begun.elapsed()),
                Kind::Change => self.writes.record(token.begun.elapsed()),
                Kind::Flush => {}
            }
        }
        token.completion.complete(outcome.map_err(|failure| match failure {
            Failure::Io => IoError::Io,
            Failure::NoSpace => IoError::NoSpace,
            Failure::Shutdown => IoError::Shutdown,
        }));
    }

    fn log_notice(&self, notice: &Notice) {
        let volume = self.name();
        let replica = notice.replica().map_or_else(String::new, |replica| format!(", replica {replica}"));
        match notice.severity() {
            Severity::Info => info!("volume {volume}{replica}: {notice}"),
            Severity::Warning => warn!("volume {volume}{replica}: {notice}"),
            Severity::Error => error!("volume {volume}{replica}: {notice}"),
        }
    }

    // ---- for links ---------------------------------------------------------------------------------------------

    pub(super) fn take_outbox(&self, peer: PeerId, bytes_max: u64) -> Vec<ToAgent> {
        self.lock().take_outbox(peer, bytes_max)
    }

    pub(super) fn connected(&self, peer: PeerId) {
        self.drive(|volume, now| volume.peer_connected(now, peer));
    }

    pub(super) fn disconnected(&self, peer: PeerId, reason: String) {
        self.drive(|volume, now| volume.peer_disconnected(now, peer, reason));
    }

    pub(super) fn received(&self, peer: PeerId, messages: impl IntoIterator<Item = ToEngine>) {
        self.drive(|volume, now| {
            for message in messages {
                volume.peer_message(now, peer, message);
            }
        });
    }

    // ---- for the engine ----------------------------------------------------------------------------------------

    pub(super) fn name(&self) -> &str {
        &self.export.name
    }

    pub(super) fn size_bytes(&self) -> u64 {
        self.export.size_bytes
    }

    pub(super) fn ack_write(&self) -> AckPolicy {
        self.settings.ack_write
    }

    pub(super) fn ack_flush(&self) -> AckPolicy {
        self.settings.ack_flush
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = &str> {
        self.addresses.iter().map(String::as_str)
    }

    pub(super) fn snapshot(&self) -> VolumeSnapshot {
        self.lock().snapshot(self.now())
    }

    pub(super) fn read_latency(&self) -> Percentiles {
        self.reads.percentiles()
    }

    pub(super) fn write_latency(&self) -> Percentiles {
        self.writes.percentiles()
    }

    /// Waits until the activation has ended.
    pub(super) async fn started(&self) -> Option<Outcome> {
        let mut outcome = self.outcome.subscribe();
        outcome.wait_for(|o| *o != Outcome::Starting).await.ok().map(|o| o.clone())
    }

    /// Waits until another engine took over; returns its epoch and who said so.
    pub(super) async fn fenced(&self) -> (u64, String) {
        let mut outcome = self.outcome.subscribe();
        loop {
            if let Outcome::Fenced { promised, replica } = &*outcome.borrow_and_update() {
                return (*promised, replica.clone());
            }
            if outcome.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Takes no more requests, waits until members have caught up or `deadline`, and takes leave of them.
    pub(super) async fn stop(&self, deadline: tokio::time::Instant) {
        self.drive(|volume, now| volume.stop(now));
        while !self.lock().is_quiet() && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(TICK).await;
        }
        self.drive(|volume, _| volume.goodbye());
    }

    /// Ends the links and marks replicas in this process clean; returns whether all are.
    pub(super) async fn close(&self, deadline: tokio::time::Instant) -> bool {
        let (mut agents, mut closing) = (Vec::new(), Vec::new());
        for link in self.links.get().into_iter().flatten() {
            match link {
                Link::Agent(link) => agents.push(link),
                // All at once: a disk that hangs must not keep the others from being marked clean.
                Link::Embedded(link) => closing.push(link.close(deadline.into_std())),
            }
        }
        for link in agents {
            link.finish(deadline).await;
        }
        let mut clean = true;
        for replica in closing {
            let closed = tokio::time::timeout_at(deadline + CLOSE_GRACE, replica).await;
            clean &= matches!(closed, Ok(Ok(true)));
        }
        if let Some(ticking) = self.ticking.get() {
            ticking.abort();
        }
        clean
    }
}

async fn tick(task: Weak<VolumeTask>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(task) = task.upgrade() else { return };
        task.drive(|volume, now| volume.tick(now));
    }
}

impl Backend for VolumeTask {
    fn export(&self) -> &ExportInfo {
        &self.export
    }

    fn submit(&self, request: NbdRequest, completion: Completion) {
        let kind = match request {
            NbdRequest::Read { .. } => Kind::Read,
            NbdRequest::Write { .. } | NbdRequest::Trim { .. } | NbdRequest::WriteZeroes { .. } => Kind::Change,
            NbdRequest::Flush => Kind::Flush,
        };
        let token = Token { completion, begun: Instant::now(), kind };
        let request = match request {
            NbdRequest::Read { offset, length } => Request::Read(ByteRange { offset, length: length.into() }),
            NbdRequest::Write { offset, data, fua } => Request::Write { offset, data, fua },
            NbdRequest::Flush => Request::Flush,
            NbdRequest::Trim { offset, length, fua } => {
                Request::Zero { range: ByteRange { offset, length }, fua, how: Zeroing::Trim }
            }
            NbdRequest::WriteZeroes { offset, length, fua, no_hole } => {
                let how = if no_hole { Zeroing::ZeroKeepAllocated } else { Zeroing::Zero };
                Request::Zero { range: ByteRange { offset, length }, fua, how }
            }
        };
        self.drive(|volume, now| volume.submit(now, token, request));
    }
}
