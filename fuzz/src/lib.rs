//! What the fuzz targets do with one input. Each module is one target; `tests/corpus.rs` of the product includes this
//! file and replays the inputs that were kept.

pub mod frames;
pub mod handshake;
mod input;
pub mod options;
pub mod replica;
pub mod requests;
pub mod volume;
