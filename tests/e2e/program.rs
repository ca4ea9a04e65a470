//! A child process of a test: started, watched by what it prints, signalled, and never left behind.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::scratch;

/// How long a program may take to say that it is ready.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to stop after SIGTERM: the contract says 5 s, a loaded machine may double it.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// The program under test, built by cargo for this test.
pub fn nbdcast() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_nbdcast"))
}

/// The agent's program, which cargo builds beside it when the whole workspace is built.
pub fn listener_agent() -> PathBuf {
    let path = nbdcast().with_file_name("listener-agent");
    assert!(
        path.is_file(),
        "{} is missing: build it first with `cargo build --workspace` (scripts/test does)",
        path.display()
    );
    path
}

/// How a program that ran to its end ended, and what it printed.
pub struct Finished {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl fmt::Display for Finished {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}\n--- stdout\n{}\n--- stderr\n{}", self.status, self.stdout, self.stderr)
    }
}

/// Runs `command` to its end; kills it and panics if that takes longer than `limit`.
pub fn finish(command: &mut Command, limit: Duration) -> Finished {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("cannot start {shown}: {error}"));
    let stdout = read_all(child.stdout.take());
    let stderr = read_all(child.stderr.take());
    let status = wait_for_exit(&mut child, limit);
    let killed = status.is_none();
    let status = status.unwrap_or_else(|| {
        let _ = child.kill();
        child.wait().expect("cannot wait for a killed child")
    });
    let finished =
        Finished { status, stdout: stdout.join().unwrap_or_default(), stderr: stderr.join().unwrap_or_default() };
    assert!(!killed, "{shown} was still running after {limit:?}: {finished}");
    finished
}

fn read_all(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait_for_exit(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("cannot wait for a child") {
            return Some(status);
        }
        if start.elapsed() > limit {
            return None;
        }
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

/// What a running program has printed so far, both streams in the order in which they arrived.
#[derive(Default)]
struct Transcript {
    lines: Mutex<Vec<String>>,
    grown: Condvar,
    /// Streams that have not ended yet.
    open: AtomicUsize,
}

/// A running program. Dropping it kills it.
pub struct Program {
    name: String,
    child: Child,
    transcript: Arc<Transcript>,
}

impl Program {
    /// Starts `path` with the arguments that `arguments` adds. The kernel kills it too should this test program die.
    pub fn start(name: &str, path: &Path, arguments: impl FnOnce(&mut Command)) -> Self {
        let mut command = dying_with_us(path);
        arguments(&mut command);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {name} ({}): {error}", path.display()));
        let transcript = Arc::new(Transcript::default());
        record(child.stdout.take(), Arc::clone(&transcript));
        record(child.stderr.take(), Arc::clone(&transcript));
        Self { name: name.to_string(), child, transcript }
    }

    /// Waits for a line that `wanted` accepts and returns it; panics if the program ends first, or takes too long.
    pub fn wait_for_line(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        let start = Instant::now();
        loop {
            if let Some(line) = self.find_line(&wanted) {
                return line;
            }
            if let Some(status) = self.child.try_wait().expect("cannot wait for a child") {
                // Its last words may still be on their way through the pipe.
                std::thread::park_timeout(Duration::from_millis(50));
                if let Some(line) = self.find_line(&wanted) {
                    return line;
                }
                panic!("{} ended ({status}) before {what}:\n{}", self.name, self.printed());
            }
            assert!(
                start.elapsed() < READY_LIMIT,
                "{} did not print {what} within {READY_LIMIT:?}:\n{}",
                self.name,
                self.printed()
            );
        }
    }

    /// Looks through what was printed; if nothing fits, waits a little for more.
    fn find_line(&self, wanted: &impl Fn(&str) -> bool) -> Option<String> {
        let lines = self.transcript.lines.lock().expect("a reader panicked");
        let found = lines.iter().find(|line| wanted(line)).cloned();
        if found.is_none() {
            let _ = self.transcript.grown.wait_timeout(lines, Duration::from_millis(20));
        }
        found
    }

    /// The lines it has printed so far that have `words` in them, without colours.
    pub fn lines_with(&self, words: &str) -> Vec<String> {
        let plain = self.printed().lines().map(without_colours).collect::<Vec<_>>();
        plain.into_iter().filter(|line| line.contains(words)).collect()
    }

    /// Everything it has printed so far, for messages.
    pub fn printed(&self) -> String {
        self.transcript.lines.lock().expect("a reader panicked").join("\n")
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(self.child.id().cast_signed()).expect("a child has a pid");
        kill_process(pid, signal).unwrap_or_else(|error| panic!("cannot signal {}: {error}", self.name));
    }

    /// Stops it where it is; returns when none of its threads runs any more.
    pub fn freeze(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        scratch::wait_until(&format!("{} is stopped", self.name), STOP_LIMIT, || {
            let mut tasks = std::fs::read_dir(&tasks).expect("a child has threads");
            tasks.all(|task| {
                let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
                // The state follows the name, which ends with the last parenthesis.
                stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('T')))
            })
        });
    }

    pub fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// Kills it at once, as a crash would, and waits until it is gone.
    pub fn kill(mut self) {
        self.kill_now();
    }

    fn kill_now(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("cannot wait for a child").is_some()
    }

    /// Asks it to stop and insists on exit code 0 within the limit.
    pub fn stop(self) {
        self.signal(Signal::TERM);
        let (status, printed, name) = self.wait(STOP_LIMIT);
        assert!(status.code() == Some(0), "{name} did not stop cleanly after SIGTERM ({status}):\n{printed}");
    }

    /// Waits for it to end; returns its status, what it printed, and its name.
    pub fn wait(mut self, limit: Duration) -> (ExitStatus, String, String) {
        let Some(status) = wait_for_exit(&mut self.child, limit) else {
            panic!("{} still runs after {limit:?}:\n{}", self.name, self.printed());
        };
        // Its last words may still be on their way through the pipes.
        scratch::wait_until(&format!("all that {} printed is read", self.name), STOP_LIMIT, || {
            self.transcript.open.load(Ordering::SeqCst) == 0
        });
        (status, self.printed(), self.name.clone())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill_now();
        if std::thread::panicking() {
            println!("--- what {} printed\n{}", self.name, self.printed());
        }
    }
}

/// `setpriv` (util-linux) sets the parent-death signal and then becomes the program: the pid stays the same.
fn dying_with_us(path: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]).arg(path);
    command
}

fn without_colours(line: &str) -> String {
    let mut parts = line.split('\u{1b}');
    let first = parts.next().unwrap_or_default().to_string();
    // Each of the others begins with `[`, numbers and `m`.
    first + &parts.filter_map(|part| part.split_once('m')).map(|(_, text)| text).collect::<String>()
}

fn record(pipe: Option<impl Read + Send + 'static>, transcript: Arc<Transcript>) {
    let Some(pipe) = pipe else { return };
    transcript.open.fetch_add(1, Ordering::SeqCst);
    std::thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(count) if count > 0) {
            let text = String::from_utf8_lossy(&line).trim_end().to_string();
            line.clear();
            transcript.lines.lock().expect("a test panicked while reading").push(text);
            transcript.grown.notify_all();
        }
        transcript.open.fetch_sub(1, Ordering::SeqCst);
    });
}
