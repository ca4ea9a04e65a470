//! Making a new volume: all replicas are looked at first, so that nothing is begun if one holds data or cannot be
//! reached; then each is formatted.

use std::path::PathBuf;
use std::time::Duration;

use listener_agent::config::Endpoint;
use listener_agent::connection::{ConnectionError, FrameReader, write_frames};
use listener_agent::directory::{self, DirectoryError, NewReplica};
use listener_agent::superblock::Identity;
use protocol::message::{Format, Hello, RefusedReason};
use protocol::wire::{Prefix, frame_to_agent};
use protocol::{Epoch, ReplicaName, ToAgent, ToEngine, View, VolumeUuid};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tracing::info;

use crate::config::{EngineConfig, ReplicaPlace, VolumeConfig};

const GREET_MAX: Duration = Duration::from_secs(5);
/// Formatting writes the whole journal.
const FORMAT_MAX: Duration = Duration::from_secs(600);

/// Why a volume is not made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The configuration has no such volume.
    #[error("the configuration has no volume {volume}; it has {known}")]
    NoVolume {
        /// The name asked for.
        volume: String,
        /// The names there are.
        known: String,
    },
    /// A directory of this machine cannot be used.
    #[error("volume {volume}, replica {replica}: {cause}")]
    Directory {
        /// The volume.
        volume: String,
        /// The replica.
        replica: String,
        /// Why.
        cause: DirectoryError,
    },
    /// An agent cannot be talked to.
    #[error("volume {volume}, replica {replica}: the agent at {address}: {cause}")]
    Agent {
        /// The volume.
        volume: String,
        /// The replica.
        replica: String,
        /// Where the agent should be.
        address: Endpoint,
        /// Why.
        cause: ConnectionError,
    },
    /// An agent refuses.
    #[error("volume {volume}, replica {replica}: the agent at {address} refuses: {text}")]
    Refused {
        /// The volume.
        volume: String,
        /// The replica.
        replica: String,
        /// Where the agent is.
        address: Endpoint,
        /// What it says.
        text: String,
    },
}

impl CreateError {
    /// The exit code that it calls for.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            CreateError::NoVolume { .. } => 2,
            CreateError::Directory { .. } | CreateError::Agent { .. } | CreateError::Refused { .. } => 1,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            CreateError::NoVolume { .. } => Some("give one of these names, or none for all".to_owned()),
            CreateError::Directory { cause, .. } => cause.remedy(),
            CreateError::Agent { address, .. } => {
                Some(format!("start it: listener-agent --listen {address} --data DIR; or correct `address`"))
            }
            CreateError::Refused { .. } => {
                Some("to begin anew, stop the agent and move its DATA/VOLUME directory away first".to_owned())
            }
        }
    }
}

/// A replica to be made, and how errors name it.
struct Target<'a> {
    volume: &'a VolumeConfig,
    name: ReplicaName,
    place: &'a ReplicaPlace,
}

impl Target<'_> {
    fn directory_error(&self, cause: DirectoryError) -> CreateError {
        CreateError::Directory { volume: self.volume.name.clone(), replica: self.name.to_string(), cause }
    }

    fn agent_error(&self, address: &Endpoint, cause: impl Into<ConnectionError>) -> CreateError {
        CreateError::Agent {
            volume: self.volume.name.clone(),
            replica: self.name.to_string(),
            address: address.clone(),
            cause: cause.into(),
        }
    }

    fn refused(&self, address: &Endpoint, text: String) -> CreateError {
        let (volume, replica) = (self.volume.name.clone(), self.name.to_string());
        CreateError::Refused { volume, replica, address: address.clone(), text }
    }

    fn dir(&self, path: &std::path::Path) -> PathBuf {
        path.join(&self.volume.name)
    }
}

fn name(text: &str) -> ReplicaName {
    text.parse().expect("names are checked with the configuration")
}

/// Formats all replicas of `volume`, or of every volume. Refuses before anything is changed if one holds data.
/// Returns lines that say what was made.
pub async fn create(config: &EngineConfig, volume: Option<&str>) -> Result<Vec<String>, CreateError> {
    let chosen: Vec<&VolumeConfig> =
        config.volumes.iter().filter(|v| volume.is_none_or(|wanted| v.name == wanted)).collect();
    if let Some(volume) = volume.filter(|_| chosen.is_empty()) {
        let known: Vec<&str> = config.volumes.iter().map(|v| v.name.as_str()).collect();
        return Err(CreateError::NoVolume { volume: volume.to_owned(), known: known.join(", ") });
    }
    let mut lines = Vec::new();
    for volume in chosen {
        let uuid = VolumeUuid(*uuid::Uuid::new_v4().as_bytes());
        let targets: Vec<Target<'_>> =
            volume.replicas.iter().map(|r| Target { volume, name: name(&r.name), place: &r.place }).collect();
        for target in &targets {
            look_at(target).await?;
        }
        let view = View::new(targets.iter().map(|t| t.name.clone()).collect())
            .expect("replicas are checked with the configuration");
        for target in &targets {
            info!("volume {}, replica {}: formatting, journal of {}", volume.name, target.name, volume.journal_size());
            format(target, uuid, &view).await?;
            lines.push(format!("created volume {} ({uuid}), replica {}", volume.name, target.name));
        }
    }
    Ok(lines)
}

/// Refuses a replica that holds data or cannot be reached.
async fn look_at(target: &Target<'_>) -> Result<(), CreateError> {
    match target.place {
        ReplicaPlace::Embedded { path, .. } => {
            directory::refuse_data(&target.dir(path)).map_err(|e| target.directory_error(e))
        }
        ReplicaPlace::Agent(address) => {
            let (volume, replica) = (name(&target.volume.name), target.name.clone());
            let hello = ToAgent::Hello(Hello { volume, replica, engine: *uuid::Uuid::new_v4().as_bytes() });
            match ask(target, address, hello, GREET_MAX).await? {
                ToEngine::Welcome(welcome) if welcome.promised == Epoch(0) => Ok(()),
                ToEngine::Welcome(welcome) => {
                    Err(target.refused(address, format!("it holds data of volume {}", welcome.uuid)))
                }
                ToEngine::Refused(refused) if refused.reason == RefusedReason::NoReplica => Ok(()),
                ToEngine::Refused(refused) => Err(target.refused(address, refused.text)),
                other => Err(target.refused(address, format!("unexpected answer {}", other.number()))),
            }
        }
    }
}

async fn format(target: &Target<'_>, uuid: VolumeUuid, view: &View) -> Result<(), CreateError> {
    let volume = target.volume;
    let (size_bytes, journal_bytes) = (volume.size.bytes(), volume.journal_size().bytes());
    match target.place {
        ReplicaPlace::Embedded { path, image } => {
            let identity =
                Identity { uuid, volume: name(&volume.name), replica: target.name.clone(), size_bytes, journal_bytes };
            let new = NewReplica { identity, view: view.clone(), image: image.clone(), syncing: false };
            let dir = target.dir(path);
            let io_failed = |e| DirectoryError::Io { path: dir.clone(), cause: std::io::Error::other(e) };
            let making = dir.clone();
            let made = tokio::task::spawn_blocking(move || directory::create(&making, &new)).await;
            made.unwrap_or_else(|e| Err(io_failed(e))).map_err(|e| target.directory_error(e))
        }
        ReplicaPlace::Agent(address) => {
            let (volume, replica) = (name(&volume.name), target.name.clone());
            let view = view.clone();
            let format =
                ToAgent::Format(Format { volume, replica, uuid, size_bytes, journal_bytes, view, syncing: false });
            match ask(target, address, format, FORMAT_MAX).await? {
                ToEngine::Formatted => Ok(()),
                ToEngine::Refused(refused) => Err(target.refused(address, refused.text)),
                other => Err(target.refused(address, format!("unexpected answer {}", other.number()))),
            }
        }
    }
}

/// Sends one message to an agent and waits for the answer.
async fn ask(
    target: &Target<'_>,
    address: &Endpoint,
    question: ToAgent,
    time_max: Duration,
) -> Result<ToEngine, CreateError> {
    let timed_out = |_| ConnectionError::Io(std::io::ErrorKind::TimedOut.into());
    let asking = async {
        match address {
            Endpoint::Tcp { host, port } => {
                let (reader, writer) = TcpStream::connect((host.as_str(), *port)).await?.into_split();
                converse(reader, writer, question).await
            }
            Endpoint::Unix(path) => {
                let (reader, writer) = UnixStream::connect(path).await?.into_split();
                converse(reader, writer, question).await
            }
        }
    };
    let answered = tokio::time::timeout(time_max, asking).await.map_err(timed_out).and_then(|answer| answer);
    answered.map_err(|e| target.agent_error(address, e))
}

async fn converse(
    reader: impl AsyncRead + Unpin,
    mut writer: impl AsyncWrite + Unpin,
    question: ToAgent,
) -> Result<ToEngine, ConnectionError> {
    write_frames(&mut writer, vec![frame_to_agent(&question)]).await?;
    let mut answers = FrameReader::new(reader).read(Prefix::to_engine).await?;
    answers.drain(..).next().ok_or(ConnectionError::Closed)
}
