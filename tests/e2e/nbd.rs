//! A small NBD client of our own: fixed newstyle with GO, simple replies, many requests in flight. It shares no code with
//! the server, checks what it is sent, and reports an NBD error as a number, never by closing the connection.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const OPT_STARTTLS: u32 = 5;
const OPT_GO: u32 = 7;
const REP_ACK: u32 = 1;
const REP_INFO: u32 = 3;
/// No answer for this long is a failed test, not a slow server.
const PATIENCE: Duration = Duration::from_secs(60);

pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_CACHE: u16 = 5;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const FLAG_FUA: u16 = 1;

/// Transmission flags of the export.
pub const HAS_FLUSH: u16 = 1 << 2;
pub const HAS_FUA: u16 = 1 << 3;
pub const HAS_TRIM: u16 = 1 << 5;
pub const HAS_WRITE_ZEROES: u16 = 1 << 6;
pub const HAS_MULTI_CONN: u16 = 1 << 8;

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Endpoint {
    Tcp(u16),
    Unix(PathBuf),
}

impl Endpoint {
    /// The NBD URI of `export` there.
    pub fn uri(&self, export: &str) -> String {
        match self {
            Self::Tcp(port) => format!("nbd://127.0.0.1:{port}/{export}"),
            Self::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
        }
    }
}

/// One command; `length` counts for reads, trims and zeroes, writes take it from `payload`.
#[derive(Debug, Default)]
pub struct Request {
    pub command: u16,
    pub flags: u16,
    pub offset: u64,
    pub length: u32,
    pub payload: Vec<u8>,
}

impl Request {
    /// As it is sent.
    pub fn message(&self, cookie: u64) -> Vec<u8> {
        let length = match self.command {
            CMD_WRITE => self.payload.len() as u32,
            _ => self.length,
        };
        let mut message = Vec::with_capacity(28 + self.payload.len());
        message.extend(REQUEST_MAGIC.to_be_bytes());
        message.extend(self.flags.to_be_bytes());
        message.extend(self.command.to_be_bytes());
        message.extend(cookie.to_be_bytes());
        message.extend(self.offset.to_be_bytes());
        message.extend(length.to_be_bytes());
        message.extend(&self.payload);
        message
    }
}

#[derive(Debug)]
pub struct Reply {
    pub cookie: u64,
    /// 0, or the NBD error number.
    pub error: u32,
    pub data: Vec<u8>,
}

/// The lengths of the reads in flight, by cookie, and nothing for other commands.
type Expected = Arc<Mutex<HashMap<u64, u32>>>;

/// The half that sends requests.
pub struct Sender {
    stream: Stream,
    expected: Expected,
}

/// The half that receives replies, in whatever order they come.
pub struct Receiver {
    stream: Stream,
    expected: Expected,
}

/// A connection used for one request at a time.
pub struct Client {
    sender: Sender,
    receiver: Receiver,
    next_cookie: u64,
    pub size: u64,
    pub flags: u16,
}

impl Client {
    pub fn connect(endpoint: &Endpoint, export: &str) -> io::Result<Self> {
        let mut stream = Stream::connect(endpoint)?;
        let (size, flags) = negotiate(&mut stream, export)?;
        let expected = Expected::default();
        Ok(Self {
            sender: Sender { stream: stream.try_clone()?, expected: Arc::clone(&expected) },
            receiver: Receiver { stream, expected },
            next_cookie: 0,
            size,
            flags,
        })
    }

    /// For many requests in flight: one thread sends, another receives.
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }

    pub fn read(&mut self, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        self.call(Request { command: CMD_READ, offset, length, ..Request::default() })
    }

    pub fn write(&mut self, offset: u64, payload: &[u8], flags: u16) -> io::Result<()> {
        let request = Request { command: CMD_WRITE, flags, offset, payload: payload.to_vec(), ..Request::default() };
        self.call(request).map(drop)
    }

    pub fn flush(&mut self) -> io::Result<()> {
        let request = Request { command: CMD_FLUSH, ..Request::default() };
        self.call(request).map(drop)
    }

    /// TRIM, WRITE_ZEROES or CACHE of a range.
    pub fn clear(&mut self, command: u16, offset: u64, length: u32) -> io::Result<()> {
        let request = Request { command, offset, length, ..Request::default() };
        self.call(request).map(drop)
    }

    /// The whole export, read in pieces of 1 MiB.
    pub fn read_all(&mut self) -> io::Result<Vec<u8>> {
        let mut content = Vec::with_capacity(self.size as usize);
        while (content.len() as u64) < self.size {
            let offset = content.len() as u64;
            let length = (self.size - offset).min(1 << 20) as u32;
            content.extend(self.read(offset, length)?);
        }
        Ok(content)
    }

    /// Ends the session as a well-behaved client does.
    pub fn disconnect(mut self) {
        let _ = self.sender.disconnect();
    }

    fn call(&mut self, request: Request) -> io::Result<Vec<u8>> {
        self.next_cookie += 1;
        self.sender.send(self.next_cookie, &request)?;
        let reply = self.receiver.receive()?;
        if reply.cookie != self.next_cookie {
            return Err(broken("a reply to another request"));
        }
        if reply.error != 0 {
            return Err(io::Error::from_raw_os_error(reply.error.cast_signed()));
        }
        Ok(reply.data)
    }
}

impl Sender {
    pub fn send(&mut self, cookie: u64, request: &Request) -> io::Result<()> {
        let answer = if request.command == CMD_READ { request.length } else { 0 };
        self.expected.lock().expect("the other half panicked").insert(cookie, answer);
        self.stream.write_all(&request.message(cookie))
    }

    /// Says goodbye; the server finishes what is in flight and closes.
    pub fn disconnect(&mut self) -> io::Result<()> {
        let goodbye = Request { command: CMD_DISC, ..Request::default() };
        self.send(u64::MAX, &goodbye)
    }

    /// Breaks the connection for both halves.
    pub fn shut_down(&self) {
        self.stream.shut_down();
    }
}

impl Receiver {
    pub fn receive(&mut self) -> io::Result<Reply> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        let magic = u32::from_be_bytes(slice(&header[0..4]));
        let error = u32::from_be_bytes(slice(&header[4..8]));
        let cookie = u64::from_be_bytes(slice(&header[8..16]));
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(broken(&format!("reply magic {magic:#x}")));
        }
        let expected = self.expected.lock().expect("the other half panicked").remove(&cookie);
        let Some(length) = expected else {
            return Err(broken(&format!("a reply with unknown cookie {cookie}")));
        };
        let mut data = vec![0; if error == 0 { length as usize } else { 0 }];
        self.stream.read_exact(&mut data)?;
        Ok(Reply { cookie, error, data })
    }
}

/// Greeting and GO; returns size in bytes and transmission flags.
fn negotiate(stream: &mut Stream, export: &str) -> io::Result<(u64, u16)> {
    greet(stream)?;
    go(stream, export)
}

/// Greeting and the answer to it.
pub fn greet(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting)?;
    if &greeting[0..8] != b"NBDMAGIC" || &greeting[8..16] != b"IHAVEOPT" {
        return Err(broken("no NBD greeting"));
    }
    let offered = u16::from_be_bytes(slice(&greeting[16..18]));
    if offered & 1 == 0 {
        return Err(broken("the server does not speak fixed newstyle"));
    }
    stream.write_all(&3_u32.to_be_bytes()) // fixed newstyle, no zeroes
}

/// STARTTLS, up to the moment when the TLS handshake begins.
pub fn start_tls(stream: &mut (impl Read + Write)) -> io::Result<()> {
    let mut option = OPTION_MAGIC.to_be_bytes().to_vec();
    option.extend(OPT_STARTTLS.to_be_bytes());
    option.extend(0_u32.to_be_bytes());
    stream.write_all(&option)?;
    let mut header = [0; 20];
    stream.read_exact(&mut header)?;
    if header[12..20] == [0, 0, 0, REP_ACK as u8, 0, 0, 0, 0] {
        return Ok(());
    }
    Err(broken("STARTTLS refused"))
}

/// GO; returns size in bytes and transmission flags.
pub fn go(stream: &mut (impl Read + Write), export: &str) -> io::Result<(u64, u16)> {
    let mut go = Vec::new();
    go.extend(OPTION_MAGIC.to_be_bytes());
    go.extend(OPT_GO.to_be_bytes());
    go.extend((export.len() as u32 + 6).to_be_bytes());
    go.extend((export.len() as u32).to_be_bytes());
    go.extend(export.as_bytes());
    go.extend(0_u16.to_be_bytes()); // no particular information wanted
    stream.write_all(&go)?;
    let mut found = None;
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header)?;
        if u64::from_be_bytes(slice(&header[0..8])) != OPTION_REPLY_MAGIC {
            return Err(broken("option reply magic"));
        }
        let kind = u32::from_be_bytes(slice(&header[12..16]));
        let mut body = vec![0; u32::from_be_bytes(slice(&header[16..20])) as usize];
        stream.read_exact(&mut body)?;
        match kind {
            REP_ACK => return found.ok_or_else(|| broken("GO without the export's information")),
            REP_INFO if body.len() == 12 && body[0..2] == [0, 0] => {
                let size = u64::from_be_bytes(slice(&body[2..10]));
                found = Some((size, u16::from_be_bytes(slice(&body[10..12]))));
            }
            REP_INFO => {}
            refusal => {
                let said = String::from_utf8_lossy(&body).into_owned();
                return Err(broken(&format!("GO refused: {refusal:#x} {said}")));
            }
        }
    }
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

fn slice<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("a slice of the length that was asked for")
}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        Ok(match endpoint {
            Endpoint::Tcp(port) => {
                let stream = TcpStream::connect(("127.0.0.1", *port))?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Self::Tcp(stream)
            }
            Endpoint::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Self::Unix(stream)
            }
        })
    }

    fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }

    fn shut_down(&self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(buffer),
            Self::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Client {{ size: {}, flags: {:#x} }}", self.size, self.flags)
    }
}
