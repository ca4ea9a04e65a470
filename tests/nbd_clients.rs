//! Clients by other people against the volume in memory: libnbd asks for structured replies, QEMU for extended headers.

mod nbd_support;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use nbd_support::*;
use nbdcast::nbd::{Limits, Request};

const SIZE: u64 = 16 << 20;

/// Runs a client to its end, with Debian's python before any other; what it printed.
fn run(tool: &str, arguments: &[&str]) -> String {
    let place = Path::new("/usr/bin").join(tool);
    assert!(place.is_file(), "this test needs `{tool}`, which is not installed: run scripts/install-clients");
    let path = "/usr/bin:/usr/sbin:/bin:/sbin";
    let finished = Command::new(place).args(arguments).env("PATH", path).env("LC_ALL", "C").output().unwrap();
    let [output, errors] = [finished.stdout, finished.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(finished.status.success(), "{tool} {arguments:?} failed:\n{output}{errors}");
    output
}

fn volume_and_uri() -> (Arc<MemoryVolume>, Running, String) {
    let volume = MemoryVolume::new("demo", SIZE);
    let server = Running::on_tcp(&[&volume], Limits::default());
    let uri = server.server().uri("demo");
    (volume, server, uri)
}

/// One block of data at 1 MiB.
fn write_one_block(server: &Running) {
    assert_eq!(server.client("demo").write(0, 1 << 20, &[0xda; 4096]), 0);
}

#[test]
fn nbdinfo_shows_what_is_offered() {
    let (_volume, _server, uri) = volume_and_uri();
    let shown = run("nbdinfo", &["--json", &uri]);
    let document: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let export = &document["exports"][0];
    assert_eq!(document["structured"], true, "{document}");
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]), "{document}");
    for ability in ["can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn"] {
        assert_eq!(export[ability], true, "{ability}: {document}");
    }
    let listed = run("nbdinfo", &["--list", "--json", uri.trim_end_matches("/demo")]);
    assert!(listed.contains("base:allocation"), "{listed}");
}

#[test]
fn nbdinfo_maps_data_and_holes() {
    let (_volume, server, uri) = volume_and_uri();
    write_one_block(&server);
    let map: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--map", "--json", &uri])).unwrap();
    let extents: Vec<_> = map.as_array().unwrap().iter().map(|e| (e["length"].as_u64(), e["type"].as_u64())).collect();
    let expected = [(1 << 20, 3), (4096, 0), (SIZE - (1 << 20) - 4096, 3)];
    assert_eq!(extents, expected.map(|(length, kind)| (Some(length), Some(kind))));
}

#[test]
fn qemu_img_maps_and_compares() {
    let (_volume, server, uri) = volume_and_uri();
    write_one_block(&server);
    let map = run("qemu-img", &["map", "-f", "raw", "--output=json", &uri]);
    let extents: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data: Vec<_> = extents.as_array().unwrap().iter().filter(|extent| extent["data"] == true).collect();
    assert_eq!(data.len(), 1, "{map}");
    assert_eq!((&data[0]["start"], &data[0]["length"]), (&(1 << 20).into(), &4096.into()));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, &uri]);
}

/// Errors by name, as a client meets them that checks nothing itself.
const SCRIPT: &str = r#"
import sys

def outcome(function):
    try:
        function()
        return "ok"
    except nbd.Error as error:
        return error.errno

def check(what, function, expected):
    found = outcome(function)
    if found != expected:
        sys.exit("%s: %s instead of %s" % (what, found, expected))

h.set_strict_mode(0)
h.set_request_structured_replies(structured)
h.add_meta_context("base:allocation")
h.connect_uri(uri)
size = h.get_size()
check("replies", lambda: None, "ok" if h.get_structured_replies_negotiated() == structured else "other replies")
check("read past the end", lambda: h.pread(4096, size - 512), "EINVAL")
check("write past the end", lambda: h.pwrite(bytes(4096), size - 512), "ENOSPC")
check("zero past the end", lambda: h.zero(size + 512, 0), "ENOSPC")
check("trim past the end", lambda: h.trim(size + 512, 0), "EINVAL")
check("cache past the end", lambda: h.cache(size + 512, 0), "EINVAL")
check("an offset beyond reason", lambda: h.pread(512, (1 << 63) - 512), "EINVAL")
check("an unknown flag", lambda: h.pread(512, 0, flags=0x80), "EINVAL")
check("DF", lambda: h.pread(512, 0, flags=nbd.CMD_FLAG_DF), "ok" if structured else "EINVAL")
check("FUA on a read", lambda: h.pread(512, 0, flags=nbd.CMD_FLAG_FUA), "ok")
check("FUA on a trim", lambda: h.trim(4096, 0, flags=nbd.CMD_FLAG_FUA), "ok")
check("a fast zero", lambda: h.zero(4096, 0, flags=nbd.CMD_FLAG_FAST_ZERO), "ok")
check("the longest write", lambda: h.pwrite(b"x" * size, 0), "ok")
check("the same read", lambda: None, "ok" if h.pread(size, 0) == b"x" * size else "other content")
check("zeroes", lambda: h.zero(size - 8192, 4096), "ok")
check("holes", lambda: None, "ok" if h.pread(size, 0) == b"x" * 4096 + bytes(size - 8192) + b"x" * 4096 else "other")
check("a hint", lambda: h.cache(size, 0), "ok")

extents = []
def note(context, offset, entries, error):
    extents.extend(entries)
if structured:
    h.block_status(size, 0, note)
    check("extents", lambda: None, "ok" if extents == [4096, 0, size - 8192, 3, 4096, 0] else str(extents))
else:
    check("block status", lambda: h.block_status(size, 0, note), "EINVAL")
check("a write over the maximum", lambda: h.pwrite(b"x" * (33 << 20), 0), "EINVAL")
check("a flush after all that", lambda: h.flush(), "ok")
h.shutdown()
"#;

#[test]
fn nbdsh_meets_the_errors_of_the_protocol_in_both_styles() {
    for structured in ["False", "True"] {
        let (volume, _server, uri) = volume_and_uri();
        let head = format!("uri = {uri:?}\nstructured = {structured}\n");
        run("nbdsh", &["-c", &head, "-c", SCRIPT]);
        assert!(volume.log().iter().any(|request| matches!(request, Request::Write { .. })));
    }
}

#[test]
fn the_probe_is_answered_what_the_document_says() {
    let volume = MemoryVolume::new("demo", 72 << 20);
    let server = Running::on_tcp(&[&volume], Limits::default());
    let probe = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/nbd-probe");
    let answers = run("python3", &[probe, &server.server().local_address().to_string(), "demo"]);
    let rows = include_str!("../docs/nbd-servers.md").lines().filter(|line| line.starts_with("| ")).skip(1);
    let documented = rows.map(|row| {
        let cells: Vec<&str> = row.split(" | ").collect();
        format!("{} => {}", cells[0].trim_start_matches("| "), cells[1])
    });
    let documented: Vec<String> = documented.collect();
    assert!(documented.len() > 150, "only {} questions are documented", documented.len());
    assert_eq!(answers.lines().collect::<Vec<_>>(), documented);
}
