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
    /// `nbd+unix:///demo?socket=/run/nbdcast/nbd.sock`, for clients on this machine; `nbds` if they must use TLS.
    pub fn uri(&self, export: &str, requires_tls: bool) -> String {
        let scheme = if requires_tls { "nbds" } else { "nbd" };
        let export = percent_encode(export.as_bytes());
        match self {
            Self::Tcp(address) if address.ip().is_unspecified() => {
                format!("{scheme}://localhost:{}/{export}", address.port())
            }
            Self::Tcp(address) => format!("{scheme}://{address}/{export}"),
            Self::Unix(path) => {
                let socket = percent_encode(path.as_os_str().as_bytes());
                format!("{scheme}+unix:///{export}?socket={socket}")
            }
        }
    }

    /// Whether only this machine can connect.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

/// Escapes what is neither unreserved in RFC 3986 nor `/`, as nbdkit does.
fn percent_encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
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
        let uri = |text: &str, export| text.parse::<ListenAddress>().unwrap().uri(export, false);
        assert_eq!(uri("127.0.0.1:10809", "demo"), "nbd://127.0.0.1:10809/demo");
        assert_eq!(uri("[::1]:1", "a b"), "nbd://[::1]:1/a%20b");
        assert_eq!(uri("0.0.0.0:10809", "demo"), "nbd://localhost:10809/demo");
        assert_eq!(uri("[::]:10809", "demo"), "nbd://localhost:10809/demo");
        // As printed by nbdkit 1.32 for the same socket and export.
        assert_eq!(
            uri("unix:/t/a b%é\"';?#[]!$()*<>\\^`{|}.sock", "a b/c?d#e&f"),
            "nbd+unix:///a%20b/c%3Fd%23e%26f?socket=/t/a%20b%25%C3%A9%22%27%3B%3F%23%5B%5D%21%24%28%29%2A%3C%3E%5C%5E%60%7B%7C%7D.sock"
        );
        assert_eq!(
            uri("unix:/t/a&b+c=d~e,f:g@h", "a.b_c-d"),
            "nbd+unix:///a.b_c-d?socket=/t/a%26b%2Bc%3Dd~e%2Cf%3Ag%40h"
        );
    }

    #[test]
    fn uris_say_that_tls_is_required() {
        let uri = |text: &str| text.parse::<ListenAddress>().unwrap().uri("demo", true);
        assert_eq!(uri("192.0.2.1:10809"), "nbds://192.0.2.1:10809/demo");
        assert_eq!(uri("unix:/run/a.sock"), "nbds+unix:///demo?socket=/run/a.sock");
    }

    #[test]
    fn what_other_machines_can_reach_is_not_local() {
        let is_local = |text: &str| text.parse::<ListenAddress>().unwrap().is_local();
        assert!(
            is_local("127.0.0.2:1") && is_local("[::1]:1") && is_local("[::ffff:127.0.0.1]:1") && is_local("unix:/a")
        );
        assert!(!is_local("0.0.0.0:1") && !is_local("[::]:1") && !is_local("192.0.2.1:1"));
    }
}
