//! Real clients against `nbdcast demo`: libnbd's tools, fio, QEMU's tools, and a filesystem through nbdfuse and a loop device.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use tempfile::TempDir;

use crate::cluster;
use crate::nbd::{self, Client, Endpoint};
use crate::program::{self, Program};
use crate::scratch::{self, Mounted};
use crate::seed::{self, Rng};
use crate::tools;

/// A running `nbdcast demo` in a directory of its own.
pub struct Demo {
    program: Option<Program>,
    pub endpoint: Endpoint,
    directory: TempDir,
    size: u64,
    _alone: MutexGuard<'static, ()>,
}

/// One demo at a time: each has its own data and NBD port, but a user of the machine would run only one as well.
static ONE_DEMO: Mutex<()> = Mutex::new(());

impl Demo {
    pub fn start(size: u64) -> Self {
        let alone = ONE_DEMO.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut demo = Self {
            program: None,
            endpoint: Endpoint::Tcp(scratch::free_port()),
            directory: scratch::directory(),
            size,
            _alone: alone,
        };
        demo.restart();
        demo
    }

    /// Starts it on whatever is in its directory.
    pub fn restart(&mut self) {
        let Endpoint::Tcp(port) = self.endpoint else {
            panic!("the demo of the tests listens on TCP");
        };
        let mut program = Program::start("nbdcast demo", &program::nbdcast(), |command| {
            command
                .arg("demo")
                .arg("--dir")
                .arg(self.directory.path().join("demo"))
                .arg("--size")
                .arg(format!("{}MiB", self.size >> 20))
                .args(["--replicas", "3", "--listen"])
                .arg(format!("127.0.0.1:{port}"))
                .args(["--admin", "127.0.0.1:0"]);
        });
        let uri = self.uri();
        program.wait_for_line(&uri, |line| line.contains(&uri));
        self.program = Some(program);
    }

    pub fn uri(&self) -> String {
        self.endpoint.uri("demo")
    }

    pub fn connect(&self) -> Client {
        Client::connect(&self.endpoint, "demo").expect("cannot connect to the demo")
    }

    pub fn scratch(&self) -> &Path {
        self.directory.path()
    }

    pub fn kill(&mut self) {
        self.program.take().expect("the demo is running").kill();
    }

    /// Stops it; its three images must be identical. Returns their content.
    pub fn stop(&mut self) -> Vec<u8> {
        self.program.take().expect("the demo is running").stop();
        let mut images = Vec::new();
        find_images(&self.directory.path().join("demo"), &mut images);
        assert_eq!(images.len(), 3, "three replicas, found {images:?}");
        cluster::identical(images.into_iter().map(|path| ("an image", path)).collect())
    }
}

fn find_images(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).expect("cannot list the demo's directory") {
        let path = entry.expect("cannot list the demo's directory").path();
        if path.is_dir() {
            find_images(&path, found);
        } else if path.ends_with("image.raw") {
            found.push(path);
        }
    }
}

/// A file of `size` random bytes.
fn random_file(path: &Path, size: u64, mut rng: Rng) {
    let mut file = File::create(path).expect("cannot create a file");
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..size >> 20 {
        rng.fill(&mut buffer);
        file.write_all(&buffer).expect("cannot write a file");
    }
}

fn assert_same_files(one: &Path, two: &Path) {
    let (mut one, mut two) = (File::open(one).expect("a file"), File::open(two).expect("a file"));
    let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for offset in (0..).step_by(1 << 20) {
        let count = one.read(&mut left).expect("cannot read");
        if count == 0 {
            assert_eq!(two.read(&mut right).expect("cannot read"), 0, "the second file is longer");
            return;
        }
        two.read_exact(&mut right[..count]).expect("the second file is shorter");
        assert!(left[..count] == right[..count], "the files differ in the MiB at {offset}");
    }
}

#[test]
fn nbdinfo_lists_the_demo_and_what_it_can_do() {
    let _turn = scratch::shared_machine();
    let mut demo = Demo::start(64 << 20);
    let shown = tools::run("nbdinfo", |command| {
        command.arg("--json").arg(demo.uri());
    });
    let document: serde_json::Value = serde_json::from_str(&shown).expect("nbdinfo's JSON");
    let export = &document["exports"][0];
    assert_eq!(export["export-size"], 64 << 20);
    for ability in ["can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"] {
        assert_eq!(export[ability], true, "{ability} in {shown}");
    }
    let listed = tools::run("nbdinfo", |command| {
        command.arg("--list").arg(demo.endpoint.uri(""));
    });
    assert!(listed.contains("demo"), "the export list names the demo: {listed}");
    demo.stop();
}

#[test]
fn nbdcopy_brings_256_mib_in_and_out_unchanged() {
    let _turn = scratch::shared_machine();
    let (_, rng) = seed::of_test("clients::nbdcopy_brings_256_mib_in_and_out_unchanged");
    let mut demo = Demo::start(256 << 20);
    let (original, copy) = (demo.scratch().join("in"), demo.scratch().join("out"));
    random_file(&original, 256 << 20, rng);
    tools::run("nbdcopy", |command| {
        command.args(["--flush", "-C", "4"]).arg(&original).arg(demo.uri());
    });
    tools::run("nbdcopy", |command| {
        command.args(["-C", "4"]).arg(demo.uri()).arg(&copy);
    });
    assert_same_files(&original, &copy);
    let image = demo.stop();
    let written = std::fs::read(&original).expect("the original file");
    assert!(image == written, "the images hold what nbdcopy wrote");
}

#[test]
fn fio_verifies_its_random_writes_at_queue_depth_32() {
    let _turn = scratch::shared_machine();
    let mut demo = Demo::start(64 << 20);
    let place = demo.scratch().to_path_buf();
    tools::run("fio", |command| {
        command
            .current_dir(&place)
            .args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32"])
            .args(["--size=64M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"])
            .arg(format!("--uri={}", demo.uri()));
    });
    demo.stop();
}

#[test]
fn qemu_img_converts_and_compares() {
    let _turn = scratch::shared_machine();
    let (_, rng) = seed::of_test("clients::qemu_img_converts_and_compares");
    let mut demo = Demo::start(64 << 20);
    let original = demo.scratch().join("in");
    random_file(&original, 48 << 20, rng);
    let file = File::options().write(true).open(&original).expect("a file");
    file.set_len(64 << 20).expect("a hole at its end");
    tools::run("qemu-img", |command| {
        command.args(["convert", "-n", "-f", "raw", "-O", "raw"]);
        command.arg(&original).arg(demo.uri());
    });
    tools::run("qemu-img", |command| {
        command.args(["compare", "-f", "raw", "-F", "raw"]).arg(&original).arg(demo.uri());
    });
    demo.stop();
}

/// What qemu-io does of everything that it can, and reads back.
pub const QEMU_IO_ORDERS: [&str; 13] = [
    "write -P 0xab 1M 64k",
    "write -f -P 0xcd 1088k 512",
    "write -z 2M 1M",
    "discard 3M 1M",
    "aio_write -P 0x11 8M 4M",
    "aio_write -P 0x22 12M 4M",
    "aio_flush",
    "flush",
    "read -P 0xab 1M 64k",
    "read -P 0xcd 1088k 512",
    "read -P 0 2M 1M",
    "read -P 0x11 8M 4M",
    "read -P 0x22 12M 4M",
];

#[test]
fn qemu_io_reads_back_its_patterns() {
    let _turn = scratch::shared_machine();
    let mut demo = Demo::start(64 << 20);
    let said = tools::run("qemu-io", |command| {
        command.args(["-f", "raw"]);
        for order in QEMU_IO_ORDERS {
            command.arg("-c").arg(order);
        }
        command.arg(demo.uri());
    });
    assert!(!said.contains("failed"), "every pattern is found again: {said}");
    let image = demo.stop();
    assert!(image[1 << 20..(1 << 20) + (64 << 10)].iter().all(|byte| *byte == 0xab));
}

#[test]
fn a_filesystem_lives_on_it_through_nbdfuse_and_a_loop_device() {
    let _turn = scratch::shared_machine();
    if !scratch::loop_mounts_work("the filesystem through nbdfuse") {
        return;
    }
    if !Path::new("/dev/fuse").exists() {
        scratch::notice("SKIPPED the filesystem through nbdfuse: there is no /dev/fuse here");
        return;
    }
    let mut demo = Demo::start(128 << 20);
    let fuse = Fuse::mount(&demo);
    tools::run("mkfs.ext4", |command| {
        command.args(["-q", "-F"]).arg(&fuse.disk);
    });
    let mountpoint = demo.scratch().join("mnt");
    let content = vec![0x5a; 8 << 20];
    {
        let _mounted = Mounted::new(&fuse.disk, &mountpoint, "loop");
        for name in ["one", "two", "three"] {
            let mut file = File::create(mountpoint.join(name)).expect("a file on the volume");
            file.write_all(&content).expect("writing to the volume");
            file.sync_all().expect("fsync reaches the volume");
        }
    }
    tools::run("e2fsck", |command| {
        command.arg("-fn").arg(&fuse.disk);
    });
    drop(fuse);
    let fuse = Fuse::mount(&demo);
    {
        let _mounted = Mounted::new(&fuse.disk, &mountpoint, "loop,ro");
        let found = std::fs::read(mountpoint.join("three")).expect("the file is still there");
        assert!(found == content, "the file holds what was written");
    }
    drop(fuse);
    demo.stop();
}

/// An export as a file, by nbdfuse.
struct Fuse {
    program: Option<Program>,
    disk: PathBuf,
    mountpoint: PathBuf,
}

impl Fuse {
    fn mount(demo: &Demo) -> Self {
        let mountpoint = demo.scratch().join("fuse");
        std::fs::create_dir_all(&mountpoint).expect("a mount point for nbdfuse");
        let disk = mountpoint.join("disk");
        let nbdfuse = tools::command("nbdfuse").get_program().to_os_string();
        let program = Program::start("nbdfuse", Path::new(&nbdfuse), |command| {
            command.args(["-C", "4"]).arg(&disk).arg(demo.uri());
        });
        let fuse = Self { program: Some(program), disk, mountpoint };
        scratch::wait_until("nbdfuse shows the disk", Duration::from_secs(20), || fuse.disk.exists());
        fuse
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        let unmount = tools::attempt("fusermount3", |command| {
            command.arg("-u").arg(&self.mountpoint);
        });
        if let (true, Some(program)) = (unmount.status.success(), self.program.take()) {
            program.wait(Duration::from_secs(20));
        }
    }
}

#[test]
fn the_demo_serves_what_it_served_before() {
    let _turn = scratch::shared_machine();
    let mut demo = Demo::start(32 << 20);
    let mut client = demo.connect();
    let wanted = nbd::HAS_FLUSH | nbd::HAS_FUA | nbd::HAS_TRIM | nbd::HAS_WRITE_ZEROES | nbd::HAS_MULTI_CONN;
    assert_eq!(client.flags & wanted, wanted, "{client:?}");
    client.write(12_345, b"still here", 0).expect("a write");
    client.disconnect();
    demo.stop();
    demo.restart();
    let mut client = demo.connect();
    assert_eq!(client.read(12_345, 10).expect("a read"), b"still here");
    client.disconnect();
    demo.stop();
}
