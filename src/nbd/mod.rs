//! The NBD server front: handshake, transmission, listening.
//!
//! Owns everything between a client's socket and [`Backend::submit`]. Knows nothing of replicas, order or
//! durability: a volume behind [`Backend`] decides these. The protocol itself (`constants`, `handshake`, `request`,
//! `reply`) is sans-IO: bytes in, bytes and decisions out, no clock, socket, task or lock. The other modules are the
//! thin shell of sockets and tasks around it.

pub mod access;
mod address;
mod admission;
mod backend;
mod budget;
pub mod constants;
mod counters;
mod encrypted;
pub mod handshake;
mod intake;
mod limits;
mod listen;
mod log_gate;
mod outbox;
mod patience;
mod pulse;
mod refusals;
pub mod reply;
pub mod request;
mod server;
mod session;
mod stream;
mod tls;
mod transmission;

pub use address::{AddressError, ListenAddress};
pub use backend::{Allocation, Answer, Backend, Completion, ExportInfo, Extent, IoError, Request, Stale};
pub use counters::CountersSnapshot;
pub use limits::Limits;
pub use listen::{BindError, ListeningSocket, SocketFile};
pub use server::{Manners, NbdServer, PublishError};
pub use tls::Tls;
