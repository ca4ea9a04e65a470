//! Stories about engine configs: each mistake and the exact answer to it.

use std::path::Path;

use super::*;

/// A config of one volume with two embedded replicas; `volume` adds lines to the volume.
fn text(volume: &str) -> String {
    format!(
        "[[volume]]\nname = \"vol0\"\nsize = \"1GiB\"\n{volume}\n\
         [[volume.replica]]\nname = \"a\"\npath = \"/r/a\"\n\
         [[volume.replica]]\nname = \"b\"\npath = \"/r/b\"\n"
    )
}

fn parse(text: &str) -> Result<EngineConfig, LoadError> {
    EngineConfig::parse(Path::new("/etc/engine.toml"), text)
}

/// The error of `text`, without the file's name, and its remedy.
#[track_caller]
fn refusal(text: &str) -> (String, String) {
    let error = match parse(text) {
        Ok(config) => panic!("accepted: {config:?}"),
        Err(error) => error,
    };
    let (message, remedy) = (error.to_string(), error.remedy());
    assert!(!message.contains('\n') && !remedy.contains('\n'));
    let message = message.strip_prefix("/etc/engine.toml:").expect(&message);
    (message.trim_start().to_owned(), remedy)
}

#[test]
fn what_is_left_out_has_its_default() {
    let config = parse(&text("")).expect("a valid config");
    let volume = &config.volumes[0];
    assert_eq!(config.nbd, NbdConfig::default());
    assert_eq!(config.admin, AdminConfig::default());
    assert_eq!(volume.ack.write, AckPolicy::First);
    assert_eq!(volume.ack.flush, AckPolicy::First);
    assert_eq!((volume.read, volume.on_lag), (ReadPolicy::Adaptive, OnLag::Drop));
    assert_eq!(volume.lag_max(), Duration::from_secs(30));
    assert_eq!(volume.freeze(), Duration::from_secs(60));
    assert_eq!(volume.lease(), Duration::from_secs(3));
    assert_eq!(volume.resync_rate_min, ByteSize::mib(8));
    assert_eq!(volume.checksum_errors_max, 1024);
    assert_eq!(volume.scrub_rate_min, ByteSize::mib(4));
    assert_eq!(volume.scrub_interval, ScrubInterval(Some(Duration::from_secs(30 * 86_400))));
    assert_eq!(volume.journal_size(), ByteSize::mib(576));
}

#[test]
fn the_default_journal_follows_the_lag_limit_in_whole_blocks() {
    let config = parse(&text("lag_bytes_max = 1048577")).expect("a valid config");
    let journal = config.volumes[0].journal_size().bytes();
    assert_eq!(journal, (2 << 20) + (64 << 20));
}

#[test]
fn relative_paths_lie_beside_the_config_file() {
    let config = parse(&text("").replace("/r/", "r/")).expect("a valid config");
    let place = ReplicaPlace::Embedded { path: "/etc/r/a".into(), image: None };
    assert_eq!(config.volumes[0].replicas[0].place, place);
}

#[test]
fn a_number_out_of_range_names_volume_key_value_and_range() {
    for (line, message) in [
        ("lag_ms_max = 1", "lag_ms_max = 1 is out of range; allowed: 100 to 3600000"),
        ("freeze_ms = 86400001", "freeze_ms = 86400001 is out of range; allowed: 0 to 86400000"),
        ("lease_ms = 99", "lease_ms = 99 is out of range; allowed: 100 to 60000"),
        ("lag_bytes_max = 4096", "lag_bytes_max = 4KiB is out of range; allowed: 64KiB to 64GiB"),
        ("journal_size = \"2TiB\"", "journal_size = 2TiB is out of range; allowed: 512MiB to 1TiB"),
        (
            "journal_size = \"511MiB\"",
            "journal_size = 511MiB is too small; allowed: at least 512MiB, twice lag_bytes_max",
        ),
        ("journal_size = 536870913", "journal_size = 536870913 is not a multiple of 4KiB"),
        ("checksum_errors_max = 0", "checksum_errors_max = 0 is out of range; allowed: 1 to 1000000000"),
        ("scrub_rate_min = 1", "scrub_rate_min = 1 is out of range; allowed: 64KiB to 64GiB"),
        ("resync_rate_min = 1", "resync_rate_min = 1 is out of range; allowed: 64KiB to 64GiB"),
        ("min_replicas = 3", "min_replicas = 3 is out of range; allowed: 1 to 2, the number of replicas"),
        ("min_replicas = 0", "min_replicas = 0 is out of range; allowed: 1 to 2, the number of replicas"),
    ] {
        let (found, remedy) = refusal(&text(line));
        assert_eq!(found, format!("volume \"vol0\": {message}"));
        let key = line.split_once(' ').expect("key = value").0;
        assert!(remedy.contains(key), "{remedy}");
    }
}

#[test]
fn a_size_must_be_whole_blocks_within_the_limits() {
    let with = |size: &str| text("").replace("\"1GiB\"", size);
    assert_eq!(
        refusal(&with("1000000")),
        (
            "volume \"vol0\": size = 1000000 is not a multiple of 4KiB".to_owned(),
            "the next greater allowed value: size = \"980KiB\"".to_owned()
        )
    );
    for size in ["\"60KiB\"", "\"65TiB\""] {
        let (message, _) = refusal(&with(size));
        assert!(message.ends_with("is out of range; allowed: 64KiB to 64TiB"), "{message}");
    }
    parse(&with("\"64KiB\"")).expect("the least size");
    parse(&with("\"64TiB\"")).expect("the greatest size");
}

#[test]
fn limits_of_the_server_name_their_table() {
    assert_eq!(
        refusal(&format!("[nbd]\nconnections_max = 0\n{}", text(""))).0,
        "nbd.connections_max = 0 is out of range; allowed: 1 to 65536"
    );
    assert_eq!(
        refusal(&format!("[nbd]\ninflight_bytes_max = 1\n{}", text(""))).0,
        "nbd.inflight_bytes_max = 1 is out of range; allowed: 32MiB to 64GiB"
    );
    assert_eq!(
        refusal(&format!("[admin]\nlisten = \"127.0.0.1:10809\"\n{}", text(""))).0,
        "listen = \"127.0.0.1:10809\" is used twice, by both [nbd] and [admin]"
    );
    assert_eq!(
        refusal(&format!("[admin]\nlisten = \"unix:/a\"\n{}", text(""))).0,
        "admin.listen = \"unix:/a\" is not possible; allowed: a TCP address, host:port"
    );
}

#[test]
fn a_bad_name_is_quoted_with_the_letters_that_are_allowed() {
    let long = "x".repeat(65);
    for name in ["", ".hidden", "..", "a/b", "zwölf", "a b", &long] {
        let (message, _) = refusal(&text("").replace("\"a\"", &format!("{name:?}")));
        let start = format!("volume \"vol0\", replica #1: name = {name:?} is not allowed; use 1 to 64");
        assert!(message.starts_with(&start), "{message}");
        let (message, _) = refusal(&text("").replace("\"vol0\"", &format!("{name:?}")));
        assert!(message.starts_with("volume #1: name = "), "{message}");
    }
    check_name(&"x".repeat(64)).expect("the longest name");
}

#[test]
fn two_things_in_one_place_are_refused() {
    assert_eq!(
        refusal(&text("").replace("\"b\"", "\"a\"")).0,
        "volume \"vol0\", replica #2: name = \"a\" is used twice, by replica \"a\" too"
    );
    assert_eq!(
        refusal(&text("").replace("/r/b", "/r/a/")).0,
        "volume \"vol0\", replica \"b\": path = \"/r/a/\" is used twice, by replica \"a\" too"
    );
    let agents = text("")
        .replace("path = \"/r/a\"", "address = \"127.0.0.1:1\"")
        .replace("path = \"/r/b\"", "address = \"127.0.0.1:1\"");
    assert_eq!(
        refusal(&agents).0,
        "volume \"vol0\", replica \"b\": address = \"127.0.0.1:1\" is used twice, by replica \"a\" too"
    );
    assert_eq!(
        refusal(&format!("{}{}", text(""), text(""))).0,
        "volume #2: name = \"vol0\" is used twice, by an earlier volume too"
    );
    let devices = text("").replace("path =", "image = \"/dev/x\"\npath =");
    assert_eq!(
        refusal(&devices).0,
        "volume \"vol0\", replica \"b\": image = \"/dev/x\" is used twice, by volume \"vol0\", replica \"a\" too"
    );
}

#[test]
fn a_replica_is_in_exactly_one_place() {
    let replace = |with: &str| refusal(&text("").replace("path = \"/r/b\"", with)).0;
    for (lines, part) in [
        ("", "replica \"b\": neither `address` nor `path` is set"),
        ("path = \"/r/b\"\naddress = \"h:1\"", "replica \"b\": both `address` and `path` are set"),
        ("address = \"h:1\"\nimage = \"/dev/x\"", "replica \"b\": `image` is possible only beside `path`"),
        ("address = \"h:0\"", "replica \"b\": address = \"h:0\" has port 0"),
        ("address = \"h\"", "replica \"b\", address: `h` is not an address"),
    ] {
        let message = replace(lines);
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn volumes_and_replicas_must_be_there_and_not_too_many() {
    assert_eq!(refusal("[nbd]").0, "there is no [[volume]]");
    assert_eq!(
        refusal("[[volume]]\nname = \"v\"\nsize = \"1GiB\"").0,
        "volume \"v\": it has 0 replicas; allowed: 1 to 16"
    );
    let more: String = (0..15).map(|n| format!("[[volume.replica]]\nname = \"r{n}\"\npath = \"/r/{n}\"\n")).collect();
    assert_eq!(refusal(&format!("{}{more}", text(""))).0, "volume \"vol0\": it has 17 replicas; allowed: 1 to 16");
}

#[test]
fn a_description_must_fit_into_an_nbd_string() {
    let (message, _) = refusal(&text(&format!("description = \"{}\"", "d".repeat(4097))));
    assert!(message.contains("description has 4097 bytes; allowed: at most 4096"));
}

#[test]
fn an_unknown_key_deep_in_the_file_is_found() {
    assert_eq!(
        refusal(&text("").replace("path = \"/r/b\"", "adress = \"h:1\"")).0,
        "10: unknown key `adress` in volume \"vol0\", replica \"b\"; did you mean `address`?"
    );
    assert_eq!(
        refusal(&text("ack = { wirte = \"all\" }")).0,
        "4: unknown key `wirte` in volume \"vol0\", ack; did you mean `write`?"
    );
    assert_eq!(
        refusal(&text("ack = { write = \"both\" }")).0,
        "4: volume \"vol0\", ack, write: \"both\" is not possible here; choose one of \"first\", \"majority\", \"all\""
    );
}

/// A config of one volume with an agent at `address`; `replica` adds lines to the replica, `head` comes first.
fn remote(head: &str, address: &str, replica: &str) -> String {
    format!(
        "{head}\n[[volume]]\nname = \"vol0\"\nsize = \"1GiB\"\n\
         [[volume.replica]]\nname = \"a\"\naddress = \"{address}\"\n{replica}\n"
    )
}

#[test]
fn no_door_is_open_unless_it_is_said() {
    let (message, remedy) = refusal(&remote("", "10.0.0.1:1", ""));
    assert!(message.starts_with("volume \"vol0\", replica \"a\": address = \"10.0.0.1:1\": "), "{message}");
    assert!(remedy.contains("`certificates` in [agents]") && remedy.contains("insecure = true"), "{remedy}");
    parse(&remote("[agents]\ninsecure = true", "10.0.0.1:1", "")).expect("it is said");
    let config = parse(&remote("[agents]\ncertificates = \"c\"", "10.0.0.1:1", "")).expect("TLS");
    assert_eq!(config.agents.certificates.as_deref(), Some(Path::new("/etc/c")));
    parse(&remote("", "127.0.0.1:1", "")).expect("loopback");

    let admin = |keys: &str| format!("[admin]\nlisten = \"0.0.0.0:10808\"\n{keys}\n{}", text(""));
    let (message, remedy) = refusal(&admin(""));
    assert!(message.starts_with("admin.listen = \"0.0.0.0:10808\": "), "{message}");
    assert!(remedy.contains("tunnel") && remedy.contains("`insecure = true` in [admin]"), "{remedy}");
    parse(&admin("insecure = true")).expect("it is said");
}

#[test]
fn the_name_in_an_agents_certificate_is_that_of_its_replica_or_what_is_said() {
    let tls = "[agents]\ncertificates = \"c\"";
    let name = |config: EngineConfig| config.volumes[0].replicas[0].certificate().map(str::to_owned);
    assert_eq!(name(parse(&remote(tls, "h:1", "")).expect("valid")).as_deref(), Some("a"));
    let config = parse(&remote(tls, "h:1", "certificate = \"node-a\"")).expect("valid");
    assert_eq!(name(config).as_deref(), Some("node-a"));

    let numbered = remote(tls, "h:1", "").replace("name = \"a\"", "name = \"10\"");
    let (message, remedy) = refusal(&numbered);
    assert!(message.contains("\"10\" cannot be the name in a certificate") && remedy.contains("`certificate`"));
    parse(&format!("{numbered}certificate = \"node-10\"")).expect("another name");
    assert!(refusal(&remote(tls, "h:1", "certificate = \"10.0.0.1\"")).0.contains("no DNS name"));
    let (message, remedy) = refusal(&remote("", "127.0.0.1:1", "certificate = \"node-a\""));
    assert!(message.contains("agents are reached without TLS") && remedy.contains("[agents]"), "{message}");

    let twice = remote(tls, "h:1", "[[volume.replica]]\nname = \"A\"\naddress = \"h:2\"");
    assert!(refusal(&twice).0.contains("certificate = \"A\" is used twice, by replica \"a\" too"));
    let embedded = text("").replace("path = \"/r/a\"", "path = \"/r/a\"\ncertificate = \"a\"");
    assert!(refusal(&format!("{tls}\n{embedded}")).0.contains("only beside `address`"));
}

#[test]
fn clients_connect_at_one_address_or_several() {
    let listen = |value: &str| parse(&format!("[nbd]\nlisten = {value}\n{}", text(""))).map(|config| config.nbd.listen);
    let unix = Endpoint::Unix("/run/nbd.sock".into());
    assert_eq!(listen("\"unix:/run/nbd.sock\"").expect("one"), std::slice::from_ref(&unix));
    assert_eq!(listen("[\"unix:/run/nbd.sock\", \"127.0.0.1:0\"]").expect("two")[0], unix);
    let refused = |value: &str| refusal(&format!("[nbd]\nlisten = {value}\n{}", text(""))).0;
    assert_eq!(refused("[]"), "nbd.listen is empty, so that no client could connect");
    assert_eq!(refused("[\"h:1\", \"h:1\"]"), "nbd.listen = \"h:1\" is used twice, by an earlier address too");
    assert!(refused("[\"h:1\", \"h\"]").starts_with("2: nbd, listen #2: `h` is not an address"));
    assert!(refused("5").contains("expected an address, \"host:port\" or \"unix:/path\", or a list of them"));
}

#[test]
fn who_owns_a_socket_is_said_by_name_or_number() {
    let nbd = |line: &str| parse(&format!("[nbd]\n{line}\n{}", text(""))).map(|config| config.nbd);
    assert_eq!(nbd("socket_mode = \"0600\"").expect("a mode").socket_mode, Some(SocketMode(0o600)));
    let owner = |user: Option<&str>, group: Option<&str>| {
        Some(SocketOwner { user: user.map(str::to_owned), group: group.map(str::to_owned) })
    };
    for (written, expected) in [
        ("qemu:kvm", owner(Some("qemu"), Some("kvm"))),
        ("qemu", owner(Some("qemu"), None)),
        (":107", owner(None, Some("107"))),
    ] {
        assert_eq!(nbd(&format!("socket_owner = {written:?}")).expect(written).socket_owner, expected);
    }
    for line in [
        "socket_mode = \"rw\"",
        "socket_mode = \"1777\"",
        "socket_mode = \"66\"",
        "socket_owner = \":\"",
        "socket_owner = \"a:b:c\"",
    ] {
        assert!(nbd(line).is_err(), "{line}");
    }
}

#[test]
fn tls_needs_certificates_and_names_need_tls() {
    let with = |nbd: &str, volume: &str| format!("[nbd]\n{nbd}\n{}", text(volume));
    assert_eq!(
        refusal(&with("tls = { mode = \"require\" }", "")).0,
        "nbd.tls.mode = \"require\", but nbd.tls.certificates is not set"
    );
    let names = "allow_names = [\"vm-host-1\"]";
    let nobody = "volume \"vol0\": allow_names is set, but clients show no certificates: nobody could use the volume";
    assert_eq!(refusal(&with("", names)).0, nobody);
    let unverified = "tls = { mode = \"on\", certificates = \"tls\", verify_clients = false }";
    assert_eq!(refusal(&with(unverified, names)).0, nobody);
    let config = parse(&with("tls = { mode = \"on\", certificates = \"tls\" }", names)).expect("names are shown");
    assert_eq!(config.nbd.tls.certificates.as_deref(), Some(Path::new("/etc/tls")));
}

#[test]
fn a_default_export_is_one_of_the_volumes() {
    parse(&format!("[nbd]\ndefault = \"vol0\"\n{}", text(""))).expect("a volume of this name");
    assert_eq!(
        refusal(&format!("[nbd]\ndefault = \"vol1\"\n{}", text(""))).0,
        "nbd.default = \"vol1\" is not the name of a volume"
    );
}

#[test]
fn a_network_that_is_none_is_found_in_its_list() {
    let (message, _) = refusal(&text("allow_addresses = [\"192.0.2.0/24\", \"192.0.2.1/24\"]"));
    assert_eq!(
        message,
        "4: volume \"vol0\", allow_addresses #2: \"192.0.2.1/24\" is no network: bits beyond the first 24 are set; did you \
         mean 192.0.2.0/24?"
    );
}
