//! Changes that a client has sent twice, as kernels do when a server is silent for too long: the old copy, which lies in
//! the engine's socket while the engine stands still, must never land after what the client wrote since. Not even if the
//! client had sent so much that the end of its connection is still on its own side when the engine goes on.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::cluster::Cluster;
use crate::nbd::{self, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES, Endpoint, FLAG_FUA, Request};
use crate::plan::{Plan, VOLUME};
use crate::scratch;

const LIMIT: Duration = Duration::from_secs(30);
const BLOCK: usize = 4096;
/// Connections that the client gives up in one round.
const GIVEN_UP: usize = 3;
const ROUNDS: u8 = 6;
/// Where connections that are given up write for the first time, each at a place of its own that nobody else writes to.
const OWN_PLACES: u64 = 8 << 20;
const OWN_PLACE_BYTES: usize = 200 << 10;
/// Where they write for as long as their sockets take it.
const REST: u64 = 15 << 20;
/// What the engine says of a connection whose change it did not take in.
const DROPPED: &str = "hung up before its change could be taken in";

/// A connection of the client that it will give up: requests are only ever sent.
enum Old {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

impl Old {
    fn connect(cluster: &Cluster, tls: Option<&Arc<ClientConfig>>) -> Self {
        let Endpoint::Tcp(port) = cluster.endpoint else { panic!("the engine listens on TCP") };
        let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("cannot connect");
        socket.set_nodelay(true).expect("cannot tune a socket");
        nbd::greet(&mut socket).expect("a greeting");
        let mut old = match tls {
            None => Self::Plain(socket),
            Some(config) => {
                nbd::start_tls(&mut socket).expect("TLS is offered");
                let name = ServerName::try_from("localhost").expect("a name");
                let session = ClientConnection::new(Arc::clone(config), name).expect("a TLS session");
                Self::Tls(Box::new(StreamOwned::new(session, socket)))
            }
        };
        nbd::go(&mut old, VOLUME).expect("the export");
        old
    }

    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => &stream.sock,
        }
    }

    /// Gives it up as a client does that asks elsewhere, when all of it has arrived.
    fn hang_up(mut self) {
        if let Self::Tls(stream) = &mut self {
            stream.conn.send_close_notify();
            stream.flush().expect("room in the socket");
        }
        self.socket().shutdown(Shutdown::Both).expect("the engine has not closed it");
    }

    /// The same, when the sockets are so full that the end cannot arrive.
    fn fill_and_hang_up(mut self) {
        self.socket().set_nonblocking(true).expect("a socket");
        let payload = vec![0xee; 1 << 20];
        let rest = Request { command: CMD_WRITE, offset: REST, payload, ..Request::default() }.message(99);
        while self.write_all(&rest).is_ok() {}
        self.socket().shutdown(Shutdown::Both).expect("the engine has not closed it");
    }
}

impl Read for Old {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Old {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(stream) => stream.flush(),
            Self::Tls(stream) => stream.flush(),
        }
    }
}

fn client_config(dir: &Path) -> Arc<ClientConfig> {
    let certificate = |file: &str| CertificateDer::from_pem_file(dir.join(file)).expect("a certificate");
    let mut roots = RootCertStore::empty();
    roots.add(certificate("ca-cert.pem")).expect("an authority");
    let key = PrivateKeyDer::from_pem_file(dir.join("client-key.pem")).expect("a key");
    let config = ClientConfig::builder().with_root_certificates(roots);
    Arc::new(config.with_client_auth_cert(vec![certificate("client-cert.pem")], key).expect("a key that fits"))
}

/// The changes that the client sends before the engine stands still, each of another part of the volume: a block that is
/// written, one that is trimmed, one that is zeroed, and a write that takes more than one record.
fn changes(filler: u8) -> [Request; 4] {
    let write = |offset: u64, length: usize| Request {
        command: CMD_WRITE,
        offset,
        payload: vec![filler; length],
        ..Request::default()
    };
    let clear = |command, offset| Request { command, offset, length: BLOCK as u32, ..Request::default() };
    [
        write(0, BLOCK),
        clear(CMD_TRIM, 1 << 20),
        clear(CMD_WRITE_ZEROES, 2 << 20),
        // No more than the two sockets hold: a frozen engine reads nothing.
        write(4 << 20, 40 << 10),
    ]
}

/// A change of a place that is the connection's own.
fn own_change(index: usize) -> Request {
    let offset = OWN_PLACES + (index % 30 * OWN_PLACE_BYTES) as u64;
    Request { command: CMD_WRITE, offset, payload: vec![0xdd; OWN_PLACE_BYTES], ..Request::default() }
}

/// Rounds of: the engine stands still with changes in its sockets; the client hangs up, sends them again elsewhere and
/// overwrites them. In every second round the end of its connections does not reach the engine's machine meanwhile.
fn rounds(cluster: &Cluster, tls: Option<&Arc<ClientConfig>>) {
    let mut dropped = 0;
    for round in 1..=ROUNDS {
        let is_end_hidden = round % 2 == 0;
        let mut client = cluster.connect();
        let old: Vec<Old> = (0..GIVEN_UP).map(|_| Old::connect(cluster, tls)).collect();
        cluster.engine().freeze();
        let since = Instant::now();
        for (index, mut old) in old.into_iter().enumerate() {
            if is_end_hidden {
                let change = own_change(usize::from(round) * GIVEN_UP + index);
                old.write_all(&change.message(100)).expect("room in the socket");
            }
            for (cookie, change) in (1..).zip(changes(round)) {
                old.write_all(&change.message(cookie)).expect("room in the socket");
            }
            old.flush().expect("room in the socket");
            if is_end_hidden {
                old.fill_and_hang_up();
            } else {
                old.hang_up();
            }
        }
        // No client waits for less before it asks elsewhere.
        scratch::wait_until("a second has passed", LIMIT, || since.elapsed() >= Duration::from_secs(1));
        cluster.engine().thaw();
        let newer = vec![round | 0x80; 40 << 10];
        for change in changes(round) {
            let (command, offset) = (change.command, change.offset);
            match command {
                CMD_WRITE => client.write(offset, &change.payload, 0).expect("a write that is sent again"),
                other => client.clear(other, offset, change.length).expect("what is sent again"),
            }
            client.write(offset, &newer, FLAG_FUA).expect("a newer write");
        }
        dropped += GIVEN_UP;
        let lines = || cluster.engine().printed().lines().filter(|line| line.contains(DROPPED)).count();
        scratch::wait_until("the engine is done with the old connections", LIMIT, || lines() == dropped);
        for change in changes(round) {
            let found = client.read(change.offset, newer.len() as u32).expect("a read");
            assert!(found == newer, "round {round}: an old change has landed at {}", change.offset);
        }
        let untouched = (REST - OWN_PLACES) as u32 + (1 << 20);
        let found = client.read(OWN_PLACES, untouched).expect("a read");
        assert!(found.iter().all(|byte| *byte == 0), "round {round}: a change of a client that had hung up has landed");
        client.disconnect();
    }
}

#[test]
fn an_old_copy_of_a_change_never_lands_after_a_newer_one() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(Plan::default());
    rounds(&cluster, None);
    cluster.stop();
    cluster.identical_images(&cluster.names());
}

#[test]
fn an_old_copy_of_a_change_never_lands_after_a_newer_one_over_tls() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::planned(Plan { tls: true, ..Plan::default() });
    cluster.make_certificates(&["--client", "guest"]);
    let tls = format!("[nbd.tls]\nmode = \"on\"\ncertificates = \"{}/engine\"\n\n[admin]", crate::plan::CERTIFICATES);
    let text = cluster.config_text().replacen("[admin]", &tls, 1);
    std::fs::write(cluster.config(), text).expect("cannot write the config file");
    cluster.start_agents();
    cluster.create();
    cluster.start_engine();
    rounds(&cluster, Some(&client_config(&cluster.certificates("client-guest"))));
    cluster.stop();
    cluster.identical_images(&cluster.names());
}
