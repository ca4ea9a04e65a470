//! The commands that change a volume at work: each is an order to a running engine, then a wait for what comes of it, then
//! what to change in the config file. Changes nothing itself.

use std::path::{Path, PathBuf};

use hyper::Method;
use listener_agent::config::ByteSize;
use listener_agent::console::{Failure, say};
use serde_json::{Value, json};

use super::{
    ActivateArgs, AddArgs, PlaceArgs, RemoveArgs, ReplaceArgs, ResizeArgs, ResyncArgs, ScrubArgs, engine_url,
    not_answered, progress, snippet,
};
use crate::admin::client::{AdminUrl, give_order};
use crate::config::{ReplicaPlace, check_name};
use crate::status::ScrubState;

pub(super) async fn add(args: AddArgs) -> Result<(), Failure> {
    let url = engine_url(&args.engine)?;
    add_replica(&url, &args.volume, &args.name, &place_of(args.place)?).await?;
    if args.no_wait {
        return Ok(());
    }
    progress::until_member(&url, &args.volume, &args.name).await?;
    say_member(&args.volume, &args.name)
}

pub(super) async fn remove(args: RemoveArgs) -> Result<(), Failure> {
    remove_replica(&engine_url(&args.engine)?, &args.volume, &args.name).await
}

pub(super) async fn replace(args: ReplaceArgs) -> Result<(), Failure> {
    let url = engine_url(&args.engine)?;
    let place = place_of(args.place)?;
    let status = progress::volume_of(&url, &args.volume).await?;
    if !status.replicas.iter().any(|replica| replica.name == args.old) {
        let known: Vec<&str> = status.replicas.iter().map(|replica| replica.name.as_str()).collect();
        return Err(Failure::failed(format_args!("volume {} has no replica {}", args.volume, args.old))
            .remedy(format_args!("name one of {}", known.join(", "))));
    }
    add_replica(&url, &args.volume, &args.new, &place).await?;
    progress::until_member(&url, &args.volume, &args.new).await?;
    say_member(&args.volume, &args.new)?;
    remove_replica(&url, &args.volume, &args.old).await
}

pub(super) async fn resync(args: ResyncArgs) -> Result<(), Failure> {
    let url = engine_url(&args.engine)?;
    let path = format!("{}/resync", replica_path(&args.volume, &args.name)?);
    say(order(&url, Method::POST, &path, json!({ "full": args.full })).await?)?;
    if args.no_wait {
        return Ok(());
    }
    progress::until_member(&url, &args.volume, &args.name).await?;
    say_member(&args.volume, &args.name)
}

pub(super) async fn scrub(args: ScrubArgs) -> Result<(), Failure> {
    let url = engine_url(&args.engine)?;
    let path = format!("{}/scrub", volume_path(&args.volume)?);
    let state = progress::volume_of(&url, &args.volume).await?.scrub.state;
    if args.wait && state != ScrubState::Idle {
        say(format_args!("volume {} is being scrubbed already", args.volume))?;
    } else {
        say(order(&url, Method::POST, &path, json!({ "stop": args.stop })).await?)?;
    }
    if !args.wait {
        return Ok(());
    }
    let result = progress::until_scrubbed(&url, &args.volume).await?;
    let found = result.counts.describe();
    if !result.is_finished {
        let done = ByteSize::from_bytes(result.done_bytes).human();
        return Err(Failure::failed(format_args!(
            "the scrub of volume {} was stopped after {done}: {found}",
            args.volume
        )));
    }
    if result.counts.unrepaired_blocks > 0 || result.counts.incomplete_bytes > 0 {
        return Err(Failure::failed(format_args!("volume {} is scrubbed: {found}", args.volume))
            .remedy("see its events (`nbdcast top`, or /events) for which blocks and replicas, then scrub again"));
    }
    say(format_args!("volume {} is scrubbed: {found}", args.volume))
}

pub(super) async fn resize(args: ResizeArgs) -> Result<(), Failure> {
    let url = engine_url(&args.engine)?;
    let path = format!("{}/resize", volume_path(&args.volume)?);
    say(order(&url, Method::POST, &path, json!({ "size": args.size.to_string() })).await?)?;
    say(snippet::resized(&args.volume, args.size).trim_end())
}

pub(super) async fn activate(args: ActivateArgs) -> Result<(), Failure> {
    let names = args.without.join(", ");
    if !args.accept_data_loss {
        return Err(Failure::usage(format_args!(
            "without {names}, everything that only they hold is lost, even if clients were told that it is durable"
        ))
        .remedy("bring them back if that is possible in any way; if it is not, add --accept-data-loss"));
    }
    let url = engine_url(&args.engine)?;
    let path = format!("{}/activate", volume_path(&args.volume)?);
    say(order(&url, Method::POST, &path, json!({ "without": args.without, "accept_data_loss": true })).await?)?;
    progress::until_serving(&url, &args.volume).await?;
    say(format_args!("volume {} serves", args.volume))
}

async fn add_replica(url: &AdminUrl, volume: &str, replica: &str, place: &ReplicaPlace) -> Result<(), Failure> {
    checked(replica)?;
    let body = match place {
        ReplicaPlace::Agent { address, certificate } => {
            json!({ "name": replica, "address": address.to_string(), "certificate": certificate })
        }
        ReplicaPlace::Embedded { path, image } => json!({ "name": replica, "path": path, "image": image }),
    };
    let path = format!("{}/replicas", volume_path(volume)?);
    say(order(url, Method::POST, &path, body).await?)?;
    say(snippet::added(volume, replica, place))
}

async fn remove_replica(url: &AdminUrl, volume: &str, replica: &str) -> Result<(), Failure> {
    let path = replica_path(volume, replica)?;
    say(order(url, Method::DELETE, &path, Value::Null).await?)?;
    progress::until_removed(url, volume, replica).await?;
    say(format_args!("replica {replica} is removed from volume {volume}; its files are left as they are"))?;
    say(snippet::removed(volume, replica).trim_end())
}

async fn order(url: &AdminUrl, method: Method, path: &str, body: Value) -> Result<String, Failure> {
    give_order(url, method, path, &body).await.map_err(not_answered)
}

fn say_member(volume: &str, replica: &str) -> Result<(), Failure> {
    say(format_args!("replica {replica} is a member of volume {volume}"))
}

fn checked(name: &str) -> Result<(), Failure> {
    check_name(name).map_err(|error| Failure::usage(error).remedy("choose a name such as \"vol0\" or \"node-a\""))
}

fn volume_path(volume: &str) -> Result<String, Failure> {
    checked(volume)?;
    Ok(format!("/volumes/{volume}"))
}

fn replica_path(volume: &str, replica: &str) -> Result<String, Failure> {
    checked(replica)?;
    Ok(format!("{}/replicas/{replica}", volume_path(volume)?))
}

/// The place that was asked for; paths are made absolute, as the engine may run elsewhere.
fn place_of(args: PlaceArgs) -> Result<ReplicaPlace, Failure> {
    match (args.address, args.path) {
        (Some(address), _) => Ok(ReplicaPlace::Agent { address, certificate: args.certificate }),
        (None, Some(path)) => {
            let image = args.image.as_deref().map(absolute).transpose()?;
            Ok(ReplicaPlace::Embedded { path: absolute(&path)?, image })
        }
        (None, None) => Err(Failure::usage("either --address or --path is needed")),
    }
}

fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::usage(format_args!("{} is no usable path: {error}", path.display())))
}
