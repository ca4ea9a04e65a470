//! Evidence from outside the programs, by strace: no write is answered before it is durable in some agent's journal, and
//! none reaches an image before it is durable in that agent's own journal. A large one is answered when it is durable in some
//! agent's image, and reaches none before that agent's journal has something of it.
//!
//! One strace follows the engine and all agents, so the order of its lines is an order of causes: a call's end is in the
//! log before anything that follows from it. Each write carries a marker, and the log shows which call carried it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use rustix::process::Signal;

use crate::cluster::{Agent, Cluster};
use crate::plan::Plan;
use crate::program::Program;
use crate::scratch;
use crate::tools;

const WRITES: u64 = 150;
const MARKER: &str = "NBDCAST-MARKER-";

const SMALL_BYTES: usize = 4096;
const LARGE_BYTES: usize = 512 << 10;

#[test]
fn no_write_is_answered_before_it_is_durable_nor_applied_before_it_is_journaled() {
    let (evidence, text) = traced(SMALL_BYTES);
    evidence.judge(&text);
}

#[test]
fn no_large_write_is_answered_before_it_is_durable_in_an_image_nor_written_there_before_its_intent_is_durable() {
    let (evidence, text) = traced(LARGE_BYTES);
    evidence.judge_large(&text);
}

/// What is seen of writes of so many bytes, one after the other, and the trace.
fn traced(bytes: usize) -> (Evidence, String) {
    let _turn = scratch::shared_machine();
    let mut cluster = Cluster::serving(Plan::default());
    let mut client = cluster.connect();
    client.write(0, &[1; 4096], 0).expect("a write before the trace");
    let log = cluster.directory().join("trace");
    // All small writes of the trace in one group, as an agent that was behind makes it; of large ones the beginning.
    let shown_bytes = if bytes == SMALL_BYTES { 1 << 20 } else { 64 };
    let mut strace = attach(&cluster, &log, shown_bytes);
    for number in 1..=WRITES {
        let mut payload = format!("{MARKER}{number:06}").into_bytes();
        payload.resize(bytes, b'x');
        client.write(number % 15 * 2 * bytes as u64, &payload, 0).expect("a write under the trace");
    }
    for name in cluster.names() {
        cluster.wait_caught_up(name);
    }
    client.disconnect();
    let ended = strace.has_ended();
    strace.signal(Signal::INT);
    let (_, said, _) = strace.wait(std::time::Duration::from_secs(30));
    assert!(!ended, "strace ended early: {said}");
    let text = String::from_utf8_lossy(&std::fs::read(&log).expect("the trace")).into_owned();
    let synchronous = cluster.agents.iter().filter(|agent| opened_synchronously(agent));
    let synchronous = synchronous.map(|agent| agent.name.clone()).collect();
    let mut evidence = Evidence::new(&cluster, synchronous, bytes == LARGE_BYTES);
    for (index, line) in text.lines().enumerate() {
        evidence.read(index + 1, line);
    }
    cluster.stop();
    (evidence, text)
}

fn attach(cluster: &Cluster, log: &Path, shown_bytes: usize) -> Program {
    let strace = tools::command("strace").get_program().to_os_string();
    let mut pids: Vec<u32> = cluster.agents.iter().map(|agent| agent.process().pid()).collect();
    pids.push(cluster.engine().pid());
    let mut program = Program::start("strace", Path::new(&strace), |command| {
        command.args(["-f", "-yy", "-ttt", "-s", &shown_bytes.to_string(), "-o"]).arg(log).args(["-e"]).arg(
            "trace=write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,sendmmsg,fdatasync,fsync,sync_file_range,\
             msync,io_uring_enter,fallocate",
        );
        for pid in &pids {
            command.args(["-p", &pid.to_string()]);
        }
    });
    for pid in pids {
        let attached = format!("Process {pid} attached");
        program.wait_for_line(&attached, |line| line.contains(&attached));
    }
    program
}

/// Whether the agent's process holds its journal open with O_DSYNC, so that a plain write to it is durable at its end.
fn opened_synchronously(agent: &Agent) -> bool {
    const O_DSYNC: u32 = 0o10000;
    let process = format!("/proc/{}", agent.process().pid());
    let journal = agent.replica().join("journal").canonicalize().expect("the journal");
    let descriptors = std::fs::read_dir(format!("{process}/fd")).expect("the agent's descriptors");
    descriptors.flatten().any(|descriptor| {
        let name = descriptor.file_name().to_string_lossy().into_owned();
        let info = std::fs::read_to_string(format!("{process}/fdinfo/{name}")).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|text| u32::from_str_radix(text.trim(), 8).ok());
        std::fs::read_link(descriptor.path()).is_ok_and(|target| target == journal)
            && flags.is_some_and(|flags| flags & O_DSYNC != 0)
    })
}

/// What the trace has shown so far.
struct Evidence {
    /// Journal and image of each agent, as strace prints them, with the agent's name.
    journals: Vec<(String, String)>,
    images: Vec<(String, String)>,
    /// How strace prints the engine's end of the client's connection.
    client_side: String,
    /// Agents whose journal is opened with O_DSYNC.
    synchronous: BTreeSet<String>,
    /// Calls that have begun and not ended, by thread: the call with its arguments.
    begun: BTreeMap<String, String>,
    /// Markers written to an agent's journal and not yet synced; those being synced right now, by thread.
    unsynced: BTreeMap<String, BTreeSet<u64>>,
    syncing: BTreeMap<String, (String, BTreeSet<u64>)>,
    /// Markers durable in each agent's journal.
    durable: BTreeMap<String, BTreeSet<u64>>,
    applied: BTreeSet<(String, u64)>,
    /// Writes are large. Then, by thread: whether its last durable write was to a journal, and what it wrote to an image since.
    are_large: bool,
    in_place: BTreeMap<String, (bool, BTreeSet<u64>)>,
    /// Markers durable in some agent's image.
    durable_in_image: BTreeSet<u64>,
    replies: u64,
    faults: Vec<String>,
}

impl Evidence {
    fn new(cluster: &Cluster, synchronous: BTreeSet<String>, are_large: bool) -> Self {
        let shown = |agent: &Agent, file: &str| {
            let path = agent.replica().join(file).canonicalize().expect("a replica's file");
            (format!("<{}>", path.display()), agent.name.clone())
        };
        let port = cluster.uri().rsplit(':').next().map(|tail| tail.split('/').next().unwrap_or(tail).to_string());
        Self {
            journals: cluster.agents.iter().map(|agent| shown(agent, "journal")).collect(),
            images: cluster.agents.iter().map(|agent| shown(agent, "image.raw")).collect(),
            client_side: format!("TCP:[127.0.0.1:{}->", port.expect("a port in the URI")),
            synchronous,
            begun: BTreeMap::new(),
            unsynced: BTreeMap::new(),
            syncing: BTreeMap::new(),
            durable: BTreeMap::new(),
            applied: BTreeSet::new(),
            are_large,
            in_place: BTreeMap::new(),
            durable_in_image: BTreeSet::new(),
            replies: 0,
            faults: Vec::new(),
        }
    }

    /// Takes one line: `THREAD TIME CALL(ARGUMENTS) = RESULT`, or a call's beginning or end alone.
    fn read(&mut self, number: usize, line: &str) {
        let Some((thread, rest)) = line.split_once(' ') else {
            return;
        };
        let Some((_time, call)) = rest.trim_start().split_once(' ') else {
            return;
        };
        if let Some(begun) = call.strip_suffix("<unfinished ...>") {
            self.begin(number, thread, begun);
            self.begun.insert(thread.to_string(), begun.to_string());
        } else if call.starts_with("<... ") {
            let begun = self.begun.remove(thread).unwrap_or_default();
            self.end(thread, &begun, result_of(call));
        } else if call.contains('(') {
            self.begin(number, thread, call);
            self.end(thread, call, result_of(call));
        }
    }

    /// A call begins: what must already be true?
    fn begin(&mut self, line: usize, thread: &str, call: &str) {
        if is_sync(call) {
            if let Some(agent) = owner(&self.journals, call) {
                let waiting = self.unsynced.get(&agent).cloned().unwrap_or_default();
                self.syncing.insert(thread.to_string(), (agent, waiting));
            }
        } else if let Some(agent) = owner(&self.images, call) {
            for marker in markers(call) {
                let (has_intent, written) = self.in_place.entry(thread.to_string()).or_default();
                written.insert(marker);
                let durable = if self.are_large { Some(&*has_intent) } else { None };
                let durable = durable
                    .copied()
                    .unwrap_or_else(|| self.durable.get(&agent).is_some_and(|set| set.contains(&marker)));
                if !durable {
                    let fault = format!("line {line}: {agent} applies write {marker} before its journal has it");
                    self.faults.push(fault);
                }
                self.applied.insert((agent.clone(), marker));
            }
        } else if call.split('<').nth(1).is_some_and(|file| file.starts_with(&self.client_side)) {
            self.replies += 1;
            let in_a_journal = self.durable.values().any(|set| set.contains(&self.replies));
            let durable = if self.are_large { self.durable_in_image.contains(&self.replies) } else { in_a_journal };
            if !durable {
                let fault = format!("line {line}: write {} is answered before anybody has it durably", self.replies);
                self.faults.push(fault);
            }
        }
    }

    /// A call has ended: what has become true?
    fn end(&mut self, thread: &str, call: &str, result: i64) {
        if result < 0 {
            self.syncing.remove(thread);
            return;
        }
        if is_sync(call) {
            if let Some((agent, synced)) = self.syncing.remove(thread) {
                if let Some(unsynced) = self.unsynced.get_mut(&agent) {
                    unsynced.retain(|marker| !synced.contains(marker));
                }
                self.durable.entry(agent).or_default().extend(synced);
            }
            if owner(&self.images, call).is_some()
                && let Some((_, written)) = self.in_place.remove(thread)
            {
                self.durable_in_image.extend(written);
            }
        } else if let Some(agent) = owner(&self.journals, call) {
            self.in_place.entry(thread.to_string()).or_default().0 = true;
            let at_once = call.contains("RWF_DSYNC") || self.synchronous.contains(&agent);
            let kept = if at_once { &mut self.durable } else { &mut self.unsynced };
            kept.entry(agent).or_default().extend(markers(call));
        }
    }

    fn no_fault(&self, text: &str) -> &'static str {
        let keep = std::env::var_os("NBDCAST_TEST_KEEP").is_some();
        let hint = if keep { "" } else { " (NBDCAST_TEST_KEEP=1 keeps the trace)" };
        assert!(self.faults.is_empty(), "{:#?}{hint}", self.faults);
        assert!(self.replies >= WRITES, "{} answers seen in {} lines{hint}", self.replies, text.lines().count());
        hint
    }

    fn judge_large(&self, text: &str) {
        let hint = self.no_fault(text);
        let agents = self.images.iter().map(|(_, agent)| self.applied.iter().filter(|(of, _)| of == agent).count());
        let written: Vec<usize> = agents.collect();
        assert!(written.iter().all(|count| *count as u64 >= WRITES), "{written:?} of {WRITES} seen in images{hint}");
        scratch::notice(&format!(
            "strace: {} answers, each after a durable image; {} image writes, each after a journal write of its thread",
            self.replies,
            self.applied.len()
        ));
    }

    fn judge(&self, text: &str) {
        let hint = self.no_fault(text);
        for (_, agent) in &self.journals {
            let durable = self.durable.get(agent).map_or(0, BTreeSet::len);
            assert!(durable as u64 >= WRITES, "{agent}: {durable} of {WRITES} writes seen in its journal{hint}");
        }
        // Images may be written late, at a checkpoint, and in ways that hide the marker: then there is nothing to show.
        scratch::notice(&format!(
            "strace: {} answers, each after a durable journal write; {} image writes, each after its own",
            self.replies,
            self.applied.len()
        ));
        assert!(!self.applied.is_empty(), "no write to an image was seen{hint}");
    }
}

fn is_sync(call: &str) -> bool {
    call.starts_with("fdatasync(") || call.starts_with("fsync(")
}

/// Whose file the call's descriptor is.
fn owner(files: &[(String, String)], call: &str) -> Option<String> {
    let arguments = call.split_once('(')?.1;
    let descriptor = arguments.split([',', ')']).next()?.trim_end();
    let found = files.iter().find(|(shown, _)| descriptor.ends_with(shown.as_str()));
    found.map(|(_, agent)| agent.clone())
}

fn markers(call: &str) -> Vec<u64> {
    let after = call.split(MARKER).skip(1);
    after.filter_map(|tail| tail.get(..6)?.parse().ok()).collect()
}

/// The number after the last `= `; -1 if there is none.
fn result_of(call: &str) -> i64 {
    let number = call.rsplit_once("= ").map(|(_, tail)| tail);
    let number = number.and_then(|tail| tail.split_whitespace().next());
    number.and_then(|text| text.parse().ok()).unwrap_or(-1)
}
