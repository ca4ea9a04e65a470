//! Making replicas. For a new volume all of them are looked at first, so that nothing is begun if one holds data or cannot
//! be reached; then each is formatted. A replica that a volume at work lacks is made in the same way, marked as one that
//! must be copied to before it counts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use listener_agent::config::{ByteSize, Endpoint};
use listener_agent::connection::{ConnectionError, FrameReader, write_frames};
use listener_agent::directory::{self, DirectoryError, NewReplica};
use listener_agent::superblock::Identity;
use listener_agent::tls::TlsError;
use protocol::message::{Format, Hello, RefusedReason};
use protocol::wire::{Prefix, frame_to_agent};
use protocol::{Epoch, ToAgent, ToEngine, View, VolumeUuid};
use tracing::info;

use super::dial::{Agents, Reader, Trouble, Writer};
use super::seat::name;
use crate::config::{EngineConfig, ReplicaConfig, ReplicaPlace, VolumeConfig};

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
    /// The certificates for agents cannot be used.
    #[error("agents.certificates: {0}")]
    Tls(#[from] TlsError),
    /// A replica cannot be made.
    #[error(transparent)]
    Replica(#[from] FormatError),
}

/// Why a replica is not made.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
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
        cause: Trouble,
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
            CreateError::NoVolume { .. } | CreateError::Tls(_) => 2,
            CreateError::Replica(_) => 1,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            CreateError::NoVolume { .. } => Some("give one of these names, or none for all".to_owned()),
            CreateError::Tls(cause) => Some(cause.remedy()),
            CreateError::Replica(cause) => cause.remedy(),
        }
    }
}

impl FormatError {
    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            FormatError::Directory { cause, .. } => cause.remedy(),
            FormatError::Agent { address, cause, .. } => Some(cause.remedy().map_or_else(
                || format!("start it: listener-agent --listen {address} --data DIR; or correct `address`"),
                str::to_owned,
            )),
            FormatError::Refused { .. } => {
                Some("to begin anew, stop the agent and move its DATA/VOLUME directory away first".to_owned())
            }
        }
    }
}

/// A replica to be made.
pub(super) struct Target<'a> {
    /// The name of its volume.
    pub(super) volume: &'a str,
    /// Its name, and where it is to be.
    pub(super) replica: &'a ReplicaConfig,
    /// How agents are reached.
    pub(super) agents: &'a Agents,
}

/// What it is to be.
pub(super) struct Shape {
    /// The volume's identity.
    pub(super) uuid: VolumeUuid,
    /// Size of the volume, bytes.
    pub(super) size_bytes: u64,
    /// Size of the journal, bytes.
    pub(super) journal_bytes: u64,
    /// The first view that it knows.
    pub(super) view: View,
    /// It must be copied to before it counts.
    pub(super) syncing: bool,
}

/// What is where a replica is to be.
pub(super) enum Found {
    /// Nothing that would be lost.
    Nothing,
    /// This replica of that volume; it never served, so that it may be made anew.
    Unserved(VolumeUuid),
    /// This replica of that volume.
    Replica(VolumeUuid),
}

impl Target<'_> {
    fn directory_error(&self, cause: DirectoryError) -> FormatError {
        FormatError::Directory { volume: self.volume.to_owned(), replica: self.replica.name.clone(), cause }
    }

    fn agent_error(&self, address: &Endpoint, cause: impl Into<Trouble>) -> FormatError {
        let (volume, replica) = (self.volume.to_owned(), self.replica.name.clone());
        FormatError::Agent { volume, replica, address: address.clone(), cause: cause.into() }
    }

    fn refused(&self, address: &Endpoint, text: String) -> FormatError {
        let (volume, replica) = (self.volume.to_owned(), self.replica.name.clone());
        FormatError::Refused { volume, replica, address: address.clone(), text }
    }

    /// The refusal of a place with data of another volume.
    pub(super) fn has_data(&self, uuid: VolumeUuid) -> FormatError {
        match &self.replica.place {
            ReplicaPlace::Embedded { path, .. } => self.directory_error(DirectoryError::HasData {
                path: self.dir(path),
                volume: self.volume.to_owned(),
                replica: self.replica.name.clone(),
                uuid,
            }),
            ReplicaPlace::Agent { address, .. } => self.refused(address, format!("it holds data of volume {uuid}")),
        }
    }

    fn dir(&self, path: &Path) -> PathBuf {
        path.join(self.volume)
    }
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
    let agents = Agents::new(&config.agents)?;
    let mut lines = Vec::new();
    for volume in chosen {
        let targets =
            || volume.replicas.iter().map(|replica| Target { volume: &volume.name, replica, agents: &agents });
        for target in targets() {
            match look_at(&target).await? {
                Found::Nothing | Found::Unserved(_) => {}
                Found::Replica(uuid) => return Err(target.has_data(uuid).into()),
            }
        }
        let shape = Shape {
            uuid: VolumeUuid(*uuid::Uuid::new_v4().as_bytes()),
            size_bytes: volume.size.bytes(),
            journal_bytes: volume.journal_size().bytes(),
            view: View::new(targets().map(|t| name(&t.replica.name)).collect())
                .expect("replicas are checked with the configuration"),
            syncing: false,
        };
        for target in targets() {
            format(&target, &shape).await?;
            lines.push(format!("created volume {} ({}), replica {}", volume.name, shape.uuid, target.replica.name));
        }
    }
    Ok(lines)
}

/// What is where the replica is to be. An error if it is something else than a replica of this name and of a volume of
/// this name, or cannot be reached.
pub(super) async fn look_at(target: &Target<'_>) -> Result<Found, FormatError> {
    match &target.replica.place {
        ReplicaPlace::Embedded { path, .. } => match directory::refuse_data(&target.dir(path)) {
            Ok(()) => Ok(Found::Nothing),
            Err(DirectoryError::HasData { volume, replica, uuid, .. })
                if volume == target.volume && replica == target.replica.name =>
            {
                Ok(Found::Replica(uuid))
            }
            Err(e) => Err(target.directory_error(e)),
        },
        ReplicaPlace::Agent { address, .. } => {
            let (volume, replica) = (name(target.volume), name(&target.replica.name));
            let hello = ToAgent::Hello(Hello { volume, replica, engine: *uuid::Uuid::new_v4().as_bytes() });
            match ask(target, address, hello, GREET_MAX).await? {
                ToEngine::Welcome(welcome) if welcome.promised == Epoch(0) => Ok(Found::Unserved(welcome.uuid)),
                ToEngine::Welcome(welcome) => Ok(Found::Replica(welcome.uuid)),
                ToEngine::Refused(refused) if refused.reason == RefusedReason::NoReplica => Ok(Found::Nothing),
                ToEngine::Refused(refused) => Err(target.refused(address, refused.text)),
                other => Err(target.refused(address, format!("unexpected answer {}", other.number()))),
            }
        }
    }
}

/// Makes the replica. The place must have room for it.
pub(super) async fn format(target: &Target<'_>, shape: &Shape) -> Result<(), FormatError> {
    let Shape { uuid, size_bytes, journal_bytes, ref view, syncing } = *shape;
    let journal = ByteSize::from_bytes(journal_bytes);
    info!("volume {}, replica {}: formatting, journal of {journal}", target.volume, target.replica.name);
    let (volume, replica, view) = (name(target.volume), name(&target.replica.name), view.clone());
    match &target.replica.place {
        ReplicaPlace::Embedded { path, image } => {
            let identity = Identity { uuid, volume, replica, size_bytes, journal_bytes };
            let new = NewReplica { identity, view, image: image.clone(), syncing };
            let dir = target.dir(path);
            let io_failed = |e| DirectoryError::Io { path: dir.clone(), cause: std::io::Error::other(e) };
            let making = dir.clone();
            let made = tokio::task::spawn_blocking(move || directory::create(&making, &new)).await;
            made.unwrap_or_else(|e| Err(io_failed(e))).map_err(|e| target.directory_error(e))
        }
        ReplicaPlace::Agent { address, .. } => {
            let format = Format { volume, replica, uuid, size_bytes, journal_bytes, view, syncing };
            match ask(target, address, ToAgent::Format(format), FORMAT_MAX).await? {
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
) -> Result<ToEngine, FormatError> {
    let timed_out = |_| Trouble::from(ConnectionError::Io(std::io::ErrorKind::TimedOut.into()));
    let asking = async {
        let certificate = target.replica.certificate().unwrap_or(&target.replica.name);
        let (reader, writer) = target.agents.way_to(address, certificate).connect().await?;
        converse(reader, writer, question).await.map_err(Trouble::from)
    };
    let answered = tokio::time::timeout(time_max, asking).await.map_err(timed_out).and_then(|answer| answer);
    answered.map_err(|e| target.agent_error(address, e))
}

async fn converse(reader: Reader, mut writer: Writer, question: ToAgent) -> Result<ToEngine, ConnectionError> {
    write_frames(&mut writer, vec![frame_to_agent(&question)]).await?;
    let mut answers = FrameReader::new(reader).read(Prefix::to_engine).await?;
    answers.drain(..).next().ok_or(ConnectionError::Closed)
}
