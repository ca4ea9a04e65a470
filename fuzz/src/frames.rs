//! Frames between engine and agents, as either side reads them: nothing panics, and what is understood is understood
//! the same when it is sent on.

use bytes::Bytes;
use protocol::wire::{Frame, PREFIX_BYTES, Prefix, frame_to_agent, frame_to_engine};
use protocol::{ToAgent, ToEngine};

use super::input::Input;

pub fn run(input: &[u8]) {
    read_stream(input);
    let mut input = Input::new(input);
    while !input.is_empty() {
        let (number, body, bulk) = input.message();
        if let Ok(message) = ToAgent::decode(number, body, bulk.clone()) {
            let (prefix, rest) = whole(&frame_to_agent(&message));
            assert_eq!(prefix.to_agent(rest).expect("what was sent is understood"), message);
        }
        if let Ok(message) = ToEngine::decode(number, body, bulk) {
            let (prefix, rest) = whole(&frame_to_engine(&message));
            assert_eq!(prefix.to_engine(rest).expect("what was sent is understood"), message);
        }
    }
}

/// The bytes as they come off a connection.
fn read_stream(mut bytes: &[u8]) {
    while let Some((prefix, rest)) = bytes.split_first_chunk::<PREFIX_BYTES>() {
        let Ok(prefix) = Prefix::decode(prefix) else { return };
        let Some((frame, behind)) = rest.split_at_checked(prefix.rest_bytes()) else { return };
        let frame = Bytes::copy_from_slice(frame);
        // One side or the other refuses it, or both do.
        let _ = prefix.to_agent(frame.clone());
        let _ = prefix.to_engine(frame);
        bytes = behind;
    }
}

fn whole(frame: &Frame) -> (Prefix, Bytes) {
    let bytes = Bytes::from([&frame.head[..], &frame.bulk[..]].concat());
    let prefix = bytes.first_chunk::<PREFIX_BYTES>().expect("a frame begins with its prefix");
    (Prefix::decode(prefix).expect("a frame that was made here"), bytes.slice(PREFIX_BYTES..))
}
