//! The `listener-agent` program from outside: exit codes, the ready line, and the end on a signal.

use std::io::{BufRead, BufReader};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Kills the program if a test ends early.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    fn end_within(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.0.try_wait().expect("a child of this process") {
                return status;
            }
            assert!(Instant::now() < deadline, "still running after {limit:?}");
            std::thread::yield_now();
        }
    }
}

fn agent() -> Command {
    Command::new(env!("CARGO_BIN_EXE_listener-agent"))
}

#[test]
fn it_says_where_it_is_ready_and_ends_on_sigterm_with_exit_code_0() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let child = agent()
        .args(["--listen", "127.0.0.1:0", "--data"])
        .arg(directory.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut running = Running(child);
    let stdout = running.0.stdout.take().expect("a pipe");
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line).expect("a line");
    let address = line.trim_end().strip_prefix("ready ").expect("the ready line");
    TcpStream::connect(address).expect("it listens where it says");

    let pid = running.0.id().to_string();
    let sent = Command::new("kill").args(["-TERM", &pid]).status();
    assert!(sent.expect("kill starts").success());
    assert_eq!(running.end_within(Duration::from_secs(5)).code(), Some(0));
}

#[test]
fn a_missing_config_file_is_exit_code_2_with_a_remedy() {
    let output = agent().args(["--config", "/nonexistent/agent.toml"]).output().expect("the program starts");
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.starts_with("listener-agent: cannot read the config file /nonexistent/agent.toml: "));
    assert!(stderr.contains("\n  remedy: ") && stderr.contains("config/listener-agent.toml"));
}

#[test]
fn wrong_usage_is_exit_code_2_and_a_missing_replica_directory_1() {
    let code = |args: &[&str]| agent().args(args).output().expect("the program starts").status.code();
    assert_eq!(code(&[]), Some(2));
    assert_eq!(code(&["inspect"]), Some(2));
    assert_eq!(code(&["inspect", "/nonexistent"]), Some(1));
    assert_eq!(code(&["verify", "/nonexistent"]), Some(1));
}
