//! The replies of one connection on their way out.
//!
//! Whoever holds the *pen* (there is one) writes to the socket; everybody else only appends to the queue. A completion
//! on any thread that finds the pen free and hardly anything else outstanding writes its reply itself, without waking a
//! task. The reader takes the pen
//! while it hands a batch of requests to the backend, so that inline completions leave together. When the socket is
//! full, the pen is parked for the connection's writer task, which waits for room. So replies never interleave, and a
//! reply never waits while the pen is free. Also counts the requests that are not yet answered.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::budget::Charge;
use super::patience::Patience;
use super::reply::Reply;
use super::server::Shared;
use super::stream::WriteHalf;

/// Parts of replies in one system call: most replies have one or two.
const PARTS_PER_WRITE_MAX: usize = 128;
/// A completing thread has other work: after this many writes it leaves the rest to the writer task.
const WRITES_BY_ONE_HOLDER_MAX: usize = 4;
/// With more requests outstanding than this, replies are worth collecting: the writer task sends them, many in one
/// system call, instead of the completing thread each on its own.
const OUTSTANDING_FOR_DIRECT_WRITE_MAX: usize = 2;

/// A reply and the memory it stands for.
#[derive(Debug)]
pub(super) struct QueuedReply {
    pub(super) reply: Reply,
    /// `None` for a request that was refused or asked for nothing.
    #[expect(dead_code, reason = "held until the reply has left")]
    pub(super) charge: Option<Charge>,
}

/// The pen: replies being written, and how much of the first has left.
#[derive(Debug, Default)]
struct Pen {
    replies: VecDeque<QueuedReply>,
    front_written_bytes: usize,
    /// Replies that the stream has taken whole, but may keep unsent.
    taken: usize,
}

#[derive(Debug)]
enum PenPlace {
    /// Nobody writes; then nothing is queued either.
    Free(Pen),
    Held,
    /// The socket was full, or the holder had enough: the writer task's turn.
    Parked(Pen),
}

#[derive(Debug)]
struct Queue {
    pending: VecDeque<QueuedReply>,
    pen: PenPlace,
    /// The connection is dead; replies are thrown away.
    broken: bool,
}

/// The outgoing side of one connection.
#[derive(Debug)]
pub(super) struct Outbox {
    stream: WriteHalf,
    queue: Mutex<Queue>,
    pen_parked: Notify,
    /// Requests taken in whose replies have not left.
    outstanding: AtomicUsize,
    outstanding_fell: Notify,
    shared: Arc<Shared>,
}

/// Holds replies back until dropped, so that those of one batch leave together.
pub(super) struct Cork {
    outbox: Arc<Outbox>,
    pen: Option<Pen>,
}

/// How one write went, in bytes that the socket took.
struct Progress {
    socket_bytes: usize,
    socket_full: bool,
}

impl Outbox {
    pub(super) fn new(stream: WriteHalf, shared: Arc<Shared>) -> Self {
        Self {
            stream,
            queue: Mutex::new(Queue { pending: VecDeque::new(), pen: PenPlace::Free(Pen::default()), broken: false }),
            pen_parked: Notify::new(),
            outstanding: AtomicUsize::new(0),
            outstanding_fell: Notify::new(),
            shared,
        }
    }

    pub(super) fn stream(&self) -> &WriteHalf {
        &self.stream
    }

    /// Counts a request as taken in. Each is followed by one [`Self::send`] or [`Self::abandon`].
    pub(super) fn begin(&self) {
        self.outstanding.fetch_add(1, Ordering::AcqRel);
    }

    /// The request will have no reply.
    pub(super) fn abandon(&self) {
        self.on_left(1);
    }

    pub(super) fn outstanding(&self) -> usize {
        self.outstanding.load(Ordering::Acquire)
    }

    /// Waits until fewer than `limit` requests are outstanding.
    pub(super) async fn outstanding_below(&self, limit: usize) {
        loop {
            let mut fell = pin!(self.outstanding_fell.notified());
            fell.as_mut().enable();
            if self.outstanding() < limit {
                return;
            }
            fell.await;
        }
    }

    /// Queues a reply and, if the pen is free, writes it. Never blocks; from any thread.
    pub(super) fn send(&self, reply: QueuedReply) {
        let mut queue = self.lock();
        if queue.broken {
            drop(queue);
            self.on_left(1);
            return;
        }
        queue.pending.push_back(reply);
        if let Some(pen) = queue.take_free_pen() {
            if self.outstanding() <= OUTSTANDING_FOR_DIRECT_WRITE_MAX {
                drop(queue);
                self.write_and_put_down(pen);
            } else {
                queue.pen = PenPlace::Parked(pen);
                drop(queue);
                self.pen_parked.notify_one();
            }
        }
    }

    /// Takes the pen, if it is free, so that replies queue up until the cork is dropped.
    pub(super) fn cork(self: &Arc<Self>) -> Cork {
        Cork { pen: self.lock().take_free_pen(), outbox: Arc::clone(self) }
    }

    /// The writer task of the connection: waits for room whenever the socket was full. Never returns.
    pub(super) async fn write_parked(&self, stall_timeout: Duration) {
        loop {
            self.pen_parked.notified().await;
            let parked = self.lock().take_parked_pen();
            if let Some(mut pen) = parked
                && let Err(error) = self.write_patiently(&mut pen, stall_timeout).await
            {
                self.break_off(pen, &error);
            }
        }
    }

    /// Ends the connection and throws away what has not left.
    pub(super) fn close(&self) {
        let mut queue = self.lock();
        queue.broken = true;
        let lost = std::mem::take(&mut queue.pending);
        let pen = queue.take_free_pen().or_else(|| queue.take_parked_pen());
        drop(queue);
        self.stream.shut_down();
        self.on_left(lost.len() + pen.map_or(0, |pen| pen.unanswered()));
    }

    /// Writes until nothing is queued and the stream keeps nothing unsent, or the client was too slow.
    async fn write_patiently(&self, pen: &mut Pen, stall_timeout: Duration) -> io::Result<()> {
        let mut patience = Patience::new(stall_timeout);
        loop {
            let mut progress = self.flush(pen)?;
            if !progress.socket_full {
                if !self.refill(pen) {
                    return Ok(());
                }
                let written = self.write_once(pen)?;
                progress = Progress { socket_bytes: progress.socket_bytes + written.socket_bytes, ..written };
            }
            patience.on_taken(progress.socket_bytes);
            if progress.socket_full {
                let since = Instant::now();
                tokio::time::timeout(patience.left(), self.stream.writable()).await.map_err(|_| {
                    io::Error::new(io::ErrorKind::TimedOut, "the client takes its replies too slowly")
                })??;
                patience.on_waited(since.elapsed());
            }
        }
    }

    /// Writes what is queued as far as the socket takes it, then frees or parks the pen.
    fn write_and_put_down(&self, mut pen: Pen) {
        for _ in 0..WRITES_BY_ONE_HOLDER_MAX {
            if !self.refill(&mut pen) {
                return;
            }
            match self.write_once(&mut pen) {
                Ok(progress) if progress.socket_full => break,
                Ok(_) => {}
                Err(error) => return self.break_off(pen, &error),
            }
        }
        self.lock().pen = PenPlace::Parked(pen);
        self.pen_parked.notify_one();
    }

    /// Moves queued replies to an empty pen. False if there are none: the pen is free then, and `pen` only an empty
    /// shell.
    fn refill(&self, pen: &mut Pen) -> bool {
        if !pen.replies.is_empty() {
            return true;
        }
        let mut queue = self.lock();
        if queue.pending.is_empty() {
            queue.pen = PenPlace::Free(std::mem::take(pen));
            return false;
        }
        std::mem::swap(&mut queue.pending, &mut pen.replies);
        true
    }

    /// One system call, or a few small ones if the stream encrypts.
    fn write_once(&self, pen: &mut Pen) -> io::Result<Progress> {
        let mut parts = [IoSlice::new(&[]); PARTS_PER_WRITE_MAX];
        let count = pen.parts(&mut parts);
        let sent = self.stream.try_write_vectored(&parts[..count])?;
        pen.advance(sent.taken_bytes);
        if !(sent.socket_full && self.stream.keeps_unsent()) {
            self.on_left(std::mem::take(&mut pen.taken));
        }
        Ok(Progress { socket_bytes: sent.socket_bytes, socket_full: sent.socket_full })
    }

    fn flush(&self, pen: &mut Pen) -> io::Result<Progress> {
        let sent = self.stream.try_flush()?;
        if !sent.socket_full {
            self.on_left(std::mem::take(&mut pen.taken));
        }
        Ok(Progress { socket_bytes: sent.socket_bytes, socket_full: sent.socket_full })
    }

    fn break_off(&self, pen: Pen, error: &io::Error) {
        if let Some(suppressed) = self.shared.log.pass() {
            tracing::info!(%error, suppressed, "NBD connection lost while replying");
        }
        let lost = pen.unanswered();
        drop(pen);
        self.close();
        self.on_left(lost);
    }

    fn on_left(&self, replies: usize) {
        if replies > 0 {
            self.outstanding.fetch_sub(replies, Ordering::AcqRel);
            self.outstanding_fell.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing that can panic happens under the lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn take_free_pen(&mut self) -> Option<Pen> {
        match std::mem::replace(&mut self.pen, PenPlace::Held) {
            PenPlace::Free(pen) => Some(pen),
            other @ (PenPlace::Held | PenPlace::Parked(_)) => {
                self.pen = other;
                None
            }
        }
    }

    fn take_parked_pen(&mut self) -> Option<Pen> {
        match std::mem::replace(&mut self.pen, PenPlace::Held) {
            PenPlace::Parked(pen) => Some(pen),
            other @ (PenPlace::Held | PenPlace::Free(_)) => {
                self.pen = other;
                None
            }
        }
    }
}

impl Pen {
    /// Fills `parts` with what is to be written next; how many parts that is.
    fn parts<'a>(&'a self, parts: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        let mut skip = self.front_written_bytes;
        for chunk in self.replies.iter().flat_map(|queued| queued.reply.chunks()) {
            for part in [chunk.head.as_bytes(), &chunk.data] {
                let rest = &part[skip.min(part.len())..];
                skip -= part.len() - rest.len();
                if rest.is_empty() {
                    continue;
                }
                if count == parts.len() {
                    return count;
                }
                parts[count] = IoSlice::new(rest);
                count += 1;
            }
        }
        count
    }

    /// Forgets what has been written.
    fn advance(&mut self, written_bytes: usize) {
        self.front_written_bytes += written_bytes;
        while let Some(front) = self.replies.front() {
            let front_bytes = front.reply.len_bytes();
            if self.front_written_bytes < front_bytes {
                break;
            }
            self.front_written_bytes -= front_bytes;
            self.replies.pop_front();
            self.taken += 1;
        }
    }

    /// Requests whose replies have not left.
    fn unanswered(&self) -> usize {
        self.replies.len() + self.taken
    }
}

impl Drop for Cork {
    fn drop(&mut self) {
        if let Some(pen) = self.pen.take() {
            self.outbox.write_and_put_down(pen);
        }
    }
}
