//! One page of the dirty bitmaps of a replica out of the view: three bits per unit, and the page in bytes.
//!
//! ```text
//! 0  u32  CRC-32 of bytes 4..4096, started from that of the volume uuid
//! 4  u32  slot of the replica          24  u64  generation of the entry
//! 8  u64  index of the page            32  u64  seq as of which the bits are
//! 16 u64  id of the entry              40  three times 1352 bytes: to copy, recent, older
//! ```

use std::ops::Range;

use bytes::BufMut;
use protocol::cursor::{Malformed, Reader};
use protocol::{BLOCK_BYTES, Seq};

use crate::journal::group::Salt;

const WORDS: usize = 169;
const WORD_BITS: usize = 64;
/// Bytes of a page.
pub const PAGE_BYTES: usize = BLOCK_BYTES as usize;
/// Units of the volume that one page covers.
pub const UNITS_PER_PAGE: usize = WORDS * WORD_BITS;
const HEADER_BYTES: usize = 40;
const _: () = assert!(HEADER_BYTES + Plane::ALL.len() * WORDS * 8 == PAGE_BYTES);

/// What a bit says of its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// It is to be copied.
    ToCopy,
    /// A record after the last rotation changed it.
    Recent,
    /// A record between the last two rotations changed it.
    Older,
}

impl Plane {
    /// All three, in the order in which a page has them.
    pub const ALL: [Plane; 3] = [Plane::ToCopy, Plane::Recent, Plane::Older];

    fn index(self) -> usize {
        match self {
            Plane::ToCopy => 0,
            Plane::Recent => 1,
            Plane::Older => 2,
        }
    }
}

/// The bits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    planes: [[u64; WORDS]; 3],
}

/// Where a page belongs: to which entry, and to which state of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageKey {
    /// The slot of the entry.
    pub slot: u8,
    /// Which part of the volume.
    pub index: u64,
    /// The record that made the entry.
    pub id: Seq,
    /// The generation of the replica when the entry was made: a place of the order is given out anew after its record
    /// was dropped.
    pub generation: u64,
    /// The bits are as of this record.
    pub seq: Seq,
}

/// What lies in the place of a page.
#[derive(Debug)]
pub enum Found {
    /// Zeroes: nothing was ever written there.
    Blank,
    /// Neither zeroes nor a page that belongs there.
    Broken,
    /// A page.
    Whole(PageKey, Box<Page>),
}

/// The bits of a word that lie in a range of bits of the plane.
fn mask(word: usize, bits: &Range<usize>) -> u64 {
    let start = bits.start.max(word * WORD_BITS) - word * WORD_BITS;
    let end = bits.end.min((word + 1) * WORD_BITS).saturating_sub(word * WORD_BITS);
    if start >= end { 0 } else { (u64::MAX >> (WORD_BITS - (end - start))) << start }
}

fn words(bits: &Range<usize>) -> Range<usize> {
    bits.start / WORD_BITS..bits.end.div_ceil(WORD_BITS)
}

impl Page {
    /// A page without a bit set.
    #[must_use]
    pub fn empty() -> Box<Page> {
        Box::new(Page { planes: [[0; WORDS]; 3] })
    }

    /// Sets or clears bits; whether any was different before.
    pub fn put(&mut self, plane: Plane, bits: &Range<usize>, set: bool) -> bool {
        let words_of = &mut self.planes[plane.index()];
        let mut changed = false;
        for word in words(bits) {
            let mask = mask(word, bits);
            let before = words_of[word];
            words_of[word] = if set { before | mask } else { before & !mask };
            changed |= words_of[word] != before;
        }
        changed
    }

    /// What was recent is older, and nothing is recent. Whether that made a difference.
    pub fn rotate(&mut self) -> bool {
        let [_, recent, older] = &mut self.planes;
        let changed = recent.iter().chain(older.iter()).any(|w| *w != 0);
        *older = std::mem::replace(recent, [0; WORDS]);
        changed
    }

    /// Everything that is marked is to be copied. Whether that made a difference.
    pub fn gather(&mut self) -> bool {
        let [to_copy, recent, older] = &mut self.planes;
        let mut changed = false;
        for word in 0..WORDS {
            let marks = std::mem::take(&mut recent[word]) | std::mem::take(&mut older[word]);
            changed |= marks != 0;
            to_copy[word] |= marks;
        }
        changed
    }

    /// Whether no bit is set.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.planes.iter().flatten().all(|w| *w == 0)
    }

    /// Bits set in a range of a plane.
    #[must_use]
    pub fn count(&self, plane: Plane, bits: &Range<usize>) -> u64 {
        words(bits).map(|w| u64::from((self.planes[plane.index()][w] & mask(w, bits)).count_ones())).sum()
    }

    /// Bits set in any plane.
    #[must_use]
    pub fn count_any(&self, bits: &Range<usize>) -> u64 {
        let any = |w: usize| self.planes.iter().fold(0, |all, plane| all | plane[w]);
        words(bits).map(|w| u64::from((any(w) & mask(w, bits)).count_ones())).sum()
    }

    /// The first bit of a plane from `from` on that is set, or that is clear; [`UNITS_PER_PAGE`] if there is none.
    #[must_use]
    pub fn find(&self, plane: Plane, from: usize, set: bool) -> usize {
        let rest = from..UNITS_PER_PAGE;
        let found = words(&rest).find_map(|word| {
            let bits = self.planes[plane.index()][word];
            let wanted = if set { bits } else { !bits } & mask(word, &rest);
            (wanted != 0).then(|| word * WORD_BITS + wanted.trailing_zeros() as usize)
        });
        found.unwrap_or(UNITS_PER_PAGE)
    }

    /// The page in bytes.
    #[must_use]
    pub fn encode(&self, salt: Salt, key: PageKey) -> Vec<u8> {
        let mut out = Vec::with_capacity(PAGE_BYTES);
        out.put_u32_le(0);
        out.put_u32_le(key.slot.into());
        out.put_u64_le(key.index);
        out.put_u64_le(key.id.0);
        out.put_u64_le(key.generation);
        out.put_u64_le(key.seq.0);
        for word in self.planes.iter().flatten() {
            out.put_u64_le(*word);
        }
        let crc = salt.checksum(&out[4..]);
        out[..4].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads what lies in the place of page `index` of `slot`.
    #[must_use]
    pub fn decode(salt: Salt, slot: u8, index: u64, bytes: &[u8]) -> Found {
        if bytes.iter().all(|b| *b == 0) {
            return Found::Blank;
        }
        match Self::decode_whole(salt, bytes) {
            Ok(Some((key, page))) if (key.slot, key.index) == (slot, index) => Found::Whole(key, page),
            Ok(_) | Err(Malformed { .. }) => Found::Broken,
        }
    }

    fn decode_whole(salt: Salt, bytes: &[u8]) -> Result<Option<(PageKey, Box<Page>)>, Malformed> {
        let mut r = Reader::new(bytes);
        let crc = r.u32("checksum")?;
        if bytes.len() != PAGE_BYTES || crc != salt.checksum(&bytes[4..]) {
            return Ok(None);
        }
        let Ok(slot) = u8::try_from(r.u32("slot")?) else { return Ok(None) };
        let key = PageKey {
            slot,
            index: r.u64("index")?,
            id: Seq(r.u64("id")?),
            generation: r.u64("generation")?,
            seq: Seq(r.u64("seq")?),
        };
        let mut page = Page::empty();
        for word in page.planes.iter_mut().flatten() {
            *word = r.u64("bits")?;
        }
        Ok(Some((key, page)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::VolumeUuid;

    #[test]
    fn bits_are_set_counted_and_found_over_the_borders_of_words() {
        let mut page = Page::empty();
        assert!(page.put(Plane::ToCopy, &(60..200), true));
        assert!(!page.put(Plane::ToCopy, &(100..110), true), "nothing new");
        assert!(page.put(Plane::ToCopy, &(128..130), false));
        assert_eq!(page.count(Plane::ToCopy, &(0..UNITS_PER_PAGE)), 138);
        assert_eq!(page.count(Plane::ToCopy, &(61..129)), 67);
        assert_eq!(page.find(Plane::ToCopy, 0, true), 60);
        assert_eq!(page.find(Plane::ToCopy, 60, false), 128);
        assert_eq!(page.find(Plane::ToCopy, 129, true), 130);
        assert_eq!(page.find(Plane::ToCopy, 200, true), UNITS_PER_PAGE);
        assert!(page.put(Plane::Older, &(0..UNITS_PER_PAGE), true));
        assert_eq!(page.find(Plane::Older, 0, false), UNITS_PER_PAGE);
    }

    #[test]
    fn a_page_is_known_by_its_volume_its_place_and_every_byte() {
        let salt = Salt::of(VolumeUuid([3; 16]));
        let mut page = Page::empty();
        page.put(Plane::Recent, &(5..9000), true);
        let key = PageKey { slot: 3, index: 7, id: Seq(5), generation: 2, seq: Seq(9) };
        let bytes = page.encode(salt, key);
        assert!(matches!(Page::decode(salt, 3, 7, &bytes), Found::Whole(k, p) if k == key && p == page));
        let broken = |bytes: &[u8], slot, salt| matches!(Page::decode(salt, slot, 7, bytes), Found::Broken);
        assert!(broken(&bytes, 4, salt) && broken(&bytes, 3, Salt::of(VolumeUuid([4; 16]))));
        for at in [0, 8, 39, 40, PAGE_BYTES - 1] {
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            assert!(broken(&torn, 3, salt), "byte {at}");
        }
        assert!(matches!(Page::decode(salt, 3, 7, &[0; PAGE_BYTES]), Found::Blank));
    }
}
