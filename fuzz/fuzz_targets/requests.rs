#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| nbdcast_fuzz::requests::run(input));
