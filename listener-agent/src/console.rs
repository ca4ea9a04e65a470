//! How both programs meet the terminal: log setup, lines on standard output, errors, exit codes, signals.
//!
//! Owns process-wide things (the log subscriber, signal handlers, the async runtime) and is used by the two `main`s and
//! their commands only; no part of the product below them may print or exit.

use std::fmt::Display;
use std::future::Future;
use std::io::{self, Write};
use std::num::NonZero;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::level_filters::LevelFilter;

/// How long a program may take from the first signal to its end.
pub const SHUTDOWN_MAX: Duration = Duration::from_millis(4500);

/// Options that every command of both programs takes.
#[derive(Debug, Clone, Args)]
pub struct ConsoleArgs {
    /// Log more: -v for debug, -vv for everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// Form of the log lines on standard error
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    log_format: LogFormat,
}

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// One line of text per event
    Text,
    /// One JSON object per line
    Json,
}

impl ConsoleArgs {
    /// Sends logs to standard error as asked; call once, before anything logs. Without `-v`, level info and above.
    pub fn init_logging(&self) {
        let level = match self.verbose {
            0 => LevelFilter::INFO,
            1 => LevelFilter::DEBUG,
            2.. => LevelFilter::TRACE,
        };
        let subscriber = tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr);
        match self.log_format {
            LogFormat::Text => subscriber.init(),
            LogFormat::Json => subscriber.json().init(),
        }
    }
}

/// Why a command ends without success, in the form the operator sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// 1: failed. 2: wrong usage or configuration.
    pub exit_code: u8,
    /// One line: what happened, to which volume and replica, and the cause.
    pub message: String,
    /// One line: what to do about it.
    pub remedy: Option<String>,
}

impl Failure {
    /// Something failed while running: exit code 1.
    pub fn failed(message: impl Display) -> Failure {
        Failure { exit_code: 1, message: message.to_string(), remedy: None }
    }

    /// The command line or the configuration is wrong: exit code 2.
    pub fn usage(message: impl Display) -> Failure {
        Failure { exit_code: 2, ..Failure::failed(message) }
    }

    /// The same failure with advice.
    pub fn remedy(self, remedy: impl Display) -> Failure {
        Failure { remedy: Some(remedy.to_string()), ..self }
    }
}

/// Processors that this process may use.
#[must_use]
pub fn processors() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

/// Runs a program to its end: a new runtime, the command in it, the failure on standard error, the exit code.
///
/// Background work that is still running at the end is abandoned, so that a stuck disk cannot hold up the exit.
///
/// `threads` look after connections.
pub fn run(program: &str, threads: usize, command: impl Future<Output = Result<(), Failure>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads.max(1)).enable_all().build();
    let result = match runtime {
        Ok(runtime) => {
            let result = runtime.block_on(command);
            runtime.shutdown_background();
            result
        }
        Err(error) => Err(Failure::failed(format_args!("cannot start the async runtime: {error}"))),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            print_failure(program, &failure);
            ExitCode::from(failure.exit_code)
        }
    }
}

/// Prints a failure to standard error: `PROGRAM: what happened`, then `  remedy: what to do`.
pub fn print_failure(program: &str, failure: &Failure) {
    let mut text = format!("{program}: {}\n", failure.message);
    if let Some(remedy) = &failure.remedy {
        text.push_str(&format!("  remedy: {remedy}\n"));
    }
    // Nobody is left to tell if standard error is gone.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Prints `line` to standard output, at once even into a pipe.
///
/// A reader that has gone away (`nbdcast status | head -1`) is not a failure.
pub fn say(line: impl Display) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    match writeln!(stdout, "{line}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Failure::failed(format_args!("cannot write to standard output: {error}"))),
    }
}

/// SIGTERM and SIGINT, caught from `install` on.
#[derive(Debug)]
pub struct ShutdownSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl ShutdownSignals {
    /// Takes over both signals; from here on they no longer kill the process by themselves.
    pub fn install() -> Result<ShutdownSignals, Failure> {
        let catch = |kind| {
            signal(kind).map_err(|error| Failure::failed(format_args!("cannot install a signal handler: {error}")))
        };
        Ok(ShutdownSignals { terminate: catch(SignalKind::terminate())?, interrupt: catch(SignalKind::interrupt())? })
    }

    /// Waits for the next of the two and returns its name. Safe to drop and call again.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// From now on the next signal ends the process at once with exit code 1: the operator does not want to wait.
    pub fn exit_on_next(mut self, program: &'static str) {
        tokio::spawn(async move {
            let name = self.next().await;
            print_failure(program, &Failure::failed(format_args!("stopped at once by a second signal, {name}")));
            std::process::exit(1);
        });
    }
}
