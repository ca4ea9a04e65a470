//! Started by others: sockets that are passed, by libnbd and by systemd's own tool, and what a service manager is told.

use std::net::TcpStream;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::cluster::Cluster;
use crate::nbd::Endpoint;
use crate::plan::Plan;
use crate::program::{self, Program};
use crate::scratch;
use crate::served::{Door, GUEST, Served, Volume};
use crate::tools;

const LIMIT: Duration = Duration::from_secs(30);
const SIZE: u64 = 8 << 20;

/// What a service manager would be told.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    _directory: TempDir,
}

impl Manager {
    fn listening() -> Self {
        let directory = scratch::socket_directory();
        let path = directory.path().join("notify");
        let socket = UnixDatagram::bind(&path).expect("cannot bind a socket");
        socket.set_read_timeout(Some(LIMIT)).expect("a socket takes a timeout");
        Self { socket, path, _directory: directory }
    }

    /// Starts a program that tells this one.
    fn start(&self, name: &str, path: &Path, words: &[&str], config: Option<&Path>) -> Program {
        Program::start(name, path, |command| {
            command.env("NOTIFY_SOCKET", &self.path).args(words);
            if let Some(config) = config {
                command.arg("--config").arg(config);
            }
        })
    }

    /// The next message, line by line.
    fn told(&self) -> Vec<String> {
        let mut buffer = [0; 4096];
        let length = self.socket.recv(&mut buffer).expect("nothing more was told");
        let text = std::str::from_utf8(&buffer[..length]).expect("text");
        text.lines().map(str::to_owned).collect()
    }

    /// Passes over messages until one has this line.
    fn wait_told(&self, line: &str) -> Vec<String> {
        let start = Instant::now();
        loop {
            let told = self.told();
            if told.iter().any(|said| said == line) {
                return told;
            }
            assert!(start.elapsed() < LIMIT, "never told: {line}");
        }
    }
}

#[test]
fn the_service_manager_is_told_when_every_volume_is_served_and_when_it_ends() {
    let _turn = scratch::shared_machine();
    let served = Served::created("", &[Volume::new("vol0", SIZE), Volume::new("vol1", SIZE)]);
    let manager = Manager::listening();
    let engine = manager.start("nbdcast serve", &program::nbdcast(), &["serve"], Some(&served.config()));
    assert_eq!(manager.told(), ["STATUS=serves 1 of 2 volumes"]);
    assert_eq!(manager.told(), ["READY=1", "STATUS=serves 2 of 2 volumes"]);
    for door in served.doors(false) {
        tools::run("nbdinfo", |command| {
            command.args(["--size", &door.uri("vol1")]);
        });
    }
    engine.stop();
    assert_eq!(manager.told(), ["STOPPING=1", "STATUS=stopping"]);
}

#[test]
fn a_volume_that_waits_for_replicas_is_named_and_does_not_keep_the_service_from_being_ready() {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(Plan { size: SIZE, ..Plan::default() });
    cluster.stop();
    for name in ["b", "c"] {
        cluster.agent_mut(name).start();
    }
    let manager = Manager::listening();
    let engine = manager.start("nbdcast serve", &program::nbdcast(), &["serve"], Some(&cluster.config()));
    let told = manager.wait_told("READY=1");
    assert_eq!(told, ["READY=1", "STATUS=serves 0 of 1 volumes; waiting for replicas: vol0"]);
    let address = format!("127.0.0.1:{}", cluster.agent("a").port);
    let data = cluster.agent("a").data.display().to_string();
    let words = ["--listen", &address, "--data", &data];
    let agent = manager.start("listener-agent", &program::listener_agent(), &words, None);
    manager.wait_told(&format!("STATUS=listens at {address}"));
    manager.wait_told("STATUS=serves 1 of 1 volumes");
    engine.stop();
    manager.wait_told("STOPPING=1");
    agent.stop();
    assert_eq!(manager.told(), ["STOPPING=1", "STATUS=stopping"]);
}

#[test]
fn libnbd_starts_an_engine_for_itself() {
    let _turn = scratch::shared_machine();
    let served = Served::created("", &[Volume::new("vol0", SIZE)]);
    let (nbdcast, config) = (program::nbdcast(), served.config());
    let size = tools::run("nbdinfo", |command| {
        command.args(["--size", "--", "["]).arg(&nbdcast).args(["serve", "--config"]).arg(&config).arg("]");
    });
    let last = size.lines().last().expect("a line");
    assert_eq!(last, SIZE.to_string(), "behind what the engine says itself");
    let orders = "h.connect_systemd_socket_activation(words)\n\
                  assert h.get_canonical_export_name() == 'vol0', h.get_canonical_export_name()\n\
                  h.pwrite(b'kept', 4094, nbd.CMD_FLAG_FUA)\n\
                  assert h.pread(4, 4094) == b'kept'\n\
                  h.shutdown()";
    let words = [nbdcast.to_str().expect("UTF-8"), "serve", "--config", config.to_str().expect("UTF-8")];
    tools::run("nbdsh", |command| {
        command.args(["-c", "h.set_full_info(True)", "-c", &format!("words = {words:?}"), "-c", orders]);
    });
    let copy = served.directory().join("copy");
    tools::run("nbdcopy", |command| {
        command.args(["--", "["]).arg(&nbdcast).args(["serve", "--config"]).arg(&config).arg("]").arg(&copy);
    });
    let copied = std::fs::read(&copy).expect("the copy");
    assert!(copied.len() as u64 == SIZE && copied[4094..4098] == *b"kept");
    assert!(TcpStream::connect(("127.0.0.1", served.port)).is_err(), "the passed socket is the only one");
}

/// systemd's program that passes sockets, if this machine has it; says aloud which story is left out if not.
fn activator(story: &str) -> Option<PathBuf> {
    let found = tools::look_for("systemd-socket-activate");
    if found.is_none() {
        scratch::notice(&format!("SKIPPED {story}: there is no systemd-socket-activate here (package systemd)"));
    }
    found
}

/// Starts a program with sockets at these places once the first client comes, who is served as well.
fn passing(activator: &Path, places: &[String], program: &Path, words: &[&str], config: Option<&Path>) -> Program {
    let started = Program::start("systemd-socket-activate", activator, |command| {
        for place in places {
            command.arg("-l").arg(place);
        }
        command.arg("--").arg(program).args(words);
        if let Some(config) = config {
            command.arg("--config").arg(config);
        }
    });
    scratch::wait_until("the sockets are there", LIMIT, || {
        places.iter().all(|place| started.printed().contains(&format!("Listening on {place}")))
    });
    started
}

#[test]
fn clients_who_come_too_early_wait_on_the_sockets_that_systemd_passes() {
    let _turn = scratch::shared_machine();
    let Some(activator) = activator("sockets that systemd passes") else { return };
    let tls = "tls = { mode = \"require\", certificates = \"certs/engine\" }\n";
    let served = Served::created(tls, &[Volume::new("vol0", SIZE)]);
    let directory = scratch::socket_directory();
    let (port, path) = (scratch::free_port(), directory.path().join("passed"));
    let places = [format!("127.0.0.1:{port}"), path.display().to_string()];
    let mut engine = passing(&activator, &places, &program::nbdcast(), &["serve"], Some(&served.config()));
    for endpoint in [Endpoint::Tcp(port), Endpoint::Unix(path.clone())] {
        let size = tools::run("nbdinfo", |command| {
            command.args(["--size", &Door::tls(endpoint.clone(), served.certificates(GUEST)).uri("vol0")]);
        });
        assert_eq!(size.trim(), SIZE.to_string());
        let plain = tools::attempt("nbdinfo", |command| {
            command.args(["--size", &endpoint.uri("vol0")]);
        });
        assert!(!plain.status.success(), "what the config says of TLS holds: {plain}");
    }
    engine.wait_for_line("where it serves", |line| line == format!("ready nbds://127.0.0.1:{port}/vol0"));
    assert!(TcpStream::connect(("127.0.0.1", served.port)).is_err(), "the passed sockets are the only ones");
    engine.stop();
}

#[test]
fn sockets_that_must_not_be_used_are_refused() {
    let _turn = scratch::shared_machine();
    let Some(activator) = activator("sockets that must not be used") else { return };
    let served = Served::created("", &[Volume::new("vol0", SIZE)]);
    let refused = |places: &[String], port: u16, program: &Path, words: &[&str], config: Option<&Path>, why: &str| {
        let program = passing(&activator, places, program, words, config);
        let first = TcpStream::connect(("127.0.0.1", port)).expect("somebody listens");
        let (status, printed, _) = program.wait(LIMIT);
        drop(first);
        assert!(status.code() == Some(2) && printed.contains(why), "({status}) {printed}");
    };
    let port = scratch::free_port();
    let open = format!("0.0.0.0:{port}");
    refused(&[open], port, &program::nbdcast(), &["serve"], Some(&served.config()), "insecure = true");
    let (one, two) = (scratch::free_port(), scratch::free_port());
    let places = [one, two].map(|port| format!("127.0.0.1:{port}"));
    let data = served.directory().join("agent");
    std::fs::create_dir(&data).expect("a directory");
    let words = ["--data", data.to_str().expect("UTF-8")];
    refused(&places, one, &program::listener_agent(), &words, None, "2 sockets were passed");

    let port = scratch::free_port();
    let mut agent = passing(&activator, &[format!("127.0.0.1:{port}")], &program::listener_agent(), &words, None);
    let first = TcpStream::connect(("127.0.0.1", port)).expect("somebody listens");
    agent.wait_for_line("that it is ready", |line| line == format!("ready 127.0.0.1:{port}"));
    drop(first);
    agent.stop();
}
