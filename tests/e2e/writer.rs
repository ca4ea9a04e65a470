//! The writer of the crash stories: many requests in flight over one or more connections, all of them in the ledger.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ledger::{BLOCK, Ledger};
use crate::nbd::{
    CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Client, Endpoint, FLAG_FUA, Receiver, Request, Sender,
};
use crate::seed::Rng;

/// What the writer sends.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub connections: u64,
    /// Requests in flight per connection.
    pub depth: usize,
    /// The longest write in blocks.
    pub blocks_max: u64,
    /// Percent of requests that are not writes: flushes, trims, zeroes in equal parts.
    pub others_percent: u64,
}

impl Default for Load {
    fn default() -> Self {
        Self { connections: 2, depth: 32, blocks_max: 8, others_percent: 15 }
    }
}

/// Shared by the threads of one writer.
struct Board {
    ledger: Arc<Mutex<Ledger>>,
    answered: AtomicU64,
    answered_bytes: AtomicU64,
    stop: AtomicBool,
    /// The first error reply or broken connection.
    trouble: Mutex<Option<String>>,
    turn: Mutex<()>,
    moved: Condvar,
}

/// A running writer.
pub struct Writer {
    board: Arc<Board>,
    threads: Vec<JoinHandle<()>>,
}

/// A request in flight: the blocks it changes, and how many bytes it carried.
struct Open {
    first: u64,
    count: u64,
    payload_bytes: u64,
}

/// What is in flight on one connection, by number, with the lock that bounds it.
#[derive(Default)]
struct Flight {
    open: Mutex<HashMap<u64, Open>>,
    landed: Condvar,
    over: AtomicBool,
}

impl Writer {
    pub fn start(endpoint: &Endpoint, export: &str, ledger: &Arc<Mutex<Ledger>>, mut rng: Rng, load: Load) -> Self {
        let board = Arc::new(Board {
            ledger: Arc::clone(ledger),
            answered: AtomicU64::new(0),
            answered_bytes: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            trouble: Mutex::new(None),
            turn: Mutex::new(()),
            moved: Condvar::new(),
        });
        let share = lock(ledger).blocks() / load.connections;
        let mut threads = Vec::new();
        for connection in 0..load.connections {
            let client = Client::connect(endpoint, export).expect("the writer cannot connect");
            let (sender, receiver) = client.split();
            let flight = Arc::new(Flight::default());
            let region = Region { first: connection * share, blocks: share };
            let (rng, for_sender) = (rng.fork(), (Arc::clone(&board), Arc::clone(&flight)));
            threads.push(std::thread::spawn(move || {
                send_all(sender, &for_sender.0, &for_sender.1, region, rng, load);
            }));
            let board = Arc::clone(&board);
            threads.push(std::thread::spawn(move || receive_all(receiver, &board, &flight)));
        }
        Self { board, threads }
    }

    /// Requests answered so far.
    pub fn answered(&self) -> u64 {
        self.board.answered.load(Ordering::Relaxed)
    }

    /// Payload bytes of the writes answered so far.
    pub fn answered_bytes(&self) -> u64 {
        self.board.answered_bytes.load(Ordering::Relaxed)
    }

    /// Waits until `count` more requests have been answered.
    pub fn wait_answers(&self, count: u64, limit: Duration) {
        let goal = self.answered() + count;
        self.wait(&format!("{count} more answers"), limit, || self.answered() >= goal);
    }

    /// Waits until writes of `bytes` in all have been answered since the start.
    pub fn wait_bytes(&self, bytes: u64, limit: Duration) {
        self.wait(&format!("{bytes} bytes answered"), limit, || self.answered_bytes() >= bytes);
    }

    /// Waits until nothing has been answered for `quiet`.
    pub fn wait_for_silence(&self, quiet: Duration, limit: Duration) {
        let start = Instant::now();
        let (mut seen, mut since) = (self.answered(), Instant::now());
        while since.elapsed() < quiet {
            assert!(start.elapsed() < limit, "the writer was never held back");
            std::thread::park_timeout(Duration::from_millis(20));
            if self.answered() != seen {
                (seen, since) = (self.answered(), Instant::now());
            }
        }
    }

    fn wait(&self, what: &str, limit: Duration, reached: impl Fn() -> bool) {
        let start = Instant::now();
        let mut turn = lock(&self.board.turn);
        while !reached() {
            if let Some(trouble) = lock(&self.board.trouble).as_ref() {
                panic!("the client was troubled while the test waited for {what}: {trouble}");
            }
            let waited = start.elapsed();
            assert!(waited < limit, "no {what} within {limit:?}, only {}", self.answered());
            let slice = Duration::from_millis(20);
            turn = match self.board.moved.wait_timeout(turn, slice) {
                Ok((turn, _)) => turn,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Stops sending, waits for what is in flight, and insists that the client saw no trouble at all. Returns the
    /// number of answers.
    pub fn finish(self) -> u64 {
        self.board.stop.store(true, Ordering::Relaxed);
        let trouble = self.end();
        assert!(trouble.0.is_none(), "the client saw: {}", trouble.0.unwrap_or_default());
        trouble.1
    }

    /// Waits for the end that a crash of the server brought. Returns the number of answers.
    pub fn finish_after_crash(self) -> u64 {
        self.end().1
    }

    fn end(mut self) -> (Option<String>, u64) {
        for thread in self.threads.drain(..) {
            thread.join().expect("a thread of the writer panicked");
        }
        let trouble = lock(&self.board.trouble).take();
        (trouble, self.answered())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.board.stop.store(true, Ordering::Relaxed);
    }
}

/// The blocks that one connection alone writes.
#[derive(Clone, Copy)]
struct Region {
    first: u64,
    blocks: u64,
}

impl Region {
    /// A random run of at most `blocks_max` blocks. Half of them fall on the same few blocks, so that there are always
    /// several writes to one block in flight.
    fn pick(self, rng: &mut Rng, blocks_max: u64) -> (u64, u64) {
        let count = if rng.chance(60) { 1 } else { rng.between(1, blocks_max) };
        let reach = if rng.chance(50) { 64 } else { self.blocks };
        let room = reach.max(count + 1).min(self.blocks) - count;
        (self.first + rng.below(room + 1), count)
    }
}

fn send_all(mut sender: Sender, board: &Board, flight: &Flight, region: Region, mut rng: Rng, load: Load) {
    while !board.stop.load(Ordering::Relaxed) && wait_for_room(flight, load.depth) {
        let (number, request) = next_request(board, flight, region, &mut rng, load);
        if let Err(error) = sender.send(number, &request) {
            trouble(board, format!("sending failed: {error}"));
            break;
        }
    }
    // The receiver ends with the last answer, or with the connection.
    while wait_for_room(flight, 1) && !lock(&flight.open).is_empty() {}
    let _ = sender.disconnect();
    sender.shut_down();
}

/// Waits until fewer than `depth` requests are in flight; false if the connection is over.
fn wait_for_room(flight: &Flight, depth: usize) -> bool {
    let mut open = lock(&flight.open);
    while open.len() >= depth && !flight.over.load(Ordering::Relaxed) {
        open = match flight.landed.wait_timeout(open, Duration::from_millis(20)) {
            Ok((open, _)) => open,
            Err(poisoned) => poisoned.into_inner().0,
        };
    }
    !flight.over.load(Ordering::Relaxed)
}

fn next_request(board: &Board, flight: &Flight, region: Region, rng: &mut Rng, load: Load) -> (u64, Request) {
    let (first, count) = region.pick(rng, load.blocks_max);
    let command = match (rng.chance(load.others_percent), rng.below(3)) {
        (false, _) => CMD_WRITE,
        (true, 0) => CMD_FLUSH,
        (true, 1) => CMD_TRIM,
        (true, _) => CMD_WRITE_ZEROES,
    };
    let mut ledger = lock(&board.ledger);
    let number =
        if command == CMD_FLUSH { ledger.issue_nothing() } else { ledger.issue(first, count, command != CMD_WRITE) };
    let mut request = Request { command, ..Request::default() };
    if command != CMD_FLUSH {
        request.offset = first * BLOCK as u64;
        request.length = count as u32 * BLOCK as u32;
        request.flags = if rng.chance(15) { FLAG_FUA } else { 0 };
    }
    if command == CMD_WRITE {
        request.payload = ledger.payload(number, first, count);
    }
    let open = Open {
        first,
        count: if command == CMD_FLUSH { 0 } else { count },
        payload_bytes: request.payload.len() as u64,
    };
    lock(&flight.open).insert(number, open);
    (number, request)
}

fn receive_all(mut receiver: Receiver, board: &Board, flight: &Flight) {
    loop {
        let reply = match receiver.receive() {
            Ok(reply) => reply,
            Err(error) => {
                let open = lock(&flight.open).len();
                let asked_to_end = board.stop.load(Ordering::Relaxed) && open == 0;
                if !asked_to_end {
                    trouble(board, format!("{open} requests without an answer: {error}"));
                }
                break;
            }
        };
        let Some(open) = lock(&flight.open).remove(&reply.cookie) else {
            trouble(board, format!("an answer to no request: {}", reply.cookie));
            break;
        };
        if reply.error == 0 {
            lock(&board.ledger).answer(reply.cookie, open.first, open.count);
            board.answered_bytes.fetch_add(open.payload_bytes, Ordering::Relaxed);
            board.answered.fetch_add(1, Ordering::Relaxed);
        } else {
            let error = io::Error::from_raw_os_error(reply.error.cast_signed());
            trouble(board, format!("request {} failed: {error}", reply.cookie));
        }
        flight.landed.notify_all();
        board.moved.notify_all();
    }
    flight.over.store(true, Ordering::Relaxed);
    flight.landed.notify_all();
    board.moved.notify_all();
}

fn trouble(board: &Board, text: String) {
    lock(&board.trouble).get_or_insert(text);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
