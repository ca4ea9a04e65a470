//! The engine's config file: what a story wants of its volume, and the text that says so.

use std::fmt::Write as _;

use crate::nbd::Endpoint;

/// The volume's name, and so its export name and the name of its directory at each agent.
pub const VOLUME: &str = "vol0";

/// Directory of all certificates, beside the config file.
pub const CERTIFICATES: &str = "certs";

/// What the config file says about the volume. Sizes in bytes.
#[derive(Clone, Debug)]
pub struct Plan {
    pub size: u64,
    pub journal_size: u64,
    pub lag_bytes_max: u64,
    pub lag_ms_max: u64,
    pub on_lag: &'static str,
    pub freeze_ms: u64,
    pub resync_rate_min: u64,
    /// Which replicas reads are sent to.
    pub read: &'static str,
    pub replicas: usize,
    pub ack_write: &'static str,
    pub ack_flush: &'static str,
    /// Engine and agents prove who they are.
    pub tls: bool,
}

impl Default for Plan {
    /// Small enough that a round of a crash test is quick; a lag limit that no healthy replica of it reaches.
    fn default() -> Self {
        Self {
            size: 16 << 20,
            journal_size: 32 << 20,
            lag_bytes_max: 16 << 20,
            lag_ms_max: 120_000,
            on_lag: "drop",
            freeze_ms: 60_000,
            resync_rate_min: 8 << 20,
            read: "adaptive",
            replicas: 3,
            ack_write: "first",
            ack_flush: "first",
            tls: false,
        }
    }
}

/// The text of an engine's config file; `replicas` are names with their `address = …` or `path = …` line.
pub fn config_text(plan: &Plan, endpoint: &Endpoint, admin_port: u16, replicas: &[(String, String)]) -> String {
    let listen = match endpoint {
        Endpoint::Tcp(port) => format!("127.0.0.1:{port}"),
        Endpoint::Unix(path) => format!("unix:{}", path.display()),
    };
    let agents =
        if plan.tls { format!("[agents]\ncertificates = \"{CERTIFICATES}/engine\"\n\n") } else { String::new() };
    let mut text = format!(
        "{agents}[state]\ndirectory = \"state\"\n\n[nbd]\nlisten = \"{listen}\"\n\n[admin]\nlisten = \"127.0.0.1:{admin_port}\"\n\n\
         [[volume]]\nname = \"{VOLUME}\"\nsize = \"{}KiB\"\njournal_size = \"{}KiB\"\n\
         ack = {{ write = \"{}\", flush = \"{}\" }}\nlag_bytes_max = \"{}KiB\"\nlag_ms_max = {}\n\
         on_lag = \"{}\"\nfreeze_ms = {}\nresync_rate_min = \"{}KiB\"\nlease_ms = 500\n\
         read = \"{}\"\n",
        plan.size >> 10,
        plan.journal_size >> 10,
        plan.ack_write,
        plan.ack_flush,
        plan.lag_bytes_max >> 10,
        plan.lag_ms_max,
        plan.on_lag,
        plan.freeze_ms,
        plan.resync_rate_min >> 10,
        plan.read,
    );
    for (name, place) in replicas {
        let _ = write!(text, "\n[[volume.replica]]\nname = \"{name}\"\n{place}\n");
    }
    text
}
