//! Directories of certificates on disk: made whole or not at all, by one command at a time, keys for their owner only.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const LOCK_FILE: &str = ".lock";

/// Why certificates are not made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// A file or directory cannot be read or made.
    #[error("{}: {cause}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// The authority's key is no key.
    #[error("{} holds no private key that can be used", path.display())]
    Key {
        /// The file.
        path: PathBuf,
    },
    /// The authority's certificate does not go with its key, or something else made it.
    #[error("{} does not go with the key beside it, or was not made by this command", path.display())]
    ForeignAuthority {
        /// The file.
        path: PathBuf,
    },
    /// A certificate cannot be made.
    #[error("a certificate cannot be made: {0}")]
    Issue(#[from] rcgen::Error),
}

impl CertsError {
    /// What to do about it, as one line.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            CertsError::Io { path, cause }
                if cause.kind() == io::ErrorKind::NotFound && path.ends_with("ca-key.pem") =>
            {
                "certificates can be added only where the key of the CA is; bring it back, or begin a new set in another \
                 directory"
            }
            CertsError::Io { .. } => "check the path, its permissions and its disk",
            CertsError::Key { .. } | CertsError::ForeignAuthority { .. } => {
                "bring the two files of the CA back as they were, or begin a new set in another directory"
            }
            CertsError::Issue(_) => "check the names",
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> CertsError {
    let path = path.to_owned();
    |cause| CertsError::Io { path, cause }
}

/// Makes the directory of the whole set, unless it is there.
pub(super) fn make_root(path: &Path) -> Result<(), CertsError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed(path))
}

/// Waits until no other command is at work in the set at `root`; none is as long as the value lives.
pub(super) fn lock(root: &Path) -> Result<fs::File, CertsError> {
    let path = root.join(LOCK_FILE);
    // Not the directory itself, which network filesystems cannot lock. Left behind: whoever waits for a file that is
    // removed would hold the lock beside whoever makes it anew.
    let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    opened.and_then(|file| file.lock().map(|()| file)).map_err(failed(&path))
}

/// Whether there is something of this name.
pub(super) fn is_there(path: &Path) -> Result<bool, CertsError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(failed(path)(e)),
    }
}

pub(super) fn read(path: &Path) -> Result<String, CertsError> {
    fs::read_to_string(path).map_err(failed(path))
}

/// Who may read a file.
#[derive(Clone, Copy)]
pub(super) enum File {
    Certificate,
    Key,
}

/// A directory in the making: under another name until it is whole. Only for whoever has the lock.
pub(super) struct NewDirectory {
    path: PathBuf,
    unfinished: PathBuf,
}

impl NewDirectory {
    pub(super) fn begin(path: &Path) -> Result<NewDirectory, CertsError> {
        let mut name = std::ffi::OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(".new");
        let unfinished = path.with_file_name(name);
        // Of an earlier attempt that was interrupted, as we have the lock; nobody was given anything of it.
        if is_there(&unfinished)? {
            fs::remove_dir_all(&unfinished).map_err(failed(&unfinished))?;
        }
        DirBuilder::new().mode(0o700).create(&unfinished).map_err(failed(&unfinished))?;
        Ok(NewDirectory { path: path.to_owned(), unfinished })
    }

    pub(super) fn write(&self, name: &str, kind: File, text: &str) -> Result<(), CertsError> {
        let path = self.unfinished.join(name);
        let mode = match kind {
            File::Certificate => 0o644,
            File::Key => 0o600,
        };
        let written = OpenOptions::new().write(true).create_new(true).mode(mode).open(&path).and_then(|mut file| {
            file.write_all(text.as_bytes())?;
            file.sync_all()
        });
        written.map_err(failed(&path))
    }

    pub(super) fn finish(self) -> Result<(), CertsError> {
        let renamed = fs::File::open(&self.unfinished).and_then(|dir| dir.sync_all()).and_then(|()| {
            fs::rename(&self.unfinished, &self.path)?;
            let parent = self.path.parent().unwrap_or(Path::new("/"));
            fs::File::open(if parent.as_os_str().is_empty() { Path::new(".") } else { parent })?.sync_all()
        });
        renamed.map_err(failed(&self.path))
    }
}
