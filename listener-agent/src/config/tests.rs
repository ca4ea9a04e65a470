//! Stories about config files: what a mistake is answered with, and that the sample file tells the truth.

use super::*;

const SAMPLE: &str = include_str!("../../../config/listener-agent.toml");

#[derive(Debug, PartialEq, Deserialize)]
struct Shop {
    title: String,
    #[serde(default)]
    shelf: Vec<Shelf>,
    door: Option<Door>,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Shelf {
    name: Option<String>,
    width: ByteSize,
}

#[derive(Debug, PartialEq, Deserialize)]
struct Door {
    colour: Colour,
}

#[derive(Debug, PartialEq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Colour {
    Red,
    Blue,
}

fn message(text: &str) -> String {
    match parse_toml::<Shop>("shop.toml", text) {
        Ok(shop) => panic!("accepted: {shop:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn an_unknown_key_is_named_with_its_line_its_table_and_the_nearest_key() {
    assert_eq!(
        message("title = \"a\"\n\n[[shelf]]\nname = \"top\"\nwidht = 3\n"),
        "shop.toml:5: unknown key `widht` in shelf \"top\"; did you mean `width`?"
    );
    assert_eq!(
        message("title = \"a\"\n[[shelf]]\nwidth = 1\n[[shelf]]\nwidth = 1\nwidths = 2"),
        "shop.toml:6: unknown key `widths` in shelf #2; did you mean `width`?"
    );
    assert_eq!(message("tilte = \"a\"\n"), "shop.toml:1: unknown key `tilte` at the top level; did you mean `title`?");
    assert_eq!(
        message("title = \"a\"\n[door]\nxyz = 1\n"),
        "shop.toml:3: unknown key `xyz` in [door]; valid keys: colour"
    );
}

#[test]
fn a_missing_key_is_named_with_the_line_of_its_table() {
    assert_eq!(
        message("title = \"a\"\n[[shelf]]\nname = \"top\"\n"),
        "shop.toml:2: missing key `width` in shelf \"top\""
    );
    assert_eq!(message(""), "shop.toml:1: missing key `title` at the top level");
}

#[test]
fn a_value_of_the_wrong_type_says_what_is_expected() {
    assert_eq!(message("title = 3"), "shop.toml:1: title: found integer `3`, expected a string");
    assert_eq!(
        message("title = \"a\"\n[[shelf]]\nwidth = -1"),
        "shop.toml:3: shelf #1, width: found integer `-1`, expected a size such as \"256MiB\" or a whole number of bytes"
    );
    assert_eq!(
        message("title = \"a\"\n[[shelf]]\nwidth = \"1GB\""),
        "shop.toml:3: shelf #1, width: `1GB` has the unknown unit `GB`; write KiB, MiB, GiB or TiB (powers of 1024)"
    );
    assert_eq!(
        message("title = \"a\"\ndoor = { colour = \"green\" }"),
        "shop.toml:2: door, colour: \"green\" is not possible here; choose one of \"red\", \"blue\""
    );
    assert!(message("title = \"a\"\nshelf = 1979-05-27").starts_with("shop.toml:2: shelf: found"));
}

#[test]
fn text_that_is_not_toml_is_refused_with_its_line() {
    let message = message("title = \"a\"\nshelf = [\n");
    assert!(
        message.starts_with("shop.toml:2: not valid TOML: ") || message.starts_with("shop.toml:3: not valid TOML: "),
        "{message}"
    );
}

#[test]
fn a_missing_file_is_named_and_the_sample_pointed_to() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("none.toml");
    let error = AgentConfig::load(&path).expect_err("no such file");
    assert!(error.to_string().contains(&path.display().to_string()));
    assert!(error.remedy(AGENT_SAMPLE).contains(AGENT_SAMPLE));
}

#[test]
fn a_relative_data_directory_lies_beside_the_config_file() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("agent.toml");
    std::fs::write(&path, "data = \"replicas\"\n").expect("write the config");
    let config = AgentConfig::load(&path).expect("a valid config");
    assert_eq!(config, AgentConfig::new(AgentConfig::default_listen(), directory.path().join("replicas")));
}

#[test]
fn a_limit_out_of_range_names_key_value_and_range() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("agent.toml");
    std::fs::write(&path, "data = \"d\"\nlimits = { connections_max = 0 }").expect("write");
    let message = AgentConfig::load(&path).expect_err("zero").to_string();
    assert!(message.ends_with("limits.connections_max = 0 is out of range; allowed: 1 to 4096"), "{message}");
}

#[test]
fn numbers_are_read_in_every_form_that_toml_has() {
    for (form, bytes) in [("0x1000", 4096), ("1_000", 1000), ("+5", 5), ("0b11", 3), ("0o17", 15)] {
        let text = format!("title = \"a\"\nshelf = [{{ width = {form} }}]");
        let shop: Shop = parse_toml("shop.toml", &text).expect(form);
        assert_eq!(shop.shelf[0].width, ByteSize::from_bytes(bytes), "{form}");
    }
    let message = message("title = \"a\"\nshelf = [{ width = 99999999999999999999999 }]");
    assert!(message.contains("shelf #1, width: "), "{message}");
}

#[test]
fn what_the_file_holds_cannot_break_the_line_of_the_message() {
    for text in [
        "\"a\\nb\" = 1",
        "title = \"a\"\n[[shelf]]\nwidth = \"\\n\"",
        "title = \"a\"\n[[shelf]]\nname = \"\\u001b\\n\"\nwdth = 1",
        "title = \"a\"\ntitle = \"b\"",
        "title = \"a",
    ] {
        let message = message(text);
        assert!(!message.contains(char::is_control), "{message:?}");
    }
}

/// The keys of a table, learnt as a user would: from the answer to a key that does not exist.
fn keys_of<T: DeserializeOwned>(table_head: &str) -> &'static [&'static str] {
    match parse_toml::<T>("probe", &format!("{table_head}\nzzzz = 1")) {
        Err(ConfigError::UnknownKey { valid, .. }) => valid,
        Ok(_) | Err(_) => panic!("a key that does not exist was not refused"),
    }
}

#[test]
fn the_sample_file_parses_and_shows_every_key() {
    let sample: AgentConfig = parse_toml("sample", SAMPLE).expect("the sample parses");
    sample.validate("sample").expect("the sample is valid");
    let keys = [keys_of::<AgentConfig>(""), keys_of::<AgentConfig>("[limits]"), keys_of::<AgentConfig>("[tls]")];
    for key in keys.concat() {
        let code =
            |line: &'static str| line.strip_prefix("# ").filter(|t| t.starts_with("certificates =")).unwrap_or(line);
        let shown = |line: &str| line.starts_with(&format!("{key} =")) || line == format!("[{key}]");
        assert!(SAMPLE.lines().map(code).any(shown), "the sample lacks `{key}`");
    }
}

#[test]
fn the_defaults_stated_in_the_sample_are_those_of_the_code() {
    let sample: AgentConfig = parse_toml("sample", SAMPLE).expect("the sample parses");
    let code = AgentConfig::new(AgentConfig::default_listen(), sample.data.clone());
    assert_eq!(sample, code, "the sample sets every key to its default");
    for stated in [
        format!("listen = \"{}\"", code.listen),
        format!("Default: {}", code.listen),
        format!("connections_max = {}", code.limits.connections_max),
        format!("Default: {}", code.limits.connections_max),
    ] {
        assert!(SAMPLE.contains(&stated), "the sample does not say `{stated}`");
    }
}

#[test]
fn nothing_but_loopback_is_listened_at_without_tls_unless_it_is_said() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("agent.toml");
    let load = |text: &str| {
        std::fs::write(&file, format!("data = \"d\"\n{text}")).expect("written");
        AgentConfig::load(&file)
    };
    for listen in ["0.0.0.0:1", "[::]:1", "192.0.2.1:1", "node-a:1"] {
        let error = load(&format!("listen = \"{listen}\"")).expect_err(listen);
        assert!(error.to_string().contains(&format!("listen = \"{listen}\"")), "{error}");
        assert!(error.remedy("").contains("insecure = true") && error.remedy("").contains("certificates"));
        load(&format!("listen = \"{listen}\"\ninsecure = true")).expect("it was said");
        let config = load(&format!("listen = \"{listen}\"\n[tls]\ncertificates = \"c\"")).expect("TLS");
        assert_eq!(config.tls.certificates, Some(dir.path().join("c")));
    }
    for listen in ["127.0.0.1:1", "localhost:1", "[::1]:1", "unix:/run/agent.sock"] {
        load(&format!("listen = \"{listen}\"")).expect(listen);
    }
    assert!(load("[tls]\nengines = []").expect_err("nobody").to_string().contains("tls.engines"));
}
