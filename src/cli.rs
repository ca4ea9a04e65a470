//! The `nbdcast` command line: its arguments, and which command does what.
//!
//! Owns usage, output and exit codes; the commands that take more than a few lines have files of their own. Decides
//! nothing about volumes: it hands a checked config to the engine and says what came of it.

mod certs;
mod demo;
mod orders;
mod progress;
mod serve;
mod snippet;
mod status;
mod top;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use listener_agent::config::{ByteSize, Endpoint};
use listener_agent::console::{self, ConsoleArgs, Failure, say};
use listener_agent::service;

use crate::admin::client::{AdminUrl, AskError};
use crate::certs::DAYS_MAX;
use crate::config::{EngineConfig, LoadError, TlsMode};
use crate::runtime::{self, StartOptions};

const PROGRAM: &str = "nbdcast";

/// A replicated NBD block device: every write goes to all replicas and is answered on the first durable copy
#[derive(Debug, Parser)]
#[command(name = PROGRAM, version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    console: ConsoleArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create if needed, and serve, a volume with replicas in one directory of this machine
    Demo(DemoArgs),
    /// Format all replicas of a new volume; refuses if any replica has data
    Create(CreateArgs),
    /// Serve the volumes of a config file, in the foreground; prints "ready URI" for each
    Serve(ServeArgs),
    /// Make the certificates of a cluster: a CA, and a directory each for the engine, its agents and clients
    Certs(CertsArgs),
    /// Show how a running engine, its volumes and replicas are doing
    Status(StatusArgs),
    /// Watch a running engine in the terminal; q ends it
    Top(EngineArgs),
    /// Add, remove, replace or resync a replica of a volume that is being served
    #[command(subcommand)]
    Replica(ReplicaCommand),
    /// Let a volume that is being served grow
    Resize(ResizeArgs),
    /// Read and compare all replicas of a volume that is being served, and repair bad blocks
    Scrub(ScrubArgs),
    /// Start a volume without replicas that are lost for good; what only they hold is lost
    Activate(ActivateArgs),
}

#[derive(Debug, Subcommand)]
enum ReplicaCommand {
    /// Format a new replica and copy the volume to it
    Add(AddArgs),
    /// Let a replica leave the volume for good; its files stay where they are
    Remove(RemoveArgs),
    /// Add a replica, and remove another when the new one holds everything
    Replace(ReplaceArgs),
    /// Bring back a replica that is out of the view now, without waiting for the next attempt
    Resync(ResyncArgs),
}

#[derive(Debug, Args)]
struct DemoArgs {
    /// Where the replicas are kept; a second start with the same directory serves the same volume
    #[arg(long, value_name = "DIR", default_value = "nbdcast-demo")]
    dir: PathBuf,
    /// Size of the volume when it is created [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    size: Option<ByteSize>,
    /// Number of replicas when it is created, 1 to 16 [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=16))]
    replicas: Option<u8>,
    /// Where NBD clients connect: host:port or unix:/path [default: 127.0.0.1:10809]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<Endpoint>,
    /// Where the admin HTTP server listens: host:port [default: 127.0.0.1:10808]
    #[arg(long, value_name = "ADDRESS")]
    admin: Option<Endpoint>,
    /// Whether NBD clients use TLS [default: off]
    #[arg(long, value_name = "MODE", requires = "tls_certificates")]
    tls: Option<TlsMode>,
    /// Directory with ca-cert.pem, server-cert.pem and server-key.pem; clients show a certificate of that CA
    #[arg(long, value_name = "DIR", requires = "tls")]
    tls_certificates: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// Config file; config/engine.toml is a complete sample
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Create only this volume instead of all in the config
    volume: Option<String>,
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Config file; config/engine.toml is a complete sample
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
    /// Serve even if another engine seems to be serving these volumes; that one is shut out
    #[arg(long)]
    take_over: bool,
    /// Whether NBD clients use TLS, instead of what the config file says
    #[arg(long, value_name = "MODE")]
    tls: Option<TlsMode>,
}

#[derive(Debug, Args)]
struct CertsArgs {
    /// Config file of the engine: certificates for all its agents are made
    #[arg(long, value_name = "FILE", required_unless_present = "replica")]
    config: Option<PathBuf>,
    /// Where the directories are made; what is there is left as it is
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// An agent, by the name of its replica; may be given more than once
    #[arg(long, value_name = "NAME")]
    replica: Vec<String>,
    /// An NBD client to make a certificate for; may be given more than once
    #[arg(long, value_name = "NAME")]
    client: Vec<String>,
    /// A name or address by which NBD clients reach the engine; may be given more than once
    #[arg(long, value_name = "HOST")]
    host: Vec<String>,
    /// Days for which new certificates are valid
    #[arg(long, value_name = "N", default_value_t = DAYS_MAX, value_parser = clap::value_parser!(u32).range(1..=i64::from(DAYS_MAX)))]
    days: u32,
}

/// Which engine.
#[derive(Debug, Args)]
struct EngineArgs {
    /// The engine that was started with this config file
    #[arg(long, value_name = "FILE", conflicts_with = "admin")]
    config: Option<PathBuf>,
    /// The engine whose admin server is here
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:10808")]
    admin: AdminUrl,
}

/// Where a new replica is.
#[derive(Debug, Args)]
struct PlaceArgs {
    /// Where its listener agent listens: host:port or unix:/path
    #[arg(long, value_name = "ADDRESS", required_unless_present = "path", conflicts_with_all = ["path", "image"])]
    address: Option<Endpoint>,
    /// DNS name that the agent's certificate must bear [default: the replica's name]
    #[arg(long, value_name = "NAME", requires = "address", conflicts_with = "path")]
    certificate: Option<String>,
    /// Data directory of a replica inside the engine's process, on the engine's machine
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// Block device that holds the image; whatever is on it is erased
    #[arg(long, value_name = "DEVICE", requires = "path")]
    image: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct AddArgs {
    volume: String,
    /// Name of the new replica
    name: String,
    #[command(flatten)]
    place: PlaceArgs,
    /// Return when the replica is added, without waiting until it holds everything
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    volume: String,
    /// Name of the replica
    name: String,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Args)]
struct ReplaceArgs {
    volume: String,
    /// Name of the replica that leaves
    old: String,
    /// Name of the replica that takes its place
    new: String,
    #[command(flatten)]
    place: PlaceArgs,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Args)]
struct ResyncArgs {
    volume: String,
    /// Name of the replica
    name: String,
    /// Copy all of it anew; a member leaves the view for that
    #[arg(long)]
    full: bool,
    /// Return at once, without waiting until it holds everything
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Args)]
struct ResizeArgs {
    volume: String,
    /// The new size, such as 20GiB; volumes only grow
    size: ByteSize,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Args)]
struct ScrubArgs {
    volume: String,
    /// Wait until it ends, also if it was under way already; fail if something is not in order then
    #[arg(long)]
    wait: bool,
    /// End the scrub that is under way
    #[arg(long, conflicts_with = "wait")]
    stop: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Args)]
struct ActivateArgs {
    volume: String,
    /// A replica to do without; may be given more than once
    #[arg(long, value_name = "NAME", required = true)]
    without: Vec<String>,
    /// Yes: what only these replicas hold may be lost, even if clients were told that it is durable
    #[arg(long)]
    accept_data_loss: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    engine: EngineArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs the program with the process's arguments. Exit codes: 0 ok, 1 failed, 2 wrong usage or config.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    cli.console.init_logging();
    service::raise_file_limit();
    let passed = service::passed_sockets();
    console::run(PROGRAM, console::processors(), async {
        let sockets = serve::listening(passed?)?;
        match cli.command {
            Command::Demo(args) => demo::run(args, sockets).await,
            Command::Create(args) => create(args).await,
            Command::Serve(args) => {
                let mut config = load(&args.config)?;
                config.nbd.tls.mode = args.tls.unwrap_or(config.nbd.tls.mode);
                config.check(&args.config).map_err(unusable)?;
                let options = StartOptions { take_over: args.take_over, sockets };
                serve::run(&config, options, serve::announce_ready).await
            }
            Command::Certs(args) => certs::run(args),
            Command::Status(args) => status::run(args).await,
            Command::Top(engine) => top::run(&engine_url(&engine)?).await,
            Command::Replica(ReplicaCommand::Add(args)) => orders::add(args).await,
            Command::Replica(ReplicaCommand::Remove(args)) => orders::remove(args).await,
            Command::Replica(ReplicaCommand::Replace(args)) => orders::replace(args).await,
            Command::Replica(ReplicaCommand::Resync(args)) => orders::resync(args).await,
            Command::Resize(args) => orders::resize(args).await,
            Command::Scrub(args) => orders::scrub(args).await,
            Command::Activate(args) => orders::activate(args).await,
        }
    })
}

fn load(file: &std::path::Path) -> Result<EngineConfig, Failure> {
    EngineConfig::load(file).map_err(unusable)
}

/// Where the admin server of the engine is that was asked for.
fn engine_url(args: &EngineArgs) -> Result<AdminUrl, Failure> {
    let Some(file) = &args.config else { return Ok(args.admin.clone()) };
    AdminUrl::of_listener(&load(file)?.admin.listen)
        .ok_or_else(|| Failure::usage(format_args!("{}: admin.listen is not a TCP address", file.display())))
}

fn not_answered(error: AskError) -> Failure {
    Failure { exit_code: 1, message: error.to_string(), remedy: error.remedy().map(str::to_owned) }
}

fn unusable(error: LoadError) -> Failure {
    Failure::usage(&error).remedy(error.remedy())
}

async fn create(args: CreateArgs) -> Result<(), Failure> {
    let config = load(&args.config)?;
    if let Some(name) = &args.volume
        && !config.volumes.iter().any(|volume| volume.name == *name)
    {
        let names: Vec<&str> = config.volumes.iter().map(|v| v.name.as_str()).collect();
        let file = args.config.display();
        return Err(Failure::usage(format_args!("there is no volume {name:?} in {file}"))
            .remedy(format_args!("name one of: {}", names.join(", "))));
    }
    for line in runtime::create(&config, args.volume.as_deref()).await.map_err(not_created)? {
        say(line)?;
    }
    Ok(())
}

fn not_created(error: runtime::CreateError) -> Failure {
    Failure { exit_code: error.exit_code(), remedy: error.remedy(), message: error.to_string() }
}

#[cfg(test)]
mod tests;
