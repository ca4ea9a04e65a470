//! Writing out what the page cache holds of a file, a little at a time, before all of it is made durable.
//!
//! A sync of hundreds of megabytes that lie scattered in a file puts all of it into the device's queue at once. Whoever else
//! waits for the device, above all the journal with the records that clients wait for, then waits behind all of it: tenths
//! of a second. Window by window, in the order of the file, the queue stays short, and neighbours still go together.
//!
//! Makes nothing durable: a device may keep in a cache of its own what was written out, and the system may still have to
//! write down where it lies. A sync must follow.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Mutex;

use protocol::ranges::ByteRange;

/// How much of a file is written out at a time, bytes. Of single blocks these are 64 in the device's queue.
const WINDOW_BYTES: u64 = 256 << 10;
/// Of so many windows it is known that they hold something to write out; what else does is left to the sync.
const WINDOWS_MAX: usize = 1 << 18;

/// The windows of a file that hold something which was not written out.
#[derive(Debug, Default)]
pub(super) struct WriteOut {
    windows: Mutex<BTreeSet<u64>>,
}

impl WriteOut {
    /// A range will be written. If all is written out before it is, the sync does it.
    pub(super) fn note(&self, range: ByteRange) {
        if range.length == 0 {
            return;
        }
        let mut windows = self.windows.lock().expect("no thread panicked with the lock");
        if windows.len() < WINDOWS_MAX {
            windows.extend(range.offset / WINDOW_BYTES..=(range.end() - 1) / WINDOW_BYTES);
        }
    }

    /// Writes out what was noted. An error means that something of the file was lost, as that of a sync does: the sync that
    /// follows may not tell of it again.
    pub(super) fn run(&self, file: &File) -> io::Result<()> {
        let windows = std::mem::take(&mut *self.windows.lock().expect("no thread panicked with the lock"));
        windows
            .into_iter()
            .try_for_each(|window| write_out(file, ByteRange { offset: window * WINDOW_BYTES, length: WINDOW_BYTES }))
    }
}

/// Has the system begin to write what it caches of a range. Whether it does, and how it ends, the sync tells that follows.
pub(super) fn begin(file: &File, range: ByteRange) {
    let _ = sync_file_range(file, range, libc::SYNC_FILE_RANGE_WRITE);
}

/// Has the system write what it caches of a range, and waits for that.
fn write_out(file: &File, range: ByteRange) -> io::Result<()> {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    match sync_file_range(file, range, how) {
        Err(e) if e.kind() == io::ErrorKind::Interrupted => write_out(file, range),
        // Not a file that can be written out in parts, or a system without this call: the sync does it all. Asked for
        // nothing, the call tells that and nothing of what was lost.
        Err(_) if sync_file_range(file, range, 0).is_err() => Ok(()),
        outcome => outcome,
    }
}

fn sync_file_range(file: &File, range: ByteRange, how: libc::c_uint) -> io::Result<()> {
    let (Ok(offset), Ok(length)) = (range.offset.try_into(), range.length.try_into()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // No crate offers this call without `unsafe`.
    #[allow(unsafe_code)]
    // SAFETY: numbers only, no memory; the descriptor is open as long as `file` is borrowed.
    let outcome = unsafe { libc::sync_file_range(file.as_raw_fd(), offset, length, how) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, SeekFrom, Write};

    fn windows_of(ranges: &[(u64, u64)]) -> Vec<u64> {
        let out = WriteOut::default();
        for (offset, length) in ranges {
            out.note(ByteRange { offset: *offset, length: *length });
        }
        out.windows.into_inner().unwrap().into_iter().collect()
    }

    #[test]
    fn each_window_that_a_write_touches_is_noted_once() {
        assert_eq!(windows_of(&[(0, 1), (WINDOW_BYTES - 1, 1), (5, 0)]), [0]);
        assert_eq!(windows_of(&[(2 * WINDOW_BYTES - 1, 2), (WINDOW_BYTES, 1)]), [1, 2]);
        assert_eq!(windows_of(&[(WINDOW_BYTES, 2 * WINDOW_BYTES)]), [1, 2]);
    }

    #[test]
    fn of_more_windows_than_can_be_kept_the_rest_is_left_to_the_sync() {
        let ranges: Vec<(u64, u64)> = (0..=WINDOWS_MAX as u64).map(|i| (i * WINDOW_BYTES, 1)).collect();
        assert_eq!(windows_of(&ranges).len(), WINDOWS_MAX);
    }

    #[test]
    fn what_was_noted_is_written_out_behind_the_end_of_a_file_too_and_changes_nothing() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 10_000]).unwrap();
        let out = WriteOut::default();
        out.note(ByteRange { offset: 0, length: 4 * WINDOW_BYTES });
        out.run(&file).unwrap();
        assert!(out.windows.lock().unwrap().is_empty());
        let mut back = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut back).unwrap();
        assert_eq!(back, vec![7; 10_000]);
    }

    #[test]
    fn what_is_no_file_is_left_to_the_sync() {
        let (_reader, writer) = std::io::pipe().unwrap();
        write_out(&File::from(std::os::fd::OwnedFd::from(writer)), ByteRange { offset: 0, length: 1 }).unwrap();
    }
}
