//! How agents are reached, for all volumes: encrypted or not, and which name an agent must prove. Reads no certificate.

use std::path::PathBuf;

use rustls::pki_types::DnsName;
use serde::Deserialize;

use super::{InvalidValue, ReplicaConfig, ReplicaPlace};

/// `[agents]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct AgentsConfig {
    /// Directory with ca-cert.pem, client-cert.pem and client-key.pem; with it all agents are reached by TLS. Default: none.
    pub certificates: Option<PathBuf>,
    /// Agents on other machines are reached without TLS too. Default false.
    pub insecure: bool,
}

impl ReplicaConfig {
    /// The DNS name that the certificate of the replica's agent must bear; none for a replica in this process.
    #[must_use]
    pub fn certificate(&self) -> Option<&str> {
        match &self.place {
            ReplicaPlace::Agent { certificate, .. } => Some(certificate.as_deref().unwrap_or(&self.name)),
            ReplicaPlace::Embedded { .. } => None,
        }
    }
}

impl AgentsConfig {
    /// Checks that a replica can be reached in the way that is said here.
    pub fn check(&self, replica: &ReplicaConfig) -> Result<(), InvalidValue> {
        let ReplicaPlace::Agent { address, certificate } = &replica.place else { return Ok(()) };
        if self.certificates.is_none() {
            if let Some(name) = certificate {
                return Err(InvalidValue::CertificateWithoutTls { name: name.clone() });
            }
            if !self.insecure && !address.is_local() {
                return Err(InvalidValue::OpenAgent { value: address.clone() });
            }
            return Ok(());
        }
        let name = certificate.as_deref().unwrap_or(&replica.name);
        match DnsName::try_from(name) {
            Ok(_) => Ok(()),
            Err(_) => Err(InvalidValue::CertificateName { name: name.to_owned() }),
        }
    }
}
