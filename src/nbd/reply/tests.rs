//! Replies byte by byte.

use super::*;

fn envelope(style: ReplyStyle) -> Envelope {
    Envelope { style, cookie: 0x0102_0304_0506_0708, offset: 0x1000 }
}

fn wire(reply: &Reply) -> Vec<u8> {
    let bytes: Vec<u8> = reply.chunks().flat_map(|chunk| [chunk.head.as_bytes(), &chunk.data].concat()).collect();
    assert_eq!(bytes.len(), reply.len_bytes());
    bytes
}

const COOKIE: &[u8] = b"\x01\x02\x03\x04\x05\x06\x07\x08";

#[test]
fn a_simple_success_carries_cookie_and_data() {
    let reply = envelope(ReplyStyle::Simple).read(Bytes::from_static(b"abc"), false);
    assert_eq!(wire(&reply), [b"\x67\x44\x66\x98\0\0\0\0", COOKIE, b"abc"].concat());
    let done = envelope(ReplyStyle::Simple).done();
    assert_eq!(wire(&done), [b"\x67\x44\x66\x98\0\0\0\0", COOKIE].concat());
}

#[test]
fn every_backend_error_has_its_protocol_number_and_no_data() {
    let table = [(IoError::Io, 5), (IoError::NoSpace, 28), (IoError::Shutdown, 108), (IoError::Invalid, 22)];
    for (error, number) in table {
        let reply = envelope(ReplyStyle::Simple).failed(failure(error));
        assert_eq!(wire(&reply), [b"\x67\x44\x66\x98", &u32::to_be_bytes(number)[..], COOKIE].concat(), "{error:?}");
    }
}

#[test]
fn success_in_chunks_is_one_chunk_without_content() {
    let structured = envelope(ReplyStyle::Structured).done();
    assert_eq!(wire(&structured), [b"\x66\x8e\x33\xef\0\x01\0\0", COOKIE, b"\0\0\0\0"].concat());
    let extended = envelope(ReplyStyle::Extended).done();
    let tail = b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0";
    assert_eq!(wire(&extended), [b"\x6e\x8a\x27\x8c\0\x01\0\0", COOKIE, tail].concat());
}

#[test]
fn errors_in_chunks_say_why() {
    let failure = Failure { error: WireError::NoSpace, text: "full" };
    let structured = envelope(ReplyStyle::Structured).failed(failure);
    let expected = [b"\x66\x8e\x33\xef\0\x01\x80\x01", COOKIE, b"\0\0\0\x0a\0\0\0\x1c\0\x04full"].concat();
    assert_eq!(wire(&structured), expected);
    let extended = envelope(ReplyStyle::Extended).failed(failure);
    let tail = b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x0a\0\0\0\x1c\0\x04full";
    assert_eq!(wire(&extended), [b"\x6e\x8a\x27\x8c\0\x01\x80\x01", COOKIE, tail].concat());
}

#[test]
fn reads_in_chunks_name_their_offsets() {
    let structured = envelope(ReplyStyle::Structured).read(Bytes::from_static(b"abc"), false);
    let expected = [b"\x66\x8e\x33\xef\0\x01\0\x01", COOKIE, b"\0\0\0\x0b\0\0\0\0\0\0\x10\0abc"].concat();
    assert_eq!(wire(&structured), expected);

    let mut data = vec![0; 8192];
    data[8191] = 1;
    let extended = wire(&envelope(ReplyStyle::Extended).read(data.into(), false));
    let hole = [
        b"\x6e\x8a\x27\x8c\0\0\0\x02",
        COOKIE,
        b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\x0c",
        b"\0\0\0\0\0\0\x10\0\0\0\x10\0",
    ]
    .concat();
    let data =
        [b"\x6e\x8a\x27\x8c\0\x01\0\x01", COOKIE, b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x10\x08", b"\0\0\0\0\0\0\x20\0"]
            .concat();
    assert_eq!(extended[..44], hole);
    assert_eq!(extended[44..84], data);
    assert_eq!(extended.len(), 84 + 4096);
}
