//! Places on this machine that a test may use: directories, loopback ports, loop mounts, and its turn on the processors.
//! Everything taken here is given back when the value is dropped, also when the test panics.

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use crate::tools;

/// Polls `condition` until it holds; panics, naming `what`, when `limit` has passed.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < limit, "waited {limit:?} in vain until {what}");
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// Prints a line that libtest does not swallow when the test passes: figures, and what had to be left out.
pub fn notice(text: &str) {
    let _ = writeln!(std::io::stderr(), "e2e: {text}");
}

/// A directory on the disk that holds the build (not `/tmp`, which may be memory), removed at the end.
pub fn directory() -> TempDir {
    let mut builder = tempfile::Builder::new();
    builder.prefix("e2e-");
    if std::env::var_os("NBDCAST_TEST_KEEP").is_some() {
        builder.disable_cleanup(true);
    }
    builder.tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("cannot make a directory under target/tmp")
}

/// A short directory for Unix sockets, whose paths must stay below 108 bytes.
pub fn socket_directory() -> TempDir {
    tempfile::Builder::new().prefix("nbdcast-").tempdir().expect("cannot make a directory for sockets")
}

/// A loopback port that nobody listens on and no test was given before. Below the range from which the kernel takes
/// the ports of outgoing connections, so that none of those can sit on it when the program binds it.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let base = 12_000 + (std::process::id() % 150) as u16 * 100;
    loop {
        let port = base + NEXT.fetch_add(1, Ordering::Relaxed) % 5_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Lets this program, and those that it starts, have so many files open.
pub fn allow_open_files(count: u64) {
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < count) {
        let raised = Rlimit { current: Some(count), maximum: limit.maximum };
        setrlimit(Resource::Nofile, raised).expect("cannot raise the limit of open files");
    }
}

static MACHINE: RwLock<()> = RwLock::new(());

/// Taken by a test that may share the machine with others.
pub fn shared_machine() -> RwLockReadGuard<'static, ()> {
    MACHINE.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Taken by a test that measures: no other test of this program runs meanwhile.
pub fn quiet_machine() -> RwLockWriteGuard<'static, ()> {
    MACHINE.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A small ext4 of its own in a file, mounted through a loop device.
pub struct LoopDisk {
    file: PathBuf,
    mountpoint: PathBuf,
    mounted: bool,
}

/// Mounting one loop device at a time keeps `losetup --find` of parallel tests from racing for the same device.
static MOUNTING: Mutex<()> = Mutex::new(());

impl LoopDisk {
    /// Makes and mounts a filesystem of `size` bytes at `under/name`. Panics where loop mounts do not work: ask
    /// [`loop_mounts_work`] first.
    pub fn new(under: &Path, name: &str, size: u64) -> Self {
        let mut disk = Self { file: under.join(format!("{name}.ext4")), mountpoint: under.join(name), mounted: false };
        std::fs::File::create(&disk.file)
            .and_then(|file| file.set_len(size))
            .expect("cannot make the file of a loop disk");
        std::fs::create_dir_all(&disk.mountpoint).expect("cannot make a mount point");
        tools::run("mkfs.ext4", |command| {
            command.args(["-q", "-F", "-m", "0"]).arg(&disk.file);
        });
        disk.mount();
        disk
    }

    pub fn path(&self) -> &Path {
        &self.mountpoint
    }

    pub fn mount(&mut self) {
        mount(&self.file, &self.mountpoint, "loop").expect("cannot mount a loop disk");
        self.mounted = true;
    }

    /// Unmounts; nothing may have files open on it any more.
    pub fn unmount(&mut self) {
        tools::run("umount", |command| {
            command.arg(&self.mountpoint);
        });
        self.mounted = false;
    }

    /// What a power cut does to this disk: from now on nothing reaches it, and what was not synced is lost at the
    /// next mount, journal of the filesystem included.
    pub fn cut_power(&self) {
        tools::run("xfs_io", |command| {
            command.args(["-x", "-c", "shutdown"]).arg(&self.mountpoint);
        });
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if self.mounted {
            let _ = tools::command("umount").arg("-l").arg(&self.mountpoint).status();
        }
    }
}

/// Mounts the image `file` at `mountpoint`; `options` as for `mount -o`.
pub fn mount(file: &Path, mountpoint: &Path, options: &str) -> Result<(), String> {
    let _one_at_a_time = MOUNTING.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut command: Command = tools::command("mount");
    command.args(["-o", options]).arg(file).arg(mountpoint);
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_string()) }
}

/// A mounted image that is unmounted when this is dropped.
pub struct Mounted(PathBuf);

impl Mounted {
    pub fn new(file: &Path, mountpoint: &Path, options: &str) -> Self {
        std::fs::create_dir_all(mountpoint).expect("cannot make a mount point");
        if let Err(error) = mount(file, mountpoint, options) {
            panic!("mount -o {options} {}: {error}", file.display());
        }
        Self(mountpoint.to_path_buf())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = tools::command("umount").arg(&self.0).status();
    }
}

/// Whether this user may loop-mount a filesystem here. If not, says so aloud, naming the story that is left out.
pub fn loop_mounts_work(story: &str) -> bool {
    let place = directory();
    let (file, mountpoint) = (place.path().join("probe.ext4"), place.path().join("probe"));
    let made = std::fs::File::create(&file).and_then(|file| file.set_len(8 << 20));
    made.expect("cannot make the file of a loop disk");
    std::fs::create_dir(&mountpoint).expect("cannot make a mount point");
    tools::run("mkfs.ext4", |command| {
        command.args(["-q", "-F"]).arg(&file);
    });
    match mount(&file, &mountpoint, "loop") {
        Ok(()) => {
            drop(Mounted(mountpoint));
            true
        }
        Err(error) => {
            notice(&format!(
                "SKIPPED {story}: loop mounts do not work here ({error}); run as root with /dev/loop* to run it"
            ));
            false
        }
    }
}
