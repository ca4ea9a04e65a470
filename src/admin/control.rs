//! What an operator may order over HTTP: the bodies of requests, checked, and who carries them out. Carries out nothing.

use std::pin::Pin;

use hyper::StatusCode;
use listener_agent::config::{ByteSize, Endpoint};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::Answer;
use crate::config::{ReplicaConfig, ReplicaPlace, check_name};
use crate::status::StatusSource;

/// What is to be done to a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Order {
    /// A replica more; its name and place are well-formed, paths are absolute.
    AddReplica(ReplicaConfig),
    /// A replica leaves for good.
    RemoveReplica {
        /// Which.
        replica: String,
    },
    /// A replica out of the view is brought back now.
    Resync {
        /// Which.
        replica: String,
        /// All of it is copied anew.
        full: bool,
    },
    /// The volume grows. Carried out when it has.
    Resize {
        /// Its new size.
        size: ByteSize,
    },
    /// All replicas are read and compared; it goes on by itself.
    Scrub {
        /// Instead, a scrub that is under way ends.
        stop: bool,
    },
    /// A start that waits for replicas goes on without these; what only they hold is lost.
    Activate {
        /// Which.
        without: Vec<String>,
    },
}

/// Why an order is not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrderRefused {
    /// Whether there is no such volume or replica.
    pub is_unknown: bool,
    /// One line: what stands in the way.
    pub message: String,
    /// One line: what to do about it.
    pub remedy: Option<String>,
}

/// What became of an order, once it is: a line for people.
pub type OrderOutcome = Pin<Box<dyn Future<Output = Result<String, OrderRefused>> + Send>>;

/// Something that reports on volumes and takes orders.
pub trait Control: StatusSource {
    /// Carries out an order, as far as that can be waited for: what takes longer goes on by itself, and the status shows
    /// it. Formatting a replica may take minutes.
    fn order(&self, volume: &str, order: Order) -> OrderOutcome;
}

impl OrderRefused {
    /// A refusal in the form of an answer: `MESSAGE`, then `  remedy: WHAT TO DO`.
    pub(super) fn answer(self) -> Answer {
        let code = if self.is_unknown { StatusCode::NOT_FOUND } else { StatusCode::CONFLICT };
        let remedy = self.remedy.map_or_else(String::new, |remedy| format!("  remedy: {remedy}\n"));
        Answer::text(code, format!("{}\n{remedy}", self.message))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddBody {
    name: String,
    address: Option<Endpoint>,
    certificate: Option<String>,
    path: Option<std::path::PathBuf>,
    image: Option<std::path::PathBuf>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct ResyncBody {
    full: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizeBody {
    size: ByteSize,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct ScrubBody {
    stop: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActivateBody {
    without: Vec<String>,
    accept_data_loss: bool,
}

/// The orders there are, by their paths: `/volumes/VOLUME/...`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route<'a> {
    Add,
    Remove { replica: &'a str },
    Resync { replica: &'a str },
    Resize,
    Scrub,
    Activate,
}

impl<'a> Route<'a> {
    /// The volume and the routes of `path`; none if it is no path of orders. One path may do for several methods.
    pub(super) fn of(path: &'a str) -> Option<(&'a str, Route<'a>)> {
        let (volume, rest) = path.strip_prefix("/volumes/")?.split_once('/')?;
        let route = match rest.split('/').collect::<Vec<_>>().as_slice() {
            ["replicas"] => Route::Add,
            ["replicas", replica] => Route::Remove { replica },
            ["replicas", replica, "resync"] => Route::Resync { replica },
            ["resize"] => Route::Resize,
            ["scrub"] => Route::Scrub,
            ["activate"] => Route::Activate,
            _ => return None,
        };
        Some((volume, route))
    }

    /// The method that the path takes.
    pub(super) fn method(self) -> &'static str {
        match self {
            Route::Remove { .. } => "DELETE",
            Route::Add | Route::Resync { .. } | Route::Resize | Route::Scrub | Route::Activate => "POST",
        }
    }

    /// The order that `body` makes of it, or what is wrong with it in one line.
    pub(super) fn order(self, body: &[u8]) -> Result<Order, String> {
        match self {
            Route::Add => add_order(parse(body)?),
            Route::Remove { replica } => Ok(Order::RemoveReplica { replica: named(replica)? }),
            Route::Resync { replica } => {
                let full = if body.is_empty() { false } else { parse::<ResyncBody>(body)?.full };
                Ok(Order::Resync { replica: named(replica)?, full })
            }
            Route::Resize => Ok(Order::Resize { size: parse::<ResizeBody>(body)?.size }),
            Route::Scrub => {
                let stop = if body.is_empty() { false } else { parse::<ScrubBody>(body)?.stop };
                Ok(Order::Scrub { stop })
            }
            Route::Activate => activate_order(parse(body)?),
        }
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, String> {
    serde_json::from_slice(body).map_err(|error| format!("the body does not fit: {error}"))
}

fn named(name: &str) -> Result<String, String> {
    check_name(name).map_err(|error| error.to_string())?;
    Ok(name.to_owned())
}

fn add_order(body: AddBody) -> Result<Order, String> {
    let name = named(&body.name)?;
    let is_relative = |path: &std::path::PathBuf| !path.is_absolute();
    let place = match (body.address, body.path, body.image) {
        (Some(Endpoint::Tcp { port: 0, .. }), ..) => return Err("the address has port 0".to_owned()),
        (Some(address), None, None) => ReplicaPlace::Agent { address, certificate: body.certificate },
        (None, ..) if body.certificate.is_some() => {
            return Err("`certificate` is possible only beside `address`".to_owned());
        }
        (None, Some(path), image) if is_relative(&path) || image.as_ref().is_some_and(is_relative) => {
            return Err("`path` and `image` must be absolute".to_owned());
        }
        (None, Some(path), image) => ReplicaPlace::Embedded { path, image },
        (Some(_), ..) | (None, None, _) => {
            return Err("either `address`, or `path` and perhaps `image`, must be there".to_owned());
        }
    };
    Ok(Order::AddReplica(ReplicaConfig { name, place }))
}

fn activate_order(body: ActivateBody) -> Result<Order, String> {
    if !body.accept_data_loss {
        return Err("what only these replicas hold is lost; say so with \"accept_data_loss\": true".to_owned());
    }
    if body.without.is_empty() {
        return Err("`without` names no replica".to_owned());
    }
    let without = body.without.iter().map(|name| named(name)).collect::<Result<_, _>>()?;
    Ok(Order::Activate { without })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(path: &str, body: &str) -> Result<Order, String> {
        let (volume, route) = Route::of(path).expect("a path of orders");
        assert_eq!(volume, "vol0");
        route.order(body.as_bytes())
    }

    #[test]
    fn each_path_is_one_order() {
        let place = ReplicaPlace::Agent { address: "h:1".parse().expect("an address"), certificate: None };
        let add = Order::AddReplica(ReplicaConfig { name: "d".to_owned(), place });
        assert_eq!(order("/volumes/vol0/replicas", r#"{"name":"d","address":"h:1"}"#), Ok(add));
        let remove = Order::RemoveReplica { replica: "d".to_owned() };
        assert_eq!(order("/volumes/vol0/replicas/d", ""), Ok(remove));
        let resync = |full| Ok(Order::Resync { replica: "d".to_owned(), full });
        assert_eq!(order("/volumes/vol0/replicas/d/resync", ""), resync(false));
        assert_eq!(order("/volumes/vol0/replicas/d/resync", r#"{"full":true}"#), resync(true));
        let resize = Order::Resize { size: ByteSize::gib(2) };
        assert_eq!(order("/volumes/vol0/resize", r#"{"size":"2GiB"}"#), Ok(resize));
        assert_eq!(order("/volumes/vol0/scrub", ""), Ok(Order::Scrub { stop: false }));
        assert_eq!(order("/volumes/vol0/scrub", r#"{"stop":true}"#), Ok(Order::Scrub { stop: true }));
        let activate = Order::Activate { without: vec!["b".to_owned()] };
        assert_eq!(order("/volumes/vol0/activate", r#"{"without":["b"],"accept_data_loss":true}"#), Ok(activate));
        for path in ["/volumes", "/volumes/vol0", "/volumes/vol0/", "/volumes/vol0/replicas/d/x", "/volumes/vol0/x"] {
            assert_eq!(Route::of(path), None, "{path}");
        }
    }

    #[test]
    fn bodies_that_make_no_sense_are_refused_with_the_reason() {
        for (path, body, reason) in [
            ("replicas", "", "does not fit"),
            ("replicas", r#"{"name":"d"}"#, "either `address`"),
            ("replicas", r#"{"name":"../d","address":"h:1"}"#, "is not allowed"),
            ("replicas", r#"{"name":"d","address":"h:0"}"#, "port 0"),
            ("replicas", r#"{"name":"d","address":"h:1","path":"/d"}"#, "either `address`"),
            ("replicas", r#"{"name":"d","path":"d"}"#, "absolute"),
            ("replicas", r#"{"name":"d","path":"/d","certificate":"d"}"#, "only beside `address`"),
            ("replicas", r#"{"name":"d","adress":"h:1"}"#, "unknown field `adress`"),
            ("replicas/..", "", "is not allowed"),
            ("resize", r#"{"size":"2GB"}"#, "unknown unit"),
            ("scrub", r#"{"stop":1}"#, "does not fit"),
            ("activate", r#"{"without":["b"],"accept_data_loss":false}"#, "accept_data_loss"),
            ("activate", r#"{"without":["b"]}"#, "accept_data_loss"),
            ("activate", r#"{"without":[],"accept_data_loss":true}"#, "names no replica"),
        ] {
            let error = order(&format!("/volumes/vol0/{path}"), body).expect_err(body);
            assert!(error.contains(reason), "{path} {body}: {error}");
        }
    }
}
