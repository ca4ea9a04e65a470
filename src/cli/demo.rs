//! `nbdcast demo`: a volume with its replicas in one directory, without a config file to write first.
//!
//! Owns the demo's config, kept as DIR/engine.toml from the first successful start on: from then on the directory is an
//! ordinary engine's, and `nbdcast serve --config DIR/engine.toml` serves it as well. `--listen`, `--admin` and
//! `--tls` hold for one run and are not kept.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use listener_agent::config::ByteSize;
use listener_agent::console::{Failure, say};

use super::{DemoArgs, not_created, serve, unusable};
use crate::admin::client::AdminUrl;
use crate::config::{EngineConfig, LoadError};
use crate::nbd::ListeningSocket;
use crate::runtime::{self, StartOptions};

const VOLUME: &str = "demo";
const SIZE_DEFAULT: ByteSize = ByteSize::gib(1);
const REPLICAS_DEFAULT: u8 = 3;

pub(super) async fn run(args: DemoArgs, sockets: Vec<ListeningSocket>) -> Result<(), Failure> {
    let dir = directory(&args.dir)?;
    let config_file = dir.join("engine.toml");
    let mut config =
        if config_file.exists() { existing(&args, &config_file)? } else { create(&args, &dir, &config_file).await? };
    if let Some(listen) = args.listen {
        config.nbd.listen = vec![listen];
    }
    if let Some(mode) = args.tls {
        config.nbd.tls.mode = mode;
        config.nbd.tls.certificates = args.tls_certificates;
    }
    if let Some(listen) = args.admin {
        config.admin.listen = listen;
    }
    config.check(&config_file).map_err(unusable)?;
    serve::run(&config, StartOptions { take_over: false, sockets }, |uri, admin| announce(uri, admin, &dir)).await
}

/// The demo's directory, created if needed, as an absolute path without links.
fn directory(dir: &Path) -> Result<PathBuf, Failure> {
    fs::create_dir_all(dir).and_then(|()| fs::canonicalize(dir)).map_err(|error| {
        let dir = dir.display();
        Failure::failed(format_args!("cannot create the directory {dir}: {error}"))
            .remedy("give a directory that you may write to with --dir DIR")
    })
}

/// The config of an earlier start. What was fixed then and is asked for now must agree.
fn existing(args: &DemoArgs, config_file: &Path) -> Result<EngineConfig, Failure> {
    let config = EngineConfig::load(config_file).map_err(unusable)?;
    let Some(volume) = config.volumes.iter().find(|v| v.name == VOLUME) else {
        let file = config_file.display();
        return Err(Failure::usage(format_args!("{file} has no volume {VOLUME:?}"))
            .remedy(format_args!("serve it with `nbdcast serve --config {file}`, or give another --dir")));
    };
    let differs = |what: &str, is: String, asked: String| {
        let file = config_file.display();
        Failure::usage(format_args!("the volume {VOLUME:?} of {file} was created with {what} {is}, not {asked}"))
            .remedy(format_args!("leave out {what}, or give another --dir for a new volume"))
    };
    if let Some(size) = args.size.filter(|size| *size != volume.size) {
        return Err(differs("--size", volume.size.to_string(), size.to_string()));
    }
    let replicas = volume.replicas.len();
    if let Some(asked) = args.replicas.filter(|asked| usize::from(*asked) != replicas) {
        return Err(differs("--replicas", replicas.to_string(), asked.to_string()));
    }
    Ok(config)
}

/// Formats the replicas, then keeps the config: its presence says that the volume is complete.
async fn create(args: &DemoArgs, dir: &Path, config_file: &Path) -> Result<EngineConfig, Failure> {
    let size = args.size.unwrap_or(SIZE_DEFAULT);
    let text = config_text(size, args.replicas.unwrap_or(REPLICAS_DEFAULT));
    let config = EngineConfig::parse(config_file, &text).map_err(|error| match error {
        // The only value from outside is the size, and the operator has not seen the file.
        LoadError::Invalid { problem, .. } => {
            Failure::usage(format_args!("--size {size}: {problem}")).remedy(problem.remedy())
        }
        LoadError::File(_) => unusable(error),
    })?;
    runtime::create(&config, Some(VOLUME)).await.map_err(|error| {
        let failure = not_created(error);
        match failure.remedy {
            Some(_) => failure,
            None => failure.remedy(start_again(dir)),
        }
    })?;
    keep(config_file, &text).map_err(|error| {
        let file = config_file.display();
        Failure::failed(format_args!("cannot write {file}: {error}")).remedy(start_again(dir))
    })?;
    Ok(config)
}

/// Advice after a creation that ended half-way: no client was ever served from it.
fn start_again(dir: &Path) -> String {
    format!(
        "make sure that there is room; if an earlier `nbdcast demo` ended while creating, remove {}/*/{VOLUME} and start again",
        dir.display()
    )
}

/// The demo's config. Every limit is left at its default but the lag, which decides how much journal is written out at
/// creation, once per replica.
fn config_text(size: ByteSize, replicas: u8) -> String {
    let mut text = format!(
        "# Written by `nbdcast demo`; an ordinary engine config. config/engine.toml of nbdcast shows every key.\n\
         [state]\ndirectory = \"state\"\n\n[[volume]]\nname = \"{VOLUME}\"\nsize = \"{size}\"\n\
         lag_bytes_max = \"64MiB\"\njournal_size = \"192MiB\"\non_lag = \"throttle\"\n"
    );
    for name in ('a'..='z').take(replicas.into()) {
        text.push_str(&format!("\n[[volume.replica]]\nname = \"{name}\"\npath = \"{name}\"\n"));
    }
    text
}

/// Writes the file so that it is there whole or not at all, also after a power cut.
fn keep(file: &Path, text: &str) -> io::Result<()> {
    let new = file.with_extension("toml.new");
    let mut writer = fs::File::create(&new)?;
    writer.write_all(text.as_bytes())?;
    writer.sync_all()?;
    fs::rename(&new, file)?;
    match file.parent() {
        Some(dir) => fs::File::open(dir)?.sync_all(),
        None => Ok(()),
    }
}

/// The bare URI on standard output, for scripts; what to do with it on standard error, for people.
fn announce(uri: &str, admin: &AdminUrl, dir: &Path) -> Result<(), Failure> {
    say(uri)?;
    let text = hints(uri, admin, dir);
    // Without standard error there is nobody to help.
    let _ = io::stderr().write_all(text.as_bytes());
    Ok(())
}

fn hints(uri: &str, admin: &AdminUrl, dir: &Path) -> String {
    let mut text = format!("The replicas are in {}; stop with Ctrl-C. Try in another shell:\n", dir.display());
    let is_tls = uri.starts_with("nbds");
    if is_tls {
        let separator = if uri.contains('?') { '&' } else { '?' };
        text.push_str(&format!("  nbdinfo '{uri}{separator}tls-certificates='$HOME/certs\n"));
    } else {
        text.push_str(&format!("  nbdinfo '{uri}'\n"));
        if let Some((host, port)) = tcp_of(uri) {
            let device = "/dev/nbd0";
            text.push_str(&format!(
                "  sudo nbd-client {host} {port} {device} -N {VOLUME} && sudo mkfs.ext4 {device}\n"
            ));
        }
        // fio takes no certificates.
        text.push_str(&format!(
            "  fio --name=try --ioengine=nbd --uri='{uri}' --rw=randwrite --bs=4k --iodepth=32 --size=64M --verify=crc32c\n"
        ));
    }
    text.push_str(&format!("  nbdcast status --admin {admin}\n"));
    if is_tls {
        text.push_str("`nbdcast certs --client NAME` makes what is meant to be in ~/certs.\n");
    }
    text
}

/// Host and port of a URI nbd://HOST:PORT/EXPORT; none for a Unix socket.
fn tcp_of(uri: &str) -> Option<(&str, &str)> {
    let (authority, _export) = uri.strip_prefix("nbd://")?.split_once('/')?;
    let (host, port) = authority.rsplit_once(':')?;
    Some((host.trim_matches(['[', ']']), port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ReplicaPlace;

    fn args(dir: &Path) -> DemoArgs {
        DemoArgs {
            dir: dir.to_owned(),
            size: None,
            replicas: None,
            listen: None,
            admin: None,
            tls: None,
            tls_certificates: None,
        }
    }

    #[test]
    fn the_demo_config_is_valid_for_every_number_of_replicas() {
        for replicas in 1..=16 {
            let text = config_text(ByteSize::gib(1), replicas);
            let config = EngineConfig::parse(Path::new("/demo/engine.toml"), &text).expect(&text);
            let volume = &config.volumes[0];
            assert_eq!(volume.replicas.len(), usize::from(replicas));
            assert_eq!(volume.replicas[0].name, "a");
            let place = ReplicaPlace::Embedded { path: "/demo/a".into(), image: None };
            assert_eq!(volume.replicas[0].place, place);
        }
    }

    #[test]
    fn a_second_start_takes_the_volume_as_it_is_unless_asked_for_another() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let file = dir.path().join("engine.toml");
        keep(&file, &config_text(ByteSize::mib(64), 2)).expect("write the config");
        let mut args = args(dir.path());
        let config = existing(&args, &file).expect("nothing particular asked for");
        assert_eq!(config.volumes[0].size, ByteSize::mib(64));
        (args.size, args.replicas) = (Some(ByteSize::mib(64)), Some(2));
        existing(&args, &file).expect("asked for what is there");

        args.size = Some(ByteSize::gib(1));
        let failure = existing(&args, &file).expect_err("another size");
        assert_eq!(failure.exit_code, 2);
        assert!(failure.message.ends_with("was created with --size 64MiB, not 1GiB"));
        (args.size, args.replicas) = (None, Some(3));
        let failure = existing(&args, &file).expect_err("another number of replicas");
        assert!(failure.message.ends_with("was created with --replicas 2, not 3"));
    }

    #[tokio::test]
    async fn a_size_that_no_volume_can_have_is_a_usage_error() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let mut args = args(dir.path());
        args.size = Some(ByteSize::from_bytes(1000));
        let file = dir.path().join("engine.toml");
        let failure = create(&args, dir.path(), &file).await.expect_err("too small");
        assert_eq!(failure.exit_code, 2);
        assert!(failure.message.contains("size = 1000 is out of range"), "{}", failure.message);
        assert!(!file.exists());
    }

    #[test]
    fn the_hints_fit_the_kind_of_socket() {
        let admin = "http://127.0.0.1:10808".parse().expect("a URL");
        let tcp = hints("nbd://127.0.0.1:10809/demo", &admin, Path::new("/d"));
        assert!(tcp.contains("nbd-client 127.0.0.1 10809 /dev/nbd0 -N demo"), "{tcp}");
        let unix = hints("nbd+unix:///demo?socket=/run/x", &admin, Path::new("/d"));
        assert!(unix.contains("nbdinfo 'nbd+unix:///demo?socket=/run/x'"), "{unix}");
        assert!(!unix.contains("nbd-client"), "{unix}");
    }

    #[test]
    fn the_hints_for_tls_name_certificates() {
        let admin = "http://127.0.0.1:10808".parse().expect("a URL");
        let tcp = hints("nbds://127.0.0.1:10809/demo", &admin, Path::new("/d"));
        assert!(tcp.contains("nbdinfo 'nbds://127.0.0.1:10809/demo?tls-certificates='$HOME/certs\n"), "{tcp}");
        assert!(!tcp.contains("nbd-client") && !tcp.contains("fio"), "{tcp}");
        let unix = hints("nbds+unix:///demo?socket=/run/x", &admin, Path::new("/d"));
        assert!(unix.contains("?socket=/run/x&tls-certificates='$HOME/certs\n"), "{unix}");
    }
}
