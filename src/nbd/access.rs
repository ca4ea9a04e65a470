//! Who may use an export: by address, and by the name in the client's certificate.
//!
//! Sans-IO. Owns the rules only; `session` finds out who the client is.

#![deny(clippy::disallowed_methods, clippy::disallowed_types)]

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

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

/// Where it connects from.
impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => address.to_canonical().fmt(f),
            None => f.write_str("unix"),
        }
    }
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

/// The text is no range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NetworkError {
    /// Not of the form at all.
    #[error("{text:?} is no network: write an IP address, or one with the bits that count, such as 192.0.2.0/24")]
    Form {
        /// What was given.
        text: String,
    },
    /// More bits than an address has.
    #[error("{text:?} is no network: an address of this kind has {bits_max} bits")]
    Bits {
        /// What was given.
        text: String,
        /// Bits of an address of its kind.
        bits_max: u8,
    },
    /// Bits are set that do not count: a slip of the pen, in one place or the other.
    #[error("{text:?} is no network: bits beyond the first {} are set; did you mean {meant}?", meant.prefix_bits)]
    Host {
        /// What was given.
        text: String,
        /// The network that holds it.
        meant: Network,
    },
}

impl FromStr for Network {
    type Err = NetworkError;

    fn from_str(text: &str) -> Result<Self, NetworkError> {
        let form = || NetworkError::Form { text: text.into() };
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| form())?;
        let bits_max = if address.is_ipv4() { 32 } else { 128 };
        let prefix_bits = match bits {
            Some(bits) if bits.is_empty() || !bits.bytes().all(|byte| byte.is_ascii_digit()) => return Err(form()),
            Some(bits) => {
                let bits = bits.parse().ok().filter(|bits| *bits <= bits_max);
                bits.ok_or_else(|| NetworkError::Bits { text: text.into(), bits_max })?
            }
            None => bits_max,
        };
        let meant = Self { address: first_of(address, prefix_bits), prefix_bits };
        if meant.address != address {
            return Err(NetworkError::Host { text: text.into(), meant });
        }
        Ok(meant)
    }
}

/// The address with all but its first bits set to zero.
fn first_of(address: IpAddr, prefix_bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix_bits)).unwrap_or(0);
            IpAddr::V4((address.to_bits() & mask).into())
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix_bits)).unwrap_or(0);
            IpAddr::V6((address.to_bits() & mask).into())
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_bits)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(network: &str, address: &str) -> bool {
        network.parse::<Network>().unwrap().contains(address.parse().unwrap())
    }

    #[test]
    fn networks_hold_what_their_bits_say() {
        assert!(holds("192.0.2.0/24", "192.0.2.255") && !holds("192.0.2.0/24", "192.0.3.0"));
        assert!(holds("192.0.2.7", "192.0.2.7") && !holds("192.0.2.7", "192.0.2.6"));
        assert!(holds("0.0.0.0/0", "203.0.113.1") && !holds("0.0.0.0/0", "2001:db8::1"));
        assert!(holds("2001:db8::/33", "2001:db8:7fff::1") && !holds("2001:db8::/33", "2001:db8:8000::1"));
        assert!(holds("::/0", "2001:db8::1") && holds("::1", "::1") && !holds("::1", "::2"));
        assert!(holds("192.0.2.0/24", "::ffff:192.0.2.1"), "as a socket for both kinds shows it");
    }

    #[test]
    fn what_is_no_network_is_refused_with_what_was_meant() {
        let refusal = |text: &str| text.parse::<Network>().unwrap_err().to_string();
        for text in ["", "vm-host-1", "192.0.2.0/", "192.0.2.0/+4", "192.0.2/24", "[::1]", "192.0.2.0/24/1", " ::1"] {
            assert!(refusal(text).contains(&format!("{text:?} is no network: write")), "{text}");
        }
        assert!(refusal("192.0.2.0/33").ends_with("has 32 bits"));
        assert!(refusal("::/300").ends_with("has 128 bits"));
        assert!(refusal("192.0.2.1/24").ends_with("did you mean 192.0.2.0/24?"));
        assert!(refusal("2001:db8::1/32").ends_with("did you mean 2001:db8::/32?"));
    }

    #[test]
    fn who_may_depends_on_address_and_name() {
        let rules =
            AccessRules { addresses: vec!["192.0.2.0/24".parse().unwrap()], names: vec!["vm-host-1".to_owned()] };
        let client = |address: Option<&str>, is_tls, names: &[&str]| Client {
            address: address.map(|address| address.parse().unwrap()),
            is_tls,
            names: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        let near = Some("192.0.2.1");
        assert_eq!(rules.judge(&client(near, true, &["other", "VM-host-1"])), Permit::Granted);
        assert_eq!(rules.judge(&client(near, true, &["other"])), Permit::Denied);
        assert_eq!(rules.judge(&client(near, false, &[])), Permit::NeedsTls);
        assert_eq!(rules.judge(&client(Some("198.51.100.1"), true, &["vm-host-1"])), Permit::Denied);
        assert_eq!(rules.judge(&client(None, true, &["vm-host-1"])), Permit::Granted);
        assert_eq!(AccessRules::default().judge(&client(near, false, &[])), Permit::Granted);
    }
}
