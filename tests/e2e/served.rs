//! An engine with images of its own and whatever a story wants in its config file, on a TCP port and a Unix socket, and
//! certificates for its NBD clients. For the stories of what NBD clients see: nothing of the network to agents is here.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::cluster;
use crate::nbd::Endpoint;
use crate::program::{self, Finished, Program};
use crate::scratch;

const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// Names of the two NBD clients that have certificates.
pub const GUEST: &str = "guest";
pub const STRANGER: &str = "stranger";

/// An export that a story wants.
#[derive(Clone, Debug)]
pub struct Volume {
    pub name: &'static str,
    pub size: u64,
    /// Further lines of its `[[volume]]`.
    pub keys: &'static str,
}

impl Volume {
    pub fn new(name: &'static str, size: u64) -> Self {
        Self { name, size, keys: "" }
    }

    pub fn with(self, keys: &'static str) -> Self {
        Self { keys, ..self }
    }
}

/// The engine, running or not. Dropping it kills it and removes its files.
pub struct Served {
    pub port: u16,
    volumes: Vec<Volume>,
    program: Option<Program>,
    directory: TempDir,
    sockets: TempDir,
}

impl Served {
    /// Certificates made, volumes created, engine serving. `nbd` are further lines of `[nbd]`.
    pub fn start(nbd: &str, volumes: &[Volume]) -> Self {
        let mut served = Self::created(nbd, volumes);
        served.launch();
        served
    }

    /// A server on whose every connection TLS is as `mode` says.
    pub fn with_tls(mode: &str, volumes: &[Volume]) -> Self {
        Self::start(&format!("tls = {{ mode = \"{mode}\", certificates = \"certs/engine\" }}\n"), volumes)
    }

    /// The same, but nothing runs yet.
    pub fn created(nbd: &str, volumes: &[Volume]) -> Self {
        let served = Self {
            port: scratch::free_port(),
            volumes: volumes.to_vec(),
            program: None,
            directory: scratch::directory(),
            sockets: scratch::socket_directory(),
        };
        std::fs::write(served.config(), served.config_text(nbd)).expect("cannot write the config file");
        served.make_certificates("certs");
        served.succeed(Command::new(program::nbdcast()).arg("create").arg("--config").arg(served.config()));
        served
    }

    fn config_text(&self, nbd: &str) -> String {
        let mut text = format!(
            "[nbd]\nlisten = [\"127.0.0.1:{}\", \"unix:{}\"]\n{nbd}\n[admin]\nlisten = \"127.0.0.1:{}\"\n",
            self.port,
            self.socket().display(),
            scratch::free_port(),
        );
        for Volume { name, size, keys } in &self.volumes {
            let _ = write!(
                text,
                "\n[[volume]]\nname = \"{name}\"\nsize = {size}\njournal_size = \"32MiB\"\nlag_bytes_max = \"16MiB\"\n\
                 {keys}\n"
            );
            for replica in ["a", "b"] {
                let _ = write!(text, "[[volume.replica]]\nname = \"{replica}\"\npath = \"{replica}\"\n");
            }
        }
        text
    }

    /// A CA with certificates for the engine and for two clients, in a directory of this name.
    pub fn make_certificates(&self, name: &str) {
        let out = self.directory.path().join(name);
        let words = ["certs", "--client", GUEST, "--client", STRANGER, "--host", "127.0.0.1", "--host", "localhost"];
        self.succeed(
            Command::new(program::nbdcast()).args(words).arg("--out").arg(out).arg("--config").arg(self.config()),
        );
    }

    fn succeed(&self, command: &mut Command) {
        let finished: Finished = program::finish(command, COMMAND_LIMIT);
        assert!(finished.status.success(), "{command:?}: {finished}");
    }

    /// Starts the engine and waits until every volume is served.
    pub fn launch(&mut self) {
        let config = self.config();
        let mut program = Program::start("nbdcast serve", &program::nbdcast(), |command| {
            command.arg("serve").arg("--config").arg(config);
        });
        for volume in &self.volumes {
            for place in [format!("127.0.0.1:{}/{}", self.port, volume.name), self.socket().display().to_string()] {
                program.wait_for_line(&place, |line| line.starts_with("ready ") && line.contains(&place));
            }
        }
        self.program = Some(program);
    }

    pub fn config(&self) -> PathBuf {
        self.directory.path().join("engine.toml")
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn socket(&self) -> PathBuf {
        self.sockets.path().join("nbd.sock")
    }

    /// Where a client finds its certificates, in QEMU's layout.
    pub fn certificates(&self, client: &str) -> PathBuf {
        self.directory.path().join(format!("certs/client-{client}"))
    }

    /// The TCP port and the Unix socket.
    pub fn endpoints(&self) -> [Endpoint; 2] {
        [Endpoint::Tcp(self.port), Endpoint::Unix(self.socket())]
    }

    /// Both of these for the client GUEST with TLS, or for one that knows none.
    pub fn doors(&self, has_tls: bool) -> [Door; 2] {
        let certificates = has_tls.then(|| self.certificates(GUEST));
        self.endpoints().map(|endpoint| Door { endpoint, certificates: certificates.clone() })
    }

    pub fn running(&mut self) -> &mut Program {
        self.program.as_mut().expect("the engine is running")
    }

    /// Stops it; the images of the volume `name` must be the same. Returns their content.
    pub fn stop(&mut self, name: &str) -> Vec<u8> {
        self.program.take().expect("the engine is running").stop();
        let image = |replica| self.directory.path().join(replica).join(name).join("image.raw");
        cluster::identical(["a", "b"].map(|replica| (replica, image(replica))).into())
    }
}

/// How a client reaches an export: where, and with which certificates, if any.
#[derive(Clone, Debug)]
pub struct Door {
    pub endpoint: Endpoint,
    /// In QEMU's layout; `None` for a client without TLS.
    pub certificates: Option<PathBuf>,
}

impl Door {
    pub fn plain(endpoint: Endpoint) -> Self {
        Self { endpoint, certificates: None }
    }

    pub fn tls(endpoint: Endpoint, certificates: PathBuf) -> Self {
        Self { endpoint, certificates: Some(certificates) }
    }

    /// For libnbd and what is built on it.
    pub fn uri(&self, export: &str) -> String {
        let Some(directory) = &self.certificates else {
            return self.endpoint.uri(export);
        };
        let directory = directory.display();
        match &self.endpoint {
            Endpoint::Tcp(port) => format!("nbds://127.0.0.1:{port}/{export}?tls-certificates={directory}"),
            Endpoint::Unix(path) => format!(
                "nbds+unix:///{export}?socket={}&tls-certificates={directory}&tls-hostname=localhost",
                path.display()
            ),
        }
    }

    /// For QEMU's tools: what `--image-opts` has made of a file name.
    pub fn image_options(&self, export: &str) -> String {
        let server = match &self.endpoint {
            Endpoint::Tcp(port) => format!("server.type=inet,server.host=127.0.0.1,server.port={port}"),
            Endpoint::Unix(path) => format!("server.type=unix,server.path={}", path.display()),
        };
        let tls = match (&self.certificates, &self.endpoint) {
            (None, _) => "",
            (Some(_), Endpoint::Tcp(_)) => ",tls-creds=tls",
            (Some(_), Endpoint::Unix(_)) => ",tls-creds=tls,tls-hostname=localhost",
        };
        format!("driver=nbd,export={export},{server}{tls}")
    }

    /// Gives QEMU's tools the certificates that the options name.
    pub fn credentials(&self, command: &mut Command) {
        if let Some(directory) = &self.certificates {
            let object = format!("tls-creds-x509,id=tls,endpoint=client,dir={}", directory.display());
            command.args(["--object", &object]);
        }
    }
}
