//! Reading and writing little-endian fields with every length checked: the one way in which bytes from disk or network
//! become values.

use bytes::{Buf, BufMut};

use crate::position::{Epoch, EpochHistory, EpochStart, Position, Seq};
use crate::ranges::ByteRange;
use crate::view::{ReplicaName, View, ViewState, VolumeUuid};

/// The bytes were too short, or a field held what it cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed field {field}")]
pub struct Malformed {
    /// Which field.
    pub field: &'static str,
}

/// A cursor over untrusted bytes.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Starts at the first byte.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    fn need(&self, bytes: usize, field: &'static str) -> Result<(), Malformed> {
        if self.rest.len() < bytes { Err(Malformed { field }) } else { Ok(()) }
    }

    /// One byte.
    pub fn u8(&mut self, field: &'static str) -> Result<u8, Malformed> {
        self.need(1, field)?;
        Ok(self.rest.get_u8())
    }

    /// Two bytes, little-endian.
    pub fn u16(&mut self, field: &'static str) -> Result<u16, Malformed> {
        self.need(2, field)?;
        Ok(self.rest.get_u16_le())
    }

    /// Four bytes, little-endian.
    pub fn u32(&mut self, field: &'static str) -> Result<u32, Malformed> {
        self.need(4, field)?;
        Ok(self.rest.get_u32_le())
    }

    /// Eight bytes, little-endian.
    pub fn u64(&mut self, field: &'static str) -> Result<u64, Malformed> {
        self.need(8, field)?;
        Ok(self.rest.get_u64_le())
    }

    /// `count` bytes as they are.
    pub fn bytes(&mut self, count: usize, field: &'static str) -> Result<&'a [u8], Malformed> {
        self.need(count, field)?;
        let (head, tail) = self.rest.split_at(count);
        self.rest = tail;
        Ok(head)
    }

    /// A boolean: one byte, 0 or 1.
    pub fn bool(&mut self, field: &'static str) -> Result<bool, Malformed> {
        match self.u8(field)? {
            0 => Ok(false),
            1 => Ok(true),
            2..=u8::MAX => Err(Malformed { field }),
        }
    }

    /// UTF-8 text behind its length in two bytes.
    pub fn text(&mut self, field: &'static str) -> Result<String, Malformed> {
        let length = self.u16(field)?.into();
        let bytes = self.bytes(length, field)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Malformed { field })
    }

    /// A name.
    pub fn name(&mut self, field: &'static str) -> Result<ReplicaName, Malformed> {
        self.text(field)?.parse().map_err(|_| Malformed { field })
    }

    /// A volume's identity.
    pub fn uuid(&mut self, field: &'static str) -> Result<VolumeUuid, Malformed> {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(self.bytes(16, field)?);
        Ok(VolumeUuid(uuid))
    }

    /// A position.
    pub fn position(&mut self, field: &'static str) -> Result<Position, Malformed> {
        Ok(Position { epoch: Epoch(self.u64(field)?), seq: Seq(self.u64(field)?) })
    }

    /// A view: a count and so many names.
    pub fn view(&mut self, field: &'static str) -> Result<View, Malformed> {
        let count = self.u8(field)?;
        if usize::from(count) > crate::REPLICAS_MAX {
            return Err(Malformed { field });
        }
        let names = (0..count).map(|_| self.name(field)).collect::<Result<_, _>>()?;
        View::new(names).ok_or(Malformed { field })
    }

    /// A view with the one before it.
    pub fn view_state(&mut self, field: &'static str) -> Result<ViewState, Malformed> {
        Ok(ViewState { view: self.view(field)?, previous: self.view(field)?, seq: Seq(self.u64(field)?) })
    }

    /// An epoch history: a count and so many entries.
    pub fn history(&mut self, field: &'static str) -> Result<EpochHistory, Malformed> {
        let count = usize::from(self.u16(field)?);
        if count > EpochHistory::ENTRIES_MAX {
            return Err(Malformed { field });
        }
        self.need(count * 16, field)?;
        let entries = (0..count)
            .map(|_| Ok(EpochStart { epoch: Epoch(self.u64(field)?), first_seq: Seq(self.u64(field)?) }))
            .collect::<Result<_, Malformed>>()?;
        EpochHistory::from_entries(entries).ok_or(Malformed { field })
    }

    /// Ranges behind their count in four bytes.
    pub fn ranges(&mut self, field: &'static str) -> Result<Vec<ByteRange>, Malformed> {
        let count = self.u32(field)? as usize;
        self.need(count.saturating_mul(RANGE_BYTES), field)?;
        (0..count).map(|_| Ok(ByteRange { offset: self.u64(field)?, length: self.u64(field)? })).collect()
    }

    /// Bytes not read yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Ends the reading: bytes left over are an error.
    pub fn finish(self, field: &'static str) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed { field }) }
    }
}

/// Writes text behind its length. Text that is longer than a frame can say is cut at a character.
pub fn put_text(out: &mut impl BufMut, text: &str) {
    let mut end = text.len().min(4096);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    out.put_u16_le(end as u16);
    out.put_slice(&text.as_bytes()[..end]);
}

/// Writes a position.
pub fn put_position(out: &mut impl BufMut, position: Position) {
    out.put_u64_le(position.epoch.0);
    out.put_u64_le(position.seq.0);
}

/// Writes a view.
pub fn put_view(out: &mut impl BufMut, view: &View) {
    out.put_u8(view.len() as u8);
    for name in view.members() {
        put_text(out, name.as_str());
    }
}

/// Writes a view with the one before it.
pub fn put_view_state(out: &mut impl BufMut, state: &ViewState) {
    put_view(out, &state.view);
    put_view(out, &state.previous);
    out.put_u64_le(state.seq.0);
}

/// Writes an epoch history.
pub fn put_history(out: &mut impl BufMut, history: &EpochHistory) {
    out.put_u16_le(history.entries().len() as u16);
    for entry in history.entries() {
        out.put_u64_le(entry.epoch.0);
        out.put_u64_le(entry.first_seq.0);
    }
}

/// Bytes of a range as [`put_ranges`] writes it.
pub const RANGE_BYTES: usize = 16;

/// Writes ranges behind their count.
pub fn put_ranges(out: &mut impl BufMut, ranges: &[ByteRange]) {
    out.put_u32_le(ranges.len() as u32);
    for range in ranges {
        out.put_u64_le(range.offset);
        out.put_u64_le(range.length);
    }
}

/// Writes an optional identity-like blob of 16 bytes.
pub fn put_uuid(out: &mut impl BufMut, uuid: VolumeUuid) {
    out.put_slice(&uuid.0);
}
