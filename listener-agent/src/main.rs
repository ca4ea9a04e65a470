//! The `listener-agent` program: command line and the foreground server.
//!
//! Owns no logic of replicas: it parses arguments, calls the library and prints what comes back.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use listener_agent::config::{AGENT_SAMPLE, AgentConfig, Endpoint, OPEN_WORDS};
use listener_agent::console::{self, ConsoleArgs, Failure, SHUTDOWN_MAX, ShutdownSignals, say};
use listener_agent::inspect::{self, VerifyReport};
use listener_agent::rebuild;
use listener_agent::server::AgentServer;
use listener_agent::service::{self, PassedSocket};
use tokio::sync::watch;

const PROGRAM: &str = "listener-agent";

/// Holds one full replica of each nbdcast volume in a data directory and serves it to the engine
#[derive(Debug, Parser)]
#[command(
    name = PROGRAM,
    version,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: Option<ServeArgs>,
    #[command(flatten)]
    console: ConsoleArgs,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct ServeArgs {
    /// Config file; config/listener-agent.toml is a complete sample
    #[arg(long, value_name = "FILE", conflicts_with_all = ["listen", "data", "tls_certificates", "insecure"])]
    config: Option<PathBuf>,
    /// Where engines connect: host:port or unix:/path [default: 127.0.0.1:10811]
    #[arg(long, value_name = "ADDRESS", requires = "data")]
    listen: Option<Endpoint>,
    /// Data directory; each volume has its replica in DIR/VOLUME/
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Directory with ca-cert.pem, server-cert.pem and server-key.pem: only engines with a certificate may connect
    #[arg(long, value_name = "DIR", requires = "data")]
    tls_certificates: Option<PathBuf>,
    /// Let other machines connect without TLS
    #[arg(long, requires = "data")]
    insecure: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show what a replica directory holds, without a running agent: identity, position, view, journal
    Inspect {
        /// Directory of one replica: DATA/VOLUME
        dir: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check every block of a replica against its checksum, without a running agent; exit code 1 if any is bad
    Verify {
        /// Directory of one replica: DATA/VOLUME
        dir: PathBuf,
    },
    /// Make lost checksums of a replica anew from its image, which is taken on trust: a block that rotted is good from then on
    RebuildChecksums {
        /// Directory of one replica: DATA/VOLUME
        dir: PathBuf,
        /// Also if the checksums are not lost
        #[arg(long)]
        force: bool,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.console.init_logging();
    service::raise_file_limit();
    let passed = service::passed_sockets();
    // Replicas have threads of their own for most of the work. More for connections would wake each other for nothing.
    console::run(PROGRAM, console::processors() / 2, async {
        let passed = passed?;
        match (cli.command, cli.serve) {
            (Some(Command::Inspect { dir, json }), _) => inspect_directory(&dir, json),
            (Some(Command::Verify { dir }), _) => verify_directory(&dir),
            (Some(Command::RebuildChecksums { dir, force }), _) => rebuild_checksums(&dir, force),
            (None, Some(args)) => serve(agent_config(args)?, passed).await,
            (None, None) => Err(nothing_to_serve()),
        }
    })
}

fn nothing_to_serve() -> Failure {
    Failure::usage("no data directory was given")
        .remedy("give --config FILE, or --data DIR with --listen ADDRESS if the default is not wanted")
}

fn agent_config(args: ServeArgs) -> Result<AgentConfig, Failure> {
    if let Some(file) = args.config {
        return AgentConfig::load(&file).map_err(|error| Failure::usage(&error).remedy(error.remedy(AGENT_SAMPLE)));
    }
    let data = args.data.ok_or_else(nothing_to_serve)?;
    let listen = args.listen.unwrap_or_else(AgentConfig::default_listen);
    let mut config = AgentConfig::new(listen, data);
    config.tls.certificates = args.tls_certificates;
    config.insecure = args.insecure;
    refuse_open(&config, "--listen")?;
    Ok(config)
}

fn refuse_open(config: &AgentConfig, what: &str) -> Result<(), Failure> {
    if !config.is_open() {
        return Ok(());
    }
    Err(Failure::usage(format_args!("{what} {}: {OPEN_WORDS}", config.listen)).remedy(
        "use certificates (`nbdcast certs` makes them; --tls-certificates DIR, or `certificates` in [tls]), listen at a \
         loopback address or a Unix socket, or allow it with --insecure or `insecure = true`",
    ))
}

/// An agent listens at one place.
fn only(mut passed: Vec<PassedSocket>) -> Result<Option<PassedSocket>, Failure> {
    if passed.len() > 1 {
        return Err(Failure::usage(format_args!("{} sockets were passed in LISTEN_FDS", passed.len()))
            .remedy("keep one ListenStream= in the .socket unit"));
    }
    Ok(passed.pop())
}

/// Serves until a signal; then gives what is in flight a bounded time to finish.
async fn serve(mut config: AgentConfig, passed: Vec<PassedSocket>) -> Result<(), Failure> {
    let passed = only(passed)?;
    if let Some(socket) = &passed {
        let unusable = |error| Failure::failed(format_args!("cannot use the socket passed in LISTEN_FDS: {error}"));
        config.listen = socket.endpoint().map_err(unusable)?;
        refuse_open(&config, "the socket passed in LISTEN_FDS,")?;
    }
    let mut signals = ShutdownSignals::install()?;
    let fail = |error: listener_agent::server::AgentError| Failure {
        exit_code: error.exit_code(),
        remedy: error.remedy(),
        message: error.to_string(),
    };
    let server = AgentServer::bind_at(&config, passed).await.map_err(fail)?;
    say(format_args!("ready {}", server.local_address()))?;
    service::ready(&format!("listens at {}", server.local_address()));

    let (stop, stopping) = watch::channel(false);
    let mut serving = tokio::spawn(server.serve(stopping));
    let ended = tokio::select! {
        ended = &mut serving => ended,
        name = signals.next() => {
            tracing::info!(signal = name, "stopping");
            service::stopping();
            signals.exit_on_next(PROGRAM);
            stop.send_replace(true);
            tokio::time::timeout(SHUTDOWN_MAX, serving).await.map_err(|_| {
                Failure::failed(format_args!(
                    "work in flight did not finish within {} ms; stopped without marking the replicas clean",
                    SHUTDOWN_MAX.as_millis()
                ))
                .remedy("check the disk of the data directory; the next start replays the journal")
            })?
        }
    };
    match ended {
        Ok(served) => served.map_err(fail),
        Err(error) => Err(Failure::failed(format_args!("the server task ended: {error}"))),
    }
}

fn failure(error: impl std::fmt::Display, remedy: Option<String>) -> Failure {
    let failure = Failure::failed(&error);
    match remedy {
        Some(remedy) => failure.remedy(remedy),
        None => failure,
    }
}

fn inspect_failure(error: inspect::InspectError) -> Failure {
    let remedy = error.remedy();
    failure(error, remedy)
}

fn inspect_directory(dir: &Path, json: bool) -> Result<(), Failure> {
    let report = inspect::inspect(dir).map_err(inspect_failure)?;
    if !json {
        return say(report);
    }
    let json = serde_json::to_string_pretty(&report)
        .map_err(|error| Failure::failed(format_args!("cannot write the report: {error}")))?;
    say(json)
}

fn verify_directory(dir: &Path) -> Result<(), Failure> {
    let mut progress = Progress::new("verify");
    let report = inspect::verify(dir, &mut |done, total| progress.show(done, total));
    progress.clear();
    let report = report.map_err(inspect_failure)?;
    report.bad.iter().try_for_each(say)?;
    verdict(dir, &report)
}

fn verdict(dir: &Path, report: &VerifyReport) -> Result<(), Failure> {
    let (dir, blocks, bad) = (dir.display(), report.blocks, report.bad.len());
    if report.in_journal > 0 {
        say(format_args!(
            "{dir}: {} blocks not judged, as the journal repairs them at the next start",
            report.in_journal
        ))?;
    }
    if report.checksums_too_long_bytes > 0 {
        say(format_args!("{dir}/checksums is {} bytes longer than needed", report.checksums_too_long_bytes))?;
    }
    if bad == 0 {
        return say(format_args!("{dir}: {} blocks, all good", blocks - report.in_journal));
    }
    Err(Failure::failed(format_args!("{dir}: {bad} of {blocks} blocks are bad"))
        .remedy("keep the directory; another replica of the volume holds these blocks"))
}

fn rebuild_checksums(dir: &Path, force: bool) -> Result<(), Failure> {
    let mut progress = Progress::new("rebuild-checksums");
    let report = rebuild::rebuild_checksums(dir, force, &mut |done, total| progress.show(done, total));
    progress.clear();
    let report = report.map_err(|error| {
        let remedy = error.remedy();
        failure(error, remedy)
    })?;
    let shown = dir.display();
    say(format_args!("{shown}: checksums of {} blocks made from the image as it is", report.blocks))?;
    if let Some(kept) = &report.kept {
        say(format_args!("the checksums before are in {}", kept.display()))?;
    }
    say(
        "what the image holds is taken on trust: compare the replica with the others, by `nbdcast scrub VOLUME`, once it is \
         in service",
    )?;
    report.unreadable.iter().try_for_each(|offset| say(format_args!("unreadable block at byte {offset}")))?;
    if report.unreadable.is_empty() {
        return Ok(());
    }
    Err(Failure::failed(format_args!("{shown}: {} blocks cannot be read and count as bad", report.unreadable.len()))
        .remedy("check the disk; another replica of the volume holds these blocks"))
}

/// The percentage line of a command that takes long, on standard error and only if that is a terminal.
struct Progress {
    what: &'static str,
    wanted: bool,
    shown: Option<u64>,
}

impl Progress {
    fn new(what: &'static str) -> Progress {
        Progress { what, wanted: io::stderr().is_terminal(), shown: None }
    }

    fn show(&mut self, done: u64, total: u64) {
        let percent =
            (u128::from(done) * 100).checked_div(u128::from(total)).and_then(|percent| u64::try_from(percent).ok());
        if self.wanted && percent.is_some() && percent != self.shown {
            self.shown = percent;
            // Progress is a courtesy: a lost terminal must not stop the check.
            let _ = write!(io::stderr(), "\r{}: {} %", self.what, percent.unwrap_or(100));
        }
    }

    fn clear(&mut self) {
        if self.shown.take().is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Cli, clap::error::ErrorKind> {
        Cli::try_parse_from([&[PROGRAM], args].concat()).map_err(|error| error.kind())
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn an_agent_is_served_from_a_file_or_from_arguments() {
        let config = parse(&["--config", "a.toml"]).expect("a config file");
        assert!(config.command.is_none());
        let args = parse(&["--listen", "127.0.0.1:0", "--data", "d"]).expect("arguments");
        let config = agent_config(args.serve.expect("serve arguments")).expect("a config");
        assert_eq!(config.listen.to_string(), "127.0.0.1:0");
        let args = parse(&["--data", "d"]).expect("a data directory");
        let config = agent_config(args.serve.expect("serve arguments")).expect("a config");
        assert_eq!(config.listen, AgentConfig::default_listen());
    }

    #[test]
    fn other_machines_are_let_in_by_certificate_or_if_it_is_said() {
        let config = |words: &[&str]| {
            let args = parse(&[&["--data", "d", "--listen", "0.0.0.0:0"], words].concat()).expect("arguments");
            agent_config(args.serve.expect("serve arguments"))
        };
        let refused = config(&[]).expect_err("neither was given");
        assert_eq!(refused.exit_code, 2);
        assert!(refused.message.starts_with("--listen 0.0.0.0:0: "), "{}", refused.message);
        let remedy = refused.remedy.expect("there is something to do");
        assert!(remedy.contains("--tls-certificates DIR") && remedy.contains("--insecure"), "{remedy}");
        assert!(config(&["--insecure"]).expect("it is said").insecure);
        let encrypted = config(&["--tls-certificates", "c"]).expect("certificates are given");
        assert_eq!(encrypted.tls.certificates, Some(PathBuf::from("c")));
    }

    #[test]
    fn half_or_doubled_arguments_are_usage_errors() {
        use clap::error::ErrorKind;
        assert_eq!(parse(&[]).unwrap_err(), ErrorKind::MissingRequiredArgument);
        assert_eq!(parse(&["--listen", "127.0.0.1:0"]).unwrap_err(), ErrorKind::MissingRequiredArgument);
        assert_eq!(parse(&["--config", "f", "--data", "d"]).unwrap_err(), ErrorKind::ArgumentConflict);
        assert_eq!(parse(&["--data", "d", "--listen", "nowhere"]).unwrap_err(), ErrorKind::ValueValidation);
    }

    #[test]
    fn the_offline_commands_need_nothing_else() {
        let cli = parse(&["inspect", "d/vol0", "--json", "-v"]).expect("inspect");
        assert!(matches!(cli.command, Some(Command::Inspect { json: true, .. })));
        let cli = parse(&["verify", "d/vol0"]).expect("verify");
        assert!(matches!(cli.command, Some(Command::Verify { .. })));
        let cli = parse(&["rebuild-checksums", "d/vol0", "--force"]).expect("rebuild-checksums");
        assert!(matches!(cli.command, Some(Command::RebuildChecksums { force: true, .. })));
    }
}
