//! A listener agent: holds one replica of each of its volumes and takes part in their order.
//!
//! [`server`] speaks to engines, [`host`] runs the threads of a replica, [`replica`] decides, [`journal`], [`image`] and
//! [`superblock`] are what lies on disk, [`directory`] makes and opens it, [`inspect`] looks at it offline.

pub mod config;
pub mod connection;
pub mod console;
pub mod directory;
pub mod disk;
pub mod host;
pub mod image;
pub mod inspect;
pub mod journal;
pub mod replica;

pub mod server;
pub mod superblock;
