//! Tables of requests and their verdicts, and that no bytes lead outside the export.

use super::*;
use crate::nbd::reply::{ReplyStyle, WireError};
use proptest::prelude::*;

const SIZE: u64 = 8 << 30;
const RULES: ExportRules =
    ExportRules { size_bytes: SIZE, read_only: false, style: ReplyStyle::Simple, has_context: false };
const STRUCTURED: ExportRules = ExportRules { style: ReplyStyle::Structured, has_context: true, ..RULES };
const EXTENDED: ExportRules = ExportRules { style: ReplyStyle::Extended, has_context: true, ..RULES };

fn header(command: u16, flags: u16, offset: u64, length: u32) -> RequestHeader {
    RequestHeader { extended: false, flags, command, cookie: 7, offset, length: length.into() }
}

fn extended(command: u16, flags: u16, offset: u64, length: u64) -> RequestHeader {
    RequestHeader { extended: true, flags, command, cookie: 7, offset, length }
}

fn outcome(verdict: Verdict) -> Verdict {
    match verdict {
        // Which fault it is, is for logs.
        Verdict::Reject(refusal) => Verdict::Reject(Refusal { fault: Fault::UnknownCommand, ..refusal }),
        other => other,
    }
}

fn check(command: u16, flags: u16, offset: u64, length: u32) -> Verdict {
    outcome(judge(&header(command, flags, offset, length), RULES, false))
}

fn check_structured(command: u16, flags: u16, offset: u64, length: u32) -> Verdict {
    outcome(judge(&header(command, flags, offset, length), STRUCTURED, false))
}

fn check_extended(command: u16, flags: u16, offset: u64, length: u64) -> Verdict {
    outcome(judge(&extended(command, flags, offset, length), EXTENDED, false))
}

const fn reject(error: WireError) -> Verdict {
    Verdict::Reject(Refusal { fault: Fault::UnknownCommand, error })
}

const EINVAL: Verdict = reject(WireError::Invalid);
const ENOSPC: Verdict = reject(WireError::NoSpace);
const EOVERFLOW: Verdict = reject(WireError::Overflow);

#[test]
fn past_the_end_depends_on_the_command() {
    for (command, expected) in
        [(CMD_READ, EINVAL), (CMD_TRIM, EINVAL), (CMD_CACHE, EINVAL), (CMD_WRITE, ENOSPC), (CMD_WRITE_ZEROES, ENOSPC)]
    {
        assert_eq!(check(command, 0, SIZE - 512, 513), expected);
        assert_eq!(check(command, 0, u64::MAX - 10, 512), expected);
        assert_eq!(check(command, 0, SIZE + 1, 0), expected);
        assert_eq!(check(command, 0, SIZE, 0), Verdict::Nothing);
    }
    assert_eq!(check_structured(CMD_BLOCK_STATUS, 0, SIZE - 512, 513), EINVAL);
    assert_eq!(check_extended(CMD_TRIM, 0, 1, u64::MAX), EINVAL);
}

#[test]
fn the_last_byte_and_odd_ranges_are_fine() {
    let read = Operation::Read { length: 1, unfragmented: false };
    assert_eq!(check(CMD_READ, 0, SIZE - 1, 1), Verdict::Submit(read));
    let write = Operation::Write { length: 511, fua: false };
    assert_eq!(check(CMD_WRITE, 0, 3, 511), Verdict::Submit(write));
}

#[test]
fn fua_is_legal_everywhere_and_acts_on_changes() {
    let read = Operation::Read { length: 1, unfragmented: false };
    assert_eq!(check(CMD_READ, 1, 0, 1), Verdict::Submit(read));
    assert_eq!(check(CMD_FLUSH, 1, 0, 0), Verdict::Submit(Operation::Flush));
    assert_eq!(check(CMD_CACHE, 1, 0, 1), Verdict::Submit(Operation::Cache));
    assert_eq!(check(CMD_DISC, 1, 0, 0), Verdict::Disconnect);
    let write = Operation::Write { length: 1, fua: true };
    assert_eq!(check(CMD_WRITE, 1, 0, 1), Verdict::Submit(write));
    assert_eq!(check(CMD_TRIM, 1, 0, 1), Verdict::Submit(Operation::Trim { fua: true }));
    let zeroes = Operation::WriteZeroes { fua: true, no_hole: true };
    assert_eq!(check(CMD_WRITE_ZEROES, 3, 0, 1), Verdict::Submit(zeroes));
    let status = Operation::BlockStatus { one: false };
    assert_eq!(check_structured(CMD_BLOCK_STATUS, 1, 0, 1), Verdict::Submit(status));
}

#[test]
fn zeroing_is_fast() {
    let zeroes = Operation::WriteZeroes { fua: false, no_hole: false };
    assert_eq!(check(CMD_WRITE_ZEROES, CMD_FLAG_FAST_ZERO, 0, u32::MAX), Verdict::Submit(zeroes));
}

#[test]
fn unknown_commands_and_flags_are_invalid() {
    for command in [8, 9, u16::MAX] {
        assert_eq!(check(command, 0, 0, 1), EINVAL, "command {command}");
    }
    for (command, flags) in [
        (CMD_READ, CMD_FLAG_DF),
        (CMD_READ, 1 << 6),
        (CMD_WRITE, CMD_FLAG_NO_HOLE),
        (CMD_WRITE, CMD_FLAG_PAYLOAD_LEN),
        (CMD_WRITE_ZEROES, CMD_FLAG_REQ_ONE),
        (CMD_CACHE, CMD_FLAG_NO_HOLE),
        (CMD_TRIM, CMD_FLAG_FAST_ZERO),
    ] {
        assert_eq!(check(command, flags, 0, 1), EINVAL);
    }
    assert_eq!(check(CMD_FLUSH, 0, 0, 1), EINVAL);
    assert_eq!(check(CMD_FLUSH, 0, 1, 0), EINVAL);
}

#[test]
fn do_not_fragment_needs_chunks() {
    let read = Operation::Read { length: 1, unfragmented: true };
    assert_eq!(check_structured(CMD_READ, CMD_FLAG_DF, 0, 1), Verdict::Submit(read));
    assert_eq!(check_extended(CMD_READ, CMD_FLAG_DF, 0, 1), Verdict::Submit(read));
}

#[test]
fn the_maximum_payload_binds_reads_and_writes_only() {
    for command in [CMD_READ, CMD_WRITE] {
        let fits = check(command, 0, 0, PAYLOAD_BYTES_MAX);
        assert!(matches!(fits, Verdict::Submit(_)));
        assert_eq!(check(command, 0, 0, PAYLOAD_BYTES_MAX + 1), EINVAL);
    }
    for command in [CMD_TRIM, CMD_WRITE_ZEROES, CMD_CACHE] {
        assert!(matches!(check(command, 0, 0, u32::MAX), Verdict::Submit(_)));
        assert!(matches!(check_extended(command, 0, 0, SIZE), Verdict::Submit(_)));
    }
    assert_eq!(check(CMD_WRITE, 0, 0, u32::MAX), Verdict::HangUp);
    assert_eq!(check(CMD_READ, 0, 0, u32::MAX), EINVAL);
    assert_eq!(check_structured(CMD_READ, 0, 0, u32::MAX), EOVERFLOW);
    assert_eq!(check_extended(CMD_READ, 0, 0, u64::MAX), EOVERFLOW);
}

#[test]
fn with_extended_headers_a_flag_says_whether_there_is_a_payload() {
    let write = Operation::Write { length: 512, fua: false };
    assert_eq!(check_extended(CMD_WRITE, CMD_FLAG_PAYLOAD_LEN, 0, 512), Verdict::Submit(write));
    // QEMU 10 leaves it out together with FUA.
    let with_fua = Operation::Write { length: 512, fua: true };
    assert_eq!(check_extended(CMD_WRITE, CMD_FLAG_FUA, 0, 512), Verdict::Submit(with_fua));
    assert_eq!(extended(CMD_WRITE, CMD_FLAG_FUA, 0, 512).payload_bytes(), 512);
    assert_eq!(extended(CMD_READ, 0, 0, 512).payload_bytes(), 0);
    // Consumed, then refused.
    for command in [CMD_READ, CMD_TRIM, CMD_FLUSH, CMD_CACHE, CMD_WRITE_ZEROES, 99] {
        assert_eq!(check_extended(command, CMD_FLAG_PAYLOAD_LEN, 0, 512), EINVAL);
        assert_eq!(extended(command, CMD_FLAG_PAYLOAD_LEN, 0, 512).payload_bytes(), 512);
        let too_long = u64::from(PAYLOAD_BYTES_MAX) + 1;
        assert_eq!(check_extended(command, CMD_FLAG_PAYLOAD_LEN, 0, too_long), Verdict::HangUp);
    }
}

#[test]
fn block_status_needs_a_context_and_something_to_tell_of() {
    assert_eq!(check(CMD_BLOCK_STATUS, 0, 0, 1), EINVAL);
    let none = ExportRules { has_context: false, ..STRUCTURED };
    assert_eq!(outcome(judge(&header(CMD_BLOCK_STATUS, 0, 0, 1), none, false)), EINVAL);
    assert_eq!(check_structured(CMD_BLOCK_STATUS, 0, 0, 0), EINVAL);
    let one = Operation::BlockStatus { one: true };
    assert_eq!(check_structured(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 0, 1), Verdict::Submit(one));
    assert_eq!(check_extended(CMD_BLOCK_STATUS, CMD_FLAG_REQ_ONE, 0, SIZE), Verdict::Submit(one));
}

#[test]
fn block_status_takes_a_list_of_the_one_context() {
    assert_eq!(check_extended(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 4096, 12), Verdict::ReadFilter);
    for length in [0, 1, 8, 11, 16, 4096] {
        assert_eq!(check_extended(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 4096, length), EINVAL, "{length}");
    }
    let asked = extended(CMD_BLOCK_STATUS, CMD_FLAG_PAYLOAD_LEN, 4096, 12);
    let mut payload = [0; CONTEXT_FILTER_BYTES];
    payload[..8].copy_from_slice(&(1_u64 << 32).to_be_bytes());
    payload[8..].copy_from_slice(&CONTEXT_ALLOCATION_ID.to_be_bytes());
    let filtered = asked.with_filter(&payload).unwrap();
    assert_eq!(filtered, extended(CMD_BLOCK_STATUS, 0, 4096, 1 << 32));
    let status = Operation::BlockStatus { one: false };
    assert_eq!(judge(&filtered, EXTENDED, false), Verdict::Submit(status));
    payload[11] ^= 0xff;
    assert_eq!(asked.with_filter(&payload), None);
}

#[test]
fn a_read_only_export_refuses_changes_and_nothing_else() {
    let rules = ExportRules { read_only: true, ..STRUCTURED };
    for command in [CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES] {
        let verdict = judge(&header(command, 0, 0, 1), rules, false);
        assert_eq!(outcome(verdict), reject(WireError::NotPermitted));
    }
    for (command, length) in [(CMD_READ, 1), (CMD_FLUSH, 0), (CMD_CACHE, 1), (CMD_BLOCK_STATUS, 1)] {
        let verdict = judge(&header(command, 0, 0, length), rules, false);
        assert!(matches!(verdict, Verdict::Submit(_)));
    }
}

#[test]
fn a_stopping_server_refuses_all_but_goodbye() {
    for command in [CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM, CMD_CACHE, CMD_WRITE_ZEROES, CMD_BLOCK_STATUS] {
        let verdict = judge(&header(command, 0, 0, 0), STRUCTURED, true);
        assert_eq!(verdict, Verdict::Reject(Refusal::STOPPING));
    }
    let goodbye = judge(&header(CMD_DISC, 0, 0, 0), RULES, true);
    assert_eq!(goodbye, Verdict::Disconnect);
}

#[test]
fn a_wrong_magic_is_out_of_step() {
    let found = RequestHeader::parse(&[0; REQUEST_HEADER_BYTES]);
    assert_eq!(found, Err(BadMagic { found: 0, expected: REQUEST_MAGIC }));
    let mut compact = [0; EXTENDED_REQUEST_HEADER_BYTES];
    compact[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    let expected = EXTENDED_REQUEST_MAGIC;
    assert_eq!(RequestHeader::parse_extended(&compact), Err(BadMagic { found: REQUEST_MAGIC, expected }));
}

#[test]
fn extended_headers_hold_64_bit_lengths() {
    let bytes = *b"\x21\xe4\x1c\x71\0\x20\0\x07\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\x10\0\0\0\0\x01\0\0\0\0";
    let expected = RequestHeader {
        extended: true,
        flags: CMD_FLAG_PAYLOAD_LEN,
        command: CMD_BLOCK_STATUS,
        cookie: 0x0102_0304_0506_0708,
        offset: 4096,
        length: 1 << 32,
    };
    assert_eq!(RequestHeader::parse_extended(&bytes), Ok(expected));
}

fn rules() -> impl Strategy<Value = ExportRules> {
    let size_bytes = prop_oneof![0u64..1000, any::<u64>()];
    let style = prop_oneof![Just(ReplyStyle::Simple), Just(ReplyStyle::Structured), Just(ReplyStyle::Extended)];
    (size_bytes, any::<bool>(), style, any::<bool>()).prop_map(|(size_bytes, read_only, style, has_context)| {
        ExportRules { size_bytes, read_only, style, has_context }
    })
}

proptest! {
    /// Whatever is submitted lies inside the export and within the payload limit.
    #[test]
    fn arbitrary_requests_are_judged_safely(
        tail in prop::array::uniform28(any::<u8>()),
        command in prop_oneof![0u16..10, any::<u16>()],
        flags in prop_oneof![Just(0u16), Just(CMD_FLAG_PAYLOAD_LEN), any::<u16>()],
        length in prop_oneof![0u64..1000, any::<u64>()],
        rules in rules(),
    ) {
        let mut bytes = [0; EXTENDED_REQUEST_HEADER_BYTES];
        bytes[4..].copy_from_slice(&tail);
        bytes[4..6].copy_from_slice(&flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&command.to_be_bytes());
        let header = if rules.style == ReplyStyle::Extended {
            bytes[..4].copy_from_slice(&EXTENDED_REQUEST_MAGIC.to_be_bytes());
            bytes[24..].copy_from_slice(&length.to_be_bytes());
            RequestHeader::parse_extended(&bytes).unwrap()
        } else {
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            bytes[24..28].copy_from_slice(&(length as u32).to_be_bytes());
            RequestHeader::parse(bytes.first_chunk().unwrap()).unwrap()
        };
        match judge(&header, rules, false) {
            Verdict::Submit(operation) => {
                prop_assert!(!(rules.read_only && operation.is_change()));
                let end = u128::from(header.offset) + u128::from(header.length);
                prop_assert!(end <= u128::from(rules.size_bytes));
                if let Operation::Read { length, .. } | Operation::Write { length, .. } = operation {
                    prop_assert!(length <= PAYLOAD_BYTES_MAX && length > 0 && u64::from(length) == header.length);
                }
                let is_write = matches!(operation, Operation::Write { .. });
                prop_assert_eq!(header.payload_bytes(), if is_write { header.length } else { 0 });
            }
            Verdict::ReadFilter => prop_assert_eq!(header.payload_bytes(), CONTEXT_FILTER_BYTES as u64),
            Verdict::Nothing => prop_assert_eq!(header.payload_bytes(), 0),
            Verdict::Reject(_) => prop_assert!(header.payload_bytes() <= u64::from(REJECTED_PAYLOAD_BYTES_MAX)),
            Verdict::Disconnect | Verdict::HangUp => {}
        }
    }
}
