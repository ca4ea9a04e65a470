//! What a block device may answer. Per sector the oracle knows, in the order in which they take effect, the writes that
//! the sector may hold: the last one known to have taken effect, and those after it that may have.
//!
//! Writes of one engine take effect in the order in which they were submitted. What an engine leaves unacknowledged is
//! chosen when the next one serves: the first read there tells how, and it stays so.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};
use protocol::extents::{self, Allocation, Extent};

use crate::disk::SECTOR;

/// A request of a client.
pub type Token = u64;

/// What a write leaves in a sector: the token of the write, or zero for zeroes.
type Value = u64;

#[derive(Clone, Copy, Debug)]
struct Entry {
    /// The epoch of the engine that took it.
    reign: u64,
    token: Token,
    value: Value,
}

#[derive(Debug)]
struct Write {
    reign: u64,
    first: usize,
    count: usize,
    zeroes: bool,
    /// Given to an engine after the next one served: it must not take effect any more.
    doomed: bool,
    /// Sectors where a later engine showed that it did not take effect.
    rejected: BTreeSet<usize>,
}

#[derive(Debug)]
struct Read {
    reign: u64,
    first: usize,
    /// For each sector what it may hold between question and answer, in the order of taking effect.
    allowed: Vec<Vec<Entry>>,
}

#[derive(Debug)]
pub struct Oracle {
    sectors: Vec<Vec<Entry>>,
    writes: BTreeMap<Token, Write>,
    reads: BTreeMap<Token, Read>,
    reign: u64,
    pub acknowledged: u64,
    pub answered_reads: u64,
    /// Sectors that statuses called zero.
    pub zero_sectors_shown: u64,
}

/// The bytes that the write `token` puts into `sector`.
pub fn content(token: Token, sector: usize) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let mixed = token.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((sector as u64) << 32 | i as u64);
        word.copy_from_slice(&if i == 0 { token } else { mixed }.to_le_bytes());
    }
    bytes
}

/// The payload of a write.
pub fn payload(token: Token, first: usize, count: usize) -> Bytes {
    let mut data = BytesMut::with_capacity(count * SECTOR);
    for sector in first..first + count {
        data.extend_from_slice(&content(token, sector));
    }
    data.freeze()
}

fn value_of(bytes: &[u8], sector: usize) -> Value {
    if bytes.iter().all(|b| *b == 0) {
        return 0;
    }
    let token = Value::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == content(token, sector), "sector {sector} holds bytes that nobody wrote");
    token
}

impl Oracle {
    pub fn new(sectors: usize) -> Oracle {
        let zero = Entry { reign: 0, token: 0, value: 0 };
        Oracle {
            sectors: vec![vec![zero]; sectors],
            writes: BTreeMap::new(),
            reads: BTreeMap::new(),
            reign: 0,
            acknowledged: 0,
            answered_reads: 0,
            zero_sectors_shown: 0,
        }
    }

    pub fn sectors(&self) -> usize {
        self.sectors.len()
    }

    /// An engine begins to serve in this epoch. One that wakes up after a later one did may believe so too.
    pub fn begin_reign(&mut self, epoch: u64) {
        self.reign = self.reign.max(epoch);
    }

    pub fn submit_write(&mut self, token: Token, reign: u64, first: usize, count: usize, zeroes: bool) {
        let doomed = reign < self.reign;
        let value = if zeroes { 0 } else { token };
        let rejected = BTreeSet::new();
        self.writes.insert(token, Write { reign, first, count, zeroes, doomed, rejected });
        if doomed {
            return;
        }
        for sector in first..first + count {
            self.sectors[sector].push(Entry { reign, token, value });
            for read in self.reads.values_mut() {
                if let Some(allowed) = sector.checked_sub(read.first).and_then(|i| read.allowed.get_mut(i)) {
                    allowed.push(Entry { reign, token, value });
                }
            }
        }
    }

    pub fn acknowledge_write(&mut self, token: Token) {
        let write = &self.writes[&token];
        let (first, count) = (write.first, write.count);
        assert!(!write.doomed, "write {token} of a fenced engine was acknowledged");
        assert!(write.rejected.is_empty(), "write {token} was acknowledged after a read showed that it is lost");
        self.acknowledged += 1;
        for sector in first..first + count {
            let entries = &mut self.sectors[sector];
            if let Some(at) = entries.iter().position(|e| e.token == token) {
                entries.drain(..at);
            }
        }
    }

    pub fn submit_read(&mut self, token: Token, reign: u64, first: usize, count: usize) {
        let allowed = self.sectors[first..first + count].to_vec();
        self.reads.insert(token, Read { reign, first, allowed });
    }

    pub fn fail_read(&mut self, token: Token) {
        self.reads.remove(&token);
    }

    pub fn answer_read(&mut self, token: Token, data: &[u8]) {
        let Read { reign, first, allowed } = self.reads.remove(&token).expect("a read is answered once");
        assert_eq!(data.len(), allowed.len() * SECTOR, "a read gives what was asked for");
        self.answered_reads += 1;
        for (i, (bytes, allowed)) in data.chunks_exact(SECTOR).zip(&allowed).enumerate() {
            let sector = first + i;
            let value = value_of(bytes, sector);
            let Some(earliest) = allowed.iter().find(|e| e.value == value).copied() else {
                let now = &self.sectors[sector];
                panic!("read {token} of reign {reign}: sector {sector} holds {value} and not {allowed:?}; now {now:?}");
            };
            self.observe(sector, earliest, reign);
        }
    }

    /// What is called zeroes, or a hole, must read as zeroes, and is then known as if it had been read.
    pub fn answer_status(&mut self, token: Token, found: &[Extent]) {
        let Read { reign, first, allowed } = self.reads.remove(&token).expect("a status is answered once");
        let asked = (allowed.len() * SECTOR) as u64;
        assert!(extents::are_sound(found, asked), "status {token} is answered with {found:?} for {asked} bytes");
        let mut at = 0;
        for extent in found {
            let sectors = at / SECTOR..(at + extent.length as usize).div_ceil(SECTOR);
            at += extent.length as usize;
            if extent.allocation == Allocation::Data {
                continue;
            }
            for i in sectors {
                self.zero_sectors_shown += 1;
                let sector = first + i;
                let Some(earliest) = allowed[i].iter().find(|e| e.value == 0).copied() else {
                    let (may, now) = (&allowed[i], &self.sectors[sector]);
                    panic!("status {token} of reign {reign}: sector {sector} is no zeroes but {may:?}; now {now:?}");
                };
                self.observe(sector, earliest, reign);
            }
        }
    }

    /// What a read has shown stays. Of several writes that look alike it showed at least the earliest.
    fn observe(&mut self, sector: usize, seen: Entry, reign: u64) {
        let entries = &mut self.sectors[sector];
        let Some(at) = entries.iter().position(|e| e.token == seen.token) else { return };
        entries.drain(..at);
        // Zeroes look alike: what lies before the last write that would show the same may have been there too.
        let certain_after = entries.iter().rposition(|e| e.value == seen.value).unwrap_or(0);
        let writes = &mut self.writes;
        let mut index = 0;
        entries.retain(|e| {
            let stays = e.reign >= reign || index <= certain_after;
            index += 1;
            if !stays && let Some(write) = writes.get_mut(&e.token) {
                write.rejected.insert(sector);
            }
            stays
        });
    }

    /// Whether `image` holds nothing but what the sectors may hold.
    pub fn check_image(&self, image: &[u8]) {
        for (sector, bytes) in image.chunks_exact(SECTOR).enumerate() {
            let value = value_of(bytes, sector);
            let entries = &self.sectors[sector];
            assert!(entries.iter().any(|e| e.value == value), "sector {sector} holds {value} and not {entries:?}");
        }
    }

    /// What is known of a write, for people.
    pub fn describe(&self, token: Token) -> String {
        self.writes.get(&token).map_or_else(String::new, |w| {
            format!("reign {} sectors {}+{}{}", w.reign, w.first, w.count, if w.zeroes { " zeroes" } else { "" })
        })
    }
}
