//! The real programs that the stories use as clients and as faults. A missing one fails the test and says what to do.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use crate::program::{self, Finished};

/// Debian keeps mkfs and losetup where an ordinary user's PATH does not look.
const PLACES: [&str; 4] = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];

/// Where `tool` is; panics with the remedy if it is nowhere.
pub fn find(tool: &str) -> PathBuf {
    let Some(found) = look_for(tool) else {
        panic!("this test needs `{tool}`, which is not installed: run scripts/install-clients")
    };
    found
}

/// Where `tool` is, if it is here at all.
pub fn look_for(tool: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let places = PLACES.iter().map(PathBuf::from);
    places.chain(std::env::split_paths(&path)).map(|place| place.join(tool)).find(|candidate| candidate.is_file())
}

/// A command for `tool`, with the places above first in its PATH.
pub fn command(tool: &str) -> Command {
    let mut path = OsString::from(PLACES.join(":"));
    if let Some(own) = std::env::var_os("PATH") {
        path.push(":");
        path.push(own);
    }
    let mut command = Command::new(find(tool));
    command.env("PATH", path).env("LC_ALL", "C");
    command
}

/// What a tool may take that is not told how long to go on.
const LIMIT: Duration = Duration::from_secs(120);

/// Runs `tool` to its end within two minutes, without judging how it ended.
pub fn attempt(tool: &str, arguments: impl FnOnce(&mut Command)) -> Finished {
    attempt_within(LIMIT, tool, arguments)
}

fn attempt_within(limit: Duration, tool: &str, arguments: impl FnOnce(&mut Command)) -> Finished {
    let mut command = command(tool);
    arguments(&mut command);
    program::finish(&mut command, limit)
}

/// Runs `tool` and panics with everything it printed unless it succeeded. Returns what it printed.
pub fn run(tool: &str, arguments: impl FnOnce(&mut Command)) -> String {
    run_within(LIMIT, tool, arguments)
}

/// The same, for a tool that goes on for as long as it is told.
pub fn run_within(limit: Duration, tool: &str, arguments: impl FnOnce(&mut Command)) -> String {
    let finished = attempt_within(limit, tool, arguments);
    assert!(finished.status.success(), "{tool} failed: {finished}");
    finished.stdout
}
