//! What the documents say of the tests is true: every test that they name exists.

#[path = "integrity_table.rs"]
mod integrity_table;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn files(dir: &Path, ending: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("the directory can be read") {
        let path = entry.expect("the directory can be read").path();
        if path.is_dir() {
            files(&path, ending, found);
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
}

fn tests() -> BTreeSet<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut sources = Vec::new();
    for dir in ["tests", "src", "listener-agent", "protocol"] {
        files(&root.join(dir), "rs", &mut sources);
    }
    let names = |path: PathBuf| {
        let text = fs::read_to_string(path).expect("sources are text");
        let after_fn =
            text.split("fn ").skip(1).map(|rest| rest.split(['(', '<']).next().unwrap_or_default().to_owned());
        after_fn.collect::<Vec<String>>()
    };
    sources.into_iter().flat_map(names).collect()
}

#[test]
fn every_test_that_a_document_names_exists() {
    let tests = tests();
    let mut documents = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("docs"), "md", &mut documents);
    let mut named = 0;
    for document in documents {
        let text = fs::read_to_string(&document).expect("documents are text");
        // Tests have names of several words; nothing else in backticks has as many.
        let words = text.split('`').skip(1).step_by(2).filter(|w| w.matches('_').count() >= 4);
        for name in words.map(|w| w.rsplit("::").next().unwrap_or(w)) {
            let is_name = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
            assert!(!is_name || tests.contains(name), "{} names the test {name}, which is nowhere", document.display());
            named += usize::from(is_name);
        }
    }
    assert!(named > 20, "only {named} tests are named");
}

#[test]
fn every_row_of_the_protocol_that_is_supported_names_a_test() {
    let tests = tests();
    let document = include_str!("../docs/nbd-support.md");
    let (_, table) = document.split_once("\n## The protocol, item by item\n").expect("the section exists");
    let rows = table.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| **")).skip(1);
    let mut named = 0;
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let name = cells[3].trim_matches('`');
        assert!(tests.contains(name) || (name.is_empty() && cells[2].starts_with("no: ")), "no such test: {row}");
        named += usize::from(!name.is_empty());
    }
    assert!(named > 80, "only {named} rows name a test");
}

#[test]
fn every_place_where_a_bit_can_flip_has_a_test_that_compares_what_it_sees_with_the_table() {
    let stories = include_str!("sim/flips.rs");
    let mut shown = 0;
    for row in integrity_table::rows() {
        let [place, noticed_by, _, _, test] = row[..] else { panic!("a row of five cells: {row:?}") };
        if test == "none" {
            let is_out_of_reach = noticed_by.starts_with("nobody");
            assert!(is_out_of_reach, "{place:?} is said to be noticed, and nothing shows it");
            continue;
        }
        assert!(stories.contains(&format!("\"{place}\"")), "no test compares what it sees with the row of {place:?}");
        shown += 1;
    }
    assert!(shown > 18, "only {shown} rows are shown");
}
