//! The inputs that fuzzing kept, replayed: each was new to the code when it was found, and some were found to break it.
//! `scripts/fuzz` makes more of them.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::path::Path;

/// Inputs as `scripts/fuzz` keeps them: one in each line, in hexadecimal digits.
fn replay(target: &str, run: fn(&[u8])) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(format!("{target}.hex"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut replayed = 0;
    for (number, line) in (1..).zip(text.lines()) {
        let input = bytes_of(line).unwrap_or_else(|| panic!("{}:{number} is no input", path.display()));
        // With the line in the output, a failure can be found again.
        println!("fuzz/corpus/{target}.hex:{number}");
        run(&input);
        replayed += 1;
    }
    assert!(replayed >= 50, "only {replayed} inputs in {}", path.display());
}

fn bytes_of(digits: &str) -> Option<Vec<u8>> {
    let pairs = digits.as_bytes().chunks(2);
    pairs.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok().filter(|_| pair.len() == 2)).collect()
}

#[test]
fn bytes_of_a_client_in_the_handshake() {
    replay("handshake", targets::handshake::run);
}

#[test]
fn options_of_a_client_in_the_handshake() {
    replay("options", targets::options::run);
}

#[test]
fn requests_and_what_is_answered_to_them() {
    replay("requests", targets::requests::run);
}

#[test]
fn frames_between_engine_and_agents() {
    replay("frames", targets::frames::run);
}

#[test]
fn a_replica_whose_engines_say_anything() {
    replay("replica", targets::replica::run);
}

#[test]
fn a_volume_whose_replicas_say_anything() {
    replay("volume", targets::volume::run);
}
