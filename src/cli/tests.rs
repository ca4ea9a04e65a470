//! Stories about the command line: what parses, and what is a usage error.

use clap::CommandFactory;
use clap::error::ErrorKind;

use super::*;

fn parse(args: &str) -> Result<Command, ErrorKind> {
    let args = [PROGRAM].into_iter().chain(args.split_whitespace());
    match Cli::try_parse_from(args) {
        Ok(cli) => Ok(cli.command),
        Err(error) => Err(error.kind()),
    }
}

#[test]
fn the_command_line_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn only_commands_that_exist_are_shown() {
    let shown: Vec<String> = Cli::command().get_subcommands().map(|command| command.get_name().to_owned()).collect();
    assert_eq!(shown, ["demo", "create", "serve", "certs", "status", "top", "replica", "resize", "scrub", "activate"]);
}

#[test]
fn demo_needs_no_argument() {
    let Ok(Command::Demo(args)) = parse("demo") else {
        panic!("demo without arguments");
    };
    assert_eq!(args.dir, PathBuf::from("nbdcast-demo"));
    assert!(args.size.is_none() && args.replicas.is_none());
    assert!(args.listen.is_none() && args.admin.is_none());
}

#[test]
fn demo_takes_every_argument() {
    let line = "demo --dir d --size 64MiB --replicas 16 --listen unix:/s --admin 127.0.0.1:0 -vv";
    let Ok(Command::Demo(args)) = parse(line) else {
        panic!("demo with all arguments");
    };
    assert_eq!(args.size, Some(ByteSize::mib(64)));
    assert_eq!(args.replicas, Some(16));
    assert_eq!(args.listen, Some(Endpoint::Unix("/s".into())));
    for bad in ["--size 64MB", "--replicas 0", "--replicas 17", "--listen x"] {
        assert_eq!(parse(&format!("demo {bad}")).unwrap_err(), ErrorKind::ValueValidation);
    }
}

#[test]
fn create_and_serve_need_a_config() {
    assert_eq!(parse("create").unwrap_err(), ErrorKind::MissingRequiredArgument);
    assert_eq!(parse("serve").unwrap_err(), ErrorKind::MissingRequiredArgument);
    assert!(matches!(parse("create --config f vol0"), Ok(Command::Create(CreateArgs { volume: Some(_), .. }))));
    assert!(matches!(
        parse("serve --config f --take-over --log-format json"),
        Ok(Command::Serve(ServeArgs { take_over: true, .. }))
    ));
}

#[test]
fn status_asks_one_engine() {
    let Ok(Command::Status(args)) = parse("status --json") else {
        panic!("status without an address");
    };
    assert_eq!(args.engine.admin.to_string(), "http://127.0.0.1:10808");
    assert!(args.json);
    let Ok(Command::Status(args)) = parse("status --config f") else {
        panic!("status with a config");
    };
    assert_eq!(args.engine.config, Some(PathBuf::from("f")));
    assert_eq!(parse("status --config f --admin http://h:1").unwrap_err(), ErrorKind::ArgumentConflict);
    assert_eq!(parse("status --admin https://h:1").unwrap_err(), ErrorKind::ValueValidation);
}

#[test]
fn a_new_replica_has_one_place() {
    let Ok(Command::Replica(ReplicaCommand::Add(args))) = parse("replica add vol0 d --address h:1 --no-wait") else {
        panic!("add with an address");
    };
    assert_eq!((args.volume.as_str(), args.name.as_str(), args.no_wait), ("vol0", "d", true));
    assert!(parse("replica add vol0 d --path /d --image /dev/x").is_ok());
    assert!(parse("replica replace vol0 c d --path /d --admin h:1").is_ok());
    for (line, kind) in [
        ("replica add vol0 d", ErrorKind::MissingRequiredArgument),
        ("replica add vol0 d --image /dev/x", ErrorKind::MissingRequiredArgument),
        ("replica add vol0 d --address h:1 --path /d", ErrorKind::ArgumentConflict),
        ("replica add vol0 d --address h:1 --image /dev/x", ErrorKind::ArgumentConflict),
        ("replica add vol0 --path /d", ErrorKind::MissingRequiredArgument),
        ("replica replace vol0 d --path /d", ErrorKind::MissingRequiredArgument),
        ("replica remove vol0", ErrorKind::MissingRequiredArgument),
        ("replica", ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand),
        ("resize vol0 20GB", ErrorKind::ValueValidation),
        ("activate vol0 --accept-data-loss", ErrorKind::MissingRequiredArgument),
    ] {
        assert_eq!(parse(line).unwrap_err(), kind, "{line}");
    }
}

#[test]
fn activate_takes_several_names() {
    let Ok(Command::Activate(args)) = parse("activate vol0 --without b --without c --accept-data-loss") else {
        panic!("activate without two");
    };
    assert_eq!(args.without, ["b", "c"]);
    assert!(args.accept_data_loss);
}

#[test]
fn no_command_is_a_usage_error() {
    assert_eq!(parse("").unwrap_err(), ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand);
    assert_eq!(parse("frobnicate").unwrap_err(), ErrorKind::InvalidSubcommand);
}
