//! What a well-formed engine config must also satisfy: ranges, names, and no two things in one place.
//!
//! Owns the rules; the words are in `invalid`. Looks at the config only, never at disks or the network.

use std::collections::HashSet;

use listener_agent::config::{ByteSize, Endpoint};
use protocol::VOLUME_BYTES_MAX;

use super::invalid::{DESCRIPTION_BYTES_MAX, InvalidConfig, InvalidValue, NAME_BYTES_MAX, REPLICAS_MAX};
use super::{AgentsConfig, BLOCK, EngineConfig, ReplicaConfig, ReplicaPlace, TlsMode, VolumeConfig};

/// Checks a name of a volume or replica: it becomes a directory, an export and a label.
pub fn check_name(name: &str) -> Result<(), InvalidValue> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let length_fits = (1..=NAME_BYTES_MAX).contains(&name.len());
    if length_fits && !name.starts_with('.') && name.chars().all(allowed) {
        return Ok(());
    }
    Err(InvalidValue::Name { name: name.to_owned() })
}

/// Checks everything; the first fault found is the one reported.
pub(super) fn validate(config: &EngineConfig) -> Result<(), InvalidConfig> {
    validate_nbd(config)?;
    if let Endpoint::Unix(_) = config.admin.listen {
        let value = config.admin.listen.clone();
        return Err(InvalidValue::AdminNotTcp { value }.into());
    }
    if !config.admin.insecure && !config.admin.listen.is_local() {
        return Err(InvalidValue::OpenAdmin { value: config.admin.listen.clone() }.into());
    }
    let shared = config.nbd.listen.contains(&config.admin.listen);
    if let (true, Endpoint::Tcp { port: 1.., .. }) = (shared, &config.admin.listen) {
        let duplicate = InvalidValue::Duplicate {
            key: "listen",
            value: config.admin.listen.to_string(),
            other: "both [nbd] and [admin]".to_owned(),
        };
        return Err(duplicate.into());
    }
    if config.volumes.is_empty() {
        return Err(InvalidValue::NoVolumes.into());
    }
    let mut names = HashSet::new();
    for (index, volume) in config.volumes.iter().enumerate() {
        let numbered = format!("#{}", index + 1);
        check_name(&volume.name).map_err(|value| in_volume(&numbered, value))?;
        if !names.insert(&volume.name) {
            let value = InvalidValue::Duplicate {
                key: "name",
                value: volume.name.clone(),
                other: "an earlier volume too".to_owned(),
            };
            return Err(in_volume(&numbered, value));
        }
        let quoted = format!("{:?}", volume.name);
        validate_volume(volume).map_err(|value| in_volume(&quoted, value))?;
        validate_replicas(volume, &config.agents)?;
    }
    validate_images(config)
}

/// `[nbd]`, and what volumes say that depends on it.
fn validate_nbd(config: &EngineConfig) -> Result<(), InvalidConfig> {
    let nbd = &config.nbd;
    if nbd.listen.is_empty() {
        return Err(InvalidValue::NoListen.into());
    }
    for (index, endpoint) in nbd.listen.iter().enumerate() {
        let takes_any_port = matches!(endpoint, Endpoint::Tcp { port: 0, .. });
        if !takes_any_port && nbd.listen[..index].contains(endpoint) {
            let (value, other) = (endpoint.to_string(), "an earlier address too".to_owned());
            return Err(InvalidValue::Duplicate { key: "nbd.listen", value, other }.into());
        }
    }
    number("nbd.connections_max", nbd.connections_max.into(), 1, 65_536)?;
    // One request of the greatest length that NBD clients send must fit, or it would wait for ever.
    size("nbd.inflight_bytes_max", nbd.inflight_bytes_max, ByteSize::mib(32), ByteSize::gib(64))?;
    size("nbd.connection_bytes_max", nbd.connection_bytes_max, ByteSize::mib(32), ByteSize::gib(64))?;
    if nbd.tls.mode != TlsMode::Off && nbd.tls.certificates.is_none() {
        return Err(InvalidValue::TlsWithoutCertificates { mode: nbd.tls.mode }.into());
    }
    if let Some(name) = &nbd.default
        && !config.volumes.iter().any(|volume| volume.name == *name)
    {
        return Err(InvalidValue::UnknownDefault { name: name.clone() }.into());
    }
    let shows_names = nbd.tls.mode != TlsMode::Off && nbd.tls.verify_clients;
    match config.volumes.iter().find(|volume| !volume.allow_names.is_empty() && !shows_names) {
        Some(volume) => Err(in_volume(&format!("{:?}", volume.name), InvalidValue::NamesWithoutCertificates)),
        None => Ok(()),
    }
}

fn in_volume(volume: &str, value: InvalidValue) -> InvalidConfig {
    InvalidConfig { volume: Some(volume.to_owned()), replica: None, value }
}

fn validate_volume(volume: &VolumeConfig) -> Result<(), InvalidValue> {
    size("size", volume.size, ByteSize::kib(64), ByteSize::from_bytes(VOLUME_BYTES_MAX))?;
    aligned("size", volume.size)?;
    let lag = volume.lag_bytes_max;
    size("lag_bytes_max", lag, ByteSize::kib(64), ByteSize::gib(64))?;
    number("lag_ms_max", volume.lag_ms_max, 100, 3_600_000)?;
    number("freeze_ms", volume.freeze_ms, 0, 86_400_000)?;
    number("lease_ms", volume.lease_ms, 100, 60_000)?;
    size("resync_rate_min", volume.resync_rate_min, ByteSize::kib(64), ByteSize::gib(64))?;
    number("checksum_errors_max", volume.checksum_errors_max, 1, 1_000_000_000)?;
    size("scrub_rate_min", volume.scrub_rate_min, ByteSize::kib(64), ByteSize::gib(64))?;
    let journal = volume.journal_size();
    // The lag is at most 64 GiB here, so doubling it cannot overflow.
    let journal_min = ByteSize::from_bytes(lag.bytes() * 2);
    if journal < journal_min {
        return Err(InvalidValue::JournalSize { value: journal, min: journal_min });
    }
    size("journal_size", journal, journal_min, ByteSize::tib(1))?;
    aligned("journal_size", journal)?;
    let bytes = volume.description.len();
    if bytes > DESCRIPTION_BYTES_MAX || volume.description.contains('\0') {
        return Err(InvalidValue::Description { bytes });
    }
    let replicas = volume.replicas.len();
    if !(1..=REPLICAS_MAX).contains(&replicas) {
        return Err(InvalidValue::ReplicaCount { count: replicas });
    }
    let value = volume.min_replicas;
    if value < 1 || usize::try_from(value).is_ok_and(|value| value > replicas) {
        return Err(InvalidValue::MinReplicas { value, replicas });
    }
    Ok(())
}

/// Names, addresses and paths of one volume's replicas: two copies in one place would be one copy.
fn validate_replicas(volume: &VolumeConfig, agents: &AgentsConfig) -> Result<(), InvalidConfig> {
    let place = |replica: String, value| InvalidConfig {
        volume: Some(format!("{:?}", volume.name)),
        replica: Some(replica),
        value,
    };
    for (index, replica) in volume.replicas.iter().enumerate() {
        let numbered = format!("#{}", index + 1);
        check_name(&replica.name).map_err(|value| place(numbered.clone(), value))?;
        let earlier = &volume.replicas[..index];
        let duplicate = |key, value: String, other: &ReplicaConfig| InvalidValue::Duplicate {
            key,
            value,
            other: format!("replica {:?} too", other.name),
        };
        if let Some(other) = earlier.iter().find(|other| other.name == replica.name) {
            let value = duplicate("name", replica.name.clone(), other);
            return Err(place(numbered, value));
        }
        let quoted = format!("{:?}", replica.name);
        if let ReplicaPlace::Agent { address: address @ Endpoint::Tcp { port: 0, .. }, .. } = &replica.place {
            let value = address.clone();
            return Err(place(quoted, InvalidValue::AddressWithoutPort { value }));
        }
        agents.check(replica).map_err(|value| place(quoted.clone(), value))?;
        for other in earlier {
            if let Some(name) = replica.certificate().filter(|_| agents.certificates.is_some())
                && other.certificate().is_some_and(|earlier| earlier.eq_ignore_ascii_case(name))
            {
                return Err(place(quoted, duplicate("certificate", name.to_owned(), other)));
            }
            let (key, value) = match (&replica.place, &other.place) {
                (ReplicaPlace::Agent { address: a, .. }, ReplicaPlace::Agent { address: b, .. }) if a == b => {
                    ("address", a.to_string())
                }
                (ReplicaPlace::Embedded { path: a, .. }, ReplicaPlace::Embedded { path: b, .. }) if a == b => {
                    ("path", a.display().to_string())
                }
                (ReplicaPlace::Agent { .. } | ReplicaPlace::Embedded { .. }, _) => continue,
            };
            return Err(place(quoted, duplicate(key, value, other)));
        }
    }
    Ok(())
}

/// A block device holds one image only, over all volumes.
fn validate_images(config: &EngineConfig) -> Result<(), InvalidConfig> {
    let mut seen: Vec<(&std::path::Path, String)> = Vec::new();
    for volume in &config.volumes {
        for replica in &volume.replicas {
            let ReplicaPlace::Embedded { image: Some(image), .. } = &replica.place else {
                continue;
            };
            if let Some((_, other)) = seen.iter().find(|(path, _)| path == image) {
                return Err(InvalidConfig {
                    volume: Some(format!("{:?}", volume.name)),
                    replica: Some(format!("{:?}", replica.name)),
                    value: InvalidValue::Duplicate {
                        key: "image",
                        value: image.display().to_string(),
                        other: other.clone(),
                    },
                });
            }
            let user = format!("volume {:?}, replica {:?} too", volume.name, replica.name);
            seen.push((image, user));
        }
    }
    Ok(())
}

fn number(key: &'static str, value: u64, min: u64, max: u64) -> Result<(), InvalidValue> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(InvalidValue::Number { key, value, min, max })
}

fn size(key: &'static str, value: ByteSize, min: ByteSize, max: ByteSize) -> Result<(), InvalidValue> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    Err(InvalidValue::Size { key, value, min, max })
}

fn aligned(key: &'static str, value: ByteSize) -> Result<(), InvalidValue> {
    if value.bytes().is_multiple_of(BLOCK.bytes()) {
        return Ok(());
    }
    Err(InvalidValue::Unaligned { key, value })
}
