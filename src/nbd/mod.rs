//! The NBD server front: handshake, transmission, listening.
//!
//! Owns everything between a client's socket and [`Backend::submit`]. Knows nothing of replicas, order or
//! durability: a volume behind [`Backend`] decides these. The protocol itself (`constants`, `handshake`, `request`,
//! `reply`) is sans-IO: bytes in, bytes and decisions out, no clock, socket, task or lock. The other modules are the
//! thin shell of sockets and tasks around it.

mod address;
mod backend;
mod budget;
pub mod constants;
mod counters;
pub mod handshake;
mod intake;
mod limits;
mod listen;
mod outbox;
pub mod reply;
pub mod request;
mod server;
mod session;
mod stream;

pub use address::{AddressError, ListenAddress};
pub use backend::{Backend, Completion, ExportInfo, IoError, Request};
pub use counters::CountersSnapshot;
pub use limits::Limits;
pub use listen::{BindError, ListeningSocket};
pub use server::{NbdServer, PublishError};
