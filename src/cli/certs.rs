//! `nbdcast certs`: whose certificates are wanted, and where each directory goes. Makes none itself.

use std::net::IpAddr;

use listener_agent::config::Endpoint;
use listener_agent::console::{Failure, say};

use super::{CertsArgs, load};
use crate::certs::{self, ENGINE, Holder, Member, Wanted, is_host, is_name};
use crate::config::EngineConfig;

pub(super) fn run(args: CertsArgs) -> Result<(), Failure> {
    let wanted = wanted(&args)?;
    let members = certs::make(&args.out, &wanted).map_err(|error| Failure::failed(&error).remedy(error.remedy()))?;
    for member in &members {
        let what = if member.kept { "left as it was" } else { "made" };
        say(format_args!("{}: {what}", member.dir.display()))?;
    }
    for member in members.iter().filter(|member| !member.kept) {
        say(advice(member))?;
    }
    Ok(())
}

fn wanted(args: &CertsArgs) -> Result<Wanted, Failure> {
    let (mut agents, mut hosts) = (args.replica.clone(), args.host.clone());
    if let Some(file) = &args.config {
        let config = load(file)?;
        agents.extend(agents_of(&config));
        hosts.extend(config.nbd.listen.iter().filter_map(host_of));
    }
    let (agents, clients) = (each_once(agents), each_once(args.client.clone()));
    if clients.iter().any(|name| name.eq_ignore_ascii_case(ENGINE)) {
        return Err(Failure::usage(format_args!(
            "an NBD client named {ENGINE:?} could do with agents what the engine can"
        ))
        .remedy("choose another name"));
    }
    for name in agents.iter().chain(&clients) {
        if !is_name(name) {
            return Err(Failure::usage(format_args!(
                "{name:?} cannot be the name in a certificate: it is no DNS name"
            ))
            .remedy("choose a name such as \"node-a\"; for an agent, as `certificate` of its replica"));
        }
    }
    if let Some(host) = hosts.iter().find(|host| !is_host(host)) {
        return Err(Failure::usage(format_args!("{host:?} is neither a host name nor an IP address"))
            .remedy("give what NBD clients connect to, without the port"));
    }
    Ok(Wanted { agents, clients, hosts, days: args.days })
}

fn agents_of(config: &EngineConfig) -> Vec<String> {
    let replicas = config.volumes.iter().flat_map(|volume| &volume.replicas);
    replicas.filter_map(|replica| replica.certificate().map(str::to_owned)).collect()
}

/// What clients call the engine, if the address says it.
fn host_of(listen: &Endpoint) -> Option<String> {
    match listen {
        Endpoint::Tcp { host, .. } if host.parse::<IpAddr>().is_ok_and(|ip| ip.is_unspecified()) => None,
        Endpoint::Tcp { host, .. } => Some(host.clone()),
        Endpoint::Unix(_) => None,
    }
}

fn each_once(names: Vec<String>) -> Vec<String> {
    let mut once: Vec<String> = Vec::new();
    for name in names {
        if !once.iter().any(|known| known.eq_ignore_ascii_case(&name)) {
            once.push(name);
        }
    }
    once
}

/// Where a directory goes and which lines make use of it.
fn advice(member: &Member) -> String {
    let dir = member.dir.display();
    match &member.holder {
        Holder::Authority => format!(
            "\nKeep {dir} in a safe place: whoever has its ca-key.pem can make certificates. Nothing else needs it; run \
             this command again there to add agents and clients."
        ),
        Holder::Engine => format!(
            "\nCopy {dir} to the machine of the engine, such as to /etc/nbdcast/engine, and set in the engine's config:\n  \
             [agents]\n  certificates = \"/etc/nbdcast/engine\"\nFor NBD clients over TLS, also:\n  [nbd.tls]\n  mode = \"require\"\n  \
             certificates = \"/etc/nbdcast/engine\""
        ),
        Holder::Agent(name) => format!(
            "\nCopy {dir} to the machine of agent {name}, such as to /etc/nbdcast/agent, and set in the agent's config (or \
             give it --tls-certificates /etc/nbdcast/agent):\n  [tls]\n  certificates = \"/etc/nbdcast/agent\""
        ),
        Holder::Client(name) => format!(
            "\nGive {dir} to the NBD client {name}, such as to ~/certs:\n  \
             nbdinfo 'nbds://HOST/VOLUME?tls-certificates='$HOME/certs"
        ),
    }
}
