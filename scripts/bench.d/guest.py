"""A filesystem over the kernel's own NBD client: mkfs.ext4 and untar of this repository in the virtual machine.

The guest is emulated, so its seconds are long; what can be compared is one server with another."""

import os
import pathlib
import re
import statistics
import subprocess

from say import Progress
from servers import AGENTS, DEMO, QUORUM, unlike

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SERVERS = (DEMO, AGENTS, QUORUM)
COPIES = 8
RUN_S = 14
STEPS = [("mkfs", "mkfs.ext4"), ("untar", f"untar {COPIES} times and sync"), ("unmount", "unmount")]
SCRIPT = r"""
load virtio_pci virtio_blk virtio_net virtio_rng ext4 nbd
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
cat /dev/vda > /tmp/tree.tar
nbd-client 10.0.2.2 "$PORT" /dev/nbd0 -N "$EXPORT" -b 4096 || return 1
tries=0
while [ "$(cat /sys/block/nbd0/size)" = 0 ]; do
  tries=$((tries + 1))
  [ "$tries" -le 50 ] || return 1
  usleep 100000
done
step mkfs
mkfs.ext4 -q -F /dev/nbd0 || return 1
step untar
mount -t ext4 /dev/nbd0 /mnt || return 1
for copy in $(seq "$COPIES"); do
  mkdir /mnt/$copy && tar xf /tmp/tree.tar -C /mnt/$copy || return 1
done
sync
step unmount
umount /mnt || return 1
step end
nbd-client -d /dev/nbd0 || return 1
if dmesg | grep -iE 'I/O error|EXT4-fs error|nbd.*(timed out|failed)'; then return 1; fi
"""


def boot(server, place):
    """Seconds of each step, by the guest's clock."""
    port, export = re.fullmatch(r"nbd://127\.0\.0\.1:(\d+)/(.*)", server.uri).groups()
    test, tree = place / "guest.sh", place / "tree.tar"
    test.write_text(f"PORT={port} EXPORT={export} COPIES={COPIES}\n{SCRIPT}")
    if not tree.exists():
        subprocess.run(["git", "archive", "--output", tree, "HEAD"], check=True, cwd=ROOT, stdin=subprocess.DEVNULL)
    out = subprocess.run(
        [ROOT / "scripts/vm/boot", test, "-netdev", "user,id=net,ipv6=off", "-device", "virtio-net-pci,netdev=net,romfile=",
         "-drive", f"file={tree},format=raw,if=none,id=tree,readonly=on", "-device", "virtio-blk-pci,drive=tree"],
        env={**os.environ, "NBDCAST_VM_VERBOSE": "1"}, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if out.returncode != 0:
        raise SystemExit(f"bench: the virtual machine failed on {server.name}:\n{out.stdout}{out.stderr}")
    times = {name: float(at) for name, at in re.findall(r"^## (\w+) \[([\d.]+) s\]", out.stderr, re.MULTILINE)}
    ends = [*[name for name, _ in STEPS[1:]], "end"]
    return {name: round(times[end] - times[name], 2) for (name, _), end in zip(STEPS, ends)}


def measure(servers, place, rounds):
    """Every single result, in rotating order. What was on the volumes is gone afterwards."""
    part = [server for server in servers if server.name in SERVERS]
    progress, results = Progress(rounds * len(part), rounds * len(part) * RUN_S), []
    for number in range(rounds):
        turn = number % max(len(part), 1)
        for server in part[turn:] + part[:turn]:
            seconds = boot(server, place)
            server.settle()
            results.append({"round": number, "server": server.name, **seconds})
            progress.step(f"filesystem in the virtual machine, {server.name}: "
                          + ", ".join(f"{name} {seconds[name]:.1f} s" for name, _ in STEPS))
    return results


def markdown(servers, results, notes):
    """Medians, and their ratios to quorum's; a ratio of different promises has its note."""
    promises = {server.name: server.promise for server in servers}
    median = {server: {name: statistics.median(row[name] for row in results if row["server"] == server)
                       for name, _ in STEPS} for server in dict.fromkeys(row["server"] for row in results)}
    lines = ["| kernel client in the virtual machine | " + " | ".join(f"{what} s" for _, what in STEPS)
             + f" | ratios to {QUORUM} |", "|---|" + "--:|" * (len(STEPS) + 1)]
    for server, seconds in median.items():
        ratios = ""
        if QUORUM in median and server != QUORUM:
            ratios = ", ".join(f"{seconds[name] / max(median[QUORUM][name], 0.01):.2f}x" for name, _ in STEPS)
            ratios += notes.mark(unlike(promises[server], promises[QUORUM], writes=True))
        lines.append(f"| {server} | " + " | ".join(f"{seconds[name]:.2f}" for name, _ in STEPS) + f" | {ratios} |")
    return lines
