//! `[nbd]`: where clients connect, over what, and what they may use.
//!
//! Owns the shape and the defaults; what must hold between keys is checked in `validate`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use listener_agent::config::{ByteSize, Endpoint};
use serde::de::{self, Deserializer, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// `[nbd]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NbdConfig {
    /// One address or more. Default 127.0.0.1:10809.
    #[serde(deserialize_with = "one_or_more")]
    pub listen: Vec<Endpoint>,
    /// Permissions of Unix sockets. Default: as the umask leaves them.
    pub socket_mode: Option<SocketMode>,
    /// Owner of Unix sockets. Default: who runs the engine.
    pub socket_owner: Option<SocketOwner>,
    /// The volume that clients get who ask for none by name. Default: the only one there is.
    pub default: Option<String>,
    /// Listens where other machines can connect without TLS too. Default false.
    pub insecure: bool,
    /// Clients at a time, over all exports. Default 256.
    pub connections_max: u32,
    /// Bytes of requests read from clients and not yet answered, over all connections; beyond it nothing is read from
    /// the sockets. Default 256 MiB.
    pub inflight_bytes_max: ByteSize,
    /// The same of one connection. Default 64 MiB.
    pub connection_bytes_max: ByteSize,
    /// Encryption.
    pub tls: NbdTls,
}

/// `[nbd.tls]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct NbdTls {
    /// Default off.
    pub mode: TlsMode,
    /// Directory with ca-cert.pem, server-cert.pem and server-key.pem. Default: none.
    pub certificates: Option<PathBuf>,
    /// Clients must show a certificate of the CA. Default true.
    pub verify_clients: bool,
}

/// Whether clients use TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum TlsMode {
    /// They cannot.
    #[default]
    Off,
    /// They may.
    On,
    /// They must.
    Require,
}

impl fmt::Display for TlsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::On => "on",
            Self::Require => "require",
        })
    }
}

/// Permission bits of a socket's file, as text in octal: `"0660"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct SocketMode(pub u32);

impl TryFrom<String> for SocketMode {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_octal = (3..=4).contains(&text.len()) && text.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
        let mode = u32::from_str_radix(&text, 8).ok().filter(|mode| is_octal && *mode <= 0o777);
        mode.map(Self).ok_or_else(|| format!("{text:?} is no mode; write permissions in octal, such as \"0660\""))
    }
}

/// Who owns a socket's file: `"USER:GROUP"`, `"USER"` or `":GROUP"`, by name or number.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct SocketOwner {
    /// Name or number.
    pub user: Option<String>,
    /// Name or number.
    pub group: Option<String>,
}

impl TryFrom<String> for SocketOwner {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let (user, group) = text.split_once(':').map_or((text.as_str(), None), |(user, group)| (user, Some(group)));
        let is_whole = !text.is_empty() && group != Some("") && !group.unwrap_or_default().contains(':');
        if !is_whole {
            return Err(format!("{text:?} is no owner; write \"USER:GROUP\", \"USER\" or \":GROUP\""));
        }
        let user = (!user.is_empty()).then(|| user.to_owned());
        Ok(Self { user, group: group.map(str::to_owned) })
    }
}

impl Default for NbdConfig {
    fn default() -> Self {
        NbdConfig {
            listen: vec![super::loopback(10809)],
            socket_mode: None,
            socket_owner: None,
            default: None,
            insecure: false,
            connections_max: 256,
            inflight_bytes_max: ByteSize::mib(256),
            connection_bytes_max: ByteSize::mib(64),
            tls: NbdTls::default(),
        }
    }
}

impl Default for NbdTls {
    fn default() -> Self {
        NbdTls { mode: TlsMode::Off, certificates: None, verify_clients: true }
    }
}

/// A value that is text in the file.
struct AsText<T>(T);

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for AsText<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map(Self).map_err(de::Error::custom)
    }
}

/// A list of values that are text in the file.
pub(super) fn texts<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: FromStr<Err: fmt::Display>,
    D: Deserializer<'de>,
{
    Ok(Vec::<AsText<T>>::deserialize(deserializer)?.into_iter().map(|text| text.0).collect())
}

fn one_or_more<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Endpoint>, D::Error> {
    struct OneOrMore;

    impl<'de> Visitor<'de> for OneOrMore {
        type Value = Vec<Endpoint>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an address, \"host:port\" or \"unix:/path\", or a list of them")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<Self::Value, E> {
            text.parse().map(|endpoint| vec![endpoint]).map_err(E::custom)
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
            let mut all = Vec::new();
            while let Some(endpoint) = elements.next_element()? {
                all.push(endpoint);
            }
            Ok(all)
        }
    }

    deserializer.deserialize_any(OneOrMore)
}
