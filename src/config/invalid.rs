//! What can be wrong in a well-formed engine config, and the words for it.
//!
//! Owns the error type, its messages and remedies; the rules themselves are in `validate`.

use std::fmt::{self, Display};

use listener_agent::config::{ByteSize, Endpoint};

use super::{BLOCK, ENGINE_SAMPLE, TlsMode};

/// Longest name of a volume or replica, in bytes.
pub(super) const NAME_BYTES_MAX: usize = 64;
/// Longest description, in bytes: NBD's limit for a string.
pub(super) const DESCRIPTION_BYTES_MAX: usize = 4096;
/// Most replicas of one volume.
pub(super) const REPLICAS_MAX: usize = 16;

/// One thing that is wrong in a config: where, what, and what is allowed. Prints as one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{value}", PlaceOf(self))]
pub struct InvalidConfig {
    /// Name of the volume, or its number if the name itself is the trouble; none for `[nbd]` and `[admin]`.
    pub volume: Option<String>,
    /// Name of the replica, or its number if the name itself is the trouble.
    pub replica: Option<String>,
    /// What is wrong there.
    pub value: InvalidValue,
}

/// The kinds of wrong values.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidValue {
    /// A number out of its range.
    #[error("{key} = {value} is out of range; allowed: {min} to {max}")]
    Number {
        /// Full key.
        key: &'static str,
        /// The value found.
        value: u64,
        /// Least allowed value.
        min: u64,
        /// Greatest allowed value.
        max: u64,
    },
    /// A size out of its range.
    #[error("{key} = {value} is out of range; allowed: {min} to {max}")]
    Size {
        /// Full key.
        key: &'static str,
        /// The value found.
        value: ByteSize,
        /// Least allowed value.
        min: ByteSize,
        /// Greatest allowed value.
        max: ByteSize,
    },
    /// A size that is no whole number of blocks.
    #[error("{key} = {value} is not a multiple of {BLOCK}")]
    Unaligned {
        /// Full key.
        key: &'static str,
        /// The value found.
        value: ByteSize,
    },
    /// A name that cannot be a directory's and an export's name alike.
    #[error(
        "name = {name:?} is not allowed; use 1 to {NAME_BYTES_MAX} letters, digits, `.`, `_` and `-`, not starting with `.`"
    )]
    Name {
        /// The name found.
        name: String,
    },
    /// Two things with one name, address, path or device.
    #[error("{key} = {value:?} is used twice, by {other}")]
    Duplicate {
        /// Full key.
        key: &'static str,
        /// The value that occurs twice.
        value: String,
        /// Who uses it besides, in words.
        other: String,
    },
    /// No address to listen at.
    #[error("nbd.listen is empty, so that no client could connect")]
    NoListen,
    /// TLS without a certificate to show.
    #[error("nbd.tls.mode = \"{mode}\", but nbd.tls.certificates is not set")]
    TlsWithoutCertificates {
        /// The mode.
        mode: TlsMode,
    },
    /// A default export that is none of the volumes.
    #[error("nbd.default = {name:?} is not the name of a volume")]
    UnknownDefault {
        /// The name.
        name: String,
    },
    /// Names of clients are asked for that no client could prove.
    #[error("allow_names is set, but clients show no certificates: nobody could use the volume")]
    NamesWithoutCertificates,
    /// No `[[volume]]`.
    #[error("there is no [[volume]]")]
    NoVolumes,
    /// No replica, or too many.
    #[error("it has {count} replicas; allowed: 1 to {REPLICAS_MAX}")]
    ReplicaCount {
        /// How many there are.
        count: usize,
    },
    /// More replicas demanded than there are.
    #[error("min_replicas = {value} is out of range; allowed: 1 to {replicas}, the number of replicas")]
    MinReplicas {
        /// The value found.
        value: u32,
        /// How many replicas there are.
        replicas: usize,
    },
    /// A journal that cannot hold what a replica may be behind.
    #[error("journal_size = {value} is too small; allowed: at least {min}, twice lag_bytes_max")]
    JournalSize {
        /// The value found.
        value: ByteSize,
        /// Least allowed value.
        min: ByteSize,
    },
    /// A description too long for NBD.
    #[error("description has {bytes} bytes; allowed: at most {DESCRIPTION_BYTES_MAX}, without zero bytes")]
    Description {
        /// Its length.
        bytes: usize,
    },
    /// An admin address that is no TCP address.
    #[error("admin.listen = \"{value}\" is not possible; allowed: a TCP address, host:port")]
    AdminNotTcp {
        /// The value found.
        value: Endpoint,
    },
    /// The admin server where other machines can connect.
    #[error("admin.listen = \"{value}\": whoever connects there can destroy volumes, and HTTP has no encryption here")]
    OpenAdmin {
        /// The value found.
        value: Endpoint,
    },
    /// An agent on another machine without TLS.
    #[error("address = \"{value}\": data would go to another machine without encryption and without authentication")]
    OpenAgent {
        /// The value found.
        value: Endpoint,
    },
    /// A certificate's name where no certificates are used.
    #[error("certificate = {name:?}, but agents are reached without TLS")]
    CertificateWithoutTls {
        /// The name found.
        name: String,
    },
    /// A name that no certificate can bear.
    #[error("{name:?} cannot be the name in a certificate: it is no DNS name")]
    CertificateName {
        /// The name found.
        name: String,
    },
    /// A replica's address with port 0, to which nothing can connect.
    #[error("address = \"{value}\" has port 0; allowed: 1 to 65535")]
    AddressWithoutPort {
        /// The value found.
        value: Endpoint,
    },
}

impl InvalidConfig {
    /// What the operator can do about it, as one line.
    pub fn remedy(&self) -> String {
        match &self.value {
            InvalidValue::Number { key, min, max, .. } => {
                format!("set {key} to a value from {min} to {max}")
            }
            InvalidValue::Size { key, min, max, .. } => {
                format!("set {key} to a size from {min} to {max}")
            }
            InvalidValue::Unaligned { key, value } => {
                let below = value.bytes() / BLOCK.bytes() * BLOCK.bytes();
                let above = ByteSize::from_bytes(below.saturating_add(BLOCK.bytes()));
                format!("the next greater allowed value: {key} = \"{above}\"")
            }
            InvalidValue::Name { .. } => "choose a name such as \"vol0\" or \"node-a\"".to_owned(),
            InvalidValue::Duplicate { key, .. } => {
                format!("give each its own {key}")
            }
            InvalidValue::NoListen => {
                "leave nbd.listen out, or write an address such as \"127.0.0.1:10809\"".to_owned()
            }
            InvalidValue::TlsWithoutCertificates { .. } => {
                "set certificates in [nbd.tls] to a directory with ca-cert.pem, server-cert.pem and server-key.pem; \
                 `nbdcast certs` makes one"
                    .to_owned()
            }
            InvalidValue::UnknownDefault { .. } => "write the name of a [[volume]] of this file".to_owned(),
            InvalidValue::NamesWithoutCertificates => {
                "set mode = \"require\" in [nbd.tls], with verify_clients = true; or leave allow_names out".to_owned()
            }
            InvalidValue::NoVolumes => {
                format!("add a [[volume]] with name, size and replicas; {} is a complete sample", ENGINE_SAMPLE)
            }
            InvalidValue::ReplicaCount { count: 0 } => {
                "add a [[volume.replica]] with a name and an address or a path".to_owned()
            }
            InvalidValue::ReplicaCount { .. } => {
                format!("keep at most {REPLICAS_MAX} [[volume.replica]]")
            }
            InvalidValue::MinReplicas { replicas, .. } => {
                format!("set min_replicas to at most {replicas}, or add replicas")
            }
            InvalidValue::JournalSize { min, .. } => {
                format!("set journal_size to at least {min}, leave it out, or lower lag_bytes_max")
            }
            InvalidValue::Description { .. } => "shorten the description".to_owned(),
            InvalidValue::AdminNotTcp { .. } => "set admin.listen to host:port, such as 127.0.0.1:10808".to_owned(),
            InvalidValue::OpenAdmin { .. } => {
                "listen at 127.0.0.1 and use a tunnel (`ssh -L 10808:127.0.0.1:10808 HOST`), or allow it with \
                 `insecure = true` in [admin]"
                    .to_owned()
            }
            InvalidValue::OpenAgent { .. } => {
                "set `certificates` in [agents] (`nbdcast certs` makes them), or allow it with `insecure = true` there"
                    .to_owned()
            }
            InvalidValue::CertificateWithoutTls { .. } => {
                "set `certificates` in [agents], or leave `certificate` out".to_owned()
            }
            InvalidValue::CertificateName { .. } => {
                "set the replica's `certificate` to a name such as \"node-a\", and make the agent's certificate for it"
                    .to_owned()
            }
            InvalidValue::AddressWithoutPort { .. } => {
                "write the port that the listener agent prints when it is ready".to_owned()
            }
        }
    }
}

/// The head of the message: `volume "vol0", replica "a": `.
struct PlaceOf<'a>(&'a InvalidConfig);

impl Display for PlaceOf<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.0.volume, &self.0.replica) {
            (Some(volume), Some(replica)) => write!(f, "volume {volume}, replica {replica}: "),
            (Some(volume), None) => write!(f, "volume {volume}: "),
            (None, _) => Ok(()),
        }
    }
}

impl From<InvalidValue> for InvalidConfig {
    fn from(value: InvalidValue) -> InvalidConfig {
        InvalidConfig { volume: None, replica: None, value }
    }
}
