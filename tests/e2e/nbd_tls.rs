//! Real clients over TLS, by TCP and by a Unix socket, and who is let in.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use crate::clients::QEMU_IO_ORDERS;
use crate::scratch;
use crate::seed;
use crate::served::{Door, GUEST, STRANGER, Served, Volume};
use crate::tools;

const SIZE: u64 = 32 << 20;

fn volume() -> Volume {
    Volume::new("vol0", SIZE)
}

/// What nbdinfo says of an export.
fn nbdinfo(door: &Door, export: &str) -> Value {
    let shown = tools::run("nbdinfo", |command| {
        command.arg("--json").arg(door.uri(export));
    });
    serde_json::from_str(&shown).expect("nbdinfo's JSON")
}

/// One of QEMU's tools on the export, with words before and behind it.
fn qemu(tool: &str, door: &Door, words: &[&str], orders: &[&str]) -> String {
    tools::run(tool, |command| {
        command.args(words);
        door.credentials(command);
        command.arg("--image-opts").arg(door.image_options("vol0"));
        command.args(orders);
    })
}

#[test]
fn nbdinfo_sees_an_encrypted_connection_with_all_that_is_offered_without() {
    let _turn = scratch::shared_machine();
    let mut served = Served::with_tls("require", &[volume()]);
    for door in served.doors(true) {
        let document = nbdinfo(&door, "vol0");
        assert_eq!(document["TLS"], true, "{document}");
        assert_eq!(document["structured"], true, "{document}");
        let export = &document["exports"][0];
        assert_eq!(export["export-size"], SIZE);
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
        for ability in ["can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn"] {
            assert_eq!(export[ability], true, "{ability} in {document}");
        }
    }
    served.stop("vol0");
}

#[test]
fn nbdcopy_copies_with_four_connections() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("nbd_tls::nbdcopy_copies_with_four_connections");
    let mut served = Served::with_tls("on", &[volume()]);
    let (original, copy) = (served.directory().join("in"), served.directory().join("out"));
    let mut content = vec![0; SIZE as usize];
    let doors = served.doors(true).into_iter().chain(served.doors(false));
    for door in doors {
        rng.fill(&mut content);
        std::fs::write(&original, &content).expect("cannot write the file to copy");
        tools::run("nbdcopy", |command| {
            command.args(["--flush", "-C", "4"]).arg(&original).arg(door.uri("vol0"));
        });
        tools::run("nbdcopy", |command| {
            command.args(["-C", "4"]).arg(door.uri("vol0")).arg(&copy);
        });
        assert!(std::fs::read(&copy).expect("the copy") == content, "what comes out is what went in: {door:?}");
    }
    assert!(served.stop("vol0") == content, "the images hold the last copy");
}

#[test]
fn qemu_img_converts_compares_maps_and_measures() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("nbd_tls::qemu_img_converts_compares_maps_and_measures");
    let mut served = Served::with_tls("on", &[volume()]);
    let original = served.directory().join("in");
    let mut content = vec![0; SIZE as usize];
    let doors = served.doors(true).into_iter().chain(served.doors(false));
    for door in doors {
        rng.fill(&mut content[4 << 20..8 << 20]);
        std::fs::write(&original, &content).expect("cannot write the file to convert");
        tools::run("qemu-img", |command| {
            command.args(["convert", "-n", "-f", "raw"]);
            door.credentials(command);
            command.arg("--target-image-opts").arg(&original).arg(door.image_options("vol0"));
        });
        let file = format!("driver=file,filename={}", original.display());
        let said = qemu("qemu-img", &door, &["compare"], &[&file]);
        assert!(said.contains("identical"), "{said}");
        let map: Value = serde_json::from_str(&qemu("qemu-img", &door, &["map", "--output=json"], &[])).expect("a map");
        let parts = map.as_array().expect("parts").iter().filter(|part| part["zero"] == false);
        let data: Vec<_> = parts.map(|part| (part["start"].as_u64(), part["length"].as_u64())).collect();
        assert_eq!(data, [(Some(4 << 20), Some(4 << 20))], "{map}");
        // `qemu-img bench` has no way to name certificates, so the patterns over TLS are left to qemu-io.
        if door.certificates.is_none() {
            for words in [&["-w", "--pattern", "7", "-o", "16777216"][..], &[]] {
                let words = [&["bench", "-c", "2000", "-d", "16", "-s", "4096"], words].concat();
                let said = qemu("qemu-img", &door, &words, &[]);
                assert!(said.contains("Run completed"), "{said}");
            }
            let said = qemu("qemu-io", &door, &["-c", "read -P 7 16M 8000k"], &[]);
            assert!(!said.contains("failed"), "the bench wrote what it was to: {said}");
        }
    }
    content[16 << 20..(16 << 20) + 2000 * 4096].fill(7);
    assert!(served.stop("vol0") == content, "the images hold the last copy and the last bench");
}

#[test]
fn qemu_io_reads_back_its_patterns() {
    let _turn = scratch::shared_machine();
    let mut served = Served::with_tls("require", &[volume()]);
    let orders: Vec<&str> = QEMU_IO_ORDERS.iter().flat_map(|order| ["-c", order]).collect();
    for door in served.doors(true) {
        let said = qemu("qemu-io", &door, &orders, &[]);
        assert!(!said.contains("failed"), "every pattern is found again: {said}");
    }
    let image = served.stop("vol0");
    assert!(image[8 << 20..12 << 20].iter().all(|byte| *byte == 0x11));
}

#[test]
fn the_log_says_who_has_connected() {
    let _turn = scratch::shared_machine();
    let mut served = Served::with_tls("on", &[volume()]);
    for door in served.doors(false).into_iter().chain(served.doors(true)) {
        nbdinfo(&door, "vol0");
    }
    for who in [
        "peer=127.0.0.1 tls=false names=[]",
        "peer=unix tls=false names=[]",
        "peer=127.0.0.1 tls=true names=[\"guest\"]",
        "peer=unix tls=true names=[\"guest\"]",
    ] {
        scratch::wait_until(&format!("the log says `{who}`"), Duration::from_secs(10), || {
            served.running().lines_with("NBD client connected").iter().any(|line| line.contains(who))
        });
    }
    served.stop("vol0");
}

/// Runs nbdinfo in the expectation that it is refused; returns what it said of that.
fn refused(door: &Door) -> String {
    let finished = tools::attempt("nbdinfo", |command| {
        command.arg("--size").arg(door.uri("vol0"));
    });
    assert!(!finished.status.success(), "{door:?} was let in: {finished}");
    finished.stderr
}

/// A directory with the certificate of the CA and nothing else.
fn only_the_ca(served: &Served) -> PathBuf {
    let directory = served.directory().join("only-ca");
    std::fs::create_dir_all(&directory).expect("a directory");
    let name = "ca-cert.pem";
    std::fs::copy(served.certificates(GUEST).join(name), directory.join(name)).expect("the CA's certificate");
    directory
}

/// A directory as of GUEST but for these files, which are of the directory `other`.
fn mixed(served: &Served, name: &str, other: &str, files: &[&str]) -> PathBuf {
    let directory = served.directory().join(name);
    std::fs::create_dir_all(&directory).expect("a directory");
    for file in ["ca-cert.pem", "client-cert.pem", "client-key.pem"] {
        let source = if files.contains(&file) { served.directory().join(other) } else { served.certificates(GUEST) };
        std::fs::copy(source.join(file), directory.join(file)).expect("a certificate");
    }
    directory
}

#[test]
fn who_cannot_prove_who_it_is_is_refused_and_the_others_go_on() {
    let _turn = scratch::shared_machine();
    let mut served = Served::with_tls("require", &[volume()]);
    served.make_certificates("other");
    let other = format!("other/client-{GUEST}");
    let of_another_ca = mixed(&served, "another-ca", &other, &["client-cert.pem", "client-key.pem"]);
    let trusts_another = mixed(&served, "trusts-another", &other, &["ca-cert.pem"]);
    let without = only_the_ca(&served);
    let orders = ["-c", "write -P 0x5a 0 1M", "-c", "flush"];
    for endpoint in served.endpoints() {
        let guest = Door::tls(endpoint.clone(), served.certificates(GUEST));
        qemu("qemu-io", &guest, &orders, &[]);
        assert!(refused(&Door::plain(endpoint.clone())).contains("TLS"), "the server wants TLS, and says so");
        refused(&Door::tls(endpoint.clone(), without.clone()));
        refused(&Door::tls(endpoint.clone(), of_another_ca.clone()));
        // Here it is the client that refuses the server; libnbd does not look where it connects by a Unix socket.
        let finished = tools::attempt("qemu-io", |command| {
            let door = Door::tls(endpoint, trusts_another.clone());
            door.credentials(command);
            command.arg("--image-opts").arg(door.image_options("vol0")).args(["-c", "read 0 512"]);
        });
        assert!(!finished.status.success() && finished.stderr.contains("certificate"), "{finished}");
        assert!(!qemu("qemu-io", &guest, &["-c", "read -P 0x5a 0 1M"], &[]).contains("failed"));
    }
    assert!(!served.running().has_ended());
    served.stop("vol0");
}

#[test]
fn clients_need_no_certificate_where_none_is_asked_for() {
    let _turn = scratch::shared_machine();
    let tls = "tls = { mode = \"require\", certificates = \"certs/engine\", verify_clients = false }\n";
    let mut served = Served::start(tls, &[volume()]);
    let without = only_the_ca(&served);
    for endpoint in served.endpoints() {
        refused(&Door::plain(endpoint.clone()));
        assert_eq!(nbdinfo(&Door::tls(endpoint, without.clone()), "vol0")["TLS"], true);
    }
    served.stop("vol0");
}

/// The names that an export list has for a client, in order.
fn listed(door: &Door) -> Vec<String> {
    let shown = tools::run("nbdinfo", |command| {
        command.args(["--list", "--json"]).arg(door.uri(""));
    });
    let document: Value = serde_json::from_str(&shown).expect("nbdinfo's JSON");
    let names = document["exports"].as_array().expect("exports").iter();
    let mut names: Vec<String> = names.map(|export| export["export-name"].as_str().expect("a name").into()).collect();
    names.sort();
    names
}

#[test]
fn each_client_sees_the_exports_that_it_may_use_and_the_default() {
    let _turn = scratch::shared_machine();
    let volumes = [
        Volume::new("open", 1 << 20),
        Volume::new("named", 2 << 20).with("allow_names = [\"guest\"]"),
        Volume::new("near", 4 << 20).with("allow_addresses = [\"127.0.0.0/8\"]"),
        Volume::new("far", 8 << 20).with("allow_addresses = [\"192.0.2.0/24\"]"),
    ];
    let tls = "default = \"near\"\ntls = { mode = \"on\", certificates = \"certs/engine\" }\n";
    let mut served = Served::start(tls, &volumes);
    let [tcp, unix] = served.endpoints();
    let guest = served.certificates(GUEST);
    let stranger = served.certificates(STRANGER);
    assert_eq!(listed(&Door::tls(tcp.clone(), guest.clone())), ["named", "near", "open"]);
    assert_eq!(listed(&Door::tls(tcp.clone(), stranger.clone())), ["near", "open"]);
    assert_eq!(listed(&Door::plain(tcp.clone())), ["near", "open"]);
    assert_eq!(listed(&Door::tls(unix.clone(), guest.clone())), ["far", "named", "near", "open"]);
    assert_eq!(listed(&Door::plain(unix)), ["far", "near", "open"]);
    // A list is no wall: who asks for another export by name is refused as well.
    for (door, export) in [
        (Door::tls(tcp.clone(), stranger), "named"),
        (Door::plain(tcp.clone()), "named"),
        (Door::tls(tcp.clone(), guest.clone()), "far"),
    ] {
        let finished = tools::attempt("nbdinfo", |command| {
            command.arg("--size").arg(door.uri(export));
        });
        assert!(!finished.status.success(), "{door:?} reached {export}: {finished}");
    }
    assert_eq!(nbdinfo(&Door::tls(tcp.clone(), guest), "named")["exports"][0]["export-size"], 2 << 20);
    assert_eq!(nbdinfo(&Door::plain(tcp), "")["exports"][0]["export-size"], 4 << 20, "the default is `near`");
    served.stop("open");
}

#[test]
fn nobody_writes_what_is_read_only() {
    let _turn = scratch::shared_machine();
    let fixed = Volume::new("vol0", 1 << 20).with("read_only = true\nrotational = true\ndescription = \"kept\"");
    let mut served = Served::start("", &[fixed, Volume::new("other", 1 << 20)]);
    for door in served.doors(false) {
        let document = nbdinfo(&door, "vol0");
        let export = &document["exports"][0];
        assert_eq!((&export["is_read_only"], &export["is_rotational"]), (&true.into(), &true.into()), "{document}");
        assert_eq!(export["description"], "kept");
        let other = &nbdinfo(&door, "other")["exports"][0];
        assert_eq!((&other["is_read_only"], &other["is_rotational"]), (&false.into(), &false.into()));
        for words in [&[][..], &["-r"]] {
            let finished = tools::attempt("qemu-io", |command| {
                command.args(words).args(["--image-opts", &door.image_options("vol0"), "-c", "write -P 1 0 4096"]);
            });
            let said = format!("{}{}", finished.stdout, finished.stderr);
            let is_refused = said.contains("read-only") || said.contains("not permitted") || said.contains("denied");
            assert!(!finished.status.success() && is_refused, "{finished}");
        }
        assert!(!qemu("qemu-io", &door, &["-r", "-c", "read -P 0 0 1M"], &[]).contains("failed"));
    }
    assert!(served.stop("vol0").iter().all(|byte| *byte == 0));
}

#[test]
fn the_socket_belongs_to_whom_the_config_says() {
    let _turn = scratch::shared_machine();
    // Only root can give a file to somebody else.
    let (own_user, own_group) = (rustix::process::geteuid(), rustix::process::getegid());
    let (user, group) = if own_user.is_root() { (1, 2) } else { (own_user.as_raw(), own_group.as_raw()) };
    let keys = format!("socket_mode = \"0640\"\nsocket_owner = \"{user}:{group}\"\n");
    let mut served = Served::start(&keys, &[volume()]);
    let shown = tools::run("stat", |command| {
        command.args(["-c", "%F %a %u:%g"]).arg(served.socket());
    });
    assert_eq!(shown.trim(), format!("socket 640 {user}:{group}"));
    served.stop("vol0");
    assert!(!served.socket().exists(), "it is gone with the engine");
}
