//! How parts of a volume are kept: runs of bytes that are data, zeroes or holes, and their form in bytes. Decides nothing
//! about which is which.

use bytes::BufMut;

use crate::cursor::{Malformed, Reader};

/// Extents in one answer, at most.
pub const EXTENTS_MAX: usize = 2048;

/// Bytes of an extent as [`put_extents`] writes it.
const EXTENT_BYTES: usize = 9;

/// How a run of bytes is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// It may hold anything.
    Data,
    /// It reads as zeroes, and takes space.
    Zeroes,
    /// It reads as zeroes, and takes none.
    Hole,
}

/// A run of bytes that are kept alike. Extents of an answer follow each other from the first byte asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; never zero.
    pub length: u64,
    /// How they are kept.
    pub allocation: Allocation,
}

/// Bytes that all of `extents` cover; saturates for lengths that no volume has.
#[must_use]
pub fn covered(extents: &[Extent]) -> u64 {
    extents.iter().fold(0, |sum, extent| sum.saturating_add(extent.length))
}

/// Whether `extents` can answer for a range of `asked` bytes: one or more, none of them empty, and no more than was asked.
#[must_use]
pub fn are_sound(extents: &[Extent], asked: u64) -> bool {
    let count = extents.len();
    (1..=EXTENTS_MAX).contains(&count) && extents.iter().all(|e| e.length > 0) && covered(extents) <= asked
}

/// Appends an extent, to the last one if that is kept alike.
pub fn push(extents: &mut Vec<Extent>, extent: Extent) {
    match extents.last_mut() {
        Some(last) if last.allocation == extent.allocation => last.length += extent.length,
        Some(_) | None => extents.push(extent),
    }
}

/// Writes extents behind their count.
pub(crate) fn put_extents(out: &mut impl BufMut, extents: &[Extent]) {
    out.put_u32_le(extents.len() as u32);
    for extent in extents {
        out.put_u64_le(extent.length);
        out.put_u8(match extent.allocation {
            Allocation::Data => 0,
            Allocation::Zeroes => 1,
            Allocation::Hole => 2,
        });
    }
}

/// Reads extents. None at all, too many of them, an empty one, and lengths that no range has are malformed.
pub(crate) fn read_extents(r: &mut Reader<'_>) -> Result<Vec<Extent>, Malformed> {
    const FIELD: &str = "extents";
    let count = r.u32(FIELD)? as usize;
    if count > EXTENTS_MAX || r.remaining() < count * EXTENT_BYTES {
        return Err(Malformed { field: FIELD });
    }
    let mut extents = Vec::with_capacity(count);
    for _ in 0..count {
        let length = r.u64(FIELD)?;
        let allocation = match r.u8(FIELD)? {
            0 => Allocation::Data,
            1 => Allocation::Zeroes,
            2 => Allocation::Hole,
            3..=u8::MAX => return Err(Malformed { field: FIELD }),
        };
        extents.push(Extent { length, allocation });
    }
    // The sum saturates where it does not fit.
    if are_sound(&extents, u64::MAX - 1) { Ok(extents) } else { Err(Malformed { field: FIELD }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hole(length: u64) -> Extent {
        Extent { length, allocation: Allocation::Hole }
    }

    fn read(extents: &[Extent]) -> Result<Vec<Extent>, Malformed> {
        let mut bytes = Vec::new();
        put_extents(&mut bytes, extents);
        let mut r = Reader::new(&bytes);
        let read = read_extents(&mut r)?;
        r.finish("extents")?;
        Ok(read)
    }

    #[test]
    fn what_is_written_is_read_back() {
        let extents = [hole(1), Extent { length: 1 << 40, allocation: Allocation::Data }, hole(4096)];
        assert_eq!(read(&extents).unwrap(), extents);
        assert_eq!(read(&[hole(1); EXTENTS_MAX]).unwrap().len(), EXTENTS_MAX);
    }

    #[test]
    fn answers_that_cannot_be_are_refused() {
        for extents in [&[][..], &[hole(1), hole(0)], &[hole(u64::MAX)], &[hole(u64::MAX - 1), hole(2)]] {
            assert!(read(extents).is_err(), "{extents:?}");
        }
        assert!(read(&[hole(1); EXTENTS_MAX + 1]).is_err());
        assert!(read_extents(&mut Reader::new(&u32::MAX.to_le_bytes())).is_err());
        assert!(
            read_extents(&mut Reader::new(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 3])).is_err(),
            "no such allocation"
        );
    }

    #[test]
    fn an_answer_covers_something_and_no_more_than_was_asked() {
        assert!(are_sound(&[hole(10)], 10) && are_sound(&[hole(10)], 11));
        assert!(!are_sound(&[hole(10), hole(1)], 10) && !are_sound(&[], 10) && !are_sound(&[hole(0)], 10));
    }

    #[test]
    fn neighbours_that_are_kept_alike_are_one() {
        let mut extents = Vec::new();
        push(&mut extents, hole(1));
        push(&mut extents, hole(2));
        push(&mut extents, Extent { length: 3, allocation: Allocation::Zeroes });
        assert_eq!(extents, [hole(3), Extent { length: 3, allocation: Allocation::Zeroes }]);
    }
}
