//! What a server spends on clients that mean no good, and that others notice nothing of them.

mod nbd_support;

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nbd_support::*;
use nbdcast::nbd::{Limits, ListenAddress};
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const MIB: usize = 1 << 20;
const GROWTH_BYTES_MAX: usize = 64 * MIB;

/// The memory of the process is measured: one story at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    guard
}

/// Bytes of memory that the process has in use.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number of KiB") * 1024
}

fn volume_and_server(limits: Limits) -> (Arc<MemoryVolume>, Running) {
    let volume = MemoryVolume::new("demo", 40 * MIB as u64);
    let server = Running::on_tcp(&[&volume], limits);
    (volume, server)
}

/// A client that does everything right, again and again.
fn work(client: &mut RawClient, rounds: u64) {
    for round in 0..rounds {
        let data = [round as u8; 8192];
        assert_eq!(client.write(0, round * 8192, &data), 0);
        assert_eq!(client.read(round * 8192, 8192).unwrap(), data);
        assert_eq!(client.ask(FLUSH, 0, 0, 0), 0);
    }
}

#[test]
fn a_thousand_clients_that_say_nothing_keep_nobody_out() {
    let _alone = alone();
    let (_volume, server) = volume_and_server(Limits::default());
    let mut before = server.client("demo");
    work(&mut before, 10);
    let resident = resident_bytes();
    let silent: Vec<TcpStream> = (0..1000)
        .map(|number| {
            if number % 100 == 50 {
                work(&mut server.client("demo"), 3);
            }
            server.connect()
        })
        .collect();
    let mut after = server.client("demo");
    work(&mut before, 50);
    work(&mut after, 50);
    // The pool of handshakes, and the clients.
    eventually("those that had to give way are gone", || server.counters().connections_open <= 128 + 3);
    assert!(server.counters().connections_refused > 800);
    let growth = resident_bytes().saturating_sub(resident);
    assert!(growth < GROWTH_BYTES_MAX, "{growth} bytes for silent clients");
    drop(silent);
    eventually("all but the two are gone", || server.counters().connections_open == 2);
    work(&mut after, 10);
}

/// A connection to the server from an address of this machine's choice.
fn connect_from(server: &Running, source: Ipv4Addr) -> TcpStream {
    let ListenAddress::Tcp(address) = server.server().local_address() else { panic!("no TCP address") };
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &SocketAddr::from((source, 0))).unwrap();
    connect(&socket, address).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[test]
fn an_address_that_floods_pushes_out_nobody_but_itself() {
    let _alone = alone();
    let (_volume, server) = volume_and_server(Limits::default());
    let mut slow: Vec<RawClient> =
        (2..6).map(|last| RawClient::greet(connect_from(&server, Ipv4Addr::new(127, 0, 0, last)))).collect();
    let flood: Vec<TcpStream> = (0..500).map(|_| server.connect()).collect();
    eventually("the flood was noticed", || server.counters().connections_refused > 300);
    for client in &mut slow {
        client.send(&go("demo"));
        while client.option_reply().1 != 1 {}
        work(client, 3);
    }
    drop(flood);
}

#[test]
fn a_handshake_that_is_done_gives_way_to_nobody() {
    let _alone = alone();
    let limits = Limits { handshakes_max: 1, connections_max: 3, ..Limits::default() };
    let (_volume, server) = volume_and_server(limits);
    let mut clients: Vec<RawClient> = (0..3).map(|_| server.client("demo")).collect();
    server.connect();
    for client in &mut clients {
        work(client, 3);
    }
}

#[test]
fn garbage_harms_nobody() {
    let _alone = alone();
    let (_volume, server) = volume_and_server(Limits::default());
    let mut client = server.client("demo");
    let resident = resident_bytes();
    for number in 0..100_u32 {
        let mut state = number.wrapping_mul(2_654_435_761) | 1;
        let garbage: Vec<u8> = (0..4096)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state as u8
            })
            .collect();
        let mut stream = server.connect();
        let mut before: &[u8] = &[];
        // The first of three is wrong from its first byte, the others once they were trusted a little.
        let transmission = [&3_u32.to_be_bytes()[..], &go("demo")].concat();
        match number % 3 {
            0 => {}
            1 => before = &[0, 0, 0, 3],
            _ => before = &transmission,
        }
        // The server may have closed already.
        let _ = stream.write_all(before).and_then(|()| stream.write_all(&garbage));
        work(&mut client, 1);
    }
    eventually("all garbage is gone", || server.counters().connections_open == 1);
    let growth = resident_bytes().saturating_sub(resident);
    assert!(growth < GROWTH_BYTES_MAX, "{growth} bytes for garbage");
}

#[test]
fn lengths_of_4_gib_cost_nothing() {
    let _alone = alone();
    let (_volume, server) = volume_and_server(Limits::default());
    let mut client = server.client("demo");
    let resident = resident_bytes();
    for _ in 0..20 {
        let mut option = RawClient::greet(server.connect());
        option.send(b"IHAVEOPT");
        option.send(&7_u32.to_be_bytes());
        option.send(&u32::MAX.to_be_bytes());
        option.expect_closed();
        let mut write = server.client("demo");
        write.send(&request(WRITE, 0, 1, 0, u32::MAX));
        write.expect_closed();
        let mut read = server.client("demo");
        for command in [READ, TRIM] {
            assert_eq!(read.ask(command, 0, 0, u32::MAX), EINVAL);
        }
        assert_eq!(read.ask(WRITE_ZEROES, 0, 0, u32::MAX), ENOSPC);
        work(&mut client, 1);
    }
    let growth = resident_bytes().saturating_sub(resident);
    assert!(growth < GROWTH_BYTES_MAX, "{growth} bytes for lengths");
}

#[test]
fn a_client_that_takes_no_replies_holds_its_own_share_only() {
    let _alone = alone();
    let limits = Limits { inflight_bytes_max: 120 * MIB, connection_bytes_max: 0, ..Limits::default() };
    let (volume, server) = volume_and_server(limits);
    let mut greedy = server.client("demo");
    for cookie in 0..100 {
        greedy.send(&request(READ, 0, cookie, 0, 32 * MIB as u32));
    }
    // What the socket takes of the first lets a second in, and no more.
    eventually("the greedy client has begun", || !volume.log().is_empty());
    let mut modest = server.client("demo");
    work(&mut modest, 20);
    assert_eq!(modest.read(0, 32 * MIB as u32).unwrap().len(), 32 * MIB);
}

#[test]
fn many_clients_that_take_no_replies_do_not_stop_small_requests() {
    let _alone = alone();
    let limits = Limits { inflight_bytes_max: 80 * MIB, connection_bytes_max: 0, ..Limits::default() };
    let (volume, server) = volume_and_server(limits);
    let mut modest = server.client("demo");
    let greedy: Vec<RawClient> = (0..4)
        .map(|_| {
            let mut greedy = server.client("demo");
            for cookie in 0..3 {
                greedy.send(&request(READ, 0, cookie, 0, 32 * MIB as u32));
            }
            greedy
        })
        .collect();
    eventually("the greedy clients have begun", || !volume.log().is_empty());
    work(&mut modest, 100);
    work(&mut server.client("demo"), 100);
    drop(greedy);
}
