//! A listener agent: holds one replica of each of its volumes and takes part in their order.
//!
//! [`server`] speaks to engines, [`host`] runs the threads of a replica, [`replica`] decides, [`carry_out`] does what it
//! decided to [`journal`], [`image`], [`dirty_file`] and [`superblock`], which are what lies on disk. [`directory`] makes
//! and opens it, [`recovery`] replays its journal, [`inspect`] looks at it offline, and [`rebuild`] gives it checksums where
//! they are lost.

mod blocks;
pub mod carry_out;
mod chain;
pub mod config;
pub mod connection;
pub mod console;
pub mod directory;
pub mod dirty_file;
pub mod disk;
mod extents;
pub mod host;
pub mod image;
pub mod inspect;
pub mod journal;
pub mod rebuild;
pub mod recovery;
pub mod replica;
pub mod server;
pub mod service;
pub mod superblock;
pub mod tls;
