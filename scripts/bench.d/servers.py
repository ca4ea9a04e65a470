"""The servers that are measured: starting and stopping them, what their answers promise, what they cost.

Starts processes and asks the kernel about them; never loads a server and never judges a figure."""

import atexit
import contextlib
import dataclasses
import filecmp
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.request

from say import say

SIZE_MIB = 256
DELAY_MS = 300
DEMO, AGENTS, SLOW = "nbdcast demo", "nbdcast, 3 agents", "nbdcast, one slow disk"
SCRUBBED = "nbdcast, a scrub under way"
QUORUM, SLOW_QUORUM, SINGLE, NBDKIT = "QEMU quorum", "QEMU quorum, one slow disk", "qemu-nbd alone", "nbdkit file"
TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Promise:
    """How many copies there are, and how many hold a write durably when it is answered."""
    copies: int
    durable: int

    def __str__(self):
        copies = "1 copy" if self.copies == 1 else f"{self.copies} copies"
        if self.durable == 0:
            return f"{copies}, answered writes are NOT durable"
        return f"{copies}, a write is answered when durable on {self.durable}"


def unlike(one, other, writes):
    """Why figures of the two promises cannot be compared as they are, or None. Reads only tell of copies."""
    if one.copies == other.copies and (not writes or one.durable == other.durable):
        return None
    return f"{one} against {other}" if writes else f"{one.copies} copies to read from against {other.copies}"


class Server:
    """One thing to measure: its processes, its NBD URI, and what its answers promise.

    `works` says which works it takes part in; None is all of them."""

    def __init__(self, name, promise, works=None):
        self.name, self.promise, self.works = name, promise, works
        self.uri = self.admin = self.slow_log = None
        self.processes = []

    def spawn(self, arguments, log, ready=None):
        """Starts a process that dies with this one. `ready` is a text in its output, or None not to wait."""
        with open(log, "wb") as out:
            process = subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *map(str, arguments)],
                                       stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)
        self.processes.append(process)
        if ready:
            wait_until(f"{self.name}: '{ready}'", lambda: ready in log.read_text(errors="replace"), process, log)
        return process

    def spawn_slow(self, arguments, place, log, ready=None):
        """The same with every durable write and sync delayed. The filter stops no other system call of it."""
        self.slow_log = place / "delayed"
        calls = "fsync,fdatasync,pwritev2"
        return self.spawn(
            ["strace", "-f", "--seccomp-bpf", "-qq", "-s", 0, "-o", self.slow_log, "-e", f"trace={calls}",
             "-e", f"inject={calls}:delay_enter={DELAY_MS * 1000}",
             "setpriv", "--pdeathsig", "KILL", "--", *arguments], log, ready)

    @contextlib.contextmanager
    def meanwhile(self):
        """What goes on during a load, besides it."""
        yield

    def delays(self):
        """How many calls of its slow disk were delayed so far."""
        return self.slow_log.read_text(errors="replace").count("(DELAYED)")

    def cpu_us(self):
        """Microseconds of processor time that its processes have used, all threads, user and system."""
        return sum(cpu_ticks(process.pid) for process in self.processes) * TICK_US

    def status(self):
        """The volume in nbdcast's own words."""
        with urllib.request.urlopen(f"http://{self.admin}/status", timeout=10) as answer:
            return json.load(answer)["volumes"][0]

    def settle(self, limit=30):
        """Waits until it rests: what one server still has to do must not fall into the next one's time."""
        start, before = time.monotonic(), None
        while time.monotonic() - start < limit:
            now = self.cpu_us()
            if before is not None and now - before <= TICK_US:
                if not self.admin or all(replica["state"] == "member" and replica["lag_records"] == 0
                                         for replica in self.status()["replicas"]):
                    return
            before = now
            time.sleep(0.15)
        say(f"{self.name} was still busy {limit} s after its load")

    def end(self, process):
        """Stops one process; of one under strace, the process that is traced."""
        if process.poll() is None:
            traced = children(process.pid) if process.args[4] == "strace" else []
            for pid in traced or [process.pid]:
                os.kill(pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                say(f"a process of {self.name} did not stop within 30 s and was killed")
                process.kill()
                process.wait()
        self.processes.remove(process)

    def stop(self):
        for process in reversed(list(self.processes)):
            self.end(process)


def children(pid):
    try:
        return [int(child) for child in pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def cpu_ticks(pid):
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def resident_bytes(pid):
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) << 10
    raise SystemExit(f"bench: process {pid} has no memory")


def wait_until(what, condition, process, log, limit=60):
    start = time.monotonic()
    while not condition():
        if process.poll() is not None or time.monotonic() - start > limit:
            ended = "ended early" if process.poll() is not None else f"not within {limit} s"
            raise SystemExit(f"bench: waited in vain for {what} ({ended}):\n{log.read_text(errors='replace')}")
        time.sleep(0.01)


def accepts(family, address):
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(address)
            return True
        except OSError:
            return False


def free_port(taken=[]):  # the list is meant to live as long as the program: no port is given twice
    start = 23000 + os.getpid() % 500 * 10
    for port in range(start, 32000):
        if port in taken:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        taken.append(port)
        return port
    raise SystemExit("bench: no free port")


def start_demo(server, place, programs):
    port, admin = free_port(), free_port()
    server.uri, server.admin = f"nbd://127.0.0.1:{port}/demo", f"127.0.0.1:{admin}"
    server.spawn([programs / "nbdcast", "demo", "--dir", place / "demo", "--size", f"{SIZE_MIB}MiB", "--replicas", 3,
                  "--listen", f"127.0.0.1:{port}", "--admin", server.admin], place / "log", ready=server.uri)


class Cluster:
    """An engine and agents of their own: what start_agents and the curves start, in the steps they need."""

    def __init__(self, server, place, programs, replicas=3, size_mib=SIZE_MIB, ack="first"):
        self.server, self.place, self.programs = server, place, programs
        self.names = "abcdefgh"[:replicas]
        self.ports = {name: free_port() for name in self.names}
        port, server.admin = free_port(), f"127.0.0.1:{free_port()}"
        server.uri = f"nbd://127.0.0.1:{port}/bench"
        self.config = place / "engine.toml"
        self.engine, self.agents = None, {}
        text = [f'[nbd]\nlisten = "127.0.0.1:{port}"\n[admin]\nlisten = "{server.admin}"\n',
                f'[[volume]]\nname = "bench"\nsize = "{size_mib}MiB"\nack = {{ write = "{ack}", flush = "{ack}" }}\n',
                # All stay members, at the price of waiting for the slowest when it is this far behind.
                'on_lag = "throttle"\n']
        text += [f'[[volume.replica]]\nname = "{name}"\naddress = "127.0.0.1:{self.ports[name]}"\n' for name in self.names]
        self.config.write_text("".join(text))

    def start_agent(self, name, slow=False):
        data = self.place / name
        data.mkdir(exist_ok=True)
        arguments = [self.programs / "listener-agent", "--listen", f"127.0.0.1:{self.ports[name]}", "--data", data]
        log, ready = self.place / f"log-{name}", f"ready 127.0.0.1:{self.ports[name]}"
        if slow:
            self.agents[name] = self.server.spawn_slow(arguments, self.place, log, ready)
        else:
            self.agents[name] = self.server.spawn(arguments, log, ready)

    def start_agents(self):
        for name in self.names:
            self.start_agent(name)

    def create(self):
        made = subprocess.run([self.programs / "nbdcast", "create", "--config", self.config],
                              stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if made.returncode != 0:
            raise SystemExit(f"bench: nbdcast create failed:\n{made.stdout}{made.stderr}")

    def serve(self):
        arguments = [self.programs / "nbdcast", "serve", "--config", self.config]
        self.engine = self.server.spawn(arguments, self.place / "log", ready=self.server.uri)


def start_agents(ack):
    def start(server, place, programs):
        cluster = Cluster(server, place, programs, ack=ack)
        cluster.start_agents()
        cluster.create()
        cluster.serve()
        return cluster
    return start


def start_slow_agents(ack):
    """The last agent's disk becomes slow once the volume is there and filled: `slow_down` is called then."""
    def start(server, place, programs):
        cluster = start_agents(ack)(server, place, programs)

        def slow_down():
            name = cluster.names[-1]
            server.end(cluster.agents[name])
            cluster.start_agent(name, slow=True)
            server.settle()
        server.slow_down = slow_down
    return start


def raw_file(path):
    """Written out, so that no write that is timed has to allocate."""
    with open(path, "wb") as file:
        for _ in range(SIZE_MIB):
            file.write(b"\x5a" * (1 << 20))
        os.fsync(file.fileno())
    return path


def sockets():
    directory = tempfile.mkdtemp(prefix="nbdcast-bench-")  # short: a socket's path has 108 bytes
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def qemu_nbd(where, image, aio="io_uring"):
    """One that makes each write durable before it answers."""
    return ["qemu-nbd", "--persistent", "--shared=8", "-f", "raw", "--cache=writethrough", f"--aio={aio}",
            *where, "-x", "", image]


class Scrubs:
    """One scrub of a volume after another, each of which has to find everything in order."""

    def __init__(self, server, programs):
        self.command = [programs / "nbdcast", "scrub", "bench", "--admin", f"http://{server.admin}"]
        self.ending = threading.Event()
        self.finished, self.wrong = 0, []

    def call(self, how):
        return subprocess.run([*self.command, how], stdin=subprocess.DEVNULL, capture_output=True, text=True)

    def go_on(self):
        while not self.ending.is_set() and not self.wrong:
            ended = self.call("--wait")
            if self.ending.is_set():
                return
            if ended.returncode != 0 or "all in order" not in ended.stdout:
                self.wrong.append(ended.stdout + ended.stderr)
            self.finished += 1

    @contextlib.contextmanager
    def under_way(self):
        self.ending.clear()
        thread = threading.Thread(target=self.go_on)
        thread.start()
        try:
            yield
        finally:
            self.ending.set()
            while thread.is_alive():  # one that begins just now is not there to be stopped yet
                self.call("--stop")
                thread.join(0.1)
        if self.wrong:
            raise SystemExit(f"bench: a scrub under load was not all in order:\n{self.wrong[0]}")


def start_scrubbed_agents(ack):
    """Scrubs go on as long as it is loaded."""
    def start(server, place, programs):
        start_agents(ack)(server, place, programs)
        server.meanwhile = Scrubs(server, programs).under_way
    return start


def start_quorum(slow):
    """Three qemu-nbd under QEMU's quorum driver in a fourth process."""
    def start(server, place, _programs):
        directory, nodes, names = sockets(), [], []
        for number in range(3):
            path, log = f"{directory}/{number}", place / f"log-{number}"
            image = raw_file(place / f"{number}.img")
            if slow and number == 2:  # io_uring syncs with no system call that could be delayed
                process = server.spawn_slow(qemu_nbd(["-k", path], image, aio="threads"), place, log)
            else:
                process = server.spawn(qemu_nbd(["-k", path], image), log)
            wait_until(f"qemu-nbd {number}", lambda: accepts(socket.AF_UNIX, path), process, log)
            nodes += ["--blockdev", f"driver=nbd,node-name=r{number},server.type=unix,server.path={path},export="]
            names.append(f"children.{number}=r{number}")
        port, log = free_port(), place / "log"
        process = server.spawn(
            ["qemu-storage-daemon", *nodes,
             "--blockdev", f"driver=quorum,node-name=q,vote-threshold=2,read-pattern=fifo,{','.join(names)}",
             "--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port},max-connections=0",
             "--export", "type=nbd,id=e,node-name=q,name=q,writable=on"], log)
        wait_until("qemu-storage-daemon", lambda: accepts(socket.AF_INET, ("127.0.0.1", port)), process, log)
        server.uri = f"nbd://127.0.0.1:{port}/q"
    return start


def start_single(server, place, _programs):
    port, log = free_port(), place / "log"
    process = server.spawn(qemu_nbd(["-b", "127.0.0.1", "-p", port], raw_file(place / "disk.img")), log)
    wait_until("qemu-nbd", lambda: accepts(socket.AF_INET, ("127.0.0.1", port)), process, log)
    server.uri = f"nbd://127.0.0.1:{port}/"


def start_nbdkit(server, place, _programs):
    port, log = free_port(), place / "log"
    process = server.spawn(["nbdkit", "-f", "-i", "127.0.0.1", "-p", port, "file", raw_file(place / "disk.img")], log)
    wait_until("nbdkit", lambda: accepts(socket.AF_INET, ("127.0.0.1", port)), process, log)
    server.uri = f"nbd://127.0.0.1:{port}/"


def all_servers(ack, qd1, qd32, reads):
    """Each server with what starts it. `qd1`, `qd32` and `reads` are the works that some servers are limited to."""
    durable = {"first": 1, "majority": 2, "all": 3}[ack]
    found = [
        (Server(AGENTS, Promise(3, durable)), start_agents(ack)),
        (Server(QUORUM, Promise(3, 3)), start_quorum(slow=False)),
        (Server(SINGLE, Promise(1, 1)), start_single),
        (Server(NBDKIT, Promise(1, 0), works=reads), start_nbdkit),
        (Server(SCRUBBED, Promise(3, durable), works=[qd32]), start_scrubbed_agents(ack)),
        (Server(SLOW, Promise(3, durable), works=[qd1]), start_slow_agents(ack)),
        (Server(SLOW_QUORUM, Promise(3, 3), works=[qd1]), start_quorum(slow=True)),
    ]
    if ack == "first":  # a demo has no other policy
        found.insert(0, (Server(DEMO, Promise(3, 1)), start_demo))
    return found


def copies_differ(place):
    """Whether the replicas under `place` are not all the same: then a member was lost on the way."""
    images = sorted(place.rglob("image.raw"))
    return bool(images) and (len(images) != 3 or any(not filecmp.cmp(images[0], image, shallow=False)
                                                     for image in images[1:]))
