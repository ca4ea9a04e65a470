//! The `nbdcast` program from outside: exit codes, and what stands on standard error.

use std::net::TcpListener;
use std::process::{Command, Output};

fn nbdcast(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nbdcast")).args(args).output().expect("the program starts")
}

#[track_caller]
fn assert_fails(output: &Output, code: i32, message: &str, remedy: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    let lines: Vec<&str> = stderr.lines().collect();
    let [first, second] = lines.as_slice() else {
        panic!("not two lines: {stderr}");
    };
    assert!(first.starts_with("nbdcast: ") && first.contains(message), "{stderr}");
    assert!(second.starts_with("  remedy: ") && second.contains(remedy), "{stderr}");
    assert!(output.stdout.is_empty(), "nothing on standard output");
}

#[test]
fn a_missing_config_file_is_exit_code_2_with_a_remedy() {
    for command in ["create", "serve", "status"] {
        let output = nbdcast(&[command, "--config", "/nonexistent/engine.toml"]);
        assert_fails(&output, 2, "/nonexistent/engine.toml", "config/engine.toml");
    }
}

#[test]
fn a_misspelt_key_is_exit_code_2_and_names_the_right_one() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let file = directory.path().join("engine.toml");
    std::fs::write(&file, "[nbd]\nlisten_at = \"127.0.0.1:0\"\n").expect("write the config");
    let file = file.display().to_string();
    let output = nbdcast(&["serve", "--config", &file]);
    let message = format!("{file}:2: unknown key `listen_at` in [nbd]; did you mean `listen`?");
    assert_fails(&output, 2, &message, "write `listen`");
}

#[test]
fn status_without_an_engine_is_exit_code_1_and_asks_whether_one_runs() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    drop(listener);
    let output = nbdcast(&["status", "--admin", &url]);
    let message = format!("no engine answers at {url}: ");
    assert_fails(&output, 1, &message, "is `nbdcast serve` running?");
}

#[test]
fn a_busy_admin_port_is_exit_code_1_and_touches_no_replica() {
    let busy = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = busy.local_addr().expect("an address").to_string();
    let directory = tempfile::tempdir().expect("temporary directory");
    let file = directory.path().join("engine.toml");
    let text = format!(
        "[admin]\nlisten = \"{address}\"\n[[volume]]\nname = \"v\"\nsize = \"1MiB\"\n\
         [[volume.replica]]\nname = \"a\"\npath = \"a\"\n"
    );
    std::fs::write(&file, text).expect("write the config");
    let output = nbdcast(&["serve", "--config", &file.display().to_string()]);
    let message = format!("cannot listen at the admin address {address}: ");
    assert_fails(&output, 1, &message, "choose another port");
    assert!(!directory.path().join("a").exists());
}

#[test]
fn wrong_usage_is_exit_code_2() {
    for args in [&["frobnicate"][..], &["serve"], &[], &["demo", "--size", "1GB"]] {
        assert_eq!(nbdcast(args).status.code(), Some(2), "{args:?}");
    }
}
