//! A TCP proxy between the engine and one agent: a network that a story can cut, slow down, and count bytes on. It looks
//! at none of the bytes.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crate::scratch;

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
    let counting = Arc::clone(shared);
    std::thread::spawn(move || relay(engine, to_agent, Some(&counting)));
    std::thread::spawn(move || relay(agent, to_engine, None));
    Ok(())
}

fn relay(mut from: TcpStream, mut to: TcpStream, counted: Option<&Shared>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count) = from.read(&mut buffer)
        && count > 0
        && to.write_all(&buffer[..count]).is_ok()
    {
        let Some(shared) = counted else { continue };
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
