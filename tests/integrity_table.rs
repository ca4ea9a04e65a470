//! The table of docs/integrity.md, for the tests that show its rows: a test says what it saw, in the words of the document,
//! and fails if the document says something else. That each row has such a test is looked at in tests/documents.rs.

const DOCUMENT: &str = include_str!("../docs/integrity.md");

/// The cells of each row: where the bit flips, what notices it, what the client sees, what becomes of it, test.
pub fn rows() -> Vec<Vec<&'static str>> {
    let (_, table) = DOCUMENT.split_once("\n## A bit flips\n").expect("the section exists");
    let (table, _) = table.split_once("\n## ").expect("another section follows");
    let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1);
    rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

/// A bit flipped in `place`: this was seen to notice it, this is what the client saw, and what became of it.
#[allow(dead_code, reason = "one of the tests that share this file reads rows and shows none")]
pub fn seen(place: &str, noticed_by: &str, client: &str, afterwards: &str) {
    let rows = rows();
    let row = rows.iter().find(|row| row[0] == place);
    let row = row.unwrap_or_else(|| panic!("docs/integrity.md has no row for a bit that flips in {place:?}"));
    assert_eq!(row[1..4], [noticed_by, client, afterwards], "docs/integrity.md says something else of {place:?}");
}
