//! The file `dirty`: pages of the bitmaps of replicas out of the view, read back when a replica is opened. Where a page
//! lies does not depend on the size of the volume; see [`crate::replica::dirty`] for what it says.

use std::io;

use crate::disk::RawFile;
use crate::replica::dirty::page::PAGE_BYTES;
use crate::replica::dirty::{COPIES, DirtyMaps, page_offset};
use crate::superblock::Superblock;

/// What the superblock and its pages say of replicas out of the view.
pub fn load(file: &dyn RawFile, superblock: &Superblock) -> io::Result<DirtyMaps> {
    let mut maps = DirtyMaps::of(superblock);
    let length = file.length()?;
    for (slot, index) in maps.pages() {
        // Both copies lie side by side. The file ends behind the last page that was ever written.
        let mut copies = vec![0; PAGE_BYTES * COPIES as usize];
        let offset = page_offset(slot, index, 0);
        let held = length.saturating_sub(offset).min(copies.len() as u64) as usize;
        if held == 0 {
            continue;
        }
        file.read_at(offset, &mut copies[..held])?;
        let (first, second) = copies.split_at(PAGE_BYTES);
        maps.restore(slot, index, [first, second], superblock.tracked_seq);
    }
    Ok(maps)
}
