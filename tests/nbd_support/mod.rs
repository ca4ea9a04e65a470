//! A volume in memory, a running server, and a raw NBD client, for the tests of the NBD front.

#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod chunks;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nbdcast::nbd::{
    Allocation, Answer, Backend, Completion, CountersSnapshot, ExportInfo, Extent, IoError, Limits, ListenAddress,
    NbdServer, Request, Stale,
};
use tokio::sync::watch;

/// Long enough for a loaded machine, short enough to fail.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Waits for a condition instead of a time.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::yield_now();
    }
}

#[derive(Default)]
struct Gate {
    closed: bool,
    held: Vec<(Request, Completion)>,
}

/// A volume in memory that can hold its answers back, and remembers what it was asked.
pub struct MemoryVolume {
    export: ExportInfo,
    content: Mutex<Vec<u8>>,
    log: Mutex<Vec<Request>>,
    gate: Mutex<Gate>,
    gate_changed: Condvar,
    /// What every request is answered instead of being done.
    failure: Mutex<Option<IoError>>,
    /// What every block status is answered, true or not.
    told: Mutex<Option<Vec<Extent>>>,
}

impl MemoryVolume {
    pub fn new(name: &str, size_bytes: u64) -> Arc<Self> {
        Self::with_export(ExportInfo { name: name.into(), size_bytes, ..ExportInfo::default() })
    }

    pub fn with_export(export: ExportInfo) -> Arc<Self> {
        // Exports larger than what is written to are fine: only the first part has content.
        let content = vec![0; export.size_bytes.min(80 << 20) as usize];
        Arc::new(Self {
            export,
            content: Mutex::new(content),
            log: Mutex::default(),
            gate: Mutex::default(),
            gate_changed: Condvar::new(),
            failure: Mutex::default(),
            told: Mutex::default(),
        })
    }

    /// Everything submitted so far, in order.
    pub fn log(&self) -> Vec<Request> {
        self.log.lock().unwrap().clone()
    }

    pub fn fail_with(&self, failure: Option<IoError>) {
        *self.failure.lock().unwrap() = failure;
    }

    /// Makes the volume tell this of its allocation, true or not.
    pub fn tell(&self, told: Vec<Extent>) {
        *self.told.lock().unwrap() = Some(told);
    }

    /// From now on requests are kept, unanswered.
    pub fn hold(&self) {
        self.gate.lock().unwrap().closed = true;
    }

    pub fn wait_held(&self, count: usize) {
        let gate = self.gate.lock().unwrap();
        let (gate, _) = self.gate_changed.wait_timeout_while(gate, PATIENCE, |gate| gate.held.len() < count).unwrap();
        assert!(gate.held.len() >= count, "{} of {count} requests arrived", gate.held.len());
    }

    /// Answers what was kept, last first, from this thread, and keeps nothing more.
    pub fn release(&self) {
        let held = {
            let mut gate = self.gate.lock().unwrap();
            gate.closed = false;
            std::mem::take(&mut gate.held)
        };
        for (request, done) in held.into_iter().rev() {
            done.complete(self.perform(request));
        }
    }

    /// Answers the first that was kept, if there is one.
    pub fn release_one(&self) {
        let first = {
            let mut gate = self.gate.lock().unwrap();
            (!gate.held.is_empty()).then(|| gate.held.remove(0))
        };
        if let Some((request, done)) = first {
            done.complete(self.perform(request));
        }
    }

    /// As [`Self::release`], from many threads at once.
    pub fn release_from_many_threads(&self) {
        let mut held = {
            let mut gate = self.gate.lock().unwrap();
            gate.closed = false;
            std::mem::take(&mut gate.held)
        };
        std::thread::scope(|scope| {
            while !held.is_empty() {
                let share = held.split_off(held.len() - held.len().div_ceil(8));
                scope.spawn(move || {
                    for (request, done) in share {
                        done.complete(self.perform(request));
                    }
                });
            }
        });
    }

    fn perform(&self, request: Request) -> Result<Answer, IoError> {
        if let Some(failure) = *self.failure.lock().unwrap() {
            return Err(failure);
        }
        let mut content = self.content.lock().unwrap();
        match request {
            Request::Read { offset, length } => {
                let offset = offset as usize;
                Ok(Answer::Data(Bytes::copy_from_slice(&content[offset..offset + length as usize])))
            }
            Request::Write { offset, data, .. } => {
                let offset = offset as usize;
                content[offset..offset + data.len()].copy_from_slice(&data);
                Ok(Answer::Done)
            }
            Request::Flush | Request::Cache { .. } => Ok(Answer::Done),
            Request::BlockStatus { offset, length, one } => {
                if let Some(told) = self.told.lock().unwrap().clone() {
                    return Ok(Answer::Extents(told));
                }
                let end = content.len() as u64;
                let known = &content[offset.min(end) as usize..(offset + length).min(end) as usize];
                let mut extents = extents(known, one);
                let told: u64 = extents.iter().map(|extent| extent.length).sum();
                if told < length && !(one && told > 0) {
                    extents.push(Extent { length: length - told, allocation: Allocation::Hole });
                }
                Ok(Answer::Extents(extents))
            }
            Request::Trim { offset, length, .. } | Request::WriteZeroes { offset, length, .. } => {
                let end = content.len() as u64;
                let range = offset.min(end) as usize..(offset + length).min(end) as usize;
                content[range].fill(0);
                Ok(Answer::Done)
            }
        }
    }
}

/// Runs of whole blocks of zeroes and of others; zeroes count as holes.
fn extents(content: &[u8], one: bool) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for block in content.chunks(4096) {
        let allocation = if block.iter().all(|byte| *byte == 0) { Allocation::Hole } else { Allocation::Data };
        let length = block.len() as u64;
        match extents.last_mut() {
            Some(last) if last.allocation == allocation => last.length += length,
            Some(_) if one => break,
            Some(_) | None => extents.push(Extent { length, allocation }),
        }
    }
    extents
}

impl Backend for MemoryVolume {
    fn export(&self) -> ExportInfo {
        self.export.clone()
    }

    fn size_bytes(&self) -> u64 {
        self.export.size_bytes
    }

    fn submit(&self, request: Request, done: Completion, is_stale: &dyn Fn() -> bool) -> Result<(), Stale> {
        let is_change = matches!(request, Request::Write { .. } | Request::Trim { .. } | Request::WriteZeroes { .. });
        if is_change && is_stale() {
            return Err(Stale { request, done });
        }
        self.log.lock().unwrap().push(request.clone());
        let mut gate = self.gate.lock().unwrap();
        if gate.closed {
            gate.held.push((request, done));
            self.gate_changed.notify_all();
            return Ok(());
        }
        drop(gate);
        done.complete(self.perform(request));
        Ok(())
    }
}

/// A server running on a thread of its own.
pub struct Running {
    server: Arc<NbdServer>,
    shutdown: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    ended: mpsc::Receiver<()>,
}

impl Running {
    pub fn start(server: NbdServer) -> Self {
        let server = Arc::new(server);
        let (shutdown, stop) = watch::channel(false);
        let (end, ended) = mpsc::channel();
        let served = Arc::clone(&server);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(served.serve(stop)).unwrap();
            end.send(()).unwrap();
        });
        Self { server, shutdown, thread: Some(thread), ended }
    }

    pub fn on_tcp(volumes: &[&Arc<MemoryVolume>], limits: Limits) -> Self {
        let listen = "127.0.0.1:0".parse().unwrap();
        let exports = volumes.iter().map(|volume| Arc::clone(volume) as Arc<dyn Backend>).collect();
        Self::start(NbdServer::bind(&listen, exports, limits).unwrap())
    }

    pub fn server(&self) -> &NbdServer {
        &self.server
    }

    pub fn counters(&self) -> CountersSnapshot {
        self.server.counters()
    }

    pub fn connect(&self) -> TcpStream {
        match self.server.local_address() {
            ListenAddress::Tcp(address) => {
                let stream = TcpStream::connect(address).unwrap();
                stream.set_nodelay(true).unwrap();
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                stream
            }
            ListenAddress::Unix(path) => panic!("{path:?} is no TCP address"),
        }
    }

    pub fn client(&self, export: &str) -> RawClient {
        RawClient::go(self.connect(), export)
    }

    pub fn begin_shutdown(&self) {
        self.shutdown.send(true).unwrap();
    }

    pub fn wait_ended(&self) {
        self.ended.recv_timeout(PATIENCE).expect("the server never ended");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.shutdown.send(true);
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            assert!(result.is_ok() || std::thread::panicking());
        }
    }
}

pub const READ: u16 = 0;
pub const WRITE: u16 = 1;
pub const DISC: u16 = 2;
pub const FLUSH: u16 = 3;
pub const TRIM: u16 = 4;
pub const CACHE: u16 = 5;
pub const WRITE_ZEROES: u16 = 6;
pub const BLOCK_STATUS: u16 = 7;
pub const FUA: u16 = 1;
pub const DF: u16 = 1 << 2;
pub const REQ_ONE: u16 = 1 << 3;
pub const FAST_ZERO: u16 = 1 << 4;
pub const PAYLOAD_LEN: u16 = 1 << 5;
pub const EIO: u32 = 5;
pub const EINVAL: u32 = 22;
pub const ENOSPC: u32 = 28;
pub const EPERM: u32 = 1;
pub const EOVERFLOW: u32 = 75;
pub const ESHUTDOWN: u32 = 108;

/// The client side spelled out byte by byte, so that it can also be wrong.
pub struct RawClient {
    pub stream: TcpStream,
}

pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    request_with(0x2560_9513, command, flags, cookie, offset, &length.to_be_bytes())
}

/// A header of either kind, as far as they are alike, and then its length.
fn request_with(magic: u32, command: u16, flags: u16, cookie: u64, offset: u64, length: &[u8]) -> Vec<u8> {
    let mut bytes = magic.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length);
    bytes
}

pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

pub fn go(export: &str) -> Vec<u8> {
    let mut data = (export.len() as u32).to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend([0, 0]);
    option(7, &data)
}

impl RawClient {
    /// Reads the greeting and answers with fixed newstyle and no zeroes.
    pub fn greet(stream: TcpStream) -> Self {
        let mut client = Self { stream };
        assert_eq!(client.take::<18>(), *b"NBDMAGICIHAVEOPT\0\x03");
        client.send(&3_u32.to_be_bytes());
        client
    }

    pub fn go(stream: TcpStream, export: &str) -> Self {
        let mut client = Self::greet(stream);
        client.send(&go(export));
        while client.option_reply().1 != 1 {}
        client
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub fn take_data(&mut self, length: u32) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        self.stream.read_exact(&mut data).unwrap();
        data
    }

    /// Option, kind, body.
    pub fn option_reply(&mut self) -> (u32, u32, Vec<u8>) {
        let head = self.take::<20>();
        assert_eq!(head[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        let number = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let mut body = vec![0; number(16) as usize];
        self.stream.read_exact(&mut body).unwrap();
        (number(8), number(12), body)
    }

    /// Cookie and error of the next simple reply; the data of a read is still to be taken.
    pub fn reply(&mut self) -> (u64, u32) {
        let head = self.take::<16>();
        assert_eq!(head[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(head[4..8].try_into().unwrap());
        (u64::from_be_bytes(head[8..].try_into().unwrap()), error)
    }

    /// One request without data in either direction, and its error.
    pub fn ask(&mut self, command: u16, flags: u16, offset: u64, length: u32) -> u32 {
        self.send(&request(command, flags, 42, offset, length));
        let (cookie, error) = self.reply();
        assert_eq!(cookie, 42);
        error
    }

    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.send(&request(WRITE, flags, 43, offset, data.len() as u32));
        self.send(data);
        let (cookie, error) = self.reply();
        assert_eq!(cookie, 43);
        error
    }

    pub fn read(&mut self, offset: u64, length: u32) -> Result<Vec<u8>, u32> {
        match self.ask(READ, 0, offset, length) {
            0 => Ok(self.take_data(length)),
            error => Err(error),
        }
    }

    /// Fails unless the server closes without another byte.
    pub fn expect_closed(&mut self) {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => assert_eq!(rest, b""),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
        }
    }
}
