//! Who may use an export: by address, and by the name in the client's certificate.
//!
//! Sans-IO. Owns the rules only; `session` finds out who the client is.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::net::IpAddr;

/// A range of IP addresses, such as `192.0.2.0/24`; one address is a range of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    /// Its first address.
    pub address: IpAddr,
    /// Leading bits that count.
    pub prefix_bits: u8,
}

/// Who may use an export. Empty lists allow everybody.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AccessRules {
    /// Clients over TCP must come from one of these. Clients of a Unix socket are let in by the socket's mode.
    pub addresses: Vec<Network>,
    /// Clients must prove one of these names by a certificate.
    pub names: Vec<String>,
}

/// A client, as far as its connection tells who it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Client {
    /// `None` for a Unix socket.
    pub address: Option<IpAddr>,
    /// Whether the connection is encrypted.
    pub is_tls: bool,
    /// DNS names of its certificate, which was verified; empty without one.
    pub names: Vec<String>,
}

/// What the rules say of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Permit {
    /// It may.
    Granted,
    /// It may not, but might once it has shown a certificate.
    NeedsTls,
    /// It may not.
    Denied,
}

impl Network {
    fn contains(&self, address: IpAddr) -> bool {
        // An IPv4 client of a socket that listens for both kinds.
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let shift = 32 - u32::from(self.prefix_bits.min(32));
                u64::from(network.to_bits()) >> shift == u64::from(address.to_bits()) >> shift
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let shift = 128 - u32::from(self.prefix_bits.min(128));
                let significant = |address: u128| address.checked_shr(shift).unwrap_or(0);
                significant(network.to_bits()) == significant(address.to_bits())
            }
            (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
        }
    }
}

impl AccessRules {
    /// Whether this client may use the export.
    #[must_use]
    pub fn judge(&self, client: &Client) -> Permit {
        let from_there = |address: IpAddr| self.addresses.iter().any(|network| network.contains(address));
        if !self.addresses.is_empty() && client.address.is_some_and(|address| !from_there(address)) {
            return Permit::Denied;
        }
        let is_allowed = |name: &String| self.names.iter().any(|allowed| allowed.eq_ignore_ascii_case(name));
        if self.names.is_empty() || client.names.iter().any(is_allowed) {
            Permit::Granted
        } else if client.is_tls {
            Permit::Denied
        } else {
            Permit::NeedsTls
        }
    }
}
