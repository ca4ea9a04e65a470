//! Tables of the handshake: what each option is answered, and that no input does harm.

use super::*;
use bytes::BufMut;
use proptest::prelude::*;

mod meta_context;
mod tls;

fn export(name: &str, read_only: bool) -> ExportInfo {
    ExportInfo {
        name: name.into(),
        description: format!("about {name}"),
        size_bytes: 4096,
        read_only,
        ..ExportInfo::default()
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u32).to_be_bytes());
    bytes.extend(data);
    bytes
}

fn info_data(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend((wanted.len() as u16).to_be_bytes());
    wanted.iter().for_each(|kind| data.extend(kind.to_be_bytes()));
    data
}

/// Feeds client flags and then `input`; the answers and the last progress.
fn run(exports: &[ExportInfo], client_flags: u32, input: &[u8]) -> (Result<Progress, HandshakeError>, BytesMut) {
    let mut bytes = client_flags.to_be_bytes().to_vec();
    bytes.extend(input);
    feed(&mut Handshake::new(offer(exports), Client::default()), &bytes)
}

fn offer(exports: &[ExportInfo]) -> Offer<'_> {
    Offer { exports: exports.iter().collect(), ..Offer::default() }
}

/// Feeds bytes as they are; the answers and the last progress.
fn feed(handshake: &mut Handshake<'_>, input: &[u8]) -> (Result<Progress, HandshakeError>, BytesMut) {
    let (mut bytes, mut output) = (BytesMut::from(input), BytesMut::new());
    loop {
        match handshake.advance(&mut bytes, &mut output) {
            Ok(Progress::Again) => {}
            end => return (end, output),
        }
    }
}

/// Option, kind, body.
type OptionReply = (u32, u32, Vec<u8>);

/// Takes replies apart.
fn replies(mut output: BytesMut) -> Vec<OptionReply> {
    let mut replies = Vec::new();
    while !output.is_empty() {
        assert_eq!(output.get_u64(), OPTION_REPLY_MAGIC);
        let (option, kind, length) = (output.get_u32(), output.get_u32(), output.get_u32());
        replies.push((option, kind, output.split_to(length as usize).to_vec()));
    }
    replies
}

fn kinds(output: BytesMut) -> Vec<u32> {
    replies(output).into_iter().map(|(_, kind, _)| kind).collect()
}

#[test]
fn who_is_stopping_refuses_every_option_but_abort() {
    let exports = [export("demo", false)];
    let mut handshake = Handshake::new(offer(&exports), Client::default());
    let flags = (CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES).to_be_bytes();
    assert_eq!(feed(&mut handshake, &flags).0, Ok(Progress::NeedInput));
    handshake.stop();
    for number in [OPT_LIST, OPT_STARTTLS, OPT_GO, OPT_SET_META_CONTEXT, 12345] {
        let (progress, output) = feed(&mut handshake, &option(number, b"abc"));
        assert_eq!((progress, kinds(output)), (Ok(Progress::NeedInput), vec![REP_ERR_SHUTDOWN]));
    }
    let (progress, output) = feed(&mut handshake, &option(OPT_ABORT, b""));
    assert_eq!((progress, kinds(output)), (Ok(Progress::Aborted), vec![REP_ACK]));
    let mut handshake = Handshake::new(offer(&exports), Client::default());
    handshake.stop();
    let chosen = [&flags[..], &option(OPT_EXPORT_NAME, b"demo")].concat();
    assert_eq!(feed(&mut handshake, &chosen).0, Err(HandshakeError::Stopping));
}

/// Without structured replies and contexts.
fn plain(export: usize) -> Progress {
    Progress::Chosen(Agreement { export, style: ReplyStyle::Simple, has_context: false })
}

const BOTH: u32 = CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES;

#[test]
fn go_describes_what_was_asked_for_and_starts_transmission() {
    let exports = [export("a", false), export("b", false)];
    let wanted = [INFO_BLOCK_SIZE, INFO_NAME, INFO_DESCRIPTION, 77];
    let input = option(OPT_GO, &info_data("b", &wanted));
    let (end, output) = run(&exports, BOTH, &input);
    assert_eq!(end, Ok(plain(1)));
    let replies = replies(output);
    let infos: Vec<&[u8]> = replies.iter().map(|(_, _, body)| &body[..]).collect();
    assert_eq!(infos[0][..10], [0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0]);
    assert_eq!(infos[0][10..], 0b1101_0110_1101_u16.to_be_bytes());
    assert_eq!(infos[1], b"\0\x01b");
    assert_eq!(infos[2], b"\0\x02about b");
    assert_eq!(infos[3], b"\0\x03\0\0\0\x01\0\0\x10\0\x02\0\0\0");
    assert_eq!(replies[4], (OPT_GO, REP_ACK, vec![]));
}

#[test]
fn go_without_requests_sends_only_the_export() {
    let (_, output) = run(&[export("a", false)], BOTH, &option(OPT_GO, &info_data("a", &[])));
    assert_eq!(kinds(output), [REP_INFO, REP_ACK]);
}

#[test]
fn info_answers_the_same_but_goes_on() {
    let (end, output) = run(&[export("a", false)], BOTH, &option(OPT_INFO, &info_data("a", &[])));
    assert_eq!(end, Ok(Progress::NeedInput));
    assert_eq!(kinds(output), [REP_INFO, REP_ACK]);
}

#[test]
fn the_empty_name_means_the_only_export() {
    let go = option(OPT_GO, &info_data("", &[INFO_NAME]));
    let (end, output) = run(&[export("a", false)], BOTH, &go);
    assert_eq!(end, Ok(plain(0)));
    assert_eq!(replies(output)[1].2, b"\0\x01a");

    let (end, output) = run(&[export("a", false), export("b", false)], BOTH, &go);
    assert_eq!(end, Ok(Progress::NeedInput));
    assert_eq!(kinds(output), [REP_ERR_UNKNOWN]);
}

#[test]
fn the_empty_name_means_the_default_where_there_is_one() {
    let exports = [export("a", false), export("b", false)];
    for (default_export, expected) in [("b", Ok(plain(1))), ("gone", Ok(Progress::NeedInput))] {
        let offer = Offer { default_export: Some(default_export), ..offer(&exports) };
        let mut handshake = Handshake::new(offer, Client::default());
        feed(&mut handshake, &BOTH.to_be_bytes()).0.unwrap();
        let (end, output) = feed(&mut handshake, &option(OPT_GO, &info_data("", &[INFO_NAME])));
        assert_eq!(end, expected);
        if end == Ok(plain(1)) {
            assert_eq!(replies(output)[1].2, b"\0\x01b");
        }
    }
}

#[test]
fn a_read_only_export_says_so_and_offers_no_changes() {
    let flags = transmission_flags(&export("a", true), ReplyStyle::Extended, true);
    assert_ne!(flags & TRANSMISSION_READ_ONLY, 0);
    let changes = TRANSMISSION_SEND_TRIM | TRANSMISSION_SEND_WRITE_ZEROES | TRANSMISSION_SEND_FAST_ZERO;
    assert_eq!(flags & changes, 0);
}

#[test]
fn flags_are_offered_only_with_what_they_need() {
    let rotating = ExportInfo { rotational: true, ..export("a", false) };
    let flags = |style, has_context| transmission_flags(&rotating, style, has_context);
    let simple = flags(ReplyStyle::Simple, true);
    assert_ne!(simple & TRANSMISSION_ROTATIONAL, 0);
    let chunks = TRANSMISSION_SEND_DF | TRANSMISSION_BLOCK_STATUS_PAYLOAD;
    assert_eq!(simple & chunks, 0);
    assert_eq!(flags(ReplyStyle::Structured, true) & chunks, TRANSMISSION_SEND_DF);
    assert_eq!(flags(ReplyStyle::Extended, false) & chunks, TRANSMISSION_SEND_DF);
    assert_eq!(flags(ReplyStyle::Extended, true) & chunks, chunks);
}

#[test]
fn replies_in_chunks_are_agreed_on() {
    let exports = [export("a", false)];
    let go = option(OPT_GO, &info_data("a", &[]));
    for (asked, answers, style) in [
        (&[OPT_STRUCTURED_REPLY][..], &[REP_ACK][..], ReplyStyle::Structured),
        (&[OPT_EXTENDED_HEADERS], &[REP_ACK], ReplyStyle::Extended),
        (&[OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS], &[REP_ACK, REP_ACK], ReplyStyle::Extended),
        (&[OPT_EXTENDED_HEADERS, OPT_STRUCTURED_REPLY], &[REP_ACK, REP_ERR_EXT_HEADER_REQD], ReplyStyle::Extended),
    ] {
        let mut input: Vec<u8> = asked.iter().flat_map(|number| option(*number, b"")).collect();
        input.extend(&go);
        let (end, output) = run(&exports, BOTH, &input);
        assert_eq!(end, Ok(Progress::Chosen(Agreement { export: 0, style, has_context: false })));
        assert_eq!(kinds(output)[..answers.len()], *answers);
    }
    for number in [OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS] {
        let mut input = option(number, b"x");
        input.extend(&go);
        let (end, output) = run(&exports, BOTH, &input);
        assert_eq!((end, kinds(output)[0]), (Ok(plain(0)), REP_ERR_INVALID));
    }
    let mut old_way = option(OPT_EXTENDED_HEADERS, b"");
    old_way.extend(option(OPT_EXPORT_NAME, b"a"));
    assert_eq!(run(&exports, BOTH, &old_way).0, Err(HandshakeError::ExportNameAfterExtended));
}

#[test]
fn list_names_every_export() {
    let exports = [export("a", false), export("b", false)];
    let (_, output) = run(&exports, BOTH, &option(OPT_LIST, b""));
    assert_eq!(
        replies(output),
        [
            (OPT_LIST, REP_SERVER, b"\0\0\0\x01aabout a".to_vec()),
            (OPT_LIST, REP_SERVER, b"\0\0\0\x01babout b".to_vec()),
            (OPT_LIST, REP_ACK, vec![]),
        ]
    );
    let (_, output) = run(&exports, BOTH, &option(OPT_LIST, b"x"));
    assert_eq!(kinds(output), [REP_ERR_INVALID]);
}

#[test]
fn export_name_sends_zeroes_unless_both_sides_leave_them_out() {
    let input = option(OPT_EXPORT_NAME, b"a");
    let exports = [export("a", false)];
    let (end, output) = run(&exports, CLIENT_FIXED_NEWSTYLE, &input);
    assert_eq!((end, output.len()), (Ok(plain(0)), 10 + 124));
    let (end, output) = run(&exports, BOTH, &input);
    assert_eq!((end, output.len()), (Ok(plain(0)), 10));
    let (end, _) = run(&exports, BOTH, &option(OPT_EXPORT_NAME, b"z"));
    assert_eq!(end, Err(HandshakeError::UnknownExport));
}

#[test]
fn unknown_options_are_refused_and_their_data_is_passed_over() {
    // PEEK_EXPORT, which was withdrawn, and some nobody knows.
    for number in [4, 12, 0x7fff_ffff] {
        let mut input = option(number, &vec![0xee; OPTION_DISCARD_BYTES_MAX as usize]);
        input.extend(option(OPT_LIST, b""));
        let (end, output) = run(&[], BOTH, &input);
        assert_eq!(end, Ok(Progress::NeedInput));
        assert_eq!(kinds(output), [REP_ERR_UNSUP, REP_ACK]);
    }
}

#[test]
fn abort_is_acknowledged() {
    let (end, output) = run(&[], BOTH, &option(OPT_ABORT, b""));
    assert_eq!(end, Ok(Progress::Aborted));
    assert_eq!(replies(output), [(OPT_ABORT, REP_ACK, vec![])]);
    let (end, _) = run(&[], BOTH, &option(OPT_ABORT, &vec![0; OPTION_DATA_BYTES_MAX as usize + 1]));
    assert_eq!(end, Ok(Progress::Aborted));
}

#[test]
fn lengths_that_do_not_add_up_are_invalid_and_too_long_ones_too_big() {
    let exports = [export("a", false)];
    let mut huge_name = info_data("a", &[]);
    huge_name[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut extra = info_data("a", &[]);
    extra.push(0);
    for data in [huge_name, extra, vec![], vec![0; 5]] {
        let (end, output) = run(&exports, BOTH, &option(OPT_GO, &data));
        assert_eq!(end, Ok(Progress::NeedInput));
        assert_eq!(kinds(output), [REP_ERR_INVALID], "{data:?}");
    }
    let long = info_data(&"n".repeat(STRING_BYTES_MAX + 1), &[]);
    let too_long = vec![0; OPTION_DATA_BYTES_MAX as usize + 1];
    for data in [long, too_long] {
        let (end, output) = run(&exports, BOTH, &option(OPT_INFO, &data));
        assert_eq!(end, Ok(Progress::NeedInput));
        assert_eq!(kinds(output), [REP_ERR_TOO_BIG]);
    }
}

#[test]
fn breaking_the_protocol_ends_the_handshake() {
    let (end, _) = run(&[], 4, &[]);
    assert_eq!(end, Err(HandshakeError::ClientFlags { flags: 4 }));
    let (end, _) = run(&[], BOTH, &[0; 16]);
    assert_eq!(end, Err(HandshakeError::OptionMagic { found: 0 }));
    let mut long = option(OPT_LIST, b"");
    long[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    let length = u32::MAX;
    let expected = HandshakeError::OptionTooLong { option: OPT_LIST, length };
    assert_eq!(run(&[], BOTH, &long).0, Err(expected));
    let many = option(OPT_LIST, b"").repeat(OPTIONS_MAX as usize + 1);
    assert_eq!(run(&[], BOTH, &many).0, Err(HandshakeError::TooManyOptions));
}

#[test]
fn input_may_arrive_byte_by_byte() {
    let exports = [export("a", false)];
    let mut handshake = Handshake::new(offer(&exports), Client::default());
    let mut bytes = BOTH.to_be_bytes().to_vec();
    bytes.extend(option(99, b"data"));
    bytes.extend(option(OPT_GO, &info_data("a", &[])));
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let mut end = Progress::NeedInput;
    for byte in bytes {
        assert_eq!(end, Progress::NeedInput);
        input.put_u8(byte);
        loop {
            end = handshake.advance(&mut input, &mut output).unwrap();
            if end != Progress::Again {
                break;
            }
        }
    }
    assert_eq!(end, plain(0));
    assert_eq!(kinds(output), [REP_ERR_UNSUP, REP_INFO, REP_ACK]);
}

fn chunk() -> impl Strategy<Value = Vec<u8>> {
    let noise = prop::collection::vec(any::<u8>(), 0..64);
    let framed = (0u32..12, prop::collection::vec(any::<u8>(), 0..64)).prop_map(|(number, data)| option(number, &data));
    let claimed = (0u32..12, any::<u32>()).prop_map(|(number, length)| {
        let mut bytes = option(number, b"");
        bytes[12..].copy_from_slice(&length.to_be_bytes());
        bytes
    });
    prop_oneof![noise, framed, claimed]
}

proptest! {
    /// Arbitrary bytes end in an outcome, and neither output nor memory grows beyond what was sent.
    #[test]
    fn arbitrary_bytes_do_no_harm(
        flags in 0u32..5,
        tls in prop_oneof![Just(TlsMode::Off), Just(TlsMode::On), Just(TlsMode::Require)],
        chunks in prop::collection::vec(chunk(), 0..8),
    ) {
        let exports = [export("a", false), export("b", true)];
        let offer = Offer { default_export: Some("b"), tls, ..offer(&exports) };
        let mut handshake = Handshake::new(offer, Client::default());
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        input.put_u32(flags);
        'chunks: for bytes in chunks {
            input.extend_from_slice(&bytes);
            let mut calls = 0;
            loop {
                calls += 1;
                prop_assert!(calls < 100, "no progress");
                let before = output.len();
                match handshake.advance(&mut input, &mut output) {
                    Ok(Progress::Again) => prop_assert!(output.len() - before < 1024),
                    Ok(Progress::NeedInput) => break,
                    Ok(Progress::StartTls) => {
                        prop_assert!(tls != TlsMode::Off && input.is_empty());
                        handshake.on_tls(vec![]);
                    }
                    Ok(Progress::Chosen(agreement)) => {
                        prop_assert!(tls != TlsMode::Require || handshake.client.is_tls);
                        prop_assert!(!agreement.has_context || agreement.style != ReplyStyle::Simple);
                        break 'chunks;
                    }
                    Ok(Progress::Aborted) | Err(_) => break 'chunks,
                }
            }
        }
        prop_assert!(output.capacity() < 16 << 10);
    }
}
