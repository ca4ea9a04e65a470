//! Clients that ask what is data copy only that, and lose nothing: what nbdinfo, qemu-img and nbdcopy make of the answers.

use std::os::unix::fs::MetadataExt;

use serde_json::Value;

use crate::clients::Demo;
use crate::scratch;
use crate::tools;

const SIZE: u64 = 256 << 20;
/// Whole blocks that hold something, first byte and length.
const WRITTEN: [(u64, u64); 3] = [(1 << 20, 64 << 10), (100 << 20, 4096), (SIZE - 8192, 8192)];

/// The parts of a map that may hold something. The map must cover the export without gaps.
fn data(map: &str, keys: [&str; 2], is_zero: impl Fn(&Value) -> bool) -> Vec<(u64, u64)> {
    let parts: Vec<Value> = serde_json::from_str(map).expect("a map in JSON");
    let mut end = 0;
    let mut found: Vec<(u64, u64)> = Vec::new();
    for part in &parts {
        let [start, length] = keys.map(|key| part[key].as_u64().expect("a number"));
        assert_eq!(start, end, "the parts follow each other: {map}");
        end += length;
        match found.last_mut() {
            _ if is_zero(part) => {}
            Some(last) if last.0 + last.1 == start => last.1 += length,
            Some(_) | None => found.push((start, length)),
        }
    }
    assert_eq!(end, SIZE, "the map covers the export: {map}");
    found
}

fn nbdinfo_data(demo: &Demo) -> Vec<(u64, u64)> {
    let map = tools::run("nbdinfo", |command| {
        command.args(["--map", "--json"]).arg(demo.uri());
    });
    data(&map, ["offset", "length"], |part| part["type"].as_u64().is_some_and(|kind| kind & 2 != 0))
}

#[test]
fn clients_see_what_is_data_and_copy_nothing_else() {
    let _turn = scratch::shared_machine();
    let mut demo = Demo::start(SIZE);
    assert_eq!(nbdinfo_data(&demo), [], "a new volume is empty");
    let mut client = demo.connect();
    for (offset, length) in WRITTEN {
        client.write(offset, &vec![0x5a; length as usize], 0).expect("a write");
    }
    client.write(50 << 20, &[0; 65536], 0).expect("zeroes, written as data");
    assert_eq!(nbdinfo_data(&demo), WRITTEN, "as soon as the writes were answered");
    let map = tools::run("qemu-img", |command| {
        command.args(["map", "--output=json", "-f", "raw"]).arg(demo.uri());
    });
    assert_eq!(data(&map, ["start", "length"], |part| part["zero"] == true), WRITTEN);
    let copy = demo.scratch().join("copy");
    tools::run("nbdcopy", |command| {
        command.arg(demo.uri()).arg(&copy);
    });
    let taken = std::fs::metadata(&copy).expect("the copy").blocks() * 512;
    assert!(taken < 2 << 20, "the copy is as sparse as the volume: it takes {taken} bytes");
    client.disconnect();
    let image = demo.stop();
    assert!(std::fs::read(&copy).expect("the copy") == image, "the copy is the volume");
}
