//! What the disk holds of each block, told one by one: for a scrub. Compares with stored checksums alone; changes nothing.

use protocol::BLOCK_BYTES;
use protocol::checksum::stored_block_checksum;
use protocol::ranges::ByteRange;
use protocol::scrub::BlockFound;

use crate::disk::RawFile;

const BLOCK: usize = BLOCK_BYTES as usize;

/// Reads a range of whole blocks; `stored` are their checksums.
pub(crate) fn look_at(image: &dyn RawFile, range: ByteRange, stored: &[u32]) -> Vec<BlockFound> {
    let mut bytes = vec![0; range.length as usize];
    if image.read_at(range.offset, &mut bytes).is_ok() {
        return bytes.chunks_exact(BLOCK).zip(stored).map(|(block, stored)| judge(block, *stored)).collect();
    }
    // One bad sector spoils the read of all; the other blocks may be good.
    let offsets = (range.offset..range.end()).step_by(BLOCK);
    let one = |(offset, stored): (u64, &u32)| {
        let block = &mut bytes[..BLOCK];
        let read = image.read_at(offset, block);
        read.map_or(BlockFound::Unreadable, |()| judge(block, *stored))
    };
    offsets.zip(stored).map(one).collect()
}

fn judge(block: &[u8], stored: u32) -> BlockFound {
    let checksum = stored_block_checksum(block);
    if checksum == stored { BlockFound::Sound { checksum } } else { BlockFound::Mismatch }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::file::{Caching, SystemFile};

    #[test]
    fn of_each_block_it_is_told_whether_it_is_sound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::fs::write(&path, [1; 3 * BLOCK]).unwrap();
        let image = SystemFile::open(&path, Caching::Buffered).unwrap();
        let stored = [stored_block_checksum(&[1; BLOCK]); 3];
        image.write_at(5000, &[9]).unwrap();
        let (all, sound) =
            (ByteRange { offset: 0, length: 3 * BLOCK_BYTES }, BlockFound::Sound { checksum: stored[0] });
        assert_eq!(look_at(&image, all, &stored), [sound, BlockFound::Mismatch, sound]);
        // A file that ends early is as good as sectors that cannot be read.
        std::fs::File::options().write(true).open(&path).unwrap().set_len(BLOCK_BYTES).unwrap();
        assert_eq!(look_at(&image, all, &stored), [sound, BlockFound::Unreadable, BlockFound::Unreadable]);
    }
}
