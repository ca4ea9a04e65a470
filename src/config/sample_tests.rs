//! The sample file is documentation: it must parse, show every key, and state the code's own defaults.

use std::path::Path;

use listener_agent::config::{ConfigError, parse_toml};

use super::*;

const SAMPLE: &str = include_str!("../../config/engine.toml");

fn parse(text: &str) -> EngineConfig {
    EngineConfig::parse(Path::new("/etc/engine.toml"), text).expect("the sample parses")
}

/// Keys whose default is that they are not there.
const OPTIONAL: &[&str] =
    &["image", "socket_mode", "socket_owner", "default", "certificates", "certificate", "directory"];

/// The keys of a table, learnt as a user would: from the answer to a key that does not exist.
fn keys_of(table: &str) -> &'static [&'static str] {
    match parse_toml::<EngineConfig>("probe", table) {
        Err(ConfigError::UnknownKey { valid, .. }) => valid,
        Ok(_) | Err(_) => panic!("a key that does not exist was not refused: {table}"),
    }
}

/// A key in the sample: its line, and the default that the comment above states.
struct Shown {
    key: String,
    line: usize,
    stated: Option<String>,
}

fn shown_keys() -> Vec<Shown> {
    let mut comment = String::new();
    let mut shown = Vec::new();
    for (line, text) in SAMPLE.lines().enumerate() {
        let is_optional = |code: &&str| OPTIONAL.iter().any(|key| code.starts_with(&format!("{key} = ")));
        let code = text.strip_prefix("# ").filter(is_optional);
        let code = code.unwrap_or(text);
        if let Some((key, _)) = code.split_once(" = ").filter(|_| !code.starts_with('#')) {
            let stated = comment.split_once("Default: ").map(|(_, d)| d.to_owned());
            shown.push(Shown { key: key.to_owned(), line, stated });
            comment.clear();
        } else if let Some(words) = text.strip_prefix("# ") {
            comment = format!("{comment} {words}");
        } else {
            comment.clear();
        }
    }
    shown
}

#[test]
fn the_sample_shows_every_key_of_every_table() {
    let sample = shown_keys();
    let tables = [
        "[nbd]\nz_z = 1",
        "[nbd.tls]\nz_z = 1",
        "[admin]\nz_z = 1",
        "[agents]\nz_z = 1",
        "[state]\nz_z = 1",
        "[[volume]]\nz_z = 1",
        "[[volume]]\nack = { z_z = 1 }",
        "[[volume]]\n[[volume.replica]]\nz_z = 1",
    ];
    for key in tables.into_iter().flat_map(keys_of) {
        let of_table = match *key {
            "replica" => SAMPLE.contains("[[volume.replica]]"),
            "tls" => SAMPLE.contains("[nbd.tls]"),
            _ => false,
        };
        let inline = matches!(*key, "write" | "flush") && SAMPLE.contains(&format!("{key} = \"first\""));
        let own_line = sample.iter().any(|shown| shown.key == *key);
        assert!(own_line || of_table || inline, "the sample lacks `{key}`");
    }
    for table in keys_of("z_z = 1") {
        assert!(SAMPLE.contains(&format!("[{table}]")), "the sample lacks [{table}]");
    }
}

#[test]
fn leaving_out_a_line_that_has_a_default_changes_nothing() {
    let full = parse(SAMPLE);
    let mut left_out = 0;
    for shown in shown_keys().iter().filter(|shown| shown.stated.is_some()) {
        let without: Vec<&str> =
            SAMPLE.lines().enumerate().filter(|(line, _)| *line != shown.line).map(|(_, text)| text).collect();
        let mut config = parse(&without.join("\n"));
        // Left out and set to its default are the same journal, but not the same text.
        if shown.key == "journal_size" {
            let (default, stated) = (&mut config.volumes[0], &full.volumes[0]);
            assert_eq!(default.journal_size(), stated.journal_size());
            default.journal_size = stated.journal_size;
        }
        assert_eq!(config, full, "`{}` is not at its default", shown.key);
        left_out += 1;
    }
    assert_eq!(left_out, 36, "keys with a stated default");
}

#[test]
fn the_default_in_the_comment_is_the_value_below_it() {
    let lines: Vec<&str> = SAMPLE.lines().collect();
    for shown in shown_keys() {
        let Some(stated) = shown.stated else {
            continue;
        };
        let (_, value) = lines[shown.line].split_once(" = ").expect("key = value");
        match shown.key.as_str() {
            "description" => assert_eq!(stated, "\"\" (none)"),
            "ack" => assert_eq!(stated, "first for both"),
            "journal_size" => assert_eq!(stated, "2 x lag_bytes_max + 64MiB"),
            "certificate" => assert_eq!(stated, "the replica's name"),
            "allow_addresses" | "allow_names" => assert!(stated.starts_with("[] (")),
            optional if OPTIONAL.contains(&optional) => assert!(stated.starts_with("none")),
            _ => assert_eq!(stated, value.trim_matches('"'), "`{}`", shown.key),
        }
    }
}

#[test]
fn the_sample_with_every_optional_key_parses_too() {
    let with_image =
        OPTIONAL.iter().fold(SAMPLE.to_owned(), |text, key| text.replace(&format!("# {key} = "), &format!("{key} = ")));
    let nbd = parse(&with_image).nbd;
    assert_eq!(nbd.socket_mode, Some(SocketMode(0o660)));
    assert_eq!(nbd.socket_owner, Some(SocketOwner { user: None, group: Some("qemu".to_owned()) }));
    assert_eq!(nbd.default.as_deref(), Some("vol0"));
    let ReplicaPlace::Embedded { image, .. } = &parse(&with_image).volumes[0].replicas[1].place else {
        panic!("the second replica of the sample is embedded");
    };
    assert_eq!(image.as_deref(), Some(Path::new("/dev/disk/by-id/nvme-example")));
}
