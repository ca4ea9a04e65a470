//! Connections that mean no good: the log stays short, and whoever works notices nothing.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::nbd::{Client, Endpoint, FLAG_FUA};
use crate::plan::Plan;
use crate::program::Program;
use crate::scratch;
use crate::served::{Served, Volume};

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: u64 = 8 << 20;
/// What may be logged of one kind at once; after that a line per second.
const LINES_AT_ONCE: u64 = 20;
const SILENT: usize = 1000;
/// `limits.connections_max` of an agent that says nothing else.
const AGENT_CONNECTIONS_MAX: usize = 64;

/// Says something that is no NBD and waits until the server has hung up.
fn garbage(port: u16) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    stream.set_read_timeout(Some(LIMIT)).expect("a time limit");
    let _ = stream.write_all(&[b'G'; 64]);
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Lines of the log with `words`, and how many events they speak of: themselves and those that were suppressed before.
fn told(program: &Program, words: &str) -> (u64, u64) {
    let lines = program.lines_with(words);
    let suppressed = |line: &String| {
        let (_, number) = line.split_once("suppressed=").expect("every line says how many were suppressed");
        number.split(' ').next().and_then(|number| number.parse::<u64>().ok()).expect("a number")
    };
    (lines.len() as u64, lines.len() as u64 + lines.iter().map(suppressed).sum::<u64>())
}

#[test]
fn a_flood_of_garbage_is_counted_in_the_log_and_does_not_fill_it() {
    const EVENTS: u64 = 400;
    let _turn = scratch::shared_machine();
    let begun = Instant::now();
    let mut served = Served::start("", &[Volume::new("vol0", SIZE)]);
    let port = served.port;
    let client = || Client::connect(&Endpoint::Tcp(port), "vol0").expect("a connection");
    let mut working = client();
    let refuse = |client: &mut Client| assert!(client.read(SIZE, 4096).is_err(), "a read past the end");
    for _ in 0..EVENTS {
        garbage(port);
        let mut wrong = client();
        refuse(&mut wrong);
        wrong.disconnect();
    }
    working.write(0, &[7; 4096], FLAG_FUA).expect("others notice nothing");
    // One more of each from time to time, until a line has told of all that went before.
    let mut more = 0;
    let kinds = ["WARN nbdcast::nbd::session: ", "NBD request refused: ", "INFO nbdcast::nbd::session: "];
    for words in kinds {
        scratch::wait_until(&format!("the log tells of all `{words}`"), LIMIT, || {
            more += 1;
            garbage(port);
            let mut wrong = client();
            refuse(&mut wrong);
            wrong.disconnect();
            told(served.running(), words).1 >= EVENTS
        });
    }
    for words in kinds {
        let (lines, _) = told(served.running(), words);
        let lines_max = LINES_AT_ONCE + begun.elapsed().as_secs() + 1;
        assert!(lines > 0 && lines <= lines_max, "{lines} lines of `{words}` for {} events", EVENTS + more);
    }
    working.disconnect();
    served.stop("vol0");
}

/// Connections of the agent `name`, by its open files.
fn open_files(cluster: &Cluster, name: &str) -> usize {
    let files = format!("/proc/{}/fd", cluster.agent(name).process().pid());
    std::fs::read_dir(files).expect("the agent's open files").count()
}

fn silent_connections_at_an_agent(tls: bool) {
    let _turn = scratch::shared_machine();
    scratch::allow_open_files(2 * SILENT as u64 + 500);
    let plan = Plan { size: SIZE, journal_size: SIZE, lag_bytes_max: SIZE / 2, tls, ..Plan::default() };
    let mut cluster = Cluster::serving(plan);
    let port = cluster.agent("a").port;
    let files_before = open_files(&cluster, "a");
    let silent = || TcpStream::connect(("127.0.0.1", port)).expect("a connection");
    let mut client = cluster.connect();
    let mut flood = Vec::new();
    for number in 0..SILENT {
        flood.push(silent());
        if number % 20 == 0 {
            client.write(number as u64 * 4096, &[number as u8; 4096], FLAG_FUA).expect("a write");
        }
    }
    cluster.wait_caught_up("a");
    scratch::wait_until("the agent keeps no more connections than it may", LIMIT, || {
        open_files(&cluster, "a") <= files_before + AGENT_CONNECTIONS_MAX
    });
    let events = cluster.events();
    assert!(!events.iter().any(|event| event.starts_with("a: ")), "nothing happened to a: {events:?}");
    client.disconnect();

    // Another engine finds its way in while more of them come.
    cluster.kill_engine();
    std::thread::scope(|scope| {
        let more = scope.spawn(|| (0..SILENT).map(|_| silent()).collect::<Vec<_>>());
        cluster.start_engine();
        cluster.wait_caught_up("a");
        flood.extend(more.join().expect("more connections"));
    });
    let mut client = cluster.connect();
    client.write(0, &[0xaa; 4096], FLAG_FUA).expect("a write");
    client.disconnect();
    cluster.stop();
    let image = cluster.identical_images(&["a", "b", "c"]);
    assert!(image[..4096] == [0xaa; 4096] && image[980 * 4096..981 * 4096] == [212; 4096]);
}

#[test]
fn a_thousand_silent_connections_at_an_agent_disturb_no_engine() {
    silent_connections_at_an_agent(false);
}

#[test]
fn a_thousand_silent_connections_at_an_agent_with_tls_disturb_no_engine() {
    silent_connections_at_an_agent(true);
}
