//! The bytes of a client in the handshake: nothing panics, little is kept, and how the bytes are cut on their way makes
//! no difference.

use bytes::BytesMut;
use nbdcast::nbd::ExportInfo;
use nbdcast::nbd::access::{AccessRules, Client, Network};
use nbdcast::nbd::constants::{OPTION_DATA_BYTES_MAX, OPTION_HEADER_BYTES, OPTIONS_MAX};
use nbdcast::nbd::handshake::{Handshake, HandshakeError, Offer, Progress, TlsMode};

/// What a handshake came to, and everything that the server said.
type Outcome = (Result<Progress, HandshakeError>, Vec<u8>);

/// One that everybody may use, one for a certificate's name, one for an address that nobody here has.
pub fn exports() -> [ExportInfo; 3] {
    let named = |name: &str| ExportInfo {
        name: name.to_owned(),
        description: "a disk".to_owned(),
        size_bytes: 1 << 40,
        ..ExportInfo::default()
    };
    let network = Network { address: [192, 0, 2, 0].into(), prefix_bits: 24 };
    [
        named("a"),
        ExportInfo {
            access: AccessRules { addresses: Vec::new(), names: vec!["client".to_owned()] },
            read_only: true,
            ..named("b")
        },
        ExportInfo { access: AccessRules { addresses: vec![network], names: Vec::new() }, ..named("c") },
    ]
}

pub fn offer(exports: &[ExportInfo], setup: u8) -> Offer<'_> {
    Offer {
        exports: exports.iter().collect(),
        default_export: (setup & 4 != 0).then_some("a"),
        tls: [TlsMode::Off, TlsMode::On, TlsMode::Require][usize::from(setup % 3)],
    }
}

pub fn client() -> Client {
    Client { address: Some([127, 0, 0, 1].into()), is_tls: false, names: Vec::new() }
}

/// What one answer may come to: three exports with short names, or one option's refusal.
pub const ANSWER_BYTES_MAX: usize = 1 << 10;

pub fn run(input: &[u8]) {
    let Some((setup, bytes)) = input.split_first() else { return };
    let piece_bytes = usize::from(setup >> 3) + 1;
    let whole = talk(*setup, bytes, bytes.len().max(1));
    let cut = talk(*setup, bytes, piece_bytes);
    // Bytes behind STARTTLS may have come with it or after it.
    let is_tls =
        |outcome: &Outcome| matches!(outcome.0, Ok(Progress::StartTls) | Err(HandshakeError::InputBehindStartTls));
    if !is_tls(&whole) && !is_tls(&cut) {
        assert_eq!(whole, cut);
    }
}

fn talk(setup: u8, bytes: &[u8], piece_bytes: usize) -> Outcome {
    let exports = exports();
    let mut handshake = Handshake::new(offer(&exports, setup), client());
    let (mut buffered, mut said) = (BytesMut::new(), Vec::new());
    let (mut pieces, mut output) = (bytes.chunks(piece_bytes), BytesMut::new());
    let mut steps = 0;
    loop {
        let progress = handshake.advance(&mut buffered, &mut output);
        assert!(output.len() <= ANSWER_BYTES_MAX, "one answer of {} bytes", output.len());
        said.extend_from_slice(&output.split());
        steps += 1;
        assert!(steps <= bytes.len() + 2 * OPTIONS_MAX as usize + 2, "no progress");
        match progress {
            Ok(Progress::Again) => {}
            Ok(Progress::NeedInput) => {
                if piece_bytes < bytes.len() {
                    let max = OPTION_HEADER_BYTES + OPTION_DATA_BYTES_MAX as usize;
                    assert!(buffered.len() < max, "{} bytes are kept", buffered.len());
                }
                let Some(piece) = pieces.next() else { return (progress, said) };
                buffered.extend_from_slice(piece);
            }
            Ok(Progress::Aborted | Progress::StartTls | Progress::Chosen(_)) | Err(_) => return (progress, said),
        }
    }
}
