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
    for command in ["create", "serve", "status", "top"] {
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
fn giving_replicas_up_takes_a_word_more_and_is_exit_code_2_without_it() {
    let output = nbdcast(&["activate", "vol0", "--without", "b", "--without", "c", "--admin", "127.0.0.1:1"]);
    assert_fails(&output, 2, "without b, c, everything that only they hold is lost", "--accept-data-loss");
}

#[test]
fn an_order_without_an_engine_is_exit_code_1_and_asks_whether_one_runs() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    drop(listener);
    for order in [
        &["replica", "add", "vol0", "d", "--path", "d"][..],
        &["replica", "remove", "vol0", "d"],
        &["replica", "replace", "vol0", "c", "d", "--address", "127.0.0.1:1"],
        &["replica", "resync", "vol0", "d"],
        &["resize", "vol0", "1GiB"],
        &["activate", "vol0", "--without", "d", "--accept-data-loss"],
        &["top"],
    ] {
        let output = nbdcast(&[order, &["--admin", &url]].concat());
        assert_fails(&output, 1, &format!("no engine answers at {url}: "), "is `nbdcast serve` running?");
    }
}

#[test]
fn names_that_no_volume_has_are_exit_code_2() {
    let output = nbdcast(&["replica", "remove", "../vol0", "d"]);
    assert_fails(&output, 2, "\"../vol0\" is not allowed", "choose a name");
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
    for args in [&["frobnicate"][..], &["serve"], &[], &["demo", "--size", "1GB"], &["replica"], &["resize", "vol0"]] {
        assert_eq!(nbdcast(args).status.code(), Some(2), "{args:?}");
    }
}
