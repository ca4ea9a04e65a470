//! Where NBD servers are known to go wrong, each as one story over a real TCP connection.

mod nbd_support;

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nbd_support::*;
use nbdcast::nbd::{ExportInfo, IoError, Limits, Request};

const MIB: u32 = 1 << 20;

fn volume_and_server(size_bytes: u64) -> (std::sync::Arc<MemoryVolume>, Running) {
    let volume = MemoryVolume::new("demo", size_bytes);
    let server = Running::on_tcp(&[&volume], Limits::default());
    (volume, server)
}

#[test]
fn trap_1_a_flush_comes_after_writes_answered_on_other_connections() {
    let (volume, server) = volume_and_server(1 << 20);
    let (mut a, mut b) = (server.client("demo"), server.client("demo"));
    assert_eq!(a.write(0, 0, b"one"), 0);
    assert_eq!(b.ask(FLUSH, 0, 0, 0), 0);
    assert!(matches!(volume.log()[..], [Request::Write { .. }, Request::Flush]));
}

#[test]
fn trap_2_fua_is_taken_on_every_command_and_reaches_every_change() {
    let (volume, server) = volume_and_server(1 << 20);
    let mut client = server.client("demo");
    assert_eq!(client.write(FUA, 0, b"x"), 0);
    assert_eq!(client.ask(TRIM, FUA, 0, 1), 0);
    assert_eq!(client.ask(WRITE_ZEROES, FUA | 2, 0, 1), 0);
    assert_eq!(client.ask(FLUSH, FUA, 0, 0), 0);
    assert_eq!(client.ask(READ, FUA, 0, 1), 0);
    assert_eq!(client.take::<1>(), [0]);
    let (offset, length, fua) = (0, 1, true);
    let expected = [
        Request::Write { offset, data: Bytes::from_static(b"x"), fua },
        Request::Trim { offset, length, fua },
        Request::WriteZeroes { offset, length, fua, no_hole: true },
        Request::Flush,
        Request::Read { offset, length: 1 },
    ];
    assert_eq!(volume.log(), expected);
}

/// One request may be outstanding, so everything behind it waits in the socket.
fn server_with_one_request_at_a_time() -> (std::sync::Arc<MemoryVolume>, Running) {
    let volume = MemoryVolume::new("demo", 1 << 20);
    let limits = Limits { requests_per_connection_max: 1, ..Limits::default() };
    let server = Running::on_tcp(&[&volume], limits);
    (volume, server)
}

/// In one piece, so that the change is here, waiting, when the flush is.
fn a_flush_and_a_write(data: &[u8; 3]) -> Vec<u8> {
    let mut bytes = request(FLUSH, 0, 1, 0, 0);
    bytes.extend(request(WRITE, 0, 2, 0, 3));
    bytes.extend(data);
    bytes
}

fn more_than_the_sockets_hold(cookie: u64) -> Vec<u8> {
    [request(WRITE, 0, cookie, 0, MIB).as_slice(), &[0x25; MIB as usize]].concat().repeat(20)
}

#[test]
fn trap_3_a_change_that_waited_behind_others_is_dropped_when_its_client_is_gone() {
    let (volume, server) = server_with_one_request_at_a_time();
    let mut old = server.client("demo");
    volume.hold();
    let mut bytes = a_flush_and_a_write(b"old");
    bytes.extend(request(TRIM, 0, 3, 0, 3));
    old.send(&bytes);
    volume.wait_held(1);
    old.stream.shutdown(Shutdown::Both).unwrap();
    volume.release();
    eventually("the old connection ends", || server.counters().connections_open == 0);

    let mut new = server.client("demo");
    assert_eq!(new.write(0, 0, b"new"), 0);
    assert_eq!(new.read(0, 3).unwrap(), b"new");
    assert!(!volume.log().iter().any(|r| matches!(r, Request::Trim { .. })));
}

/// Whether the peer's machine has taken the end of the connection: the kernel then shows it in the state FIN_WAIT2.
fn end_has_arrived(stream: &TcpStream) -> bool {
    let port = format!(":{:04X}", stream.local_addr().unwrap().port());
    let connections = std::fs::read_to_string("/proc/net/tcp").unwrap();
    connections.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&port)) && fields.nth(1) == Some("05")
    })
}

#[test]
fn trap_3_the_end_of_a_connection_is_seen_behind_more_than_the_sockets_hold() {
    let (volume, server) = server_with_one_request_at_a_time();
    let mut old = server.client("demo");
    volume.hold();
    let mut bytes = a_flush_and_a_write(b"old");
    bytes.extend(more_than_the_sockets_hold(3));
    old.stream.set_write_timeout(Some(Duration::from_secs(30))).unwrap();
    // All of it goes only because it is read, long before the flush is done.
    old.send(&bytes);
    old.stream.shutdown(Shutdown::Both).unwrap();
    eventually("the end arrives", || end_has_arrived(&old.stream));
    volume.release();
    eventually("the old connection ends", || server.counters().connections_open == 0);
    assert_eq!(volume.log(), [Request::Flush]);
}

#[test]
fn trap_3_the_end_of_a_connection_is_seen_behind_requests_that_each_wait_for_a_short_time() {
    let (volume, server) = server_with_one_request_at_a_time();
    let mut old = server.client("demo");
    volume.hold();
    let mut bytes: Vec<u8> = (0..100).flat_map(|cookie| request(FLUSH, 0, cookie, 0, 0)).collect();
    bytes.extend(request(WRITE, 0, 100, 0, 3));
    bytes.extend(b"old");
    bytes.extend(more_than_the_sockets_hold(101));
    let stream = old.stream.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        old.send(&bytes);
        // In both directions, its machine would also reset the connection at the next reply.
        old.stream.shutdown(Shutdown::Write).unwrap();
    });
    let mut released_at = Instant::now();
    eventually("the end arrives", || {
        if released_at.elapsed() >= Duration::from_millis(100) {
            volume.release_one();
            released_at = Instant::now();
        }
        end_has_arrived(&stream)
    });
    sending.join().unwrap();
    assert!(volume.log().len() < 50, "long before they are through");
    volume.release();
    eventually("the old connection ends", || server.counters().connections_open == 0);
    assert!(!volume.log().iter().any(|request| matches!(request, Request::Write { .. })));
}

#[test]
fn trap_3_a_change_that_waited_is_done_when_its_client_is_still_there() {
    let (volume, server) = server_with_one_request_at_a_time();
    let mut client = server.client("demo");
    volume.hold();
    client.send(&a_flush_and_a_write(b"new"));
    volume.wait_held(1);
    volume.release();
    assert_eq!(client.reply(), (1, 0));
    assert_eq!(client.reply(), (2, 0));
    assert_eq!(client.read(0, 3).unwrap(), b"new");
}

#[test]
fn trap_3_a_write_that_waited_for_memory_is_dropped_when_its_client_is_gone() {
    let volume = MemoryVolume::new("demo", 64 << 20);
    let limits = Limits {
        inflight_bytes_max: 0,   // raised to one longest request
        connections_max: 65_536, // so many that nothing is reserved for each
        ..Limits::default()
    };
    let server = Running::on_tcp(&[&volume], limits);
    let (mut big, mut old) = (server.client("demo"), server.client("demo"));
    volume.hold();
    big.send(&request(READ, 0, 1, 0, 32 * MIB));
    volume.wait_held(1);
    // The first request is refused at once, but its answer leaves only when the second has to wait.
    let mut bytes = request(99, 0, 2, 0, 0);
    bytes.extend(request(WRITE, 0, 3, 0, 3));
    bytes.extend(b"old");
    old.send(&bytes);
    assert_eq!(old.reply(), (2, EINVAL));
    old.stream.shutdown(Shutdown::Both).unwrap();
    volume.release();
    assert_eq!(big.reply(), (1, 0));
    big.take_data(32 * MIB);
    eventually("the old connection ends", || server.counters().connections_open == 1);
    assert_eq!(server.counters().writes, 0);
    assert_eq!(volume.log().len(), 1);
}

#[test]
fn trap_4_a_refused_write_keeps_the_connection_in_step() {
    let export = ExportInfo { name: "demo".into(), size_bytes: 1 << 20, read_only: true, ..ExportInfo::default() };
    let volume = MemoryVolume::with_export(export);
    let server = Running::on_tcp(&[&volume], Limits::default());
    let mut client = server.client("demo");
    for length in [1, 4096, 300_000] {
        assert_eq!(client.write(0, 0, &vec![0x25; length]), EPERM);
        assert_eq!(client.read(0, 1).unwrap(), [0]);
    }
    assert_eq!(client.ask(TRIM, 0, 0, 1), EPERM);
    assert_eq!(client.ask(WRITE_ZEROES, 0, 0, 1), EPERM);
}

#[test]
fn trap_4_a_write_the_volume_fails_keeps_the_connection_in_step() {
    let (volume, server) = volume_and_server(1 << 20);
    let mut client = server.client("demo");
    for (failure, error) in
        [(IoError::Io, EIO), (IoError::NoSpace, ENOSPC), (IoError::Invalid, EINVAL), (IoError::Shutdown, ESHUTDOWN)]
    {
        volume.fail_with(Some(failure));
        assert_eq!(client.write(0, 0, &[1; 512]), error);
    }
    volume.fail_with(None);
    assert_eq!(client.write(0, 0, &[1; 512]), 0);
    assert_eq!(server.counters().errors, 4);
}

#[test]
fn trap_5_a_failed_read_is_an_error_without_data() {
    let (volume, server) = volume_and_server(1 << 20);
    let mut client = server.client("demo");
    volume.fail_with(Some(IoError::Io));
    assert_eq!(client.read(0, 4096), Err(EIO));
    volume.fail_with(None);
    assert_eq!(client.read(0, 4096).unwrap(), [0; 4096]);
}

#[test]
fn trap_6_an_oversize_write_is_passed_over_and_refused() {
    let (volume, server) = volume_and_server(1 << 30);
    let mut client = server.client("demo");
    assert_eq!(client.write(0, 0, &vec![0; 33 * MIB as usize]), EINVAL);
    assert_eq!(client.read(0, 32 * MIB + 1), Err(EINVAL));
    assert_eq!(client.ask(FLUSH, 0, 0, 0), 0);
    assert_eq!(volume.log(), [Request::Flush]);
}

#[test]
fn trap_6_a_write_too_long_to_pass_over_ends_the_connection() {
    let (volume, server) = volume_and_server(1 << 30);
    let mut client = server.client("demo");
    client.send(&request(WRITE, 0, 1, 0, u32::MAX));
    client.expect_closed();
    assert_eq!(volume.log(), []);
}

#[test]
fn trap_6_one_longest_request_passes_the_smallest_budget() {
    let volume = MemoryVolume::new("demo", 64 << 20);
    let limits = Limits { inflight_bytes_max: 0, ..Limits::default() };
    let server = Running::on_tcp(&[&volume], limits);
    let clients: Vec<_> = (0..3)
        .map(|number| {
            let mut client = server.client("demo");
            std::thread::spawn(move || {
                assert_eq!(client.write(0, 0, &vec![number; 32 * MIB as usize]), 0);
                assert_eq!(client.read(0, 32 * MIB).unwrap().len(), 32 << 20);
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
}

#[test]
fn trap_6_the_byte_budget_stops_reading_until_replies_have_left() {
    let volume = MemoryVolume::new("demo", 64 << 20);
    let limits = Limits {
        inflight_bytes_max: 0,   // raised to one longest request
        connections_max: 65_536, // so many that nothing is reserved for each
        ..Limits::default()
    };
    let server = Running::on_tcp(&[&volume], limits);
    let (mut a, mut b) = (server.client("demo"), server.client("demo"));
    volume.hold();
    a.send(&request(READ, 0, 1, 0, 32 * MIB));
    volume.wait_held(1);
    // The first request is refused at once, but its answer leaves only when the second has to wait.
    let mut bytes = request(99, 0, 1, 0, 0);
    bytes.extend(request(READ, 0, 2, 0, 4096));
    b.send(&bytes);
    assert_eq!(b.reply(), (1, EINVAL));
    assert_eq!(volume.log().len(), 1);
    volume.release();
    assert_eq!(a.reply(), (1, 0));
    a.take_data(32 * MIB);
    assert_eq!(b.reply(), (2, 0));
    assert_eq!(volume.log()[1], Request::Read { offset: 0, length: 4096 });
}

#[test]
fn trap_7_a_handshake_has_a_deadline_and_a_session_has_none() {
    let volume = MemoryVolume::new("demo", 4096);
    let limits = Limits { handshake_timeout: Duration::from_secs(1), ..Limits::default() };
    let server = Running::on_tcp(&[&volume], limits);
    let mut ready = server.client("demo");
    let mut silent = RawClient::greet(server.connect());
    silent.expect_closed();
    assert_eq!(ready.ask(FLUSH, 0, 0, 0), 0);
}

#[test]
fn trap_7_too_many_connections_are_closed_at_once() {
    let volume = MemoryVolume::new("demo", 4096);
    let limits = Limits { connections_max: 2, ..Limits::default() };
    let server = Running::on_tcp(&[&volume], limits);
    let (first, mut second) = (server.client("demo"), server.client("demo"));
    let mut third = RawClient { stream: server.connect() };
    third.expect_closed();
    assert_eq!(server.counters().connections_refused, 1);
    drop(first);
    eventually("a place is free", || server.counters().connections_open == 1);
    assert_eq!(server.client("demo").ask(FLUSH, 0, 0, 0), 0);
    assert_eq!(second.ask(FLUSH, 0, 0, 0), 0);
}

#[test]
fn trap_8_tls_is_refused_politely_and_the_handshake_goes_on() {
    let (_volume, server) = volume_and_server(4096);
    let mut client = RawClient::greet(server.connect());
    client.send(&option(5, b""));
    assert_eq!(client.option_reply().1, (1 << 31) + 2);
    client.send(&go("demo"));
    assert_eq!(client.option_reply().1, 3);
}

#[test]
fn trap_9_any_alignment_and_32_mib_work() {
    let (_volume, server) = volume_and_server(64 << 20);
    let mut client = server.client("demo");
    for (offset, length) in [(1, 1), (511, 2), (512, 512), (4095, 4098), (3, 32 * MIB)] {
        let data: Vec<u8> = (0..length).map(|i| (i * 31 + length) as u8).collect();
        assert_eq!(client.write(0, offset, &data), 0);
        assert!(client.read(offset, length).unwrap() == data, "{length} bytes at {offset}");
    }
}

#[test]
fn trap_9_trim_and_write_zeroes_cover_almost_4_gib() {
    let (volume, server) = volume_and_server(1 << 33);
    let mut client = server.client("demo");
    let length = u64::from(u32::MAX);
    assert_eq!(client.ask(TRIM, 0, 5, u32::MAX), 0);
    assert_eq!(client.ask(WRITE_ZEROES, 0, 5, u32::MAX), 0);
    let (offset, fua, no_hole) = (5, false, false);
    let expected = [Request::Trim { offset, length, fua }, Request::WriteZeroes { offset, length, fua, no_hole }];
    assert_eq!(volume.log(), expected);
}

#[test]
fn trap_10_zero_length_is_a_success_that_does_nothing() {
    let (volume, server) = volume_and_server(4096);
    let mut client = server.client("demo");
    for command in [READ, WRITE, TRIM, WRITE_ZEROES] {
        assert_eq!(client.ask(command, 0, 4096, 0), 0);
    }
    assert_eq!(volume.log(), []);
}

#[test]
fn trap_10_disc_finishes_outstanding_work_and_has_no_reply() {
    let (volume, server) = volume_and_server(1 << 20);
    let mut client = server.client("demo");
    volume.hold();
    for cookie in 1..=3 {
        client.send(&request(READ, 0, cookie, 0, 1));
    }
    client.send(&request(DISC, 0, 4, 0, 0));
    volume.wait_held(3);
    volume.release();
    for cookie in [3, 2, 1] {
        assert_eq!(client.reply(), (cookie, 0));
        client.take::<1>();
    }
    client.expect_closed();
}

#[test]
fn past_the_end_unknown_commands_and_unknown_flags_stay_connected() {
    let (volume, server) = volume_and_server(4096);
    let mut client = server.client("demo");
    assert_eq!(client.write(0, 4095, b"xx"), ENOSPC);
    assert_eq!(client.ask(WRITE_ZEROES, 0, u64::MAX, 2), ENOSPC);
    assert_eq!(client.ask(READ, 0, 4095, 2), EINVAL);
    assert_eq!(client.ask(TRIM, 0, 4097, 1), EINVAL);
    assert_eq!(client.ask(8, 0, 0, 1), EINVAL);
    assert_eq!(client.ask(READ, 1 << 2, 0, 1), EINVAL);
    assert_eq!(client.write(1 << 9, 0, b"xx"), EINVAL);
    assert_eq!(client.ask(WRITE_ZEROES, 1 << 3, 0, 1), EINVAL);
    assert_eq!(volume.log(), []);
    assert_eq!(client.ask(FLUSH, 0, 0, 0), 0);
}

#[test]
fn a_client_out_of_step_is_cut_off_after_its_outstanding_replies() {
    let (_volume, server) = volume_and_server(4096);
    let mut client = server.client("demo");
    client.send(&request(FLUSH, 0, 1, 0, 0));
    client.send(&[0xff; 28]);
    assert_eq!(client.reply(), (1, 0));
    client.expect_closed();
}

#[test]
fn requests_sent_along_with_go_are_not_lost() {
    let (_volume, server) = volume_and_server(1 << 20);
    let mut client = RawClient::greet(server.connect());
    let mut bytes = go("demo");
    bytes.extend(request(WRITE, 0, 1, 0, 3));
    bytes.extend(b"abc");
    bytes.extend(request(READ, 0, 2, 0, 3));
    client.stream.write_all(&bytes).unwrap();
    while client.option_reply().1 != 1 {}
    assert_eq!(client.reply(), (1, 0));
    assert_eq!(client.reply(), (2, 0));
    assert_eq!(client.take::<3>(), *b"abc");
}
