//! A client that speaks the handshake well and says anything in its options, also after STARTTLS: what it gets in the
//! end is an export that it may use.

use bytes::{BufMut, BytesMut};
use nbdcast::nbd::access::Permit;
use nbdcast::nbd::constants::{CLIENT_FIXED_NEWSTYLE, OPTION_DATA_BYTES_MAX, OPTION_MAGIC};
use nbdcast::nbd::handshake::{Handshake, Progress, TlsMode};

use super::handshake::{ANSWER_BYTES_MAX, client, exports, offer};
use super::input::Input;

pub fn run(input: &[u8]) {
    let mut input = Input::new(input);
    let setup = input.u8();
    let (exports, mut known) = (exports(), client());
    let offer = offer(&exports, setup);
    let tls = offer.tls;
    let mut handshake = Handshake::new(offer, known.clone());
    let (mut bytes, mut output) = (BytesMut::new(), BytesMut::new());
    bytes.put_u32(CLIENT_FIXED_NEWSTYLE | u32::from(setup >> 7 << 1));
    loop {
        output.clear();
        let Ok(progress) = handshake.advance(&mut bytes, &mut output) else { return };
        assert!(output.len() <= ANSWER_BYTES_MAX, "one answer of {} bytes", output.len());
        match progress {
            Progress::Again => {}
            Progress::NeedInput if input.is_empty() => return,
            Progress::NeedInput => put_option(&mut input, &mut bytes),
            Progress::Aborted => return,
            Progress::StartTls => {
                assert!(tls != TlsMode::Off && !known.is_tls, "TLS begins once, and only where it is offered");
                known.is_tls = true;
                known.names = if setup & 64 != 0 { vec!["client".to_owned()] } else { Vec::new() };
                handshake.on_tls(known.names.clone());
            }
            Progress::Chosen(agreement) => {
                assert_eq!(exports[agreement.export].access.judge(&known), Permit::Granted);
                assert!(tls != TlsMode::Require || known.is_tls, "nobody is served without TLS");
                return;
            }
        }
    }
}

/// One option; its data is built so that lengths often fit.
fn put_option(input: &mut Input<'_>, bytes: &mut BytesMut) {
    let option = match input.u8() {
        number @ 0..16 => u32::from(number),
        _ => input.u64() as u32,
    };
    let mut data = BytesMut::new();
    match input.u8() % 4 {
        0 => {
            let length = usize::from(input.u8());
            data.put_slice(input.take(length));
        }
        // A name, then information requests or queries.
        kind => {
            let name = [&b""[..], b"a", b"b", b"c", b"nowhere"][usize::from(input.u8() % 5)];
            data.put_u32(name.len() as u32);
            data.put_slice(name);
            let count = input.u8() % 8;
            if kind == 1 {
                data.put_u16(count.into());
                (0..count).for_each(|_| data.put_u16(u16::from(input.u8() % 6)));
            } else {
                data.put_u32(count.into());
                for _ in 0..count {
                    let query = [&b"base:"[..], b"base:allocation", b"qemu:", b"x", b""][usize::from(input.u8() % 5)];
                    data.put_u32(query.len() as u32 + u32::from(input.u8() == 255));
                    data.put_slice(query);
                }
            }
        }
    }
    assert!(data.len() <= OPTION_DATA_BYTES_MAX as usize);
    bytes.put_u64(OPTION_MAGIC);
    bytes.put_u32(option);
    bytes.put_u32(data.len() as u32);
    bytes.put_slice(&data);
}
