//! A replica in the engine's own process: the same replica as an agent's, without a connection between. Messages are
//! handed over by whichever thread has them, one thread at a time per replica, so that their order is kept.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use listener_agent::directory::DirectoryError;
use listener_agent::host::{Reach, ReplicaHost, Session, SmallReads};
use protocol::ToAgent;
use protocol::message::Hello;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::{AbortHandle, JoinHandle};

use super::seat::{Outgoing, Seat};

const REOPEN_AFTER: Duration = Duration::from_millis(100);
/// Records handed over at a time, bytes.
const BATCH_BYTES: u64 = 4 << 20;

/// Who hands messages over.
#[derive(Default)]
struct Pump {
    running: bool,
    again: bool,
}

struct Shared {
    dir: PathBuf,
    volume_name: String,
    replica_name: String,
    host: Mutex<Option<Arc<ReplicaHost>>>,
    session: Mutex<Option<Arc<Session>>>,
    pump: Mutex<Pump>,
    /// A task waits with what need not go at once.
    knows_later: AtomicBool,
    /// Threads outside of the runtime hand over messages too.
    runtime: Handle,
    /// Counts the sessions: what an earlier one still says is not heard.
    generation: AtomicU64,
    disconnect: Notify,
    seat: OnceLock<Arc<Seat>>,
}

/// A link to a replica in this process.
pub(super) struct EmbeddedLink {
    shared: Arc<Shared>,
    task: OnceLock<AbortHandle>,
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("no thread panicked with the lock")
}

async fn open_host(shared: &Arc<Shared>) -> Result<Arc<ReplicaHost>, DirectoryError> {
    let opening = shared.clone();
    let opened = tokio::task::spawn_blocking(move || {
        let host = ReplicaHost::open(&opening.dir, Reach::ThisProcess)?;
        let identity = host.identity();
        if identity.volume.as_str() != opening.volume_name || identity.replica.as_str() != opening.replica_name {
            return Err(DirectoryError::OtherReplica {
                path: opening.dir.clone(),
                volume: identity.volume.to_string(),
                replica: identity.replica.to_string(),
            });
        }
        Ok(Arc::new(host))
    });
    let failed = |e| DirectoryError::Io { path: shared.dir.clone(), cause: std::io::Error::other(e) };
    opened.await.map_err(failed)?
}

impl EmbeddedLink {
    /// Opens the replica in `dir`. With the error comes a link that goes on trying.
    pub(super) async fn open(
        dir: &Path,
        volume_name: &str,
        replica_name: &str,
    ) -> Result<EmbeddedLink, (EmbeddedLink, DirectoryError)> {
        let shared = Arc::new(Shared {
            dir: dir.to_owned(),
            volume_name: volume_name.to_owned(),
            replica_name: replica_name.to_owned(),
            host: Mutex::default(),
            session: Mutex::default(),
            pump: Mutex::default(),
            knows_later: AtomicBool::new(false),
            runtime: Handle::current(),
            generation: AtomicU64::new(0),
            disconnect: Notify::new(),
            seat: OnceLock::new(),
        });
        let opened = open_host(&shared).await;
        let link = EmbeddedLink { shared: shared.clone(), task: OnceLock::new() };
        match opened {
            Ok(host) => {
                *locked(&shared.host) = Some(host);
                Ok(link)
            }
            Err(e) => Err((link, e)),
        }
    }

    pub(super) fn start(&self, seat: Arc<Seat>) {
        let _ = self.shared.seat.set(seat.clone());
        let _ = self.task.set(tokio::spawn(keep_connected(self.shared.clone(), seat)).abort_handle());
    }

    pub(super) fn disconnect(&self) {
        self.shared.disconnect.notify_one();
    }

    /// Hands over what the volume has for the replica, unless another thread is at it and will see to it.
    pub(super) fn pump(&self) {
        self.shared.pump();
    }

    /// As [`EmbeddedLink::pump`], for what need not go at once.
    pub(super) fn wake_later(&self) {
        if !self.shared.knows_later.load(Ordering::SeqCst) {
            self.shared.pump();
        }
    }

    /// Lets go of the files that are open, if any, to open those that are in the directory now.
    pub(super) async fn reopen(&self) {
        let session = locked(&self.shared.session).take();
        drop(session);
        let host = locked(&self.shared.host).take();
        // Its threads are waited for. One that panicked was reported when it did.
        let _ = tokio::task::spawn_blocking(move || drop(host)).await;
        self.shared.disconnect.notify_one();
    }

    /// Ends the session and begins to mark the replica clean; the task returns whether it is. With a disk that hangs it
    /// may never return.
    pub(super) fn close(&self, deadline: Instant) -> JoinHandle<bool> {
        if let Some(task) = self.task.get() {
            task.abort();
        }
        let session = locked(&self.shared.session).take();
        drop(session);
        let host = locked(&self.shared.host).take();
        tokio::task::spawn_blocking(move || host.is_none_or(|host| host.close(deadline)))
    }
}

impl Shared {
    /// Hands over what the volume has for the replica, unless another thread is at it and will see to it.
    fn pump(self: &Arc<Self>) {
        let Some(seat) = self.seat.get() else { return };
        {
            let mut pump = locked(&self.pump);
            pump.again = true;
            if pump.running {
                return;
            }
            pump.running = true;
        }
        // A thread of a replica has records to write and others to call; and who goes on for others does not read for them.
        let is_client = Handle::try_current().is_ok();
        let mut small_reads = if is_client { SmallReads::AtOnce } else { SmallReads::ByThreads };
        loop {
            locked(&self.pump).again = false;
            match seat.take_outbox(BATCH_BYTES) {
                Some(Outgoing::Messages(messages)) => {
                    self.hand_over(messages, small_reads);
                    small_reads = SmallReads::ByThreads;
                    continue;
                }
                Some(Outgoing::Later(wait)) => self.pump_after(wait),
                Some(Outgoing::Nothing) | None => {}
            }
            let mut pump = locked(&self.pump);
            if !pump.again {
                pump.running = false;
                return;
            }
        }
    }

    fn pump_after(self: &Arc<Self>, wait: Duration) {
        if !self.knows_later.swap(true, Ordering::SeqCst) {
            let this = self.clone();
            self.runtime.spawn(async move {
                tokio::time::sleep(wait).await;
                this.knows_later.store(false, Ordering::SeqCst);
                this.pump();
            });
        }
    }

    fn hand_over(self: &Arc<Self>, messages: Vec<ToAgent>, small_reads: SmallReads) {
        let mut messages = messages.into_iter().peekable();
        if let Some(ToAgent::Hello(hello)) = messages.peek() {
            let hello = hello.clone();
            messages.next();
            self.open_session(&hello);
        }
        let session = locked(&self.session).clone();
        if let Some(session) = session {
            session.send(messages, small_reads);
        }
    }

    fn open_session(self: &Arc<Self>, hello: &Hello) {
        let Some(host) = locked(&self.host).clone() else { return };
        let generation = self.generation.load(Ordering::SeqCst);
        let shared = Arc::downgrade(self);
        let session = host.open_session(
            hello.engine,
            Arc::new(move |message| {
                let Some(shared) = shared.upgrade() else { return };
                let current = shared.generation.load(Ordering::SeqCst) == generation;
                if let Some(seat) = shared.seat.get().filter(|_| current) {
                    seat.received([message]);
                }
            }),
        );
        let earlier = locked(&self.session).replace(Arc::new(session));
        drop(earlier);
    }
}

impl Drop for EmbeddedLink {
    fn drop(&mut self) {
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }
}

/// A replica whose durable writes failed is closed, to be opened anew: recovery reads what the disk really holds.
async fn close_if_poisoned(shared: &Shared) {
    let poisoned = locked(&shared.host).take_if(|host| host.is_poisoned());
    if let Some(host) = poisoned {
        // Its threads are waited for. One that panicked was reported when it did.
        let _ = tokio::task::spawn_blocking(move || drop(host)).await;
        tokio::time::sleep(REOPEN_AFTER * 10).await;
    }
}

/// Keeps a session open: begins a new one when the volume wanted the last one ended, and reopens the replica if it left
/// service.
async fn keep_connected(shared: Arc<Shared>, seat: Arc<Seat>) {
    loop {
        let is_open = locked(&shared.host).is_some();
        if !is_open {
            match open_host(&shared).await {
                Ok(host) => *locked(&shared.host) = Some(host),
                Err(e) => {
                    if !seat.disconnected(e.to_string()) {
                        return;
                    }
                    tokio::time::sleep(REOPEN_AFTER * 10).await;
                    continue;
                }
            }
        }
        // What was wanted of an earlier session does not concern this one.
        let mut disconnected = pin!(shared.disconnect.notified());
        if disconnected.as_mut().enable() {
            disconnected.set(shared.disconnect.notified());
            disconnected.as_mut().enable();
        }
        if !seat.connected() {
            return;
        }
        disconnected.await;
        shared.generation.fetch_add(1, Ordering::SeqCst);
        let session = locked(&shared.session).take();
        drop(session);
        if !seat.disconnected("the session was ended".to_owned()) {
            return;
        }
        close_if_poisoned(&shared).await;
        tokio::time::sleep(REOPEN_AFTER).await;
    }
}
