//! Replies in chunks, structured and extended, and what needs them: block status, 64-bit lengths. Over TCP.

mod nbd_support;

use std::io::Write;
use std::sync::Arc;

use nbd_support::chunks::*;
use nbd_support::*;
use nbdcast::nbd::{Allocation, ExportInfo, Extent, IoError, Limits, Request};

const MIB: u32 = 1 << 20;

fn volume_and_server(size_bytes: u64) -> (Arc<MemoryVolume>, Running) {
    let volume = MemoryVolume::new("demo", size_bytes);
    let server = Running::on_tcp(&[&volume], Limits::default());
    (volume, server)
}

fn structured(server: &Running) -> RawClient {
    RawClient::structured(server.connect(), "demo")
}

fn extended(server: &Running) -> RawClient {
    RawClient::extended(server.connect(), "demo")
}

/// One request without payload, and the chunk that answers it.
fn ask(client: &mut RawClient, command: u16, flags: u16, offset: u64, length: u32) -> Chunk {
    client.send(&request(command, flags, 42, offset, length));
    let chunk = client.chunk();
    assert_eq!(chunk.cookie, 42);
    chunk
}

/// The same with extended headers; the payload follows if there is one.
fn ask_extended(client: &mut RawClient, command: u16, flags: u16, offset: u64, length: u64, payload: &[u8]) -> Chunk {
    client.send(&extended_request(command, flags, 42, offset, length));
    client.send(payload);
    let (chunk, repeated_offset) = client.extended_chunk();
    assert_eq!((chunk.cookie, repeated_offset), (42, offset));
    chunk
}

fn is_success(chunk: &Chunk) -> bool {
    chunk.is_last && chunk.kind == NONE && chunk.payload.is_empty()
}

#[test]
fn zeroes_are_read_as_holes_unless_the_reply_must_be_one_piece() {
    let (_volume, server) = volume_and_server(1 << 20);
    let mut writer = server.client("demo");
    assert_eq!(writer.write(0, 8192, b"data"), 0);
    let mut client = structured(&server);
    client.send(&request(READ, 0, 42, 100, 65536));
    let (content, chunks) = client.content(100, 65536, RawClient::chunk);
    // Data up to the first block, a hole of one block, the block with data, a hole, the rest.
    assert_eq!(chunks, 5);
    assert!(content == writer.read(100, 65536).unwrap());
    client.send(&request(READ, DF, 42, 100, 65536));
    let (unfragmented, chunks) = client.content(100, 65536, RawClient::chunk);
    assert_eq!(chunks, 1);
    assert!(unfragmented == content);
    let hole = ask(&mut client, READ, DF, 100, 512);
    assert_eq!((hole.kind, hole.is_last), (OFFSET_HOLE, true));
}

#[test]
fn long_reads_in_many_chunks_arrive_whole_through_a_slow_socket() {
    let (volume, server) = volume_and_server(64 << 20);
    let mut writer = server.client("demo");
    // Blocks of data and of zeroes by turns, so that replies have as many chunks as there may be.
    let content: Vec<u8> = (0..4 * MIB).map(|i| if i / 4096 % 2 == 0 { 0 } else { (i / 4096) as u8 | 1 }).collect();
    assert_eq!(writer.write(0, 0, &content), 0);
    for is_extended in [false, true] {
        let mut client = if is_extended { extended(&server) } else { structured(&server) };
        volume.hold();
        const READS: u64 = 16;
        for read in 0..READS {
            let (offset, length) = (read * 12_345, 1 + (read as u32) * 131_071);
            let bytes = match is_extended {
                true => extended_request(READ, 0, read, offset, length.into()),
                false => request(READ, 0, read, offset, length),
            };
            client.stream.write_all(&bytes).unwrap();
        }
        volume.wait_held(READS as usize);
        volume.release();
        for read in (0..READS).rev() {
            let (offset, length) = (read * 12_345, 1 + (read as u32) * 131_071);
            let next = |client: &mut RawClient| {
                let chunk = if is_extended { client.extended_chunk().0 } else { client.chunk() };
                assert_eq!(chunk.cookie, read);
                chunk
            };
            let (found, chunks) = client.content(offset, length, next);
            assert!(found == content[offset as usize..][..length as usize]);
            assert!(chunks <= 64);
        }
    }
}

#[test]
fn trap_2_fua_is_taken_on_every_command() {
    let (_volume, server) = volume_and_server(1 << 20);
    let mut client = structured(&server);
    for (command, flags, length) in
        [(FLUSH, 0, 0), (TRIM, 0, 1), (WRITE_ZEROES, FAST_ZERO, 1), (CACHE, 0, 1), (READ, 0, 1), (BLOCK_STATUS, 0, 1)]
    {
        let chunk = ask(&mut client, command, FUA | flags, 0, length);
        assert!(chunk.is_last && chunk.kind != ERROR, "command {command}: {chunk:?}");
    }
}

#[test]
fn trap_4_refused_payloads_keep_extended_connections_in_step() {
    let (volume, server) = volume_and_server(1 << 20);
    let mut client = extended(&server);
    for (command, length) in [(TRIM, 1), (READ, 4096), (FLUSH, 100_000), (99, 12), (BLOCK_STATUS, 13)] {
        let payload = vec![0x21; length];
        let refused = ask_extended(&mut client, command, PAYLOAD_LEN, 0, length as u64, &payload);
        assert_eq!(refused.error().0, EINVAL, "command {command}");
    }
    let past_end = ask_extended(&mut client, WRITE, PAYLOAD_LEN, 1 << 20, 3, b"abc");
    assert_eq!(past_end.error(), (ENOSPC, "past the end of the export"));
    assert_eq!(volume.log(), []);
    // A WRITE has its payload with the flag and without.
    for flags in [PAYLOAD_LEN, 0] {
        assert_eq!(ask_extended(&mut client, WRITE, flags, 1 << 20, 3, b"abc").error().0, ENOSPC);
        assert!(is_success(&ask_extended(&mut client, WRITE, flags, 0, 3, b"abc")));
    }
    assert_eq!(volume.log().len(), 2);
}

#[test]
fn trap_4_a_payload_over_the_maximum_ends_an_extended_connection() {
    let (volume, server) = volume_and_server(1 << 30);
    let mut client = extended(&server);
    client.send(&extended_request(WRITE, PAYLOAD_LEN, 1, 0, u64::from(32 * MIB) + 1));
    client.expect_closed();
    assert_eq!(volume.log(), []);
}

#[test]
fn trap_5_a_failed_read_is_an_error_chunk_with_a_reason() {
    let (volume, server) = volume_and_server(1 << 20);
    let mut client = structured(&server);
    volume.fail_with(Some(IoError::Io));
    assert_eq!(ask(&mut client, READ, 0, 0, 4096).error(), (EIO, "the volume could not read or store the data"));
    volume.fail_with(None);
    assert_eq!(ask(&mut client, READ, 0, 1 << 20, 1).error(), (EINVAL, "past the end of the export"));
    assert_eq!(ask(&mut client, READ, 1 << 9, 0, 1).error(), (EINVAL, "unknown command flags"));
    assert_eq!(ask(&mut client, READ, 0, 0, 32 * MIB + 1).error(), (EOVERFLOW, "longer than the maximum payload"));
    assert!(is_success(&ask(&mut client, READ, 0, 0, 0)));
    assert_eq!(ask(&mut client, READ, 0, 0, 4096).kind, OFFSET_HOLE);
}

#[test]
fn trap_9_extended_requests_cover_more_than_4_gib() {
    let size = 1 << 40;
    let (volume, server) = volume_and_server(size);
    let mut client = extended(&server);
    for command in [TRIM, WRITE_ZEROES, CACHE] {
        assert!(is_success(&ask_extended(&mut client, command, 0, 5, size - 5, b"")));
    }
    let status = ask_extended(&mut client, BLOCK_STATUS, 0, 0, size, b"");
    assert_eq!(status.extents(), [(size, 3)]);
    let (offset, length, fua, no_hole) = (5, size - 5, false, false);
    let expected = [
        Request::Trim { offset, length, fua },
        Request::WriteZeroes { offset, length, fua, no_hole },
        Request::Cache { offset, length },
        Request::BlockStatus { offset: 0, length: size, one: false },
    ];
    assert_eq!(volume.log(), expected);
    assert_eq!((server.counters().block_statuses, server.counters().caches), (1, 1));
}

#[test]
fn trap_10_block_status_is_for_the_export_it_was_chosen_for() {
    let (demo, other) = (MemoryVolume::new("demo", 1 << 20), MemoryVolume::new("other", 1 << 20));
    let server = Running::on_tcp(&[&demo, &other], Limits::default());
    let structured = option(STRUCTURED_REPLY, b"");
    for options in [vec![structured.clone()], vec![structured, allocation_of("other")]] {
        let mut client = RawClient::go_with(server.connect(), &options, "demo");
        let refused = ask(&mut client, BLOCK_STATUS, 0, 0, 4096);
        assert_eq!(refused.error(), (EINVAL, "no metadata context was chosen for this export"));
        assert!(is_success(&ask(&mut client, FLUSH, 0, 0, 0)));
    }
    assert_eq!(server.client("demo").ask(BLOCK_STATUS, 0, 0, 4096), EINVAL);
    assert_eq!(demo.log().len(), 2);
}

#[test]
fn block_status_tells_what_the_volume_knows() {
    let (volume, server) = volume_and_server(1 << 20);
    assert_eq!(server.client("demo").write(0, 8192, &[1; 4096]), 0);
    let (mut compact, mut wide) = (structured(&server), extended(&server));
    let expected = [(8192, 3), (4096, 0), (65536 - 12288, 3)];
    assert_eq!(ask(&mut compact, BLOCK_STATUS, 0, 0, 65536).extents(), expected);
    assert_eq!(ask_extended(&mut wide, BLOCK_STATUS, 0, 0, 65536, b"").extents(), expected);
    assert_eq!(ask(&mut compact, BLOCK_STATUS, REQ_ONE, 0, 65536).extents(), [(8192, 3)]);
    assert_eq!(ask(&mut compact, BLOCK_STATUS, REQ_ONE, 0, 512).extents(), [(512, 3)]);
    let zeroes = Extent { length: 512, allocation: Allocation::Zeroes };
    volume.tell(vec![zeroes, zeroes]);
    assert_eq!(ask(&mut compact, BLOCK_STATUS, 0, 0, 65536).extents(), [(1024, 2)]);
}

#[test]
fn block_status_can_be_asked_by_context() {
    let (_volume, server) = volume_and_server(1 << 20);
    let mut client = extended(&server);
    let payload = |length: u64, context: u32| [&length.to_be_bytes()[..], &context.to_be_bytes()].concat();
    let told = ask_extended(&mut client, BLOCK_STATUS, PAYLOAD_LEN, 4096, 12, &payload(8192, 1));
    assert_eq!(told.extents(), [(8192, 3)]);
    let unknown = ask_extended(&mut client, BLOCK_STATUS, PAYLOAD_LEN, 4096, 12, &payload(8192, 2));
    assert_eq!(unknown.error(), (EINVAL, "unknown metadata context"));
    let past_end = ask_extended(&mut client, BLOCK_STATUS, PAYLOAD_LEN, 4096, 12, &payload(1 << 20, 1));
    assert_eq!(past_end.error(), (EINVAL, "past the end of the export"));
    assert!(is_success(&ask_extended(&mut client, FLUSH, 0, 0, 0, b"")));
}

#[test]
fn a_volume_that_tells_more_than_was_asked_for_is_not_believed() {
    let (volume, server) = volume_and_server(1 << 20);
    let mut client = structured(&server);
    let extent = |length| Extent { length, allocation: Allocation::Hole };
    for told in [vec![], vec![extent(0)], vec![extent(4097)], vec![extent(4096), extent(1)]] {
        volume.tell(told);
        assert_eq!(ask(&mut client, BLOCK_STATUS, 0, 0, 4096).error().0, EIO);
    }
}

#[test]
fn compact_and_extended_headers_do_not_mix() {
    let (_volume, server) = volume_and_server(1 << 20);
    let mut wide = extended(&server);
    wide.send(&request(FLUSH, 0, 1, 0, 0));
    wide.send(&[0; 4]);
    wide.expect_closed();
    let mut compact = structured(&server);
    compact.send(&extended_request(FLUSH, 0, 1, 0, 0));
    compact.expect_closed();
}

#[test]
fn an_export_says_what_it_offers() {
    let export = |name: &str, read_only, rotational| {
        MemoryVolume::with_export(ExportInfo {
            name: name.into(),
            size_bytes: 4096,
            read_only,
            rotational,
            ..ExportInfo::default()
        })
    };
    let (plain, guarded) = (export("plain", false, false), export("guarded", true, true));
    let server = Running::on_tcp(&[&plain, &guarded], Limits::default());
    let mut client = RawClient::greet(server.connect());
    let mut flags = |name: &str, before: &[Vec<u8>]| {
        for option in before {
            client.send(option);
            while client.option_reply().1 != 1 {}
        }
        let mut info = go(name);
        info[11] = 6;
        client.send(&info);
        let (_, _, body) = client.option_reply();
        assert_eq!(client.option_reply().1, 1);
        u16::from_be_bytes([body[10], body[11]])
    };
    assert_eq!(flags("plain", &[]), 0b0_1101_0110_1101);
    assert_eq!(flags("guarded", &[]), 0b0_0101_0001_1111);
    assert_eq!(flags("plain", &[option(STRUCTURED_REPLY, b"")]), 0b0_1101_1110_1101);
    let wide = [option(EXTENDED_HEADERS, b""), allocation_of("plain")];
    assert_eq!(flags("plain", &wide), 0b1_1101_1110_1101);
    assert_eq!(flags("guarded", &[]), 0b0_0101_1001_1111);
}

#[test]
fn block_statuses_are_counted_as_what_replicas_read_for_them() {
    let (volume, server) = volume_and_server(1 << 20);
    let mut client = structured(&server);
    volume.hold();
    let status = |cookie| request(BLOCK_STATUS, 0, cookie, 0, 4096);
    // As many as a connection may have, and something else that is refused at once. Its answer leaves when the next has
    // to wait.
    let at_a_time = Limits::default().connection_bytes_max as u64 / (4 << 20) - 1;
    let mut bytes: Vec<u8> = (0..at_a_time).flat_map(status).collect();
    bytes.extend(request(99, 0, 1000, 0, 0));
    bytes.extend(status(1001));
    client.send(&bytes);
    assert_eq!(client.chunk().cookie, 1000);
    assert_eq!(server.counters().block_statuses, at_a_time);
    volume.release();
    let mut answered: Vec<u64> = (0..=at_a_time).map(|_| client.chunk().cookie).collect();
    answered.sort_unstable();
    assert!(answered.iter().copied().eq((0..at_a_time).chain([1001])));
}
