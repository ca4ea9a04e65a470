//! The way in for NBD clients, as configured: sockets, who may connect to them, certificates, limits.

use std::io;
use std::net::ToSocketAddrs;
use std::time::Duration;

use listener_agent::config::Endpoint;
use listener_agent::tls::{ClientCertificates, TlsError, server_config};

use super::accounts::{group_number, user_number};
use crate::config::{EngineConfig, NbdConfig, NbdTls, TlsMode};
use crate::nbd::{BindError, Limits, ListenAddress, ListeningSocket, Manners, NbdServer, SocketFile, Tls};

/// Why clients cannot be let in.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// An address cannot be listened at.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// An address is no address.
    #[error("nbd.listen: cannot resolve {address}: {cause}")]
    Resolve {
        /// The address.
        address: Endpoint,
        /// Why.
        cause: io::Error,
    },
    /// Other machines could connect without TLS, and nobody said that they may.
    #[error(
        "nbd.listen = \"{address}\": other machines could connect there, without encryption and without authentication"
    )]
    Open {
        /// The address.
        address: ListenAddress,
    },
    /// The certificates cannot be used.
    #[error("nbd.tls.certificates: {0}")]
    Tls(#[from] TlsError),
    /// There is no such user or group.
    #[error("nbd.socket_owner: there is no {kind} {name:?} on this machine")]
    UnknownOwner {
        /// "user" or "group".
        kind: &'static str,
        /// What was given.
        name: String,
    },
    /// Users and groups cannot be looked up.
    #[error("nbd.socket_owner: cannot look up {name:?}: {cause}")]
    Owners {
        /// What was given.
        name: String,
        /// Why.
        cause: io::Error,
    },
}

impl DoorError {
    /// The exit code that it calls for.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            DoorError::Bind(_) => 1,
            DoorError::Resolve { .. }
            | DoorError::Open { .. }
            | DoorError::Tls(_)
            | DoorError::UnknownOwner { .. }
            | DoorError::Owners { .. } => 2,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        let remedy = match self {
            // It says so itself.
            DoorError::Bind(_) => return None,
            DoorError::Tls(cause) => return Some(cause.remedy()),
            DoorError::Resolve { .. } => "write an IP address and a port, such as 127.0.0.1:10809",
            DoorError::Open { .. } => {
                "require TLS: `mode = \"require\"` and `certificates` in [nbd.tls] (`nbdcast certs` makes them); or listen \
                 at a loopback address or a Unix socket; or allow it with `insecure = true` in [nbd]"
            }
            DoorError::UnknownOwner { .. } => "write a name from /etc/passwd or /etc/group, or a number",
            DoorError::Owners { .. } => "write the number instead of the name",
        };
        Some(remedy.to_owned())
    }
}

/// Takes all addresses, or serves at the sockets that were `passed`, if there are any.
pub(super) fn open(
    config: &EngineConfig,
    passed: Vec<ListeningSocket>,
    shutdown_timeout: Duration,
) -> Result<NbdServer, DoorError> {
    let nbd = &config.nbd;
    let tls = tls(&nbd.tls)?;
    let sockets = if passed.is_empty() {
        let addresses: Vec<ListenAddress> = nbd.listen.iter().map(resolve).collect::<Result<_, _>>()?;
        addresses.iter().try_for_each(|address| refuse_open(nbd, address))?;
        let file = socket_file(nbd)?;
        let bind = |address| ListeningSocket::bind_with(address, file);
        addresses.iter().map(bind).collect::<Result<_, _>>()?
    } else {
        passed.iter().try_for_each(|socket| refuse_open(nbd, socket.local_address()))?;
        passed
    };
    let limits = Limits {
        connections_max: nbd.connections_max as usize,
        inflight_bytes_max: nbd.inflight_bytes_max.bytes() as usize,
        connection_bytes_max: nbd.connection_bytes_max.bytes() as usize,
        shutdown_timeout,
        ..Limits::default()
    };
    Ok(NbdServer::new(sockets, Manners { limits, tls, default_export: nbd.default.clone() }))
}

fn tls(config: &NbdTls) -> Result<Tls, DoorError> {
    let Some(dir) = config.certificates.as_deref().filter(|_| config.mode != TlsMode::Off) else {
        return Ok(Tls::Off);
    };
    let clients = if config.verify_clients { ClientCertificates::Required } else { ClientCertificates::NotAsked };
    let server = server_config(dir, clients)?;
    Ok(match config.mode {
        TlsMode::Off => Tls::Off,
        TlsMode::On => Tls::On(server),
        TlsMode::Require => Tls::Require(server),
    })
}

fn refuse_open(nbd: &NbdConfig, address: &ListenAddress) -> Result<(), DoorError> {
    if address.is_local() || nbd.tls.mode == TlsMode::Require {
        return Ok(());
    }
    if !nbd.insecure {
        return Err(DoorError::Open { address: address.clone() });
    }
    tracing::warn!(%address, "NBD clients can connect from other machines, without encryption or authentication");
    Ok(())
}

fn socket_file(nbd: &NbdConfig) -> Result<SocketFile, DoorError> {
    let mode = nbd.socket_mode.map(|mode| mode.0);
    let Some(owner) = &nbd.socket_owner else { return Ok(SocketFile { mode, ..SocketFile::default() }) };
    let number = |kind, name: &Option<String>, look_up: fn(&str) -> io::Result<Option<u32>>| {
        let Some(name) = name else { return Ok(None) };
        match look_up(name) {
            Ok(Some(number)) => Ok(Some(number)),
            Ok(None) => Err(DoorError::UnknownOwner { kind, name: name.clone() }),
            Err(cause) => Err(DoorError::Owners { name: name.clone(), cause }),
        }
    };
    let (user, group) = (number("user", &owner.user, user_number)?, number("group", &owner.group, group_number)?);
    Ok(SocketFile { mode, owner: user, group })
}

fn resolve(listen: &Endpoint) -> Result<ListenAddress, DoorError> {
    match listen {
        Endpoint::Unix(path) => Ok(ListenAddress::Unix(path.clone())),
        Endpoint::Tcp { host, port } => {
            let failed = |cause| DoorError::Resolve { address: listen.clone(), cause };
            let mut addresses = (host.as_str(), *port).to_socket_addrs().map_err(failed)?;
            addresses.next().map(ListenAddress::Tcp).ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
        }
    }
}
