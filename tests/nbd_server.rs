//! The server around the protocol: addresses, an independent client, many requests at once, and the end.

mod nbd_support;

use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nbd_support::*;
use nbdcast::nbd::{Backend, BindError, Limits, ListenAddress, NbdServer, PublishError};

/// A directory of its own for one test, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("nbdcast-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> (PathBuf, ListenAddress) {
        let path = self.0.join("nbd.sock");
        (path.clone(), ListenAddress::Unix(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn bind(address: &ListenAddress) -> Result<NbdServer, BindError> {
    let volume: Arc<dyn Backend> = MemoryVolume::new("demo", 1 << 20);
    NbdServer::bind(address, vec![volume], Limits::default())
}

/// Writes, reads back and flushes with the client of the `nbd` crate.
fn use_independent_client(mut stream: impl Read + Write) {
    let export = nbd::client::handshake(&mut stream, b"demo").unwrap();
    assert_eq!(export.size, 1 << 20);
    assert!(export.send_flush && export.send_trim && !export.readonly);
    let mut client = nbd::client::NbdClient::new(stream, &export);
    let data: Vec<u8> = (0..200_000_u32).map(|i| (i % 251) as u8).collect();
    client.seek(SeekFrom::Start(1000)).unwrap();
    client.write_all(&data).unwrap();
    client.flush().unwrap();
    client.seek(SeekFrom::Start(1000)).unwrap();
    let mut found = vec![0; data.len()];
    client.read_exact(&mut found).unwrap();
    assert!(found == data);
}

#[test]
fn an_independent_client_works_over_tcp() {
    let server = Running::on_tcp(&[&MemoryVolume::new("demo", 1 << 20)], Limits::default());
    assert_eq!(server.server().uri("demo"), format!("nbd://{}/demo", server.server().local_address()));
    use_independent_client(server.connect());
}

#[test]
fn an_independent_client_works_over_a_unix_socket_whose_file_is_removed_at_the_end() {
    let directory = Directory::new("unix-client");
    let (path, address) = directory.socket();
    let server = Running::start(bind(&address).unwrap());
    use_independent_client(UnixStream::connect(&path).unwrap());
    server.begin_shutdown();
    server.wait_ended();
    assert!(!path.exists());
}

#[test]
fn a_dead_socket_file_is_replaced() {
    let directory = Directory::new("dead-socket");
    let (path, address) = directory.socket();
    drop(UnixListener::bind(&path).unwrap());
    let server = bind(&address).unwrap();
    assert!(path.exists());
    drop(server);
    assert!(!path.exists());
}

#[test]
fn a_living_socket_and_a_file_that_is_no_socket_are_left_alone() {
    let directory = Directory::new("busy-socket");
    let (path, address) = directory.socket();
    let living = bind(&address).unwrap();
    let error = bind(&address).err().unwrap();
    assert!(matches!(&error, BindError::SocketInUse { path: busy } if *busy == path));
    assert!(error.to_string().contains(path.to_str().unwrap()));
    drop(living);

    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(bind(&address), Err(BindError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_busy_port_names_itself_and_the_remedy() {
    let first = bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
    let error = bind(first.local_address()).err().unwrap().to_string();
    assert!(error.contains(&first.local_address().to_string()), "{error}");
    assert!(error.contains("another port"), "{error}");
}

#[test]
fn clients_that_come_before_serving_wait_and_later_exports_can_be_added() {
    let server = bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
    let ListenAddress::Tcp(address) = *server.local_address() else {
        panic!("not TCP");
    };
    let early = std::net::TcpStream::connect(address).unwrap();
    let late = MemoryVolume::new("late", 4096);
    server.publish(late.clone()).unwrap();
    let duplicate = server.publish(late).unwrap_err();
    assert_eq!(duplicate, PublishError::Duplicate { name: "late".into() });
    let _running = Running::start(server);
    assert_eq!(RawClient::go(early, "late").ask(FLUSH, 0, 0, 0), 0);
}

#[test]
fn export_name_of_an_unknown_export_ends_the_connection() {
    let server = Running::on_tcp(&[&MemoryVolume::new("demo", 4096)], Limits::default());
    let mut client = RawClient::greet(server.connect());
    client.send(&option(1, b"nothing"));
    client.expect_closed();
}

#[test]
fn replies_completed_from_many_threads_never_interleave() {
    let volume = MemoryVolume::new("demo", 8 << 20);
    let server = Running::on_tcp(&[&volume], Limits::default());
    let mut writer = server.client("demo");
    let content: Vec<u8> = (0..8 << 20).map(|i: u32| (i / 4096) as u8).collect();
    assert_eq!(writer.write(0, 0, &content), 0);

    let mut client = server.client("demo");
    let mut sender = client.stream.try_clone().unwrap();
    const ROUNDS: u64 = 20;
    const REQUESTS: u64 = 50;
    for round in 0..ROUNDS {
        volume.hold();
        for i in 0..REQUESTS {
            let offset = (i * 37 + round * 11) % 1024 * 4096;
            let length = 1 + (i as u32 * 7919) % 60_000;
            let cookie = offset << 32 | u64::from(length);
            sender.write_all(&request(READ, 0, cookie, offset, length)).unwrap();
        }
        volume.wait_held(REQUESTS as usize);
        std::thread::scope(|scope| {
            scope.spawn(|| volume.release_from_many_threads());
            for _ in 0..REQUESTS {
                let (cookie, error) = client.reply();
                assert_eq!(error, 0);
                let (offset, length) = ((cookie >> 32) as usize, cookie as u32 as usize);
                let mut data = vec![0; length];
                client.stream.read_exact(&mut data).unwrap();
                assert!(data == content[offset..offset + length]);
            }
        });
    }
}

#[test]
fn a_client_that_never_takes_its_replies_is_cut_off_and_frees_the_budget() {
    let volume = MemoryVolume::new("demo", 64 << 20);
    let limits =
        Limits { inflight_bytes_max: 33 << 20, stall_timeout: Duration::from_millis(500), ..Limits::default() };
    let server = Running::on_tcp(&[&volume], limits);
    let mut greedy = server.client("demo");
    greedy.send(&request(READ, 0, 1, 0, 32 << 20));
    eventually("the read is taken in", || server.counters().reads == 1);
    let mut modest = server.client("demo");
    assert_eq!(modest.read(0, 2 << 20).unwrap().len(), 2 << 20);
}

#[test]
fn a_client_that_stops_inside_a_payload_is_cut_off() {
    let volume = MemoryVolume::new("demo", 64 << 20);
    let limits = Limits { stall_timeout: Duration::from_millis(100), ..Limits::default() };
    let server = Running::on_tcp(&[&volume], limits);
    for length in [4096, 1 << 20] {
        let mut client = server.client("demo");
        client.send(&request(WRITE, 0, 1, 0, length));
        client.send(b"half");
        client.expect_closed();
    }
    assert_eq!(volume.log(), []);
}

#[test]
fn shutdown_refuses_new_requests_and_finishes_outstanding_ones() {
    let volume = MemoryVolume::new("demo", 1 << 20);
    let server = Running::on_tcp(&[&volume], Limits::default());
    let mut client = server.client("demo");
    let mut idle = server.client("demo");
    volume.hold();
    client.send(&request(WRITE, 0, 1, 0, 3));
    client.send(b"abc");
    volume.wait_held(1);
    server.begin_shutdown();
    idle.expect_closed();
    assert_eq!(client.write(0, 0, b"new"), ESHUTDOWN);
    assert_eq!(client.ask(READ, 0, 0, 1), ESHUTDOWN);
    volume.release();
    assert_eq!(client.reply(), (1, 0));
    client.expect_closed();
    server.wait_ended();
    assert_eq!(volume.log().len(), 1);
}

#[test]
fn a_handshake_in_progress_is_told_that_the_server_stops() {
    let server = Running::on_tcp(&[&MemoryVolume::new("demo", 1 << 20)], Limits::default());
    let mut busy = RawClient::greet(server.connect());
    let mut idle = RawClient::greet(server.connect());
    let go = go("demo");
    busy.send(&go[..20]);
    server.begin_shutdown();
    busy.send(&go[20..]);
    let (number, kind, _text) = busy.option_reply();
    assert_eq!((number, kind), (7, (1 << 31) + 7));
    busy.send(&option(2, b""));
    assert_eq!(busy.option_reply().1, 1, "ABORT is acknowledged as ever");
    busy.expect_closed();
    idle.expect_closed();
    server.wait_ended();
}

#[test]
fn shutdown_does_not_wait_for_ever_for_a_volume_that_hangs() {
    let volume = MemoryVolume::new("demo", 1 << 20);
    let limits = Limits { shutdown_timeout: Duration::from_millis(100), ..Limits::default() };
    let server = Running::on_tcp(&[&volume], limits);
    let mut client = server.client("demo");
    volume.hold();
    client.send(&request(FLUSH, 0, 1, 0, 0));
    volume.wait_held(1);
    let begun = Instant::now();
    server.begin_shutdown();
    client.expect_closed();
    server.wait_ended();
    assert!(begun.elapsed() < Duration::from_secs(3));
    // Answers that come too late go nowhere and do no harm.
    volume.release();
}
