//! The pages of a file that are in memory: which of them are dirty, which one makes room, and which loads came too late.
//! Reads and writes no file, and knows of no threads.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Range;

use protocol::ranges::ByteRange;

/// Bytes of a page.
pub(super) const PAGE_BYTES: usize = 4096;
/// Pages looked at for one to give up: no insertion takes long, and some find no room although there is some.
const VICTIMS_MAX: usize = 64;

/// The bytes of a page.
pub(super) type Content = Box<[u8]>;

/// A page of zeroes.
pub(super) fn empty() -> Content {
    vec![0; PAGE_BYTES].into_boxed_slice()
}

/// The page in which a byte lies.
pub(super) fn page_of(offset: u64) -> u64 {
    offset / PAGE_BYTES as u64
}

/// A range cut at the bounds of pages.
pub(super) fn parts(range: ByteRange) -> impl Iterator<Item = ByteRange> {
    let mut at = range.offset;
    std::iter::from_fn(move || {
        let end = ((page_of(at) + 1) * PAGE_BYTES as u64).min(range.end());
        let part = ByteRange { offset: at, length: end.saturating_sub(at) };
        at = end;
        (part.length > 0).then_some(part)
    })
}

/// Where a part of a page lies in it.
pub(super) fn within(part: ByteRange) -> Range<usize> {
    let at = (part.offset % PAGE_BYTES as u64) as usize;
    at..at + part.length as usize
}

/// The pages of which any byte lies in a range that is not empty.
pub(super) fn pages_of(range: ByteRange) -> Range<u64> {
    page_of(range.offset)..page_of(range.end() - 1) + 1
}

/// What of a range lies in a page of which it has a byte.
fn part_in(page: u64, range: ByteRange) -> ByteRange {
    let offset = (page * PAGE_BYTES as u64).max(range.offset);
    let end = ((page + 1) * PAGE_BYTES as u64).min(range.end());
    ByteRange { offset, length: end - offset }
}

pub(super) struct Page {
    content: Content,
    /// It was used since it was last looked at for making room.
    used: bool,
}

/// A page that is being read from the file.
struct Load {
    id: u64,
    page: u64,
    /// The page was changed since the load began.
    outdated: bool,
}

/// The pages.
pub(super) struct Pages {
    pages_max: usize,
    pub(super) held: BTreeMap<u64, Page>,
    /// Those of them that the file does not have as they are.
    dirty: BTreeSet<u64>,
    /// Where the search for one to give up goes on.
    turn: u64,
    loads: Vec<Load>,
    next_load: u64,
    /// What of the file itself is being changed.
    changing: Option<ByteRange>,
    /// Bytes of the file, once somebody asked. Pages hold zeroes behind them.
    pub(super) length: Option<u64>,
}

impl Pages {
    pub(super) fn new(pages_max: usize) -> Pages {
        Pages {
            pages_max,
            held: BTreeMap::new(),
            dirty: BTreeSet::new(),
            turn: 0,
            loads: Vec::new(),
            next_load: 0,
            changing: None,
            length: None,
        }
    }

    /// Copies what is in memory of a range. Returns what is not, page by page.
    pub(super) fn copy_to(&mut self, range: ByteRange, buffer: &mut [u8]) -> io::Result<Vec<ByteRange>> {
        let mut missing = Vec::new();
        let mut rest = buffer;
        for part in parts(range) {
            let into;
            (into, rest) = rest.split_at_mut(part.length as usize);
            match self.held.get_mut(&page_of(part.offset)) {
                Some(_) if self.length.is_some_and(|length| part.end() > length) => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Some(page) => {
                    page.used = true;
                    into.copy_from_slice(&page.content[within(part)]);
                }
                None => missing.push(part),
            }
        }
        Ok(missing)
    }

    /// Puts bytes into a page, which is dirty then. Returns false if it is not in memory.
    pub(super) fn put_into(&mut self, page: u64, at: Range<usize>, data: &[u8]) -> bool {
        self.outdate(page..page + 1);
        let Some(held) = self.held.get_mut(&page) else { return false };
        held.used = true;
        held.content[at].copy_from_slice(data);
        self.dirty.insert(page);
        true
    }

    /// Takes a page as the file has it, unless it is here already or there is no room.
    pub(super) fn insert(&mut self, page: u64, content: Content) {
        if !self.held.contains_key(&page) && self.make_room() {
            self.held.insert(page, Page { content, used: false });
        }
    }

    /// Whether there is room for another page, for which an unchanged one may have to go.
    pub(super) fn make_room(&mut self) -> bool {
        if self.held.len() < self.pages_max {
            return true;
        }
        if self.dirty.len() == self.held.len() {
            return false;
        }
        let turn = self.turn;
        let mut fallback = None;
        let mut victim = None;
        let (before, after) = (self.held.range(..turn).map(|(p, _)| *p), self.held.range(turn..).map(|(p, _)| *p));
        let candidates: Vec<u64> = after.chain(before).take(VICTIMS_MAX).collect();
        for page in candidates {
            self.turn = page + 1;
            if self.dirty.contains(&page) {
                continue;
            }
            fallback = fallback.or(Some(page));
            let was_used = self.held.get_mut(&page).is_some_and(|held| std::mem::take(&mut held.used));
            if !was_used {
                victim = Some(page);
                break;
            }
        }
        let victim = victim.or(fallback);
        victim.is_some_and(|page| self.held.remove(&page).is_some())
    }

    /// A page is about to be read from the file. `None` if there would be no room for it.
    pub(super) fn begin_load(&mut self, page: u64) -> Option<u64> {
        if self.pages_max == 0 || (self.held.len() >= self.pages_max && self.dirty.len() == self.held.len()) {
            return None;
        }
        let outdated = self.changing.is_some_and(|range| pages_of(range).contains(&page));
        let id = self.next_load;
        self.next_load += 1;
        self.loads.push(Load { id, page, outdated });
        Some(id)
    }

    /// The load is over, with what was read.
    pub(super) fn end_load(&mut self, id: u64, content: Option<Content>) {
        let at = self.loads.iter().position(|load| load.id == id).expect("a load ends once, after it began");
        let load = self.loads.swap_remove(at);
        if let Some(content) = content
            && !load.outdated
        {
            self.insert(load.page, content);
        }
    }

    fn outdate(&mut self, pages: Range<u64>) {
        for load in self.loads.iter_mut().filter(|load| pages.contains(&load.page)) {
            load.outdated = true;
        }
    }

    /// The file itself is about to be changed.
    pub(super) fn begin_change(&mut self, range: ByteRange) {
        if range.length > 0 {
            self.changing = Some(range);
            self.outdate(pages_of(range));
        }
    }

    /// The file itself was changed, or was not.
    pub(super) fn end_change(&mut self) {
        if let Some(range) = self.changing.take() {
            self.outdate(pages_of(range));
        }
    }

    /// The file holds `data` there now, or zeroes.
    pub(super) fn note_changed(&mut self, range: ByteRange, data: Option<&[u8]>) {
        if range.length == 0 {
            return;
        }
        let held: Vec<u64> = self.held.range(pages_of(range)).map(|(page, _)| *page).collect();
        for page in held {
            let part = part_in(page, range);
            if part.length == PAGE_BYTES as u64 {
                self.dirty.remove(&page);
                self.held.remove(&page);
            } else if let Some(held) = self.held.get_mut(&page) {
                let into = &mut held.content[within(part)];
                match data {
                    Some(data) => into.copy_from_slice(&data[(part.offset - range.offset) as usize..][..into.len()]),
                    None => into.fill(0),
                }
            }
        }
    }

    /// The file may hold anything there now.
    pub(super) fn forget_clean(&mut self, range: ByteRange) {
        if range.length > 0 {
            let held: Vec<u64> = self.held.range(pages_of(range)).map(|(page, _)| *page).collect();
            for page in held.into_iter().filter(|page| !self.dirty.contains(page)) {
                self.held.remove(&page);
            }
        }
    }

    /// The first dirty ones of these pages that follow one another: which is the first, and their bytes.
    pub(super) fn dirty_run(&self, of: Range<u64>, pages_max: usize) -> Option<(u64, Vec<u8>)> {
        let first = *self.dirty.range(of.clone()).next()?;
        let run = self.dirty.range(first..of.end).zip(first..).take_while(|(page, at)| *page == at).take(pages_max);
        let contents: Vec<&[u8]> = run.map(|(page, _)| &*self.held[page].content).collect();
        Some((first, contents.concat()))
    }

    /// The file has these pages as they are.
    pub(super) fn are_clean(&mut self, pages: Range<u64>) {
        for page in pages {
            self.dirty.remove(&page);
        }
    }

    /// The first part of a range that lies in a dirty page.
    pub(super) fn first_dirty_in(&self, range: ByteRange) -> Option<ByteRange> {
        if range.length == 0 {
            return None;
        }
        self.dirty.range(pages_of(range)).next().map(|page| part_in(*page, range))
    }
}
