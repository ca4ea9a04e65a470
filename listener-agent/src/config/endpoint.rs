//! A place to listen at or to connect to: `host:port`, or `unix:/path` for a Unix socket.
//!
//! Owns the text form only; it resolves no name and opens no socket.

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// Bytes that fit into `sockaddr_un.sun_path` on Linux beside the closing zero.
const UNIX_PATH_BYTES_MAX: usize = 107;

/// A TCP or Unix socket address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// TCP. Port 0 means "any free port" and makes sense for listening only.
    Tcp {
        /// Host name or IP address, IPv6 without its brackets.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// Unix stream socket at this absolute path.
    Unix(PathBuf),
}

/// Why a text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// Not of the form host:port.
    #[error("`{text}` is not an address; write \"host:port\" or \"unix:/path/to/socket\"")]
    Form {
        /// The text as given.
        text: String,
    },
    /// The part after the last colon is no port number.
    #[error("`{text}`: `{port}` is not a port; write a number from 0 to 65535")]
    Port {
        /// The text as given.
        text: String,
        /// The part that should be a port.
        port: String,
    },
    /// `unix:` with a relative path, which would depend on where the program was started.
    #[error("`{text}`: the path of a Unix socket must be absolute: \"unix:/path/to/socket\"")]
    UnixPathRelative {
        /// The text as given.
        text: String,
    },
    /// `unix:` with a path that the kernel cannot take.
    #[error("`{text}`: the path of a Unix socket has {bytes} bytes; at most {UNIX_PATH_BYTES_MAX} are possible")]
    UnixPathTooLong {
        /// The text as given.
        text: String,
        /// Its length.
        bytes: usize,
    },
}

impl Endpoint {
    /// True if only this machine can reach it, as far as the text tells: a Unix socket, `localhost` or a loopback IP.
    pub fn is_local(&self) -> bool {
        match self {
            Endpoint::Tcp { host, .. } => {
                host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
            Endpoint::Unix(_) => true,
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Endpoint::Tcp { host, port } => write!(f, "{host}:{port}"),
            Endpoint::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Endpoint, EndpointError> {
        if let Some(path) = text.strip_prefix("unix:") {
            return unix(text, path);
        }
        let form = || EndpointError::Form { text: text.to_owned() };
        let (host, port) = text.rsplit_once(':').ok_or_else(form)?;
        let host = match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            Some(ipv6) if ipv6.parse::<std::net::Ipv6Addr>().is_ok() => ipv6,
            // A bare IPv6 address would make its last group look like a port.
            None if !host.contains(':') => host,
            Some(_) | None => return Err(form()),
        };
        let is_host_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if host.is_empty() || !host.chars().all(is_host_char) {
            return Err(form());
        }
        let port = port.parse().map_err(|_| EndpointError::Port { text: text.to_owned(), port: port.to_owned() })?;
        Ok(Endpoint::Tcp { host: host.to_owned(), port })
    }
}

fn unix(text: &str, path: &str) -> Result<Endpoint, EndpointError> {
    if !path.starts_with('/') || path.contains('\0') {
        return Err(EndpointError::UnixPathRelative { text: text.to_owned() });
    }
    if path.len() > UNIX_PATH_BYTES_MAX {
        return Err(EndpointError::UnixPathTooLong { text: text.to_owned(), bytes: path.len() });
    }
    Ok(Endpoint::Unix(PathBuf::from(path)))
}

impl<'de> Deserialize<'de> for Endpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Endpoint, D::Error> {
        deserializer.deserialize_str(EndpointVisitor)
    }
}

struct EndpointVisitor;

impl Visitor<'_> for EndpointVisitor {
    type Value = Endpoint;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address: \"host:port\" or \"unix:/path/to/socket\"")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Endpoint, E> {
        text.parse().map_err(E::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read_and_printed_back() {
        for text in
            ["127.0.0.1:10809", "localhost:0", "node-1.example:65535", "[::1]:10809", "unix:/run/nbdcast/nbd.sock"]
        {
            let endpoint: Endpoint = text.parse().expect(text);
            assert_eq!(endpoint.to_string(), text);
        }
    }

    #[test]
    fn a_bad_address_is_refused_and_told_the_form() {
        let long = format!("unix:/{}", "x".repeat(107));
        for (text, part) in [
            ("", "host:port"),
            ("10809", "host:port"),
            (":10809", "host:port"),
            ("::1:10809", "host:port"),
            ("[::1:10809", "host:port"),
            ("http://127.0.0.1:1", "host:port"),
            ("127.0.0.1:65536", "`65536` is not a port"),
            ("127.0.0.1:", "`` is not a port"),
            ("unix:run/x.sock", "must be absolute"),
            (long.as_str(), "108 bytes"),
        ] {
            let message = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(message.contains(part), "{text}: {message}");
        }
    }

    #[test]
    fn only_loopback_and_unix_sockets_are_local() {
        let local = |text: &str| text.parse::<Endpoint>().expect(text).is_local();
        assert!(local("127.0.0.1:1") && local("[::1]:1") && local("unix:/a") && local("localhost:1"));
        assert!(!local("0.0.0.0:1") && !local("192.0.2.1:1") && !local("example.org:1"));
    }
}
