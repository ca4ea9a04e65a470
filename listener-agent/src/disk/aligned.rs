//! A buffer whose first byte lies at a multiple of a block, as direct I/O asks for.

use bytes::BufMut;
use protocol::BLOCK_BYTES;

const ALIGN: usize = BLOCK_BYTES as usize;

/// The buffer. Its capacity is fixed when it is made or reset.
#[derive(Debug)]
pub struct AlignedBuffer {
    memory: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    /// A buffer for `capacity_bytes`.
    #[must_use]
    pub fn with_capacity(capacity_bytes: usize) -> AlignedBuffer {
        let mut memory: Vec<u8> = Vec::with_capacity(capacity_bytes + ALIGN);
        let address = memory.as_ptr().addr();
        let start = address.next_multiple_of(ALIGN) - address;
        memory.resize(start, 0);
        AlignedBuffer { memory, start }
    }

    /// Empties the buffer and makes room for `capacity_bytes`; memory that suffices is kept.
    pub fn reset(&mut self, capacity_bytes: usize) {
        self.memory.truncate(self.start);
        if self.memory.capacity() - self.start < capacity_bytes {
            *self = AlignedBuffer::with_capacity(capacity_bytes);
        }
    }

    /// Bytes put so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.memory.len() - self.start
    }

    /// Whether nothing was put yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Appends bytes.
    ///
    /// # Panics
    /// If the capacity is exceeded: growing would move the buffer off its alignment.
    pub fn put(&mut self, bytes: &[u8]) {
        assert!(self.memory.capacity() - self.memory.len() >= bytes.len(), "aligned buffer is full");
        self.memory.put_slice(bytes);
    }

    /// Appends zeroes up to the next multiple of a block.
    pub fn pad_to_block(&mut self) {
        let missing = self.len().next_multiple_of(ALIGN) - self.len();
        assert!(self.memory.capacity() - self.memory.len() >= missing, "aligned buffer is full");
        self.memory.put_bytes(0, missing);
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_byte_is_aligned_and_padding_fills_the_block() {
        let mut buffer = AlignedBuffer::with_capacity(3 * ALIGN);
        buffer.put(&[7; 5000]);
        buffer.pad_to_block();
        assert_eq!(buffer.as_slice().as_ptr().addr() % ALIGN, 0);
        assert_eq!(buffer.len(), 2 * ALIGN);
        assert_eq!(buffer.as_slice()[4999..5001], [7, 0]);
        for capacity in [ALIGN, 10 * ALIGN] {
            buffer.reset(capacity);
            buffer.put(&[1; ALIGN]);
            assert_eq!((buffer.len(), buffer.as_slice().as_ptr().addr() % ALIGN), (ALIGN, 0));
        }
    }
}
