//! fio as the client of a story: one run that is measured, or runs that verify what they wrote, one after another, for as
//! long as the story goes on.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::seed::Rng;
use crate::tools;

/// Longer than any run that is measured.
const LONGEST: Duration = Duration::from_secs(600);

/// What fio saw of one run.
pub struct Figures {
    pub iops: f64,
    pub p99_us: f64,
}

/// Random writes of 4 KiB, measured; `limits` are further arguments that say when it ends, and how fast it may be.
pub fn randwrite(cluster: &Cluster, depth: u32, limits: &[&str]) -> Figures {
    let place = cluster.directory().to_path_buf();
    let shown = tools::run_within(LONGEST, "fio", |command| {
        command
            .current_dir(&place)
            .args(["--name=w", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--output-format=json"])
            .arg(format!("--uri={}", cluster.uri()))
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--size={}", cluster.plan.size))
            .args(limits);
    });
    let start = shown.find('{').expect("fio prints JSON");
    let document: serde_json::Value = serde_json::from_str(&shown[start..]).expect("fio's JSON");
    let job = &document["jobs"][0];
    assert_eq!(job["error"], 0, "fio saw no error");
    let nanoseconds = &job["write"]["clat_ns"]["percentile"]["99.000000"];
    Figures {
        iops: job["write"]["iops"].as_f64().expect("fio's IOPS"),
        p99_us: nanoseconds.as_f64().expect("fio's p99") / 1_000.0,
    }
}

/// fio that writes, reads everything back and begins again. An error or a wrong byte ends it, and fails the story.
pub struct Verifying {
    stop: Arc<AtomicBool>,
    runs: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

/// Bytes that each run writes and reads back.
const RUN_BYTES: u64 = 8 << 20;

impl Verifying {
    pub fn start(cluster: &Cluster, mut rng: Rng) -> Self {
        let (place, uri, size) = (cluster.directory().to_path_buf(), cluster.uri(), cluster.plan.size);
        let (stop, runs) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&runs));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                verify_once(&place, &uri, size, &mut rng);
                counted.fetch_add(1, Ordering::SeqCst);
            }
        });
        Self { stop, runs, thread }
    }

    /// Panics if it has failed; returns the number of whole runs.
    pub fn is_well(&self) -> u64 {
        assert!(!self.thread.is_finished(), "fio failed, see above");
        self.runs.load(Ordering::SeqCst)
    }

    /// Lets the run end that is under way, and insists that all of them were without any error. Returns how many.
    pub fn finish(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("fio saw an error");
        self.runs.load(Ordering::SeqCst)
    }
}

fn verify_once(place: &PathBuf, uri: &str, size: u64, rng: &mut Rng) {
    let depth = rng.between(2, 16);
    tools::run("fio", |command| {
        command
            .current_dir(place)
            .args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bsrange=4k-64k"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
            .arg("--rate=24m,6m")
            .arg(format!("--iodepth={depth}"))
            .arg(format!("--offset={}", rng.below((size - RUN_BYTES) >> 16) << 16))
            .arg(format!("--size={RUN_BYTES}"))
            .arg(format!("--randseed={}", rng.below(1 << 31)))
            .arg(format!("--uri={uri}"));
    });
}
