//! The bounds of the server. Owns their defaults and the floor below which the server could not work.

use std::time::Duration;

use super::budget::charge_bytes_max;

/// What the server spends on its clients at most.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Clients that use an export at a time; further ones are closed at once.
    pub connections_max: usize,
    /// Connections in the handshake at a time; when reached, a new one takes the place of the oldest of the
    /// address that has most; Unix sockets count as one address, an IPv6 network of 64 bits as another.
    pub handshakes_max: usize,
    /// From accepting a connection to the choice of an export.
    pub handshake_timeout: Duration,
    /// Payload and reply bytes in memory over all connections; when reached, requests wait. Up to a quarter of it is
    /// shared out evenly among `connections_max` clients, so that none is without room for small requests. Raised to
    /// the longest single request if set lower.
    pub inflight_bytes_max: usize,
    /// The same of one connection; when reached, its next request waits. Raised likewise.
    pub connection_bytes_max: usize,
    /// Requests of one connection not yet answered; when reached, the next one waits. At least 1.
    pub requests_per_connection_max: usize,
    /// How long a client may stop in the middle of a payload, or take nothing of its replies, before it is cut off:
    /// it holds memory that others wait for. A client that does either, but at less than 256 KiB/s, is given this much
    /// more than that rate would take.
    pub stall_timeout: Duration,
    /// How long outstanding requests may take after shutdown begins.
    pub shutdown_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections_max: 256,
            handshakes_max: 128,
            handshake_timeout: Duration::from_secs(10),
            inflight_bytes_max: 256 << 20,
            connection_bytes_max: 64 << 20,
            requests_per_connection_max: 512,
            stall_timeout: Duration::from_secs(30),
            shutdown_timeout: Duration::from_secs(4),
        }
    }
}

impl Limits {
    /// The same, raised where a lower value could never serve the longest legal request.
    pub(super) fn raised_to_minimum(mut self) -> Self {
        self.connections_max = self.connections_max.max(1);
        self.handshakes_max = self.handshakes_max.max(1);
        self.requests_per_connection_max = self.requests_per_connection_max.max(1);
        self.inflight_bytes_max = self.inflight_bytes_max.max(charge_bytes_max());
        self.connection_bytes_max = self.connection_bytes_max.max(charge_bytes_max());
        self
    }
}
