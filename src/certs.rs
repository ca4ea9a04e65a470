//! Certificates for a small cluster: one authority, and for each participant a directory that it is given.
//!
//! Owns what is in a certificate and which are made. Never overwrites: what is there is left alone. Where a directory is
//! to be copied is said by the command.

mod files;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SerialNumber,
};
use rustls::pki_types::DnsName;

pub use files::CertsError;
use files::{File, NewDirectory};

/// How long the authority is valid; nothing that it issues can be longer.
pub const DAYS_MAX: u32 = 3650;
/// The name in an engine's certificate for agents, as `tls.engines` of an agent has by default.
pub const ENGINE: &str = "engine";
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Certificates are valid so much before they were made, as clocks differ.
const CLOCKS_DIFFER: Duration = Duration::from_secs(60 * 60);
const CA_NAME_BYTES: usize = 8;

/// Which certificates are wanted.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Agents, by the names that their certificates must bear.
    pub agents: Vec<String>,
    /// NBD clients, by name.
    pub clients: Vec<String>,
    /// Names and addresses by which NBD clients reach the engine.
    pub hosts: Vec<String>,
    /// How long they are valid: at most [`DAYS_MAX`].
    pub days: u32,
}

/// Whose directory one is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// The authority itself.
    Authority,
    /// The engine.
    Engine,
    /// The agent of this name.
    Agent(String),
    /// The NBD client of this name.
    Client(String),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Authority => f.write_str("ca"),
            Holder::Engine => f.write_str("engine"),
            Holder::Agent(name) => write!(f, "agent-{name}"),
            Holder::Client(name) => write!(f, "client-{name}"),
        }
    }
}

/// A directory of the set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Whose.
    pub holder: Holder,
    /// Where it is.
    pub dir: PathBuf,
    /// It was there before, and is as it was.
    pub kept: bool,
}

/// What a certificate is for.
#[derive(Clone, Copy)]
enum Side {
    Server,
    Client,
}

/// Whether `name` can be the name in a certificate.
#[must_use]
pub fn is_name(name: &str) -> bool {
    DnsName::try_from(name).is_ok()
}

/// Whether `host` can be a server's name or address in a certificate.
#[must_use]
pub fn is_host(host: &str) -> bool {
    is_name(host) || host.parse::<IpAddr>().is_ok()
}

/// Makes what is missing in `out`, when no other command does. Names must have passed [`is_name`], hosts [`is_host`].
pub fn make(out: &Path, wanted: &Wanted) -> Result<Vec<Member>, CertsError> {
    files::make_root(out)?;
    let _alone = files::lock(out)?;
    let holders = [Holder::Engine]
        .into_iter()
        .chain(wanted.agents.iter().cloned().map(Holder::Agent))
        .chain(wanted.clients.iter().cloned().map(Holder::Client));
    let (authority, member) = Authority::of(out)?;
    let mut members = vec![member];
    for holder in holders {
        let dir = out.join(holder.to_string());
        let kept = files::is_there(&dir)?;
        if !kept {
            authority.equip(&dir, &holder, wanted)?;
        }
        members.push(Member { holder, dir, kept });
    }
    Ok(members)
}

/// The authority, with its key.
struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// The authority in `out`, made if there is none.
    fn of(out: &Path) -> Result<(Authority, Member), CertsError> {
        let dir = out.join(Holder::Authority.to_string());
        let kept = files::is_there(&dir)?;
        if !kept {
            let key = KeyPair::generate()?;
            let certificate = ca_params(&key).self_signed(&key)?;
            let new = NewDirectory::begin(&dir)?;
            new.write("ca-cert.pem", File::Certificate, &certificate.pem())?;
            new.write("ca-key.pem", File::Key, &key.serialize_pem())?;
            new.finish()?;
        }
        let (cert_path, key_path) = (dir.join("ca-cert.pem"), dir.join("ca-key.pem"));
        let certificate_pem = files::read(&cert_path)?;
        let key = KeyPair::from_pem(&files::read(&key_path)?).map_err(|_| CertsError::Key { path: key_path })?;
        let issuer = Issuer::new(ca_params(&key), key);
        let authority = Authority { certificate_pem, issuer };
        authority.check(&cert_path)?;
        Ok((authority, Member { holder: Holder::Authority, dir, kept }))
    }

    /// Refuses a certificate that does not go with the key, or was made by something else: nothing that is issued here would
    /// be accepted then.
    fn check(&self, path: &Path) -> Result<(), CertsError> {
        let (probe, _) = self.issue(Side::Client, "probe", &[], 1)?;
        if listener_agent::tls::is_issued_by(&probe, &self.certificate_pem) {
            return Ok(());
        }
        Err(CertsError::ForeignAuthority { path: path.to_owned() })
    }

    /// Makes the directory of a participant.
    fn equip(&self, dir: &Path, holder: &Holder, wanted: &Wanted) -> Result<(), CertsError> {
        let new = NewDirectory::begin(dir)?;
        new.write("ca-cert.pem", File::Certificate, &self.certificate_pem)?;
        let issue = |side: Side, name: &str, hosts: &[String]| -> Result<(), CertsError> {
            let word = match side {
                Side::Server => "server",
                Side::Client => "client",
            };
            let (certificate, key) = self.issue(side, name, hosts, wanted.days)?;
            new.write(&format!("{word}-cert.pem"), File::Certificate, &certificate)?;
            new.write(&format!("{word}-key.pem"), File::Key, &key)
        };
        match holder {
            Holder::Authority => {}
            Holder::Engine => {
                issue(Side::Client, ENGINE, &[])?;
                issue(Side::Server, ENGINE, &engine_hosts(&wanted.hosts))?;
            }
            Holder::Agent(name) => issue(Side::Server, name, &[])?,
            Holder::Client(name) => issue(Side::Client, name, &[])?,
        }
        new.finish()
    }

    /// A certificate and its key, as PEM. It is for `hosts`, or if there are none for `name`.
    fn issue(&self, side: Side, name: &str, hosts: &[String], days: u32) -> Result<(String, String), CertsError> {
        let names = if hosts.is_empty() { vec![name.to_owned()] } else { hosts.to_vec() };
        let mut params = CertificateParams::new(names)?;
        set_validity(&mut params, days);
        params.serial_number = Some(random_serial());
        params.distinguished_name = common_name(name);
        params.is_ca = IsCa::ExplicitNoCa;
        // The second has no meaning with these keys, but QEMU refuses certificates without it.
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![match side {
            Side::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Side::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

/// What is in the authority's certificate. It follows from the key but for serial number and time, so that the key is
/// enough to issue in its name; and two authorities have two names, so that a mistake is told from a bad signature.
fn ca_params(key: &KeyPair) -> CertificateParams {
    let mut params = CertificateParams::default();
    set_validity(&mut params, DAYS_MAX);
    params.serial_number = Some(random_serial());
    let key_id: String = params.key_identifier(key).iter().take(CA_NAME_BYTES).map(|b| format!("{b:02x}")).collect();
    params.distinguished_name = common_name(&format!("nbdcast CA {key_id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn set_validity(params: &mut CertificateParams, days: u32) {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(CLOCKS_DIFFER);
    params.not_after = epoch + now + DAY * days;
}

/// 127 random bits but for one: positive, and never shorter than others.
fn random_serial() -> SerialNumber {
    let mut bytes = *uuid::Uuid::new_v4().as_bytes();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

/// By what NBD clients may know the engine: this machine, and what was said.
fn engine_hosts(wanted: &[String]) -> Vec<String> {
    let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let mut hosts: Vec<String> = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into();
    for host in [own.trim()].into_iter().chain(wanted.iter().map(String::as_str)) {
        if is_host(host) && !hosts.iter().any(|known| known.eq_ignore_ascii_case(host)) {
            hosts.push(host.to_owned());
        }
    }
    hosts
}
