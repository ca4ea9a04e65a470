//! What reaches the file when, and that nobody ever reads anything but what was written last.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{OnceLock, RwLock};
use std::time::{Duration, Instant};

use super::*;

const PAGE: u64 = PAGE_BYTES as u64;

/// A file in memory that writes down what is asked of it, and does `on_read` when bytes were taken from it and before
/// the reader has them.
#[derive(Default)]
struct Sheet {
    bytes: Mutex<Vec<u8>>,
    calls: Mutex<Vec<String>>,
    full: AtomicBool,
    on_read: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

fn sheet(bytes: u64) -> Arc<Sheet> {
    Arc::new(Sheet { bytes: Mutex::new(vec![0; bytes as usize]), ..Sheet::default() })
}

impl Sheet {
    fn said(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn byte(&self, offset: u64) -> u8 {
        self.bytes.lock().unwrap()[offset as usize]
    }

    fn note(&self, what: &str, offset: u64, length: usize) {
        self.calls.lock().unwrap().push(format!("{what} {offset}+{length}"));
    }

    fn put(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        // A full disk takes a part of what it is given.
        let is_full = self.full.load(Ordering::SeqCst);
        let data = if is_full { &data[..data.len() / 2] } else { data };
        let mut bytes = self.bytes.lock().unwrap();
        let length = bytes.len().max(at + data.len());
        bytes.resize(length, 0);
        bytes[at..at + data.len()].copy_from_slice(data);
        if is_full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl RawFile for Sheet {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.note("read", offset, buffer.len());
        let at = offset as usize;
        {
            let bytes = self.bytes.lock().unwrap();
            buffer.copy_from_slice(bytes.get(at..at + buffer.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        }
        if let Some(on_read) = self.on_read.get() {
            on_read();
        }
        Ok(())
    }
    fn read_cached_at(&self, offset: u64, buffer: &mut [u8]) -> bool {
        self.read_at(offset, buffer).is_ok()
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.note("write", offset, data.len());
        self.put(offset, data)
    }
    fn write_durable_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.put(offset, data)
    }
    fn sync(&self) -> io::Result<()> {
        self.note("sync", 0, 0);
        Ok(())
    }
    fn zero_range(&self, offset: u64, length: u64, _keep_allocated: bool) -> io::Result<()> {
        self.note("zero", offset, length as usize);
        let end = self.length()?.min(offset + length);
        self.put(offset, &vec![0; end.saturating_sub(offset) as usize])
    }
    fn grow(&self, length: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap();
        let length = bytes.len().max(length as usize);
        bytes.resize(length, 0);
        Ok(())
    }
    fn allocated_in(&self, range: ByteRange) -> io::Result<Option<ByteRange>> {
        let bytes = self.bytes.lock().unwrap();
        let mut written = parts(range).filter(|part| bytes[place(range_of(0, &bytes), *part)].iter().any(|b| *b != 0));
        Ok(written.next())
    }
    fn read_ahead(&self, _range: ByteRange) {}
    fn length(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }
}

fn read(file: &WriteBack, offset: u64, length: usize) -> Vec<u8> {
    let mut buffer = vec![0xee; length];
    file.read_at(offset, &mut buffer).unwrap();
    buffer
}

#[test]
fn changes_reach_the_file_when_they_are_written_back_and_neighbours_together() {
    let sheet = sheet(16 * PAGE);
    let file = WriteBack::new(sheet.clone(), 8);
    for (page, byte) in [(5, 1), (3, 2), (4, 3), (9, 4)] {
        file.write_at(page * PAGE + 8, &[byte; 4]).unwrap();
        file.write_at(page * PAGE + 100, &[byte; 4]).unwrap();
        assert_eq!(read(&file, page * PAGE + 6, 4), [0, 0, byte, byte]);
    }
    assert_eq!(sheet.said(), ["read 20480+4096", "read 12288+4096", "read 16384+4096", "read 36864+4096"]);
    file.write_back().unwrap();
    file.sync_written().unwrap();
    assert_eq!(sheet.said(), ["write 12288+12288", "write 36864+4096", "sync 0+0"]);
    assert_eq!([3, 4, 5, 9].map(|page| sheet.byte(page * PAGE + 103)), [2, 3, 1, 4]);
    file.write_back().unwrap();
    assert_eq!(sheet.said(), [""; 0], "everything is in the file");
}

#[test]
fn of_a_range_only_its_pages_are_written_back() {
    let sheet = sheet(4 * PAGE);
    let file = WriteBack::new(sheet.clone(), 4);
    file.write_at(0, &[1; 4 * PAGE_BYTES]).unwrap();
    file.write_back_in(ByteRange { offset: 2 * PAGE - 1, length: 2 }).unwrap();
    file.write_back_in(ByteRange { offset: 0, length: 0 }).unwrap();
    assert_eq!(sheet.said(), ["write 4096+8192"], "whole pages are not read before");
}

#[test]
fn a_page_is_read_once_and_long_reads_leave_nothing_behind() {
    let sheet = sheet(16 * PAGE);
    let file = WriteBack::new(sheet.clone(), 4);
    read(&file, PAGE + 40, 4);
    read(&file, PAGE + 80, 4);
    read(&file, 2 * PAGE - 4, 8);
    assert_eq!(sheet.said(), ["read 4096+4096", "read 8192+4096"]);
    read(&file, 0, 16 * PAGE_BYTES);
    assert_eq!(sheet.said(), ["read 0+4096", "read 12288+53248"], "around the two pages that are there");
    read(&file, PAGE + 40, 4);
    assert_eq!(sheet.said(), [""; 0]);
}

#[test]
fn of_clean_pages_one_that_is_not_used_makes_room() {
    let sheet = sheet(16 * PAGE);
    let file = WriteBack::new(sheet.clone(), 3);
    for page in [0, 1, 2, 1, 3, 1, 4, 1, 5, 1] {
        read(&file, page * PAGE, 4);
    }
    assert_eq!(sheet.said().iter().filter(|call| *call == "read 4096+4096").count(), 1, "page 1 stays");
}

#[test]
fn where_all_pages_are_dirty_others_are_changed_and_read_in_the_file() {
    let sheet = sheet(16 * PAGE);
    let file = WriteBack::new(sheet.clone(), 2);
    file.write_at(0, &[1; 4]).unwrap();
    file.write_at(PAGE, &[2; 4]).unwrap();
    sheet.said();
    file.write_at(2 * PAGE, &[3; 4]).unwrap();
    assert_eq!(read(&file, 2 * PAGE, 8), [3, 3, 3, 3, 0, 0, 0, 0]);
    assert_eq!(sheet.said(), ["write 8192+4", "read 8192+8"], "no more than is wanted");
    file.write_back().unwrap();
    file.write_at(2 * PAGE, &[4; 4]).unwrap();
    assert_eq!(sheet.said(), ["write 0+8192", "read 8192+4096"], "there is room again");
    assert_eq!((read(&file, 0, 1), read(&file, PAGE, 1), read(&file, 2 * PAGE, 1)), (vec![1], vec![2], vec![4]));
}

#[test]
fn without_space_pages_stay_dirty_and_are_written_back_when_there_is_some() {
    let sheet = sheet(4 * PAGE);
    let file = WriteBack::new(sheet.clone(), 4);
    for page in [0, 2] {
        file.write_at(page * PAGE, &[7; PAGE_BYTES]).unwrap();
    }
    sheet.full.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        assert_eq!(file.write_back().unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(read(&file, PAGE - 1, 1), [7]);
    }
    sheet.full.store(false, Ordering::SeqCst);
    file.sync().unwrap();
    assert_eq!([PAGE - 1, 3 * PAGE - 1].map(|offset| sheet.byte(offset)), [7, 7]);
}

#[test]
fn a_dirty_page_takes_space_before_the_file_knows_it() {
    let sheet = sheet(1 << 20);
    let file = WriteBack::new(sheet.clone(), 8);
    let all = ByteRange { offset: 100, length: (1 << 20) - 100 };
    assert_eq!(file.allocated_in(all).unwrap(), None);
    file.write_at(5 * PAGE, &[1]).unwrap();
    assert_eq!(file.allocated_in(all).unwrap(), Some(ByteRange { offset: 5 * PAGE, length: PAGE }));
    let within = ByteRange { offset: 5 * PAGE + 7, length: 20 };
    assert_eq!(file.allocated_in(within).unwrap(), Some(within));
    file.write_back().unwrap();
    file.write_at(8 * PAGE, &[1]).unwrap();
    assert_eq!(file.allocated_in(all).unwrap(), Some(ByteRange { offset: 5 * PAGE, length: PAGE }), "the file's first");
    file.write_at(PAGE, &[0]).unwrap();
    assert_eq!(file.allocated_in(all).unwrap(), Some(ByteRange { offset: PAGE, length: PAGE }), "zeroes too");
}

#[test]
fn zeroed_ranges_are_zero_in_memory_and_in_the_file() {
    let sheet = sheet(8 * PAGE);
    let file = WriteBack::new(sheet.clone(), 8);
    file.write_at(0, &[1; 8 * PAGE_BYTES]).unwrap();
    file.write_back().unwrap();
    file.write_at(PAGE - 1, &[2; 2]).unwrap();
    sheet.said();
    file.zero_range(PAGE + 4, 8, true).unwrap();
    assert_eq!(sheet.said(), [""; 0], "a small one is a change like any other");
    file.zero_range(2 * PAGE - 1, 2 * PAGE, false).unwrap();
    file.write_back().unwrap();
    let mut expected = vec![1; 8 * PAGE_BYTES];
    expected[PAGE_BYTES - 1..=PAGE_BYTES].fill(2);
    expected[PAGE_BYTES + 4..PAGE_BYTES + 12].fill(0);
    expected[2 * PAGE_BYTES - 1..4 * PAGE_BYTES - 1].fill(0);
    assert!(read(&file, 0, 8 * PAGE_BYTES) == expected && *sheet.bytes.lock().unwrap() == expected);
}

#[test]
fn a_file_that_ends_within_a_page_stays_as_long_as_it_is_until_it_grows() {
    let sheet = sheet(PAGE + 1000);
    let file = WriteBack::new(sheet.clone(), 4);
    file.write_at(PAGE + 990, &[1; 10]).unwrap();
    for (offset, length) in [(PAGE + 999, 2), (PAGE + 2000, 1), (0, 3 * PAGE_BYTES)] {
        let kind = file.read_at(offset, &mut vec![0; length]).unwrap_err().kind();
        assert_eq!(kind, io::ErrorKind::UnexpectedEof, "{offset}+{length}");
    }
    file.write_back().unwrap();
    assert_eq!((file.length().unwrap(), sheet.byte(PAGE + 999)), (PAGE + 1000, 1));

    file.grow(3 * PAGE).unwrap();
    assert_eq!(read(&file, PAGE + 999, 3), [1, 0, 0]);
    file.write_at(PAGE + 1001, &[2]).unwrap();
    file.write_back().unwrap();
    assert_eq!((sheet.length().unwrap(), sheet.byte(PAGE + 1001)), (3 * PAGE, 2));
    file.write_at(3 * PAGE + 5, &[3]).unwrap();
    assert_eq!((file.length().unwrap(), read(&file, 3 * PAGE + 4, 2)), (3 * PAGE + 6, vec![0, 3]), "also by a write");
}

/// A reader has taken a page from the file when `meanwhile` happens, and would keep what is old by then.
fn overtaken(meanwhile: fn(&WriteBack)) {
    let sheet = sheet(16 * PAGE);
    let file = Arc::new(WriteBack::new(sheet.clone(), 2));
    let (weak, is_first) = (Arc::downgrade(&file), AtomicBool::new(true));
    let on_read = move || {
        if is_first.swap(false, Ordering::SeqCst)
            && let Some(file) = weak.upgrade()
        {
            meanwhile(&file);
        }
    };
    assert!(sheet.on_read.set(Box::new(on_read)).is_ok());
    assert_eq!(read(&file, 100, 4), [0; 4]);
    assert_eq!(read(&file, 0, 4), [9; 4]);
    file.write_back().unwrap();
    assert_eq!((sheet.byte(0), sheet.byte(100)), (9, 0));
}

#[test]
fn a_page_that_is_changed_while_a_reader_loads_it_is_not_put_back() {
    overtaken(|file| file.write_at(0, &[9; 4]).unwrap());
    overtaken(|file| {
        file.write_at(0, &[9; 4]).unwrap();
        file.write_back().unwrap();
        (1..8).for_each(|page| _ = read(file, page * PAGE, 1));
    });
    overtaken(|file| {
        file.write_at(PAGE, &[1]).unwrap();
        file.write_at(2 * PAGE, &[1]).unwrap();
        file.write_at(0, &[9; 4]).unwrap();
        file.write_back().unwrap();
    });
    overtaken(|file| {
        file.write_at(0, &[9; 2 * PAGE_BYTES]).unwrap();
        file.zero_range(4, 2 * PAGE - 4, false).unwrap();
        file.write_back().unwrap();
        (1..8).for_each(|page| _ = read(file, page * PAGE, 1));
    });
}

/// A tenth of a second of two readers, a writer and one who writes back, on more pages than there is room for. Whoever
/// holds the lock of an entry finds what was last written there.
#[test]
fn readers_and_writers_of_one_page_do_not_meet() {
    const ENTRIES: u64 = 8 * 1024;
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    let sheet = sheet(ENTRIES * 4);
    let file = WriteBack::new(sheet.clone(), 3);
    let entries: Vec<RwLock<u32>> = (0..ENTRIES).map(|_| RwLock::default()).collect();
    let until = Instant::now() + Duration::from_millis(100);
    let numbers = |stream: u64| {
        let mut state = seed ^ (stream << 32);
        // Of few entries of each page, so that one is met again soon.
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) % 8 * 1024 + (state >> 50) % 4
        }
    };
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (mut next, file, entries) = (numbers(reader), &file, &entries);
            scope.spawn(move || {
                while Instant::now() < until {
                    let entry = next();
                    let expected = entries[entry as usize].read().unwrap();
                    assert_eq!(read(file, entry * 4, 4), expected.to_le_bytes(), "seed {seed}, entry {entry}");
                }
            });
        }
        scope.spawn(|| {
            let mut next = numbers(2);
            for value in 1_u32.. {
                let entry = next();
                let mut expected = entries[entry as usize].write().unwrap();
                file.write_at(entry * 4, &value.to_le_bytes()).unwrap();
                *expected = value;
                if Instant::now() >= until {
                    break;
                }
            }
        });
        scope.spawn(|| {
            while Instant::now() < until {
                file.write_back().unwrap();
                std::thread::yield_now();
            }
        });
    });
    file.write_back().unwrap();
    for (entry, expected) in (0..ENTRIES).zip(&entries) {
        let expected = expected.read().unwrap().to_le_bytes();
        let found = [0, 1, 2, 3].map(|byte| sheet.byte(entry * 4 + byte));
        assert_eq!(found, expected, "seed {seed}, entry {entry}");
    }
}

/// What is done to a file.
#[derive(Clone, Debug)]
enum Step {
    Write(u64, usize, u8),
    Zero(u64, u64),
    Read(u64, usize),
    Grow(u64),
    WriteBack,
    WriteBackIn(u64, u64),
    /// The disk is full while the step is taken that comes next.
    Full,
}

fn steps() -> impl proptest::strategy::Strategy<Value = Vec<Step>> {
    use proptest::prelude::*;
    let offset = 0..10 * PAGE;
    // Often a few bytes, at times many pages.
    let length = prop_oneof![4 => 1_u64..16, 2 => 1..2 * PAGE, 1 => 1..6 * PAGE];
    let range = (offset, length);
    let step = prop_oneof![
        6 => (range.clone(), 1_u8..).prop_map(|((at, length), byte)| Step::Write(at, length as usize, byte)),
        2 => range.clone().prop_map(|(at, length)| Step::Zero(at, length)),
        6 => range.clone().prop_map(|(at, length)| Step::Read(at, length as usize)),
        1 => (0..12 * PAGE).prop_map(Step::Grow),
        1 => Just(Step::WriteBack),
        1 => range.prop_map(|(at, length)| Step::WriteBackIn(at, length)),
        1 => Just(Step::Full),
    ];
    proptest::collection::vec(step, 1..120)
}

/// Takes a step, again with space if there was none.
fn take(file: &WriteBack, sheet: &Sheet, model: &mut Vec<u8>, is_full: bool, step: &Step) {
    let length = model.len() as u64;
    let act = || match *step {
        Step::Write(at, length, byte) => file.write_at(at, &vec![byte; length]),
        // A range that leaves the file is none that anybody zeroes.
        Step::Zero(at, zeroes) => file.zero_range(at.min(length), zeroes.min(length - at.min(length)), false),
        Step::Grow(length) => file.grow(length),
        Step::WriteBack => file.write_back(),
        Step::WriteBackIn(offset, length) => file.write_back_in(ByteRange { offset, length }),
        Step::Read(..) | Step::Full => Ok(()),
    };
    sheet.full.store(is_full, Ordering::SeqCst);
    let outcome = act();
    sheet.full.store(false, Ordering::SeqCst);
    if let Err(cause) = outcome {
        assert!(is_full && cause.kind() == io::ErrorKind::StorageFull, "{cause}");
        act().unwrap();
    }
    match *step {
        Step::Write(at, length, byte) => {
            model.resize(model.len().max(at as usize + length), 0);
            model[at as usize..][..length].fill(byte);
        }
        Step::Zero(at, zeroes) => model.iter_mut().skip(at as usize).take(zeroes as usize).for_each(|byte| *byte = 0),
        Step::Grow(length) => model.resize(model.len().max(length as usize), 0),
        Step::Read(..) | Step::WriteBack | Step::WriteBackIn(..) | Step::Full => {}
    }
}

/// Holds what can be seen of the file against the model.
fn compare(file: &WriteBack, sheet: &Sheet, model: &[u8], step: &Step) {
    assert_eq!(file.length().unwrap(), model.len() as u64);
    match *step {
        Step::Read(at, length) => {
            let mut buffer = vec![0xee; length];
            let expected = model.get(at as usize..at as usize + length);
            assert_eq!(file.read_at(at, &mut buffer).ok().map(|()| &buffer[..]), expected);
        }
        Step::WriteBack => assert!(*sheet.bytes.lock().unwrap() == model, "the file holds all"),
        Step::WriteBackIn(at, length) => {
            let range = at as usize..model.len().min(at as usize + length as usize);
            assert!(sheet.bytes.lock().unwrap().get(range.clone()) == model.get(range), "the file holds the range");
        }
        Step::Write(..) | Step::Zero(..) | Step::Grow(_) | Step::Full => {}
    }
    // What is said to take no space reads as zeroes.
    let all = ByteRange { offset: 0, length: model.len() as u64 };
    let until = file.allocated_in(all).unwrap().map_or(model.len(), |first| first.offset as usize);
    assert!(model[..until].iter().all(|byte| *byte == 0), "a hole up to {until}");
}

proptest::proptest! {
    #[test]
    fn it_is_as_a_plain_file(pages_max in 0_usize..8, length in 0..8 * PAGE, steps in steps()) {
        let sheet = sheet(length);
        let file = WriteBack::new(sheet.clone(), pages_max);
        let mut model = vec![0; length as usize];
        let mut is_full = false;
        for step in steps {
            take(&file, &sheet, &mut model, is_full, &step);
            is_full = matches!(step, Step::Full);
            compare(&file, &sheet, &model, &step);
            proptest::prop_assert!(file.pages().held.len() <= pages_max);
        }
        file.sync().unwrap();
        proptest::prop_assert!(*sheet.bytes.lock().unwrap() == model);
    }
}
