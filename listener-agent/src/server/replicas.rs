//! The replicas of an agent's data directory: opening them, making new ones, closing them all.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use protocol::ReplicaName;
use protocol::message::{Format, Hello, Refused, RefusedReason};
use tracing::info;

use super::AgentError;
use crate::directory::{self, DirectoryError, NewReplica};
use crate::host::{Reach, ReplicaHost};
use crate::image::is_size_allowed;
use crate::journal;
use crate::superblock::Identity;

/// The replicas of the data directory, by volume.
pub(super) struct Replicas {
    data: PathBuf,
    /// Block devices for new replicas, by volume.
    images: BTreeMap<ReplicaName, PathBuf>,
    pub(super) slots: Mutex<BTreeMap<ReplicaName, Slot>>,
}

impl Replicas {
    /// The replicas in `data`; none is open yet.
    pub(super) fn new(data: PathBuf, images: BTreeMap<ReplicaName, PathBuf>) -> Replicas {
        Replicas { data, images, slots: Mutex::default() }
    }
}

/// The place of one replica. Locked while it is opened or made, which may take minutes: the other volumes must not wait
/// for that.
pub(super) type Slot = Arc<Mutex<Option<Arc<ReplicaHost>>>>;

pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread panicked with the lock")
}

pub(super) fn volumes_in(data: &Path) -> io::Result<Vec<ReplicaName>> {
    let mut volumes = Vec::new();
    for entry in std::fs::read_dir(data)? {
        let entry = entry?;
        let name = entry.file_name().into_string().ok().and_then(|n| n.parse().ok());
        if let Some(name) = name.filter(|_| directory::holds_replica(&entry.path())) {
            volumes.push(name);
        }
    }
    volumes.sort();
    Ok(volumes)
}

impl Replicas {
    /// The volumes whose replicas are open.
    pub(super) fn open_volumes(&self) -> Vec<String> {
        locked(&self.slots)
            .iter()
            .filter(|(_, slot)| locked(slot).is_some())
            .map(|(volume, _)| volume.to_string())
            .collect()
    }

    /// The replica of `volume`, opened if it is not yet: it may have been put there since.
    pub(super) fn host(&self, volume: &ReplicaName) -> Result<Arc<ReplicaHost>, DirectoryError> {
        let path = self.data.join(volume.as_str());
        let slot = match locked(&self.slots).get(volume) {
            Some(slot) => slot.clone(),
            // Names that mean nothing here are not remembered.
            None if !directory::holds_replica(&path) => return Err(DirectoryError::Missing { path }),
            None => Slot::default(),
        };
        let slot = locked(&self.slots).entry(volume.clone()).or_insert(slot).clone();
        let mut open = locked(&slot);
        if let Some(host) = &*open {
            return Ok(host.clone());
        }
        let host = Arc::new(ReplicaHost::open(&path, Reach::Network)?);
        *open = Some(host.clone());
        Ok(host)
    }

    pub(super) fn greet(&self, hello: &Hello) -> Result<Arc<ReplicaHost>, Refused> {
        let host = self.host(&hello.volume).map_err(|e| match e {
            DirectoryError::Missing { .. } => {
                refused(RefusedReason::NoReplica, format!("the agent holds no replica of volume {}", hello.volume))
            }
            other => refused(RefusedReason::Unusable, other.to_string()),
        })?;
        let (volume, replica) = (&host.identity().volume, &host.identity().replica);
        if *volume != hello.volume || *replica != hello.replica {
            let text = format!("the agent holds replica {replica} of volume {volume} there");
            return Err(refused(RefusedReason::NoReplica, text));
        }
        Ok(host)
    }

    pub(super) fn format(&self, format: Format) -> Result<(), Refused> {
        let unusable = |text: String| refused(RefusedReason::Unusable, text);
        let sound = is_size_allowed(format.size_bytes)
            && is_size_allowed(format.journal_bytes)
            && format.journal_bytes >= journal::FILE_BYTES_MIN
            && format.view.contains(&format.replica);
        if !sound {
            return Err(unusable("the sizes or members of the new replica make no sense".to_owned()));
        }
        let slot = locked(&self.slots).entry(format.volume.clone()).or_default().clone();
        let mut open = locked(&slot);
        let dir = self.data.join(format.volume.as_str());
        // One that never served may be made anew; the lock on it is given back first.
        open.take_if(|host| host.is_pristine());
        let identity = Identity {
            uuid: format.uuid,
            volume: format.volume,
            replica: format.replica,
            size_bytes: format.size_bytes,
            journal_bytes: format.journal_bytes,
        };
        let label = format!("volume {} replica {}", identity.volume, identity.replica);
        let image = self.images.get(&identity.volume).cloned();
        directory::create(&dir, &NewReplica { identity, view: format.view, image, syncing: format.syncing }).map_err(
            |e| match e {
                DirectoryError::HasData { .. } | DirectoryError::InUse { .. } => {
                    refused(RefusedReason::HasData, e.to_string())
                }
                other => unusable(other.to_string()),
            },
        )?;
        info!("{label}: made in {}", dir.display());
        Ok(())
    }

    pub(super) fn close_all(&self, deadline: Instant) -> Result<(), AgentError> {
        let slots = std::mem::take(&mut *locked(&self.slots));
        // One that is still being opened or made has served nobody, and is begun anew at the next start.
        let open = slots.iter().filter_map(|(volume, slot)| Some((volume, slot.try_lock().ok()?.take()?)));
        let mut outcome = Ok(());
        std::thread::scope(|scope| {
            let closing: Vec<_> =
                open.map(|(volume, host)| (volume, scope.spawn(move || host.close(deadline)))).collect();
            for (volume, thread) in closing {
                if !thread.join().unwrap_or(false) {
                    outcome = Err(AgentError::Unclean { volume: volume.to_string() });
                }
            }
        });
        outcome
    }
}

pub(super) fn refused(reason: RefusedReason, text: String) -> Refused {
    Refused { reason, text }
}
