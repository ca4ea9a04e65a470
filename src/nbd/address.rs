//! Where a server listens: reading it from text, showing it, and the NBD URIs made from it. Opens nothing.

use std::fmt;
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;

/// A place to listen. As text: `127.0.0.1:10809`, `[::1]:10809` or `unix:/run/nbdcast/nbd.sock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// IP address and port; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// Path of a Unix socket.
    Unix(PathBuf),
}

/// The text is no listen address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no listen address: use IP:PORT (such as 127.0.0.1:10809) or unix:/PATH")]
pub struct AddressError {
    /// What was given.
    pub text: String,
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let parsed = match text.strip_prefix("unix:") {
            Some("") => None,
            Some(path) => Some(Self::Unix(path.into())),
            None => text.parse().ok().map(Self::Tcp),
        };
        parsed.ok_or_else(|| AddressError { text: text.into() })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl ListenAddress {
    /// The NBD URI of an export served here, such as `nbd://127.0.0.1:10809/demo` or
    /// `nbd+unix:///demo?socket=/run/nbdcast/nbd.sock`.
    pub fn uri(&self, export: &str) -> String {
        let export = percent_encode(export.as_bytes());
        match self {
            Self::Tcp(address) => format!("nbd://{address}/{export}"),
            Self::Unix(path) => {
                let socket = percent_encode(path.as_os_str().as_bytes());
                format!("nbd+unix:///{export}?socket={socket}")
            }
        }
    }
}

/// Leaves what RFC 3986 allows unescaped in both a path and a query value, except `&`, `+` and `=`.
fn percent_encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/:@,".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_shown() {
        for text in ["127.0.0.1:10809", "[::1]:0", "unix:/run/nbd.sock"] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_text_is_refused_by_name() {
        for text in ["", "unix:", "localhost", "10809", "/run/nbd.sock"] {
            let error = text.parse::<ListenAddress>().unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")));
        }
    }

    #[test]
    fn uris_are_what_clients_expect() {
        let uri = |text: &str, export| text.parse::<ListenAddress>().unwrap().uri(export);
        assert_eq!(uri("127.0.0.1:10809", "demo"), "nbd://127.0.0.1:10809/demo");
        assert_eq!(uri("[::1]:1", "a b"), "nbd://[::1]:1/a%20b");
        assert_eq!(uri("unix:/run/a&b.sock", "demo"), "nbd+unix:///demo?socket=/run/a%26b.sock");
    }
}
