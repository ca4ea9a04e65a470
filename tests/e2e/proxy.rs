//! A TCP proxy between the engine and one agent: a network that a story can cut, slow down, count bytes on, and have flip
//! bits of what carries [`MARK`]. Else it looks at none of the bytes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::scratch;

/// Bytes that the proxy knows again in what clients wrote.
pub const MARK: &[u8; 16] = b"a-bit-flips-here";

/// A running proxy. Dropping it breaks its connections.
pub struct Proxy {
    pub port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    target: u16,
    over: AtomicBool,
    cut: AtomicBool,
    /// Towards the agent; 0 is as fast as it goes.
    bytes_per_second: AtomicU64,
    forwarded: AtomicU64,
    /// Bits to flip on the way to the agent, and on the way to the engine.
    flips: [AtomicU64; 2],
    open: Mutex<Vec<TcpStream>>,
}

impl Proxy {
    /// In front of what listens on the loopback port `target`.
    pub fn start(target: u16) -> Self {
        let port = scratch::free_port();
        let listener = TcpListener::bind(("127.0.0.1", port)).expect("the proxy cannot listen");
        let shared = Arc::new(Shared {
            target,
            over: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            bytes_per_second: AtomicU64::new(0),
            forwarded: AtomicU64::new(0),
            flips: Default::default(),
            open: Mutex::new(Vec::new()),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || accept(&listener, &accepting));
        Self { port, shared }
    }

    /// Breaks all connections, and every new one at once.
    pub fn cut(&self) {
        self.shared.cut.store(true, Ordering::SeqCst);
        self.shared.break_all();
    }

    /// Lets connections through again.
    pub fn mend(&self) {
        self.shared.cut.store(false, Ordering::SeqCst);
    }

    /// Breaks the connections that there are; new ones are let through.
    pub fn interrupt(&self) {
        self.shared.break_all();
    }

    /// At most so much per second goes to the agent from now on; 0 for no limit.
    pub fn slow_down(&self, bytes_per_second: u64) {
        self.shared.bytes_per_second.store(bytes_per_second, Ordering::SeqCst);
    }

    /// Flips a bit behind the next mark that goes to the agent.
    pub fn flip_to_agent(&self) {
        self.shared.flips[0].store(1, Ordering::SeqCst);
    }

    /// Flips a bit behind the next mark that goes to the engine.
    pub fn flip_to_engine(&self) {
        self.shared.flips[1].store(1, Ordering::SeqCst);
    }

    /// How many of these bits are still to flip.
    pub fn flips_left(&self) -> u64 {
        self.shared.flips.iter().map(|flips| flips.load(Ordering::SeqCst)).sum()
    }

    /// Bytes that went to the agent so far.
    pub fn forwarded(&self) -> u64 {
        self.shared.forwarded.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        self.shared.break_all();
        // Wakes the thread that accepts, which then ends.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
    }
}

impl Shared {
    fn open(&self) -> MutexGuard<'_, Vec<TcpStream>> {
        self.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn break_all(&self) {
        for stream in self.open().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((engine, _)) = listener.accept() {
        if shared.over.load(Ordering::SeqCst) {
            return;
        }
        if shared.cut.load(Ordering::SeqCst) {
            continue;
        }
        let Ok(agent) = TcpStream::connect(("127.0.0.1", shared.target)) else { continue };
        if let Err(error) = join(engine, agent, shared) {
            println!("proxy: a connection was not joined: {error}");
        }
    }
}

/// Two threads, one for each direction; when one ends, so does the other.
fn join(engine: TcpStream, agent: TcpStream, shared: &Arc<Shared>) -> std::io::Result<()> {
    engine.set_nodelay(true)?;
    agent.set_nodelay(true)?;
    let (to_agent, to_engine) = (agent.try_clone()?, engine.try_clone()?);
    let mut open = shared.open();
    open.push(engine.try_clone()?);
    open.push(agent.try_clone()?);
    drop(open);
    // A cut that came in between did not see these two.
    if shared.cut.load(Ordering::SeqCst) || shared.over.load(Ordering::SeqCst) {
        shared.break_all();
    }
    let (there, back) = (Arc::clone(shared), Arc::clone(shared));
    std::thread::spawn(move || relay(engine, to_agent, &there, true));
    std::thread::spawn(move || relay(agent, to_engine, &back, false));
    Ok(())
}

/// Flips a bit of `bytes` if one is to flip and they carry a mark.
fn flip(bytes: &mut [u8], left: &AtomicU64) {
    if left.load(Ordering::SeqCst) > 0
        && let Some(at) = bytes.windows(MARK.len()).position(|window| window == MARK)
    {
        bytes[at + MARK.len() - 1] ^= 0x04;
        left.fetch_sub(1, Ordering::SeqCst);
    }
}

fn relay(mut from: TcpStream, mut to: TcpStream, shared: &Shared, is_to_agent: bool) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count) = from.read(&mut buffer)
        && count > 0
    {
        flip(&mut buffer[..count], &shared.flips[usize::from(!is_to_agent)]);
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
        if !is_to_agent {
            continue;
        }
        shared.forwarded.fetch_add(count as u64, Ordering::SeqCst);
        let rate = shared.bytes_per_second.load(Ordering::SeqCst);
        if rate > 0 {
            // This is the slow network itself, not a wait for a result.
            std::thread::park_timeout(Duration::from_secs_f64(count as f64 / rate as f64));
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
