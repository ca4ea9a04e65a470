//! A file of which pages that were used of late are kept in memory; changed ones reach the file when somebody asks for it.
//! It is for many small changes to a file that need not be durable one by one, as those of checksums: a change that meets
//! its page in memory, and a read that does, cost no call of the system.
//!
//! What is in memory alone is lost when the process dies, as what only the system has is lost in a power cut. It is never
//! written back behind anybody's back: where memory is full of changed pages, a change of another page goes to the file at
//! once. Of unchanged pages the first in turn that was not used since its last turn makes room.
//!
//! **Invariant:** where a page is in memory, it counts, and unless it is *dirty* the file holds the same. Only an unchanged
//! page leaves memory, so that what is in no page is in the file.
//!
//! **Invariant:** whoever changes a page or the file holds `changing`, one at a time; `pages` is never held while the file
//! is read or written. A page that a reader loads meanwhile is kept only if nobody began or ended a change to it since the
//! reader began: what was read may be older than the change.
//!
//! Callers never read and change the same bytes at the same time. Nobody else changes the file.

mod pages;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

use protocol::ranges::ByteRange;

use super::RawFile;
use pages::{Content, PAGE_BYTES, Pages, empty, page_of, pages_of, parts, within};

/// A read that touches more pages than this takes those that are not in memory from the file, and leaves it at that.
const LOADED_PAGES_MAX: usize = 2;
/// Pages written back at once: changes wait for that long.
const RUN_PAGES_MAX: usize = 64;

/// A file with pages in memory.
pub struct WriteBack {
    file: Arc<dyn RawFile>,
    changing: Mutex<()>,
    pages: Mutex<Pages>,
}

impl WriteBack {
    /// Keeps at most `pages_max` pages of 4 KiB of a file.
    #[must_use]
    pub fn new(file: Arc<dyn RawFile>, pages_max: usize) -> WriteBack {
        WriteBack { file, changing: Mutex::default(), pages: Mutex::new(Pages::new(pages_max)) }
    }

    /// Writes what is in memory alone to where the system keeps dirty pages: all that was written before, unless it was
    /// overwritten since. After an error what was not written is still in memory, and this can be tried again.
    pub fn write_back(&self) -> io::Result<()> {
        self.write_back_pages(0..u64::MAX)
    }

    /// As [`WriteBack::write_back`], for what was written to a range, and to others that share a page with it.
    pub fn write_back_in(&self, range: ByteRange) -> io::Result<()> {
        if range.length == 0 { Ok(()) } else { self.write_back_pages(pages_of(range)) }
    }

    fn write_back_pages(&self, mut pages: Range<u64>) -> io::Result<()> {
        loop {
            let _changing = self.changing();
            let Some((first, bytes)) = self.pages().dirty_run(pages.clone(), RUN_PAGES_MAX) else { return Ok(()) };
            let end = first + (bytes.len() / PAGE_BYTES) as u64;
            let start = first * PAGE_BYTES as u64;
            // The last page may be longer than what is left of the file.
            let left = self.known_length()?.saturating_sub(start);
            let bytes = &bytes[..bytes.len().min(left as usize)];
            self.file.write_at(start, bytes)?;
            self.pages().are_clean(first..end);
            pages.start = end;
        }
    }

    /// Makes durable what reached the file before: what was written back, and what is not in memory.
    pub fn sync_written(&self) -> io::Result<()> {
        self.file.sync()
    }

    /// Reads from the file, whatever of it was changed in memory since: what would be left if the process died.
    pub fn read_written_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_at(offset, buffer)
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().expect("no thread panicked with the lock")
    }

    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().expect("no thread panicked with the lock")
    }

    /// The length of the file, which only [`WriteBack`] changes.
    fn known_length(&self) -> io::Result<u64> {
        let known = self.pages().length;
        if let Some(length) = known {
            return Ok(length);
        }
        let found = self.file.length()?;
        // Somebody may have made it longer meanwhile, and knows.
        Ok(*self.pages().length.get_or_insert(found))
    }

    /// Has the file changed by `change`, and then the pages in memory: to `data`, or to zeroes. The caller holds `changing`.
    fn change_file(
        &self,
        range: ByteRange,
        data: Option<&[u8]>,
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        self.pages().begin_change(range);
        let outcome = change();
        let length =
            self.known_length().and_then(|known| if range.end() > known { self.file.length() } else { Ok(known) });
        let mut pages = self.pages();
        pages.end_change();
        if let Ok(length) = length {
            pages.length = Some(length);
        }
        match outcome {
            Ok(()) => pages.note_changed(range, data),
            // The file is the old and the new in part; a page that is to say what the file holds would say the old.
            Err(_) => pages.forget_clean(range),
        }
        outcome.and(length.map(|_| ()))
    }

    /// Reads a page from the file; behind the end of the file it is zeroes.
    fn read_page(&self, page: u64) -> io::Result<Content> {
        let start = page * PAGE_BYTES as u64;
        let left = self.known_length()?.saturating_sub(start);
        let mut content = empty();
        self.file.read_at(start, &mut content[..left.min(PAGE_BYTES as u64) as usize])?;
        Ok(content)
    }

    /// Reads a part of a page that is not in memory, and keeps the page if that can be.
    fn load(&self, part: ByteRange, into: &mut [u8]) -> io::Result<()> {
        if part.end() > self.known_length()? {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let page = page_of(part.offset);
        let Some(load) = self.pages().begin_load(page) else { return self.file.read_at(part.offset, into) };
        let (content, outcome) = match self.read_page(page) {
            Ok(content) => {
                into.copy_from_slice(&content[within(part)]);
                (Some(content), Ok(()))
            }
            Err(cause) => (None, Err(cause)),
        };
        self.pages().end_load(load, content);
        outcome
    }

    /// Changes a part of a page: in memory if it is there or can be. The caller holds `changing`.
    fn change_part(&self, part: ByteRange, data: &[u8]) -> io::Result<()> {
        let page = page_of(part.offset);
        let through = || self.change_file(part, Some(data), || self.file.write_at(part.offset, data));
        if part.end() > self.known_length()? {
            return through();
        }
        let room = {
            let mut pages = self.pages();
            if pages.put_into(page, within(part), data) {
                return Ok(());
            }
            pages.make_room()
        };
        if !room {
            return through();
        }
        let content = if data.len() == PAGE_BYTES { empty() } else { self.read_page(page)? };
        let is_kept = {
            let mut pages = self.pages();
            // A reader may have brought it, or taken the room for another.
            pages.insert(page, content);
            pages.put_into(page, within(part), data)
        };
        if is_kept { Ok(()) } else { through() }
    }
}

fn range_of(offset: u64, data: &[u8]) -> ByteRange {
    ByteRange { offset, length: data.len() as u64 }
}

/// Where a part of `range` lies in a buffer for all of it.
fn place(range: ByteRange, part: ByteRange) -> Range<usize> {
    let at = (part.offset - range.offset) as usize;
    at..at + part.length as usize
}

impl RawFile for WriteBack {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let range = range_of(offset, buffer);
        // Memory first: a page that is not in it now is in the file from now on, whatever becomes of it.
        let missing = self.pages().copy_to(range, buffer)?;
        let keep = parts(range).take(LOADED_PAGES_MAX + 1).count() <= LOADED_PAGES_MAX;
        if keep {
            return missing.into_iter().try_for_each(|part| self.load(part, &mut buffer[place(range, part)]));
        }
        for run in missing.chunk_by(|a, b| a.end() == b.offset) {
            let length = run.iter().map(|part| part.length).sum();
            let run = ByteRange { offset: run[0].offset, length };
            self.file.read_at(run.offset, &mut buffer[place(range, run)])?;
        }
        Ok(())
    }

    fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.pages().copy_to(range_of(offset, buffer), buffer).is_ok_and(|missing| missing.is_empty())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let _changing = self.changing();
        let range = range_of(offset, data);
        parts(range).try_for_each(|part| self.change_part(part, &data[place(range, part)]))
    }

    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let _changing = self.changing();
        self.change_file(range_of(offset, data), Some(data), || self.file.write_durable_at(offset, data))
    }

    fn sync(&self) -> io::Result<()> {
        self.write_back()?;
        self.sync_written()
    }

    fn zero_range(&self, offset: u64, length: u64, keep_allocated: bool) -> io::Result<()> {
        let range = ByteRange { offset, length };
        // What a hole in less than a page would give back is not worth a call of the system.
        if length < PAGE_BYTES as u64 && range.end() <= self.known_length()? {
            return self.write_at(offset, &vec![0; length as usize]);
        }
        let _changing = self.changing();
        self.change_file(range, None, || self.file.zero_range(offset, length, keep_allocated))
    }

    fn grow(&self, length: u64) -> io::Result<()> {
        let _changing = self.changing();
        self.file.grow(length)?;
        // Pages hold zeroes behind the end, which is what is there now.
        let length = self.file.length()?;
        self.pages().length = Some(length);
        Ok(())
    }

    fn allocated_in(&self, range: ByteRange) -> io::Result<Option<ByteRange>> {
        // Memory first: what is no longer dirty when the file is asked, the file has.
        let dirty = self.pages().first_dirty_in(range);
        let allocated = self.file.allocated_in(range)?;
        Ok(match (dirty, allocated) {
            (Some(dirty), Some(allocated)) if allocated.offset <= dirty.offset => Some(allocated),
            (dirty, allocated) => dirty.or(allocated),
        })
    }

    fn read_ahead(&self, range: ByteRange) {
        self.file.read_ahead(range);
    }

    fn length(&self) -> io::Result<u64> {
        self.file.length()
    }
}

#[cfg(test)]
mod tests;
