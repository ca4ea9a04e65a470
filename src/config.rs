//! The engine's configuration: what is in `engine.toml`, its defaults, and reading it.
//!
//! Owns the shape and the defaults; ranges and contradictions are checked in `validate`. Opens no socket and touches no
//! replica: a config that loads is well-formed, not necessarily reachable.

mod agents;
mod invalid;
mod nbd;
mod state;
mod validate;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use listener_agent::config::{self as file, ByteSize, ConfigError, Endpoint};

use crate::nbd::access::Network;
pub use agents::AgentsConfig;
pub use invalid::{InvalidConfig, InvalidValue};
pub use nbd::{NbdConfig, NbdTls, SocketMode, SocketOwner, TlsMode};
pub use protocol::AckPolicy;
pub use state::{ScrubInterval, ScrubIntervalError, StateConfig};
pub use validate::check_name;

/// Name of the sample file that error remedies point to.
pub const ENGINE_SAMPLE: &str = "config/engine.toml";

/// Sizes of volumes and journals are multiples of this: one checksummed block.
const BLOCK: ByteSize = ByteSize::kib(4);

/// Journal space beyond twice `lag_bytes_max`, so that a replica at its lag limit still has room to checkpoint.
const JOURNAL_MARGIN: ByteSize = ByteSize::mib(64);

/// Everything an engine needs to know.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct EngineConfig {
    /// The NBD server.
    #[serde(default)]
    pub nbd: NbdConfig,
    /// The admin HTTP server.
    #[serde(default)]
    pub admin: AdminConfig,
    /// How agents are reached.
    #[serde(default)]
    pub agents: AgentsConfig,
    /// What the engine keeps for itself.
    #[serde(default)]
    pub state: StateConfig,
    /// One or more volumes, each one export; `[[volume]]` in the file.
    #[serde(default, rename = "volume")]
    pub volumes: Vec<VolumeConfig>,
}

/// `[admin]`: the HTTP server for status and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AdminConfig {
    /// TCP only. Default 127.0.0.1:10808.
    pub listen: Endpoint,
    /// Listens where other machines can connect too. Default false.
    pub insecure: bool,
}

/// `[[volume]]`: one replicated disk.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VolumeConfig {
    /// Name of the volume and of its NBD export.
    pub name: String,
    /// Size of the disk.
    pub size: ByteSize,
    /// Text that NBD clients may show. Default empty.
    #[serde(default)]
    pub description: String,
    /// Clients cannot change it. Default false.
    #[serde(default)]
    pub read_only: bool,
    /// Clients are told to treat it as a rotating disk. Default false.
    #[serde(default)]
    pub rotational: bool,
    /// Where clients over TCP may come from; empty for anywhere. Default empty.
    #[serde(default, deserialize_with = "nbd::texts")]
    pub allow_addresses: Vec<Network>,
    /// Names of which a client's certificate must bear one; empty for any client. Default empty.
    #[serde(default)]
    pub allow_names: Vec<String>,
    /// When clients get their answers.
    #[serde(default)]
    pub ack: AckConfig,
    /// Which members a read is sent to. Default adaptive.
    #[serde(default)]
    pub read: ReadPolicy,
    /// Journal bytes that a replica may be behind. Default 256 MiB.
    #[serde(default = "VolumeConfig::default_lag_bytes_max")]
    pub lag_bytes_max: ByteSize,
    /// Time that a replica may be behind. Default 30 s.
    #[serde(default = "VolumeConfig::default_lag_ms_max")]
    lag_ms_max: u64,
    /// What happens at either limit. Default drop.
    #[serde(default)]
    pub on_lag: OnLag,
    /// With fewer members the volume freezes I/O instead of acknowledging it. Default 1.
    #[serde(default = "VolumeConfig::default_min_replicas")]
    pub min_replicas: u32,
    /// How long I/O is frozen before it fails with EIO. Default 60 s.
    #[serde(default = "VolumeConfig::default_freeze_ms")]
    freeze_ms: u64,
    /// How long an engine may answer reads after its members last confirmed its epoch. Default 3 s.
    #[serde(default = "VolumeConfig::default_lease_ms")]
    lease_ms: u64,
    /// A resync copies at least so much per second, however busy clients are. Default 8 MiB.
    #[serde(default = "VolumeConfig::default_resync_rate_min")]
    pub resync_rate_min: ByteSize,
    /// A replica where more blocks are found bad leaves the view. Default 1024.
    #[serde(default = "VolumeConfig::default_checksum_errors_max")]
    pub checksum_errors_max: u64,
    /// How often all members are looked at and compared. Default 30 d.
    #[serde(default)]
    pub scrub_interval: ScrubInterval,
    /// A scrub looks at so much per second at least, however busy clients are. Default 4 MiB.
    #[serde(default = "VolumeConfig::default_scrub_rate_min")]
    pub scrub_rate_min: ByteSize,
    /// As written in the file; `VolumeConfig::journal_size` gives the default too.
    #[serde(default)]
    journal_size: Option<ByteSize>,
    /// The copies; `[[volume.replica]]` in the file.
    #[serde(default, rename = "replica")]
    pub replicas: Vec<ReplicaConfig>,
}

/// `ack = { write = ..., flush = ... }`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(default)]
pub struct AckConfig {
    /// For writes, TRIM and WRITE_ZEROES. Default first.
    pub write: AckPolicy,
    /// For FLUSH and FUA. Default first.
    pub flush: AckPolicy,
}
/// Which members a read is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ReadPolicy {
    /// The one likely to be fastest; another if its answer takes unusually long.
    #[default]
    Adaptive,
    /// All; the first valid answer wins.
    Multicast,
    /// The one likely to be fastest; another if its answer takes longer than most do.
    Hedged,
    /// All; their answers are compared, and what differs is repaired.
    Verify,
}

/// What happens to a replica that reaches a lag limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnLag {
    /// It leaves the view.
    #[default]
    Drop,
    /// Clients are slowed down to its pace; it leaves only at the limit of time.
    Throttle,
}

/// `[[volume.replica]]`: one copy and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "ReplicaKeys")]
pub struct ReplicaConfig {
    /// Name of the replica, unique in its volume.
    pub name: String,
    /// Where the copy is kept.
    pub place: ReplicaPlace,
}

/// Where a replica is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReplicaPlace {
    /// At a listener agent with this address.
    Agent {
        /// The address.
        address: Endpoint,
        /// The DNS name that the agent's certificate must bear, if not the replica's.
        certificate: Option<String>,
    },
    /// In the engine's own process.
    Embedded {
        /// Data directory; the replica is in PATH/VOLUME/.
        path: PathBuf,
        /// Block device that holds the image instead of the file PATH/VOLUME/image.raw.
        image: Option<PathBuf>,
    },
}

/// The keys of `[[volume.replica]]` as they are in the file.
#[derive(Debug, Deserialize)]
struct ReplicaKeys {
    name: String,
    address: Option<Endpoint>,
    certificate: Option<String>,
    path: Option<PathBuf>,
    image: Option<PathBuf>,
}

impl TryFrom<ReplicaKeys> for ReplicaConfig {
    type Error = &'static str;

    fn try_from(keys: ReplicaKeys) -> Result<ReplicaConfig, &'static str> {
        if let (None, Some(_)) = (&keys.address, &keys.certificate) {
            return Err("`certificate` is possible only beside `address`: it is the name of a listener agent");
        }
        let place = match (keys.address, keys.path, keys.image) {
            (Some(address), None, None) => ReplicaPlace::Agent { address, certificate: keys.certificate },
            (None, Some(path), image) => ReplicaPlace::Embedded { path, image },
            (Some(_), Some(_), _) => {
                return Err(
                    "both `address` and `path` are set; keep `address` for a listener agent, or `path` for a replica inside the engine",
                );
            }
            (None, None, _) => {
                return Err(
                    "neither `address` nor `path` is set; add `address` for a listener agent, or `path` for a replica inside the engine",
                );
            }
            (Some(_), None, Some(_)) => {
                return Err(
                    "`image` is possible only beside `path`; the image of an agent's replica is that agent's own matter",
                );
            }
        };
        Ok(ReplicaConfig { name: keys.name, place })
    }
}

impl Default for AdminConfig {
    fn default() -> Self {
        AdminConfig { listen: loopback(10808), insecure: false }
    }
}

fn loopback(port: u16) -> Endpoint {
    Endpoint::Tcp { host: "127.0.0.1".to_owned(), port }
}

impl VolumeConfig {
    fn default_lag_bytes_max() -> ByteSize {
        ByteSize::mib(256)
    }

    fn default_lag_ms_max() -> u64 {
        30_000
    }

    fn default_min_replicas() -> u32 {
        1
    }

    fn default_freeze_ms() -> u64 {
        60_000
    }

    fn default_resync_rate_min() -> ByteSize {
        ByteSize::mib(8)
    }

    fn default_checksum_errors_max() -> u64 {
        1024
    }

    fn default_scrub_rate_min() -> ByteSize {
        ByteSize::mib(4)
    }

    fn default_lease_ms() -> u64 {
        3_000
    }

    /// Time that a replica may be behind.
    pub fn lag_max(&self) -> Duration {
        Duration::from_millis(self.lag_ms_max)
    }

    /// How long I/O is frozen, when too few members are left, before it fails.
    pub fn freeze(&self) -> Duration {
        Duration::from_millis(self.freeze_ms)
    }

    /// How long an engine may answer reads after its members last confirmed its epoch.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.lease_ms)
    }

    /// Size of each replica's journal, fixed when the volume is created: as configured, or
    /// 2 x `lag_bytes_max` + 64 MiB in whole blocks.
    pub fn journal_size(&self) -> ByteSize {
        self.journal_size.unwrap_or_else(|| {
            let bytes = self.lag_bytes_max.bytes().saturating_mul(2).saturating_add(JOURNAL_MARGIN.bytes());
            // Rounding down to whole blocks takes less than the margin.
            ByteSize::from_bytes(bytes / BLOCK.bytes() * BLOCK.bytes())
        })
    }
}

/// Why a config file cannot be used: unreadable or malformed, or well-formed and senseless.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file could not be turned into a config.
    #[error(transparent)]
    File(#[from] ConfigError),
    /// The config contradicts itself or a range.
    #[error("{file}: {problem}")]
    Invalid {
        /// File name as given.
        file: String,
        /// What is wrong in it.
        problem: Box<InvalidConfig>,
    },
}

impl LoadError {
    /// What the operator can do about it, as one line.
    pub fn remedy(&self) -> String {
        match self {
            LoadError::File(error) => error.remedy(ENGINE_SAMPLE),
            LoadError::Invalid { problem, .. } => problem.remedy(),
        }
    }
}

impl EngineConfig {
    /// Reads and checks a config file. Relative paths in it are taken relative to the file's directory.
    pub fn load(path: &Path) -> Result<EngineConfig, LoadError> {
        let config: EngineConfig = file::load_toml(path)?;
        config.finish(path)
    }

    /// As `load`, with the text at hand; `path` names the file in errors and is where relative paths start.
    pub fn parse(path: &Path, text: &str) -> Result<EngineConfig, LoadError> {
        let config: EngineConfig = file::parse_toml(&path.display().to_string(), text)?;
        config.finish(path)
    }

    fn finish(mut self, config_file: &Path) -> Result<EngineConfig, LoadError> {
        let certificates = &mut self.nbd.tls.certificates;
        *certificates = certificates.take().map(|dir| file::resolve_beside(config_file, &dir));
        let replicas = self.volumes.iter_mut().flat_map(|v| &mut v.replicas);
        for replica in replicas {
            if let ReplicaPlace::Embedded { path, image } = &mut replica.place {
                *path = file::resolve_beside(config_file, path);
                *image = image.take().map(|image| file::resolve_beside(config_file, &image));
            }
        }
        let directory = &mut self.state.directory;
        *directory = directory.take().map(|dir| file::resolve_beside(config_file, &dir));
        let certificates = &mut self.agents.certificates;
        *certificates = certificates.take().map(|dir| file::resolve_beside(config_file, &dir));
        self.check(config_file)?;
        Ok(self)
    }

    /// Checks it again, after something was set that the file does not say.
    pub fn check(&self, config_file: &Path) -> Result<(), LoadError> {
        let invalid =
            |problem| LoadError::Invalid { file: config_file.display().to_string(), problem: Box::new(problem) };
        validate::validate(self).map_err(invalid)
    }
}

#[cfg(test)]
mod sample_tests;
#[cfg(test)]
mod tests;
