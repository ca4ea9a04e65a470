//! Cuts an input into numbers and byte strings. What is missing at the end reads as zero.

use bytes::Bytes;

pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn u8(&mut self) -> u8 {
        match self.0.split_first() {
            Some((byte, rest)) => {
                self.0 = rest;
                *byte
            }
            None => 0,
        }
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.u8(), self.u8()])
    }

    pub fn u64(&mut self) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|_| self.u8()))
    }

    /// A number that is often small, often near a power of two, and can be any.
    pub fn number(&mut self) -> u64 {
        match self.u8() {
            byte @ 0..128 => byte.into(),
            byte @ 128..192 => (1 << (byte - 128)) + u64::from(self.u8()) - 16.min(1 << (byte - 128)),
            192.. => self.u64(),
        }
    }

    pub fn take(&mut self, length: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(length.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// Number, body and bulk data of a message.
    pub fn message(&mut self) -> (u8, &'a [u8], Bytes) {
        let number = self.u8();
        let body_bytes = usize::from(self.u16()).min(32 * 1024);
        let body = self.take(body_bytes);
        let bulk_bytes = usize::from(self.u16());
        (number, body, Bytes::copy_from_slice(self.take(bulk_bytes)))
    }
}
