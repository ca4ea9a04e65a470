//! What a TLS connection that came to nothing means, in words for people.

use std::io;

use rustls::{AlertDescription, CertificateError, Error};

/// Why a TLS connection failed, if it was TLS that failed.
#[must_use]
pub fn reason(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

/// What went wrong with `peer`, such as "the agent", in half a sentence.
#[must_use]
pub fn in_words(error: &Error, peer: &str) -> String {
    match error {
        Error::InvalidMessage(_) => format!("{peer} does not speak TLS"),
        Error::NoCertificatesPresented => format!("{peer} shows no certificate"),
        Error::InvalidCertificate(fault) => format!("{peer}'s certificate {}", fault_in_words(fault)),
        Error::AlertReceived(alert) => match objection_in_words(*alert) {
            Some(objection) => format!("{peer} does not accept the certificate shown to it{objection}"),
            None => format!("{peer} ended the TLS handshake: {alert:?}"),
        },
        other => format!("no TLS with {peer}: {other}"),
    }
}

fn fault_in_words(fault: &CertificateError) -> String {
    match fault {
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented: Vec<&str> = presented.iter().map(|name| bare(name)).collect();
            let whose = if presented.is_empty() { "nobody".to_owned() } else { presented.join(", ") };
            format!("is for {whose}, not for {}", expected.to_str())
        }
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "has expired".to_owned(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is not valid yet: compare the clocks".to_owned()
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "is not of the CA in ca-cert.pem here".to_owned()
        }
        CertificateError::Revoked => "was revoked".to_owned(),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "is not made for this side of a connection".to_owned()
        }
        other => format!("cannot be used: {other}"),
    }
}

/// What the other side has against our certificate; `None` if that is not what it says.
fn objection_in_words(alert: AlertDescription) -> Option<&'static str> {
    match alert {
        AlertDescription::UnknownCA | AlertDescription::DecryptError => Some(": it is not of its CA"),
        AlertDescription::CertificateExpired => Some(": it has expired"),
        AlertDescription::CertificateRevoked => Some(": it was revoked"),
        AlertDescription::CertificateRequired => Some(": there was none"),
        AlertDescription::BadCertificate
        | AlertDescription::UnsupportedCertificate
        | AlertDescription::CertificateUnknown
        | AlertDescription::AccessDenied => Some(""),
        _ => None,
    }
}

/// `b` of the form `DnsName("b")` in which names are reported.
fn bare(name: &str) -> &str {
    name.split('"').nth(1).unwrap_or(name)
}
