//! A certificate authority for tests: directories of certificates, good ones and bad ones.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use tempfile::TempDir;

const HOUR: Duration = Duration::from_secs(3600);

/// Issues certificates and keeps them in a directory that goes with it.
pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    root: TempDir,
}

/// For whom a certificate is.
#[derive(Clone, Copy)]
pub(crate) enum Side {
    Server,
    Client,
}

/// When a certificate is valid.
#[derive(Clone, Copy)]
pub(crate) enum Validity {
    Now,
    Over,
    ToCome,
}

impl Side {
    fn word(self) -> &'static str {
        match self {
            Side::Server => "server",
            Side::Client => "client",
        }
    }
}

impl Authority {
    pub(crate) fn new() -> Authority {
        let root = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("CA of {}", root.path().display()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Authority { issuer, root }
    }

    /// A directory with a certificate for `name`.
    pub(crate) fn dir(&self, side: Side, name: &str) -> PathBuf {
        self.dir_valid(side, name, Validity::Now)
    }

    pub(crate) fn dir_valid(&self, side: Side, name: &str, validity: Validity) -> PathBuf {
        let dir = self.root.path().join(format!("{}-{name}", side.word()));
        fs::create_dir_all(&dir).unwrap();
        let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let (from, until) = match validity {
            Validity::Now => (since_1970 - HOUR, since_1970 + HOUR),
            Validity::Over => (since_1970 - 3 * HOUR, since_1970 - HOUR),
            Validity::ToCome => (since_1970 + HOUR, since_1970 + 3 * HOUR),
        };
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(1970, 1, 1) + from;
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + until;
        params.serial_number = Some(serial(name));
        params.extended_key_usages = vec![match side {
            Side::Server => ExtendedKeyUsagePurpose::ServerAuth,
            Side::Client => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(dir.join("ca-cert.pem"), self.issuer.pem()).unwrap();
        fs::write(dir.join(format!("{}-cert.pem", side.word())), certificate.pem()).unwrap();
        let key_path = dir.join(format!("{}-key.pem", side.word()));
        fs::write(&key_path, key.serialize_pem()).unwrap();
        fs::set_permissions(&key_path, fs::Permissions::from_mode(0o600)).unwrap();
        dir
    }

    /// Puts a list into `dir` by which the certificate for `name` is revoked.
    pub(crate) fn revoke(&self, dir: &Path, name: &str) {
        let past = rcgen::date_time_ymd(2020, 1, 1);
        let revoked = RevokedCertParams {
            serial_number: serial(name),
            revocation_time: past,
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: past,
            next_update: rcgen::date_time_ymd(2100, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        fs::write(dir.join("ca-crl.pem"), list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
    }
}

fn serial(name: &str) -> SerialNumber {
    SerialNumber::from_slice(&[&[1], name.as_bytes()].concat())
}
