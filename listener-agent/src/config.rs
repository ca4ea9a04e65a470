//! Configuration that both binaries share, and the listener agent's own file.
//!
//! Owns the values that appear in config files (`ByteSize`, `Endpoint`), the reader that turns TOML text into a struct
//! (`load_toml`, `parse_toml`) and `AgentConfig`. Opens no socket and touches no data directory: it only reads the file.

mod byte_size;
mod endpoint;
mod tree;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use protocol::ReplicaName;
use serde::Deserialize;
use serde::de::DeserializeOwned;

pub use byte_size::{ByteSize, ByteSizeError};
pub use endpoint::{Endpoint, EndpointError};

/// Largest config file that is read, in bytes; anything longer is certainly not a config file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why a config file could not be used. Every message is one line and names the file and, where there is one, the line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read at all.
    #[error("cannot read the config file {}: {source}", path.display())]
    Read {
        /// The file asked for.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The text is not TOML.
    #[error("{file}:{line}: not valid TOML: {message}")]
    Syntax {
        /// File name as given.
        file: String,
        /// Line, from 1.
        line: usize,
        /// The parser's words.
        message: String,
    },
    /// A key that no version of this file has.
    #[error("{file}:{line}: unknown key `{key}` {table}{}", suggestion(nearest.as_deref(), valid))]
    UnknownKey {
        /// File name as given.
        file: String,
        /// Line, from 1.
        line: usize,
        /// The table that holds the key, in words: `in [nbd]`, `in volume "vol0"`.
        table: String,
        /// The key as written.
        key: String,
        /// The valid key nearest to it, if one is near enough to be meant.
        nearest: Option<String>,
        /// Every key that this table may hold.
        valid: &'static [&'static str],
    },
    /// A key that must be there is not.
    #[error("{file}:{line}: missing key `{key}` {table}")]
    MissingKey {
        /// File name as given.
        file: String,
        /// Line of the table's head, from 1.
        line: usize,
        /// The table that lacks the key, in words.
        table: String,
        /// The key to add.
        key: &'static str,
    },
    /// A value of the wrong type or form.
    #[error("{file}:{line}: {place}: {message}")]
    Value {
        /// File name as given.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Path to the value: `volume "vol0", lag_bytes_max`.
        place: String,
        /// What is wrong with it and what it may be.
        message: String,
    },
    /// A number outside its range.
    #[error("{file}: {key} = {value} is out of range; allowed: {min} to {max}")]
    OutOfRange {
        /// File name as given.
        file: String,
        /// Full key: `limits.connections_max`.
        key: &'static str,
        /// The value found.
        value: u64,
        /// Least allowed value.
        min: u64,
        /// Greatest allowed value.
        max: u64,
    },
    /// A listener that other machines can connect to without TLS.
    #[error("{file}: listen = \"{listen}\": {OPEN_WORDS}")]
    Open {
        /// File name as given.
        file: String,
        /// The address.
        listen: Endpoint,
    },
    /// An empty list of engines, so that none could ever connect.
    #[error("{file}: tls.engines is empty, so that no engine could connect")]
    NoEngines {
        /// File name as given.
        file: String,
    },
}

/// What is wrong with a listener that other machines can connect to without TLS.
pub const OPEN_WORDS: &str = "other machines could connect there, without encryption and without authentication";

impl ConfigError {
    /// What the operator can do about it, as one line; `sample` names the sample file of this program.
    pub fn remedy(&self, sample: &str) -> String {
        match self {
            ConfigError::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                format!("check the path; {sample} is a complete sample to start from")
            }
            ConfigError::Read { .. } => "make the path a readable text file of at most 1 MiB".to_owned(),
            ConfigError::UnknownKey { nearest: Some(nearest), .. } => format!("write `{nearest}`, or remove the line"),
            ConfigError::UnknownKey { .. } => {
                format!("remove the line; {sample} shows every key")
            }
            ConfigError::MissingKey { key, .. } => {
                format!("add `{key} = ...`; {sample} shows every key")
            }
            ConfigError::Open { .. } => "set `certificates` in [tls] (`nbdcast certs` makes them), listen at a loopback address or a Unix socket, or \
                 allow it with `insecure = true`"
                .to_owned(),
            ConfigError::NoEngines { .. } => "leave it out, or name engines as their certificates do".to_owned(),
            ConfigError::Syntax { .. } | ConfigError::Value { .. } | ConfigError::OutOfRange { .. } => {
                format!("correct the line; {sample} shows every key with its unit and range")
            }
        }
    }
}

/// Tail of the unknown-key message: the nearest key, or all of them when none is near.
fn suggestion(nearest: Option<&str>, valid: &[&str]) -> String {
    match nearest {
        Some(nearest) => format!("; did you mean `{nearest}`?"),
        None => format!("; valid keys: {}", valid.join(", ")),
    }
}

/// Reads `path` and parses it as `T`.
///
/// The set of valid keys is the set of fields of the structs inside `T`: an unknown key anywhere is an error.
pub fn load_toml<T: DeserializeOwned>(path: &Path) -> Result<T, ConfigError> {
    let text = read_text(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    parse_toml(&path.display().to_string(), &text)
}

/// Parses `text` as `T`; `file` is only the name that errors give.
pub fn parse_toml<T: DeserializeOwned>(file: &str, text: &str) -> Result<T, ConfigError> {
    tree::parse(file, text)
}

/// Resolves a path written in a config file: relative ones are relative to the directory of that file.
pub fn resolve_beside(config_file: &Path, path: &Path) -> PathBuf {
    match config_file.parent() {
        Some(directory) => directory.join(path),
        None => path.to_owned(),
    }
}

fn read_text(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if read as u64 > FILE_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB"));
    }
    Ok(text)
}

/// Name of the sample file that error remedies point to.
pub const AGENT_SAMPLE: &str = "config/listener-agent.toml";

/// The listener agent's whole configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct AgentConfig {
    /// Where engines connect. Default: 127.0.0.1:10811.
    #[serde(default = "AgentConfig::default_listen")]
    pub listen: Endpoint,
    /// Data directory; each volume has its replica in DATA/VOLUME/. Required.
    pub data: PathBuf,
    /// Block devices that hold the images of new replicas, by volume; one that is not named gets a file. Default: none.
    #[serde(default)]
    pub images: BTreeMap<ReplicaName, PathBuf>,
    /// Listens where other machines can connect without TLS too. Default false.
    #[serde(default)]
    pub insecure: bool,
    /// Encryption, and who may connect.
    #[serde(default)]
    pub tls: AgentTls,
    /// Upper bounds that protect the machine.
    #[serde(default)]
    pub limits: AgentLimits,
}

/// `[tls]`: how engines prove who they are, and the agent to them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AgentTls {
    /// Directory with ca-cert.pem, server-cert.pem and server-key.pem. With it all connections are TLS. Default: none.
    pub certificates: Option<PathBuf>,
    /// Names of which an engine's certificate must bear one. Default: engine.
    pub engines: Vec<String>,
}

impl Default for AgentTls {
    fn default() -> Self {
        AgentTls { certificates: None, engines: vec!["engine".to_owned()] }
    }
}

/// Upper bounds of one listener agent.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AgentLimits {
    /// Engine connections at a time, over all volumes; more are refused. 1 to 4096, default 64.
    pub connections_max: u32,
}

impl Default for AgentLimits {
    fn default() -> Self {
        AgentLimits { connections_max: 64 }
    }
}

impl AgentConfig {
    const CONNECTIONS: RangeInclusive<u32> = 1..=4096;

    /// The configuration that `--listen` and `--data` stand for; everything else at its default.
    pub fn new(listen: Endpoint, data: PathBuf) -> AgentConfig {
        AgentConfig {
            listen,
            data,
            images: BTreeMap::new(),
            insecure: false,
            tls: AgentTls::default(),
            limits: AgentLimits::default(),
        }
    }

    /// Where an agent listens when nothing is said.
    pub fn default_listen() -> Endpoint {
        Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 10811 }
    }

    /// Reads and checks a config file; a relative `data` is taken relative to the file's directory.
    pub fn load(path: &Path) -> Result<AgentConfig, ConfigError> {
        let mut config: AgentConfig = load_toml(path)?;
        config.data = resolve_beside(path, &config.data);
        config.tls.certificates = config.tls.certificates.map(|dir| resolve_beside(path, &dir));
        config.validate(&path.display().to_string())?;
        Ok(config)
    }

    /// Whether other machines can connect without TLS, and nobody said that they may.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.tls.certificates.is_none() && !self.insecure && !self.listen.is_local()
    }

    /// Checks what the types alone do not; `file` is only the name that errors give.
    fn validate(&self, file: &str) -> Result<(), ConfigError> {
        if self.is_open() {
            return Err(ConfigError::Open { file: file.to_owned(), listen: self.listen.clone() });
        }
        if self.tls.engines.is_empty() {
            return Err(ConfigError::NoEngines { file: file.to_owned() });
        }
        let (range, value) = (Self::CONNECTIONS, self.limits.connections_max);
        if range.contains(&value) {
            return Ok(());
        }
        Err(ConfigError::OutOfRange {
            file: file.to_owned(),
            key: "limits.connections_max",
            value: value.into(),
            min: (*range.start()).into(),
            max: (*range.end()).into(),
        })
    }
}

#[cfg(test)]
mod tests;
