# Run by nbdsh, for tests/e2e/negative.rs: requests that are wrong on purpose, or at the edge of what is allowed. Each
# must be answered as the protocol says, and leave the connection as it was. Given: `uris`, of which one is read-only.
import os
from errno import EINVAL, ENOSPC, EOVERFLOW, EPERM

MIB = 1 << 20
UNKNOWN_FLAG = 0x80


def connect(uri, is_structured):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(is_structured)
    if is_structured:
        h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.set_uri_allow_local_file(True)
    h.connect_uri(uri)
    assert h.get_structured_replies_negotiated() == is_structured
    return h


def extents(h, count, offset, flags=0):
    found = []
    h.block_status(count, offset, lambda context, at, entries, error: found.append((context, at, entries)), flags)
    assert len(found) == 1 and found[0][:2] == (nbd.CONTEXT_BASE_ALLOCATION, offset), found
    return list(zip(found[0][2][::2], found[0][2][1::2]))


class Expectation:
    """Sends one request and compares its error; then the connection must still do its work."""

    def __init__(self, h, name):
        self.h, self.name, self.count = h, name, 0

    def __call__(self, what, error, action):
        try:
            action()
            found = 0
        except nbd.Error as refusal:
            found = refusal.errnum
        assert found == error, f"{self.name}: {what}: error {found}, not {error}"
        assert not self.h.aio_is_dead(), f"{self.name}: {what}: the connection is dead"
        assert self.h.pread(4, 3 * MIB) == self.last, f"{self.name}: {what}: out of step"
        self.count += 1

    def remember(self, content):
        self.last = bytes(content)


def past_the_end(h, expect):
    size = h.get_size()
    expect("read over the end", EINVAL, lambda: h.pread(4096, size - 512))
    expect("read behind the end", EINVAL, lambda: h.pread(512, size))
    expect("read at 2^63", EINVAL, lambda: h.pread(512, 1 << 63))
    expect("read that wraps around", EINVAL, lambda: h.pread(4096, (1 << 64) - 512))
    expect("write over the end", ENOSPC, lambda: h.pwrite(b"x" * 4096, size - 512))
    expect("write at 2^63", ENOSPC, lambda: h.pwrite(b"x" * 512, 1 << 63))
    expect("write that wraps around", ENOSPC, lambda: h.pwrite(b"x" * 4096, (1 << 64) - 512))
    expect("zero over the end", ENOSPC, lambda: h.zero(4096, size - 512))
    expect("zero more than all", ENOSPC, lambda: h.zero(size + 512, 0))
    expect("trim over the end", EINVAL, lambda: h.trim(4096, size - 512))
    expect("cache over the end", EINVAL, lambda: h.cache(4096, size - 512))
    expect("up to the end", 0, lambda: h.pwrite(b"x" * 512, size - 512))


def flags(h, expect, is_structured):
    fua, fast, df = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_DF
    expect("unknown flag on read", EINVAL, lambda: h.pread(512, 0, UNKNOWN_FLAG))
    expect("unknown flag on write", EINVAL, lambda: h.pwrite(b"x" * 70000, 0, UNKNOWN_FLAG))
    expect("unknown flag on flush", EINVAL, lambda: h.flush(UNKNOWN_FLAG))
    expect("FAST_ZERO on trim", EINVAL, lambda: h.trim(4096, 0, fast))
    expect("NO_HOLE on write", EINVAL, lambda: h.pwrite(b"x" * 512, 0, nbd.CMD_FLAG_NO_HOLE))
    expect("DF on read", 0 if is_structured else EINVAL, lambda: h.pread(512, 0, df))
    expect("FUA on read", 0, lambda: h.pread(512, 0, fua))
    expect("FUA on flush", 0, lambda: h.flush(fua))
    expect("FUA on write", 0, lambda: h.pwrite(b"x" * 512, 0, fua))
    expect("FUA on trim", 0, lambda: h.trim(4096, 0, fua))
    expect("FUA on zero", 0, lambda: h.zero(4096, 0, fua))
    expect("FUA on cache", 0, lambda: h.cache(4096, 0, fua))
    expect("all flags of zero", 0, lambda: h.zero(4096, 0, fua | fast | nbd.CMD_FLAG_NO_HOLE))


def lengths(h, expect, is_structured):
    size = h.get_size()
    expect("read nothing", 0, lambda: h.pread(0, 0))
    expect("write nothing", 0, lambda: h.pwrite(b"", 0))
    expect("trim nothing", 0, lambda: h.trim(0, 4096))
    expect("zero nothing", 0, lambda: h.zero(0, 4096))
    expect("cache nothing", 0, lambda: h.cache(0, size))
    too_much = EOVERFLOW if is_structured else EINVAL
    expect("read 33 MiB", too_much, lambda: h.pread(33 * MIB, 0))
    expect("write 33 MiB", EINVAL, lambda: h.pwrite(b"x" * (33 * MIB), 0))
    whole = os.urandom(32 * MIB)
    expect.remember(whole[3 * MIB : 3 * MIB + 4])
    expect("write 32 MiB", 0, lambda: h.pwrite(whole, 0))
    assert h.pread(32 * MIB, 0) == whole
    h.pwrite(b"odd", 4095)
    assert h.pread(5, 4094) == whole[4094:4095] + b"odd" + whole[4098:4099]
    h.cache(size, 0)


def zeroes(h, expect):
    h.pwrite(b"x" * 65536, 0)
    expect("fast zero", 0, lambda: h.zero(8192, 4096, nbd.CMD_FLAG_FAST_ZERO))
    expect("trim in the middle of blocks", 0, lambda: h.trim(8192, 16384 + 100))
    assert h.pread(65536, 0) == b"x" * 4096 + bytes(8192) + b"x" * (4096 + 100) + bytes(8192) + b"x" * (40960 - 100)


def status(h, expect, is_structured):
    size, one = h.get_size(), nbd.CMD_FLAG_REQ_ONE
    ignore = lambda *_: 0
    if not is_structured:
        expect("status without a context", EINVAL, lambda: h.block_status(4096, 0, ignore))
        return
    expect("status of nothing", EINVAL, lambda: h.block_status(0, 0, ignore))
    expect("status over the end", EINVAL, lambda: h.block_status(4096, size - 512, ignore))
    expect("status with DF", EINVAL, lambda: h.block_status(4096, 0, ignore, nbd.CMD_FLAG_DF))
    h.zero(MIB, 0)
    h.pwrite(b"x" * 8192, 65536)
    hole, data = nbd.STATE_HOLE | nbd.STATE_ZERO, 0
    wanted = [(65536, hole), (8192, data), (MIB - 65536 - 8192, hole)]
    found = extents(h, MIB, 0)
    assert found == wanted, found
    assert extents(h, MIB, 65536, one) == [(8192, data)]
    h.pwrite(b"x" * 65536, 131072)
    h.zero(65536, 131072, nbd.CMD_FLAG_NO_HOLE)
    # Some filesystems tell space that was never written to as a hole.
    assert all(kind & nbd.STATE_ZERO for _, kind in extents(h, 65536, 131072))
    chunks = []
    h.pread_structured(131072, 0, lambda data, at, kind, error: chunks.append((at, len(data), kind)))
    assert sorted(chunks)[0][0] == 0 and any(kind == nbd.READ_HOLE for _, _, kind in chunks), chunks
    chunks.clear()
    h.pread_structured(131072, 0, lambda data, at, kind, error: chunks.append((at, len(data), kind)), nbd.CMD_FLAG_DF)
    assert chunks == [(0, 131072, nbd.READ_DATA)], chunks


def good_ones_between_bad_ones(h):
    size = h.get_size()
    wanted = {}
    for turn in range(64):
        block = nbd.Buffer.from_bytearray(bytearray([turn]) * 4096)
        wanted[h.aio_pwrite(block, 4 * MIB + 4096 * turn)] = 0
        wanted[h.aio_pwrite(block, size - 512 * (turn % 8))] = ENOSPC
        wanted[h.aio_pread(nbd.Buffer(4096), size + turn)] = EINVAL
        wanted[h.aio_zero(4096, 0, flags=UNKNOWN_FLAG)] = EINVAL
    while h.aio_in_flight() > 0:
        h.poll(-1)
    for cookie, error in wanted.items():
        try:
            assert h.aio_command_completed(cookie)
            found = 0
        except nbd.Error as refusal:
            found = refusal.errnum
        assert found == error, f"error {found}, not {error}"
    assert h.pread(64 * 4096, 4 * MIB) == b"".join(bytes([turn]) * 4096 for turn in range(64))


def read_only(h, expect):
    expect.remember(h.pread(4, 3 * MIB))
    expect("write", EPERM, lambda: h.pwrite(b"x" * 70000, 0))
    expect("write behind the end", EPERM, lambda: h.pwrite(b"x" * 512, h.get_size()))
    expect("zero", EPERM, lambda: h.zero(4096, 0))
    expect("trim", EPERM, lambda: h.trim(4096, 0))
    expect("flush", 0, lambda: h.flush())
    expect("cache", 0, lambda: h.cache(4096, 0))


count = 0
for uri in uris:
    for is_structured in (False, True):
        h = connect(uri, is_structured)
        expect = Expectation(h, f"{uri} {'structured' if is_structured else 'simple'}")
        if h.is_read_only():
            read_only(h, expect)
        else:
            h.pwrite(b"stay", 3 * MIB)
            expect.remember(b"stay")
            past_the_end(h, expect)
            flags(h, expect, is_structured)
            lengths(h, expect, is_structured)
            zeroes(h, expect)
            status(h, expect, is_structured)
            good_ones_between_bad_ones(h)
        count += expect.count
        h.shutdown()
print(f"answered as they should be: {count}")
