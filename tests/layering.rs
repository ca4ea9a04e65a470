//! Imports point down the layers only, and the sans-IO modules import nothing that could do I/O.
//!
//! Reads the source tree as text: what is checked are paths in code outside comments, so that a `use` and a path written
//! out in full count alike. The lints in clippy.toml check calls and types; this checks who may know whom.

use std::fs;
use std::path::{Path, PathBuf};

/// For the files under some places: words that no path in them may contain.
struct Rule {
    /// Files, or directories with everything in them.
    places: &'static [&'static str],
    /// Paths, as they are written in code: at word boundaries on the left.
    forbidden: &'static [&'static str],
    /// Whether `#[cfg(test)] mod` blocks at the end of a file are held to it too.
    tests_too: bool,
}

const SANS_IO: &[&str] = &[
    "std::fs",
    "std::net",
    "std::thread",
    "std::process",
    "std::os",
    "std::time::Instant",
    "std::time::SystemTime",
    "std::sync::Mutex",
    "std::sync::Condvar",
    "Instant::now",
    "tokio",
    "rustix",
    "tracing",
];

const RULES: &[Rule] = &[
    // The layers: protocol knows nobody, an agent knows no engine.
    Rule {
        places: &["protocol/src"],
        forbidden: &["tokio", "rustix", "tracing", "nbdcast::", "listener_agent"],
        tests_too: true,
    },
    Rule { places: &["listener-agent/src", "listener-agent/tests"], forbidden: &["nbdcast::"], tests_too: true },
    // Within the engine: the order of a volume and the NBD front do not know each other, and neither knows the shell.
    Rule {
        places: &["src/volume"],
        forbidden: &[
            "crate::admin",
            "crate::cli",
            "crate::config",
            "crate::nbd",
            "crate::runtime",
            "crate::status",
            "listener_agent",
        ],
        tests_too: false,
    },
    Rule {
        places: &["src/nbd"],
        forbidden: &[
            "crate::admin",
            "crate::cli",
            "crate::config",
            "crate::runtime",
            "crate::status",
            "crate::volume",
            "listener_agent",
            "protocol::",
        ],
        tests_too: false,
    },
    // Within the agent: decisions do not know who carries them out.
    Rule {
        places: &["listener-agent/src/replica"],
        forbidden: &[
            "crate::host",
            "crate::server",
            "crate::directory",
            "crate::disk",
            "crate::image::Image",
            "crate::inspect",
        ],
        tests_too: false,
    },
    // Sans-IO.
    Rule {
        places: &[
            "protocol/src",
            "src/volume",
            "listener-agent/src/replica",
            "listener-agent/src/journal/group.rs",
            "listener-agent/src/journal/ring.rs",
        ],
        forbidden: SANS_IO,
        tests_too: false,
    },
    Rule {
        places: &[
            "src/nbd/constants.rs",
            "src/nbd/handshake",
            "src/nbd/refusals.rs",
            "src/nbd/reply",
            "src/nbd/request",
        ],
        // Some log what they refuse.
        forbidden: &["std::fs", "std::net", "std::thread", "std::time", "std::sync", "tokio", "rustix"],
        tests_too: false,
    },
];

/// A module of such a name owns nothing in particular.
const NAMES_THAT_SAY_NOTHING: &[&str] = &["common", "helpers", "inner", "misc", "types", "util", "utils"];

/// Whether `code` contains `word` where a path could begin or go on.
fn mentions(code: &str, word: &str) -> bool {
    let goes_on = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        !before.is_some_and(goes_on) && (word.ends_with(':') || !after.is_some_and(goes_on))
    })
}

/// `use a::{b, c::{d, e}};` written out as `a::b`, `a::c::d`, `a::c::e`; other code as it is.
fn written_out(code: &str) -> Vec<String> {
    let Some(open) = code.find('{').filter(|_| code.trim_start().starts_with("use ")) else {
        return vec![code.to_owned()];
    };
    let (stem, rest) = code.split_at(open);
    let close = rest.rfind('}').unwrap_or(rest.len());
    let mut depth = 0;
    let parts = rest[1..close].split(|c| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        c == ',' && depth == 0
    });
    parts.flat_map(|part| written_out(&format!("{stem}{}", part.trim()))).collect()
}

/// The statements of a source file without comments; each `use` is one, however many lines it takes.
fn statements(source: &str, tests_too: bool) -> Vec<(usize, String)> {
    let mut statements: Vec<(usize, String)> = Vec::new();
    let mut unfinished_use = false;
    let lines: Vec<&str> = source.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        let begins_tests = line.starts_with("#[cfg(test)]") && lines.get(index + 1).is_some_and(|l| l.ends_with('{'));
        if begins_tests && !tests_too {
            break;
        }
        let code = line.split("//").next().unwrap_or_default();
        match statements.last_mut() {
            Some((_, statement)) if unfinished_use => statement.push_str(code.trim()),
            Some(_) | None => statements.push((index + 1, code.to_owned())),
        }
        let starts_use = code.trim_start().trim_start_matches("pub ").starts_with("use ");
        unfinished_use = (unfinished_use || starts_use) && !code.contains(';');
    }
    statements
}

/// What is wrong with the source file at `path`, one line each.
fn faults(path: &str, source: &str, rules: &[Rule]) -> Vec<String> {
    let mut faults = Vec::new();
    if !source.starts_with("//!") {
        faults.push(format!("{path}: does not begin with `//!`: what it owns, what it never does"));
    }
    let module = path.trim_end_matches("/mod.rs").trim_end_matches(".rs").rsplit('/').next().unwrap_or_default();
    if NAMES_THAT_SAY_NOTHING.contains(&module) {
        faults.push(format!("{path}: a module called {module} owns nothing in particular"));
    }
    let is_in = |place: &&str| path == *place || path.strip_prefix(place).is_some_and(|rest| rest.starts_with('/'));
    let is_test = path.ends_with("tests.rs");
    for rule in rules.iter().filter(|rule| rule.places.iter().any(is_in) && (rule.tests_too || !is_test)) {
        for (line, statement) in statements(source, rule.tests_too) {
            let paths = written_out(statement.trim_start().trim_start_matches("pub "));
            for word in rule.forbidden.iter().filter(|word| paths.iter().any(|path| mentions(path, word))) {
                faults.push(format!("{path}:{line}: may not know {word}"));
            }
        }
    }
    faults
}

fn rust_files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory of the source tree") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_file_keeps_to_its_layer() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for place in ["src", "tests", "protocol", "listener-agent/src", "listener-agent/tests"] {
        rust_files(&root.join(place), &mut files);
    }
    let mut all = Vec::new();
    for file in &files {
        let path = file.strip_prefix(root).expect("below the root").to_str().expect("UTF-8");
        let source = fs::read_to_string(file).expect("a source file");
        all.extend(faults(path, &source, RULES));
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

#[test]
fn every_rule_is_about_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for place in RULES.iter().flat_map(|rule| rule.places) {
        assert!(root.join(place).exists(), "{place} was moved: correct the rule");
    }
}

#[test]
fn packages_depend_downwards() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (package, forbidden) in
        [("protocol", &["tokio", "listener-agent", "nbdcast"][..]), ("listener-agent", &["nbdcast"][..])]
    {
        let manifest = fs::read_to_string(root.join(package).join("Cargo.toml")).expect("a manifest");
        let names: Vec<&str> = manifest.lines().filter_map(|line| line.split(['=', '.', ' ']).next()).collect();
        for name in forbidden {
            assert!(!names.contains(name), "{package} depends on {name}");
        }
    }
}

#[test]
fn a_bad_file_is_found_out() {
    let source =
        "use std::{fs, sync::{Arc, Mutex}};\nfn now() -> Duration {\n    std::time::Instant::now().elapsed()\n}\n";
    let found = faults("src/volume/helpers.rs", source, RULES);
    let expected = [
        "src/volume/helpers.rs: does not begin with `//!`: what it owns, what it never does",
        "src/volume/helpers.rs: a module called helpers owns nothing in particular",
        "src/volume/helpers.rs:1: may not know std::fs",
        "src/volume/helpers.rs:1: may not know std::sync::Mutex",
        "src/volume/helpers.rs:3: may not know std::time::Instant",
        "src/volume/helpers.rs:3: may not know Instant::now",
    ];
    assert_eq!(found, expected);
}

#[test]
fn an_import_upwards_is_found_out_over_several_lines() {
    let source = "//! Owns nothing.\nuse crate::{\n    nbd::Backend,\n    volume::Volume,\n};\n";
    assert_eq!(faults("src/volume/acks.rs", source, RULES), ["src/volume/acks.rs:2: may not know crate::nbd"]);
    assert_eq!(faults("src/nbd/reply/read.rs", source, RULES), ["src/nbd/reply/read.rs:2: may not know crate::volume"]);
    assert!(faults("src/runtime/link.rs", source, RULES).is_empty());
}

#[test]
fn comments_and_tests_may_say_what_code_may_not() {
    let source = "//! No tokio in here.\n\n// Unlike std::fs.\n#[cfg(test)]\nmod tests {\n    use std::fs;\n}\n";
    assert!(faults("src/volume/log.rs", source, RULES).is_empty());
    let source = "//! Tests elsewhere.\n#[cfg(test)]\nmod tests;\nuse std::fs;\n";
    assert_eq!(faults("src/volume/log.rs", source, RULES), ["src/volume/log.rs:4: may not know std::fs"]);
}
